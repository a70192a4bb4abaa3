"""Datasets in memory: what a dataset plugin returns, and how it becomes checked tensors on the training device.

Everything a user can get wrong in data is found here, before the first step: shapes that differ, splits that are empty, labels
out of range, not finite or missing, classes never seen. Data that do not fit in memory are not covered by this module.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.errors import DataError, MTLError, PluginError, unknown
from mtl.options import Options
from mtl.registry import DATASETS, Plugin
from mtl.seeding import permutation
from mtl.task import Task, check_name


class Split(StrEnum):
    """The parts of a dataset. Weights are selected on `VAL`, which is carved from `TRAIN` where a dataset has none."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class ArrayDataset:
    """One split of a dataset, in memory.

    Args:
        images: uint8 or float, (N, C, H, W), (N, H, W) for one channel, or (N, D) for feature vectors: a tensor, an array, or
            a sequence of equally shaped ones. Kept in its own dtype.
        labels: target name -> (N, ...) as the dataset stores them; integers or floats.
        valid: target name -> bool, where that label exists: (N,), or (N, K) for a mask per label of several, or the label's
            shape for maps. A target not named here is labelled everywhere.

    Raises:
        DataError: shapes or lengths that do not fit together, or values that are not finite.
    """

    def __init__(self, images: Any, labels: Mapping[str, Any], valid: Mapping[str, Any] | None = None) -> None:
        self.images = _images(images)
        if not isinstance(labels, Mapping):
            raise DataError(f"labels must map target names to arrays, as in {{'digit': y}}; found {type(labels).__name__}")
        self.labels = {name: _tensor(value, f"labels[{name!r}]") for name, value in labels.items()}
        self.valid: dict[str, Tensor] = {}
        for name, value in (valid or {}).items():
            if name not in self.labels:
                raise DataError(f"valid: {unknown('target', name, self.labels)}")
            mask = _tensor(value, f"valid[{name!r}]")
            if mask.dtype != torch.bool or mask.shape != self.labels[name].shape[: mask.ndim]:
                raise DataError(f"valid[{name!r}] must be bool of shape (N,); found {mask.dtype} of shape {tuple(mask.shape)}")
            self.valid[name] = mask
        for name, value in self.labels.items():
            if value.ndim == 0 or len(value) != len(self.images):
                raise DataError(
                    f"labels[{name!r}] must have one entry per image, {len(self.images)}; found shape {tuple(value.shape)}"
                )

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index: Tensor) -> ArrayDataset:
        """The samples at `index` (int64), as a dataset."""
        part = object.__new__(ArrayDataset)
        part.images = self.images[index]
        part.labels = {name: value[index] for name, value in self.labels.items()}
        part.valid = {name: value[index] for name, value in self.valid.items()}
        return part


@dataclass(frozen=True)
class Samples:
    """One split of one dataset on the training device, with the targets of the tasks that use it.

    `valid[task]` is bool, (N,) or of the target's shape, or None where every label exists; `labelled[task]` counts those that
    do, and `shares[task]` is the part of all labels that do.
    """

    dataset: str
    images: Tensor
    targets: Mapping[str, Tensor]
    valid: Mapping[str, Tensor | None]
    labelled: Mapping[str, int]
    shares: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W) or (D,)."""
        return tuple(self.images.shape[1:])


def data_root(configured: str | Path | None = None) -> Path:
    """Where datasets live: the config's `data.root`, else the environment's MTL_DATA_ROOT, else `./data`."""
    return Path(configured or os.environ.get("MTL_DATA_ROOT") or "data")


def load_splits(
    name: str,
    tasks: Sequence[Task],
    root: Path,
    options: Options | None,
    validation: int | float,
    split_seed: int,
    device: torch.device | str,
    splits: Sequence[Split] = tuple(Split),
) -> dict[Split, Samples]:
    """Load, check and move the splits of a dataset.

    Args:
        name: of the registered dataset.
        tasks: those that use it.
        validation: how many training samples to hold out (an int), or which share of them (a float below 1); 0: none. A
            dataset that has its own validation split uses that instead.
        splits: which ones are wanted.
        split_seed: decides which samples are held out: the same for every arm and seed of a comparison.

    Returns:
        Of those wanted: `TRAIN`, `VAL` unless `validation` is 0, and `TEST` where the dataset declares it.

    Raises:
        DataError, PluginError: naming dataset, split, task and what is wrong.
    """
    check_name("dataset", name)
    plugin = DATASETS.get(name)
    declared = plugin.details["splits"]
    if Split.TRAIN not in declared or not set(declared) <= set(Split):
        raise PluginError(f"{plugin} declares splits {tuple(declared)}; they are train, and val and test where it has them")
    needed = {split for split in splits if split in declared and (validation or split is not Split.VAL)}
    if validation and Split.VAL in splits and Split.VAL not in declared:
        needed.add(Split.TRAIN)
    parts = {split: load_dataset(plugin, split, root, options) for split in Split if split in needed}
    return checked_splits(name, parts, tasks, validation, split_seed, device, splits)


def checked_splits(
    name: str,
    parts: Mapping[Split, ArrayDataset],
    tasks: Sequence[Task],
    validation: int | float,
    split_seed: int,
    device: torch.device | str,
    splits: Sequence[Split] = tuple(Split),
) -> dict[Split, Samples]:
    """What `load_splits` makes of a dataset's splits: validation carved from training where there is none, checked, moved."""
    parts = dict(parts)
    if validation and Split.TRAIN in parts and Split.VAL not in parts:
        _check(name, Split.TRAIN, parts[Split.TRAIN], tasks, "cpu")  # whole, so that positions are the plugin's own
        parts[Split.TRAIN], parts[Split.VAL] = _carve(name, parts[Split.TRAIN], validation, split_seed)
    samples = {split: _check(name, split, parts[split], tasks, device) for split in splits if split in parts}
    described = {split: (part.shape, part.images.dtype) for split, part in samples.items()}
    if len(set(described.values())) > 1:
        found = ", ".join(f"{split} {shape} {dtype}" for split, (shape, dtype) in described.items())
        raise DataError(f"dataset {name!r}: its splits differ in shape or type: {found}; bring them to one")
    return samples


