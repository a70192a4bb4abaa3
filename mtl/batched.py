"""T towers of one architecture as one network with stacked parameters: one call of each operation for all of them.

On a GPU this turns T times many small launches into one of each; on a CPU a loop is faster (figures in `benchmarks/README.md`).
Parameters stay those of the towers, see `mtl.stacking`; what `torch.vmap` does badly is done by hand, see `mtl.wide`.

What draws random numbers (dropout, stochastic depth) draws apart for every tower, from the same distribution as one by one, but
other numbers. The gradient of a tower that a loss does not depend on is zero, where one by one there is none.

Not every network can be run so: `reason_against` tells.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtl.execution import Execution, OneByOne, Segment
from mtl.seeding import seeded
from mtl.stacking import stack
from mtl.wide import Wide

PROBABILITIES = ("p", "dropout", "attention_dropout")
"""Where modules of torch and torchvision keep the probability of what they do at random."""
STEADY_EPS, TOLERANCE = 1e-2, 1e-7
"""Of the comparison in `reason_against`: see `calm` and `_differ`."""


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


# --- what speaks against it ---------------------------------------------------------------------------------------------------


def reason_against(towers: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> str | None:
    """Why `Batched` cannot run these towers, in plain words; None where it can.

    Copies of the first and the last tower are tried, in training and in evaluation mode: that it runs at all, in the dtype and
    under the autocast of the caller; and that it gives the outputs, gradients and buffers of one by one, in float64, with
    dropout and stochastic depth off. Units take no part. Takes about ten passes, and the memory of six towers in float64;
    leaves parameters, gradients, buffers, modes and random state as they are.

    Args:
        towers: T networks.
        segments: what they run.
        inputs: T tensors (B, ...), the very same one where towers share it, as `Execution.run` has them; B of at least 2, for
            batch norm, and small, for time.
    """
    if len(towers) < 2:
        return "there is a single tower"
    if _inputs_differ(inputs):
        return f"towers differ in their inputs: {', '.join(sorted({str(tuple(x.shape)) for x in inputs}))}"
    if (reason := _unlike(towers)) is not None:
        return reason
    plain = [replace(segment, unit=None) for segment in segments]
    ends = [inputs[0], inputs[-1]]
    with seeded(0, "trial of towers as one"), torch.inference_mode(False), torch.enable_grad():
        try:
            pair = [copy.deepcopy(tower) for tower in (towers[0], towers[-1])]
        except Exception as error:  # a network may hold anything
            return f"it cannot be copied for a trial: {_said(error)}"
        for tower in pair:
            tower.requires_grad_(True)
        return _trial(pair, plain, ends) or _comparison([tower.double() for tower in pair], plain, ends)


def _unlike(towers: Sequence[nn.Module]) -> str | None:
    first = towers[0]
    for name, module in (found for tower in towers for found in tower.named_modules()):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name or 'the network'} has hooks, which would be called for one tower instead of each"
    layers, tensors = dict(first.named_modules()), _tensors(first)
    for other in towers[1:]:
        if repr(other) != repr(first) or _tensors(other) != tensors:
            return "towers differ in architecture"
        modes = dict(other.named_modules())
        if wrong := [name for name, module in layers.items() if module.training != modes[name].training]:
            return f"towers differ in what is in training mode: {wrong[0]} of one tower is, of another it is not (frozen?)"
    return None


def _tensors(tower: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (name, t.shape, t.dtype, t.device)
        for name, t in (*tower.named_parameters(remove_duplicate=False), *tower.named_buffers(remove_duplicate=False))
    ]


def _trial(pair: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> str | None:
    """Does it run, with everything that is drawn at random, and give the dtypes of one by one?"""
    for training in (True, False):
        mode = "training" if training else "evaluation"
        for tower in pair:
            tower.train(training)
        expected = _step(OneByOne(), pair, segments, inputs, training)
        kept = [(module, dict(vars(module))) for tower in pair for module in tower.modules()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = _step(Batched(), pair, segments, inputs, training)
            except Exception as error:  # of torch, about an operation that cannot be, or of the network's own code
                return f"in {mode} mode: {_said(error)}"
        for warning in caught:
            if "performance drop" in str(warning.message):
                operations = re.findall(r"\baten::\w+", str(warning.message)) or ["an operation"]
                return f"in {mode} mode torch has no batched {operations[0]}, and would loop"
        for module, before in kept:
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value is not before.get(name):
                    return f"{type(module).__name__} keeps a tensor in its attribute {name!r} when it runs"
        for what, values in expected.items():
            for value, other in zip(values, found[what], strict=True):
                if value.dtype != other.dtype:
                    return f"in {mode} mode {what} are {other.dtype} instead of {value.dtype}"
    return None


def _comparison(pair: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> str | None:
    """Does it give what one by one gives, with nothing drawn at random?"""
    wide: dict[int, Tensor] = {id(x): x.double() for x in inputs}
    inputs = [wide[id(x)] for x in inputs]
    calm(pair)
    with torch.autocast(inputs[0].device.type, enabled=False):
        for training in (True, False):
            mode = "training" if training else "evaluation"
            for tower in pair:
                tower.train(training)
            start = [[b.clone() for b in tower.buffers()] for tower in pair]
            results = []
            for execution, differentiate in ((OneByOne(), True), (OneByOne(), False), (Batched(), True)):
                results.append(_step(execution, pair, segments, inputs, differentiate))
                for tower, values in zip(pair, start, strict=True):
                    for buffer, value in zip(tower.buffers(), values, strict=True):
                        buffer.copy_(value)
            expected, again, found = results
            if _differ(again["outputs"], expected["outputs"]):
                return f"in {mode} mode it draws random numbers that no probability of a module switches off"
            for what in expected:
                if _differ(found[what], expected[what]):
                    return f"in {mode} mode {what} differ from those of one by one"
    return None


def _step(
    execution: Execution,
    towers: Sequence[nn.Module],
    segments: Sequence[Segment],
    inputs: Sequence[Tensor],
    differentiate: bool = True,
) -> dict[str, list[Tensor]]:
    """What a forward and, where wanted, a backward pass leave: outputs, gradients of parameters, and copies of buffers."""
    with torch.set_grad_enabled(differentiate):
        outputs = execution.run(towers, segments, inputs)
        gradients: Sequence[Tensor] = ()
        if differentiate:
            objective = torch.stack([y.square().mean() for y in outputs]).sum()
            parameters = [p for tower in towers for p in tower.parameters()]
            if objective.requires_grad:
                gradients = torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True)
    buffers = [b.clone() for tower in towers for b in tower.buffers()]
    return {"outputs": [y.detach() for y in outputs], "gradients": list(gradients), "buffers": buffers}


def calm(towers: Sequence[nn.Module]) -> None:
    """Make towers comparable, in place: nothing is drawn at random, and batch norm does not magnify rounding errors.

    Probabilities of dropout and stochastic depth become 0. Over a few numbers, features of 1 x 1 in a small batch, a variance
    may come close to 0, and gradients grow by 1 / sqrt(eps) at every layer: eps becomes `STEADY_EPS` at least.
    """
    for module in (module for tower in towers for module in tower.modules()):
        for name in PROBABILITIES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, _BatchNorm):
            module.eps = max(module.eps, STEADY_EPS)


def _differ(a: list[Tensor], b: list[Tensor]) -> bool:
    """By more than rounding, over the largest number of any."""
    largest = max((float(x.abs().max()) for x in b if x.numel()), default=0.0)
    return any(
        not torch.allclose(x.double(), y.double(), rtol=0.0, atol=TOLERANCE * largest) for x, y in zip(a, b, strict=True)
    )


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
