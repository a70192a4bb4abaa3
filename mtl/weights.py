"""Weights in a file: safetensors, with a description of what they are weights of."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl.errors import RunError

FORMAT = "2"
"""1, before any release: a description without the shape of the input."""
BALANCER = "balancer."
"""How the names of a balancer's tensors begin, beside the model's."""
LARGEST_HEADER = 1 << 25
"""Bytes of names, shapes and places that a file may begin with; a tensor takes a hundred or two."""
LARGEST = 1 << 26
"""Numbers in a sample that a description is believed about."""


def weights_of(model: nn.Module, balancer: nn.Module | None = None) -> dict[str, Tensor]:
    """The state of `model` and of `balancer` by name, on the CPU as a file holds it; some of it may be theirs, not a copy."""
    state = {**model.state_dict(), **_balancer_state(balancer)}
    return _apart({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()})


def write_weights(path: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write what `weights_of` gave, and a JSON description (tasks, class names), to a new file.

    Raises:
        RunError: the file cannot be written (a full disk, say).
    """
    from safetensors.torch import save_file

    try:
        save_file(dict(weights), path, metadata={"format": FORMAT, "description": json.dumps(description)})
    except Exception as error:  # safetensors has an error type of its own for a failed write
        raise RunError(f"cannot write weights {str(path)!r}: {error}") from error


def load_weights(path: Path, model: nn.Module, balancer: nn.Module | None = None) -> dict[str, Any]:
    """Read `path` into `model`, and into `balancer` where one is given, and return its description.

    Raises:
        RunError: no such file, damaged, another format, or weights of another model or balancer; nothing is loaded then.
    """
    state, description = read_weights(path)
    saved = {name.removeprefix(BALANCER): value for name, value in state.items() if name.startswith(BALANCER)}
    state = without_balancer(state)
    _check_fit(path, "model", model, state)
    if balancer is not None:
        _check_fit(path, "balancer", balancer, saved)
        load_state(balancer, saved)
    load_state(model, state)
    return description


def without_balancer(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of `weights_of` is the model's."""
    return {name: value for name, value in weights.items() if not name.startswith(BALANCER)}


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that stand for one tensor (tied weights) get a copy each, which is what safetensors can hold."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        result[name] = tensor.clone() if tensor.numel() and tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result


def _balancer_state(balancer: nn.Module | None) -> dict[str, Tensor]:
    return {} if balancer is None else {f"{BALANCER}{name}": tensor for name, tensor in balancer.state_dict().items()}


def _check_fit(path: Path, what: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misfits = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    if missing or extra or misfits:
        first = (missing + extra + misfits)[0]
        raise RunError(
            f"weights {str(path)!r} are of another {what}: {len(missing)} missing, {len(extra)} unknown, "
            f"{len(misfits)} of another shape; first: {first}"
        )


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights by name. Unlike torch's own loading it also takes a plain mapping, which lacks the versions that modules
    note in their state dicts: they are those of `module`, as names and shapes are.
    """
    versioned = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Name -> tensor on the CPU, and the description, of a file that `write_weights` wrote.

    Raises:
        RunError: no such file, damaged, or another format.
    """
    with _opened(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return state, _description(path, file.metadata())


def is_of_run(path: Path) -> bool:
    """Whether a safetensors file is one that `write_weights` wrote.

    Raises:
        RunError: it is no readable safetensors file.
    """
    with _opened(path) as file:
        return "description" in (file.metadata() or {})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor on the CPU, of any safetensors file.

    Raises:
        RunError: no such file, or damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def check_tensors(path: Path) -> None:
    """Look whether a file is one of safetensors; nothing but its header is read.

    Raises:
        RunError: it is none.
    """
    with _opened(path):
        pass


def read_description(path: Path) -> dict[str, Any]:
    """The description alone.

    Raises:
        RunError: as `read_weights`, or not what is said of every run's weights.
    """
    with _opened(path) as file:
        return checked_description(path, _description(path, file.metadata()))


def checked_description(path: Path, said: dict[str, Any]) -> dict[str, Any]:
    """What was `said` of the weights of a run.

    Raises:
        RunError: not what is said of every run's.
    """
    try:
        words = [task[key] for task in said["tasks"] for key in ("name", "dataset", "target", "head")]
        shape, dtype = said["input"]["shape"], getattr(torch, said["input"]["dtype"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"weights {str(path)!r} are not described as a run's are: {type(error).__name__}: {error}") from error
    wrong = [repr(word) for word in words if not isinstance(word, str)]
    if not isinstance(dtype, torch.dtype):
        wrong.append(f"dtype {said['input']['dtype']!r}")
    counts = isinstance(shape, list) and 0 < len(shape) < 5 and all(type(n) is int and n > 0 for n in shape)
    if not counts or math.prod(shape) > LARGEST:
        wrong.append(f"a sample of shape {shape}")
    if wrong:
        raise RunError(f"weights {str(path)!r} are not described as a run's are: {wrong[0][:80]}")
    return said


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    if not path.is_file():
        raise RunError(f"no weights at {str(path)!r}; the run has not finished its first epoch")
    try:
        header = _header(path)
        with safe_open(path, framework="pt") as file:
            json.loads(header, object_pairs_hook=_once)
            yield file
    except RunError:
        raise
    except Exception as error:  # safetensors has an error type of its own
        raise RunError(f"weights {str(path)!r} are damaged: {error}") from error


def _header(path: Path) -> bytes:
    """The text at the beginning that says which tensors there are."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"no safetensors file: a header of {size:,} bytes, where {LARGEST_HEADER:,} are read")
        return file.read(size)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that is there twice safetensors itself takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _description(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        raise RunError(
            f"weights {str(path)!r} have format {metadata.get('format')!r}; this version reads {FORMAT!r}; train the run anew, "
            "or use the version that wrote it"
        )
    return dict(json.loads(metadata["description"]))