def load_dataset(plugin: Plugin, split: Split, root: Path, options: Options | None) -> ArrayDataset:
    """One split as the plugin gives it.

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
        raise DataError(f"dataset {plugin.name!r}, {split} split: {error}") from error
    if not isinstance(data, ArrayDataset):
        raise PluginError(
            f"{plugin} must give an mtl.ArrayDataset for the {split} split; found {type(data).__name__}; a dataset without "
            "that split leaves it out of register_dataset(..., splits=(...))"
        )
    return data


def _carve(name: str, train: ArrayDataset, validation: int | float, seed: int) -> tuple[ArrayDataset, ArrayDataset]:
    total = len(train)
    count = validation if isinstance(validation, int) else round(validation * total)
    if not 0 < count <= total - 2:
        raise DataError(
            f"dataset {name!r}: data.validation={validation} holds out {count} of {total} training images; at least one must "
            "be held out and two must stay; use a share such as 0.1, or 0 to select the last epoch"
        )
    order = permutation(total, seed, "validation", name)
    held_out, kept = order[:count].sort().values, order[count:].sort().values
    return train.subset(kept), train.subset(held_out)


def _check(name: str, split: Split, data: ArrayDataset, tasks: Sequence[Task], device: torch.device | str) -> Samples:
    where = f"dataset {name!r}, {split} split"
    if len(data) < (2 if split is Split.TRAIN else 1):
        raise DataError(f"{where}: {len(data)} images; there must be some" + (" (two to train)" if len(data) else ""))
    targets: dict[str, Tensor] = {}
    valid: dict[str, Tensor | None] = {}
    labelled: dict[str, int] = {}
    shares: dict[str, float] = {}
    for task in tasks:
        if task.target not in data.labels:
            raise DataError(f"{where}: task {task.name!r} wants " + unknown("target", task.target, data.labels))
        labels = data.labels[task.target]
        seen = data.valid.get(task.target, torch.ones(len(labels), dtype=torch.bool))
        try:
            target = task.head.targets(labels, seen)
            if not seen.any():
                raise DataError("no sample is labelled")
        except DataError as error:
            raise DataError(f"{where}, task {task.name!r}: {error}") from error
        targets[task.name] = target.to(device)
        valid[task.name] = None if seen.all() else seen.to(device)
        labelled[task.name] = int(seen.sum())
        shares[task.name] = labelled[task.name] / seen.numel()
    return Samples(name, data.images.to(device), targets, valid, labelled, shares)


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
            fitted.append(replace(task, head=task.head.fitted(target, seen)))
        except DataError as error:
            raise DataError(f"dataset {task.dataset!r}, train split, task {task.name!r}: {error}") from error
    return fitted


def _images(images: Any) -> Tensor:
    if isinstance(images, Sequence):
        shapes = [tuple(np.shape(image)) for image in images]
        for i, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise DataError(
                    f"images differ in shape: image 0 is {shapes[0]}, image {i} is {shape}; resize or crop them to one shape"
                )
        images = np.stack([np.asarray(image) for image in images]) if shapes else np.empty((0, 1), np.uint8)
    x = _tensor(images, "images")
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim not in (2, 4):
        raise DataError(f"images must be (N, C, H, W), (N, H, W) or (N, D); found shape {tuple(x.shape)}")
    if not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise DataError(f"images must be uint8 or floating point; found {x.dtype}; convert them with .astype('uint8')")
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] > 4 and x.shape[2] > 4:
        raise DataError(f"images look like (N, H, W, C), shape {tuple(x.shape)}; give (N, C, H, W), as torch has it")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        first = int((~x.flatten(1).isfinite()).any(1).nonzero()[0])
        raise DataError(f"image {first} holds a value that is not finite; remove or repair it")
    return x


def _writable(value: Any) -> NDArray[Any]:
    array = np.ascontiguousarray(value)
    return array if array.flags.writeable else array.copy()  # torch shares memory, and warns where it must not write


def _tensor(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor) and np.asarray(value).dtype.kind in "USO":
        raise DataError(f"{what} must be numbers; found {np.asarray(value).dtype}; give each name its number, 0 to C-1")
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(_writable(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} cannot be made a tensor: {error}") from error
    if tensor.is_complex():
        raise DataError(f"{what} must be real numbers; found {tensor.dtype}")
    if tensor.dtype == torch.float64:
        return tensor.float()
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor  # torch computes in neither
