"""The network of N tasks: a shared trunk where there is one, a tower per task, exchange units between towers, heads.

A parameter's name says what it is whatever the kind of sharing: `towers.<task>.<its name in the plain network>`,
`trunk.<its name in the plain network>`, `units.<point>.<its name in the unit>`, `heads.<task>.<its name in the head>`. How a
dataset is standardised is part of the model (`inputs.<dataset>.mean`), so weights alone are enough to predict from raw images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtl.backbones import Backbone, prepare
from mtl.errors import ConfigError, PluginError
from mtl.registry import Plugin
from mtl.seeding import seeded
from mtl.sharing import Sharing
from mtl.stages import Stage, cut, keep_only, legal_points, probe
from mtl.standardize import Standardize
from mtl.task import Task
from mtl.units import ExchangeUnit

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Point:
    """A layer point of a model: its name, the shape of one sample's features there, and what happens after it."""

    name: str
    shape: tuple[int, ...]
    role: str


class Outputs(NamedTuple):
    """Of one forward pass, by task name: what the heads consumed, and what they gave."""

    features: dict[str, Tensor]
    outputs: dict[str, Tensor]


class MultiTaskModel(nn.Module):
    """N tasks on one or several datasets.

    Args:
        tasks: in the order of towers, losses and alpha's rows.
        make_backbone: makes one fresh network.
        sharing: what the towers have in common.
        inputs: dataset name -> its standardisation.
        input_shape: of one sample, (C, H, W) or (D,).
        seed: of the initial weights. A tower's depend on the seed and its task's name only, so arms that share a seed start
            alike, whatever else they train.

    Raises:
        ConfigError: layer points that do not exist or cannot be cut at.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        make_backbone: Callable[[], Backbone],
        sharing: Sharing,
        inputs: Mapping[str, Standardize],
        input_shape: tuple[int, ...],
        seed: int,
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        with seeded(seed, "trunk"):
            trunk = make_backbone()
        plan = sharing.plan(trunk.points)
        self.stages: list[Stage] = cut(trunk.network, plan.points)
        self.shared_stages = plan.shared
        self._channels = trunk.channels
        x = prepare(torch.zeros(2, *input_shape), self._channels)
        shapes = probe(trunk.network, self.stages, x)
        features = shapes[-1]
        if plan.check is not None:
            plan.check(
                len(tasks), {s.point: shape for s, shape in zip(self.stages, shapes, strict=True) if s.point in plan.exchange}
            )
        self.inputs = nn.ModuleDict(inputs)
        self.trunk = trunk.network if plan.shared else None
        self.towers = nn.ModuleDict()
        if plan.shared < len(self.stages):
            for task in tasks:
                with seeded(seed, "tower", task.name):
                    self.towers[task.name] = make_backbone().network
        self.units = nn.ModuleDict()
        self._unit_after: dict[int, str] = {}
        for i, stage in enumerate(self.stages):
            if stage.point in plan.exchange:
                assert plan.unit is not None
                with seeded(seed, "unit", stage.point):
                    key = stage.point.replace(".", "/")  # a module's name holds no dot
                    self.units[key] = plan.unit(len(tasks), shapes[i])
                self._unit_after[i] = key
        self.heads = nn.ModuleDict()
        for task in tasks:
            with seeded(seed, "head", task.name):
                self.heads[task.name] = _build_head(task, features)
        self._check_exchange(x)
        self._drop_unused()
        self.points = [
            Point(stage.point, shape, self._role(i)) for i, (stage, shape) in enumerate(zip(self.stages, shapes, strict=True))
        ]

    def _role(self, i: int) -> str:
        if i in self._unit_after:
            return "exchange"
        return "shared" if i < self.shared_stages else "towers"

    @torch.no_grad()
    def _check_exchange(self, x: Tensor) -> None:
        """One pass in evaluation mode: towers must agree in shape where they exchange, and a unit must keep it."""
        if not self.units:
            return
        was_training = self.training
        self.eval()
        features = [x] * len(self.tasks)
        for i, stage in enumerate(self.stages):
            features = [stage(self.towers[task.name], f) for task, f in zip(self.tasks, features, strict=True)]
            if i not in self._unit_after:
                continue
            shapes = [tuple(f.shape[1:]) for f in features]
            if len(set(shapes)) > 1:
                found = ", ".join(f"{task.name} {shape}" for task, shape in zip(self.tasks, shapes, strict=True))
                raise ConfigError([f"sharing.points: towers differ in shape at {stage.point!r}: {found}; they cannot exchange"])
            unit = self.units[self._unit_after[i]]
            try:
                mixed = list(unit(features))
            except Exception as error:
                raise PluginError(
                    f"{type(unit).__name__} at {stage.point!r} failed: {type(error).__name__}: {error}"
                ) from error
            if [tuple(f.shape[1:]) for f in mixed] != shapes:
                found = ", ".join(str(tuple(f.shape[1:])) for f in mixed)
                raise PluginError(f"{type(unit).__name__} turns {len(shapes)} features of shape {shapes[0]} into {found}")
            features = mixed
        self.train(was_training)

    def _drop_unused(self) -> None:
        """A trunk keeps the shared stages' modules, a tower the others', so that parameters are counted and stepped once."""
        below = [name for stage in self.stages[: self.shared_stages] for name in stage.modules]
        above = [name for stage in self.stages[self.shared_stages :] for name in stage.modules]
        if self.trunk is not None and self.towers:
            keep_only(self.trunk, below)
            for tower in self.towers.values():
                keep_only(tower, above)

    def features(self, images: Mapping[str, Tensor]) -> list[Tensor]:
        """What the heads consume, per task.

        Args:
            images: dataset name -> a batch (B_d, ...) in its own dtype; tasks of other datasets are left out.

        Returns:
            A tensor (B_d, ...) per task of these datasets, in the order of `present`. Towers that exchange, and a shared trunk,
            run once on all images, ordered by dataset name; a tower that shares nothing sees its own dataset alone.
        """
        names = sorted(images)
        x = [prepare(self.inputs[name](images[name]), self._channels) for name in names]
        sizes = [len(part) for part in x]
        row = {name: slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i, name in enumerate(names)}
        present = self.present(names)
        together = self.shared_stages > 0 or bool(self.units)
        if together:
            joined = torch.cat(x) if len(x) > 1 else x[0]
            for stage in self.stages[: self.shared_stages]:
                assert self.trunk is not None
                joined = stage(self.trunk, joined)
            if not self.units:
                return self._run_towers([joined[row[task.dataset]] for task in present], present)
            mixed = self._run_towers([joined] * len(self.tasks), self.tasks)
            return [y[row[task.dataset]] for y, task in zip(mixed, self.tasks, strict=True) if task.dataset in row]
        own = dict(zip(names, x, strict=True))
        return self._run_towers([own[task.dataset] for task in present], present)

    def _run_towers(self, x: list[Tensor], tasks: Sequence[Task]) -> list[Tensor]:
        for i, stage in enumerate(self.stages):
            if i < self.shared_stages:
                continue
            x = [stage(self.towers[task.name], value) for task, value in zip(tasks, x, strict=True)]
            if i in self._unit_after:
                x = self.units[self._unit_after[i]](x)
        return x

    def present(self, datasets: Sequence[str]) -> list[Task]:
        """The tasks of these datasets, in order."""
        return [task for task in self.tasks if task.dataset in datasets]

    def forward(self, images: Mapping[str, Tensor]) -> Outputs:
        """Dataset name -> images (B_d, ...), in their own dtype; returns features and outputs of the tasks of these datasets.

        Outputs are float32 (or wider) also under autocast: losses and decisions are made in full precision.
        """
        features = {task.name: f for task, f in zip(self.present(list(images)), self.features(images), strict=True)}
        outputs = {name: self.heads[name](f) for name, f in features.items()}
        return Outputs(features, {name: y.float() if y.dtype in HALF else y for name, y in outputs.items()})

    def shared_parameters(self) -> list[nn.Parameter]:
        """Everything below the heads: trunk, towers and exchange units."""
        return [p for name, p in self.named_parameters() if not name.startswith("heads.")]

    def exchange(self) -> dict[str, ExchangeUnit]:
        """Layer point -> its exchange unit, in execution order."""
        return {self.stages[i].point: self.units[key] for i, key in self._unit_after.items()}  # type: ignore[misc]

    def parameter_count(self) -> int:
        """Trainable numbers, exchange units included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _build_head(task: Task, features: tuple[int, ...]) -> nn.Module:
    try:
        return task.head.build(features)
    except Exception as error:
        raise PluginError(
            f"the head of task {task.name!r} cannot be built on features of shape {features}: {type(error).__name__}: {error}"
        ) from error


