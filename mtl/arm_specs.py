"""How arms are described: the names of the bundled ones, `NAME:key=value ...`, mappings, and lists of these in YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mtl.arms import SINGLE_TASK, Arm, Joint, Separate
from mtl.config import RunConfig
from mtl.errors import ConfigError, unknown
from mtl.registry import BACKBONES
from mtl.sharing import STRUCTURAL, SplitAt, kinds
from mtl.strict_yaml import PlainDumper, parsed, read_text

SECTIONS = ("backbone", "sharing", "balancer", "data", "optim", "checkpoints")
"""Keys of a config under which others lie."""


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
        if name == "split" and ":" not in text:
            raise ConfigError([f"arm {given!r}: write split:POINT, as in split:pool1, or split for one at every point"])
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
        why = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise ConfigError([f"cannot read the list of arms {str(path)!r}: {why}"], source="--arms") from None
    if not isinstance(given, list) or not all(isinstance(one, str | dict) for one in given):
        raise ConfigError([f"{str(path)!r} must hold a list of names and mappings {{name: overrides}}"], source="--arms")
    return given
