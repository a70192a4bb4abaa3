"""What the tables of a folder of faces say: `identity_meta.csv` in its forms, any table with a row per image, MAAD-Face's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

import mtl

META = ("Class_ID", "Name", "Sample_Num", "Flag", "Gender", "Age")
"""Columns of identity_meta.csv where it has no header; the last only in one variant."""


GENDERS = ("female", "male")


SPELT = {other: name for name in GENDERS for other in (name[0], name[0].upper(), name.title(), name.upper())}


OLDEST = 120.0
"""Years; more is a mistake in the table."""


MAAD_GROUPS = ("Young", "Middle_Aged", "Senior")
"""MAAD-Face's columns of age groups (Terhörst et al. 2021, arXiv 2012.01030); of a row at most one is 1."""


class PerImage(mtl.Options):
    """A table with a row per image."""

    file: Path
    """The table, in the dataset's folder: CSV with a header."""
    path: str = "path"
    """Column with the image's name below `train` or `test`, as in n000002/0001_01.jpg."""
    gender: str | None = None
    """Column with female or male (or f, m)."""
    age: str | None = None
    """Column with the age in years."""
    age_group: str | None = None
    """Column with one of `age_groups`."""


class LabelOptions(mtl.Options):
    """What labels are taken from; paths are in the dataset's folder."""

    identities: Path | None = Path("identity_meta.csv")
    """Table with a row per identity; null: none."""
    images: PerImage | None = None
    """Table with a row per image; its labels take the place of the identity's and of MAAD-Face's."""
    maad: Path | None = None
    """MAAD-Face's table: its Male, Young, Middle_Aged and Senior."""
    age_groups: tuple[str, ...] = ()
    """Names of age groups in their order, for a column of them."""
    age_bounds: tuple[float, ...] = ()
    """Ages in years at which each group after the first begins, as in [18, 35, 60]; groups are then made of years."""
    young_below: float | None = Field(None, gt=0)
    """Age in years below which a face counts as young where MAAD-Face does not say."""
    bad: float = Field(0.01, ge=0, le=1)
    """Share of the images, and of the rows of each table, that may be set aside; more is an error."""

    @field_validator("age_bounds")
    @classmethod
    def _ascending(cls, bounds: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < a < OLDEST for a in bounds) or list(bounds) != sorted(set(bounds)):
            raise ValueError(f"must be ages in years, each above the one before; found {list(bounds)}")
        return bounds


@dataclass(frozen=True)
class Said:
    """What tables say of N identities or images: codes, -1 where they say nothing, and ages in years, NaN."""

    gender: NDArray[np.int8]
    age: NDArray[np.float32]
    group: NDArray[np.int8]
    young: NDArray[np.int8]

    @classmethod
    def nothing(cls, count: int) -> Said:
        """Of anybody."""
        none = np.full(count, -1, np.int8)
        return cls(none, np.full(count, np.nan, np.float32), none, none)

    def at(self, rows: NDArray[np.int64]) -> Said:
        """What is said in these rows; nothing in row -1."""
        if not len(self.age):
            return Said.nothing(len(rows))
        known, row = rows >= 0, np.maximum(rows, 0)
        gender, group, young = (np.where(known, codes[row], np.int8(-1)) for codes in (self.gender, self.group, self.young))
        return Said(gender, np.where(known, self.age[row], np.float32(np.nan)), group, young)

    def over(self, other: Said) -> Said:
        """What this says, and where it says nothing the other."""
        pairs = ((self.gender, other.gender), (self.group, other.group), (self.young, other.young))
        gender, group, young = (np.where(mine >= 0, mine, its) for mine, its in pairs)
        return Said(gender, np.where(np.isfinite(self.age), self.age, other.age), group, young)


@dataclass(frozen=True)
class Tables:
    """What the tables of a folder say, and of what: `identities` (their names), `images` (names below the split's folder)."""

    identities: tuple[list[bytes], Said]
    maad: tuple[mtl.TextColumn, Said]
    images: tuple[mtl.TextColumn, Said]
    sources: frozenset[str]
    set_aside: mtl.SetAside