def backbone_maker(plugin: Plugin, input_shape: tuple[int, ...], options: object) -> Callable[[], Backbone]:
    """Calls a backbone plugin for one fresh network a time, and checks what it gives."""

    def make() -> Backbone:
        made = plugin.create(input_shape, options=options)  # type: ignore[arg-type]
        if isinstance(made, nn.Module):
            made = Backbone(made)
        if not isinstance(made, Backbone):
            raise PluginError(f"{plugin} must give an mtl.Backbone or an nn.Module; found {type(made).__name__}")
        return made

    return make


def describe_backbone(plugin: Plugin, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """Every legal layer point of a backbone with its default options, with channels, stride and shape at this input shape."""
    made = backbone_maker(plugin, input_shape, None)()
    legal, illegal = legal_points(made.network)
    stages = cut(made.network, ())
    x = prepare(torch.zeros(2, *input_shape), made.channels)
    features = probe(made.network, stages, x)[-1]
    points = []
    for name in legal:
        try:
            shape = probe(made.network, cut(made.network, [name]), x)[0]
        except ConfigError as error:
            illegal[name] = error.problems[0]
            continue
        stride = input_shape[-1] / shape[-1] if len(shape) == len(input_shape) == 3 else None
        points.append(
            {"name": name, "channels": shape[0], "stride": stride, "shape": list(shape), "default": name in made.points}
        )
    return {
        "name": plugin.name,
        "input_shape": list(input_shape),
        "features": list(features),
        "parameters": sum(p.numel() for p in made.network.parameters()),
        "points": points,
        "illegal": illegal,
    }
