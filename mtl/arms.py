"""Arms: the ways to train a config's tasks that a comparison sets side by side.

An arm says, for a seed and a share of the data, which runs it consists of and whose figures are read from each. Most are one
run of all tasks under other overrides; `single_task` and its relatives are a run per task. Equal runs of several arms are
trained once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from mtl.config import RunConfig, from_tree, override
from mtl.errors import ConfigError
from mtl.registry import BACKBONES
from mtl.seeding import derive_seed
from mtl.sharing import Exchange
from mtl.warm_start import located

SINGLE_TASK = "single_task"
"""The baseline of every measure of transfer, and what `init_from=single_task` starts from."""


@dataclass(frozen=True)
class Piece:
    """One run of an arm.

    Args:
        config: what is trained.
        tasks: whose figures are read from it.
        starts: task -> the run that its tower starts from, which comes first.
    """

    config: RunConfig
    tasks: tuple[str, ...]
    starts: Mapping[str, Piece] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that two pieces share when they are the same run."""
        if not self.starts:
            return self.config.digest()
        parts = [self.config.digest(), *(f"{task}={piece.digest}" for task, piece in sorted(self.starts.items()))]
        return sha256(" ".join(parts).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Of its directory."""
        alone = f"-{self.tasks[0]}" if len(self.config.tasks) == 1 else ""
        return f"{self.config.sharing.kind}{alone}-seed{self.config.seed}-{self.digest}"


@dataclass(frozen=True)
class Setting:
    """What arms need to know about the comparison that they are in.

    Args:
        base: the config; what `auto` becomes for all arms alike is resolved in it.
        points: its layer points, or its backbone's own, in order.
        datasets: task -> the dataset that it is of.
        weights: task -> the weight of its loss.
        epoch_steps: (task, share of the data) -> the length of an epoch of its single-task run where its own would differ from
            that of all tasks together, so that every arm takes equally many steps; else None.
        batch_sizes: dataset -> its samples in a batch.
        input_shape: that images of all datasets are brought to; None: they are left alone.
        parameters: trained numbers of a config's network.
    """

    base: RunConfig
    points: tuple[str, ...]
    datasets: Mapping[str, str]
    weights: Mapping[str, float]
    epoch_steps: Callable[[str, float], int | None]
    batch_sizes: Mapping[str, int]
    input_shape: tuple[int, int, int] | None
    parameters: Callable[[RunConfig], int]


class Arm(ABC):
    """A named way to train the tasks of a config."""

    def __init__(self, name: str, about: str) -> None:
        self.name, self.about = name, about

    @abstractmethod
    def pieces(self, setting: Setting, fraction: float, seed: int) -> list[Piece]:
        """The runs that it consists of. A task that several of them have is predicted by their average."""

    @abstractmethod
    def unlike(self, setting: Setting) -> dict[str, Any]:
        """What its runs are given beyond what the others are, and a reader of their differences has to know."""


class Joint(Arm):
    """All tasks in one run, under overrides of the config.

    Args:
        overrides: `key=value`, applied in order. `init_from=single_task` starts each tower from its task's single-task run of
            the same seed and share of the data.
    """

    def __init__(self, name: str, about: str, overrides: Sequence[str]) -> None:
        super().__init__(name, about)
        warm = f"init_from={SINGLE_TASK}"
        self.overrides = tuple(one for one in overrides if one != warm)
        self.warm = warm in overrides

    def pieces(self, setting: Setting, fraction: float, seed: int) -> list[Piece]:
        """One.

        Raises:
            ConfigError: overrides that do not fit the config, or after which runs would not compare.
        """
        config = from_tree(override(setting.base.model_dump(mode="json"), self.overrides))
        starts = config.init_from
        own = {task: located(task, given) for task, given in starts.items() if setting.base.init_from.get(task) != given}
        config = config.replaced(init_from={**starts, **own})
        if unequal := _unequal(config, setting.base):
            raise ConfigError([f"{', '.join(unequal)}: must be the same for all arms; set it in the config"])
        missing = [] if isinstance(config.sharing, Exchange) else ["units"]
        config = config.replaced(
            seed=seed,
            data=config.data.model_copy(update={"fraction": fraction}),
            optim=config.optim.model_copy(update={"freeze": tuple(without(config.optim.freeze, missing))}),
        )
        before = {}
        if self.warm:
            if config.sharing.plan(setting.points).shared:
                raise ConfigError(["init_from=single_task: the tasks share a trunk, which can start from one run only"])
            before = {piece.tasks[0]: piece for piece in Separate(SINGLE_TASK, "").pieces(setting, fraction, seed)}
        return [Piece(config, tuple(task.name for task in config.tasks), before)]

    def unlike(self, setting: Setting) -> dict[str, Any]:
        """`images`, the samples of a dataset in a step, `draws`, keys by which samples are drawn otherwise, and `init_from`,
        the tasks whose towers start elsewhere; of these what the arm's own overrides say.
        """
        config, base = self.pieces(setting, setting.base.data.fraction, setting.base.seed)[0].config, setting.base
        starts = sorted(task for task, given in config.init_from.items() if base.init_from.get(task) != given)
        images, others = (one.batch_size * one.optim.accumulate for one in (config, base))
        keys = ("mixing", "class_balanced")[len(set(setting.datasets.values())) < 2 :]  # of one dataset there is nothing to mix
        draws = [key for key in keys if getattr(config.data, key) != getattr(base.data, key)]
        found = {"images": images if images != others else None, "draws": draws, "init_from": starts}
        return {key: value for key, value in found.items() if value}


class Separate(Arm):
    """Every task in runs of its own.

    Args:
        ensemble: as many runs of a task as there are tasks, each with a seed of its own.
        wide: with a backbone so wide that the network of one task has the parameters of all tasks' together.
    """

    def __init__(self, name: str, about: str, ensemble: bool = False, wide: bool = False) -> None:
        super().__init__(name, about)
        self.ensemble, self.wide = ensemble, wide

    def pieces(self, setting: Setting, fraction: float, seed: int) -> list[Piece]:
        """One per task; of an ensemble T per task, the first of which is the single-task run of that seed."""
        names = [task.name for task in setting.base.tasks]
        seeds = [member_seed(seed, member) for member in range(len(names) if self.ensemble else 1)]
        return [Piece(self._alone(setting, name, fraction, one), (name,)) for name in names for one in seeds]

    def unlike(self, setting: Setting) -> dict[str, Any]:
        """Nothing: what its runs are given is that of the joint runs."""
        return {}

    def _alone(self, setting: Setting, task: str, fraction: float, seed: int) -> RunConfig:
        tree = setting.base.model_dump(mode="json")
        chosen = [one.name for one in setting.base.tasks].index(task)
        tree |= {"tasks": [tree["tasks"][chosen]], "sharing": {"kind": "unshared"}, "balancer": "fixed", "seed": seed}
        if setting.weights[task] != 1:  # of a loss among others; alone it would scale the rate, or what decays
            given = tree["tasks"][0]
            tree["tasks"] = [{**(given if isinstance(given, dict) else {"name": given}), "weight": 1.0}]
        tree["init_from"] = {name: start for name, start in tree["init_from"].items() if name == task}
        data = tree["data"]
        data["datasets"] = {name: given for name, given in data["datasets"].items() if name == setting.datasets[task]}
        data["labelled"] = {name: given for name, given in data["labelled"].items() if name == task}
        data["class_balanced"] = [name for name in data["class_balanced"] if name == task]
        data |= {"fraction": fraction, "mixing": "equal", "input_shape": setting.input_shape}
        tree["batch_size"] = setting.batch_sizes[setting.datasets[task]]
        others = [name for name in (one.name for one in setting.base.tasks) if name != task]
        tree["optim"]["freeze"] = without(
            tree["optim"]["freeze"], ["units", *[f"{part}.{name}" for part in ("towers", "heads") for name in others]]
        )
        if (steps := setting.epoch_steps(task, fraction)) is not None:
            tree["epoch_steps"] = steps
        config = from_tree(tree, source=f"arm {self.name!r}")
        return widened(config, setting.parameters(setting.base), setting.parameters) if self.wide else config


def without(patterns: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Patterns of `optim.freeze` but those of parts that a network does not have.

    >>> without(["units", "towers.a.*", "towers.b"], ["units", "towers.b"])
    ['towers.a.*']
    """
    return [one for one in patterns if not any(one == part or one.startswith(f"{part}.") for part in parts)]


def _unequal(config: RunConfig, base: RunConfig) -> list[str]:
    """Keys in which a config differs from the comparison's, and in which arms may not differ."""
    found = [] if [task.name for task in config.tasks] == [task.name for task in base.tasks] else ["tasks"]
    found += [] if config.seed == base.seed else ["seed"]
    of_data = ("fraction", "labelled", "input_shape", "validation", "split_seed", "datasets", "root")
    return found + [f"data.{key}" for key in of_data if getattr(config.data, key) != getattr(base.data, key)]


def member_seed(seed: int, member: int) -> int:
    """The seed of an ensemble's member; the first has the ensemble's own, the others one that no other member has."""
    return seed if member == 0 else derive_seed(seed, "ensemble", member) % 2**31


def widened(config: RunConfig, wanted: int, parameters: Callable[[RunConfig], int]) -> RunConfig:
    """The config with its backbone's `width` such that its network has as nearly `wanted` parameters as four decimals allow, or
    whole numbers where the option is one.

    Raises:
        ConfigError: no width gives so many.
    """
    tree = config.model_dump(mode="json")
    options = BACKBONES.get(config.backbone.name).options
    assert options is not None
    parts = 1 if options.model_fields["width"].annotation is int else 10_000  # of 1

    def at(width: int) -> RunConfig:
        return from_tree(override(tree, [f"backbone.width={width if parts == 1 else width / parts}"]))

    def count(width: int) -> int:
        try:
            return parameters(at(width))
        except ConfigError:
            if width < own:  # narrower than the backbone allows
                return 0
            raise

    own = low = high = round(config.backbone.options.width * parts)  # type: ignore[union-attr]
    found = least = parameters(config)
    while found < wanted:
        low, high = high, 2 * high
        found = count(high)
        if high >= own * 2**PLATEAU and found <= least:
            raise ConfigError([f"backbone.width={high / parts:g} trains {found:,} parameters, no more than the config's does"])
    if low == high:
        low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    nearer = low > 0 and count(low) > 0 and wanted - count(low) < count(high) - wanted
    return at(low if nearer else high)


PLATEAU = 6
"""Doublings of a width after which a network should have become larger."""
