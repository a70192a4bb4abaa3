"""What the runs of a comparison came to, as `results.json` holds it: figures, cost, learning curves, exchange."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mtl.analysis import Analyst, curves
from mtl.arms import SINGLE_TASK, Arm, Piece, Setting
from mtl.build import model_of
from mtl.config import RunConfig
from mtl.data import Split
from mtl.errors import RunError
from mtl.findings import tell
from mtl.jobs import finished
from mtl.metrics import relative_of
from mtl.model import MultiTaskModel
from mtl.progress import Progress
from mtl.rundir import DISTRIBUTION, environment
from mtl.sampling import Mixing
from mtl.sharing import Exchange
from mtl.survey import parameters_and_flops, survey
from mtl.task import Task
from mtl.units import ExchangeUnit
from mtl.warm_start import source, source_of, start_from

FORMAT = 1
"""Of `results.json`."""


@dataclass(frozen=True)
class Cell:
    """An arm at a share of the data with a seed, and the runs that it consists of."""

    arm: Arm
    fraction: float
    seed: int
    pieces: tuple[Piece, ...]

    def where(self, shares: bool) -> str:
        """To be said after its arm: the seed, and where there are several the share of the data."""
        return f", {100 * self.fraction:g} %" * shares + f", seed {self.seed}"


class Facts:
    """What has to be known of a comparison's data and networks; found out once.

    Args:
        base: the config that all arms have in common.
    """

    def __init__(self, base: RunConfig) -> None:
        self.base = base
        self.survey = cache(lambda fraction: survey(base.replaced(data=base.data.model_copy(update={"fraction": fraction}))))
        self._costs: dict[str, tuple[int, int]] = {}
        self._others: dict[str, list[Task]] = {}
        self._started: set[tuple[str, bool]] = set()
        about = self.survey(base.data.fraction)
        self.tasks, self.shape = about.tasks, about.shape
        self.setting = Setting(
            base=base,
            points=about.points,
            datasets={task.name: task.dataset for task in about.tasks},
            weights={task.name: task.weight for task in about.tasks},
            epoch_steps=self._epoch_steps,
            batch_sizes=about.batch_sizes,
            input_shape=about.input_shape,
            parameters=lambda config: self.cost(config)[0],
        )

    def _epoch_steps(self, task: str, fraction: float) -> int | None:
        about, dataset = self.survey(fraction), self.setting.datasets[task]
        training = about.samples[Split.TRAIN]
        alone = len(training) == 1 or (self.base.data.mixing == Mixing() and training[dataset] == max(training.values()))
        if about.labelled[task] == training[dataset] and alone:
            return None
        return about.epoch_steps

    def described(self) -> dict[str, Any]:
        """Task -> what it predicts, how, and what it is measured by; of its own losses and metrics the names."""
        return {
            task.name: {
                "dataset": task.dataset,
                "target": task.target,
                "head": task.head.describe(),
                "loss": getattr(task.loss, "__qualname__", type(task.loss).__name__),
                "metrics": {metric.name: metric.better for metric in task.all_metrics},
                "score": task.score_name,
            }
            for task in self.tasks
        }

    def check_start(self, piece: Piece) -> None:
        """Build a run's network and give it the weights from which it starts: those on disk, and in place of those that are not
        trained yet others of the same shape.

        Raises:
            MTLError: they are of another network, or cannot be read.
        """
        key = self._network(piece.config), bool(piece.starts)
        if key in self._started or not (piece.config.init_from or piece.starts):
            return
        sources = {task: source(task, given) for task, given in piece.config.init_from.items()}
        for task, before in piece.starts.items():
            state = self._model(before.config).state_dict()
            sources[task] = source_of(f"its run as {SINGLE_TASK}", task, task, state)
        start_from(self._model(piece.config), sources)
        self._started.add(key)

    def _model(self, config: RunConfig) -> MultiTaskModel:
        return model_of(config, self._tasks_of(config), self.shape, pretrained=False)

    def _tasks_of(self, config: RunConfig, fraction: float | None = None) -> list[Task]:
        """A config's tasks, their heads with what they take from a share of the training data; None: from the comparison's own.
        An arm may give a task other options.
        """
        base, fraction = self.base, self.base.data.fraction if fraction is None else fraction
        known = [replace(one, weight=None) for one in base.tasks]
        if all(replace(one, weight=None) in known for one in config.tasks):
            tasks = self.survey(fraction).tasks
        else:
            key = f"{self._network(config)} {fraction}"
            if key not in self._others:
                data = config.data.model_copy(update={"fraction": fraction})
                self._others[key] = survey(config.replaced(data=data)).tasks
            tasks = self._others[key]
        wanted = [task.name for task in config.tasks]
        return [task for task in tasks if task.name in wanted]

    def besides(self, arm: Arm) -> dict[str, Any]:
        """Of an arm `unlike`, what its runs are given beyond what others are, and `apart`, whether units stay the identity."""
        pieces = arm.pieces(self.setting, self.base.data.fraction, self.base.seed)
        return {"unlike": arm.unlike(self.setting), "apart": all(self._stays_identity(piece.config) for piece in pieces)}

    def _stays_identity(self, config: RunConfig) -> bool:
        """Whether exchange units are frozen, and give every tower its own features back."""
        if not isinstance(config.sharing, Exchange) or not config.optim.freeze:
            return False
        if len(set(self.setting.datasets.values())) > 1:  # towers with units see all images, and batch norm their statistics
            return False
        model = self._model(config)
        model.freeze(config.optim.freeze)
        shapes = {point.name: point.shape for point in model.points}
        return all(_gives_back(unit, len(config.tasks), shapes[point]) for point, unit in model.exchange().items())

    def steps(self, config: RunConfig) -> int:
        """Of a run of this config."""
        base, fraction = self.base, config.data.fraction
        alone = len(config.tasks) < len(base.tasks)  # and takes as many as all together
        same = alone or _draws(config) == _draws(base)
        steps = (self.survey(fraction) if same else survey(config)).epoch_steps * config.epochs
        return min(steps, config.max_steps or steps)

    def parameters(self, config: RunConfig) -> int:
        """Numbers that a config trains, its heads as its own share of the data makes them."""
        return self._counted(config, config.data.fraction)[0]

    @staticmethod
    def _network(config: RunConfig) -> str:
        """What configs share whose runs differ in the seed and the share of the data only."""
        return config.replaced(seed=0, data=config.data.model_copy(update={"fraction": 1.0})).digest()

    def cost(self, config: RunConfig) -> tuple[int, int]:
        """Parameters that a config trains, and FLOPs of a forward pass."""
        return self._counted(config, self.base.data.fraction)

    def _counted(self, config: RunConfig, fraction: float) -> tuple[int, int]:
        key = f"{self._network(config)} {fraction}"
        if key not in self._costs:
            self._costs[key] = parameters_and_flops(config, self._tasks_of(config, fraction), self.shape)
        return self._costs[key]


def _draws(config: RunConfig) -> tuple[Any, ...]:
    """What decides, of given data, how many steps an epoch has."""
    return config.batch_size, config.optim.accumulate, config.epoch_steps, config.data.mixing


@torch.no_grad()
def _gives_back(unit: ExchangeUnit, tasks: int, shape: tuple[int, ...]) -> bool:
    """Whether a unit trains nothing, and leaves features as they are."""
    if any(one.requires_grad for one in unit.parameters()):
        return False
    device = next((one.device for one in (*unit.parameters(), *unit.buffers())), torch.device("cpu"))
    features = list(torch.linspace(0, 1, 2 * tasks * math.prod(shape), device=device).view(tasks, 2, *shape))
    return all(
        torch.equal(one, other)
        for training in (True, False)
        for one, other in zip(unit.train(training)(features), features, strict=True)
    )


def collect(
    cells: Sequence[Cell],
    facts: Facts,
    directory: Path,
    reference: str,
    failed: Mapping[str, str],
    progress: Progress,
    edited: Sequence[str] = (),
) -> dict[str, Any]:
    """What `results.json` holds; `edited` are the files of plugins that were while it came about."""
    analyst = Analyst(directory / "analysis", facts.base.device, facts.base.data.root, progress)
    runs = directory / "runs"
    rows, lost = [], []
    progress.shown()
    shares = len({cell.fraction for cell in cells}) > 1
    labels: dict[str, str] = {}  # of what takes long
    for cell in cells:
        if (name := exchanged_in(cell)) is not None and name not in failed and not analyst.has_exchange(runs / name):
            labels.setdefault(name, f"{cell.arm.name}{cell.where(shares)}")
    if labels:
        progress.line(f"all is trained; now what exchange is worth, in {len(labels)} runs, then the report")
    labels = {name: f"{label} ({i} of {len(labels)})" for i, (name, label) in enumerate(labels.items(), start=1)}
    for i, cell in enumerate(cells, start=1):
        why = next((failed[piece.name] for piece in cell.pieces if piece.name in failed), None)
        where = {"arm": cell.arm.name, "fraction": cell.fraction, "seed": cell.seed}
        if why is not None:
            lost.append({**where, "why": why})
            continue
        rows.append({**where, **figures_of(cell, facts, runs, analyst, labels)})
        if progress.due() and i < len(cells):
            progress.line(f"read {i} of {len(cells)} results")
            progress.shown()
    tasks = {
        task.name: {
            "score": task.score_name,
            "metrics": {metric.name: metric.better for metric in task.all_metrics},
            "relative": relative_of(task.all_metrics).name,
            "dataset": task.dataset,
        }
        for task in facts.tasks
    }
    arms = list({cell.arm.name: cell.arm for cell in cells}.values())
    fractions = list(dict.fromkeys(cell.fraction for cell in cells))
    results = {
        "format": FORMAT,
        "config": facts.base.model_dump(mode="json"),
        **circumstances(rows, runs, facts.base),
        "tasks": tasks,
        "arms": [
            {"name": arm.name, "about": arm.about, **{key: value for key, value in facts.besides(arm).items() if value}}
            for arm in arms
        ],
        "reference": reference,
        "baseline": SINGLE_TASK if SINGLE_TASK in [arm.name for arm in arms] else None,
        "fractions": fractions,
        "seeds": list(dict.fromkeys(cell.seed for cell in cells)),
        "samples": {f"{fraction:g}": facts.survey(fraction).samples for fraction in fractions},
        "labelled": {f"{fraction:g}": facts.survey(fraction).labelled for fraction in fractions},
        "cells": rows,
        "failed": lost,
        "unreadable": analyst.unreadable,
        "not_shown": not_shown(cells, runs),
        "edited": [*edited],
    }
    return {**results, "findings": tell(results)}


def circumstances(rows: Sequence[Mapping[str, Any]], runs: Path, base: RunConfig) -> dict[str, Any]:
    """Where and how the runs were trained: `environment` as it is now, `machines`, each kind of place that runs noted with how
    many there were, `at_once`, the largest number that trained at a time, and `set_aside`, what of each dataset a run could
    not use: why, and the most of it in one run.
    """
    names = sorted({name for row in rows for name in (*row["runs"], *row["starts"])})
    noted = [one for name in names if (one := noted_of(runs / name)) is not None]
    kinds = [
        {
            "device": one["device_name"],
            "threads": one["threads"],
            "torch": one["versions"]["torch"],
            "mtl": one["versions"][DISTRIBUTION],
        }
        for one in noted
    ]
    machines = [{**kind, "runs": kinds.count(kind)} for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    at_once = max((part.get("at_once", 1) for one in noted for part in (one, *one.get("resumed", ()))), default=1)
    set_aside: dict[str, dict[str, int]] = {}
    for name in names:
        for dataset, counts in (finished(runs / name) or {}).get("set_aside", {}).items():
            most = set_aside.setdefault(dataset, {})
            most |= {why: max(count, most.get(why, 0)) for why, count in counts.items()}
    return {"environment": environment(base), "machines": machines, "at_once": at_once, "set_aside": set_aside}


def not_shown(cells: Sequence[Cell], runs: Path) -> list[str]:
    """Finished runs that no cell has a part in: of arms, seeds or shares that were not asked for this time."""
    mine = {name for cell in cells for name in trained_for(cell)}
    return sorted(one.name for one in runs.iterdir() if one.name not in mine and finished(one) is not None)


def noted_of(run: Path) -> dict[str, Any] | None:
    """Where a run was trained; None where its note is lost."""
    try:
        said = json.loads((run / "env.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and all(key in said for key in ("device_name", "threads", "versions")) else None


def exchanged_in(cell: Cell) -> str | None:
    """The run in which a cell's tasks exchange; None where none do."""
    piece = cell.pieces[0]
    return piece.name if len(cell.pieces) == 1 and isinstance(piece.config.sharing, Exchange) else None


