"""What a metric is to this framework: a name, a direction, a torchmetrics object, and whether it is the task's score.

torchmetrics is imported when the first metric is made (it costs about two seconds), so a `Metric` is cheap to declare.
Not covered: metrics over several tasks at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mtl.errors import MTLError

if TYPE_CHECKING:
    import torchmetrics

Labelled = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Args:
        name: as it appears in logs and results, with the unit where there is one ("rmse_years").
        better: the direction, "higher" or "lower".
        make: makes the torchmetrics object that computes it from (predictions, targets).
        score: this is the bounded figure, at most 1 and higher is better, by which weights are selected. Exactly one metric of
            a task carries it.
        relative: its relative change is what `delta_m` takes of this task, in place of the score's: for scores that may come
            near zero or below (R^2), whose relative change says nothing. At most one metric of a task.
    """

    name: str
    better: Literal["higher", "lower"]
    make: Callable[[], torchmetrics.Metric]
    score: bool = False
    relative: bool = False

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise MTLError(f"metric {self.name!r}: better={self.better!r}; it is 'higher' or 'lower'")
        if self.score and self.better != "higher":
            raise MTLError(f"metric {self.name!r} is the score, so higher must be better; found better={self.better!r}")


def torchmetric(name: str, of: str = "classification", **options: Any) -> Callable[[], torchmetrics.Metric]:
    """Makes torchmetrics' metric `name` of its module `of` with these options, whenever it is called. Pickles.

    >>> Metric("accuracy", "higher", torchmetric("MulticlassAccuracy", num_classes=3), score=True).name
    'accuracy'
    """
    return partial(_make, name, of, options)


def _make(name: str, of: str, options: Mapping[str, Any]) -> torchmetrics.Metric:
    library = import_module(f"torchmetrics.{of}")  # two seconds, paid when the first metric is made
    return getattr(library, name)(**options)  # type: ignore[no-any-return]


def score_of(task: str, metrics: Iterable[Metric]) -> Metric:
    """The one metric of a task that carries the score.

    Raises:
        MTLError: there is none, or more than one, or two metrics share a name.
    """
    metrics = tuple(metrics)
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names):
        raise MTLError(f"task {task!r}: two metrics share a name: {', '.join(names)}")
    scores = [metric for metric in metrics if metric.score]
    if len(scores) != 1:
        found = ", ".join(metric.name for metric in scores) or "none"
        raise MTLError(f"task {task!r}: exactly one metric must have score=True; found {found} of: {', '.join(names)}")
    return scores[0]


def relative_of(metrics: Iterable[Metric]) -> Metric:
    """The metric of a task whose relative change counts: the one that says so, else the score."""
    metrics = tuple(metrics)
    return next((metric for metric in metrics if metric.relative), next(metric for metric in metrics if metric.score))


class Meter:
    """The metrics of one task over one split, in float64 where the device has it. Nothing leaves the device until `compute`.

    Predictions are gathered and handed on in large pieces, because picking the labelled ones, and some metrics, make the host
    wait for the device: once a split, as a rule, instead of once a batch.

    Args:
        metrics: of the task.
        labelled: (predictions, targets, valid mask) -> the predictions and targets that the metrics receive.
        device: of the predictions.
        gathered: numbers to gather before the metrics are updated.
    """

    def __init__(self, metrics: Iterable[Metric], labelled: Labelled, device: torch.device, gathered: int = 1 << 24) -> None:
        self._wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self._metrics = {metric.name: metric.make().to(device).set_dtype(self._wide) for metric in metrics}
        for part in (part for metric in self._metrics.values() for part in metric.modules()):
            if hasattr(part, "distributed_available_fn"):
                vars(part)["distributed_available_fn"] = (
                    _never  # what other processes saw is brought here before it is computed
                )
        self._labelled = labelled
        self._limit = gathered
        self._parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._count = 0

    def update(self, predictions: Tensor, targets: Tensor, valid: Tensor | None) -> None:
        """Add a batch: predictions as the head gives them, targets (B, ...), and where labels exist (None: everywhere)."""
        self._parts.append((predictions, targets, valid))
        self._count += predictions.numel()
        if self._count >= self._limit:
            self._flush()

    def compute(self) -> dict[str, float | None]:
        """The figures so far; None for one that is not a number."""
        self._flush()
        values = {name: float(f"{float(metric.compute()):.8g}") for name, metric in self._metrics.items()}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def _flush(self) -> None:
        if not self._parts:
            return
        predictions = torch.cat([part[0] for part in self._parts])
        targets = torch.cat([part[1] for part in self._parts])
        if masks := [part[2] for part in self._parts if part[2] is not None]:  # a batch may lack one that others have
            whole = [torch.ones_like(part[1], dtype=torch.bool) if masks[0].ndim > 1 else _all(part[1]) for part in self._parts]
            given = [ones if part[2] is None else part[2] for part, ones in zip(self._parts, whole, strict=True)]
            predictions, targets = self._labelled(predictions, targets, torch.cat(given))
        predictions, targets = (x.to(self._wide) if x.is_floating_point() else x for x in (predictions, targets))
        self._parts, self._count = [], 0
        if len(targets):
            for metric in self._metrics.values():
                metric.update(predictions, targets)


def _never() -> bool:
    return False


def _all(targets: Tensor) -> Tensor:
    """(B,), true."""
    return torch.ones(len(targets), dtype=torch.bool, device=targets.device)
