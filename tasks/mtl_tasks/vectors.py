"""`vectors`: feature vectors with labels in one `.npz` or `.safetensors` file, such as embeddings of faces or texts.

tasks:
  - {name: gender, task: column_class, dataset: vectors}
  - {name: age, task: column_number, dataset: vectors, unit: years}
data:
  datasets:
    vectors: {file: embeddings.npz}     # arrays `features` (N, D), `gender` (N,), `age` (N,)
"""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

import mtl

LARGEST = 1 << 36
"""Bytes that the arrays of a file may come to."""
MOST = 10_000
"""Classes that are believed to be meant by integers."""
SPLITS = ("train", "val", "test")


class VectorsOptions(mtl.Options):
    """Which arrays of which file."""

    file: Path
    """Under the data root: .npz (nothing in it pickled) or .safetensors."""
    features: str = "features"
    """Array (N, D)."""
    targets: tuple[str, ...] | None = None
    """Arrays (N,) of labels: names or integers from 0 (-1: missing), or floats (NaN: missing). Null: all but the features,
    the split and the group."""
    classes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """What the whole numbers 0, 1, ... of a target stand for, of whichever type; without it integers are named by their
    number, and floats are no classes."""
    split: str | None = None
    """Array (N,) of 0, 1, 2 or train, val, test; null: as `test` says."""
    test: float = Field(0.1, gt=0, lt=1)
    """Share for testing where no array says so, by a hash of the row's number (of the group's, where there are groups): what is
    appended moves nothing."""
    group: str | None = None
    """Array (N,) of what belongs together, such as a person: never parted between training, validation and testing."""


@mtl.register_dataset("vectors", options=VectorsOptions, splits=("train", "val", "test"))
def vectors(split: mtl.Split, root: Path, options: VectorsOptions) -> mtl.ArrayDataset | None:
    """The rows of one split, float32 (N, D); None where the file has none for validation or testing."""
    arrays = read_arrays(root / options.file)
    features = _array(arrays, options.features, options.file)
    if features.ndim != 2:
        raise mtl.DataError(f"{options.file}: {options.features!r} must be (N, D); found shape {features.shape}")
    special = {options.features, options.split, options.group}
    targets = options.targets if options.targets is not None else tuple(sorted(set(arrays) - special))
    if empty := [name for name, names in options.classes.items() if not names]:
        raise mtl.DataError(f"{options.file}: classes of {', '.join(empty)}: none; leave them out, or name them all")
    if wrong := sorted(set(options.classes) - set(targets)):
        raise mtl.DataError(f"{options.file}: classes of {', '.join(wrong)}, no target; there are {', '.join(targets)}")
    groups = None if options.group is None else _column(arrays, options.group, len(features), options.file)
    chosen = _split(arrays, len(features), groups, options) == SPLITS.index(split)
    if not chosen.any() and split != mtl.Split.TRAIN:
        return None
    labels: dict[str, Any] = {}
    valid: dict[str, Any] = {}
    classes: dict[str, tuple[str, ...]] = {}
    for name in targets:
        column = _column(arrays, name, len(features), options.file)
        codes, mask, names = _labels(f"{options.file}: {name!r}", column, options.classes.get(name))
        labels[name] = codes[chosen]
        if names:
            classes[name] = names
        if not mask.all():
            valid[name] = mask[chosen]
    same = None if groups is None else np.unique(groups, return_inverse=True)[1][chosen]
    return mtl.ArrayDataset(features[chosen].astype(np.float32), labels, valid, classes, same)


