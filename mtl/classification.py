"""Classification: one of several classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mtl.errors import MTLError
from mtl.heads import DataclassHead, FeatureHead, class_counts, class_indices, class_names, constant, numbers
from mtl.metrics import Metric, torchmetric
from mtl.options import Options


class ClassificationOptions(Options):
    """How a classification head is trained; for tasks whose config may say so: `register_task(..., options=this)`."""

    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    """Factor of each class's loss, or "balanced": inverse to its frequency in training. Scaled to a mean of 1 over the training
    samples, so that the task keeps its place among the others; null: all alike."""

    @field_validator("class_weights", mode="before")
    @classmethod
    def _balanced_or_numbers(cls, value: Any) -> Any:
        if value is None or value == "balanced" or isinstance(value, list | tuple):
            return value
        raise ValueError(f"must be 'balanced', a number for each class, or null; found {value!r}")

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """This share of the target is spread evenly over all classes (Szegedy et al. 2016, arXiv 1512.00567)."""
    focal_gamma: float = Field(0.0, ge=0)
    """Focal loss: cross-entropy times (1 - p)^gamma, p the probability of the true class (Lin et al. 2017, arXiv 1708.02002);
    the paper uses 2; 0: plain cross-entropy."""


@dataclass(frozen=True)
class Classification(DataclassHead):
    """One of several classes: cross-entropy on logits, accuracy as the score.

    Args:
        classes: their names, in the order of the labels 0 .. C-1; at least two, all different.
        class_weights, label_smoothing, focal_gamma: see `ClassificationOptions`; they combine.
    """

    classes: Sequence[str]
    class_weights: Literal["balanced"] | Sequence[float] | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", class_names("Classification", self.classes))
        weights = self.class_weights
        if weights is not None and not isinstance(weights, str):
            weights = numbers("Classification(class_weights=...)", weights)
            if len(weights) != len(self.classes) or min(weights) <= 0:
                raise MTLError(
                    f"Classification(class_weights=...) takes a positive number for each of the {len(self.classes)} classes, "
                    f"'balanced' or None; found {self.class_weights!r}"
                )
            object.__setattr__(self, "class_weights", weights)
        elif weights not in (None, "balanced"):
            raise MTLError(f"Classification(class_weights={weights!r}); it is 'balanced', a number per class, or None")
        if not 0 <= self.label_smoothing < 1 or not 0 <= self.focal_gamma < math.inf:
            raise MTLError(
                "Classification: label_smoothing must be in [0, 1) and focal_gamma 0 or more; found "
                f"{self.label_smoothing!r} and {self.focal_gamma!r}"
            )

    def build(self, features: tuple[int, ...]) -> nn.Module:
        """(B, *features) -> logits (B, C)."""
        return FeatureHead(features, len(self.classes))

    def class_names(self) -> tuple[str, ...]:
        """`classes`."""
        return tuple(self.classes)

    def targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        """Class indices, int64 (N,)."""
        return class_indices(labels, valid, len(self.classes))

    def fitted(self, target: Tensor, valid: Tensor) -> Classification:
        """With class weights as numbers whose mean over the training samples is 1."""
        counts = class_counts(self.classes, target, valid)
        if self.class_weights is None:
            return self
        weights = [1 / n for n in counts] if isinstance(self.class_weights, str) else list(self.class_weights)
        mean = sum(w * n for w, n in zip(weights, counts, strict=True)) / sum(counts)
        return replace(self, class_weights=tuple(w / mean for w in weights))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Weighted, smoothed, focal cross-entropy per sample, in float32: logits (B, C), class indices (B,) -> (B,)."""
        logits = output.float()
        weight = None
        if self.class_weights is not None:
            assert not isinstance(self.class_weights, str), "a head is fitted before it is trained"
            weight = constant(tuple(self.class_weights), logits.device)
        loss = F.cross_entropy(logits, target, weight, reduction="none", label_smoothing=self.label_smoothing)
        if self.focal_gamma:
            sure = logits.log_softmax(dim=1).gather(1, target[:, None]).squeeze(1).exp()
            loss = (1 - sure).clamp_min(1e-7) ** self.focal_gamma * loss  # the root of 0 has no derivative
        return loss

    def metrics(self) -> tuple[Metric, ...]:
        """Accuracy over samples (the score) and the F1 score averaged over classes."""
        several: dict[str, Any] = {"num_classes": len(self.classes), "validate_args": False}  # validation would synchronise
        return (
            Metric("accuracy", "higher", torchmetric("MulticlassAccuracy", average="micro", **several), score=True),
            Metric("f1_macro", "higher", torchmetric("MulticlassF1Score", average="macro", **several)),
        )

    def predictions(self, output: Tensor) -> Tensor:
        """Index of the largest logit, (B,)."""
        return output.argmax(dim=1)

    def averaged(self, outputs: Sequence[Tensor]) -> Tensor:
        """Log of the mean probabilities, (B, C)."""
        return torch.stack([output.float().softmax(1) for output in outputs]).mean(0).log()

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """The most probable class and its probability, per sample."""
        probability, index = output.float().softmax(dim=1).max(dim=1)
        pairs = zip(index.tolist(), probability.tolist(), strict=True)
        return [{"label": self.classes[i], "score": p} for i, p in pairs]
