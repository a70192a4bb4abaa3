"""From what a dataset plugin returns to checked samples on the training device, split into training, validation and test.

Everything a user can get wrong in data is found here, before the first step: shapes that differ, splits that are empty, labels
out of range, not finite or missing, classes never seen. Of image files only that they exist, and of very many not of all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import combinations
from pathlib import Path
from typing import Protocol

import torch
from pydantic import BaseModel
from torch import Tensor

from mtl.columns import SetAside
from mtl.datasets import Dataset
from mtl.errors import DataError, MTLError, PluginError, unknown
from mtl.files import Reading
from mtl.heads import Head
from mtl.portions import Masks, Portion, carve, label_mask, subset, used
from mtl.registry import Plugin
from mtl.seeding import Draws
from mtl.task import Task


class Split(StrEnum):
    """The parts of a dataset. Weights are selected on `VAL`, which is carved from `TRAIN` where a dataset has none."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class LazyImages(Protocol):
    """Images that are not in memory as a tensor (N, C, H, W), and are used as one: files, or a file of all."""

    dtype: torch.dtype
    device: torch.device

    def __len__(self) -> int: ...
    @property
    def shape(self) -> torch.Size: ...
    def __getitem__(self, index: Tensor | slice) -> Tensor: ...
    def batches(
        self, bounds: Sequence[tuple[int, int]], order: Tensor | None = None, draws: Draws | None = None
    ) -> Iterator[tuple[Tensor, list[int]]]: ...
    def brought_to(self, shape: tuple[int, ...]) -> LazyImages: ...


