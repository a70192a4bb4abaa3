"""What a module gathers in plain attributes, which `state_dict` knows nothing of: averages, counts, an optimizer of its own.

For modules of libraries, such as TorchJD's methods. A value is kept if it is a tensor, a number, text, a dtype, a device, None,
an optimizer, or a list, tuple or dictionary of these; others (functions, say) are taken to be as the constructor made them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def memory_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of a part -> its attributes and its buffers that `state_dict` leaves out."""
    found: dict[str, dict[str, Any]] = {}
    for name, part in module.named_modules():
        kept = {key: value for key, value in vars(part).items() if key not in OWN and _is_kept(value)}
        kept |= {key: part._buffers[key] for key in part._non_persistent_buffers_set}
        if kept:
            found[name] = {
                key: _Optimizer(type(value).__name__, value.state_dict()) if isinstance(value, torch.optim.Optimizer) else value
                for key, value in kept.items()
            }
    return found


class _Optimizer(dict[str, Any]):
    """An optimizer as plain values."""

    def __init__(self, kind: str, state: dict[str, Any]) -> None:
        super().__init__(optimizer=kind, state=state)


def recall(module: nn.Module, memory: dict[str, dict[str, Any]], device: torch.device) -> None:
    """Put back what `memory_of` gave, on a device."""
    parts = dict(module.named_modules())
    for name, kept in memory.items():
        part = parts[name]
        for key, value in kept.items():
            if isinstance(value, dict) and value.keys() == {"optimizer", "state"}:
                kind = getattr(torch.optim, value["optimizer"])
                if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
                    raise ValueError(f"{value['optimizer']!r} is no optimizer")
                made = kind(list(part.parameters(recurse=False)))  # type: ignore[call-arg]
                made.load_state_dict(moved(value["state"], device))
                value = made
            elif key in part._non_persistent_buffers_set:
                part._buffers[key] = moved(value, device)
                continue
            setattr(part, key, moved(value, device))


def _is_kept(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_kept, value))
    if isinstance(value, dict):
        return all(map(_is_kept, value.values()))
    return value is None or isinstance(
        value, Tensor | bool | int | float | str | torch.dtype | torch.device | torch.optim.Optimizer
    )


def moved(value: Any, device: torch.device) -> Any:
    """The same, its tensors on a device."""
    return _with_tensors(value, lambda tensor: tensor.to(device))


def copied(value: Any) -> Any:
    """The same, its tensors copies."""
    return _with_tensors(value, lambda tensor: tensor.detach().clone())


def _with_tensors(value: Any, become: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return become(value)
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(one, become) for one in value)
    if isinstance(value, dict):
        return {key: _with_tensors(one, become) for key, one in value.items()}
    return value


def packed(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """`value` as strict JSON holds it; tensors in it go to `tensors` under names that begin with `name`.

    Raises:
        TypeError: something in it has no place there.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [packed(one, tensors, f"{name}.{i}") for i, one in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": [[key, packed(one, tensors, f"{name}.{key}")] for key, one in value.items()]}
    raise TypeError(f"{name}: a {type(value).__name__} cannot be saved")


def unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `packed` was given."""
    if not isinstance(value, dict):
        return value
    [(kind, inner)] = value.items()
    match kind:
        case "float":
            return float(inner)
        case "tensor":
            return tensors[inner]
        case "dtype":
            if not isinstance(dtype := getattr(torch, inner), torch.dtype):
                raise ValueError(f"{inner!r} is no dtype")
            return dtype
        case "device":
            return torch.device(inner)
        case "list":
            return [unpacked(one, tensors) for one in inner]
        case "tuple":
            return tuple(unpacked(one, tensors) for one in inner)
        case "dict":
            return {key: unpacked(one, tensors) for key, one in inner}
        case _:
            raise ValueError(f"{kind!r} stands for nothing that is saved")
