"""Balancers: how T losses become one update of what the tasks share.

A balancer owns the backward pass, so a method that works on gradients per task has the same interface as one that sums
losses; the trainer cannot tell them apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mtl.registry import register_balancer


class Balancer(nn.Module, ABC):
    """Turns weighted task losses into gradients.

    A factory registered with `@mtl.register_balancer` is called with (tasks[, options]), the task names in order, and returns
    one of these. Its parameters, if any, are optimised with the model's, without weight decay, and saved beside its weights.
    """

    additive: ClassVar[bool] = False
    """Whether gradients of micro-batches add up to those of the whole; where not, `optim.accumulate` above 1 is refused."""
    needs_finite: bool = True
    """Whether losses and gradients that are not finite would make it fail, or stay in what it remembers. Then it is shown none,
    for which the host waits for a GPU at every step."""
    in_parallel: ClassVar[bool] = False
    """Whether several processes, each with its share of a batch, may use it: it differentiates one number, made of the losses
    of whole batches and the same in all of them."""

    @abstractmethod
    def backward(
        self, losses: Sequence[Tensor], features: Sequence[Tensor], shared_parameters: Sequence[nn.Parameter]
    ) -> Tensor:
        """Accumulate into `.grad` of every parameter that the losses depend on, this balancer's own included.

        Args:
            losses: T scalars, the weighted task losses of one batch, with their graphs. They come apart, so that the derivative
                of one need not walk through the heads of the others.
            features: T tensors, what the heads consume.
            shared_parameters: everything below `features`: trunk, towers and exchange units.

        Returns:
            The objective that was differentiated, a detached scalar.
        """

    def after_step(self, losses: Callable[[], Tensor]) -> None:
        """Called after every update.

        Args:
            losses: gives (T,), detached: the weighted losses of the same batch under the updated parameters. It costs a forward
                pass, and only if called.
        """

    def after_epoch(self) -> None:
        """Called at the end of every epoch of training, before validation."""

    def memory(self) -> dict[str, Any]:
        """What it has gathered that is not in its `state_dict`, so that a run can be cut and go on: tensors, numbers, text, and
        lists, tuples and dictionaries of these. Default: nothing.
        """
        return {}

    def recall(self, memory: dict[str, Any], device: torch.device) -> None:
        """Take back what `memory` gave, its tensors on the CPU, to go on with on `device`."""

    def optimised(self) -> Iterable[nn.Parameter]:
        """Which of its parameters the run's optimizer steps: all, unless it steps some by itself."""
        return self.parameters()


class Scalarization(Balancer):
    """A balancer that combines the losses into one number and differentiates that."""

    in_parallel = True

    @abstractmethod
    def combine(self, losses: Tensor) -> Tensor:
        """losses (T,) -> a scalar."""

    def backward(
        self, losses: Sequence[Tensor], features: Sequence[Tensor], shared_parameters: Sequence[nn.Parameter]
    ) -> Tensor:
        """Differentiate `combine(losses)`."""
        total = self.combine(torch.stack(list(losses)))
        total.backward()
        return total.detach()


class Sum(Scalarization):
    """The plain sum of the weighted losses, as the reference protocol has it.

    With ordinary regularisation and equal tuning it matches or beats special methods (Kurin et al. 2022, arXiv 2201.04122).
    """

    additive = True
    needs_finite = False

    def combine(self, losses: Tensor) -> Tensor:
        """sum_t losses[t]"""
        return losses.sum()


class UncertaintyWeighting(Scalarization):
    """Homoscedastic uncertainty (Kendall et al. 2018, arXiv 1705.07115, equation 10 with s_t = log sigma_t^2).

    sum_t exp(-s_t) L_t + s_t / 2, s_t learned from 0. That is the paper's form for classification; its regression form has
    exp(-s_t) / 2, a constant factor that s_t absorbs.
    """

    needs_finite = False

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(tasks))

    def combine(self, losses: Tensor) -> Tensor:
        """sum_t exp(-s_t) losses[t] + s_t / 2"""
        return (torch.exp(-self.log_variance) * losses + self.log_variance / 2).sum()


class RandomWeighting(Scalarization):
    """Random loss weighting (Lin et al. 2022, arXiv 2111.10603): fresh weights softmax(z), z ~ N(0, I), every step.

    Differs from the paper by the factor T, so that the expected objective is the plain sum and a learning rate carries over.
    One process: others would draw other weights.
    """

    needs_finite = False
    in_parallel = False

    def combine(self, losses: Tensor) -> Tensor:
        """T sum_t softmax(z)_t losses[t]"""
        return len(losses) * (torch.softmax(torch.randn_like(losses), dim=0) * losses).sum()


@register_balancer("fixed")
def fixed(tasks: Sequence[str]) -> Sum:
    """The tasks' own weights, constant."""
    return Sum()


@register_balancer("uncertainty")
def uncertainty(tasks: Sequence[str]) -> UncertaintyWeighting:
    """Learned homoscedastic uncertainty."""
    return UncertaintyWeighting(len(tasks))


@register_balancer("random")
def random(tasks: Sequence[str]) -> RandomWeighting:
    """Random weights every step: the baseline that methods which claim to balance should beat."""
    return RandomWeighting()
