"""A run's checkpoints on disk: which there are, which are whole, and where the weights in them are.

checkpoints/last.json                          which one is the newest: one that is lost is missed by it
checkpoints/checkpoint-000012/model.safetensors      the weights, and what they are weights of
/best.safetensors       those that were best on validation data so far
/training.safetensors   optimizer, random generators, sums of the epoch
/state.json             where training stands
/manifest.json          sizes and SHA-256 of all these
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mtl.commit import POINTER, examined, faults, lost, manifest_of
from mtl.errors import ConfigError, LaterVersionError, NoCheckpointError, RunError, unknown
from mtl.strict_json import read_strict

FOLDER = "checkpoints"
MODEL, BEST, TRAINING, STATE = "model.safetensors", "best.safetensors", "training.safetensors", "state.json"
STATE_FORMAT = 1
"""Of `state.json` and the names in `training.safetensors`."""
LARGEST_STATE = 8 << 20
"""Bytes that a state may have."""
WEIGHTS = {"best": BEST, "last": MODEL}
"""What a user calls weights -> the file that they are in."""

T = TypeVar("T")


def folder_of(run_dir: Path) -> Path:
    """Where a run's checkpoints are."""
    return run_dir / FOLDER


def newest(run_dir: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with those that are newer, or should be there.

    Args:
        run_dir: of the run.

    Raises:
        LaterVersionError: a newer one is of a later version.
        NoCheckpointError: none is; with what is wrong with each.
    """
    wrong, missing = list[str](), _lost(run_dir)
    for folder, found in examined(folder_of(run_dir), lambda folder: list(faults(folder))):
        if not found:
            return folder, wrong + missing
        wrong += [f"{folder.name}: {fault}" for fault in found]
    if wrong:
        raise NoCheckpointError(f"every checkpoint of {str(run_dir)!r} is damaged: {'; '.join(wrong + missing)}")
    raise NoCheckpointError(": ".join([f"{str(run_dir)!r} holds no checkpoint", *missing]))


def _lost(run_dir: Path) -> list[str]:
    return [] if (missing := lost(folder_of(run_dir))) is None else [missing]


def weights_file(run_dir: Path, weights: str = "best") -> Path:
    """The file with a run's weights, "best" or "last", checked against its manifest. Damage of a newer one is warned of.

    Raises:
        ConfigError: other weights than these two.
        RunError: no run directory, no weights yet, or none that are whole.
    """
    if weights not in WEIGHTS:
        raise ConfigError([unknown("weights", weights, WEIGHTS)])
    if not (run_dir / "config.yaml").is_file():
        raise RunError(f"{str(run_dir)!r} is not a run directory: it has no config.yaml")
    file, wrong = WEIGHTS[weights], _lost(run_dir)

    def look(folder: Path) -> list[str] | None:
        """Its faults; None: it is from before there were such weights."""
        found = list(faults(folder, [STATE]))
        if not found and (file not in manifest_of(folder) or not state_of(folder)["steps"]):
            return None
        return found or list(faults(folder, [file]))

    for folder, found in examined(folder_of(run_dir), look):
        if found is None:
            break
        if not found:
            if wrong:
                warnings.warn(f"{str(run_dir)!r}: {'; '.join(wrong)}; {folder.name} is used", stacklevel=2)
            return folder / file
        wrong += [f"{folder.name}: {fault}" for fault in found]
    why = f"all are damaged: {'; '.join(wrong)}" if wrong else "the run has not finished its first epoch"
    raise RunError(f"no {weights} weights in {str(run_dir)!r}: {why}")


def read_weights_file(run_dir: Path, weights: str, read: Callable[[Path], T]) -> T:
    """What `read` makes of `weights_file`; of the next one, if a run that is under way removes the file before it is read.

    Raises:
        MTLError: as `weights_file` and `read` say.
    """
    while True:
        file = weights_file(run_dir, weights)
        try:
            return read(file)
        except (RunError, OSError):
            if file.exists():
                raise


def state_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of where training stands.

    Raises:
        LaterVersionError: it is of a later version.
        RunError: nothing that can be read, or not what every state says.
    """
    said = read_strict(folder / STATE, LARGEST_STATE)
    if not isinstance(said, dict) or not _is_count(said.get("format")) or said["format"] < 1:
        raise RunError(f"{str(folder / STATE)!r} is no state that this program wrote")
    if said["format"] > STATE_FORMAT:
        raise LaterVersionError(
            f"the state in {str(folder)!r} has format {said['format']}, and this version reads up to {STATE_FORMAT}; use the "
            "version that wrote it"
        )
    if not _is_state(said):
        raise RunError(f"{str(folder / STATE)!r} is no state that this program wrote")
    return said


def _is_state(said: dict[str, Any]) -> bool:
    """Whether that is well formed which is read of a state before a run is made that the rest must fit."""
    best, partial = said.get("best", ""), said.get("partial", "")
    return (
        all(_is_count(said.get(key)) for key in ("epoch", "steps", "threads"))
        and said["threads"] > 0
        and (best is None or (isinstance(best, dict) and _is_count(best.get("epoch"))))
        and (partial is None or isinstance(partial, dict))
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def verify(run_dir: Path) -> list[dict[str, Any]]:
    """Every checkpoint of a run, the newest first: its `name`, what it is `about`, and its `faults`.

    A manifest may be right about files that are none of this program's: these are opened too.

    Raises:
        RunError: there is none.
    """
    missing = _lost(run_dir)
    result = [found for _, found in examined(folder_of(run_dir), _verified)]
    if not result:
        said = ": ".join([f"{str(run_dir)!r} holds no checkpoint", *missing])
        raise RunError(f"{said}; give a run directory")
    return result + [{"name": POINTER, "about": "", "faults": missing}] * bool(missing)


def _verified(folder: Path) -> dict[str, Any]:
    """One of what `verify` gives."""
    about = ""
    try:
        if not (wrong := list(faults(folder))):
            about = _about(folder)
    except RunError as error:  # of a later version, or not of this program
        wrong = [str(error)]
    return {"name": folder.name, "about": about, "faults": wrong}


def _about(folder: Path) -> str:
    """What a checkpoint that is as it was written holds.

    Raises:
        RunError: a file that is none of this program's.
    """
    from mtl.weights import check_tensors  # torch, which nothing else here needs

    for name in manifest_of(folder):
        if name.endswith(".safetensors"):
            check_tensors(folder / name)
    state = state_of(folder)
    best = "" if state["best"] is None else f", best epoch {state['best']['epoch']}"
    return f"whole, {state['epoch']} epochs and {state['steps']} steps{best}"
