"""`vggface2`: faces in the layout of VGGFace2 (Cao et al. 2018, arXiv 1710.08092), with `face_gender` and `face_age`.

The folder is what its distributors give out: `train/` and `test/` with a folder per identity (`n000002/0001_01.jpg`) and
`identity_meta.csv`. That table says an identity's gender, and in one variant an estimated age; other tables, with a row per
image, override it: any CSV with a column of paths, or MAAD-Face's. An image that lacks one label is used for the others.

**What this is not fit for.** VGGFace2 was released for research; its pictures are of public figures, collected from the web
without asking them, and are no sample of any population. "Gender" is a binary label that somebody assigned to an identity,
"age" is in most sources an estimate by another model: neither is what a person is, or would say. Errors differ between groups
of people. Nothing trained on this should decide about anybody: not access, employment, credit, prices or policing, and no
estimate should be shown as a fact about a person. The library ships no face and no weights trained on faces.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

import mtl
from mtl_tasks.face_labels import GENDERS, LabelOptions, tables_of, targets

SUFFIXES = (".jpg", ".jpeg", ".png")
FOLDERS = {"train": "train", "test": "test"}
"""Split -> its folder."""
BOXES = "loose_bb_{split}.csv"
"""The landmark file of a split: NAME_ID (without suffix), X, Y, W, H in pixels."""

Side = Annotated[int, Field(ge=1)]


class FacesOptions(LabelOptions):
    """How faces are read, and what their labels are taken from."""

    size: tuple[Side, Side] = (64, 64)
    """(Height, width) in pixels that every image is resized to."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for red, green and blue."""
    boxes: Path | None = None
    """Folder with loose_bb_train.csv and loose_bb_test.csv, in the dataset's: the face's box is then cut out of each image.
    `mtl predict` cuts nothing out: give it pictures of faces."""


class VGGFace2Options(FacesOptions):
    """Where the folder is, and what is taken from it."""

    folder: Path = Path("vggface2")
    """Of the dataset, under the data root."""


@mtl.register_dataset("vggface2", options=VGGFace2Options, splits=("train", "test"))
def vggface2(split: mtl.Split, root: Path, options: VGGFace2Options) -> mtl.ImageFiles | None:
    """The images of a split, in whole identities: one identity is in one split only, held-out validation images included.

    Targets, each missing where no table says it: `gender` (0 female, 1 male), `age` (years), `age_group` (in order: those of
    `age_groups`, else made by `age_bounds`, else MAAD-Face's three), `young` (0, 1).
    """
    return faces(split, root / options.folder, options)


def faces(split: mtl.Split, folder: Path, options: FacesOptions) -> mtl.ImageFiles | None:
    """One split of a folder in VGGFace2's layout; None where it has no folder of test images.

    Raises:
        DataError: another layout, an identity in both splits, or more set aside than `bad` allows.
    """
    found = _identities(folder)
    if split not in found:
        return None
    tables = tables_of(folder, options)
    set_aside = mtl.SetAside()
    if split == mtl.Split.TRAIN:  # once
        set_aside.take(tables.set_aside)
    index = _Index.of(folder / FOLDERS[split], set_aside)
    boxes = None
    if options.boxes is not None:
        boxes, having = _boxes(folder / options.boxes / BOXES.format(split=split), index, set_aside)
        index, boxes = index.only(having), boxes[having]
    set_aside.refuse_above(options.bad, len(index), f"{split} images in {str(folder)!r}", "files")
    of_identity, _ = mtl.match_names(index.identities, tables.identities[0])
    said = tables.identities[1].at(of_identity[index.identity])
    for names, more in (tables.maad, tables.images):
        rows, _ = mtl.match_names(index.names, names)
        if split == mtl.Split.TRAIN and len(names) and not (rows >= 0).any():
            raise mtl.DataError(
                f"none of {len(names):,} rows of a table speaks of one of the {len(index):,} training images: rows are named "
                f"like {os.fsdecode(names[0])!r}, images like {os.fsdecode(index.names[0])!r}"
            )
        said = more.at(rows).over(said)
    labels, valid, classes = targets(said, tables.sources, options)
    return mtl.ImageFiles(
        index.names,
        labels,
        valid,
        classes,
        index.identity if split == mtl.Split.TRAIN else -1 - index.identity,  # other people than those of training
        size=options.size,
        channels=options.channels,
        folder=folder / FOLDERS[split],
        boxes=boxes,
        set_aside=set_aside,
    )


