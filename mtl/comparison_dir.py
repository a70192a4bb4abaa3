"""The directory of a comparison: one process at a time, one config, and what is in it is used again.

`comparison.json` holds the config as it was asked for, and with every `auto` resolved, which all arms and seeds, also those
added later, use.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from mtl.auto import resolved
from mtl.config import RunConfig, from_tree
from mtl.errors import ConfigError, MTLError, RunError
from mtl.locking import Lock, is_own
from mtl.warm_start import located
from mtl.writing import temporary_prefix

NOTE = "comparison.json"
"""In a comparison's directory: the config as it was asked for, and as all runs are made from."""


def default_directory(config: RunConfig, stem: str = "") -> Path:
    """Under `runs/`, named by the config's digest (which tells the weights that towers start from, too) and a `stem`."""
    return Path("runs") / f"compare-{f'{stem}-' * bool(stem)}{asked(config).digest()}"


def asked(config: RunConfig) -> RunConfig:
    """The config with the digests of the weights that towers start from."""
    return config.replaced(init_from={task: located(task, start) for task, start in config.init_from.items()})


def refuse_file(directory: Path) -> None:
    """Complain of what is there and no directory.

    Raises:
        RunError: it is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{str(directory)!r} is a file; give a folder")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time works in a comparison's directory.

    Raises:
        RunError: another does, or it cannot be written.
    """
    refuse_file(directory)
    new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {str(directory)!r}: {error.strerror or error}") from None
    lock = Lock(directory)
    try:
        yield
    except MTLError:
        if new and not (directory / "runs").exists():  # nothing was trained
            shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        lock.close()


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Say, of what cannot be written to a comparison's directory, that no run is lost.

    Raises:
        RunError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write the comparison in {str(directory)!r}: {error.strerror or error}; finished runs are kept, and "
            "the same again goes on"
        ) from error


def begun(directory: Path, config: RunConfig) -> tuple[RunConfig, str]:
    """The config that all runs of a comparison are made from, and what to note of it: of a new one `config` with every `auto`
    that arms have in common resolved; of one that was begun, what it noted. Where to compute, where data are and what is saved
    when is as now.

    Raises:
        ConfigError: the directory holds a comparison of another config; with what differs.
        RunError: it holds something else.
    """
    note, base, config = directory / NOTE, resolved(config), asked(config)
    if not note.is_file():
        cut = temporary_prefix(note)  # of one that was killed while it wrote its first note
        if others := sorted(one.name for one in directory.iterdir() if not (is_own(one.name) or one.name.startswith(cut))):
            raise RunError(
                f"{str(directory)!r} holds {others[0]!r} and no {NOTE}, so it is not a comparison's; nothing was written; give "
                "another directory"
            )
        return base, json.dumps(
            {"asked": config.model_dump(mode="json"), "base": base.model_dump(mode="json")}, indent=1
        ) + "\n"
    try:
        text = note.read_text(encoding="utf-8")
        trees = json.loads(text)
        then, noted = (from_tree(trees[key], source=str(note)) for key in ("asked", "base"))
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{str(note)!r} is damaged ({error}); give another directory") from None
    if then.digest() != config.digest():
        changes = differing(then.model_dump(mode="json"), config.model_dump(mode="json"))
        raise ConfigError(
            [f"{key}: {was!r} there, {now!r} now" for key, (was, now) in changes.items()],
            source=f"{str(directory)!r} holds a comparison of another config (give another directory)",
        )
    data = noted.data.model_copy(update={"root": base.data.root, "workers": base.data.workers})
    starts = {task: start.model_copy(update={"path": base.init_from[task].path}) for task, start in noted.init_from.items()}
    return noted.replaced(device=base.device, data=data, init_from=starts, checkpoints=base.checkpoints), text


def with_data(note: str, fingerprints: Mapping[str, str], directory: Path) -> str:
    """What to note of a comparison, with which data it is of.

    Raises:
        RunError: they are not those that it began with; runs of both cannot be compared.
    """
    noted = json.loads(note)
    then = noted.setdefault("data", dict(fingerprints))  # which comparisons of an earlier version lack
    if changed := sorted(name for name in {*then, *fingerprints} if then.get(name) != fingerprints.get(name)):
        raise RunError(
            f"{str(directory)!r} holds a comparison on other data: {'; '.join(changed)} changed since; give another directory"
        )
    return json.dumps(noted, indent=1) + "\n"


def with_tasks(note: str, tasks: Mapping[str, Any], directory: Path) -> str:
    """What to note of a comparison, with what its tasks are.

    Raises:
        RunError: they are not those that it began with.
    """
    noted = json.loads(note)
    tasks = json.loads(json.dumps(_rounded(tasks), default=lambda other: type(other).__name__))
    then = noted.setdefault("tasks", tasks)  # which comparisons of an earlier version lack
    if changes := differing(then, tasks):
        each = "; ".join(f"{key} {was!r} there, {now!r} now" for key, (was, now) in changes.items())
        raise RunError(
            f"{str(directory)!r} holds a comparison of other tasks, for a plugin was edited since: {each}; give another "
            "directory"
        )
    return json.dumps(noted, indent=1) + "\n"


def _rounded(value: Any) -> Any:
    """Numbers that were fitted to data to six digits: of the others some differ from machine to machine."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def with_plugins(note: str, files: Sequence[Path]) -> tuple[str, list[str]]:
    """What to note of a comparison, with the digests of the files of plugins that it was ever given; and the names of those
    that were edited in between.

    Raises:
        RunError: one cannot be read.
    """
    noted = json.loads(note)
    digests = noted.setdefault("plugins", {})
    for file in files:
        try:
            digest = sha256(file.read_bytes()).hexdigest()[:12]
        except OSError as error:
            raise RunError(f"cannot read the plugin {str(file)!r}: {error.strerror or error}") from None
        if digest not in (known := digests.setdefault(file.name, [])):
            known.append(digest)
    return json.dumps(noted, indent=1) + "\n", sorted(name for name, known in digests.items() if len(known) > 1)


def differing(one: Any, other: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> the two values, where two trees differ.

    >>> differing({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    {'b.c': (2, 3)}
    """
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return {} if one == other else {prefix: (one, other)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*one, *(key for key in other if key not in one)]:
        found |= differing(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else key)
    return found
