"""Training: `train_step`, which is one optimizer update, and `fit`, which is all of them.

Nothing in the loop waits for the device: losses are added up where they are computed and come to the host once an epoch, or
when a line of progress is due.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LRScheduler

from mtl.aside import Aside
from mtl.balancing import Balancer
from mtl.batches import Batch, Feed, Step
from mtl.checkpoint import load_weights, save_weights
from mtl.config import RunConfig
from mtl.data import Samples, Split
from mtl.decoding import Decoders
from mtl.errors import DivergedError
from mtl.evaluation import TaskFigures, evaluate, mean_score, summed_loss
from mtl.files import FileImages
from mtl.hardware import forget_peak_memory, memory_kept, peak_memory
from mtl.model import MultiTaskModel, Outputs
from mtl.optim import L2, lay_out_gradients
from mtl.progress import Progress
from mtl.seeding import seeded
from mtl.standardize import Standardize
from mtl.tracking import Rows, Tracker, draw_coupling
from mtl.writing import write_whole

PICTURES = 20
"""A run logs each alpha matrix as a picture about this often."""


@dataclass
class Run:
    """Everything a run needs, composed by `mtl.build`."""

    config: RunConfig
    directory: Path
    model: MultiTaskModel
    samples: Mapping[Split, Mapping[str, Samples]]
    feed: Feed
    balancer: Balancer
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    l2: L2
    autocast: Callable[[], AbstractContextManager[Any]]
    tracker: Tracker
    rows: Rows
    exchange_rows: Rows
    progress: Progress
    decoders: Decoders
    notes: list[str] = field(default_factory=list)
    """What is said when the run begins: which rule decided what, and why."""
    warm_up_seconds: float = 0.0
    """Spent on compiling before the first step."""
    shared_parameters: list[nn.Parameter] = field(init=False)
    parameters: list[nn.Parameter] = field(init=False)
    weights: Tensor = field(init=False)
    aside: Aside = field(init=False)

    def __post_init__(self) -> None:
        self.aside = Aside(self.directory, self.samples)
        self.shared_parameters = self.model.shared_parameters()
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.weights = torch.tensor([task.weight for task in self.model.tasks], device=device)

    def close(self) -> None:
        """End what runs beside the training: the processes that decode, and the writer of logs."""
        self.decoders.close()
        self.tracker.close()


@dataclass
class State:
    """Where a run stands: what training changes beside the model, the optimizer, the schedule and the balancer."""

    epoch: int = 0
    steps: int = 0
    images: int = 0
    training_seconds: float = 0.0
    best_epoch: int = 0
    best_score: float = -math.inf
    best: dict[str, Any] | None = None


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `val` and `test` are {task: {metric: value}} and `score`; None where there is no such split.

    `seconds` are those of training, validation and test; `warm_up_seconds`, of compiling, came before them, and
    `training_seconds` are those of optimizer steps alone. `peak_memory_bytes` is the most that the run held: of the GPU's
    memory, or of this process's (resident, libraries included); None where the system does not tell. `set_aside` is
    {dataset: {why: how many}} of what was not used.
    """

    run_dir: str
    epochs: int
    best_epoch: int
    seconds: float
    images_per_second: float
    warm_up_seconds: float
    training_seconds: float
    peak_memory_bytes: int | None
    parameters: int
    parameters_frozen: int
    val: dict[str, Any] | None
    test: dict[str, Any] | None
    sharing: str
    seed: int
    steps: int
    device: str
    precision: str
    execution: str
    compile: str
    config_digest: str
    set_aside: dict[str, dict[str, int]]


def train_step(run: Run, step: Step) -> Tensor:
    """One optimizer update from micro-batches of one batch per dataset.

    A task's loss is the sum over its labelled samples, divided by the number it would expect in a step of this size: its
    dataset's samples in the step times the share of training samples that carry its label. With every sample labelled that
    is the mean; with rare labels it is steady, and micro-batches add up to exactly the whole.

    Returns:
        (T + 1,), detached, on the device: the unweighted loss of each task, and the objective that was differentiated.
    """
    expected = expected_labels(run, step)
    total = torch.zeros(len(run.model.tasks) + 1, device=run.weights.device)
    for batches in step:
        features, losses = task_losses(run, run.model, batches, expected)
        weighted = [loss * weight for loss, weight in zip(losses, run.weights, strict=True)]
        objective = run.balancer.backward(weighted, features, run.shared_parameters)
        total += torch.stack([*losses, objective.reshape(())]).detach()
    run.l2.add_gradients()
    if run.config.optim.clip_norm is not None:
        nn.utils.clip_grad_norm_(run.parameters, run.config.optim.clip_norm)
    lay_out_gradients(run.parameters)
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.balancer.after_step(partial(losses_again, run, step))
    return total


