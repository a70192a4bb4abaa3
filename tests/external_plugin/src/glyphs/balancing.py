"""Balancer `softmax_losses`: the larger a loss, the more it counts."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

import mtl


class SoftmaxOptions(mtl.Options):
    """How much more."""

    temperature: float = Field(1.0, gt=0)
    """Large: all alike; small: the largest loss alone."""


class SoftmaxLosses(mtl.Scalarization):
    """T sum_t softmax(L / temperature)_t L_t, the weights taken as constants."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def combine(self, losses: Tensor) -> Tensor:
        """losses (T,) -> a scalar."""
        return len(losses) * (torch.softmax(losses.detach() / self.temperature, dim=0) * losses).sum()


@mtl.register_balancer("softmax_losses", options=SoftmaxOptions)
def softmax_losses(tasks: Sequence[str], options: SoftmaxOptions) -> SoftmaxLosses:
    """Called once, with the names of the tasks."""
    return SoftmaxLosses(options.temperature)
