"""What training keeps beside the weights, as tensors by name and as values that JSON holds: what an optimizer has gathered, and
where the random generators stand.

Tensors of an optimizer are named by their parameter: `towers.a.conv1.weight.exp_avg`. Restoring puts back every bit; so that a
run that goes on equals one that was never cut.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtl.errors import RunError


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Moments and counts by parameter name."""
    return {
        f"{name}.{key}": value
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave.

    What has a parameter's shape gets its memory layout: the fused optimizers read both as flat arrays, and a moment laid out
    otherwise than its weight would belong to other numbers, silently.

    Raises:
        RunError: tensors of parameters that are not there; nothing is put back then.
    """
    of_name = {name: parameter for parameter, name in names.items()}
    found: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in of_name:
            raise RunError(f"the checkpoint's optimizer knows {name!r}, which is no parameter that is trained")
        parameter = of_name[name]
        if value.shape == parameter.shape:
            placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        else:
            placed = value.to(parameter.device)
        found.setdefault(parameter, {})[key] = placed
    optimizer.state.clear()
    for parameter, kept in found.items():
        optimizer.state[parameter] = kept


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each group of parameters: the rate as the schedule has set it, and all else."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def load_group_values(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Put back what `group_values` gave.

    Raises:
        RunError: other groups.
    """
    own, theirs = ([group["name"] for group in some] for some in (optimizer.param_groups, groups))
    if own != theirs:
        raise RunError(f"the checkpoint's optimizer has groups {', '.join(theirs)}, and this run's {', '.join(own)}")
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: tuple(value) if isinstance(group[key], tuple) else value for key, value in values.items()})


def random_values() -> dict[str, Any]:
    """Where Python's and NumPy's global generators stand."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def random_tensors() -> dict[str, Tensor]:
    """Where torch's global generators stand: the CPU's, and every CUDA device's in use."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        found |= {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return found


def load_random(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put the generators back where they were. Of a device that is not there nothing is.

    Raises:
        RunError: no place where one can stand.
    """
    try:
        version, words, gauss = values["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, position, has_gauss, cached = values["numpy"]
        if not 0 <= position <= len(keys):  # NumPy would read beyond them
            raise ValueError(f"position {position} of {len(keys)}")
        np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
        torch.set_rng_state(tensors["cpu"])
        if torch.cuda.is_initialized():
            for i in range(torch.cuda.device_count()):
                if f"cuda:{i}" in tensors:
                    torch.cuda.set_rng_state(tensors[f"cuda:{i}"], i)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RunError(f"the checkpoint's random generators cannot stand there: {type(error).__name__}: {error}") from error
