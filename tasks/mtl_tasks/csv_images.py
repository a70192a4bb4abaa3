"""Image files with a table of labels: `csv_images`, and a task for each of its columns, so that own data need no Python.

    tasks:
      - {name: breed, task: column_class}
      - {name: weight, task: column_number, unit: kg}
      - {name: traits, task: column_flags}
    data:
      datasets:
        csv_images:
          {file: pets.csv, images: path, size: [64, 64], classes: {breed: null}, numbers: [weight],
           flags: {traits: [shy, loud, trained]}, group: owner}

A row whose file is missing, or leads out of its folder, is set aside, and a value that is none of its kind is a missing label;
both are counted and listed with file and line.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

import mtl

SPLITS = {"train": 0, "val": 1, "test": 2, "valid": 1, "validation": 1}
"""What a split column may say."""
FLAGS = {
    **{spelt: "0" for word in ("false", "no") for spelt in (word, word.capitalize(), word.upper())},
    **{spelt: "1" for word in ("true", "yes") for spelt in (word, word.capitalize(), word.upper())},
    "0.0": "0",
    "1.0": "1",
}
"""What a column of flags may say in place of 0 and 1; with a point where a spreadsheet made numbers of them."""
Side = Annotated[int, Field(ge=1)]


class CsvImagesOptions(mtl.Options):
    """Where the table is, and what its columns are."""

    file: Path
    """The table, under the data root: CSV with a header."""
    images: str = "path"
    """Column with the names of the image files."""
    folder: Path = Path()
    """Under the data root, what these names are relative to; no file outside it is opened. Default: the root."""
    size: tuple[Side, Side]
    """(Height, width) in pixels that every image is resized to."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for red, green and blue."""
    classes: dict[str, tuple[str, ...] | None] = Field(default_factory=dict)
    """Columns that hold one of several names: {column: names in their order}, null for those found, sorted."""
    numbers: tuple[str, ...] = ()
    """Columns that hold numbers."""
    flags: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Columns that hold 1 or 0 (or true or false, yes or no), together as one multi-label target: {target: columns}."""
    split: str | None = None
    """Column that says train, val or test; null: as `test` says."""
    test: float = Field(0.2, gt=0, lt=1)
    """Share for testing where no column says so, by a hash of the name (of the group, where there are groups): what is added to
    the table moves nothing."""
    group: str | None = None
    """Column of what belongs together, such as a person: never parted between training, validation and testing."""
    delimiter: str = Field(",", min_length=1, max_length=1)
    """Between fields."""
    encoding: str = "utf-8"
    """Of the table."""
    bad: float = Field(0.01, ge=0, le=1)
    """Share of the rows, and of the values of each column, that may be unusable; more is an error."""

    @model_validator(mode="after")
    def _each_target_once(self) -> Self:
        targets = [*self.classes, *self.numbers, *self.flags]
        if twice := sorted({name for name in targets if targets.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)}: given more than once in classes, numbers and flags; each name is one target")
        own = [*self.classes, *self.numbers]
        for target, columns in self.flags.items():
            if twice := sorted({name for name in columns if columns.count(name) > 1 or name in own}):
                raise ValueError(f"flags: {', '.join(twice)} in {target}: given twice; a column is read as one thing")
        if empty := sorted(name for name, columns in self.flags.items() if not columns):
            raise ValueError(f"flags of {', '.join(empty)}: no column; give {{{empty[0]}: [a, b]}}")
        return self


@dataclass(frozen=True)
class Table:
    """What is used of a table, row by row: `names` relative to `folder`, and where each row goes (0 to 2)."""

    folder: Path
    names: mtl.TextColumn
    split: NDArray[np.int8]
    classes: dict[str, mtl.ClassColumn]
    numbers: dict[str, mtl.NumberColumn]
    flags: dict[str, dict[str, mtl.ClassColumn]]
    groups: NDArray[np.int32] | None
    kept: NDArray[np.bool_]
    set_aside: mtl.SetAside


@mtl.register_dataset("csv_images", options=CsvImagesOptions, splits=("train", "val", "test"))
def csv_images(split: mtl.Split, root: Path, options: CsvImagesOptions) -> mtl.ImageFiles | None:
    """The rows of one split; None where a table has none for validation or testing.

    Targets: each column of `classes` (its names are the dataset's) and of `numbers`, and each name of `flags` (its columns are
    the dataset's classes), missing where a row has no usable value; of flags, label by label.
    """
    file = root / options.file
    table = _read(root, options.model_dump_json(), file.stat().st_mtime_ns if file.exists() else 0)
    chosen = table.kept & (table.split == SPLITS[split])
    if not chosen.any() and split is not mtl.Split.TRAIN:
        return None
    rows = np.flatnonzero(chosen)
    labels: dict[str, Any] = {}
    valid: dict[str, Any] = {}
    for name, column in table.classes.items():
        codes = column.codes[rows]
        labels[name], valid[name] = np.maximum(codes, 0), codes >= 0
    for name, numbers in table.numbers.items():
        values = numbers.values[rows]
        labels[name], valid[name] = np.nan_to_num(values).astype(np.float32), np.isfinite(values)
    for name, flags in table.flags.items():
        both = np.stack([column.codes[rows] for column in flags.values()], axis=1)
        labels[name], valid[name] = np.maximum(both, 0), both >= 0
    return mtl.ImageFiles(
        (table.names[row] for row in rows.tolist()),
        labels,
        {name: mask for name, mask in valid.items() if not mask.all()},
        {name: column.names for name, column in table.classes.items()} | {name: tuple(of) for name, of in table.flags.items()},
        None if table.groups is None else table.groups[rows],
        size=options.size,
        channels=options.channels,
        folder=table.folder,
        set_aside=table.set_aside,
    )


def _plain(names: mtl.TextColumn, folder: Path) -> mtl.TextColumn:
    """Each file under one name, relative to the folder, however the table spells it."""
    plain, prefix = mtl.TextColumn(), os.fsencode(os.path.join(folder, ""))
    for name in names:
        odd = name.startswith((b"/", b"./")) or b"//" in name or b"/./" in name
        plain.append(
            b"/".join(part for part in name.removeprefix(prefix).split(b"/") if part not in (b"", b"."))
            if odd and not (name.startswith(b"/") and not name.startswith(prefix))
            else name
        )
    return plain


@lru_cache(maxsize=2)
def _read(root: Path, options_json: str, _: int) -> Table:
    """The table, read once for all splits and anew when its file has changed."""
    options = CsvImagesOptions.model_validate_json(options_json)
    file, folder, set_aside = root / options.file, root / options.folder, mtl.SetAside()
    images = mtl.TextColumn()
    classes = {name: mtl.ClassColumn(names) for name, names in options.classes.items()}
    numbers = {name: mtl.NumberColumn() for name in options.numbers}
    named = dict.fromkeys(name for of_target in options.flags.values() for name in of_target)
    every = {name: mtl.ClassColumn(("0", "1"), also=FLAGS, what="what flags are:") for name in named}
    flags = {target: {name: every[name] for name in names} for target, names in options.flags.items()}
    split = mtl.ClassColumn(tuple(SPLITS), required=True)
    group = mtl.ClassColumn(required=True)
    columns: list[tuple[str, mtl.Column]] = [(options.images, images), *classes.items(), *numbers.items()]
    columns += every.items()
    columns += [(options.split, split)] if options.split is not None else []
    columns += [(options.group, group)] if options.group is not None else []
    lines = mtl.read_table(file, columns, set_aside, delimiter=options.delimiter, encoding=options.encoding)
    names = _plain(images, folder)
    kept, refused = mtl.usable_files(folder, names)
    repeated = mtl.match_names((), names)[1]
    kept[repeated] = False
    for second in repeated.tolist():
        said = f"a second row of {os.fsdecode(names[second])!a}"
        set_aside.add(f"{file}:{lines[second]}", said, "rows of images that have one")
    for row, why in refused:
        set_aside.add(f"{file}:{lines[row]}", f"{options.images} {os.fsdecode(names[row])!a} {why}", f"files: {why}")
    set_aside.refuse_above(options.bad, int(kept.sum()), f"rows of {str(file)!r}", ("rows", "files"))
    usable = {name: int((column.codes >= 0).sum()) for name, column in classes.items()}
    usable |= {name: int(np.isfinite(column.values).sum()) for name, column in numbers.items()}
    usable |= {name: int((column.codes >= 0).sum()) for name, column in every.items()}
    set_aside.refuse_values_above(options.bad, file, usable)
    for column in classes.values():
        column.forget(~kept)
    groups = group.codes if options.group is not None else None
    if options.split is not None:
        where = np.array(list(SPLITS.values()), np.int8)[split.codes]
    elif groups is not None:
        where = 2 * mtl.hashed_split((name.encode() for name in group.names), options.test)[groups].astype(np.int8)
    else:
        where = 2 * mtl.hashed_split(names, options.test).astype(np.int8)
    return Table(folder, names, where, classes, numbers, flags, groups, kept, set_aside)


class ColumnOptions(mtl.Options):
    """Which column of which table."""

    dataset: str = "csv_images"
    """The dataset, if it has a name of your own."""
    target: str = ""
    """The column; empty: that of the task's name."""


class ColumnClassOptions(mtl.ClassificationOptions, ColumnOptions):
    """A classification task of a column."""


@mtl.register_task("column_class", options=ColumnClassOptions)
def column_class(options: ColumnClassOptions) -> mtl.Task:
    """Which of the names in a column of `classes`."""
    how = options.model_dump(exclude={"dataset", "target"})
    return mtl.Task(options.dataset, options.target, mtl.FromClasses(mtl.Classification, **how))


@mtl.register_task("column_ordered", options=ColumnOptions)
def column_ordered(options: ColumnOptions) -> mtl.Task:
    """Which of the names in a column of `classes`, which are in an order: give it, {column: [low, middle, high]}."""
    return mtl.Task(options.dataset, options.target, mtl.FromClasses(mtl.Ordinal))


class ColumnFlagsOptions(ColumnOptions):
    """A multi-label task of several columns."""

    threshold: float = Field(0.5, gt=0, lt=1)
    """A label counts as present from this probability on."""


@mtl.register_task("column_flags", options=ColumnFlagsOptions)
def column_flags(options: ColumnFlagsOptions) -> mtl.Task:
    """Which of the columns of a name in `flags` hold a 1: any number of them at once."""
    head = mtl.FromClasses(mtl.MultiLabel, threshold=options.threshold)
    return mtl.Task(options.dataset, options.target, head)


class ColumnNumberOptions(ColumnOptions):
    """A regression task of a column."""

    unit: str = ""
    """Of the numbers, as in "kg"."""
    error: Literal["squared", "absolute", "huber"] = "squared"
    """See `mtl.Regression`."""


@mtl.register_task("column_number", options=ColumnNumberOptions)
def column_number(options: ColumnNumberOptions) -> mtl.Task:
    """The number in a column of `numbers`."""
    return mtl.Task(options.dataset, options.target, mtl.Regression(options.unit, error=options.error))
