"""Where names become things: the five kinds of plugin, filled the same way by everybody.

A plugin reaches a registry by decorator (in a program, or in a file given with `--plugin FILE.py`) or by an entry point of
an installed distribution, whose object is one that the same decorator registered. What ships with this project comes in
through its own entry points and by the same call.

Listing imports nothing: the names come from package metadata. Looking a name up loads that plugin alone, so a broken
plugin hurts only those who name it. A name claimed twice is an error when it is looked up, never a silent replacement.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mtl.errors import MTLError, PluginError, unknown
from mtl.interruption import Terminated

if TYPE_CHECKING:
    from pydantic import BaseModel

F = TypeVar("F", bound=Callable[..., Any])
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
SLOW = 5.0
"""Seconds after which it is said what is being loaded."""
_under_way: list[set[tuple[str, str, str]]] = []
"""Of each plugin that is being loaded: kind, name and identity of what it has registered so far."""


@dataclass(frozen=True)
class Plugin:
    """A registered thing, loaded: the factory, its options model (None: it takes none) and what it declared.

    `details` holds what the kind lets a plugin declare beside its options (a dataset's splits, say).
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    options: type[BaseModel] | None
    details: Mapping[str, Any]
    identity: str
    origin: str

    def create(self, *arguments: Any, options: BaseModel | None = None) -> Any:
        """Call the factory with the kind's arguments, and the options where the plugin declared a model for them.

        Raises:
            PluginError: the factory raised something other than an error of this framework; with what it raised.
        """
        given = () if self.options is None else (options if options is not None else self.options(),)
        try:
            return self.factory(*arguments, *given)
        except MTLError:
            raise
        except Exception as error:
            raise PluginError(f"{self} failed{_line_of(error)}: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} ({self.origin})"


@dataclass
class Registry:
    """All plugins of one kind.

    Args:
        kind: the word for it in messages ("task").
        arguments: names of the positional arguments that a factory of this kind is called with, before its options.
        details: what `register` accepts beside `options`, with defaults.
    """

    kind: str
    arguments: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    _claims: dict[str, list[Plugin]] = field(default_factory=dict)
    _loading: str | None = None

    @property
    def group(self) -> str:
        """The entry-point group that third-party distributions use: `mtl.tasks`, `mtl.backbones`, ..."""
        return f"mtl.{self.word}s"

    @property
    def word(self) -> str:
        """The kind in one word, as in `register_<word>` and in the entry-point group."""
        return self.kind.split()[-1]

    def register(self, name: str, *, options: type[BaseModel] | None = None, **details: Any) -> Callable[[F], F]:
        """Decorate a factory so that `name` resolves to it.

        Args:
            name: letters, digits and underscores, beginning with a letter: it becomes part of parameter names and tags.
            options: pydantic model of the plugin's own keys; the factory then takes an instance as its last argument.
            details: what this kind declares beside its options.

        Raises:
            PluginError: an illegal name, a factory that cannot be called as this kind is, or an unknown declaration.
        """
        if callable(name):
            raise PluginError(f"register a {self.kind} under a name: @mtl.register_{self.word}('...')")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise PluginError(
                f"illegal {self.kind} name {name!r}: use letters, digits and underscores, beginning with a letter"
            )
        for key in details:
            if key not in self.details:
                raise PluginError(f"{self.kind} {name!r}: " + unknown("declaration", key, ["options", *self.details]))

        def decorate(factory: F) -> F:
            self._check(name, factory, options)
            plugin = Plugin(
                self.kind,
                name,
                factory,
                options,
                {**self.details, **details},
                _identity(factory),
                self._loading or _origin(factory),
            )
            identity = plugin.identity
            if _under_way and (self.kind, name, identity) in _under_way[-1]:
                raise PluginError(f"{self.kind} {name!r} is registered twice in {_origin(factory)}; rename one of them")
            if _under_way:
                _under_way[-1].add((self.kind, name, identity))
            rivals = [other for other in self._claims.get(name, []) if other.identity != identity]
            self._claims[name] = [*rivals, plugin]  # the same function run again (a notebook cell) replaces itself
            return factory

        return decorate

    def names(self) -> list[str]:
        """Every name that can be asked for, sorted. Imports no plugin."""
        return sorted({*self._claims, *_entry_points(self.group)})

    def origins(self) -> dict[str, str]:
        """Name -> where it comes from (distribution or file), for listings. Imports no plugin."""
        found = {name: ", ".join(_describe(p) for p in points) for name, points in _entry_points(self.group).items()}
        return {name: found.get(name) or self._claims[name][0].origin for name in self.names()}

    def get(self, name: str) -> Plugin:
        """The plugin called `name`, loaded and validated.

        Raises:
            PluginError: unknown (the nearest name is offered), claimed by two plugins (both are named), or broken (with
                its distribution and the original error).
        """
        points = _entry_points(self.group).get(name, [])
        if not points and name not in self._claims:
            message = unknown(self.kind, name, self.names())
            typo = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.75)
            raise PluginError(message if typo else f"{message}; --plugin FILE.py adds those of a file")
        if len(points) > 1:
            raise self._rivalry(name, [_describe(p) for p in points])
        for point in points:
            self._load(point)
        claims = self._claims[name]
        if len(claims) > 1:
            installed = {_target(point): _describe(point) for point in points}
            raise self._rivalry(name, [f"{c.identity.split(':')[1]} ({installed.get(c.identity, c.origin)})" for c in claims])
        return claims[0]

    def _rivalry(self, name: str, origins: Iterable[str]) -> PluginError:
        return PluginError(
            f"two plugins are called {self.kind} {name!r}: {' and '.join(origins)}; uninstall or rename one of them"
        )

    def _load(self, point: metadata.EntryPoint) -> None:
        where = _describe(point)
        known = self._claims.get(point.name, [])
        if any(claim.identity == _target(point) for claim in known):
            return
        self._loading = where
        try:
            with _loading(f"{self.kind} {point.name!r} of {where}"):
                target = point.load()
        except (KeyboardInterrupt, Terminated):
            raise
        except BaseException as error:
            reason = str(error) if isinstance(error, MTLError) else f"{type(error).__name__}: {error}"
            raise PluginError(f"{self.kind} {point.name!r} of {where} cannot be loaded: {reason}") from error
        finally:
            self._loading = None
        if not any(claim.factory is target for claim in self._claims.get(point.name, [])):
            raise PluginError(
                f"{self.kind} {point.name!r} of {where}: its entry point {point.value!r} gives {target!r}, which is not "
                f"registered under that name; decorate it with @mtl.register_{self.word}({point.name!r})"
            )

    def _check(self, name: str, factory: Any, options: Any) -> None:
        if not callable(factory):
            raise PluginError(f"{self.kind} {name!r}: {factory!r} is not callable; decorate a function or a class")
        if options is not None:
            from pydantic import BaseModel  # only plugins with options pay for it

            if not (isinstance(options, type) and issubclass(options, BaseModel)):
                raise PluginError(f"{self.kind} {name!r}: options={options!r} is not a pydantic model class (mtl.Options)")
        wanted = (*self.arguments, *(["options"] if options is not None else []))
        try:
            inspect.signature(factory).bind(*wanted)
        except (TypeError, ValueError) as error:
            raise PluginError(
                f"{self.kind} {name!r}: {_origin(factory)} must be callable as ({', '.join(wanted)}): {error}"
            ) from error


DATASETS = Registry("dataset", ("split", "root"), {"splits": ("train", "test")})
TASKS = Registry("task", ())
BACKBONES = Registry("backbone", ("input_shape",))
UNITS = Registry("exchange unit", ("tasks", "shape"))
BALANCERS = Registry("balancer", ("tasks",))

REGISTRIES = (DATASETS, TASKS, BACKBONES, UNITS, BALANCERS)

register_dataset = DATASETS.register
register_task = TASKS.register
register_backbone = BACKBONES.register
register_unit = UNITS.register
register_balancer = BALANCERS.register


def load_plugin_file(path: Path) -> None:
    """Run a user's plugin file, whose decorators register what it holds. It is code and is trusted like any program.

    Raises:
        PluginError: no such file, or the file raised; with the original error.
    """
    path = Path(path)
    if not path.is_file():
        raise PluginError(f"no plugin file {str(path)!r}; give the path of a Python file that registers your plugins")
    tag = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]  # two files may share a stem
    module_name = f"mtl_plugin_{path.stem}_{tag}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin file {str(path)!r} is not Python; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with _loading(f"plugin file {str(path)!r}"):
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[module_name]
                raise
    except (KeyboardInterrupt, Terminated):
        raise
    except BaseException as error:
        reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        raise PluginError(f"plugin file {str(path)!r} failed{_line_of(error)}: {reason}") from error


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Say what is being loaded when that takes long, and forget what it registered if it fails: its own, and not that of other
    modules that it imported, which are whole, and will not be imported again.
    """
    before = [(registry, dict(registry._claims)) for registry in REGISTRIES]
    _under_way.append(set())
    words = f"still loading {what} after {SLOW:g} s; Ctrl-C ends it"
    timer = threading.Timer(SLOW, print, [words], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    except BaseException:
        for registry, claims in before:
            for name, made in registry._claims.items():
                whole = [claim for claim in made if claim.identity.partition(":")[0] in sys.modules]
                others = [claim for claim in claims.get(name, []) if claim.identity not in {one.identity for one in whole}]
                claims[name] = [*others, *whole]
            registry._claims = {name: left for name, left in claims.items() if left}
        raise
    finally:
        _under_way.pop()
        timer.cancel()


def _entry_points(group: str) -> Mapping[str, list[metadata.EntryPoint]]:
    """Name -> its distinct entry points."""
    return _installed(group, tuple(sys.path))


@lru_cache(maxsize=64)
def _installed(group: str, path: tuple[str, ...]) -> Mapping[str, list[metadata.EntryPoint]]:
    """Those of the distributions on a path, read once: that takes tens of milliseconds, and a config may name a thousand tasks.
    One distribution seen twice (installed and on the path) counts once.
    """
    found: dict[str, dict[tuple[str, str], metadata.EntryPoint]] = {}
    for point in metadata.entry_points(group=group):
        key = (point.dist.name if point.dist else "", point.value)
        found.setdefault(point.name, {})[key] = point
    return {name: list(points.values()) for name, points in found.items()}


def _line_of(error: BaseException) -> str:
    """Where an error was raised, or the call that led there, in code that is neither this package's nor a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parent)
    foreign = [f for f in frames if not f.filename.startswith((ours, "<")) and "site-packages" not in f.filename]
    return f" ({Path(foreign[-1].filename).name}, line {foreign[-1].lineno})" if foreign else ""


def _describe(point: metadata.EntryPoint) -> str:
    if point.dist is None:
        return point.value
    return f"{point.dist.name} {point.dist.version}"


def _target(point: metadata.EntryPoint) -> str:
    return point.value.replace(" ", "")


def _identity(factory: Any) -> str:
    """`module:qualified name`, as in an entry point; what has no name of its own is told apart by its line."""
    code = inspect.unwrap(factory)
    name = getattr(code, "__qualname__", "") or f"{type(code).__qualname__}@{id(code):x}"
    line = f"@{code.__code__.co_firstlineno}" if name.endswith("<lambda>") else ""
    return f"{code.__module__}:{name}{line}"


def _origin(factory: Any) -> str:
    try:
        source = inspect.getsourcefile(inspect.unwrap(factory))
    except TypeError:
        source = None
    return source or str(getattr(factory, "__module__", factory))
