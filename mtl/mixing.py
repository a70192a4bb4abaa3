"""The product at the heart of a cross-stitch unit, and its derivative: y_t = sum_s alpha[t, s, c] x_s, for features (N, C).

Written twice. `_mixed` and `_unmixed` in plain operations run anywhere; the same in scalar form is compiled by torch.compile
into one pass over memory (`compiled=True`), which is where the time goes: the plain form reads and writes every feature about
T times, and T^2 times for the derivative with respect to alpha.

In bf16 an alpha near 1 would be rounded to multiples of 2^-8, and what it learns lost. The compiled form computes in float32
(float64 for float64 features); the plain one rounds only what is exchanged, (alpha - I) x, and adds it to x.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

TERMS = 32
"""Products that one compiled kernel holds: with more, compiling takes longer than it saves."""


def mix(features: Sequence[Tensor], alpha: Tensor, compiled: bool = False) -> list[Tensor]:
    """T features mixed channel by channel (Misra et al. 2016, equation 1).

    Args:
        features: T tensors (B, C, ...) of one shape. Channels-last memory is neither copied nor left.
        alpha: (T, T, C), or (T, T, 1) for one weight per pair of towers.
        compiled: use the compiled kernels; they are made at the first call for a number of towers and a dtype.

    Returns:
        T tensors of the features' shape and dtype.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():  # somebody else's compiler fuses these by itself
        identity = torch.eye(len(features), dtype=alpha.dtype, device=alpha.device)[:, :, None]
        mixed = []
        for row, own in zip(alpha - identity, features, strict=True):
            first, *others = (_broadcast(a, x) * x for a, x in zip(row, features, strict=True))
            mixed.append(own + sum(others, first))  # in this order, as in `_mixed`
        return mixed
    wide = torch.promote_types(features[0].dtype, torch.float32)
    weights = alpha.to(wide).expand(-1, -1, features[0].shape[1])
    return list(_Mix.apply(compiled, weights, *features))


def mix_stacked(features: Tensor, alpha: Tensor) -> Tensor:
    """The same for T features in one tensor (T, B, C, ...), as one product; what half precision rounds is as in `_mixed`."""
    identity = torch.eye(len(features), dtype=alpha.dtype, device=alpha.device)[:, :, None]
    excess = (alpha - identity).to(features.dtype).expand(-1, -1, features.shape[2])
    return features + torch.einsum("tsc,sbc...->tbc...", excess, features)


def _broadcast(weight: Tensor, like: Tensor) -> Tensor:
    return weight.to(like.dtype).view(-1, *[1] * (like.ndim - 2))


