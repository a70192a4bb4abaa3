"""Keeps what is not finite out of a run: a step with such a loss or gradient changes no weight, statistic, moment or schedule.

It is found before the optimizer. On a CPU, and for a balancer that needs finite losses, the host looks at once and leaves the
step out. Elsewhere nothing waits: the fused optimizers leave the step out themselves (`found_inf`), buffers are put back on the
device, and the host reads some steps later what became of it; the schedule is then put back by the step that it went too far.
As a save waits for what is not known yet, the rates of these few steps can depend on whether one came between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from mtl.balancing import Balancer
from mtl.batches import Step
from mtl.memory import copied

LATE = 2
"""Steps after which the host reads what a GPU has found; by then it is done with them."""
IN_A_ROW = 10
"""Steps that are left out, or in which a task explodes, after which training stops."""
EXPLODED = 2.0**24
"""A loss this many times the others': in their sum nothing is left of them, for fp32 keeps 24 bits."""


@dataclass(frozen=True)
class LeftOut:
    """A step that was left out: its unweighted losses, (T + 1,), its batches, and how many steps were begun after it before the
    host knew.
    """

    losses: list[float]
    step: Step
    ago: int = 0


@dataclass
class _Taken:
    """A step of which the host does not know yet what became: `verdict` is there once `done` is."""

    verdict: Tensor
    done: torch.Event | None
    step: Step
    schedule: dict[str, Any]
    rates: list[float]


