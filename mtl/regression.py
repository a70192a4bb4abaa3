"""Regression: one number, or several, in a unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl.errors import DataError, MTLError
from mtl.heads import DataclassHead, FeatureHead, constant, numbers, refuse
from mtl.metrics import Metric, torchmetric


class Readout(nn.Module):
    """A linear readout in units of the training targets' deviation, brought to the target's own unit; float32 throughout.

    (B, *features) -> (B,), or (B, K) where there are several numbers. `mean` and `std` are buffers, so a head that is loaded
    from another run means what it meant there.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: tuple[int, ...], mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.linear = FeatureHead(features, mean.numel())
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # bf16 knows a year of birth to within eight years
            z = self.linear(x.to(self.mean.dtype))
            value: Tensor = self.mean + self.std * (z if self.mean.ndim else z.squeeze(1))
            return value


@dataclass(frozen=True)
class Regression(DataclassHead):
    """One number per sample, or several: squared error of the standardised target, R^2 as the score.

    The loss is in units of the training targets' standard deviation, so that tasks with different units can be summed; outputs,
    metrics and predictions are in the target's own unit.

    Args:
        unit: of the target, for the names of metrics and for predictions ("years"); "" for none.
        outputs: names of the numbers, for labels (N, K); None: one number, labels (N,).
        error: "squared", "absolute", or "huber" (squared up to one standard deviation, absolute beyond).
        mean, std: of the target, a number or one per output; None: the training split's.
    """

    unit: str = ""
    outputs: Sequence[str] | None = None
    error: Literal["squared", "absolute", "huber"] = "squared"
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.outputs is not None:
            if isinstance(self.outputs, str) or not self.outputs or len(set(self.outputs)) < len(self.outputs):
                raise MTLError(f"Regression(outputs=...) takes different names, as in ('x', 'y'); found {self.outputs!r}")
            object.__setattr__(self, "outputs", tuple(str(name) for name in self.outputs))
        if self.error not in ERRORS:
            raise MTLError(f"Regression(error={self.error!r}); it is {', '.join(map(repr, ERRORS))}")
        if (self.mean is None) != (self.std is None):
            raise MTLError("Regression takes both mean and std, or neither")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, Sequence):
                object.__setattr__(self, name, numbers(f"Regression({name}=...)", value))
                if self.outputs is None or len(value) != len(self.outputs):
                    raise MTLError(f"Regression({name}={value!r}) must have one number for each of outputs={self.outputs!r}")
        if self.mean is not None and self.std is not None:
            given = torch.tensor([self.mean, self.std]) if not isinstance(self.mean, tuple) else torch.tensor(self.mean)
            if not bool(given.isfinite().all()) or not bool((self._scale() > 0).all()):
                raise MTLError(f"Regression(mean={self.mean!r}, std={self.std!r}) must be finite, and std positive")

    def _scale(self) -> Tensor:
        return torch.tensor(self.std, dtype=torch.float32)

    def named(self, classes: Sequence[str]) -> Regression:
        """As it is, if the names are the labels themselves.

        Raises:
            DataError: they are others; the numbers of classes are no quantity.
        """
        if any(name != str(i) for i, name in enumerate(classes)):
            raise DataError(
                f"the labels of this target stand for {', '.join(classes[:5])}, ...: a regression on their numbers means "
                "nothing; use a classification, or read the target as numbers"
            )
        return self

    def build(self, features: tuple[int, ...]) -> nn.Module:
        """(B, *features) -> (B,) or (B, K), in the target's unit."""
        assert self.mean is not None, "a head is fitted before it is built"
        shape = () if self.outputs is None else (len(self.outputs),)
        mean, std = torch.tensor(self.mean, dtype=torch.float32), self._scale()
        return Readout(features, mean.expand(shape).clone(), std.expand(shape).clone())

    def targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        """float32, (N,) or (N, K)."""
        wanted = (len(labels),) if self.outputs is None else (len(labels), len(self.outputs))
        if labels.shape != wanted:
            several = "" if self.outputs is not None else "; name several numbers per sample by outputs=(...)"
            raise DataError(f"regression labels must have shape {wanted}; found {tuple(labels.shape)}{several}")
        if valid.ndim != 1:
            raise DataError(f"the valid mask must be one bool per sample, shape (N,); found shape {tuple(valid.shape)}")
        values = labels.float()
        seen = valid.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
        refuse(values, seen & ~values.isfinite(), "is not finite", "a missing label is masked by valid=")
        return torch.where(seen, values, torch.zeros_like(values))

    def fitted(self, target: Tensor, valid: Tensor) -> Regression:
        """With mean and deviation of the training targets, where they are not given."""
        if self.mean is not None:
            return self
        values = target[valid].double() if target.device.type != "mps" else target[valid]
        mean, std = values.mean(0), values.std(0, correction=0)
        if not bool((std > 1e-6 * mean.abs().clamp_min(1e-30)).all()):
            raise DataError(
                f"the training targets do not vary, or too little for float32 (standard deviation {std.tolist()} around "
                f"{mean.tolist()}); subtract an offset from the labels if it is the latter"
            )
        return replace(self, mean=_plain(mean), std=_plain(std))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Error in units of the standard deviation: (B,) -> (B,), (B, K) -> (B, K)."""
        assert self.std is not None, "a head is fitted before it is trained"
        std = constant(tuple(self.std) if isinstance(self.std, Sequence) else self.std, output.device)
        return ERRORS[self.error](output / std, target / std, reduction="none")  # type: ignore[operator, no-any-return]

    def metrics(self) -> tuple[Metric, ...]:
        """R^2 (the score: 0 for always predicting the mean; no lower bound), mean absolute and root mean squared error."""
        suffix = f"_{self.unit}" if self.unit else ""
        return (
            Metric("r2", "higher", torchmetric("R2Score", of="regression"), score=True),
            Metric(f"mae{suffix}", "lower", torchmetric("MeanAbsoluteError", of="regression")),
            Metric(f"rmse{suffix}", "lower", torchmetric("MeanSquaredError", of="regression", squared=False), relative=True),
        )

    def predictions(self, output: Tensor) -> Tensor:
        """As they are, (B,) or (B, K)."""
        return output

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """The number, or the numbers by name, and the unit."""
        unit = {"unit": self.unit} if self.unit else {}
        if self.outputs is None:
            return [{"value": value, **unit} for value in output.tolist()]
        return [{"values": dict(zip(self.outputs, row, strict=True)), **unit} for row in output.tolist()]


ERRORS = {"squared": F.mse_loss, "absolute": F.l1_loss, "huber": F.huber_loss}


def _plain(value: Tensor) -> float | tuple[float, ...]:
    return tuple(value.tolist()) if value.ndim else float(value)
