"""The run directory: made fresh, never overwritten, with the resolved config and the environment in it from the start.

Whether one can be written is tried out before data are loaded, and it is made when all else has been found to be right.
"""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mtl.checkpoints import FOLDER, LARGEST_STATE
from mtl.config import RunConfig
from mtl.errors import RunError
from mtl.hardware import device_name
from mtl.locking import Lock, is_own, refuse_held, refuse_unwritable
from mtl.strict_json import read_strict
from mtl.writing import temporary_prefix, write_whole

DISTRIBUTION = "crosstitch"
RUNS = Path("runs")
"""Where run directories go of which nobody said where."""
RECORDED = (DISTRIBUTION, "torch", "torchvision", "torchmetrics", "pydantic", "numpy")


def refuse_unusable(run_dir: str | Path | None) -> None:
    """Complain, before anything is loaded, of a run directory in which a run could not be written. Nothing is left behind.

    Raises:
        RunError: it is in use, not empty, a file, or cannot be written.
    """
    if run_dir is not None:
        refuse_held(Path(run_dir))
        refuse_to_overwrite(Path(run_dir))
    refuse_unwritable(RUNS if run_dir is None else Path(run_dir))


def refuse_to_overwrite(directory: Path) -> None:
    """A run directory is new or empty; what is written in one is never overwritten.

    Raises:
        RunError: it holds something, or is a file.
    """
    if directory.is_dir() and (others := _held_in(directory)):
        hint = f"; mtl train --resume {directory} goes on with it" if "config.yaml" in others else ""
        raise RunError(
            f"run directory {str(directory)!r} is not empty; nothing was overwritten; give another, or remove it{hint}"
        )
    if directory.exists() and not directory.is_dir():
        raise RunError(f"run directory {str(directory)!r} is a file; give a folder")


def _held_in(directory: Path) -> list[str]:
    """What a directory holds, but for the lock's files. Nothing, where a run was cut while its directory was made: its config
    comes last.
    """
    others = sorted(one.name for one in directory.iterdir() if not is_own(one.name))
    beginnings = tuple(temporary_prefix(directory / name) for name in ("env.json", "config.yaml"))
    unfinished = (name in ("env.json", FOLDER) or name.startswith(beginnings) for name in others)
    checkpoints = directory / FOLDER
    return [] if all(unfinished) and not (checkpoints.is_dir() and any(checkpoints.iterdir())) else others


def refuse_links(directory: Path) -> None:
    """A run writes into its own directory: of one that somebody gave, no name may lead out of it.

    Raises:
        RunError: one is a link.
    """
    if links := sorted(one.name for one in directory.iterdir() if one.is_symlink()):
        raise RunError(
            f"{str(directory / links[0])!r} is a link, through which a run writes nothing; put the thing itself there"
        )


def make_directory(run_dir: str | Path | None, config: RunConfig) -> tuple[Path, Lock]:
    """A fresh run directory, held by this process; None: one under `runs/`, named by time, sharing, backbone and seed.

    Raises:
        RunError: it is not empty, in use, or cannot be written.
    """
    directory = Path(run_dir) if run_dir is not None else _unused(config)
    refuse_held(directory)
    refuse_to_overwrite(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from None
    lock = Lock(directory)
    try:
        refuse_to_overwrite(directory)
        (directory / FOLDER).mkdir(exist_ok=True)
        write_whole(directory / "env.json", json.dumps(environment(config), indent=2) + "\n")
        write_whole(directory / "config.yaml", config.to_yaml())
    except OSError as error:
        lock.close()
        raise _unwritable(directory, error) from None
    except BaseException:
        lock.close()
        raise
    return directory, lock


def note_resumed(directory: Path, config: RunConfig) -> None:
    """Write the config that a run goes on with, and where it does.

    Raises:
        RunError: it cannot be written.
    """
    try:
        about = read_strict(directory / "env.json", LARGEST_STATE)
        about["resumed"] = [*about.get("resumed", []), environment(config)]
        write_whole(directory / "env.json", json.dumps(about, indent=2) + "\n")
        write_whole(directory / "config.yaml", config.to_yaml())
    except OSError as error:
        raise _unwritable(directory, error) from None
    except (AttributeError, TypeError) as error:
        raise RunError(f"{str(directory / 'env.json')!r} is damaged: {error}; give the run its own again") from None


def _unwritable(directory: Path, error: OSError) -> RunError:
    return RunError(f"cannot write run directory {str(directory)!r}: {error.strerror or error}")


def _unused(config: RunConfig) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = RUNS / f"{stamp}-{config.sharing.kind}-{config.backbone.name}-seed{config.seed}"
    directory, i = base, 1
    while directory.exists():
        i += 1
        directory = base.with_name(f"{base.name}-{i}")
    return directory


_at_once = 1


def share_machine(at_once: int) -> None:
    """Runs of this process note that it is one of so many that train at a time: their times are not those of a run alone."""
    global _at_once
    _at_once = at_once


def environment(config: RunConfig) -> dict[str, Any]:
    """What a figure needs beside it: versions, hardware, threads, runs at a time, config digest, when."""
    device = torch.device(config.device)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config_digest": config.digest(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in RECORDED}},
        "platform": platform.platform(),
        "device": config.device,
        "device_name": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "tf32": torch.backends.cudnn.allow_tf32 if device.type == "cuda" else None,  # of fp32 convolutions
        "threads": torch.get_num_threads(),
        "at_once": _at_once,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