@dataclass(frozen=True)
class Samples:
    """One split of one dataset for the training device, with the targets of the tasks that use it.

    `images` is a tensor (N, ...) on the device, or files that are decoded when they are asked for; `image_batches` is the way
    to all of them.

    `classes[target]` is what a target's labels stand for, where the dataset says so.
    `valid[task]` is bool, (N,) or of the target's shape, or None where every label exists; `labelled[task]` counts those that
    do, and `labelled_share[task]` is the part of all labels that do.
    """

    dataset: str
    images: Tensor | LazyImages
    targets: Mapping[str, Tensor]
    valid: Mapping[str, Tensor | None]
    labelled: Mapping[str, int]
    labelled_share: Mapping[str, float]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    set_aside: SetAside = field(default_factory=SetAside)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W) or (D,)."""
        return tuple(self.images.shape[1:])

    def image_batches(
        self, bounds: Sequence[tuple[int, int]], order: Tensor | None = None, draws: Draws | None = None
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """Images (B, ...) on the device for each (start, stop), one batch after the other; files are decoded ahead. With the
        positions in it of images that could not be read, which are not to be counted.

        Args:
            bounds: of each batch.
            order: int64 on the CPU, of the positions that `bounds` are about; None: as they are, then without a copy.
            draws: from what images that draw at random do so; None: always alike.
        """
        if not isinstance(self.images, Tensor):
            yield from self.images.batches(bounds, order, draws)
            return
        order = None if order is None else order.to(self.images.device)
        for start, stop in bounds:
            yield self.images[start:stop] if order is None else self.images.index_select(0, order[start:stop]), []


def data_root(configured: str | Path | None = None) -> Path:
    """Where datasets live: the config's `data.root`, else the environment's MTL_DATA_ROOT, else `./data`."""
    return Path(configured or os.environ.get("MTL_DATA_ROOT") or "data")


def read_splits(
    plugin: Plugin,
    root: Path,
    options: BaseModel | None,
    splits: Sequence[Split] = tuple(Split),
    validation: bool = True,
) -> dict[Split, Dataset]:
    """The splits of a dataset as its plugin gives them.

    Args:
        splits: which ones are wanted; those that the plugin does not declare are left out.
        validation: whether samples are wanted to validate on; of a dataset that has none for it, training ones are read then.

    Raises:
        DataError, PluginError: naming dataset, split and what is wrong.
    """
    declared = plugin.details["splits"]
    if Split.TRAIN not in declared or not set(declared) <= set(Split):
        raise PluginError(f"{plugin} declares splits {tuple(declared)}; they are train, and val and test where it has them")
    needed = [split for split in splits if split in declared and (validation or split is not Split.VAL)]
    found = {split: load_dataset(plugin, split, root, options) for split in needed}
    if validation and Split.VAL in splits and found.get(Split.VAL) is None and Split.TRAIN not in found:
        found[Split.TRAIN] = load_dataset(plugin, Split.TRAIN, root, options)
    return {split: data for split in Split if (data := found.get(split)) is not None}


def checked_splits(
    name: str,
    parts: Mapping[Split, Dataset],
    tasks: Sequence[Task],
    portion: Portion,
    device: torch.device | str = "cpu",
    splits: Sequence[Split] = tuple(Split),
    reading: Reading | None = None,
) -> dict[Split, Samples]:
    """A dataset's splits with validation carved from training where there is none, of training the portion that is used,
    checked and moved. Training samples on which no task has a label are left out.

    Args:
        name: of the dataset.
        parts: what `read_splits` gave of it.
        tasks: those that use it.
        portion: what is held out, and how much of the rest is used.
        splits: which ones are wanted.
        reading: how image files are read; None: by this process, when they are asked for, and all of them must be readable.

    Returns:
        Of those wanted: `TRAIN`, `VAL` where the dataset has it or some are held out, and `TEST` where it has it.

    Raises:
        DataError: naming dataset, split, task and what is wrong.
    """
    parts = dict(parts)
    classes = next((part.classes for part in parts.values()), {})
    for split, part in parts.items():
        if part.classes != classes:
            raise DataError(f"dataset {name!r}: its splits name different classes: {classes}, but {split} {part.classes}")
    _check_groups(name, parts)
    tasks = [replace(task, head=named(task, classes)) for task in tasks]
    masks: dict[Split, Masks] = {split: {task.name: label_mask(parts[split], task) for task in tasks} for split in parts}
    if Split.TRAIN in parts:
        _check(name, Split.TRAIN, parts[Split.TRAIN], tasks, masks[Split.TRAIN], "cpu")  # whole: positions are the plugin's own
    if portion.validation and Split.TRAIN in parts and Split.VAL not in parts:
        kept, held_out = carve(name, parts[Split.TRAIN], portion)
        parts[Split.VAL], masks[Split.VAL] = subset(parts[Split.TRAIN], masks[Split.TRAIN], held_out)
        parts[Split.TRAIN], masks[Split.TRAIN] = subset(parts[Split.TRAIN], masks[Split.TRAIN], kept)
    if Split.TRAIN in splits:
        parts[Split.TRAIN], masks[Split.TRAIN] = used(name, parts[Split.TRAIN], tasks, masks[Split.TRAIN], portion)
    samples = {
        split: _check(name, split, parts[split], tasks, masks[split], device, reading) for split in splits if split in parts
    }
    described = {split: (part.shape, part.images.dtype) for split, part in samples.items()}
    if len(set(described.values())) > 1:
        found = ", ".join(f"{split} {shape} {dtype}" for split, (shape, dtype) in described.items())
        raise DataError(f"dataset {name!r}: its splits differ in shape or type: {found}; bring them to one")
    return samples


def _check_groups(name: str, parts: Mapping[Split, Dataset]) -> None:
    """What belongs together is in one split.

    Raises:
        DataError: it is in two.
    """
    grouped = {split: part.groups.unique() for split, part in parts.items() if part.groups is not None}
    for one, other in combinations(grouped, 2):
        if both := int(torch.isin(grouped[one], grouped[other]).sum()):
            raise DataError(
                f"dataset {name!r}: {both:,} groups are in both {one} and {other}: figures on what belongs to training "
                "samples say nothing about others; move each group to one split, or give no groups"
            )


def load_dataset(plugin: Plugin, split: Split, root: Path, options: BaseModel | None) -> Dataset | None:
    """One split as the plugin gives it; None where it says that its options leave none for validation or testing.

    Raises:
        DataError, PluginError: there is no such split, or the plugin failed; naming dataset and split.
    """
    if split not in plugin.details["splits"]:
        raise DataError(f"{plugin}: " + unknown("split", split, plugin.details["splits"]))
    try:
        data = plugin.create(split, root, options=options)
    except PluginError as error:
        raise PluginError(f"{split} split: {error}") from error
    except MTLError as error:
        where = "" if str(root) in str(error) else f" (the data root is {root})"
        raise DataError(f"dataset {plugin.name!r}, {split} split: {error}{where}") from error
    if data is None and split is not Split.TRAIN:
        return None
    if not isinstance(data, Dataset):
        raise PluginError(
            f"{plugin} must give an mtl.ArrayDataset, mtl.ImageFiles or mtl.TorchDataset for the {split} split; found "
            f"{type(data).__name__}; a dataset without that split leaves it out of register_dataset(..., splits=(...))"
        )
    return data


def _check(
    name: str,
    split: Split,
    data: Dataset,
    tasks: Sequence[Task],
    masks: Masks,
    device: torch.device | str,
    reading: Reading | None = None,
) -> Samples:
    where = f"dataset {name!r}, {split} split"
    if len(data) < (2 if split is Split.TRAIN else 1):
        raise DataError(f"{where}: {len(data)} images; there must be some" + (" (two to train)" if len(data) else ""))
    targets: dict[str, Tensor] = {}
    valid: dict[str, Tensor | None] = {}
    labelled: dict[str, int] = {}
    labelled_share: dict[str, float] = {}
    for task in tasks:
        if task.target not in data.labels:
            raise DataError(f"{where}: task {task.name!r} wants " + unknown("target", task.target, data.labels))
        labels, seen = data.labels[task.target], masks[task.name]
        try:
            labels, seen = _renumbered(labels, seen, data.classes.get(task.target), task.head)
            target = task.head.targets(labels, seen)
            if not seen.any():
                raise DataError("no sample is labelled")
        except DataError as error:
            raise DataError(f"{where}, task {task.name!r}: {error}") from error
        targets[task.name] = target.to(device)
        valid[task.name] = None if seen.all() else seen.to(device)
        labelled[task.name] = int(seen.sum())
        labelled_share[task.name] = labelled[task.name] / seen.numel()
    return Samples(name, data.placed(device, reading), targets, valid, labelled, labelled_share, data.classes, data.set_aside)


def named(task: Task, classes: Mapping[str, tuple[str, ...]]) -> Head:
    """A task's head, for what the dataset says of its target's classes."""
    if task.target not in classes:
        return task.head
    try:
        return task.head.named(classes[task.target])
    except DataError as error:
        raise DataError(f"dataset {task.dataset!r}, task {task.name!r}: {error}") from error


def _renumbered(labels: Tensor, seen: Tensor, names: tuple[str, ...] | None, head: Head) -> tuple[Tensor, Tensor]:
    """Labels that stand for `names`, and their mask, as the head numbers them: one that was restored may know more, or in
    another order. Of columns that have names the head takes those that it names.

    Raises:
        DataError: a class that occurs and that the head does not know, or a column that it names and that there is not.
    """
    known, wanted = head.class_names(), head.column_names()
    if names is not None and wanted is not None and names != wanted and labels.ndim == 2 and labels.shape[1] == len(names):
        if missing := [name for name in wanted if name not in names]:
            raise DataError(unknown("column", missing[0], names))
        columns = [names.index(name) for name in wanted]
        return labels[:, columns], seen if seen.ndim == 1 else seen[:, columns]
    if names is None or known is None or names == known or labels.is_floating_point() or labels.ndim != 1:
        return labels, seen
    place = torch.tensor([known.index(name) if name in known else -1 for name in names])
    inside = (labels >= 0) & (labels < len(names))
    found = torch.where(inside, place[torch.where(inside, labels, 0).long()], labels.long())
    if (strange := inside & seen & (found < 0)).any():
        new = names[int(labels[strange][0])]
        raise DataError(f"class {new!r} is none of those that the task knows: {', '.join(known)}")
    return found, seen


def fit_heads(tasks: Sequence[Task], training: Mapping[str, Samples]) -> list[Task]:
    """The tasks, their heads with what they take from the training split (dataset name -> samples).

    Raises:
        DataError: a head that cannot be learned from its training targets, with its dataset and task.
    """
    fitted = []
    for task in tasks:
        part = training[task.dataset]
        target, mask = part.targets[task.name], part.valid[task.name]
        seen = mask if mask is not None else torch.ones(len(target), dtype=torch.bool, device=target.device)
        try:
            fitted.append(replace(task, head=named(task, part.classes).fitted(target, seen)))
        except DataError as error:
            raise DataError(f"dataset {task.dataset!r}, train split, task {task.name!r}: {error}") from error
    return fitted
