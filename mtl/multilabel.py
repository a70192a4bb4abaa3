"""Multi-label classification: any number of several classes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl.errors import DataError, MTLError
from mtl.heads import DataclassHead, FeatureHead, class_names, refuse
from mtl.metrics import Metric, torchmetric

MISSING = -1
"""Stands in the metrics' targets for a label that does not exist."""


@dataclass(frozen=True)
class MultiLabel(DataclassHead):
    """Each of several classes, present or not: binary cross-entropy per class, mean average precision as the score.

    Labels are (N, K), 0 or 1 (or bool); the valid mask (N,) or (N, K), since single labels are often missing.

    Args:
        classes: their names, in the order of the columns; at least one, all different.
        threshold: a class counts as present from this probability on.
    """

    classes: Sequence[str]
    threshold: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", class_names("MultiLabel", self.classes, least=1))
        if not 0 < self.threshold < 1:
            raise MTLError(f"MultiLabel(threshold={self.threshold!r}); it is a probability between 0 and 1")

    def column_names(self) -> tuple[str, ...]:
        """`classes`."""
        return tuple(self.classes)

    def build(self, features: tuple[int, ...]) -> nn.Module:
        """(B, *features) -> logits (B, K)."""
        return FeatureHead(features, len(self.classes))

    def targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        """0 or 1, int8 (N, K)."""
        if labels.ndim != 2 or labels.shape[1] != len(self.classes):
            raise DataError(
                f"multi-label labels must have a column for each of the {len(self.classes)} classes, shape "
                f"(N, {len(self.classes)}); found {tuple(labels.shape)}"
            )
        seen = _per_label(valid, labels)
        labels = labels.to(torch.uint8) if labels.dtype == torch.bool else labels
        refuse(labels, seen & (labels != 0) & (labels != 1), "is neither 0 nor 1", "1 says that the class is present")
        return torch.where(seen, labels, torch.zeros_like(labels)).to(torch.int8)

    def fitted(self, target: Tensor, valid: Tensor) -> MultiLabel:
        """As it is; every class must have been seen both present and absent."""
        seen = _per_label(valid, target)
        present, absent = ((target == value) & seen for value in (1, 0))
        flat = [name for i, name in enumerate(self.classes) if not (present[:, i].any() and absent[:, i].any())]
        if flat:
            raise DataError(
                f"{len(flat)} of {len(self.classes)} classes are always present or always absent in the training split: "
                f"{', '.join(flat)}; drop them, or give data that has both"
            )
        return self

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy per label, in float32: logits (B, K), targets (B, K) -> (B, K)."""
        return F.binary_cross_entropy_with_logits(output.float(), target.float(), reduction="none")

    def metrics(self) -> tuple[Metric, ...]:
        """Average precision averaged over the classes that have a positive (the score), accuracy over labels, macro F1."""
        several: dict[str, Any] = {"num_labels": len(self.classes), "ignore_index": MISSING, "validate_args": False}
        cut: dict[str, Any] = {"threshold": self.threshold, **several}
        return (
            Metric("average_precision", "higher", _average_precision, score=True),
            Metric("accuracy", "higher", torchmetric("MultilabelAccuracy", average="micro", **cut)),
            Metric("f1_macro", "higher", torchmetric("MultilabelF1Score", average="macro", **cut)),
        )

    def predictions(self, output: Tensor) -> Tensor:
        """Probabilities (B, K)."""
        return output.float().sigmoid()

    def labelled(self, predictions: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Samples with any label; those of their labels that are missing are marked so, and ignored by the metrics."""
        seen = _per_label(valid, target)
        some = seen.any(dim=1)
        return predictions[some], target.masked_fill(~seen, MISSING)[some]

    def averaged(self, outputs: Sequence[Tensor]) -> Tensor:
        """Logits of the mean probabilities, of the outputs' shape."""
        return torch.stack([output.float().sigmoid() for output in outputs]).mean(0).logit(eps=1e-7)

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """The classes that are present, and the probability of every one, per sample."""
        return [
            {
                "labels": [name for name, p in zip(self.classes, row, strict=True) if p >= self.threshold],
                "scores": dict(zip(self.classes, row, strict=True)),
            }
            for row in self.predictions(output).tolist()
        ]


def _average_precision() -> Any:
    from mtl.label_metrics import MeanAveragePrecision  # imports torchmetrics, which takes two seconds

    return MeanAveragePrecision(MISSING)


def _per_label(valid: Tensor, labels: Tensor) -> Tensor:
    return (valid if valid.ndim == 2 else valid[:, None]).expand_as(labels)
