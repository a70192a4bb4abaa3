"""What a run says of itself while it trains: lines, figures for the tracker, rows of `metrics.jsonl` and `exchange.jsonl`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mtl.data import Split
from mtl.evaluation import TaskFigures
from mtl.files import FileImages
from mtl.run import Run, State
from mtl.standardize import Standardize
from mtl.tracking import draw_coupling

PICTURES = 20
"""A run logs each alpha matrix as a picture about this often."""


@dataclass(frozen=True)
class Trained:
    """What an epoch of training came to.

    `losses` are the means of each task's and, last, of the objective; `labels` how many each task learned from; `rates` the
    learning rate of each parameter group at the last step.
    """

    images: int
    seconds: float
    losses: list[float]
    labels: list[int]
    rates: dict[str, float]

    @property
    def images_per_second(self) -> float:
        """Throughput of training alone."""
        return self.images / self.seconds


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


def beginning_lines(run: Run) -> Iterator[str]:
    """What is said before training begins: of what, on what, by which rules, from where."""
    yield opening_line(run)
    yield from run.aside.news()
    yield from run.notes
    for task, start in run.config.init_from.items():
        yield f"{task} starts from {start.task or task} of {start.path} ({start.weights}, {start.digest})"
    yield from file_lines(run)


def opening_line(run: Run) -> str:
    """What is about to be trained, in one line."""
    config, model = run.config, run.model
    count = sum(len(part) for part in run.samples[Split.TRAIN].values())
    several = f"{run.processes.count} processes, " * (run.processes.count > 1)
    return (
        f"{config.sharing.kind}: {len(model.tasks)} tasks, {model.parameter_count():,} parameters, {count:,} training images, "
        f"{config.device} {config.precision}{', towers batched' * (config.execution == 'batched')}, {several}"
        f"seed {config.seed}, {run.directory}"
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
        text = f"{task.name} loss {_short(loss)}"
        if (value := figures.get(task.name, {}).get(task.score_name)) is not None:
            text += f" val {task.score_name} {_short(value)}"
        parts.append(text)
    if score is not None:
        parts.append(f"val score {_short(score)}")
    parts.append(f"{trained.images_per_second:,.0f} images/s")
    return " | ".join(parts)


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def tell_aside(run: Run) -> None:
    """Say what was found meanwhile that cannot be used, by any process."""
    for found in run.processes.gather(run.aside.unreadable())[1:]:
        run.aside.add(found)
    for line in run.aside.news():
        run.progress.line(line)
