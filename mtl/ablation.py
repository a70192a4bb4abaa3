"""What a trained model's exchange is worth: each task's score when another task's contribution at a layer point is cut.

It tells what this trained model relies on, not what a model trained without that exchange would reach: such a model would have
learned to do without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtl.data import Samples
from mtl.evaluation import evaluate
from mtl.execution import Execution, Segment
from mtl.model import MultiTaskModel, Outputs
from mtl.progress import Progress, Silent
from mtl.task import Task


class Cut(NamedTuple):
    """After a segment, a tower receives nothing of another: for it, that one's features are zero."""

    segment: int
    to: int
    source: int


class WithCuts(Execution):
    """Runs towers one by one, and each tower of `receivers` again for every cut of what it receives. What a cut does not reach
    is not computed twice: nothing before it, of the segment after it the receiving tower alone, and of the last one as well.

    What the towers of the receivers end in under each cut is then in `features`.
    """

    def __init__(self) -> None:
        self.receivers: Sequence[int] = ()
        self.features: dict[Cut, Tensor] = {}

    def run(self, towers: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The features without any cut."""
        given: list[list[Tensor]] = []  # of every segment, what its unit is given
        mixed = list(inputs)
        for segment in segments:
            given.append([_run(segment, tower, x) for tower, x in zip(towers, mixed, strict=True)])
            mixed = segment.exchange(given[-1])
        self.features = {
            cut: self._under(cut, towers, segments, given)
            for cut in (Cut(i, t, s) for i in range(len(segments) - 1) for t in self.receivers for s in range(len(towers)))
            if cut.to != cut.source
        }
        return mixed

    def _under(
        self, cut: Cut, towers: Sequence[nn.Module], segments: Sequence[Segment], given: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        here = given[cut.segment]
        without = [torch.zeros_like(x) if s == cut.source else x for s, x in enumerate(here)]
        received = segments[cut.segment].exchange(without)[cut.to]
        last = len(segments) - 1
        features = list(given[cut.segment + 1])
        features[cut.to] = _run(segments[cut.segment + 1], towers[cut.to], received)
        for i in range(cut.segment + 1, last):
            mixed = segments[i].exchange(features)
            reached = range(len(towers)) if i + 1 < last else [cut.to]
            for t in reached:
                features[t] = _run(segments[i + 1], towers[t], mixed[t])
        return features[cut.to]


def _run(segment: Segment, tower: nn.Module, x: Tensor) -> Tensor:
    """A segment's stages, which may begin with an operation in place, on features that are needed again."""
    return segment(tower, x.clone())


class Ablated(nn.Module):
    """A model that also predicts every task once for each cut of what it receives, as a task of its own.

    Args:
        model: whose towers exchange. Its `execution` is this object's from now on.
    """

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)
        self.execution = model.execution = WithCuts()
        units, size = len(model.exchange()), len(model.tasks)
        self.cuts = {
            Cut(i, t, s): replace(task, name=f"{task.name}/{i}/{s}", metrics=[m for m in task.all_metrics if m.score])
            for i in range(units)
            for t, task in enumerate(model.tasks)
            for s in range(size)
            if s != t
        }
        self.tasks = (*model.tasks, *self.cuts.values())

    def present(self, datasets: Sequence[str]) -> list[Task]:
        """The tasks of these datasets."""
        return [task for task in self.tasks if task.dataset in datasets]

    def forward(self, images: Mapping[str, Tensor]) -> Outputs:
        """Of one dataset, as the model's; with outputs under every cut."""
        [dataset] = images
        self.execution.receivers = [t for t, task in enumerate(self.model.tasks) if task.dataset == dataset]
        features, outputs = self.model(images)
        tasks = self.model.tasks
        under = {self.cuts[cut].name: self.model.output(tasks[cut.to], x) for cut, x in self.execution.features.items()}
        return Outputs(features, {**outputs, **under})

    def labelled(self, part: Samples) -> Samples:
        """Samples with the labels of a task for each of its cuts too."""
        of = {task.name: self.model.tasks[cut.to].name for cut, task in self.cuts.items() if task.dataset == part.dataset}

        def also(known: Mapping[str, Any]) -> dict[str, Any]:
            return {**known, **{name: known[task] for name, task in of.items()}}

        return replace(
            part,
            targets=also(part.targets),
            valid=also(part.valid),
            labelled=also(part.labelled),
            labelled_share=also(part.labelled_share),
        )


def ablate(
    model: MultiTaskModel,
    samples: Mapping[str, Samples],
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Progress | None = None,
    name: str = "",
) -> dict[str, list[list[float | None]]]:
    """Layer point -> (T, T): by how much the score of task t (row) falls without the contribution of task s (column) there.

    The diagonal is None. Zero where nothing is exchanged; negative where a task does better without. Takes one pass over the
    samples, in which the layers after a cut are computed for each; `progress` is told of it, as of the run `name`.
    """
    tasks, execution, progress = model.tasks, model.execution, progress or Silent()
    ablated = Ablated(model)
    batches, done = sum(math.ceil(len(part) / batch_size) for part in samples.values()), 0

    def between() -> None:
        nonlocal done
        done += 1
        if progress.due():
            progress.line(f"ablation of {name}: {done} of {batches} batches")
            progress.shown()

    try:
        figures = evaluate(
            ablated, {dataset: ablated.labelled(part) for dataset, part in samples.items()}, batch_size, autocast, between
        )
    finally:
        model.execution = execution
    falls: dict[str, list[list[float | None]]] = {point: [[None] * len(tasks) for _ in tasks] for point in model.exchange()}
    points = list(falls)
    for cut, under in ablated.cuts.items():
        task = tasks[cut.to]
        fall = figures[task.name][task.score_name] - figures[under.name][task.score_name]
        falls[points[cut.segment]][cut.to][cut.source] = fall
    return falls
