"""T tensors of one shape as one: what lets T networks run as one while their parameters stay separate.

The tensors are moved, once, into slices of one storage. From then on stacking them is a view, at no cost, and what is written
into the stack (running statistics) is written into them. Nothing is remembered: whether T tensors are slices of one storage is
read off their addresses each time, so that they may be moved, replaced or copied by anybody, and are moved back when needed.

A slice keeps the strides that its tensor had, channels-last ones included, and overlaps no other. What sees storages instead
of tensors notices: `torch.save` or `pickle` of one tensor writes the storage of all T. `apart` undoes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def stack(tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """T tensors of one shape, dtype and device -> (T, *shape), and whether that is their own memory.

    It is, and costs nothing, where they are leaves: they are moved into one storage first if they are not there yet. It is a
    copy where they are not (inside `functional_call`, say), or are some of a larger stack and not next to one another. Either
    way the gradient arrives at those tensors that require one, and at no other. A stack is as dense as its tensors: merging T
    with the next dimension is a view too.
    """
    view = _as_one(tensors)
    if view is None and _may_move(tensors):
        _move_together(tensors)
        view = _as_one(tensors)
    if view is None:
        return torch.stack(list(tensors)), False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Stack.apply((view,), *tensors), True
    return view, True


def apart(module: nn.Module) -> None:
    """Give every parameter and buffer of `module` memory of its own again, in place."""
    with torch.inference_mode(False), torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
                tensor.data = tensor.detach().clone(memory_format=torch.preserve_format)


def _as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view (T, *shape) of tensors that lie one after the other in one storage; None of others."""
    first, strides = tensors[0], tensors[0].stride()
    size = first.numel() * first.element_size()
    start = first.data_ptr()
    if not size or any(t.data_ptr() != start + i * size or t.stride() != strides for i, t in enumerate(tensors)):
        return None
    storage = first.untyped_storage()
    if start + len(tensors) * size > storage.data_ptr() + storage.nbytes():
        return None  # storages of their own that happen to lie side by side
    return first.detach().as_strided((len(tensors), *first.shape), (first.numel(), *strides))


def _may_move(tensors: Sequence[Tensor]) -> bool:
    """Plain leaves; but where all are in one storage, others are there with them, and they stay: the larger company wins."""
    if not all(t.is_leaf and type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided for t in tensors):
        return False
    return tensors[0].numel() > 0 and len({t.untyped_storage().data_ptr() for t in tensors}) > 1


def _move_together(tensors: Sequence[Tensor]) -> None:
    first = tensors[0]
    with torch.inference_mode(False), torch.no_grad():
        strides = torch.empty_like(first, device="meta").stride()  # its own where it is dense
        shape = (len(tensors), *first.shape)
        together = torch.empty_strided(shape, (first.numel(), *strides), dtype=first.dtype, device=first.device)
        for tensor, place in zip(tensors, together.unbind(0), strict=True):
            place.copy_(tensor)
            tensor.data = place


class _Stack(torch.autograd.Function):
    """The stack of T tensors whose memory it already is: no copy forward, and views of its gradient backward."""

    @staticmethod
    def forward(ctx: Any, view: tuple[Tensor], *tensors: Tensor) -> Tensor:
        return view[0]  # in a tuple, where autograd does not take it for an input

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed: Iterable[bool] = ctx.needs_input_grad[1:]
        return (None, *(g if wanted else None for g, wanted in zip(gradients[0].unbind(0), needed, strict=True)))
