"""Can these towers run as one network? Found out before training, by trying it, and answered with a reason where they cannot.

Nothing is known by name here: a network is refused for what it does. What a trial cannot see is code that behaves otherwise
on other inputs, or later in training.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtl.batched import Batched
from mtl.errors import said
from mtl.execution import Execution, OneByOne, Segment
from mtl.seeding import seeded

PROBABILITIES = ("p", "dropout", "attention_dropout")
"""Where modules of torch and torchvision keep the probability of what they do at random."""
STEADY_EPS = 1e-2
"""Of batch norm while towers are compared; see `calm`."""
TOLERANCE = 1e-7
"""How far outputs, gradients and buffers may differ in float64, over the largest of their kind."""
AT_ONCE = 50_000_000
"""Gradients are computed for so many numbers at a time."""


def reason_against(towers: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> str | None:
    """Why `Batched` cannot run these towers, in plain words; None where it can.

    Copies of the first and the last tower are tried, in training and in evaluation mode: that it runs at all, in the dtype and
    under the autocast of the caller; and that it gives the outputs, gradients and buffers of one by one, in float64, with
    dropout and stochastic depth off. Of the others, modules, plain settings and the shapes of tensors are compared. Exchange
    units take no part. It takes about a dozen passes, and the memory of two towers in float64 and their activations;
    parameters, gradients, buffers, modes and random state stay as they are.

    Args:
        towers: T networks, on the device and in the memory format of training, frozen as in training.
        segments: what they run.
        inputs: T tensors (B, ...), the very same one where towers share it, as `Execution.run` has them; B of at least 2, for
            batch norm, and small, for time.
    """
    if len(towers) < 2:
        return "there is a single tower"
    if len(shapes := {str(tuple(x.shape)) for x in inputs}) > 1:
        return f"towers differ in their inputs: {', '.join(sorted(shapes))}"
    if (reason := _unlike(towers)) is not None:
        return reason
    plain = [replace(segment, unit=None) for segment in segments]
    with seeded(0, "trial of towers as one"), torch.inference_mode(False), torch.enable_grad():
        try:
            pair = [copy.deepcopy(tower) for tower in (towers[0], towers[-1])]
        except Exception as error:  # a network may hold anything
            return f"it cannot be copied for a trial: {said(error)}"
        for tower in pair:
            tower.requires_grad_(True)
        fresh = {id(x): x.detach().clone() for x in inputs}
        ends = [fresh[id(x)] for x in (inputs[0], inputs[-1])]
        try:
            return _trial(pair, plain, ends) or _comparison(pair, plain, ends)
        except Exception as error:  # too little memory, or a device without float64: training itself may need neither
            return f"it cannot be tried: {said(error)}"


def _unlike(towers: Sequence[nn.Module]) -> str | None:
    first = towers[0]
    for name, module in (found for tower in towers for found in tower.named_modules()):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name or 'the network'} has hooks, which would be called for one tower instead of each"
    layers, tensors = dict(first.named_modules()), _tensors(first)
    for other in towers[1:]:
        if repr(other) != repr(first) or _tensors(other) != tensors:
            return "towers differ in architecture"
        others = dict(other.named_modules())
        if wrong := [name for name, module in layers.items() if module.training != others[name].training]:
            return f"towers differ in what is in training mode: {wrong[0]} of one tower is, of another it is not (frozen?)"
        for name, module in layers.items():
            if wrong := [key for key, value in _settings(module).items() if _settings(others[name]).get(key) != value]:
                return f"towers differ in the attribute {wrong[0]!r} of {name or 'the network'}"
    for tower in towers:
        owner: dict[int, str] = {}
        for name, tensor in (*tower.named_parameters(), *tower.named_buffers()):
            if tensor.numel() and owner.setdefault(tensor.untyped_storage().data_ptr(), name) != name:
                return f"{name} and {owner[tensor.untyped_storage().data_ptr()]} are in the same memory"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain values that a module keeps beside its tensors and modules."""
    plain = bool | int | float | str | None
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(one, plain) for one in value))
    }


def _tensors(tower: nn.Module) -> list[tuple[Any, ...]]:
    named = (*tower.named_parameters(remove_duplicate=False), *tower.named_buffers(remove_duplicate=False))
    return [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in named]


