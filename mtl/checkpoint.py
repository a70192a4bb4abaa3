"""Weights on disk: one safetensors file, written so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mtl.errors import RunError

FORMAT = "1"


def save_weights(path: Path, model: nn.Module, description: Mapping[str, Any]) -> None:
    """Write the state of `model` and a JSON description (tasks, class names) to `path`, replacing it whole.

    Raises:
        RunError: the file cannot be written (a full disk, say).
    """
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    try:
        save_file(state, temporary, metadata={"format": FORMAT, "description": json.dumps(description)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # safetensors has an error type of its own for a failed write
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write weights {str(path)!r}: {error}") from error


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Read `path` into `model` and return its description.

    Raises:
        RunError: no such file, damaged, another format, or weights of another model; nothing is loaded then.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise RunError(f"no weights at {str(path)!r}; the run has not finished its first epoch")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:
        raise RunError(f"weights {str(path)!r} are damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise RunError(f"weights {str(path)!r} have format {metadata.get('format')!r}; this version reads {FORMAT!r}")
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misfits = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or extra or misfits:
        first = (missing + extra + misfits)[0]
        raise RunError(
            f"weights {str(path)!r} are of another model: {len(missing)} missing, {len(extra)} unknown, "
            f"{len(misfits)} of another shape; first: {first}"
        )
    model.load_state_dict(state)
    return dict(json.loads(metadata["description"]))