def tables_of(folder: Path, options: LabelOptions) -> Tables:
    """What the folder's tables say, read once for all splits and anew when one has changed."""
    given = [options.identities, options.maad, options.images and options.images.file]
    changed = tuple((folder / file).stat().st_mtime_ns if file and (folder / file).is_file() else 0 for file in given)
    return _read_tables(folder, options.model_dump_json(include=set(LabelOptions.model_fields)), changed)


@lru_cache(maxsize=2)
def _read_tables(folder: Path, options_json: str, _: tuple[int, ...]) -> Tables:
    options = LabelOptions.model_validate_json(options_json)
    set_aside = mtl.SetAside()
    sources: set[str] = set()
    nobody: tuple[list[bytes], Said] = ([], Said.nothing(0))
    identities = nobody if options.identities is None else _read_meta(folder / options.identities, options, set_aside, sources)
    none: tuple[mtl.TextColumn, Said] = (mtl.TextColumn(), Said.nothing(0))
    maad = none if options.maad is None else _read_maad(folder / options.maad, options, set_aside, sources)
    images = none if options.images is None else _read_images(folder, options.images, options, set_aside, sources)
    return Tables(identities, maad, images, frozenset(sources), set_aside)


def _gender() -> mtl.ClassColumn:
    return mtl.ClassColumn(GENDERS, also=SPELT)


def _years() -> mtl.NumberColumn:
    return mtl.NumberColumn(between=(0.0, OLDEST))


def _read_meta(file: Path, options: LabelOptions, set_aside: mtl.SetAside, sources: set[str]) -> tuple[list[bytes], Said]:
    """identity_meta.csv, in any of its forms."""
    header = mtl.table_columns(file, names=META)
    if len(header) < 5:
        raise mtl.DataError(f"{file}:1: {len(header)} columns; identity_meta.csv has {', '.join(META[:5])} and may have an age")
    name, gender, age = mtl.TextColumn(), _gender(), _years()
    columns: list[tuple[str, mtl.Column]] = [(header[0], name), (header[4], gender)]
    if len(header) > 5 and header[5]:
        columns.append((header[5], age))
        sources.add("years")
    lines = _rows(file, columns, set_aside, options.bad, META, optional=len(header) - 5)  # not all have an age
    names = list(name)
    _, again = mtl.match_names((), names)
    for row in again.tolist():
        set_aside.add(
            f"{file}:{lines[row]}", f"a second row of {os.fsdecode(names[row])!a}", "rows of identities that have one"
        )
    said = _said(len(names), gender, age if len(columns) > 2 else None)
    return names, said


def _read_images(
    folder: Path, table: PerImage, options: LabelOptions, set_aside: mtl.SetAside, sources: set[str]
) -> tuple[mtl.TextColumn, Said]:
    """A table with a row per image."""
    file = folder / table.file
    name, gender, age, group = mtl.TextColumn(), _gender(), _years(), mtl.ClassColumn(options.age_groups or None)
    columns: list[tuple[str, mtl.Column]] = [(table.path, name)]
    for column, holds in ((table.gender, gender), (table.age, age), (table.age_group, group)):
        columns += [] if column is None else [(column, holds)]
    if table.age_group is not None and not options.age_groups:
        raise mtl.DataError(f"images.age_group={table.age_group!r} needs age_groups, its names in their order, as [young, old]")
    lines = _rows(file, columns, set_aside, options.bad)
    _note_repeated(file, name, lines, set_aside)
    sources |= {"years"} if table.age is not None else set()
    sources |= {"groups"} if table.age_group is not None else set()
    given = gender if table.gender is not None else None
    said = _said(len(lines), given, age if table.age is not None else None)
    if table.age_group is not None:
        said = Said(said.gender, said.age, group.codes.astype(np.int8), said.young)
    return name, said


def _read_maad(file: Path, options: LabelOptions, set_aside: mtl.SetAside, sources: set[str]) -> tuple[mtl.TextColumn, Said]:
    """MAAD-Face: 1, -1, and 0 for undefined."""
    name = mtl.TextColumn()
    held = {attribute: mtl.ClassColumn(("-1", "1"), missing=["0"]) for attribute in ("Male", *MAAD_GROUPS)}
    lines = _rows(file, [("Filename", name), *held.items()], set_aside, options.bad)
    _note_repeated(file, name, lines, set_aside)
    codes = {attribute: column.codes.astype(np.int8) for attribute, column in held.items()}
    is_in = np.stack([codes[attribute] == 1 for attribute in MAAD_GROUPS])
    other_groups = bool(options.age_groups or options.age_bounds)
    group = np.where((is_in.sum(0) == 1) & ~np.bool_(other_groups), is_in.argmax(0), -1).astype(np.int8)
    sources |= {"maad"}
    return name, Said(codes["Male"], np.full(len(lines), np.nan, np.float32), group, codes["Young"])