def task_losses(
    run: Run, forward: Callable[[dict[str, Tensor]], Outputs], batches: list[Batch], expected: list[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """What the heads consumed, and the unweighted loss of each task, a scalar over `expected` labels, for one micro-batch."""
    of = {batch.dataset: batch for batch in batches}
    with run.autocast():
        features, outputs = forward({name: batch.images for name, batch in of.items()})
    tasks = zip(run.model.tasks, expected, strict=True)
    return list(features.values()), [summed_loss(task, outputs[task.name], of[task.dataset]) / n for task, n in tasks]


@torch.no_grad()
def losses_again(run: Run, step: Step) -> Tensor:
    """(T,): the weighted losses of a step under the parameters as they are now, in training mode. Batch norm takes no note of
    the pass; dropout draws anew.
    """
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}

    def forward(images: dict[str, Tensor]) -> Outputs:
        return functional_call(run.model, buffers, (images,))  # type: ignore[no-any-return]

    expected = expected_labels(run, step)
    losses = [torch.stack(task_losses(run, forward, batches, expected)[1]) for batches in step]
    return run.weights * torch.stack(losses).sum(0)


def expected_labels(run: Run, step: Step) -> list[float]:
    """Per task: samples of its dataset in this step times the share of training samples that carry its label."""
    size: dict[str, int] = {}
    for batches in step:
        for batch in batches:
            size[batch.dataset] = size.get(batch.dataset, 0) + len(batch)
    return [size[t.dataset] * run.feed.samples[t.dataset].shares[t.name] for t in run.model.tasks]


def seen_labels(run: Run, step: Step) -> list[int | Tensor]:
    """Per task: how many labels this step holds; on the device where some are missing."""
    counts: list[int | Tensor] = [0] * len(run.model.tasks)
    for batches in step:
        of = {batch.dataset: batch for batch in batches}
        for i, task in enumerate(run.model.tasks):
            counts[i] = counts[i] + of[task.dataset].labels(task.name)
    return counts


def fit(run: Run) -> RunResult:
    """Train a run to its end, write its files, and read the test split once, with the selected weights.

    Raises:
        DivergedError: a loss is no longer finite; weights of the epochs before stay on disk, as they do after Ctrl-C.
    """
    config, state, started = run.config, State(), time.monotonic()
    device = torch.device(config.device)
    forget_peak_memory(device)
    with run.progress, closing(run), seeded(config.seed, "training"), memory_kept():
        for line in [opening_line(run), *run.aside.news(), *run.notes]:
            run.progress.line(line)
        for task, start in config.init_from.items():
            run.progress.line(f"{task} starts from {start.task or task} of {start.path} ({start.weights}, {start.digest})")
        for line in file_lines(run):
            run.progress.line(line)
        log_exchange(run, state, pictures=True)
        try:
            while not finished(run, state):
                train_and_validate(run, state)
        except KeyboardInterrupt:
            run.progress.line(f"interrupted in epoch {state.epoch + 1}; {kept(run, state)}")
            raise
        load_weights(run.directory / "checkpoints" / "best.safetensors", run.model)
        test, score = score_split(run, Split.TEST)
        tell_aside(run)
    result = RunResult(
        run_dir=str(run.directory),
        epochs=state.epoch,
        best_epoch=state.best_epoch,
        seconds=round(time.monotonic() - started, 3),
        images_per_second=round(state.images / state.training_seconds, 1),
        warm_up_seconds=round(run.warm_up_seconds, 3),
        training_seconds=round(state.training_seconds, 3),
        peak_memory_bytes=peak_memory(device),
        parameters=run.model.parameter_count(),
        parameters_frozen=sum(p.numel() for p in run.model.parameters() if not p.requires_grad),
        val=state.best,
        test={**test, "score": score} if test else None,
        sharing=config.sharing.kind,
        seed=config.seed,
        steps=state.steps,
        device=config.device,
        precision=config.precision,
        execution=config.execution,
        compile=config.compile,
        config_digest=config.digest(),
        set_aside=run.aside.counts(),
    )
    write_whole(run.directory / "result.json", json.dumps(vars(result), indent=2) + "\n")
    return result


def finished(run: Run, state: State) -> bool:
    """Whether the last epoch or step is done, or the validation score has not risen for `patience` epochs."""
    config = run.config
    if config.patience is not None and state.best is not None and state.epoch - state.best_epoch >= config.patience:
        return True
    return state.epoch >= config.epochs or state.steps >= (config.max_steps or math.inf)


def train_and_validate(run: Run, state: State) -> None:
    """One epoch: train, validate, log, keep the weights."""
    epoch, names = state.epoch + 1, [task.name for task in run.model.tasks]
    trained = train_epoch(run, epoch, (run.config.max_steps or sys.maxsize) - state.steps)
    check_finite(run, state, dict(zip(names, trained.losses, strict=False)))
    figures, score = score_split(run, Split.VAL)
    check_finite(run, state, {name: of_task["loss"] for name, of_task in figures.items()})
    state.steps += trained.steps
    state.images += trained.images
    state.training_seconds += trained.seconds
    state.epoch = epoch
    log_epoch(run, state, trained, figures, score)
    log_exchange(run, state, pictures=epoch % math.ceil(run.config.epochs / PICTURES) == 0 or finished(run, state))
    description = {**describe(run), "epoch": epoch}
    save_weights(run.directory / "checkpoints" / "last.safetensors", run.model, description, run.balancer)
    if score is None or score > state.best_score:  # without validation data the last epoch is the choice
        state.best_epoch = epoch
        if score is not None:
            state.best_score, state.best = score, {**figures, "score": score}
        save_weights(run.directory / "checkpoints" / "best.safetensors", run.model, description, run.balancer)
    run.progress.line(summary_line(run, epoch, trained, figures, score))
    tell_aside(run)


def tell_aside(run: Run) -> None:
    """Say what was found meanwhile that cannot be used."""
    for line in run.aside.news():
        run.progress.line(line)


@dataclass(frozen=True)
class Trained:
    """What an epoch of training came to.

    `losses` are the means of each task's and, last, of the objective; `labels` how many each task learned from; `rates` the
    learning rate of each parameter group at the last step.
    """

    steps: int
    images: int
    seconds: float
    losses: list[float]
    labels: list[int]
    rates: dict[str, float]

    @property
    def images_per_second(self) -> float:
        """Throughput of training alone."""
        return self.images / self.seconds


def train_epoch(run: Run, epoch: int, most: int = sys.maxsize) -> Trained:
    """One pass over the feed, of at most `most` steps."""
    run.model.train()
    started = time.monotonic()
    images = done = 0
    sums = torch.zeros(len(run.model.tasks) + 1, device=run.weights.device)
    labels: list[int | Tensor] = [0] * len(run.model.tasks)
    rates: dict[str, float] = {}
    run.progress.begin(f"epoch {epoch}/{run.config.epochs}", min(most, run.feed.steps_per_epoch))
    for step in itertools.islice(run.feed.epoch(epoch), most):
        rates = {group["name"]: float(group["lr"]) for group in run.optimizer.param_groups}
        size = sum(len(batch) for batches in step for batch in batches)
        sums += size * train_step(run, step)
        labels = [a + b for a, b in zip(labels, seen_labels(run, step), strict=True)]
        done, images = done + 1, images + size
        live = None
        if run.progress.due():
            means = (sums / images).tolist()
            live = {task.name: value for task, value in zip(run.model.tasks, means, strict=False)}
            live["images/s"] = images / (time.monotonic() - started)
            run.progress.shown()
        run.progress.step(done, live)
    run.balancer.after_epoch()
    losses = (sums / images).tolist()
    return Trained(done, images, time.monotonic() - started, losses, [int(n) for n in labels], rates)


def check_finite(run: Run, state: State, losses: Mapping[str, float | None]) -> None:
    """Complain about an epoch in which a loss is not a number any more, naming the tasks."""
    if bad := [name for name, loss in losses.items() if loss is not None and not math.isfinite(loss)]:
        raise DivergedError(
            f"the loss of {', '.join(bad)} is not finite in epoch {state.epoch + 1}; {kept(run, state)}; try a lower "
            "optim.lr, or optim.clip_norm"
        )


def kept(run: Run, state: State) -> str:
    """Which weights are on disk."""
    return f"weights of epoch {state.epoch} are in {run.directory}" if state.epoch else f"no weights are in {run.directory} yet"


def score_split(run: Run, split: Split) -> tuple[dict[str, TaskFigures], float | None]:
    """Each task's figures on a split, and the mean score; empty and None where there is no such split."""
    figures = evaluate(run.model, run.samples[split], 2 * run.config.batch_size, run.autocast)
    return figures, mean_score(run.model.tasks, figures)


def describe(run: Run) -> dict[str, Any]:
    """What a reader of weights needs beside them: tasks in order, with dataset, target and head, and what the network takes."""
    tasks = [{"name": t.name, "dataset": t.dataset, "target": t.target, **t.head.describe()} for t in run.model.tasks]
    images = next(iter(run.samples[Split.TRAIN].values())).images
    return {"tasks": tasks, "input": {"shape": list(images.shape[1:]), "dtype": str(images.dtype).removeprefix("torch.")}}


def log_epoch(run: Run, state: State, trained: Trained, figures: Mapping[str, TaskFigures], score: float | None) -> None:
    """Write an epoch's figures to the tracker and to `metrics.jsonl`."""
    names = [task.name for task in run.model.tasks]
    values = {f"train/loss/{name}": value for name, value in zip(names, trained.losses, strict=False)}
    values["train/loss/total"] = trained.losses[-1]
    if run.l2.l2:
        values["train/loss/l2"] = run.l2.value().item()
    for name, of_task in figures.items():
        values |= {f"val/{name}/{metric}": v for metric, v in of_task.items() if metric != "n" and v is not None}
    if score is not None:
        values["val/score"] = score
    values |= {f"lr/{group}": rate for group, rate in trained.rates.items()}
    values["time/images_per_second"] = trained.images_per_second
    run.tracker.scalars(values, state.steps)
    when = {"epoch": state.epoch, "step": state.steps}
    rows: list[dict[str, Any]] = []
    for task, n, loss in zip(run.model.tasks, trained.labels, trained.losses, strict=False):
        rows.append({**when, "split": "train", "task": task.name, "n": n, "loss": loss})
    rows += [{**when, "split": "val", "task": name, **of_task} for name, of_task in figures.items()]
    run.rows.write(rows)


def log_exchange(run: Run, state: State, pictures: bool) -> None:
    """Log how strongly each task receives from each other at each layer point, to the tracker and to `exchange.jsonl`."""
    names, step = [task.name for task in run.model.tasks], state.steps
    rows: list[dict[str, Any]] = []
    for point, unit in run.model.exchange().items():
        coupling = unit.coupling()
        if coupling is None:
            continue
        matrix = coupling.cpu().double().numpy()
        rows.append({"epoch": state.epoch, "step": step, "point": point, "coupling": matrix.round(7).tolist()})
        pairs = {f"stitch/{point}/{t}_from_{s}": matrix[i, j] for i, t in enumerate(names) for j, s in enumerate(names)}
        run.tracker.scalars(pairs, step)
        if pictures:
            run.tracker.image(
                f"stitch/{point}", draw_coupling(matrix, names, f"{unit.coupling_label}\n{point}, step {step}"), step
            )
    if rows:
        run.exchange_rows.write(rows)


def opening_line(run: Run) -> str:
    """What is about to be trained, in one line."""
    config, model = run.config, run.model
    count = sum(len(part) for part in run.samples[Split.TRAIN].values())
    return (
        f"{config.sharing.kind}: {len(model.tasks)} tasks, {model.parameter_count():,} parameters, {count:,} training images, "
        f"{config.device} {config.precision}{', towers batched' * (config.execution == 'batched')}, seed {config.seed}, "
        f"{run.directory}"
    )


def file_lines(run: Run) -> Iterator[str]:
    """Of each dataset of image files: who decodes them, and how many its mean and deviation are from."""
    for name, part in run.samples[Split.TRAIN].items():
        if isinstance(part.images, FileImages):
            standardize = run.model.inputs[name]
            assert isinstance(standardize, Standardize)
            some = f"; mean and deviation are those of {n:,} of them" if 0 < (n := standardize.fitted_on) < len(part) else ""
            count = run.decoders.workers
            workers = f"{count} process{'es' * (count > 1)}" if count else "the training process"
            yield f"{name}: {len(part):,} training images are files, decoded by {workers}{some}"


def summary_line(run: Run, epoch: int, trained: Trained, figures: Mapping[str, TaskFigures], score: float | None) -> str:
    """One epoch in one line: training losses, validation scores, speed."""
    parts = [f"epoch {epoch}/{run.config.epochs}"]
    for task, loss in zip(run.model.tasks, trained.losses, strict=False):
        text = f"{task.name} loss {loss:.4f}"
        if (value := figures.get(task.name, {}).get(task.score_name)) is not None:
            text += f" val {task.score_name} {value:.4f}"
        parts.append(text)
    if score is not None:
        parts.append(f"val score {score:.4f}")
    parts.append(f"{trained.images_per_second:,.0f} images/s")
    return " | ".join(parts)
