"""The run directory: made fresh, never overwritten, with the resolved config and the environment in it from the start."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mtl.config import RunConfig
from mtl.errors import RunError
from mtl.hardware import device_name

DISTRIBUTION = "crosstitch"
RECORDED = (DISTRIBUTION, "torch", "torchvision", "torchmetrics", "pydantic", "numpy")


def refuse_to_overwrite(directory: Path) -> None:
    """A run directory is new or empty; what is written in one is never overwritten.

    Raises:
        RunError: it holds something, or is a file.
    """
    if directory.is_dir() and any(directory.iterdir()):
        raise RunError(f"run directory {str(directory)!r} is not empty; nothing was overwritten; give another, or remove it")
    if directory.exists() and not directory.is_dir():
        raise RunError(f"run directory {str(directory)!r} is a file; give a folder")


def make_directory(run_dir: str | Path | None, config: RunConfig) -> Path:
    """A fresh run directory; None: one under `runs/`, named by time, sharing, backbone and seed.

    Raises:
        RunError: it is not empty or cannot be written.
    """
    directory = Path(run_dir) if run_dir is not None else _unused(config)
    refuse_to_overwrite(directory)
    try:
        (directory / "checkpoints").mkdir(parents=True)
        (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (directory / "env.json").write_text(json.dumps(environment(config), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write run directory {str(directory)!r}: {error.strerror or error}") from None
    return directory


def _unused(config: RunConfig) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path("runs") / f"{stamp}-{config.sharing.kind}-{config.backbone.name}-seed{config.seed}"
    directory, i = base, 1
    while directory.exists():
        i += 1
        directory = base.with_name(f"{base.name}-{i}")
    return directory


def environment(config: RunConfig) -> dict[str, Any]:
    """What a figure needs beside it: versions, hardware, threads, config digest, when."""
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
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
