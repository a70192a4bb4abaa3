"""Losses and metrics: per task, over samples that carry its label."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from mtl.batches import Batch, first, in_order
from mtl.data import Samples
from mtl.errors import DataError, MTLError, PluginError
from mtl.memory import moved
from mtl.metrics import Meter
from mtl.model import MultiTaskModel, Outputs
from mtl.processes import ALONE, Processes
from mtl.scores import mean_of_scores
from mtl.seeding import seeded
from mtl.task import Task

TaskFigures = dict[str, Any]
"""Of one task on one split: `n` labels, `loss` and each metric; None for a metric that is not a number."""


def summed_loss(task: Task, output: Tensor, batch: Batch) -> Tensor:
    """Sum over the samples of a batch of a task's loss, each sample's averaged over its labels; missing ones count as zero.

    What is not labelled contributes exactly nothing, also to the gradient: `where` passes zero to what it does not select.

    Raises:
        PluginError: the loss is not one value per sample, or per label.
    """
    target, mask = batch.targets[task.name], batch.valid[task.name]
    loss = task.unreduced_loss(output, target)
    if loss.shape not in (target.shape[:1], target.shape) or (mask is not None and loss.ndim < mask.ndim):
        raise PluginError(
            f"the loss of task {task.name!r} must be unreduced, one value per sample or label, shape "
            f"{tuple(target.shape)}; found shape {tuple(loss.shape)}; give a loss with reduction='none'"
        )
    if mask is not None:
        loss = torch.where(mask.view(*mask.shape, *[1] * (loss.ndim - mask.ndim)), loss, 0.0)
    return loss.flatten(1).mean(1).sum() if loss.ndim > 1 else loss.sum()


class Predictor(Protocol):
    """What can be evaluated: a `MultiTaskModel`, or several of them as one."""

    tasks: tuple[Task, ...]
    training: bool

    def __call__(self, images: Mapping[str, Tensor]) -> Outputs: ...
    def present(self, datasets: Sequence[str]) -> list[Task]: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


@torch.no_grad()
def evaluate(
    model: Predictor,
    samples: Mapping[str, Samples],
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    between: Callable[[], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, TaskFigures]:
    """Task name -> its figures on these splits, dataset by dataset. Changes no buffer; restores the training mode. `between` is
    called after every batch. Several `processes` take the batches in turn; the first computes from what all of them found, in
    the order of one, and tells the others.
    """
    was_training = model.training
    model.eval()
    try:
        figures: dict[str, TaskFigures] = {}
        for name in sorted(samples):
            figures |= _evaluate_dataset(model, samples[name], batch_size, autocast, between, processes)
        return {task.name: figures[task.name] for task in model.tasks if task.name in figures}
    finally:
        model.train(was_training)


def _evaluate_dataset(
    model: Predictor,
    part: Samples,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    between: Callable[[], None] | None,
    processes: Processes,
) -> dict[str, TaskFigures]:
    tasks = model.present([part.dataset])
    seen = [_Seen(task, part) for task in tasks]
    shard = (processes.rank, processes.count)
    rounds = math.ceil(len(part) / batch_size / processes.count)
    for batch in itertools.islice(itertools.chain(in_order(part, batch_size, shard), itertools.repeat(None)), rounds):
        found = None
        if batch is not None:
            with autocast():
                outputs = model({part.dataset: batch.images}).outputs
            found = [of.found(outputs[of.task.name], batch) for of in seen]
        for theirs in processes.gather(found):
            for of, one in zip(seen, theirs or [], strict=False):
                of.add(*moved(one, part.images.device))
        if between is not None:
            between()
    return processes.first(lambda: _figures(seen, part))


class _Seen:
    """What was found of a task on a split so far."""

    def __init__(self, task: Task, part: Samples) -> None:
        self.task = task
        self.meter = Meter(task.all_metrics, task.head.labelled, part.images.device)
        self.loss = torch.zeros((), device=part.images.device)
        self.labels: int | Tensor = 0

    def found(self, output: Tensor, batch: Batch) -> tuple[Tensor, int | Tensor, Tensor, Tensor, Tensor | None]:
        """Of a batch: its summed loss, how many labels, predictions, targets, where there are labels."""
        name = self.task.name
        predictions = self.task.head.predictions(output)
        return summed_loss(self.task, output, batch), batch.labels(name), predictions, batch.targets[name], batch.valid[name]

    def add(self, loss: Tensor, labels: int | Tensor, predictions: Tensor, targets: Tensor, valid: Tensor | None) -> None:
        """What `found` gave of the next batch."""
        self.loss += loss
        self.labels = self.labels + labels
        self.meter.update(predictions, targets, valid)


def _figures(seen: Sequence[_Seen], part: Samples) -> dict[str, TaskFigures]:
    figures = {}
    for of in seen:
        task, n = of.task, int(of.labels)  # without those of images that could not be read
        if not n:
            raise DataError(f"dataset {part.dataset!r}, task {task.name!r}: no image with its label can be read")
        loss = of.loss.item() / (len(part) * part.labelled_share[task.name] * n / part.labelled[task.name])
        try:
            computed = of.meter.compute()
        except Exception as error:
            raise DataError(
                f"dataset {part.dataset!r}, task {task.name!r}: a metric cannot be computed from {n} labels: "
                f"{type(error).__name__}: {error}"
            ) from error
        figures[task.name] = {"n": n, "loss": loss, **computed}
    return figures


@torch.no_grad()
def try_tasks(
    model: MultiTaskModel, samples: Mapping[str, Samples], autocast: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Run head, loss, predictions, metrics and decoding of every task on two samples, before anything is trained.

    Raises:
        MTLError: one of them fails; with the task's name and what it raised.
    """
    for name, part in samples.items():
        batch = first(part, 2)
        model.eval()
        with autocast():
            outputs = model({name: batch.images}).outputs
        for task in model.present([name]):
            try:
                summed_loss(task, outputs[task.name], batch)
                meter = Meter(task.all_metrics, task.head.labelled, part.images.device)
                meter.update(task.head.predictions(outputs[task.name]), batch.targets[task.name], None)
                with warnings.catch_warnings(action="ignore"):  # two samples may lack a class
                    meter.compute()
                task.head.decode(outputs[task.name])
            except MTLError:
                raise
            except Exception as error:
                raise PluginError(
                    f"task {task.name!r}: its head, loss or metrics fail on two samples: {type(error).__name__}: {error}"
                ) from error


def has_unused(
    model: MultiTaskModel, samples: Mapping[str, Samples], autocast: Callable[[], AbstractContextManager[Any]]
) -> bool:
    """Whether there are parameters to be trained that no output of the network depends on, as it is in training."""
    images = {name: first(part, 2).images for name, part in samples.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    with seeded(0, "unused"), autocast():
        outputs = functional_call(model, buffers, (images,)).outputs
    total = torch.stack([output.float().sum() for output in outputs.values()]).sum()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return any(gradient is None for gradient in torch.autograd.grad(total, trained, allow_unused=True))


def mean_score(tasks: tuple[Task, ...], figures: Mapping[str, TaskFigures]) -> float | None:
    """`mean_of_scores` of the tasks that have figures, as those of a dataset without this split have not; None where none has.

    Raises:
        DataError: a score is not a number.
    """
    if not figures:
        return None
    scores = {task.name: figures[task.name][task.score_name] for task in tasks if task.name in figures}
    if bad := [name for name, score in scores.items() if score is None]:
        raise DataError(
            f"the score of {', '.join(bad)} is not a number on this split: its labels may lack a class there; hold out more "
            "data, or give the task another score"
        )
    return round(mean_of_scores(scores.values()), 7)
