"""Heads: what a task predicts from features, how that is scored, and what its outputs mean.

A head is a description (class names, options); `build` makes the module that learns. The trainer knows heads by this interface
alone, so any other kind of prediction is a subclass of `Head` in a plugin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl.errors import DataError, MTLError
from mtl.metrics import Metric


class Head(ABC):
    """From one tower's features to one task's output, with what is needed to train, score and read it."""

    @abstractmethod
    def build(self, features: tuple[int, ...]) -> nn.Module:
        """The module: features (B, *features) -> output (B, ...). `features` is the shape of one sample's features."""

    @abstractmethod
    def targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        """What the loss receives for `labels` (N, ...) as the dataset stores them, where `valid`; anything finite elsewhere.

        Raises:
            DataError: a label out of range or not finite, with its position and value.
        """

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Unreduced loss, one value per label: output (B, ...), target as `targets` made it -> (B,) or the target's shape."""

    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """The default metrics; exactly one carries the score."""

    @abstractmethod
    def predictions(self, output: Tensor) -> Tensor:
        """What the metrics compare with the targets."""

    @abstractmethod
    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """Outputs (B, ...) in words: one mapping per sample, plain enough for JSON."""

    def check_training(self, target: Tensor, valid: Tensor) -> None:  # noqa: B027 (a head may have nothing to say)
        """Complain about training targets from which this head cannot be learned (a class never seen). Default: nothing.

        Raises:
            DataError: what is missing.
        """

    def describe(self) -> dict[str, Any]:
        """What a reader of a checkpoint needs to know of this head, plain enough for JSON."""
        return {"head": type(self).__name__}


class FeatureHead(nn.Sequential):
    """Linear readout of a feature vector; a feature map (C, H, W) is averaged over its positions first."""

    def __init__(self, features: tuple[int, ...], outputs: int) -> None:
        pool: list[nn.Module] = [SpatialMean()] if len(features) > 1 else []
        super().__init__(*pool, nn.Linear(features[0], outputs))


class SpatialMean(nn.Module):
    """(B, C, ...) -> (B, C). A mean, not an adaptive pool, whose backward is not deterministic on CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


@dataclass(frozen=True)
class Classification(Head):
    """One of several classes: cross-entropy on logits, accuracy as the score.

    Args:
        classes: their names, in the order of the labels 0 .. C-1; at least two, all different.
    """

    classes: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.classes, str) or not isinstance(self.classes, Sequence):
            raise MTLError(
                f"Classification(classes=...) takes a sequence of names, as in ('even', 'odd'); found {self.classes!r}"
            )
        object.__setattr__(self, "classes", tuple(str(name) for name in self.classes))
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise MTLError(f"Classification needs two or more different class names; found {list(self.classes)}")

    def build(self, features: tuple[int, ...]) -> nn.Module:
        """(B, *features) -> logits (B, C)."""
        return FeatureHead(features, len(self.classes))

    def targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        """Class indices, int64 (N,)."""
        if labels.ndim != 1:
            raise DataError(f"classification labels must be one integer per sample, shape (N,); found {tuple(labels.shape)}")
        if labels.is_floating_point():
            _first_offender(labels, valid & ~labels.isfinite(), "is not finite", self._range)
            _first_offender(labels, valid & (labels != labels.round()), "is not an integer", self._range)
        _first_offender(labels, valid & ((labels < 0) | (labels >= len(self.classes))), "is out of range", self._range)
        return torch.where(valid, labels, torch.zeros_like(labels)).to(torch.int64)

    @property
    def _range(self) -> str:
        return f"the {len(self.classes)} classes are 0 to {len(self.classes) - 1}"

    def check_training(self, target: Tensor, valid: Tensor) -> None:
        """A class without one training sample cannot be learned."""
        counts = torch.bincount(target[valid], minlength=len(self.classes))
        if missing := [name for name, n in zip(self.classes, counts.tolist(), strict=True) if n == 0]:
            raise DataError(
                f"{len(missing)} of {len(self.classes)} classes never seen in the training split: {', '.join(missing)}; "
                "drop them from the head's classes, or give data that has them"
            )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy per sample, in float32: logits (B, C), class indices (B,) -> (B,)."""
        return F.cross_entropy(output.float(), target, reduction="none")

    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy over samples (the score) and the F1 score averaged over classes."""
        return (
            Metric("accuracy", "higher", lambda: _multiclass("MulticlassAccuracy", len(self.classes), "micro"), score=True),
            Metric("f1_macro", "higher", lambda: _multiclass("MulticlassF1Score", len(self.classes), "macro")),
        )

    def predictions(self, output: Tensor) -> Tensor:
        """Index of the largest logit, (B,)."""
        return output.argmax(dim=1)

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """The most probable class and its probability, per sample."""
        probability, index = output.float().softmax(dim=1).max(dim=1)
        pairs = zip(index.tolist(), probability.tolist(), strict=True)
        return [{"label": self.classes[i], "score": p} for i, p in pairs]

    def describe(self) -> dict[str, Any]:
        """The class names."""
        return {**super().describe(), "classes": list(self.classes)}


def _multiclass(name: str, classes: int, average: str) -> Any:
    import torchmetrics.classification as library  # two seconds, paid when the first metric is made

    return getattr(library, name)(num_classes=classes, average=average, validate_args=False)  # validation would synchronise


def _first_offender(labels: Tensor, bad: Tensor, what: str, allowed: str) -> None:
    if count := int(bad.sum()):
        i = int(bad.nonzero()[0])
        raise DataError(f"label {labels[i].item()!r} of sample {i} {what}; {allowed} ({count} such of {len(labels)})")
