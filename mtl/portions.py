"""Which of a dataset's training samples are held out for validation, which are used, and which of their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtl.datasets import Dataset
from mtl.errors import DataError
from mtl.seeding import permutation
from mtl.subsets import how_many, stratified
from mtl.task import Task

Masks = Mapping[str, Tensor]
"""Task -> bool, (N,) or of the labels' shape: where a sample has its label."""


@dataclass(frozen=True)
class Portion:
    """What of the training data is held out, and how much of the rest is used: the same samples whatever the run's seed and its
    other tasks.

    Args:
        validation: how many training samples are held out (an int), or which share of them (a float below 1); 0: none. A
            dataset that has its own validation split uses that instead.
        fraction: which share of the others is used. Stratified and nested (`mtl.subsets`), as is `labelled`.
        labelled: of a task, how many of its labels are used: a count, or a share as a float; all where nothing is said.
        seed: decides which samples these are: one for all arms and seeds of a comparison.
    """

    validation: int | float = 0
    fraction: float = 1.0
    labelled: Mapping[str, int | float] = field(default_factory=dict)
    seed: int = 0


def label_mask(data: Dataset, task: Task) -> Tensor:
    """Where samples have the label of a task."""
    return data.valid.get(task.target, torch.ones(len(data), dtype=torch.bool))


def subset(data: Dataset, masks: Masks, index: Tensor) -> tuple[Dataset, dict[str, Tensor]]:
    """The samples at these positions."""
    return data.subset(index), {task: mask[index] for task, mask in masks.items()}


def used(name: str, train: Dataset, tasks: Sequence[Task], masks: Masks, portion: Portion) -> tuple[Dataset, Masks]:
    """What a run trains on of what is left beside validation, and its labels.

    Raises:
        DataError: more labels wanted than there are.
    """
    if portion.fraction < 1:
        strata = [_stratum(train, target) for target in sorted(train.labels) if _in_strata(train, target)]
        everything = torch.arange(len(train))
        count = max(2, how_many(float(portion.fraction), len(train)))
        train, masks = subset(train, masks, stratified(strata, everything, count, portion.seed, "fraction", name))
    masks = dict(masks)
    for task in tasks:
        if (wanted := portion.labelled.get(task.name)) is None:
            continue
        having = masks[task.name].reshape(len(train), -1).any(1).nonzero().flatten()
        count = max(1, how_many(wanted, len(having)))
        if count > len(having):
            raise DataError(
                f"data.labelled: {count} labels of task {task.name!r} are wanted, and {len(having)} training samples of "
                f"dataset {name!r} carry one; ask for fewer, or for a share such as 0.5"
            )
        strata = [_stratum(train, task.target)] if _in_strata(train, task.target) else []
        chosen = torch.zeros(len(train), dtype=torch.bool)
        chosen[stratified(strata, having, count, portion.seed, "labelled", name, task.target)] = True
        masks[task.name] = masks[task.name] & chosen.view(-1, *[1] * (masks[task.name].ndim - 1))
    any_label = torch.stack([mask.reshape(len(train), -1).any(1) for mask in masks.values()]).any(0)
    if any_label.all() or not any_label.any():
        return train, masks
    return subset(train, masks, any_label.nonzero().flatten())


def _in_strata(data: Dataset, target: str) -> bool:
    labels = data.labels[target]
    return labels.ndim == 1 and not labels.is_floating_point()


def _stratum(data: Dataset, target: str) -> Tensor:
    """A sample's label of this target as an integer; -1 where it has none."""
    labels, mask = data.labels[target].long(), data.valid.get(target)
    return labels if mask is None or mask.ndim > 1 else torch.where(mask, labels, -1)


def carve(name: str, train: Dataset, portion: Portion) -> tuple[Tensor, Tensor]:
    """The positions that stay and those that are held out, ascending."""
    total = len(train)
    count = how_many(portion.validation, total)
    if not 0 < count <= total - 2:
        raise DataError(
            f"dataset {name!r}: data.validation={portion.validation} holds out {count} of {total} training images; at least "
            "one must be held out and two must stay; use a share such as 0.1, or 0 to select the last epoch"
        )
    if train.groups is None:
        order = permutation(total, portion.seed, "validation", name)
        return order[count:].sort().values, order[:count].sort().values
    _, group, sizes = train.groups.unique(return_inverse=True, return_counts=True)
    order = permutation(len(sizes), portion.seed, "validation", name)
    taken = sizes[order].cumsum(0)  # samples in the first groups
    whole = int((taken - count).abs().argmin()) + 1
    if not int(taken[whole - 1]) <= total - 2:
        raise DataError(
            f"dataset {name!r}: data.validation={portion.validation} cannot be held out in whole groups: {len(sizes)} groups "
            f"have up to {int(sizes.max())} of {total} training images; use fewer, or give more groups"
        )
    held_out = torch.isin(group, order[:whole])
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