class Guard:
    """Of one run.

    Args:
        model: whose buffers a forward pass changes.
        balancer: which remembers losses and gradients.
        optimizer: a fused one of torch's.
        schedule: stepped with it.
        weights: (T,), of the tasks' losses.
        late: steps after which the host looks; None: 0 on a CPU and for a balancer that needs finite losses, else `LATE`.

    Attributes:
        skipped: steps left out so far.
        in_a_row: of these, the last ones without one that was taken between them.
        exploding: task -> steps in a row in which it exploded.
        last: the last step left out, if none was taken since.
        counted: 1 where the last step was taken, else 0; on the device where the host does not know yet.
    """

    def __init__(
        self,
        model: nn.Module,
        balancer: Balancer,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        weights: Tensor,
        late: int | None = None,
    ) -> None:
        self.balancer, self.optimizer, self.schedule = balancer, optimizer, schedule
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.weights: list[float] = weights.tolist()
        looks = weights.device.type == "cpu" or balancer.needs_finite
        self.late = late if late is not None else (0 if looks else LATE)
        self.skipped, self.in_a_row = 0, 0
        self.exploding = [0] * len(self.weights)
        self.last: LeftOut | None = None
        self.counted: int | Tensor = 1
        self._largest = [0.0] * len(self.weights)
        self._buffers = [*model.buffers(), *balancer.buffers()]
        self._copies = [buffer.clone() for buffer in self._buffers]
        self._memory: dict[str, Any] = {}
        self._waiting: deque[_Taken] = deque()
        self._told = True

    def begin(self) -> None:
        """Before a step: take note of what its forward passes change."""
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)
        self._memory = copied(self.balancer.memory()) if self.late == 0 else {}

    def admits(self, losses: Sequence[Tensor]) -> bool:
        """Whether the balancer may see these losses: not, where the host looks at once, if one is not finite."""
        return self.late > 0 or bool(torch.stack([loss.detach() for loss in losses]).isfinite().all())

    @torch.no_grad()
    def update(self, losses: Tensor, step: Step) -> bool:
        """Step the optimizer and the schedule, unless a loss or a gradient is not finite; then all is as it was before `begin`.

        Args:
            losses: (T + 1,), unweighted, of each task, and the objective.
            step: what they are of.

        Returns:
            Whether the step was taken, or, where the host does not know yet, True.
        """
        bad = self._not_finite(losses)
        verdict = torch.cat([bad.to(losses.dtype).reshape(1), losses])
        if self.late == 0:
            taken = not bool(bad)
            if taken:
                self.optimizer.step()
                self.schedule.step()
            else:
                self._put_back(None)
                if self._memory:
                    self.balancer.recall(self._memory, losses.device)
            self.counted = int(taken)
            self._judge(verdict.tolist(), step)
            return taken
        self._put_back(bad)
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._waiting.append(_Taken(*_sent(verdict), step, deepcopy(self.schedule.state_dict()), rates))
        self.optimizer.step()
        self.schedule.step()
        self.counted = 1 - bad.int()
        if len(self._waiting) > self.late:
            self._read()
        return True

    def _not_finite(self, losses: Tensor) -> Tensor:
        """Whether a loss, a gradient or its square is not; on the device."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        sizes = torch._foreach_norm(gradients) if gradients else ()  # on a CPU a fifth of what the largest value takes
        squares = [size.to(losses.dtype).square() for size in sizes]  # which Adam keeps, each by itself
        return ~torch.stack([*squares, *losses]).isfinite().all()

    def settle(self) -> None:
        """Wait for what the host does not know yet: before a run is saved, and at the end of an epoch."""
        while self._waiting:
            self._read()

    def news(self) -> LeftOut | None:
        """The last step left out, once."""
        told, self._told = self._told, True
        return None if told else self.last

    def memory(self) -> dict[str, Any]:
        """To be saved with a run."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "exploding": self.exploding,
            "largest": self._largest,
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """Put back what `memory` gave."""
        self.skipped, self.in_a_row = memory["skipped"], memory["in_a_row"]
        self.exploding, self._largest = list(memory["exploding"]), list(memory["largest"])

    def _put_back(self, where: Tensor | None) -> None:
        for buffer, copy in zip(self._buffers, self._copies, strict=True):
            buffer.copy_(copy if where is None else torch.where(where, copy, buffer))

    def _read(self) -> None:
        taken = self._waiting.popleft()
        if taken.done is not None:
            taken.done.synchronize()
        values = taken.verdict.tolist()
        self._judge(values, taken.step)
        if values[0]:  # every later step was taken one place too far along the schedule
            later = [(one.schedule, one.rates) for one in self._waiting]
            now = (deepcopy(self.schedule.state_dict()), [group["lr"] for group in self.optimizer.param_groups])
            stands = [(taken.schedule, taken.rates), *later, now]
            for one, (schedule, rates) in zip(self._waiting, stands, strict=False):
                one.schedule, one.rates = schedule, rates
            schedule, rates = stands[-2]
            self.schedule.load_state_dict(schedule)
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    @property
    def behind(self) -> int:
        """Steps of which the host does not know yet what became."""
        return len(self._waiting)

    def _judge(self, verdict: list[float], step: Step) -> None:
        """Take note of what became of a step."""
        bad, losses = bool(verdict[0]), verdict[1:]
        if bad:
            self.skipped += 1
            self.in_a_row += 1
            self.last, self._told = LeftOut(losses, step, self.behind), False
            return
        self.in_a_row, self.last = 0, None
        weighted = [abs(weight * loss) for weight, loss in zip(self.weights, losses, strict=False)]
        reached = [max(pair) for pair in zip(self._largest, weighted, strict=True)]
        for t, size in enumerate(weighted):
            others = max((reached[s] for s in range(len(reached)) if s != t), default=0.0)
            self.exploding[t] = self.exploding[t] + 1 if 0 < others * EXPLODED < size else 0
        self._largest = [
            largest if count else max(largest, size)
            for largest, size, count in zip(self._largest, weighted, self.exploding, strict=True)
        ]


def _sent(verdict: Tensor) -> tuple[Tensor, torch.Event | None]:
    """On its way to the host, which does not wait for it, and what tells when it is there."""
    if verdict.device.type == "cpu":
        return verdict, None
    there = verdict.to("cpu", non_blocking=True)  # into pinned memory
    done = torch.Event(verdict.device)
    done.record()
    return there, done
