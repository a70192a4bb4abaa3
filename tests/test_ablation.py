"""The ablation: one pass with every cut against a pass over the data for each, which is what it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Lines
from torch import Tensor, nn

import mtl
from mtl import build
from mtl.ablation import Cut, WithCuts, ablate
from mtl.cross_stitch import CrossStitchUnit
from mtl.data import Split
from mtl.evaluation import evaluate
from mtl.execution import OneByOne, Segment
from mtl.run import Run
from mtl.stages import cut as cut_at
from mtl.units import ExchangeUnit


class Lacking(ExchangeUnit):
    """A unit from which task `to` receives nothing of task `source`."""

    def __init__(self, unit: ExchangeUnit, to: int, source: int) -> None:
        super().__init__()
        self.unit, self.to_task, self.source = unit, to, source

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        mixed = list(self.unit(features))
        without = [torch.zeros_like(f) if s == self.source else f for s, f in enumerate(features)]
        mixed[self.to_task] = self.unit(without)[self.to_task]
        return mixed


@contextmanager
def lacking(model: mtl.MultiTaskModel, point: str, to: int, source: int) -> Iterator[None]:
    key = point.replace(".", "/")
    unit = model.units[key]
    assert isinstance(unit, ExchangeUnit)
    model.units[key] = Lacking(unit, to, source)
    try:
        yield
    finally:
        model.units[key] = unit


def by_passes(run: Run, split: Split) -> dict[str, list[list[float | None]]]:
    """What `ablate` means: a pass over the data for each cut."""
    model, samples, size = run.model, run.samples[split], 2 * run.config.batch_size
    whole = evaluate(model, samples, size, run.autocast)
    falls: dict[str, list[list[float | None]]] = {}
    for point in model.exchange():
        falls[point] = [[None] * len(model.tasks) for _ in model.tasks]
        for t, task in enumerate(model.tasks):
            for s in range(len(model.tasks)):
                if s != t:
                    with lacking(model, point, t, s):
                        less = evaluate(model, samples, size, run.autocast)
                    falls[point][t][s] = whole[task.name][task.score_name] - less[task.name][task.score_name]
    return falls


class Sum(mtl.ExchangeUnit):
    """Every task gets the sum of all: the same tensor for each."""

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack(list(features)).sum(0)] * len(features)


class Handed(mtl.ExchangeUnit):
    """The first task gets the sum of all, the others what they gave."""

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack(list(features)).sum(0), *features[1:]]


mtl.register_unit("summing")(lambda tasks, shape: Sum())
mtl.register_unit("handing")(lambda tasks, shape: Handed())

SHAPES = {"datasets": {"shapes": {"train": 120, "test": 40}}, "validation": 0.25}
CASES: dict[str, Mapping[str, Any]] = {
    "three points": {"sharing": {"kind": "cross_stitch", "init": {"same": 0.6, "cross": 0.4}}},
    "one point": {"sharing": {"kind": "cross_stitch", "points": ["pool2"], "init": {"same": 0.6, "cross": 0.4}}},
    "dense units": {"sharing": {"kind": "cross_stitch", "granularity": "dense", "init": {"same": 0.6, "cross": 0.4}}},
    "units that hand on": {"sharing": {"kind": "handing"}, "backbone": "resnet18"},
    "units that give one tensor": {"sharing": {"kind": "summing"}},
    "another network": {
        "sharing": {"kind": "cross_stitch", "points": ["conv1", "layer1", "layer2"], "init": {"same": 0.6, "cross": 0.4}},
        "backbone": "resnet18",
    },
    "half precision": {"sharing": {"kind": "cross_stitch", "init": {"same": 0.6, "cross": 0.4}}, "precision": "bf16"},
    "four tasks of four kinds": {
        "tasks": ["shapes_kind", "shapes_traits", "shapes_count", "shapes_radius"],
        "data": SHAPES,
        "sharing": {"kind": "cross_stitch", "init": {"same": 0.7, "cross": 0.1}},
        "batch_size": 16,
    },
    "two datasets": {
        "tasks": ["tiny_a", "shapes_kind", "tiny_b"],
        "data": SHAPES,
        "sharing": {"kind": "cross_stitch", "init": {"same": 0.6, "cross": 0.2}},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_one_pass_finds_what_a_pass_for_each_cut_finds(case: str, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    config = mtl.RunConfig(**{**tiny_config, "batch_size": 8, **CASES[case]})
    with closing(build.run(config, tmp_path / "run")) as run:
        with torch.no_grad():
            for name, p in run.model.named_parameters():
                if name.startswith("heads."):
                    p.mul_(5)  # so that decisions differ
        found = ablate(run.model, run.samples[Split.VAL], 2 * run.config.batch_size, run.autocast)
        assert isinstance(run.model.execution, OneByOne)
        assert found == by_passes(run, Split.VAL)
        assert any(fall for point in found.values() for row in point for fall in row)


def test_a_cut_takes_one_contribution_from_one_task() -> None:
    a, b, c = (torch.full((2, 3), value) for value in (1.0, 10.0, 100.0))
    towers = [nn.Sequential(nn.Identity(), nn.Identity()) for _ in range(3)]
    first, last = cut_at(towers[0], ["0"])
    for unit in (Sum(), CrossStitchUnit(3, (3,), "channel", 1.0, 1.0)):
        execution = WithCuts()
        execution.receivers = [1]
        with torch.no_grad():
            whole = execution.run(towers, [Segment((first,), unit), Segment((last,))], [a, b, c])
        assert [x[0, 0].item() for x in whole] == [111.0, 111.0, 111.0]
        assert {cut: x[0, 0].item() for cut, x in execution.features.items()} == {Cut(0, 1, 0): 110.0, Cut(0, 1, 2): 11.0}


def test_a_long_ablation_tells_how_far_it_is(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    lines = Lines()
    lines.due = lambda: True  # type: ignore[method-assign]
    config = mtl.RunConfig(**{**tiny_config, "batch_size": 8}, sharing="cross_stitch")
    with closing(build.run(config, tmp_path / "run")) as run:
        count = -(-len(run.samples[Split.VAL]["tiny"]) // 8)
        ablate(run.model, run.samples[Split.VAL], 8, run.autocast, lines, "mine")
    assert lines.lines == [f"ablation of mine: {i} of {count} batches" for i in range(1, count + 1)]
