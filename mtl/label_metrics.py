"""Metrics that torchmetrics has, for the cases that it leaves undefined. Imports torchmetrics: import this late."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCohenKappa
from torchmetrics.functional.classification import binary_average_precision
from torchmetrics.utilities import dim_zero_cat


class MeanAveragePrecision(Metric):
    """Average precision of each class over the samples that carry its label, averaged over the classes that have a positive.

    Probabilities (N, K) and targets (N, K), 1, 0 or `missing`. A class without a positive, or without a label, says nothing and
    is left out; not a number where that leaves none.
    """

    probabilities: list[Tensor]
    targets: list[Tensor]

    def __init__(self, missing: int) -> None:
        super().__init__()
        self.missing = missing
        self.add_state("probabilities", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        self.probabilities.append(probabilities)
        self.targets.append(targets)

    def compute(self) -> Tensor:
        """The mean over classes."""
        probabilities, targets = dim_zero_cat(self.probabilities), dim_zero_cat(self.targets)
        found = []
        for p, t in zip(probabilities.T, targets.T, strict=True):
            seen = t != self.missing
            if bool((t == 1).any()):
                found.append(binary_average_precision(p[seen], t[seen].long(), validate_args=False))
        return torch.stack(found).mean() if found else torch.tensor(torch.nan)


class QuadraticKappa(MulticlassCohenKappa):
    """Cohen's kappa with quadratic weights; 0 where it is undefined, since one class alone shows no agreement beyond chance."""

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes=num_classes, weights="quadratic", validate_args=False, **options)

    def compute(self) -> Tensor:
        """At most 1."""
        return super().compute().nan_to_num(0.0)