def _trial(pair: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> str | None:
    """Does it run, with everything that is drawn at random, and give the dtypes of one by one?"""
    for training in (True, False):
        mode = "training" if training else "evaluation"
        for tower in pair:
            tower.train(training)
        expected = _dtypes(OneByOne(), pair, segments, inputs, training)
        own = [(module, dict(vars(module))) for tower in pair for module in tower.modules()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = _dtypes(Batched(), pair, segments, inputs, training)
            except Exception as error:  # torch's, about an operation that cannot be, or one of the network's own code
                return f"in {mode} mode: {said(error)}"
        for message in (str(warning.message) for warning in caught):
            if "performance drop" in message:
                operation = re.search(r"\baten::\w+", message)
                return f"in {mode} mode torch would loop: it has no batched {operation[0] if operation else 'operation'}"
        if (holder := next(_newly_kept(own), None)) is not None:
            return f"{holder} when it runs"
        if found != expected:
            return f"in {mode} mode outputs and buffers are {found} instead of {expected}"
    return None


def _dtypes(
    execution: Execution, towers: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor], backward: bool
) -> str:
    """Of outputs and buffers, after a forward and perhaps a backward pass."""
    with torch.set_grad_enabled(backward):
        outputs = execution.run(towers, segments, inputs)
    if backward and (objective := _objective(outputs)).requires_grad:
        for some in _portions(towers):
            torch.autograd.grad(objective, some, retain_graph=True, allow_unused=True)
    tensors = (*outputs, *(b for tower in towers for b in tower.buffers()))
    return ", ".join(sorted({str(tensor.dtype) for tensor in tensors})) + f" (outputs {outputs[0].dtype})"


def _newly_kept(own: Sequence[tuple[nn.Module, dict[str, Any]]]) -> Iterator[str]:
    for module, before in own:
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value is not before.get(name):
                yield f"{type(module).__name__} keeps a tensor in its attribute {name!r}"


def _comparison(pair: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> str | None:
    """Does it give what one by one gives, with nothing drawn at random?"""
    calm(pair)
    wide = {id(x): x.double() for x in inputs}
    inputs = [wide[id(x)] for x in inputs]
    for tower in pair:
        tower.double()
    with torch.autocast(inputs[0].device.type, enabled=False):
        for training in (True, False):
            mode = "training" if training else "evaluation"
            for tower in pair:
                tower.train(training)
            with torch.no_grad():
                once, again = (_restoring_buffers(OneByOne(), pair, segments, inputs)[0] for _ in range(2))
            if gap(again, once).relative > TOLERANCE:
                return f"in {mode} mode it draws random numbers that no probability of a module switches off"
            for what, found in gaps(pair, segments, inputs).items():
                if not found.relative <= TOLERANCE:
                    return f"in {mode} mode {what} differ from those of one by one"
    return None


class Gap(NamedTuple):
    """The largest absolute difference between corresponding numbers, and the largest absolute value of those expected."""

    difference: float = 0.0
    largest: float = 0.0

    @property
    def relative(self) -> float:
        """Their ratio; not a number where one is none."""
        return self.difference / self.largest if self.difference else 0.0


def gap(found: Sequence[Tensor], expected: Sequence[Tensor], so_far: Gap | None = None) -> Gap:
    """Of all of these tensors, and of those before."""
    so_far = so_far or Gap()
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, expected, strict=True) if b.numel()]
    differences = [so_far.difference, *(float((a - b).abs().max()) for a, b in pairs)]
    sizes = [so_far.largest, *(float(b.abs().max()) for _, b in pairs)]
    if any(math.isnan(value) for value in (*differences, *sizes)):  # which Python's maximum may miss
        return Gap(math.nan, math.nan)
    return Gap(max(differences), max(sizes))


def gaps(towers: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> dict[str, Gap]:
    """How far outputs, gradients and buffers of towers as one are from those of one by one, for the mean square of outputs.

    Buffers are left as they were.
    """
    outputs, buffers = _restoring_buffers(Batched(), towers, segments, inputs)
    expected, expected_buffers = _restoring_buffers(OneByOne(), towers, segments, inputs)
    gradients = Gap()
    objectives = [_objective(outputs), _objective(expected)]
    if all(objective.requires_grad for objective in objectives):
        for some in _portions(towers):
            a, b = (
                torch.autograd.grad(y, some, retain_graph=True, allow_unused=True, materialize_grads=True) for y in objectives
            )
            gradients = gap(a, b, gradients)
    return {"outputs": gap(outputs, expected), "gradients": gradients, "buffers": gap(buffers, expected_buffers)}


def _restoring_buffers(
    execution: Execution, towers: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and buffers as the pass left them, after which they are as before."""
    buffers = [b for tower in towers for b in tower.buffers()]
    before = [b.clone() for b in buffers]
    outputs = execution.run(towers, segments, inputs)
    after = [b.clone() for b in buffers]
    for buffer, value in zip(buffers, before, strict=True):
        buffer.data.copy_(value)  # behind the back of the graph, which may hold buffers that it need not
    return outputs, after


def _objective(outputs: Sequence[Tensor]) -> Tensor:
    return torch.stack([y.square().mean() for y in outputs]).sum()


def _portions(towers: Sequence[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Their parameters, corresponding ones together, some at a time: gradients of large networks need not fit all at once."""
    portion: list[nn.Parameter] = []
    for same in zip(*(tower.parameters() for tower in towers), strict=True):
        portion += [p for p in same if p.requires_grad]
        if sum(p.numel() for p in portion) > AT_ONCE:
            yield portion
            portion = []
    if portion:
        yield portion


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
