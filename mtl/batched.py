"""T towers of one architecture as one network with stacked parameters: one call of each operation for all of them.

It is made for GPUs, where T times many small launches become one of each; that has not been measured yet. On a CPU a loop is
faster (figures in `benchmarks/README.md`). Parameters stay those of the towers, see `mtl.stacking`; what `torch.vmap` does
badly is done by hand, see `mtl.wide`.

What draws random numbers (dropout, stochastic depth) draws apart for every tower, from the same distribution as one by one, but
other numbers. The gradient of a tower that a loss does not depend on is zero, where one by one there is none.

Not every network can be run so: `mtl.batchable` tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mtl.execution import Execution, OneByOne, Segment
from mtl.stacking import stack
from mtl.wide import Wide


class Batched(Execution):
    """T towers as one network.

    In a pass in which they cannot be, towers go one by one: a single one, inputs that differ in shape, or modules of which one
    tower's is in training mode and another's is not.
    """

    def run(self, towers: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Segment by segment, all towers at once; an input that they share is not copied."""
        used = [_modules(towers, segment) for segment in segments]
        if len(towers) < 2 or _inputs_differ(inputs) or any(_modes_differ(same) for modules in used for same in modules):
            return OneByOne().run(towers, segments, inputs)
        shared = all(_same(x, inputs[0]) for x in inputs)
        x, dim = (inputs[0], None) if shared else (torch.stack(list(inputs)), 0)
        stacks = _Stacks()
        for segment, modules in zip(segments, used, strict=True):
            x = segment.exchange_stacked(_run(towers, segment, stacks.of(modules), x, dim))
            dim = 0
        stacks.write_back()
        return list(x.unbind(0))


def _run(
    towers: Sequence[nn.Module], segment: Segment, stacks: list[tuple[dict[str, Any], str, Tensor]], x: Tensor, dim: int | None
) -> Tensor:
    """One segment: x (T, B, ...), or (B, ...) where `dim` is None -> (T, B, ...).

    The code and settings are those of the first tower, in whose modules stand, meanwhile, tensors that stand for all T.
    """

    def one(tensors: list[Tensor], marker: Tensor, x: Tensor) -> Tensor:
        with _in_place_of(stacks, tensors), Wide(marker):
            return segment(towers[0], x)

    marker = x.new_empty(len(towers))
    tensors = [tensor for _, _, tensor in stacks]
    result: Tensor = torch.vmap(one, in_dims=(0, 0, dim), randomness="different")(tensors, marker, x)
    return result


@contextmanager
def _in_place_of(stacks: list[tuple[dict[str, Any], str, Tensor]], tensors: list[Tensor]) -> Iterator[None]:
    own = [store[name] for store, name, _ in stacks]
    try:
        for (store, name, _), tensor in zip(stacks, tensors, strict=True):
            store[name] = tensor
        yield
    finally:
        for (store, name, _), tensor in zip(stacks, own, strict=True):
            store[name] = tensor


@dataclass
class _Stacks:
    """What was stacked in one pass; a tensor that is used twice is stacked once."""

    _found: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _copies: list[tuple[list[Tensor], Tensor]] = field(default_factory=list)

    def of(self, modules: list[tuple[nn.Module, ...]]) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Every parameter and buffer of these modules: where the first tower keeps it, its name there, and the stack."""
        found = []
        for same in modules:
            for kind in ("_parameters", "_buffers"):
                stores = [vars(module)[kind] for module in same]
                for name, first in stores[0].items():
                    if first is not None:
                        tensors = [store[name] for store in stores]
                        found.append((stores[0], name, self._stack(tensors, kind == "_buffers")))
        return found

    def _stack(self, tensors: list[Tensor], is_buffer: bool) -> Tensor:
        key = tuple(map(id, tensors))
        if key not in self._found:
            self._found[key], own = stack(tensors)
            if is_buffer and not own:
                self._copies.append((tensors, self._found[key]))
        return self._found[key]

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy buffers, which a pass may change, to where they came from, unless they were there all along."""
        for tensors, copies in self._copies:
            torch._foreach_copy_(tensors, list(copies.unbind(0)))


def _modules(towers: Sequence[nn.Module], segment: Segment) -> list[tuple[nn.Module, ...]]:
    """The modules that a segment uses, T corresponding ones each; the towers themselves first."""
    names = list(dict.fromkeys(name for stage in segment.stages for name in stage.modules))
    return list(zip(*([tower, *_below(tower, names)] for tower in towers), strict=True))


def _below(tower: nn.Module, names: list[str]) -> list[nn.Module]:
    found = []
    for name in names:
        path, _, last = name.rpartition(".")
        owner = tower.get_submodule(path)
        if last not in vars(owner)["_modules"]:  # it is a tensor of its own
            found.append(owner)
            continue
        left = [vars(owner)["_modules"][last]]
        while left:
            if (module := left.pop()) is not None:
                found.append(module)
                left += vars(module)["_modules"].values()
    return found


def _modes_differ(same: tuple[nn.Module, ...]) -> bool:
    return any(module.training != same[0].training for module in same)


def _same(a: Tensor, b: Tensor) -> bool:
    """One tensor, or two views of one tensor that show the same: gradients of either arrive there."""
    if a is b:
        return True
    alike = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return alike and a._base is not None and a._base is b._base


def _inputs_differ(inputs: Sequence[Tensor]) -> bool:
    first = inputs[0]
    return any(x is not first and (x.shape != first.shape or x.dtype != first.dtype) for x in inputs)
