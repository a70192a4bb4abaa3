"""A task: one dataset, one of its targets, and the head that predicts it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from mtl.errors import MTLError, PluginError
from mtl.heads import Head
from mtl.metrics import Metric, score_of
from mtl.options import Options
from mtl.registry import TASKS

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A named prediction problem, as a plugin defines it.

    Args:
        dataset: the registered name of the dataset.
        target: which of the dataset's labels this task predicts; empty: the one of the task's name.
        head: what it predicts and how; see `mtl.heads`.
        loss: (output, target) -> one unreduced loss per label; None: the head's own. Output and target are as the head has
            them: of `Regression` both are in the target's own unit, so divide by a scale if the task is summed with others.
        metrics: in place of the head's own (`[*head.metrics(), mine]` adds to them). Exactly one must carry the score.
        weight: factor of this task's loss in the sum; positive.
        name: filled in from the registered name.
    """

    dataset: str
    target: str
    head: Head
    loss: Loss | None = None
    metrics: Sequence[Metric] | None = None
    weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.head, Head):
            raise MTLError(f"a task's head must be an mtl.Head, such as mtl.Classification(...); found {self.head!r}")
        for word in ("dataset", "target"):
            if not isinstance(getattr(self, word), str):
                raise MTLError(f"a task's {word} is the name of one, a string; found {getattr(self, word)!r}")
        if self.loss is not None and not callable(self.loss):
            raise MTLError(f"a task's loss must be callable as (output, target); found {self.loss!r}")
        if not (isinstance(self.weight, int | float) and math.isfinite(self.weight) and self.weight > 0):
            raise MTLError(f"a task's weight must be a positive number; found {self.weight!r}")
        score_of(self.name or self.target, self.all_metrics)

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """The metrics in force."""
        return tuple(self.metrics) if self.metrics is not None else self.head.metrics()

    @property
    def score_name(self) -> str:
        """Name of the metric that is this task's score."""
        return score_of(self.name, self.all_metrics).name

    def unreduced_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """One loss per label: (B,), or the target's shape."""
        return (self.loss or self.head.loss)(output, target)


def check_name(what: str, name: str) -> None:
    """Refuse a name that torch modules have a use for: tasks and datasets name modules, and so parameters.

    Raises:
        PluginError: with a name that would work.
    """
    if hasattr(nn.ModuleDict, name):
        raise PluginError(f"{what} name {name!r} is an attribute of torch modules; call it {name}_{what}, say")


def make_task(name: str, options: Options | None = None, weight: float | None = None, of: str = "") -> Task:
    """The registered task `name` (or the registered `of` under that name), made and validated, with its weight replaced where
    one is given.

    Raises:
        PluginError: a name that is taken, unknown, broken, or not giving a `Task`.
    """
    check_name("task", name)
    if name in ("mean", "score"):
        raise PluginError(f"task name {name!r} is what figures over all tasks are called; call it {name}_task, say")
    plugin = TASKS.get(of or name)
    try:
        task = plugin.create(options=options)
    except PluginError:
        raise
    except MTLError as error:
        raise PluginError(f"{plugin}: {error}") from error
    if not isinstance(task, Task):
        raise PluginError(f"{plugin} must give an mtl.Task; found {type(task).__name__}")
    return replace(task, name=name, target=task.target or name, weight=task.weight if weight is None else weight)
