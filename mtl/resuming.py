"""A run that was cut goes on as if it had not been."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from mtl.auto import resolved
from mtl.build import composed, train
from mtl.checkpoints import FOLDER, LARGEST_STATE, folder_of, newest, state_of
from mtl.commit import POINTER, committed
from mtl.comparison_dir import differing
from mtl.config import RunConfig, from_tree, override, read_tree
from mtl.errors import ConfigError, RunError
from mtl.hardware import usable_cores
from mtl.keeping import restore
from mtl.locking import Lock
from mtl.processes import Processes, joined
from mtl.progress import Progress, Silent
from mtl.run import RunResult
from mtl.rundir import note_resumed, refuse_links
from mtl.strict_json import read_strict
from mtl.trainer import fit, out_of_patience

ANY = ("data.root", "data.workers", "data.bad_files", "device", "patience", "checkpoints")
"""Keys, and sections, that may change when a run goes on: no step depends on them, but for rounding on another device."""
LATER = ("metrics.jsonl", "result.json", f"{FOLDER}/{POINTER}")
"""What a run writes after its first checkpoint."""
NOTHING_DONE: dict[str, Any] = {"epoch": 0, "partial": None}
"""Where a run stands, as `allowed` asks, that was cut before its first checkpoint."""
Place = Callable[[RunConfig], tuple[Path, Lock]]
LENGTH = "epochs"
"""The key that may change where nothing was laid out over the run: with a constant rate, no warm-up and no `max_steps`."""


def train_or_resume(config: RunConfig, run_dir: Path | None, progress: Progress) -> RunResult:
    """Train a run, or go on with it where `torchrun` has started its processes again.

    Raises:
        ConfigError: it has, and nobody said which run.
        RunError: the directory holds something else.
    """
    with joined(config.device) as processes:
        if not processes.again:
            return train(config, run_dir, progress)
        if run_dir is None:
            raise ConfigError(["torchrun has started this again; which run to go on with is known only with --run-dir"])
        if processes.first(lambda: (run_dir / "config.yaml").is_file() and is_of(run_dir, config)):
            return resume(run_dir, (), progress)
        return train(config, run_dir, progress)


def resume(run_dir: str | Path, overrides: Sequence[str] = (), progress: Progress | None = None) -> RunResult:
    """Go on with a run that was cut, from the sample after the last one that its newest whole checkpoint has seen.

    On the same machine with the same versions what comes of it is, on a CPU to the last bit, what would have come of it uncut.

    Args:
        run_dir: of the run.
        overrides: `key.sub=value`, of keys that may change: where data are and who decodes them, the device, `patience`,
            `checkpoints`; with a constant learning rate, no warm-up and no `max_steps` also `epochs`, so that a finished run
            can be made longer.
        progress: what to show meanwhile; None: nothing.

    Returns:
        Of the whole run. One that is finished already is not trained again.

    Raises:
        ConfigError: a key that may not change; all of them, with what they were.
        RunError: no run, in use by another process, no whole checkpoint, or data that have changed.
    """
    directory, progress = Path(run_dir), progress or Silent()
    if not (directory / "config.yaml").is_file():
        raise RunError(f"{str(directory)!r} is not a run directory: it has no config.yaml")
    refuse_links(directory)
    tree = read_tree(directory / "config.yaml")
    written = from_tree(tree, source=str(directory / "config.yaml"))
    config = from_tree(override(tree, overrides), source="overrides")
    with joined(config.device) as processes, ExitStack() as stack:
        held: list[Lock] = []
        processes.first(lambda: held.append(stack.enter_context(Lock(directory))))
        if not processes.writes:
            progress = Silent()

        def place(config: RunConfig) -> tuple[Path, Lock]:
            return directory, held[0]

        if not processes.first(
            lambda: bool(committed(folder_of(directory)) or any((directory / name).exists() for name in LATER))
        ):
            changes = allowed(written, config, NOTHING_DONE, directory)
            return _from_the_beginning(directory, place, config, changes, progress, processes)
        folder, wrong = processes.first(lambda: newest(directory))
        stands = state_of(folder)
        changes = allowed(written, config, stands, directory)
        if (result := _result(directory)) is not None and (ended := _ended(config, stands)):
            progress.line(f"{directory} is finished; {ended}")
            return RunResult(**result)
        with as_many_threads(stands["threads"], progress):
            made = composed(
                resolved(config.replaced(init_from={})).replaced(init_from=config.init_from),
                progress,
                place,
                stands["steps"],
                processes,
            )
            try:
                state = restore(made, folder)
                processes.first(lambda: _begin_again(directory, made.config))
            except BaseException:
                made.close()
                raise
            if (count := 1 + len(stands["ranks"])) != processes.count:
                changes.append(f"processes: {count} -> {processes.count}, so that results differ by rounding and by dropout")
            made.notes += [*wrong, *changes, f"goes on after step {state.steps}, from {folder.name}"]
            return fit(made, state)


def _begin_again(directory: Path, config: RunConfig) -> None:
    """Note where and with what a run goes on; it is not finished any more."""
    note_resumed(directory, config)
    (directory / "result.json").unlink(missing_ok=True)


def _from_the_beginning(
    directory: Path, place: Place, config: RunConfig, changes: Sequence[str], progress: Progress, processes: Processes
) -> RunResult:
    """Train a run that was cut before its first checkpoint, and of which nothing is therefore lost."""
    progress.line(f"{directory} was cut before its first checkpoint, and begins anew")
    processes.first(lambda: _empty(directory))
    made = composed(resolved(config), progress, place, processes=processes)
    try:
        processes.first(lambda: note_resumed(directory, made.config))
    except BaseException:
        made.close()
        raise
    made.notes += changes
    return fit(made)


def _empty(directory: Path) -> None:
    """Remove what a run that was cut before its first checkpoint wrote beside its config."""
    try:
        for name in ("tb", FOLDER):
            shutil.rmtree(directory / name, ignore_errors=True)
        (directory / FOLDER).mkdir()
        (directory / "exchange.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot write run directory {str(directory)!r}: {error.strerror or error}") from None


def allowed(written: RunConfig, config: RunConfig, stands: dict[str, Any], directory: Path) -> list[str]:
    """What to say of the changes of a config.

    Raises:
        ConfigError: those that would make another run of it; all of them.
    """
    said, wrong = [], []
    optim = written.optim
    constant = optim.schedule == "constant" and not optim.warmup_epochs and written.max_steps is None
    for key, (was, now) in differing(written.model_dump(mode="json"), config.model_dump(mode="json")).items():
        change = f"{key}: {was!r} -> {now!r}"
        if key == LENGTH and constant:
            done = stands["epoch"] + (stands["partial"] is not None)
            if now < done:
                wrong.append(f"{change}: {done} are done or begun")
            said.append(change)
        elif key == LENGTH:
            wrong.append(
                f"{change}: optim.schedule={optim.schedule}, optim.warmup_epochs={optim.warmup_epochs:g} and "
                f"max_steps={written.max_steps} are laid out over the whole run"
            )
        elif _may_change(key):
            said.append(change)
        else:
            wrong.append(f"{change}: that would be another run; start one with mtl train (init_from takes these weights)")
    if wrong:
        raise ConfigError(wrong, source=f"{str(directory)!r} was begun with another config")
    return said


def is_of(run_dir: Path, config: RunConfig) -> bool:
    """Whether there is a run of this config, in which `auto` may have become something, on whichever device."""
    if (written := _written(run_dir)) is None:
        return False
    changes = differing(config.model_dump(mode="json"), written.model_dump(mode="json"))
    return all(_may_change(key) or was == "auto" or _filled_in(key) for key, (was, _) in changes.items())


def is_run(run_dir: Path) -> bool:
    """Whether there is a run, of a config that can be read."""
    return _written(run_dir) is not None


def _written(run_dir: Path) -> RunConfig | None:
    try:
        return from_tree(read_tree(run_dir / "config.yaml"))
    except ConfigError:
        return None


def _filled_in(key: str) -> bool:
    """Whether a run writes something of its own there: what it found, or that there was nothing to batch or to compile."""
    of_weights = key.startswith("init_from.") and key.endswith((".path", ".digest"))
    return of_weights or key in ("data.input_shape", "execution", "compile")


def _may_change(key: str) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in ANY)


def _ended(config: RunConfig, stands: dict[str, Any]) -> str:
    """How to go on with a run in which nothing is left to train; empty: something is."""
    if stands["epoch"] >= config.epochs or stands["steps"] >= (config.max_steps or math.inf):
        return "with a constant learning rate, epochs=N makes it longer"
    best = stands["best"]
    if out_of_patience(config.patience, stands["epoch"], best["epoch"] if best and best["figures"] else None):
        return f"its score has not risen for patience={config.patience} epochs, and patience=N waits for more"
    return ""


def _result(directory: Path) -> dict[str, Any] | None:
    try:
        said = read_strict(directory / "result.json", LARGEST_STATE)
    except RunError:  # none yet, or cut off
        return None
    known = {field.name: field.default is MISSING for field in fields(RunResult)}
    whole = isinstance(said, dict) and said.keys() <= known.keys() and all(name in said for name, must in known.items() if must)
    return said if whole else None


@contextmanager
def as_many_threads(count: int, progress: Progress) -> Iterator[None]:
    """As many threads as the run began with: sums over other numbers of them differ in the last bits."""
    before = torch.get_num_threads()
    if count != before and count > usable_cores():
        progress.line(
            f"the run began with {count} threads, and here are {usable_cores()} cores: results will differ by rounding"
        )
        count = before
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
