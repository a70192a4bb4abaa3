"""Arms: the ways to train a config's tasks that a comparison sets side by side.

An arm says, for a seed and a share of the data, which runs it consists of and whose figures are read from each. Most are one
run of all tasks under other overrides; `single_task` and its relatives are a run per task. Equal runs of several arms are
trained once.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from mtl.config import RunConfig, from_tree, override
from mtl.errors import ConfigError, unknown
from mtl.registry import BACKBONES
from mtl.seeding import derive_seed
from mtl.sharing import STRUCTURAL, Exchange, SplitAt, kinds
from mtl.strict_yaml import PlainDumper, parsed, read_text
from mtl.warm_start import located

SECTIONS = ("backbone", "sharing", "balancer", "data", "optim", "checkpoints")
"""Keys of a config under which others lie."""
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
        """`batch_size`, and under `init_from` the tasks whose towers start elsewhere, where the arm's own overrides say so."""
        config, base = self.pieces(setting, setting.base.data.fraction, setting.base.seed)[0].config, setting.base
        starts = sorted(task for task, given in config.init_from.items() if base.init_from.get(task) != given)
        batch = {"batch_size": config.batch_size} if config.batch_size != base.batch_size else {}
        return {**batch, **({"init_from": starts} if starts else {})}


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
            tree["tasks"][0]["weight"] = 1.0
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
    """The config with its backbone's `width` such that its network has as nearly `wanted` parameters as four decimals allow."""
    tree = config.model_dump(mode="json")

    def at(width: float) -> RunConfig:
        return from_tree(override(tree, [f"backbone.width={width}"]))

    low, high = 0.0, 1.0
    while parameters(at(high)) < wanted:
        low, high = high, 2 * high
    while high - low > 0.0002:
        middle = round((low + high) / 2, 4)
        low, high = (middle, high) if parameters(at(middle)) < wanted else (low, middle)
    nearest = min((width for width in (low, high) if width), key=lambda width: abs(parameters(at(width)) - wanted))
    return at(nearest)


def has_width(config: RunConfig) -> bool:
    """Whether the backbone of a config has the option `width`."""
    options = BACKBONES.get(config.backbone.name).options
    return options is not None and "width" in options.model_fields


def default_arms(config: RunConfig) -> tuple[str, ...]:
    """The arms of a comparison that names none: the config's own sharing among them, or `cross_stitch`."""
    own = f"split:{config.sharing.at}" if isinstance(config.sharing, SplitAt) else config.sharing.kind
    always = (SINGLE_TASK, "hard_shared", "unshared")
    return (*always, "cross_stitch" if own in always else own)


def arms_of(given: Sequence[str | Mapping[str, Any]], base: RunConfig, points: Sequence[str]) -> list[Arm]:
    """The arms that these descriptions mean.

    Args:
        given: names (see `named`), `NAME:key=value key=value`, or mappings {name: overrides}, these as such text, as a list of
            `key=value`, or as a mapping of keys, dotted or in sections.

    Raises:
        ConfigError: every description that means nothing, and names given twice.
    """
    found: list[Arm] = []
    wrong: list[str] = []
    for one in given:
        try:
            bundled = isinstance(one, str) and "=" not in one and not one.endswith(":")
            found += named(str(one), base, points) if bundled else _own(one)
        except ConfigError as error:
            wrong += error.problems
    names = [arm.name for arm in found]
    wrong += [f"arm {name!r} is given more than once" for name in dict.fromkeys(names) if names.count(name) > 1]
    if not found and not wrong:
        wrong.append(f"no arms; known: {', '.join(known())}, or NAME:key=value for one of your own")
    if wrong:
        raise ConfigError(wrong, source="arms")
    return found


def known() -> list[str]:
    """What `named` takes."""
    units = [kind for kind in kinds() if kind not in STRUCTURAL]
    return [SINGLE_TASK, "single_task_wide", "ensemble", *STRUCTURAL, "split:POINT", *units, "cross_stitch_frozen"]


