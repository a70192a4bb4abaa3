"""The cross-stitch unit: exchange by a learned linear combination (Misra et al. 2016, arXiv 1604.03539).

Of five public versions three depart from the paper's equation; this one is held to it by a test with a hand-computed case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from mtl.errors import ConfigError
from mtl.mixing import mix, mix_stacked
from mtl.options import Options
from mtl.registry import register_unit
from mtl.sharing import Exchange
from mtl.units import ExchangeUnit

BYTES_PER_TRAINED_WEIGHT = 16  # fp32: the weight, its gradient, Adam's two moments


class StitchInit(Options):
    """A start between the identity and a plain average: every diagonal entry `same`, every other one `cross`."""

    same: float = 0.9
    """Weight of a task's own features; the paper's alpha_S."""
    cross: float = 0.1
    """Weight of every other task's features; the paper's alpha_D. For T = 2 the paper keeps same + cross = 1."""


class CrossStitch(Exchange):
    """Towers that exchange through cross-stitch units: how a unit mixes, and where it starts."""

    kind: Literal["cross_stitch"] = "cross_stitch"
    granularity: Literal["scalar", "channel", "dense"] = "channel"
    """One alpha per pair of tasks; one per pair and channel; or one full matrix over all activations of all tasks."""
    init: Literal["identity"] | StitchInit = "identity"
    """`identity` starts as towers without exchange; a mapping {same, cross} starts mixed (the paper's best: 0.9 and 0.1)."""
    dense_limit_gib: float = Field(8.0, gt=0)
    """`dense` is refused where training its matrices (weight, gradient, two moments) would take more than this, GiB."""

    def check(self, tasks: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse dense units that would not fit, before anything is allocated.

        Raises:
            ConfigError: with the memory that each of them, and all together, would take.
        """
        if self.granularity != "dense":
            return
        gib = {point: BYTES_PER_TRAINED_WEIGHT * (tasks * math.prod(shape)) ** 2 / 2**30 for point, shape in shapes.items()}
        if sum(gib.values()) > self.dense_limit_gib:
            sides = {point: tasks * math.prod(shape) for point, shape in shapes.items()}
            each = ", ".join(f"{point} {side} x {side} ({gib[point]:.1f} GiB)" for point, side in sides.items())
            raise ConfigError(
                [
                    f"sharing.granularity: dense units of {tasks} tasks are full matrices: {each}; "
                    f"{sum(gib.values()):.1f} GiB to train (weight, gradient, two moments), above sharing.dense_limit_gib="
                    f"{self.dense_limit_gib:g}; use 'channel' or 'scalar', fewer points, or raise the limit"
                ]
            )

    @field_validator("init", mode="before")
    @classmethod
    def _one_or_the_other(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return StitchInit.model_validate(value)
        if value != "identity" and not isinstance(value, StitchInit):
            raise ValueError(f"must be 'identity' or a mapping such as {{same: 0.9, cross: 0.1}}; found {value!r}")
        return value


class CrossStitchUnit(ExchangeUnit):
    """x~_t = sum_s alpha[t, s] x_s (Misra et al. 2016, arXiv 1604.03539, equation 1), for T tasks.

    `alpha` is (T, T) for "scalar", (T, T, C) for "channel" and, for "dense", (T D, T D) with D the activations of one
    sample: the full matrix that the TensorFlow reference implementation multiplies with, of which the other two are special
    cases (blocks that are multiples of the identity, or diagonal and constant within a channel).

    Args:
        tasks: T, at least 1.
        shape: of one sample's feature, (C, H, W) or (C,).
        granularity: see above.
        same, cross: initial diagonal and off-diagonal weight; (1, 0) is the identity.
    """

    def __init__(
        self, tasks: int, shape: Sequence[int], granularity: str = "channel", same: float = 1.0, cross: float = 0.0
    ) -> None:
        super().__init__()
        assert tasks >= 1
        self.tasks, self.granularity = tasks, granularity
        start = torch.full((tasks, tasks), cross).fill_diagonal_(same)
        match granularity:
            case "scalar":
                alpha = start
            case "channel":
                alpha = start[:, :, None].repeat(1, 1, shape[0])
            case "dense":
                alpha = torch.kron(start, torch.eye(math.prod(shape)))
            case _:
                raise ConfigError([f"granularity={granularity!r}; it is 'scalar', 'channel' or 'dense'"])
        self.alpha = nn.Parameter(alpha)
        self.compilable = granularity != "dense"

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """T tensors (B, C, ...) -> T tensors (B, C, ...)."""
        first = features[0]
        assert len(features) == self.tasks
        assert all(f.shape == first.shape for f in features), [tuple(f.shape) for f in features]
        with torch.autocast(first.device.type, enabled=False):
            if self.granularity == "dense":
                flat = torch.cat([f.flatten(1) for f in features], dim=1).to(self.alpha.dtype)
                mixed = (flat @ self.alpha.T).to(first.dtype)
                return [m.reshape(first.shape) for m in mixed.chunk(self.tasks, dim=1)]
            return mix(features, self._by_channel(), self.compiled)

    def forward_stacked(self, features: Tensor) -> Tensor:
        """(T, B, C, ...) -> (T, B, C, ...), in one product."""
        assert len(features) == self.tasks
        with torch.autocast(features.device.type, enabled=False):
            if self.granularity == "dense":
                flat = features.transpose(0, 1).flatten(1).to(self.alpha.dtype)
                mixed = (flat @ self.alpha.T).to(features.dtype)
                return mixed.view(features.shape[1], self.tasks, *features.shape[2:]).transpose(0, 1)
            return mix_stacked(features, self._by_channel())

    def _by_channel(self) -> Tensor:
        """(T, T, C), or (T, T, 1)."""
        return self.alpha if self.granularity == "channel" else self.alpha[:, :, None]

    @torch.no_grad()
    def coupling(self) -> Tensor:
        """(T, T): alpha itself; its mean over channels; or the Frobenius norm of each dense block over sqrt(D).

        The identity gives the identity in all three.
        """
        match self.granularity:
            case "scalar":
                return self.alpha.detach().clone()
            case "channel":
                return self.alpha.detach().mean(dim=2)
            case _:
                size = len(self.alpha) // self.tasks
                blocks = self.alpha.detach().view(self.tasks, size, self.tasks, size)
                norms: Tensor = torch.linalg.vector_norm(blocks, dim=(1, 3)) / math.sqrt(size)
                return norms

    @torch.no_grad()
    def channels(self) -> Tensor | None:
        """(T, T, C): alpha, of granularity `channel`."""
        return self.alpha.detach() if self.granularity == "channel" else None

    @property
    def coupling_label(self) -> str:
        """What stands in a cell."""
        return {"scalar": "alpha", "channel": "alpha, mean over channels", "dense": "alpha, norm of block"}[self.granularity]

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}, granularity={self.granularity}, alpha={tuple(self.alpha.shape)}"


@register_unit("cross_stitch", options=CrossStitch)
def make_unit(tasks: int, shape: Sequence[int], options: CrossStitch) -> CrossStitchUnit:
    """A cross-stitch unit for `tasks` towers."""
    start = StitchInit(same=1.0, cross=0.0) if isinstance(options.init, str) else options.init
    return CrossStitchUnit(tasks, shape, options.granularity, start.same, start.cross)
