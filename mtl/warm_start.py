"""Warm start: towers that begin with the weights of another run, or of a file, as the paper starts from single-task networks.

A run knows a task's weights by their names in the plain network, whatever shared what when they were trained: a tower is the
trunk's part and the task's own, put together. Weights are safetensors; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from mtl.checkpoints import read_weights_file
from mtl.config import InitFrom
from mtl.errors import ConfigError, RunError, unknown
from mtl.model import MultiTaskModel
from mtl.weights import checked_description, is_of_run, load_state, read_tensors, read_weights

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """What a task starts from: its plain network's weights by name, and its head's where the source is a run that has it."""

    where: str
    network: dict[str, Tensor]
    head: dict[str, Tensor] | None


def located(task: str, given: InitFrom) -> InitFrom:
    """`given` with its path made absolute and the digest of its file, so that a config says which weights were meant.

    Raises:
        ConfigError: nothing there, or a file that is no longer the one whose digest the config holds.
    """
    path = given.path.absolute()
    if not path.is_file() and not path.is_dir():
        raise ConfigError(
            [f"init_from.{task}: {str(path)!r}: no such file or run; give a run directory or a .safetensors file"]
        )
    try:
        file, digest = _read(path, given.weights, _with_digest)
    except RunError as error:
        raise ConfigError([f"init_from.{task}: {error}; give another run, or a .safetensors file"]) from None
    if given.digest is not None and digest != given.digest:
        raise ConfigError(
            [
                f"init_from.{task}: {str(file)!r} has digest {digest}, and the config was made for {given.digest}; remove the "
                "digest if these weights are meant"
            ]
        )
    return given.model_copy(update={"path": path, "digest": digest})


def _read(path: Path, weights: str, read: Callable[[Path], T]) -> T:
    """What `read` makes of a run's weights, or of a file."""
    return read_weights_file(path, weights, read) if path.is_dir() else read(path)


def _with_digest(file: Path) -> tuple[Path, str]:
    with open(file, "rb") as stream:
        return file, file_digest(stream, "sha256").hexdigest()[:12]


def source(task: str, given: InitFrom) -> Source:
    """The weights that `task` starts from.

    Raises:
        ConfigError: the run trained several tasks, and not this one; RunError: damaged.
    """
    file, state, description = _read(given.path, given.weights, _contents)
    if description is None:
        return Source(str(file), state, None)
    trained, name = [one["name"] for one in description["tasks"]], given.task or task
    if name not in trained:
        raise ConfigError(
            [
                f"init_from.{task}: {str(given.path)!r}: {unknown('task', name, trained)}; "
                f"{{path: ..., task: {trained[0]}}} starts from another task"
            ]
        )
    return source_of(str(file), task, name, state)


def source_of(where: str, task: str, name: str, state: Mapping[str, Tensor]) -> Source:
    """What `task` starts from where a model with these weights had it as `name`."""
    network = {**_under("trunk", state), **_under(f"towers.{name}", state)}
    return Source(where, network, _under(f"heads.{name}", state) if name == task else None)


def _contents(file: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any] | None]:
    """Of a run's weights, and of others without a description."""
    if not is_of_run(file):
        return file, read_tensors(file), None
    state, description = read_weights(file)
    return file, state, checked_description(file, description)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix + "."): value for name, value in state.items() if name.startswith(prefix + ".")}


def start_from(model: MultiTaskModel, sources: Mapping[str, Source]) -> None:
    """Load each task's source into its tower, and into its head where the source has one that fits.

    A trunk that all tasks share can start from one source alone.

    Raises:
        ConfigError: weights of another network, or several sources for one trunk; nothing is loaded then.
    """
    if model.trunk is not None and len(sources) > 1:
        raise ConfigError(
            [f"init_from: these tasks share a trunk, which can start from one of them; found {', '.join(sources)}; name one"]
        )
    loads: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for task, found in sources.items():
        parts = [*([model.trunk] if model.trunk is not None else []), *([model.towers[task]] if task in model.towers else [])]
        wanted: dict[str, tuple[int, ...]] = {}
        for part in parts:
            wanted |= {name: tuple(value.shape) for name, value in part.state_dict().items()}
        check_fits(task, found, wanted, parts)
        loads += [(part, {name: found.network[name] for name in part.state_dict()}) for part in parts]
        head = model.heads[task]
        if found.head is not None and _shapes(found.head) == _shapes(head.state_dict()):
            loads.append((head, found.head))
    for module, state in loads:
        load_state(module, state)


def check_fits(task: str, found: Source, wanted: Mapping[str, tuple[int, ...]], parts: list[nn.Module]) -> None:
    """Refuse weights of another network. What belongs to a classifier that the backbone left out is no objection.

    Raises:
        ConfigError: with the first names that are missing, of another shape or unknown.
    """
    missing = [name for name in wanted if name not in found.network]
    misfits = [name for name in wanted if name in found.network and tuple(found.network[name].shape) != wanted[name]]
    extra = [name for name in found.network if name not in wanted and not _left_out(name, parts)]
    if missing or misfits or extra:
        problems = ((missing, "missing"), (misfits, "of another shape"), (extra, "unknown"))
        counts = ", ".join(f"{len(names)} {what} ({names[0]}, ...)" for names, what in problems if names)
        raise ConfigError([f"init_from.{task}: {found.where!r} holds weights of another network: {counts}"])


def _left_out(name: str, parts: list[nn.Module]) -> bool:
    module = name.rpartition(".")[0]
    return any(isinstance(dict(part.named_modules()).get(module), nn.Identity) for part in parts)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
