"""How tasks share: where the towers begin, and where they exchange features.

Every kind answers one question, `plan`: how many leading stages all tasks share, and after which layer points their towers
exchange. `unshared`, `hard_shared` and `split` differ in the first number alone; every other kind names a registered exchange
unit, which this module knows by its interface only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from mtl.errors import ConfigError, MTLError, PluginError, unknown
from mtl.options import Options
from mtl.registry import UNITS
from mtl.units import ExchangeUnit


@dataclass(frozen=True)
class Plan:
    """What a kind of sharing comes to on one backbone.

    Args:
        points: where the backbone is cut, in execution order.
        shared: how many of the stages, from the input on, all tasks share; one more than the points: all of them.
        exchange: the points after which towers exchange.
        unit: makes an exchange unit from the number of towers and the shape of one sample's feature.
        check: complains about units that should not be made, from the number of towers and the shape at each point.
        named: points that must exist, though nothing is cut there.
    """

    points: tuple[str, ...]
    shared: int = 0
    exchange: tuple[str, ...] = ()
    unit: Callable[[int, tuple[int, ...]], ExchangeUnit] | None = None
    check: Callable[[int, Mapping[str, tuple[int, ...]]], None] | None = None
    named: tuple[str, ...] = ()


class Sharing(Options, ABC):
    """Base of every kind."""

    kind: str
    """`unshared`, `hard_shared`, `split`, or the name of a registered exchange unit such as `cross_stitch`."""
    points: tuple[str, ...] | None = None
    """Layer points at which the backbone is cut, in execution order; null: the backbone's own. Kinds that exchange nothing
    check the names and do no more with them, so that one config can be run with several kinds."""

    @classmethod
    def unknown_key(cls, key: str) -> str:
        """With the kinds that have it, where other kinds do."""
        if having := [kind for kind in kinds() if key in _keys_of(kind)]:
            name = cls.model_fields["kind"].default
            of = f" of sharing kind {name!r}" if isinstance(name, str) else ""
            have = f"{' and '.join(having)} {'have' if len(having) > 1 else 'has'}"
            return f"unknown key {key!r}{of}; {have} it: set sharing.kind={having[0]} too"
        return super().unknown_key(key)

    @field_validator("points", mode="before")
    @classmethod
    def _one_point(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @abstractmethod
    def plan(self, declared: Sequence[str]) -> Plan:
        """The plan on a backbone that declares the layer points `declared`."""

    @property
    def unit_lr_factor(self) -> float:
        """Learning rate of the exchange units, relative to the base rate."""
        return 1.0


class Unshared(Sharing):
    """A tower per task and nothing in common but the sum of the losses."""

    kind: Literal["unshared"] = "unshared"

    def plan(self, declared: Sequence[str]) -> Plan:
        """No stage shared, no exchange."""
        return Plan(self.points or ())


class HardShared(Sharing):
    """One backbone for all tasks; only the heads are their own."""

    kind: Literal["hard_shared"] = "hard_shared"

    def plan(self, declared: Sequence[str]) -> Plan:
        """Every stage shared."""
        points = self.points or ()
        return Plan(points, shared=len(points) + 1)


class SplitAt(Sharing):
    """One trunk up to a layer point, a tower per task after it."""

    kind: Literal["split"] = "split"
    at: str
    """The last layer point of the shared trunk, such as pool1; `mtl backbones NAME` lists a backbone's."""

    def plan(self, declared: Sequence[str]) -> Plan:
        """The stages up to `at` shared."""
        points = self.points or tuple(declared)
        if self.at not in points:
            points = (self.at,)
        return Plan(points, shared=points.index(self.at) + 1, named=self.points or ())


class Exchange(Sharing):
    """Towers that exchange features through a registered unit after each of the layer points.

    The options model of a unit that has options of its own derives from this class.
    """

    lr_multiplier: float = Field(1.0, gt=0)
    """Learning rate of the units over the base rate. The paper uses 100 to 1000 with SGD; under Adam treat it as a tunable."""

    def plan(self, declared: Sequence[str]) -> Plan:
        """Nothing shared; exchange after every point."""
        points = self.points if self.points is not None else tuple(declared)
        if not points:
            why = "the backbone declares none" if self.points is None else "the list is empty"
            raise ConfigError(
                [
                    f"sharing.points: {self.kind!r} needs layer points to exchange at, and {why}; `mtl backbones NAME` lists "
                    "the legal ones"
                ]
            )
        return Plan(points, exchange=points, unit=self._unit, check=self.check)

    @property
    def unit_lr_factor(self) -> float:
        """`lr_multiplier`."""
        return self.lr_multiplier

    def check(self, tasks: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Called once before any unit is made; a unit that may not fit refuses here. Default: nothing.

        Args:
            tasks: the number of towers.
            shapes: layer point -> shape of one sample's feature there.

        Raises:
            ConfigError: what would not work, with figures.
        """

    def _unit(self, tasks: int, shape: tuple[int, ...]) -> ExchangeUnit:
        plugin = UNITS.get(self.kind)
        unit = plugin.create(tasks, shape, options=self if plugin.options is not None else None)
        if not isinstance(unit, ExchangeUnit):
            raise PluginError(f"{plugin} must give an mtl.ExchangeUnit; found {type(unit).__name__}")
        return unit


STRUCTURAL: dict[str, type[Sharing]] = {"unshared": Unshared, "hard_shared": HardShared, "split": SplitAt}


def kinds() -> list[str]:
    """Every value that `sharing.kind` can take. Imports no plugin."""
    return [*STRUCTURAL, *UNITS.names()]


def _keys_of(kind: str) -> Collection[str]:
    """The options of a kind; none of one that is broken."""
    with suppress(MTLError):
        return model_of(kind).model_fields
    return ()


def model_of(kind: Any) -> type[Sharing]:
    """The options model of a kind of sharing.

    Raises:
        PluginError: unknown (the nearest is offered), or a unit that is broken.
    """
    if isinstance(kind, str) and kind in STRUCTURAL:
        return STRUCTURAL[kind]
    if kind not in kinds():
        raise PluginError(unknown("sharing kind", str(kind), kinds()))
    plugin = UNITS.get(kind)
    model = plugin.options or Exchange
    if not issubclass(model, Exchange):
        raise PluginError(f"{plugin}: its options model {model.__name__} must derive from mtl.Exchange")
    return model
