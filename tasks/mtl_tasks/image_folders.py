"""`image_folders`: image files whose folders say their labels, one target for each level, so that own data need no Python.

    tasks:
      - {name: kind, task: column_class, dataset: image_folders}
      - {name: colour, task: column_class, dataset: image_folders}
    data:
      datasets:
        image_folders: {folder: toys, levels: [kind, colour], size: [64, 64]}   # toys/train/car/red/1.jpg

An image that lies higher up lacks the labels of the levels below, and a folder called `unknown`, `none` or the like stands for
no label; so do not all images need all labels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

import mtl

SUFFIXES = (".jpg", ".jpeg", ".png")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Folder at the top -> the split that it is."""
Side = Annotated[int, Field(ge=1)]


class ImageFoldersOptions(mtl.Options):
    """Where the folders are, and what they say."""

    folder: Path
    """Under the data root; no file outside it is opened. Where it holds a folder `train`, that one, `val` and `test` are the
    splits, as far as they are there and whatever the case; else splits are made by hash."""
    size: tuple[Side, Side]
    """(Height, width) in pixels that every image is resized to."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for red, green and blue."""
    levels: tuple[str, ...] = Field(("class",), min_length=1)
    """Target that each level of folders names, from the top (below the split's folder)."""
    test: float = Field(0.2, gt=0, lt=1)
    """Share for testing where no folder says so, by a hash of the name (of the group's, where there are groups)."""
    group: str | None = None
    """The level whose folders hold what belongs together, such as a person: never parted between training, validation and
    testing. It may be one of `levels`."""
    bad: float = Field(0.01, ge=0, le=1)
    """Share of the files that may be set aside; more is an error."""

    @field_validator("levels")
    @classmethod
    def _different(cls, levels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(levels)) < len(levels) or not all(levels):
            raise ValueError(f"must be different names; found {list(levels)}")
        return levels

    @field_validator("group")
    @classmethod
    def _a_level(cls, group: str | None, info: Any) -> str | None:
        levels = info.data.get("levels", ())
        if group is not None and levels and group not in levels:
            raise ValueError(f"must be one of the levels {', '.join(levels)}; found {group!r}")
        return group


class Found:
    """What lies in the folders: `names` below `folder`, the `split` (N,) of each, and each of the `levels` as a column."""

    def __init__(self, folder: Path, options: ImageFoldersOptions) -> None:
        self.folder = folder
        self.names = mtl.TextColumn()
        self.levels = {level: mtl.ClassColumn() for level in options.levels}
        self.set_aside = mtl.SetAside()
        by_folder = any(one.name.lower() == "train" and one.is_dir() for one in folder.iterdir())
        counts: list[int] = []
        splits: list[str] = []
        for place in mtl.walk(folder, SUFFIXES):
            for name, why in place.refused:
                self._refuse(os.path.join(place.folder, name), why)
            parts = os.fsdecode(place.folder).split("/") if place.folder else []
            split = ""
            if by_folder:
                split = SPLITS.get(parts[0].lower(), "") if parts else ""
                if not split:
                    for name in place.files:
                        self._refuse(os.path.join(place.folder, name), "is in no split's folder")
                    continue
                parts = parts[1:]
            for name in place.files:
                self.names.append(os.path.join(place.folder, name))
            counts.append(len(place.files))
            splits.append(split)
            for level, column in enumerate(self.levels.values()):
                value = column.parse(parts[level]) if level < len(parts) else None
                for _ in place.files:
                    column.append(value)
        self.set_aside.refuse_above(options.bad, sum(counts), f"JPEG and PNG files in {str(folder)!r}")
        for missing, column in self.levels.items():
            if not column.names:
                raise mtl.DataError(f"no folder in {str(folder)!r} says a {missing!r}: all images lie higher up")
        self.split = np.repeat(np.array(splits), counts) if by_folder else self._hashed(options)

    def _refuse(self, name: bytes, why: str) -> None:
        self.set_aside.add(os.path.join(self.folder, os.fsdecode(name)), why, f"files: {why}")

    def _hashed(self, options: ImageFoldersOptions) -> NDArray[np.str_]:
        if options.group is None:
            test = mtl.hashed_split(self.names, options.test)
        else:
            column = self.levels[options.group]
            of_group = mtl.hashed_split((os.fsencode(name) for name in column.names), options.test)
            alone = mtl.hashed_split(self.names, options.test)
            test = np.where(column.codes >= 0, of_group[column.codes], alone)
        return np.where(test, "test", "train")


@mtl.register_dataset("image_folders", options=ImageFoldersOptions, splits=("train", "val", "test"))
def image_folders(split: mtl.Split, root: Path, options: ImageFoldersOptions) -> mtl.ImageFiles | None:
    """The files of one split; None where there are none for validation or testing.

    Targets: each of `levels`, its classes those found in any split, sorted; missing where no folder says it.
    """
    folder = root / options.folder
    if not folder.is_dir():
        raise mtl.DataError(f"there is no folder {str(folder)!r}")
    found = Found(folder, options)
    chosen = found.split == str(split)
    if not chosen.any() and split != mtl.Split.TRAIN:
        return None
    labels: dict[str, Any] = {}
    valid: dict[str, Any] = {}
    for name, column in found.levels.items():
        codes = column.codes[chosen]
        labels[name] = np.maximum(codes, 0)
        if (codes < 0).any():
            valid[name] = codes >= 0
    groups = None
    if options.group is not None:
        codes = found.levels[options.group].codes
        groups = np.where(codes >= 0, codes, len(codes) + np.arange(len(codes)))[chosen]
    return mtl.ImageFiles(
        (name for name, wanted in zip(found.names, chosen.tolist(), strict=True) if wanted),
        labels,
        valid,
        {name: column.names for name, column in found.levels.items()},
        groups,
        size=options.size,
        channels=options.channels,
        folder=folder,
        set_aside=found.set_aside if split == mtl.Split.TRAIN else None,
    )
