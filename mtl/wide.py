"""Operations that are done better by hand than by `torch.vmap`, for T networks that run as one.

Inside `vmap` a tensor stands for T. A convolution has its T towers side by side in memory, as (B, T C, H, W); what treats
channels apart can go on there, with T times the channels, in one call:

- convolution: `vmap` takes it apart before autocast sees it, which on a CPU then leaves it in full precision;
- batch norm: `vmap` multiplies by the weight and adds the bias in passes of their own, and fails where they are of higher
  precision than the features (autocast);
- pooling: `vmap` puts the towers into the batch, which copies, and loses the channels-last layout.

The gradient of a linear layer's weight (T, O, I) comes out of `vmap`'s product as (T, I, O), and is copied into its layout
where it is kept. With the weight as the first factor it need not be, but then the features are transposed: that is done where
they are the cheaper ones to copy, having fewer rows than the weight has columns.

The others are no matter of speed. A layer norm gives the dtype that it gives without `vmap`. Memory that is allocated without
contents is allocated T times: torchvision's stochastic depth draws into it, and T towers draw apart. Attention on a CPU is done
in its parts, since `vmap` would loop over the fused kernel there.

Measured on a CPU, 1 thread, forward and backward, over `vmap`'s own: batch norm 1.8 times as fast and pooling 3 times, channels
last; linear layers of 3136 x 1024, 64 rows, 2.1 times; convolutions alike. The public way to such a rule, an autograd function
with a `vmap` method, took 150 microseconds a call; torch's functions beneath it take one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class Wide(TorchFunctionMode):
    """Within it, in a function under `vmap`, the operations of this module are done by hand.

    Args:
        marker: any tensor that stands for T.
    """

    def __init__(self, marker: Tensor) -> None:
        super().__init__()
        self.marker = marker

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        given = kwargs or {}
        by_hand = BY_HAND.get(func)
        if by_hand is not None:
            return by_hand(func, self.marker, *args, **given)
        return func(*args, **given)


def _convolution(
    convolve: Callable[..., Any],
    marker: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if input.ndim != weight.ndim or not all(p is None or _stands_for_many(p) for p in (weight, bias)):
        return convolve(input, weight, bias, stride, padding, dilation, groups)
    x, count = input, 1
    if _stands_for_many(input) or groups > 1:
        count = len(_memory(marker, 0))
        x = _widen(input) if _stands_for_many(input) else torch.cat([input] * count, dim=1)
    w, b = (None if p is None else _memory(p, 0).flatten(0, 1) for p in (weight, bias))
    return _narrow(convolve(x, w, b, stride, padding, dilation, count * groups), marker)


def _pool(pool: Callable[..., Any], marker: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not _stands_for_many(input) or input.ndim != 4 or kwargs.get("return_indices"):
        return pool(input, *args, **kwargs)
    return _narrow(pool(_widen(input), *args, **kwargs), marker)


def _batch_norm(
    norm: Callable[..., Any],
    marker: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    of_channels = (running_mean, running_var, weight, bias)
    if not _stands_for_many(input) or not all(p is None or _stands_for_many(p) for p in of_channels):
        return norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, var, weight, bias = (None if p is None else _memory(p, 0).flatten(0, 1) for p in of_channels)
    return _narrow(norm(_widen(input), mean, var, weight, bias, training, momentum, eps), marker)


def _linear(linear: Callable[..., Any], marker: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _stands_for_many(weight) or not (bias is None or _stands_for_many(bias)):
        return linear(input, weight, bias)  # type: ignore[no-any-return]
    w = _memory(weight, 0)  # (T, O, I)
    b = None if bias is None else _memory(bias, 0)
    if not _stands_for_many(input):
        y = linear(input, w.flatten(0, 1), None if b is None else b.flatten())
        return _batched(y.unflatten(-1, w.shape[:2]), y.ndim - 1, marker)
    x = _memory(input, 0)
    rows = x.flatten(1, -2) if x.ndim > 2 else x[:, None]  # (T, N, I)
    if rows.shape[1] < w.shape[2]:  # see the module
        y = _product(w, rows.mT, None if b is None else b[:, :, None]).mT
    else:
        y = _product(rows, w.mT, None if b is None else b[:, None])
    return _batched(y.unflatten(1, x.shape[1:-1]) if x.ndim > 2 else y[:, 0], 0, marker)


def _product(a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    return torch.bmm(a, b) if c is None else torch.baddbmm(c, a, b)


def _layer_norm(
    norm: Callable[..., Any],
    marker: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if weight is None or not _stands_for_many(weight):
        return norm(input, normalized_shape, weight, bias, *args, **kwargs)
    y = norm(input, normalized_shape, None, None, *args, **kwargs)
    return (y * weight if bias is None else torch.addcmul(bias, y, weight)).to(y.dtype)


def _empty(empty: Callable[..., Any], marker: Tensor, *size: Any, **kwargs: Any) -> Any:
    if kwargs.get("out") is not None:
        return empty(*size, **kwargs)
    shape = size[0] if size and isinstance(size[0], Sequence) else size
    return _batched(empty((len(_memory(marker, 0)), *kwargs.pop("size", shape)), **kwargs), 0, marker)


def _attention(attention: Callable[..., Any], marker: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    if query.device.type != "cpu":
        return attention(query, *args, **kwargs)
    with sdpa_kernel(SDPBackend.MATH):
        return attention(query, *args, **kwargs)


BY_HAND: dict[Callable[..., Any], Callable[..., Any]] = {
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.max_pool2d: _pool,
    torch.max_pool2d: _pool,
    F.avg_pool2d: _pool,
    F.adaptive_avg_pool2d: _pool,
    F.batch_norm: _batch_norm,
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    torch.empty: _empty,
    F.multi_head_attention_forward: _attention,
    F.scaled_dot_product_attention: _attention,
}
"""torch's function, as it hands itself to a mode -> what is done instead; called with the function, the marker, and what it was
called with."""


def _stands_for_many(x: Tensor) -> bool:
    return bool(functorch.is_batchedtensor(x))


def _memory(x: Tensor, dim: int) -> Tensor:
    """What a tensor that stands for T is in memory, towers along `dim`."""
    return functorch.get_unwrapped(x).movedim(functorch.maybe_get_bdim(x), dim)


def _widen(x: Tensor) -> Tensor:
    """(B, C, ...) that stands for T -> (B, T C, ...) in memory; the view that it is after a convolution, else a copy."""
    memory = _memory(x, 1)
    if memory.ndim == 5 and memory.stride(2) == 1 < memory.shape[2]:  # a copy must be channels-last too
        return memory.movedim((1, 2), (-2, -1)).flatten(-2).movedim(-1, 1)
    return memory.flatten(1, 2)


def _narrow(y: Tensor, marker: Tensor) -> Tensor:
    """(B, T C, ...) in memory -> (B, C, ...) that stands for T."""
    return _batched(y.unflatten(1, (len(_memory(marker, 0)), -1)), 1, marker)


def _batched(y: Tensor, dim: int, marker: Tensor) -> Tensor:
    level = functorch.maybe_get_level(marker)
    return functorch._add_batch_dim(y, dim, level)
