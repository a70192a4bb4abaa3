"""Losses and metrics: per task, over samples that carry its label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mtl.batches import Batch, in_order
from mtl.data import Samples
from mtl.metrics import Meter
from mtl.model import MultiTaskModel
from mtl.task import Task

TaskFigures = dict[str, Any]
"""Of one task on one split: `n` labelled samples, `loss` and each metric; figures are None where n is 0."""


def summed_loss(task: Task, output: Tensor, batch: Batch) -> Tensor:
    """Sum of a task's losses over the samples of a batch that carry its label: a scalar, zero where none does.

    Unlabelled samples contribute exactly nothing, also to the gradient: `where` passes zero to what it does not select.
    """
    loss = task.unreduced_loss(output, batch.targets[task.name])
    mask = batch.valid[task.name]
    if mask is not None:
        loss = torch.where(mask.view(-1, *[1] * (loss.ndim - mask.ndim)), loss, 0.0)
    return loss.sum()


@torch.no_grad()
def evaluate(
    model: MultiTaskModel,
    samples: Mapping[str, Samples],
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, TaskFigures]:
    """Task name -> its figures on these splits, dataset by dataset. Changes no buffer; restores the training mode."""
    was_training = model.training
    model.eval()
    try:
        figures: dict[str, TaskFigures] = {}
        for name in sorted(samples):
            figures |= _evaluate_dataset(model, samples[name], batch_size, autocast)
        return {task.name: figures[task.name] for task in model.tasks if task.name in figures}
    finally:
        model.train(was_training)


def _evaluate_dataset(
    model: MultiTaskModel, part: Samples, batch_size: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> dict[str, TaskFigures]:
    tasks = model.present([part.dataset])
    meters = {task.name: Meter(task.all_metrics, part.images.device) for task in tasks}
    losses = {task.name: torch.zeros((), device=part.images.device) for task in tasks}
    for batch in in_order(part, batch_size):
        with autocast():
            outputs = model({part.dataset: batch.images})
        for task in tasks:
            output = outputs[task.name]
            losses[task.name] += summed_loss(task, output, batch)
            predictions, target, mask = task.head.predictions(output), batch.targets[task.name], batch.valid[task.name]
            if mask is not None:
                predictions, target = predictions[mask], target[mask]
            if len(target):
                meters[task.name].update(predictions, target)
    figures = {}
    for task in tasks:
        n = part.labelled[task.name]
        computed = meters[task.name].compute() if n else {metric.name: None for metric in task.all_metrics}
        figures[task.name] = {"n": n, "loss": losses[task.name].item() / n if n else None, **computed}
    return figures


def mean_score(tasks: tuple[Task, ...], figures: Mapping[str, TaskFigures]) -> float | None:
    """Mean over tasks of each task's bounded, higher-is-better score; tasks without a labelled sample are left out."""
    scores = [figures[task.name][task.score_name] for task in tasks if task.name in figures]
    scores = [score for score in scores if score is not None]
    return sum(scores) / len(scores) if scores else None