def trained_for(cell: Cell) -> set[str]:
    """The runs of a cell, and those from which they start."""
    return {one.name for piece in cell.pieces for one in (piece, *piece.starts.values())}


def figures_of(cell: Cell, facts: Facts, runs: Path, analyst: Analyst, labels: Mapping[str, str]) -> dict[str, Any]:
    """A cell's test figures, cost, learning curves, and what its exchange did; `labels` are what to call runs meanwhile."""
    test: dict[str, Any] = {}
    learned: dict[str, Any] = {}
    for task in facts.tasks:
        having = [piece for piece in cell.pieces if task.name in piece.tasks]
        said = [finished(runs / piece.name) for piece in having]
        assert all(said)
        if len(having) == 1:
            test[task.name] = said[0]["test"][task.name]  # type: ignore[index]
            learned[task.name] = curves(runs / having[0].name).get(task.name, {}).get(task.score_name, [])
        else:
            try:
                test[task.name] = analyst.ensemble([runs / piece.name for piece in having])[task.name]
            except RunError as error:
                raise RunError(f"{error}; move that run's folder away, and the same again trains it anew") from None
    name = exchanged_in(cell)
    exchange = analyst.exchange(runs / name, labels.get(name, name)) if name is not None else None
    return {
        "runs": [piece.name for piece in cell.pieces],
        "starts": sorted(trained_for(cell) - {piece.name for piece in cell.pieces}),
        "steps": {piece.tasks[0]: (finished(runs / piece.name) or {})["steps"] for piece in cell.pieces},
        "images": {piece.tasks[0]: (finished(runs / piece.name) or {}).get("images", 0) for piece in cell.pieces},
        "left_out": {name: (finished(runs / name) or {}).get("steps_left_out", 0) for name in trained_for(cell)},
        "test": test,
        "curves": learned,
        "cost": cost_of(cell, facts, runs),
        "exchange": exchange,
    }


def cost_of(cell: Cell, facts: Facts, runs: Path) -> dict[str, float | None]:
    """Of all runs that a cell consists of, and of those from which they start; the peak of memory is that of the largest."""
    sources = {source.name: source for piece in cell.pieces for source in piece.starts.values()}
    said = {piece.name: finished(runs / piece.name) or {} for piece in cell.pieces}
    before = [finished(runs / name) or {} for name in sources]
    networks = [facts.cost(piece.config) for piece in cell.pieces]
    peaks = [one["peak_memory_bytes"] for one in said.values() if one["peak_memory_bytes"] is not None]
    return {
        "parameters": sum(parameters for parameters, _ in networks),
        "flops_per_image": sum(flops for _, flops in networks),
        "seconds_per_step": sum(one["training_seconds"] / one["steps"] for one in said.values()),
        "peak_memory_bytes": max(peaks) if len(peaks) == len(said) else None,
        "training_seconds": sum(one["training_seconds"] for one in [*said.values(), *before]),
    }