def named(name: str, base: RunConfig, points: Sequence[str]) -> list[Arm]:
    """The arms of a bundled name; `split` is one per layer point.

    Raises:
        ConfigError: there is none of that name, or not for this backbone.
    """
    count = len(base.tasks)
    match name.partition(":"):
        case ("single_task", "", ""):
            return [Separate(name, "each task alone")]
        case ("single_task_wide", "", ""):
            if not has_width(base):
                raise ConfigError(
                    [f"arm {name!r} widens the backbone, and {base.backbone.name!r} has no option width; small_cnn has one"]
                )
            joint = f"the config's {base.sharing.kind} network"
            return [Separate(name, f"each task alone, in a network with as many parameters as {joint}", wide=True)]
        case ("ensemble", "", ""):
            return [Separate(name, f"each task alone, {count} networks averaged", ensemble=True)]
        case ("split", "", ""):
            if not points:
                raise ConfigError([f"arm 'split' needs layer points, and backbone {base.backbone.name!r} declares none"])
            return [arm for point in points for arm in named(f"split:{point}", base, points)]
        case ("split", ":", point) if point:
            return [
                Joint(name, f"one trunk up to {point}, then a tower per task", ["sharing.kind=split", f"sharing.at={point}"])
            ]
        case ("hard_shared", "", ""):
            return [Joint(name, "one backbone for all tasks", ["sharing.kind=hard_shared"])]
        case ("unshared", "", ""):
            return [Joint(name, "a tower per task, trained together, nothing exchanged", ["sharing.kind=unshared"])]
        case ("cross_stitch_frozen", "", ""):
            frozen = ["sharing.kind=cross_stitch", "sharing.init=identity"]
            frozen.append(f"optim.freeze={_as_yaml([*base.optim.freeze, 'units'])}")
            return [Joint(name, "cross-stitch units that stay the identity", frozen)]
        case (kind, "", "") if kind in kinds():
            return [Joint(name, f"towers that exchange through {kind} units", [f"sharing.kind={kind}"])]
    raise ConfigError([f"{unknown('arm', name, known())}; NAME:key=value makes one of your own"])


def _own(given: str | Mapping[str, Any]) -> list[Arm]:
    if isinstance(given, str):
        name, colon, text = given.partition(":")
        if not colon or "=" in name:
            raise ConfigError([f"arm {given!r} has no name; write NAME:key=value, as in wide:backbone.width=2"])
        return [_user_arm(name, words(name, text))]
    if not isinstance(given, Mapping):
        raise ConfigError([f"an arm is a name, NAME:key=value, or a mapping {{name: overrides}}; found {given!r}"])
    return [_user_arm(str(name), _as_overrides(name, value)) for name, value in given.items()]


def words(arm: str, text: str) -> list[str]:
    """The overrides in a text: parted by blanks that are neither in quotes nor in brackets.

    >>> words("a", "sharing={kind: cross_stitch, points: [pool1]} 'x=b c'")
    ['sharing={kind: cross_stitch, points: [pool1]}', 'x=b c']

    Raises:
        ConfigError: quotes or brackets that are not closed, or a part that is no key=value.
    """
    found, depth, quote = [""], 0, ""
    for sign in text:
        if sign == quote or (not quote and sign in "'\""):
            quote = "" if quote else sign
            if not depth:
                continue  # as a shell: quotes are no part of the word; inside brackets they are YAML's
        elif not quote and sign.isspace() and not depth:
            found += [""] if found[-1] else []
            continue
        elif not quote and sign in "{[]}":
            depth += 1 if sign in "{[" else -1
        found[-1] += sign
    if quote or depth:
        raise ConfigError([f"arm {arm!r}: a {'quote' if quote else 'bracket'} in {text!r} is not closed"])
    found = [one for one in found if one]
    if not found:
        raise ConfigError([f"arm {arm!r} has no overrides after ':'; write {arm}:key=value"])
    if wrong := [one for one in found if "=" not in one]:
        raise ConfigError([f"arm {arm!r}: {wrong[0]!r} is no key=value; blanks part overrides, unless in quotes or brackets"])
    return found


def _as_overrides(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return words(name, value)
    if isinstance(value, Mapping):
        return [f"{key}={_as_yaml(one)}" for key, one in _in_sections(value).items()]
    if isinstance(value, Sequence) and all(isinstance(one, str) for one in value):
        return list(value)
    raise ConfigError([f"arm {name!r}: its overrides are text, a list of key=value, or a mapping; found {value!r}"])


def _in_sections(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a config's sections, dotted: a mapping under `optim` changes what it names, and leaves the rest of `optim`. What
    a section is named by comes first, since setting it may begin the section anew.
    """
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        if key in SECTIONS and isinstance(value, Mapping):
            found |= {f"{key}.{sub}": value[sub] for sub in sorted(value, key=lambda sub: sub not in ("kind", "name"))}
        else:
            found[key] = value
    return found


def _as_yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=PlainDumper, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _user_arm(name: str, overrides: Sequence[str]) -> Arm:
    if not re.fullmatch(r"[^\W_][\w.+-]*(:[\w.+-]+)?", name, re.ASCII):
        raise ConfigError([f"arm name {name!r}: letters, digits, '_', '-', '+' and '.' only, the first a letter or a digit"])
    if name in known() or name.startswith("split:"):
        raise ConfigError([f"arm {name!r} is a bundled one, and cannot be given overrides; call yours by another name"])
    return Joint(name, f"the config with {' '.join(overrides)}", overrides)


def listed(path: Path) -> list[str | dict[str, Any]]:
    """Arms from a YAML file: a list of what `arms_of` takes.

    Raises:
        ConfigError: it cannot be read, or is no list.
    """
    try:
        given = parsed(read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError([f"cannot read arms {str(path)!r}: {' '.join(str(error).split())}"]) from None
    if not isinstance(given, list) or not all(isinstance(one, str | dict) for one in given):
        raise ConfigError([f"{str(path)!r} must hold a list of names and mappings {{name: overrides}}"])
    return given