def _rows(
    file: Path,
    columns: Sequence[tuple[str, mtl.Column]],
    set_aside: mtl.SetAside,
    bad: float,
    names: Sequence[str] | None = None,
    optional: int = 0,
) -> NDArray[np.int32]:
    """Read a table; the lines of its rows.

    Raises:
        DataError: more than the share `bad` of them cannot be used.
    """
    own = mtl.SetAside()
    lines = mtl.read_table(file, columns, own, names=names, optional=optional)
    own.refuse_above(bad, len(lines), f"rows of {str(file)!r}", "rows")
    own.refuse_values_above(bad, file, {name: _usable(column) for name, column in columns})
    set_aside.take(own)
    return lines


def _usable(column: mtl.Column) -> int:
    if isinstance(column, mtl.NumberColumn):
        return int(np.isfinite(column.values).sum())
    return int((column.codes >= 0).sum()) if isinstance(column, mtl.ClassColumn) else 0


def _note_repeated(file: Path, names: mtl.TextColumn, lines: NDArray[np.int32], set_aside: mtl.SetAside) -> None:
    _, again = mtl.match_names((), names)
    for row in again.tolist():
        set_aside.add(f"{file}:{lines[row]}", "a second row of an image", "rows of images that have one")


def _said(count: int, gender: mtl.ClassColumn | None, age: mtl.NumberColumn | None) -> Said:
    """What genders and ages in years come to."""
    said = Said.nothing(count)
    return Said(
        said.gender if gender is None else gender.codes.astype(np.int8),
        said.age if age is None else age.values.astype(np.float32),
        said.group,
        said.young,
    )


def targets(
    said: Said, sources: frozenset[str], options: LabelOptions
) -> tuple[dict[str, Any], dict[str, Any], dict[str, tuple[str, ...]]]:
    """Labels, masks and classes of the targets that some table speaks of."""
    classes: dict[str, tuple[str, ...]] = {"gender": GENDERS}
    codes = {"gender": said.gender}
    if groups := _group_names(sources, options):
        in_years = bool(options.age_bounds) and not options.age_groups
        classes["age_group"], codes["age_group"] = groups, _cut(said.age, options.age_bounds) if in_years else said.group
    if "maad" in sources or (options.young_below is not None and "years" in sources):
        young = said.young
        if options.young_below is not None:
            reached = _cut(said.age, [options.young_below])
            young = np.where(young < 0, np.where(reached >= 0, 1 - reached, reached), young)
        classes["young"], codes["young"] = ("not young", "young"), young
    labels: dict[str, Any] = {name: np.maximum(held, 0) for name, held in codes.items()}
    valid: dict[str, Any] = {name: held >= 0 for name, held in codes.items()}
    if "years" in sources:
        labels["age"], valid["age"] = np.nan_to_num(said.age), np.isfinite(said.age)
    return labels, valid, classes


def _cut(years: NDArray[np.float32], bounds: Sequence[float]) -> NDArray[np.int8]:
    """How many of the bounds an age reaches; -1 where there is no age."""
    return np.where(np.isfinite(years), np.searchsorted(np.array(bounds), years, side="right"), -1).astype(np.int8)


def _group_names(sources: frozenset[str], options: LabelOptions) -> tuple[str, ...]:
    if options.age_groups:
        return options.age_groups if "groups" in sources else ()
    if options.age_bounds and "years" in sources:
        bounds = [f"{bound:g}" for bound in options.age_bounds]
        between = [f"{low} to below {high}" for low, high in pairwise(bounds)]
        return (f"below {bounds[0]}", *between, f"{bounds[-1]} and above")
    return tuple(name.lower().replace("_", "-") for name in MAAD_GROUPS) if "maad" in sources else ()
