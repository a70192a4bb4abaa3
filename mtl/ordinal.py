"""Ordinal regression: one of several classes that have an order, such as grades or age groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl.heads import DataclassHead, FeatureHead, class_counts, class_indices, class_names
from mtl.metrics import Metric, torchmetric


class Thresholds(nn.Module):
    """One score per sample and a threshold between each two neighbouring classes: (B, *features) -> logits (B, C - 1).

    Logit k says whether the class is above k. The score is shared, so the C - 1 answers cannot contradict each other once the
    thresholds are in order, which they are at the optimum (CORAL, Cao et al. 2020, arXiv 1901.07884, theorem 1).
    """

    def __init__(self, features: tuple[int, ...], thresholds: int) -> None:
        super().__init__()
        self.score = FeatureHead(features, 1)
        start = torch.arange(1, thresholds + 1) / (thresholds + 1)
        self.bias = nn.Parameter(-torch.logit(start))  # equally probable classes, in order

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # thresholds lie closer together than bf16 tells apart
            logits: Tensor = self.score(x.to(self.bias.dtype)) + self.bias
            return logits


def _kappa(classes: int) -> Any:
    from mtl.label_metrics import QuadraticKappa  # imports torchmetrics, which takes two seconds

    return QuadraticKappa(classes)


@dataclass(frozen=True)
class Ordinal(DataclassHead):
    """One of several ordered classes: a binary cross-entropy per threshold (CORAL), quadratic weighted kappa as the score.

    A confusion of neighbours costs less than one of extremes, in the loss as in the score.

    Args:
        classes: their names from lowest to highest, in the order of the labels 0 .. C-1; at least two, all different.
    """

    classes: Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", class_names("Ordinal", self.classes))

    def build(self, features: tuple[int, ...]) -> nn.Module:
        """(B, *features) -> logits (B, C - 1)."""
        return Thresholds(features, len(self.classes) - 1)

    def class_names(self) -> tuple[str, ...]:
        """`classes`."""
        return tuple(self.classes)

    def targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        """Class indices, int64 (N,)."""
        return class_indices(labels, valid, len(self.classes))

    def fitted(self, target: Tensor, valid: Tensor) -> Ordinal:
        """As it is; every class must have been seen."""
        class_counts(self.classes, target, valid)
        return self

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Logits (B, C - 1), class indices (B,) -> (B,): the mean over thresholds of binary cross-entropy.

        Differs from the paper (equation 4) by the mean in place of the sum, so that the loss stays comparable with other
        tasks' however many classes there are.
        """
        logits = output.float()
        above = target[:, None] > torch.arange(logits.shape[1], device=target.device)
        return F.binary_cross_entropy_with_logits(logits, above.to(logits.dtype), reduction="none").mean(1)

    def metrics(self) -> tuple[Metric, ...]:
        """Quadratic weighted kappa (the score), mean absolute error in classes, accuracy."""
        several: dict[str, Any] = {"num_classes": len(self.classes), "validate_args": False}
        return (
            Metric("kappa_quadratic", "higher", partial(_kappa, len(self.classes)), score=True),
            Metric("mae_classes", "lower", torchmetric("MeanAbsoluteError", of="regression"), relative=True),
            Metric("accuracy", "higher", torchmetric("MulticlassAccuracy", average="micro", **several)),
        )

    def predictions(self, output: Tensor) -> Tensor:
        """How many thresholds the score is above: the class index, (B,)."""
        return (output > 0).sum(dim=1)

    def averaged(self, outputs: Sequence[Tensor]) -> Tensor:
        """Logits of the mean probabilities, of the outputs' shape."""
        return torch.stack([output.float().sigmoid() for output in outputs]).mean(0).logit(eps=1e-7)

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """The class, the probability that it is neither lower nor higher, and the expected class index, per sample."""
        above = output.float().sigmoid()
        edges = torch.cat([torch.ones_like(above[:, :1]), above, torch.zeros_like(above[:, :1])], dim=1)
        index = self.predictions(output)
        chance = (edges[:, :-1] - edges[:, 1:]).clamp_min(0).gather(1, index[:, None]).squeeze(1)
        rows = zip(index.tolist(), chance.tolist(), above.sum(1).tolist(), strict=True)
        return [{"label": self.classes[i], "score": p, "expected": e} for i, p, e in rows]
