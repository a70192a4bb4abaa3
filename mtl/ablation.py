"""What a trained model's exchange is worth: each task's score when another task's contribution at a layer point is cut.

It tells what this trained model relies on, not what a model trained without that exchange would reach: such a model would have
learned to do without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from mtl.data import Samples
from mtl.evaluation import evaluate
from mtl.model import MultiTaskModel
from mtl.progress import Progress, Silent
from mtl.units import ExchangeUnit


class WithCut(ExchangeUnit):
    """A unit from which task `to` receives nothing of task `source`: for `to`, the features of `source` are zero."""

    def __init__(self, unit: ExchangeUnit, to: int, source: int) -> None:
        super().__init__()
        self.unit, self.to_task, self.source = unit, to, source

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """T tensors -> T tensors."""
        mixed = list(self.unit(features))
        without = [torch.zeros_like(f) if s == self.source else f for s, f in enumerate(features)]
        mixed[self.to_task] = self.unit(without)[self.to_task]
        return mixed


@contextmanager
def cut(model: MultiTaskModel, point: str, to: int, source: int) -> Iterator[None]:
    """Within the block the exchange at `point` lacks one contribution."""
    key = point.replace(".", "/")
    unit = model.units[key]
    assert isinstance(unit, ExchangeUnit)
    model.units[key] = WithCut(unit, to, source)
    try:
        yield
    finally:
        model.units[key] = unit


def ablate(
    model: MultiTaskModel,
    samples: Mapping[str, Samples],
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Progress | None = None,
    name: str = "",
) -> dict[str, list[list[float | None]]]:
    """Layer point -> (T, T): by how much the score of task t (row) falls without the contribution of task s (column) there.

    The diagonal is None. Zero where nothing is exchanged; negative where a task does better without. Takes a pass over the
    samples for each, which `progress` is told of, as those of the run `name`.
    """
    tasks, done = model.tasks, 0
    progress = progress or Silent()
    passes = len(model.exchange()) * len(tasks) * (len(tasks) - 1)
    whole = evaluate(model, samples, batch_size, autocast)
    falls: dict[str, list[list[float | None]]] = {}
    for point in model.exchange():
        rows: list[list[float | None]] = [[None] * len(tasks) for _ in tasks]
        for t, task in enumerate(tasks):
            for s in range(len(tasks)):
                if s != t:
                    with cut(model, point, t, s):
                        less = evaluate(model, samples, batch_size, autocast)
                    done += 1
                    if progress.due():
                        progress.line(f"ablation of {name}: {done} of {passes} passes")
                        progress.shown()
                    rows[t][s] = whole[task.name][task.score_name] - less[task.name][task.score_name]
        falls[point] = rows
    return falls