def read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """Name -> array of a `.npz` or `.safetensors` file; nothing in it is run.

    Raises:
        DataError: no such file, another format, damage, pickled objects, or more than 64 GiB.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {name: _as_numpy(tensor) for name, tensor in load_file(file).items()}
        with zipfile.ZipFile(file) as archive:
            if (size := sum(member.file_size for member in archive.infolist())) > LARGEST:
                raise mtl.DataError(f"{str(file)!r} unpacks to {size:,} bytes, more than the {LARGEST:,} that are read")
            for member in archive.infolist():
                _check_header(archive, member)
        with np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except FileNotFoundError:
        raise mtl.DataError(f"there is no file {str(file)!r}") from None
    except mtl.MTLError:
        raise
    except Exception as error:  # what a damaged file makes the readers raise is anybody's guess
        raise mtl.DataError(f"cannot read {str(file)!r}, which must be .npz or .safetensors: {error}") from None


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """An array is not larger than what is there of it.

    Raises:
        ValueError: it says that it is.
    """
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    if math.prod(shape) * dtype.itemsize > member.file_size or min(shape, default=0) < 0:
        raise ValueError(f"{member.filename} says that it has shape {shape}, and has {member.file_size:,} bytes")


def _as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _array(arrays: dict[str, NDArray[Any]], name: str, file: Path) -> NDArray[Any]:
    if name not in arrays:
        raise mtl.DataError(f"{file}: no array {name!r}; there are: {', '.join(sorted(arrays))}")
    return arrays[name]


def _column(arrays: dict[str, NDArray[Any]], name: str, count: int, file: Path) -> NDArray[Any]:
    column = _array(arrays, name, file)
    if column.shape != (count,):
        raise mtl.DataError(
            f"{file}: {name!r} must have one entry per row of the features, {count}; found shape {column.shape}"
        )
    return column


def _labels(
    what: str, column: NDArray[Any], names: tuple[str, ...] | None
) -> tuple[NDArray[Any], NDArray[np.bool_], tuple[str, ...] | None]:
    """Labels, which of them there are, and what they stand for if they are classes."""
    if names and column.dtype.kind == "f":
        known = np.isfinite(column) & (column != -1)
        if (known & ((column != np.round(column)) | (column < 0) | (column >= len(names)))).any():
            raise mtl.DataError(f"{what}: its {len(names)} classes are 0 to {len(names) - 1}, and not all of its numbers are")
        column = np.where(known, column, -1).astype(np.int64)
    if column.dtype.kind == "f":
        known = np.isfinite(column)
        return np.where(known, column, 0).astype(np.float32), known, None
    if column.dtype.kind in "US":
        texts = mtl.ClassColumn(names)
        for row, text in enumerate(column.tolist()):
            try:
                texts.append(texts.parse(os.fsdecode(text)))
            except ValueError as error:
                raise mtl.DataError(f"{what}: {os.fsdecode(text)!a} in row {row} {error}") from None
        codes: NDArray[np.integer[Any]] = texts.codes
        names = texts.names
    else:
        codes = column.astype(np.int64)
        if not names and (largest := int(codes.max(initial=0))) >= MOST:
            raise mtl.DataError(
                f"{what}: integers up to {largest:,} are no classes; name the arrays that are labels in targets"
            )
        names = names or tuple(map(str, range(max(2, int(codes.max(initial=0)) + 1))))
    return np.maximum(codes, 0), codes >= 0, names


def _split(
    arrays: dict[str, NDArray[Any]], count: int, groups: NDArray[Any] | None, options: VectorsOptions
) -> NDArray[np.integer[Any]]:
    """0, 1 or 2 for each row."""
    if options.split is not None:
        column = _column(arrays, options.split, count, options.file)
        known: dict[int | str, int] = {**{i: i for i in range(3)}, **{name: i for i, name in enumerate(SPLITS)}}
        try:
            return np.array([known[value] for value in column.tolist()])
        except (KeyError, TypeError) as error:
            raise mtl.DataError(
                f"{options.file}: {options.split!r} must hold train, val, test or 0, 1, 2; found {error}"
            ) from None
    names = range(count) if groups is None else groups.tolist()
    return 2 * mtl.hashed_split((str(name).encode() for name in names), options.test).astype(np.int64)