def _identities(folder: Path) -> dict[str, set[str]]:
    """Split -> names of its identities' folders.

    Raises:
        DataError: no training images, or an identity in both.
    """
    found = {}
    for split, name in FOLDERS.items():
        try:
            found[split] = {one.name for one in os.scandir(folder / name) if one.is_dir() and not one.name.startswith(".")}
        except OSError:
            continue
    if not found.get("train"):
        raise mtl.DataError(
            f"there are no faces in {str(folder)!r}: VGGFace2's layout is train/ and test/ with a folder per identity, as in "
            "train/n000002/0001_01.jpg; give the option folder, or use the dataset synthetic_faces"
        )
    if both := sorted(found["train"] & found.get("test", set())):
        raise mtl.DataError(
            f"{len(both)} identities are in both train/ and test/ of {str(folder)!r}, such as {both[0]!r}: figures on people "
            "seen in training say nothing about others; move each to one side"
        )
    return found


@dataclass(frozen=True)
class _Index:
    """The images of a split: their `names` below its folder, the `identity` (N,) of each, and identities' names."""

    identities: list[bytes]
    identity: NDArray[np.int32]
    names: mtl.TextColumn

    @classmethod
    def of(cls, folder: Path, set_aside: mtl.SetAside) -> _Index:
        identities: list[bytes] = []
        counts: list[int] = []
        names = mtl.TextColumn()
        for place in mtl.walk(folder, SUFFIXES):
            for name, why in place.refused:
                set_aside.add(os.fsdecode(os.path.join(os.fsencode(folder), place.folder, name)), why, f"files: {why}")
            if not place.files:
                continue
            if not place.folder or b"/" in place.folder:
                where = os.fsdecode(os.path.join(os.fsencode(folder), place.folder))
                why = "are in no identity's folder"
                for name in place.files:
                    set_aside.add(os.path.join(where, os.fsdecode(name)), why, f"files that {why}")
                continue
            identities.append(place.folder)
            counts.append(len(place.files))
            for name in place.files:
                names.append(place.folder + b"/" + name)
        return cls(identities, np.repeat(np.arange(len(identities), dtype=np.int32), counts), names)

    def __len__(self) -> int:
        return len(self.identity)

    def only(self, which: NDArray[np.bool_]) -> _Index:
        """Some of the images."""
        names = mtl.TextColumn()
        for name in compress(self.names, which):
            names.append(name)
        return _Index(self.identities, self.identity[which], names)


def _boxes(file: Path, index: _Index, set_aside: mtl.SetAside) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """(N, 4) left, top, width and height of each image's face, and of which images there is one."""
    name = mtl.TextColumn()
    sides = [mtl.NumberColumn(required=True, between=(-1e5, 1e5)) for _ in range(2)]
    sides += [mtl.NumberColumn(required=True, between=(1.0, 1e5)) for _ in range(2)]
    mtl.read_table(file, [("NAME_ID", name), *zip("XYWH", sides, strict=True)], set_aside)
    rows, _ = mtl.match_names((os.path.splitext(one)[0] for one in index.names), name)
    having = rows >= 0
    for one in compress(index.names, ~having):
        set_aside.add(os.fsdecode(one), f"has no box in {file.name}", "files without a box")
    table = np.stack([column.values for column in sides], axis=1).round().astype(np.int32)
    return table[np.maximum(rows, 0)], having


class FaceOptions(mtl.Options):
    """Of which dataset."""

    dataset: str = "vggface2"
    """vggface2, synthetic_faces, or one of these under a name of your own."""


class FaceGenderOptions(FaceOptions, mtl.ClassificationOptions):
    """Of which dataset, and how it is learned."""


class FaceAgeOptions(FaceOptions):
    """Of which dataset, and as what."""

    kind: Literal["years", "groups", "young"] = "years"
    """years: regression; groups: ordered classes; young: young or not. By what the tables hold."""
    error: Literal["squared", "absolute", "huber"] = "squared"
    """Of years, see `mtl.Regression`."""


@mtl.register_task("face_gender", options=FaceGenderOptions)
def face_gender(options: FaceGenderOptions) -> mtl.Task:
    """The binary label that tables give a face: an attribute of the data, not of people (see the module's docstring)."""
    how = options.model_dump(exclude={"dataset"})
    return mtl.Task(options.dataset, "gender", mtl.Classification(GENDERS, **how))


@mtl.register_task("face_age", options=FaceAgeOptions)
def face_age(options: FaceAgeOptions) -> mtl.Task:
    """How old a face is said to be: in years, in groups, or whether it is young."""
    heads: dict[str, tuple[str, mtl.Head]] = {
        "years": ("age", mtl.Regression("years", error=options.error)),
        "groups": ("age_group", mtl.FromClasses(mtl.Ordinal)),
        "young": ("young", mtl.FromClasses(mtl.Classification)),
    }
    target, head = heads[options.kind]
    return mtl.Task(options.dataset, target, head)
