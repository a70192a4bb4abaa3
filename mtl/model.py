"""The network of N tasks: a shared trunk where there is one, a tower per task, exchange units between towers, heads.

A parameter's name says what it is whatever the kind of sharing: `towers.<task>.<its name in the plain network>`,
`trunk.<its name in the plain network>`, `units.<point>.<its name in the unit>` (the dots of a point as slashes),
`heads.<task>.<its name in the head>`. How a dataset is standardised is part of the model (`inputs.<dataset>.mean`), so weights
alone are enough to predict from raw images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtl.backbones import Backbone, prepare
from mtl.errors import ConfigError, MTLError, PluginError, unknown
from mtl.execution import Execution, OneByOne, Segment
from mtl.heads import check_consumes
from mtl.seeding import seeded
from mtl.sharing import Sharing
from mtl.stages import CutError, Stage, cut, keep_only, probe
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
        pretrained: whether networks begin with the pretrained weights that their backbone was asked for; a model that is about
            to be restored has no use for them.
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
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        self._held: list[nn.Module] = []
        self.execution: Execution = OneByOne()
        self.tasks = tuple(tasks)
        with seeded(seed, "trunk"):
            trunk = make_backbone()
        self.declared = tuple(trunk.points)
        """The backbone's own layer points, whichever of them the sharing uses."""
        plan = sharing.plan(trunk.points)
        if plan.named and plan.named != plan.points:
            _cut(trunk, plan.named)
        self.stages: list[Stage] = _cut(trunk, plan.points)
        self.shared_stages = plan.shared
        self.input_shape = tuple(input_shape)
        self._prepare = partial(prepare, channels=trunk.channels, size=trunk.size)
        x = self._prepare(torch.zeros(2, *input_shape))
        shapes = probe(trunk.network, self.stages, x)
        self._channels_last = {i for i, stage in enumerate(self.stages) if trunk.is_channels_last(stage.point)}
        shapes = [trunk.channels_first(stage.point, shape) for stage, shape in zip(self.stages, shapes, strict=True)]
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
        self._check_apart(trunk.network)
        if pretrained and trunk.pretrained is not None:
            for network in (*([self.trunk] if self.trunk is not None else []), *self.towers.values()):
                trunk.pretrained(network)
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
        self._towers_overwrite = self._overwrites(x)
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
        for segment in self.segments():
            features = [segment(self.towers[task.name], f) for task, f in zip(self.tasks, features, strict=True)]
            unit = segment.unit
            if unit is None:
                break
            shapes, point = [tuple(f.shape[1:]) for f in features], segment.stages[-1].point
            if len(set(shapes)) > 1:
                found = ", ".join(f"{task.name} {shape}" for task, shape in zip(self.tasks, shapes, strict=True))
                raise ConfigError([f"sharing.points: towers differ in shape at {point!r}: {found}; they cannot exchange"])
            try:
                mixed = segment.exchange(features)
            except Exception as error:
                raise PluginError(f"{type(unit).__name__} at {point!r} failed: {type(error).__name__}: {error}") from error
            if [tuple(f.shape[1:]) for f in mixed] != shapes:
                found = ", ".join(str(tuple(f.shape[1:])) for f in mixed)
                raise PluginError(f"{type(unit).__name__} turns {len(shapes)} features of shape {shapes[0]} into {found}")
            features = mixed
        self.train(was_training)

    @torch.no_grad()
    def _overwrites(self, x: Tensor) -> bool:
        """Whether a tower's first operation writes into what it is given, as a ReLU behind a split may."""
        if not self.towers:
            return False
        was_training = self.training
        self.eval()
        for stage in self.stages[: self.shared_stages]:
            assert self.trunk is not None
            x = stage(self.trunk, x)
        given = x.clone()
        before = given._version
        self.segments()[0](self.towers[self.tasks[0].name], given)
        self.train(was_training)
        return given._version != before

    def _check_apart(self, plain: nn.Module) -> None:
        """Towers must not be one another, and a weight that is used on both sides of a split would come apart."""
        owner: dict[int, str] = {}
        for task, tower in self.towers.items():
            for name, parameter in tower.named_parameters():
                if owner.setdefault(id(parameter), task) != task:
                    raise PluginError(
                        f"the towers of {owner[id(parameter)]!r} and {task!r} share parameter {name!r}: the backbone's factory "
                        "must make a fresh network each time it is called"
                    )
        if self.trunk is None or not self.towers:
            return
        below, above = (
            {id(p): n for n, p in plain.named_parameters(remove_duplicate=False) if any(_within(n, m) for m in modules)}
            for modules in (self._modules_of(slice(0, self.shared_stages)), self._modules_of(slice(self.shared_stages, None)))
        )
        if both := [name for key, name in below.items() if key in above]:
            raise ConfigError(
                [f"sharing.at: parameter {both[0]!r} is used before and after the split, and can belong to one side only"]
            )

    def _modules_of(self, stages: slice) -> list[str]:
        return [name for stage in self.stages[stages] for name in stage.modules]

    def _drop_unused(self) -> None:
        """A trunk keeps the shared stages' modules, a tower the others', so that parameters are counted and stepped once."""
        below, above = self._modules_of(slice(0, self.shared_stages)), self._modules_of(slice(self.shared_stages, None))
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
        x = [self._prepare(self.inputs[name](images[name])) for name in names]
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
                return self._run_towers(self._for_each([joined[row[task.dataset]] for task in present]), present)
            mixed = self._run_towers(self._for_each([joined] * len(self.tasks)), self.tasks)
            return [y[row[task.dataset]] for y, task in zip(mixed, self.tasks, strict=True) if task.dataset in row]
        own = dict(zip(names, x, strict=True))
        return self._run_towers(self._for_each([own[task.dataset] for task in present]), present)

    def _for_each(self, x: list[Tensor]) -> list[Tensor]:
        """A tensor of its own for every tower, where towers begin with an operation in place."""
        return [one.clone() for one in x] if self._towers_overwrite else x

    def _run_towers(self, x: list[Tensor], tasks: Sequence[Task]) -> list[Tensor]:
        if not self.towers:
            return x
        return self.execution.run([self.towers[task.name] for task in tasks], self.segments(), x)

    def towers_and_inputs(self, images: Mapping[str, Tensor]) -> tuple[list[nn.Module], list[Segment], list[Tensor]]:
        """What an execution is given for these images (dataset name -> (B_d, ...)): towers, segments, a tensor per tower."""
        given: list[tuple[list[nn.Module], list[Segment], list[Tensor]]] = []

        class Noted(Execution):
            def run(self, towers: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> list[Tensor]:
                given.append((list(towers), list(segments), list(inputs)))
                return OneByOne().run(towers, segments, inputs)

        was_training, execution = self.training, self.execution
        self.eval()
        self.execution = Noted()
        try:
            with torch.no_grad():
                self.features(images)
        finally:
            self.execution = execution
            self.train(was_training)
        return given[0]

    def segments(self) -> list[Segment]:
        """What the towers run, from exchange to exchange."""
        found, first = [], self.shared_stages
        for i in [*self._unit_after, len(self.stages)]:
            stages = tuple(self.stages[first : i + 1])
            unit = self.units[self._unit_after[i]] if i in self._unit_after else None
            found.append(Segment(stages, unit, i in self._channels_last))  # type: ignore[arg-type]
            first = i + 1
        return found

    def present(self, datasets: Sequence[str]) -> list[Task]:
        """The tasks of these datasets, in order."""
        return [task for task in self.tasks if task.dataset in datasets]

    def forward(self, images: Mapping[str, Tensor]) -> Outputs:
        """Dataset name -> images (B_d, ...), in their own dtype; returns features and outputs of the tasks of these datasets.

        Outputs are float32 (or wider) also under autocast: losses and decisions are made in full precision.
        """
        if isinstance(images, Tensor):
            raise TypeError(f"the model takes images by dataset, as in {{{next(iter(self.inputs))!r}: images}}; found a tensor")
        present = self.present(list(images))
        features = {task.name: x for task, x in zip(present, self.features(images), strict=True)}
        return Outputs(features, {task.name: self.output(task, features[task.name]) for task in present})

    def output(self, task: Task, features: Tensor) -> Tensor:
        """What a task's head makes of its features, in float32 or wider."""
        y: Tensor = self.heads[task.name](features)
        return y.float() if y.dtype in HALF else y

    def freeze(self, patterns: Sequence[str]) -> None:
        """Take parameters out of training, by name of a parameter or module, or by a pattern with `*`.

        A batch norm all of whose parameters are frozen, or that has none and is itself named, keeps its running statistics too.

        Raises:
            ConfigError: a pattern that nothing matches, or nothing left to train.
        """
        parameters = dict(self.named_parameters())
        wrong = []
        for pattern in patterns:
            names = [name for name in parameters if _means(pattern, name)]
            for name in names:
                parameters[name].requires_grad_(False)
            if not names:
                modules = {".".join(n.split(".")[:i]) for n in parameters for i in range(1, n.count(".") + 1)}
                wrong.append(f"optim.freeze: {unknown('parameter', pattern, sorted({*parameters, *modules}, key=len))}")
        if wrong:
            raise ConfigError(wrong)
        if not any(p.requires_grad for p in parameters.values()):
            raise ConfigError([f"optim.freeze={list(patterns)} leaves nothing to train"])
        self._held = [m for n, m in self.named_modules() if isinstance(m, _BatchNorm) and self._is_frozen(n, m, patterns)]
        self.train(self.training)

    @staticmethod
    def _is_frozen(name: str, norm: nn.Module, patterns: Sequence[str]) -> bool:
        if own := list(norm.parameters()):
            return not any(p.requires_grad for p in own)
        return any(fnmatchcase(f"{name}.weight", pattern) or _within(name, pattern) for pattern in patterns)

    def train(self, mode: bool = True) -> MultiTaskModel:
        """As in torch, but frozen batch norm stays in evaluation mode."""
        super().train(mode)
        for module in self._held:
            module.eval()
        return self

    def shared_parameters(self) -> list[nn.Parameter]:
        """Everything below the heads: trunk, towers and exchange units."""
        return [p for name, p in self.named_parameters() if not name.startswith("heads.")]

    def exchange(self) -> dict[str, ExchangeUnit]:
        """Layer point -> its exchange unit, in execution order."""
        return {self.stages[i].point: self.units[key] for i, key in self._unit_after.items()}  # type: ignore[misc]

    def exchanged_products(self) -> int:
        """Multiply-adds of all exchange units on one sample, if each mixes T features channel by channel."""
        shapes = {point.name: point.shape for point in self.points}
        return sum(len(self.tasks) ** 2 * math.prod(shapes[name]) for name in self.exchange())

    def parameter_count(self) -> int:
        """Trainable numbers, exchange units included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _cut(backbone: Backbone, points: Sequence[str]) -> list[Stage]:
    try:
        return cut(backbone.network, points)
    except CutError as error:
        if not backbone.points or tuple(points) == backbone.points:
            raise
        raise CutError(f"{error.problems[0]}; the backbone's own are {', '.join(backbone.points)}") from error


def _means(pattern: str, name: str) -> bool:
    """Whether a pattern means a parameter; a unit's layer point may be written with its own dots."""
    return any(fnmatchcase(one, pattern) or _within(one, pattern) for one in (name, name.replace("/", ".")))


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _build_head(task: Task, features: tuple[int, ...]) -> nn.Module:
    try:
        check_consumes(task.head, features)
        return task.head.build(features)
    except MTLError:
        raise
    except Exception as error:
        raise PluginError(
            f"the head of task {task.name!r} cannot be built on features of shape {features}: {type(error).__name__}: {error}"
        ) from error
