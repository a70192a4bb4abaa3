"""A head for angles, and a metric in degrees."""

from dataclasses import dataclass
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn

import mtl


class MeanDegrees(torchmetrics.Metric):
    """Mean absolute angle between predicted and true directions, degrees: (N, 2) and (N, 2), of any length above 0."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        cosine = nn.functional.cosine_similarity(predictions, targets).clamp(-1, 1)
        self.total += torch.rad2deg(torch.arccos(cosine)).sum()
        self.count += len(targets)

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.count


@dataclass(frozen=True)
class Angle(mtl.Head):
    """A direction in the plane: labels are radians, targets and outputs (cos, sin); the loss is 1 - cos(difference)."""

    def build(self, features: tuple[int, ...]) -> nn.Module:
        """(B, *features) -> (B, 2)."""
        return mtl.FeatureHead(features, 2)

    def targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        """(N,) radians -> (N, 2)."""
        if labels.ndim != 1:
            raise mtl.DataError(f"angles must be one number per sample; found shape {tuple(labels.shape)}")
        if bool((valid & ~labels.isfinite()).any()):
            raise mtl.DataError("an angle is not finite; mask missing ones by valid=")
        angle = torch.where(valid, labels, torch.zeros_like(labels)).float()
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """(B, 2), (B, 2) -> (B,)."""
        return 1 - nn.functional.cosine_similarity(output.float(), target, eps=1e-4)

    def metrics(self) -> tuple[mtl.Metric, ...]:
        """The mean cosine of the difference (the score), and the mean difference."""
        cosine = mtl.torchmetric("CosineSimilarity", of="regression", reduction="mean")
        return (mtl.Metric("cosine", "higher", cosine, score=True), mtl.Metric("error_degrees", "lower", MeanDegrees))

    def predictions(self, output: Tensor) -> Tensor:
        """As they are, (B, 2)."""
        return output.float()

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """Degrees, -180 to 180."""
        return [{"degrees": angle} for angle in torch.rad2deg(torch.atan2(output[:, 1], output[:, 0])).tolist()]
