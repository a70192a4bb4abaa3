"""Training: `train_step`, which is one optimizer update, and `fit`, which is all of them.

Nothing in the loop waits for the device: losses are added up where they are computed and come to the host once an epoch, or
when a line of progress is due.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from mtl.balancing import Balancer
from mtl.batches import Feed, Step
from mtl.checkpoint import load_weights, save_weights
from mtl.config import RunConfig
from mtl.data import Samples, Split
from mtl.errors import RunError
from mtl.evaluation import TaskFigures, evaluate, mean_score, summed_loss
from mtl.model import MultiTaskModel
from mtl.optim import L2
from mtl.progress import Progress
from mtl.seeding import seeded
from mtl.tracking import Rows, Tracker, draw_coupling

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
    progress: Progress
    shared_parameters: list[nn.Parameter] = field(init=False)
    parameters: list[nn.Parameter] = field(init=False)
    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.shared_parameters = self.model.shared_parameters()
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.weights = torch.tensor([task.weight for task in self.model.tasks], device=device)


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `val` and `test` are {task: {metric: value}} and `score`; None where there is no such split."""

    run_dir: str
    epochs: int
    best_epoch: int
    seconds: float
    images_per_second: float
    parameters: int
    val: dict[str, Any] | None
    test: dict[str, Any] | None
    sharing: str
    seed: int
    steps: int
    device: str
    precision: str
    config_digest: str


def train_step(run: Run, step: Step) -> Tensor:
    """One optimizer update from micro-batches of one batch per dataset.

    A task's loss is the sum over its labelled samples, divided by the number it would expect in a step of this size: its
    dataset's samples in the step times the share of training samples that carry its label. With every sample labelled that
    is the mean; with rare labels it is steady, and micro-batches add up to exactly the whole.

    Returns:
        (T + 1,), detached, on the device: the unweighted loss of each task, and the objective that was differentiated.
    """
    model, tasks = run.model, run.model.tasks
    expected = expected_labels(run, step)
    total = torch.zeros(len(tasks) + 1, device=run.weights.device)
    for batches in step:
        of = {batch.dataset: batch for batch in batches}
        with run.autocast():
            features = model.features({name: batch.images for name, batch in of.items()})
            outputs = [model.heads[task.name](f) for task, f in zip(tasks, features, strict=True)]
        losses = torch.stack(
            [summed_loss(task, y, of[task.dataset]) / n for task, y, n in zip(tasks, outputs, expected, strict=True)]
        )
        objective = run.balancer.backward(losses * run.weights, features, run.shared_parameters)
        total += torch.cat([losses.detach(), objective.reshape(1)])
    run.l2.add_gradients()
    if run.config.optim.clip_norm is not None:
        nn.utils.clip_grad_norm_(run.parameters, run.config.optim.clip_norm)
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    return total


def expected_labels(run: Run, step: Step) -> list[float]:
    """Per task: samples of its dataset in this step times the share of training samples that carry its label."""
    size: dict[str, int] = {}
    for batches in step:
        for batch in batches:
            size[batch.dataset] = size.get(batch.dataset, 0) + len(batch)
    return [size[t.dataset] * run.feed.samples[t.dataset].share(t.name) for t in run.model.tasks]


def fit(run: Run) -> RunResult:
    """Train a run to its end, write its files, and read the test split once, with the selected weights.

    Raises:
        RunError: a loss is no longer finite; weights of the epochs before stay on disk.
    """
    config = run.config
    best: dict[str, Any] | None = None
    best_score, best_epoch, epoch, steps = -math.inf, 0, 0, 0
    images = training_seconds = 0.0
    started = time.monotonic()
    limit = config.max_steps or run.feed.steps_per_epoch * config.epochs
    last_epoch = min(config.epochs, math.ceil(limit / run.feed.steps_per_epoch))
    with run.progress, seeded(config.seed, "training"):
        log_exchange(run, steps, pictures=True)
        for epoch in range(1, last_epoch + 1):
            count, seconds, losses = train_epoch(run, epoch, last_epoch, limit - steps)
            taken = min(limit - steps, run.feed.steps_per_epoch)
            steps, images, training_seconds = steps + taken, images + count, training_seconds + seconds
            check_finite(run, epoch, losses)
            figures, score = score_split(run, Split.VAL)
            pictured = epoch % math.ceil(last_epoch / PICTURES) == 0 or epoch == last_epoch
            log_epoch(run, epoch, steps, losses, figures, score, count / seconds)
            log_exchange(run, steps, pictures=pictured)
            description = describe(run.model)
            save_weights(run.directory / "checkpoints" / "last.safetensors", run.model, {**description, "epoch": epoch})
            if score is None or score > best_score:  # without validation data the last epoch is the choice
                best_score, best_epoch = score if score is not None else -math.inf, epoch
                best = {**figures, "score": score} if figures else None
                save_weights(run.directory / "checkpoints" / "best.safetensors", run.model, {**description, "epoch": epoch})
            run.progress.line(summary_line(run, epoch, last_epoch, losses, figures, score, count / seconds))
            if config.patience is not None and score is not None and epoch - best_epoch >= config.patience:
                run.progress.line(f"stopping: the validation score has not risen for {config.patience} epochs")
                break
        load_weights(run.directory / "checkpoints" / "best.safetensors", run.model)
        figures, score = score_split(run, Split.TEST)
        test = {**figures, "score": score} if figures else None
    run.tracker.close()
    result = RunResult(
        run_dir=str(run.directory),
        epochs=epoch,
        best_epoch=best_epoch,
        seconds=round(time.monotonic() - started, 3),
        images_per_second=round(images / training_seconds, 1),
        parameters=run.model.parameter_count(),
        val=best,
        test=test,
        sharing=config.sharing.kind,
        seed=config.seed,
        steps=steps,
        device=config.device,
        precision=config.precision,
        config_digest=config.digest(),
    )
    (run.directory / "result.json").write_text(json.dumps(result.__dict__, indent=2) + "\n")
    return result