class _Mix(torch.autograd.Function):
    """(compiled, alpha (T, T, C), T features) -> T features."""

    @staticmethod
    def forward(ctx: FunctionCtx, compiled: bool, alpha: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.compiled = compiled  # type: ignore[attr-defined]
        ctx.save_for_backward(alpha, *features)
        alpha, x = alpha.detach(), [rows(f.detach()) for f in features]  # torch.compile warns of what has a graph
        mixed = compiled_mix(alpha, x) if compiled else _mixed(alpha, x)
        return tuple(_own(unrows(y, features[0].shape)) for y in mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        alpha, *features = (saved.detach() for saved in ctx.saved_tensors)
        x, g = [rows(f) for f in features], [rows(one) for one in gradients]
        unmix = compiled_unmix if ctx.compiled and not any(map(_is_batched, g)) else _unmixed
        of_alpha, of_features = unmix(alpha, x, g)
        return None, of_alpha, *(unrows(d, f.shape) for d, f in zip(of_features, features, strict=True))


def rows(x: Tensor) -> Tensor:
    """(B, C, ...) -> (N, C); a view of channels-last memory."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def unrows(x: Tensor, shape: Sequence[int]) -> Tensor:
    """(N, C) -> (B, C, ...), a view, channels last in memory."""
    return x.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _is_batched(tensor: Tensor) -> bool:
    """Is this several at once, by vmap? By `torch.func`'s, or by that of `torch.autograd.grad(..., is_grads_batched=True)`."""
    return bool(torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor))


def _own(view: Tensor) -> Tensor:
    """The same memory as a tensor that is nobody's view: what follows may begin with an operation in place."""
    return view.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


def _mixed(alpha: Tensor, x: Sequence[Tensor]) -> list[Tensor]:
    """y_t. Off-diagonal products and the deviation of the diagonal from 1 are summed in the features' own dtype, then added to
    x_t, so that half precision rounds what is exchanged and not what is kept.
    """
    towers = len(x)
    excess = (alpha - torch.eye(towers, dtype=alpha.dtype, device=alpha.device)[:, :, None]).to(x[0].dtype)
    mixed = []
    for t in range(towers):
        change = x[0] * excess[t, 0]
        for s in range(1, towers):
            change.addcmul_(x[s], excess[t, s])
        mixed.append(change.add_(x[t]))
    return mixed


def _unmixed(alpha: Tensor, x: Sequence[Tensor], g: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Derivatives: of alpha, sum_n g_t x_s, and of each x_s, sum_t alpha[t, s] g_t."""
    of_alpha = torch.stack([torch.stack([(one * f).sum(0, dtype=alpha.dtype) for f in x]) for one in g])
    return of_alpha, _mixed(alpha.transpose(0, 1), g)


def compiled_mix(alpha: Tensor, x: Sequence[Tensor]) -> list[Tensor]:
    """As `_mixed`, some towers at a time, each in one pass."""
    x, mixed = _canonical(x), []
    for part in _blocks(len(x), max(1, TERMS // len(x))):
        mixed += _kernel(_products, len(x), part.stop - part.start)(*_canonical([alpha[part]]), x)
    return mixed


def compiled_unmix(alpha: Tensor, x: Sequence[Tensor], g: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """As `_unmixed`: what `compiled_mix` does, turned round, and the derivative of alpha in blocks of towers.

    Blocks that need more sums than fit in registers are slower than reading features again: measured, 2 by 2 in half precision
    and 4 by 4 in single were the fastest of six.
    """
    x, g, like = _canonical(x), _canonical(g), alpha.new_empty(0)
    blocks = _blocks(len(x), 2 if x[0].dtype.itemsize == 2 else 4)
    rows_of_alpha = [
        torch.cat([_kernel(_sums, t.stop - t.start, s.stop - s.start)(like, g[t], x[s]) for s in blocks], dim=1) for t in blocks
    ]
    return torch.cat(rows_of_alpha), compiled_mix(alpha.transpose(0, 1), g)


def _canonical(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers, contiguous and nobody's views: torch.compile compiles anew for other strides, and for views."""
    return [_own(t.contiguous()) for t in tensors]


def _blocks(towers: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, towers)) for i in range(0, towers, size)]


def _products(alpha: Tensor, x: list[Tensor]) -> list[Tensor]:
    """alpha (b, T, C), T features (N, C) -> b features."""
    wide = [f.to(alpha.dtype) for f in x]
    mixed = []
    for row in alpha.unbind(0):
        y = wide[0] * row[0]
        for s in range(1, len(wide)):
            y = y + wide[s] * row[s]
        mixed.append(y.to(x[0].dtype))
    return mixed


def _sums(like: Tensor, g: list[Tensor], x: list[Tensor]) -> Tensor:
    """b gradients and d features (N, C) -> derivatives of alpha (b, d, C), in the dtype of `like`."""
    wide = [one.to(like.dtype) for one in g]
    return torch.stack([torch.stack([(one * f.to(like.dtype)).sum(0) for f in x]) for one in wide])


@cache
def _kernel(function: Callable[..., Any], *sizes: int) -> Callable[..., Any]:
    """`function` compiled for lists of these sizes, any N and C.

    A copy of the code for each, since torch.compile limits how often one piece of code may be compiled. Where it declines
    (another mode intercepts every operation, as a counter of FLOPs does) the code runs as it stands.
    """
    copy = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled = torch.compile(copy, dynamic=True)

    def call(*arguments: Any) -> Any:
        with torch.autocast(arguments[0].device.type, enabled=False):  # as the backward pass is: it would compile anew
            return compiled(*arguments)

    return call
