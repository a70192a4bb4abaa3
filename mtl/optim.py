"""Optimizers, parameter groups, the L2 term and learning-rate schedules.

Three groups, by what a parameter is for: `weights` (convolution and fully connected weights: the only ones that are decayed),
`other` (biases, norms), `exchange` (an exchange unit's, with a learning rate of its own, never decayed), and `balancer` where
one has parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.optim import lr_scheduler

from mtl.options import Options


class OptimConfig(Options):
    """How weights are updated."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """torch's Adam, AdamW or SGD."""
    lr: float = Field(1e-3, gt=0)
    """Base learning rate; the peak of a schedule."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum; beta1 of Adam and AdamW."""
    l2: float = Field(0.0, ge=0)
    """Adds l2/2 |w|^2 of convolution and fully connected weights to the loss; 1e-5 in the reference protocol.
    Logged as `train/loss/l2`; `train/loss/total` is without it."""
    weight_decay: float | None = Field(None, ge=0)
    """Decoupled decay of the same weights (Loshchilov and Hutter 2019), for adamw; null: 0.01 there."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    """Of the learning rate, over all steps of the run."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs over which the rate rises linearly before `constant` or `cosine` takes over; of `one_cycle` it is the whole rise
    (0: 30 % of the run, torch's default)."""
    clip_norm: float | None = Field(None, gt=0)
    """Scale all gradients down to this global norm where they exceed it; null: never."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, by name (`towers.fashion_group`, `units`) or pattern (`towers.*.layer1.*`); batch norm
    whose parameters are frozen keeps its running statistics too. `mtl train --dry-run --json` lists the names."""
    accumulate: int = Field(1, ge=1)
    """Batches whose gradients are added up for one update."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _decay_needs_adamw(self) -> OptimConfig:
        if self.weight_decay is not None and self.name != "adamw":
            raise ValueError(
                f"weight_decay={self.weight_decay} is decoupled decay, which name='adamw' has; with {self.name!r} use l2"
            )
        return self


def make_optimizer(
    config: OptimConfig,
    model: nn.Module,
    exchange: Iterable[nn.Parameter],
    balancer: Iterable[nn.Parameter],
    exchange_factor: float,
) -> torch.optim.Optimizer:
    """The optimizer over `model` and `balancer`, in named groups (`group["name"]`), empty ones left out.

    Args:
        exchange: parameters of `model` that belong to exchange units.
        balancer: those of the balancer's own parameters that the optimizer is to step.
        exchange_factor: their learning rate over the base rate.
    """
    own = {id(p) for p in exchange}
    sorted_in: dict[str, list[nn.Parameter]] = {"weights": [], "other": [], "exchange": [], "balancer": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in own:
            group = "exchange"
        elif parameter.ndim >= 2 and name.endswith("weight"):
            group = "weights"
        else:
            group = "other"
        sorted_in[group].append(parameter)
    sorted_in["balancer"] += balancer
    decay = 0.01 if config.weight_decay is None else config.weight_decay
    groups = [
        {
            "name": name,
            "params": parameters,
            "lr": config.lr * (exchange_factor if name == "exchange" else 1.0),
            "weight_decay": decay if name == "weights" and config.name == "adamw" else 0.0,
        }
        for name, parameters in sorted_in.items()
        if parameters
    ]
    match config.name:
        case "adam":
            return torch.optim.Adam(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)
        case "sgd":
            made = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
            if config.momentum:  # it would make its first moments without looking whether the step is left out
                for p in (p for group in made.param_groups for p in group["params"]):
                    made.state[p]["momentum_buffer"] = torch.zeros_like(p)
            return made


def make_schedule(
    config: OptimConfig, optimizer: torch.optim.Optimizer, steps: int, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """The schedule over `steps` updates, stepped once after each."""
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps - 1)
    if config.schedule == "one_cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        rise = max(warmup, 2) / steps if warmup and steps > 2 else 0.3  # torch's phases cannot be of one step
        return lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=max(steps, 2), pct_start=rise, cycle_momentum=False)
    after: lr_scheduler.LRScheduler
    if config.schedule == "cosine":
        after = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps - warmup, 1))
    else:
        after = lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    if not warmup:
        return after
    rising = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rising, after], milestones=[warmup])


@torch.no_grad()
def lay_out_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give each gradient the memory layout of its parameter, as `Tensor.backward` does and `torch.autograd.grad` need not.

    The fused optimizers read both as flat arrays: on a channels-last weight, a gradient laid out otherwise updates the wrong
    numbers, silently on the CPU.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(gradient)


class L2:
    """The gradient of l2/2 |w|^2 over the group `weights`, added to what the losses left there.

    The same as having the term in the loss, at the cost of one fused addition; under Adam that is not decoupled decay.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, l2: float) -> None:
        self.l2 = l2
        self.weights: list[nn.Parameter] = next((g["params"] for g in optimizer.param_groups if g["name"] == "weights"), [])

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add l2 * w to the gradient, for weights that have a gradient."""
        pairs = [(w.grad, w) for w in self.weights if w.grad is not None]
        if self.l2 and pairs:
            torch._foreach_add_([gradient for gradient, _ in pairs], [w for _, w in pairs], alpha=self.l2)

    @torch.no_grad()
    def value(self) -> Tensor:
        """l2/2 |w|^2 now, a scalar on the device."""
        norms = torch._foreach_norm(list(self.weights))
        return self.l2 / 2 * torch.stack(norms).square().sum()