def train_epoch(run: Run, epoch: int, epochs: int, most: int) -> tuple[int, float, list[float]]:
    """One pass over the feed, at most `most` steps: (images, seconds, mean losses per task and of the objective)."""
    run.model.train()
    started = time.monotonic()
    count = done = 0
    sums = torch.zeros(len(run.model.tasks) + 1, device=run.weights.device)
    run.progress.begin(epoch, epochs, min(most, run.feed.steps_per_epoch))
    for step in run.feed.epoch(epoch):
        sums += train_step(run, step)
        done += 1
        count += sum(len(batch) for batches in step for batch in batches)
        live = None
        if run.progress.due():
            means = (sums / done).tolist()
            live = {task.name: value for task, value in zip(run.model.tasks, means, strict=False)}
            live["images/s"] = count / (time.monotonic() - started)
            run.progress.shown()
        run.progress.step(done, live)
        if done >= most:
            break
    means = (sums / done).tolist()
    return count, time.monotonic() - started, means


def check_finite(run: Run, epoch: int, losses: list[float]) -> None:
    """Complain about an epoch whose loss is not a number any more, naming the tasks."""
    if bad := [t.name for t, value in zip(run.model.tasks, losses, strict=False) if not math.isfinite(value)]:
        kept = f"weights of epoch {epoch - 1} are in {run.directory}" if epoch > 1 else "no weights were written"
        raise RunError(
            f"the loss of {', '.join(bad)} is not finite in epoch {epoch}; {kept}; try a lower optim.lr or clip_norm"
        )


def score_split(run: Run, split: Split) -> tuple[dict[str, TaskFigures], float | None]:
    """Each task's figures on a split, and the mean score; empty and None where there is no such split."""
    figures = evaluate(run.model, run.samples[split], 2 * run.config.batch_size, run.autocast)
    return figures, mean_score(run.model.tasks, figures)


def describe(model: MultiTaskModel) -> dict[str, Any]:
    """What a reader of weights needs beside them: tasks in order, with dataset, target and head."""
    return {"tasks": [{"name": t.name, "dataset": t.dataset, "target": t.target, **t.head.describe()} for t in model.tasks]}


def log_epoch(
    run: Run,
    epoch: int,
    step: int,
    losses: list[float],
    figures: Mapping[str, TaskFigures],
    score: float | None,
    images_per_second: float,
) -> None:
    """Write an epoch's figures to the tracker and to `metrics.jsonl`."""
    names = [task.name for task in run.model.tasks]
    values = {f"train/loss/{name}": value for name, value in zip(names, losses, strict=False)}
    values["train/loss/total"] = losses[-1]
    if run.l2.l2:
        values["train/loss/l2"] = run.l2.value().item()
    for name, of_task in figures.items():
        values |= {f"val/{name}/{metric}": v for metric, v in of_task.items() if metric != "n" and v is not None}
    if score is not None:
        values["val/score"] = score
    values |= {f"lr/{group['name']}": float(group["lr"]) for group in run.optimizer.param_groups}
    values["time/images_per_second"] = images_per_second
    run.tracker.scalars(values, step)
    rows: list[dict[str, Any]] = []
    for task, loss in zip(run.model.tasks, losses, strict=False):
        n = run.feed.samples[task.dataset].labelled[task.name]
        rows.append({"epoch": epoch, "step": step, "split": "train", "task": task.name, "n": n, "loss": loss})
    rows += [{"epoch": epoch, "step": step, "split": "val", "task": name, **of_task} for name, of_task in figures.items()]
    run.rows.write(rows)


def log_exchange(run: Run, step: int, pictures: bool) -> None:
    """Log how strongly each task receives from each other at each layer point."""
    names = [task.name for task in run.model.tasks]
    for point, unit in run.model.exchange().items():
        coupling = unit.coupling()
        if coupling is None:
            continue
        matrix = coupling.double().cpu().numpy()
        pairs = {f"stitch/{point}/{t}_from_{s}": matrix[i, j] for i, t in enumerate(names) for j, s in enumerate(names)}
        run.tracker.scalars(pairs, step)
        if pictures:
            run.tracker.image(f"stitch/{point}", draw_coupling(matrix, names, f"{point}, step {step}"), step)


def summary_line(
    run: Run,
    epoch: int,
    epochs: int,
    losses: list[float],
    figures: Mapping[str, TaskFigures],
    score: float | None,
    images_per_second: float,
) -> str:
    """One epoch in one line: training losses, validation scores, speed."""
    parts = [f"epoch {epoch}/{epochs}"]
    for task, loss in zip(run.model.tasks, losses, strict=False):
        text = f"{task.name} loss {loss:.4f}"
        if (value := figures.get(task.name, {}).get(task.score_name)) is not None:
            text += f" val {task.score_name} {value:.4f}"
        parts.append(text)
    if score is not None:
        parts.append(f"val score {score:.4f}")
    parts.append(f"{images_per_second:,.0f} images/s")
    return " | ".join(parts)
