"""Faces: VGGFace2's layout and tables with all their oddities, identities never in two splits, and drawn faces of nobody."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mtl_tasks.face_labels import LabelOptions, tables_of
from mtl_tasks.synthetic_faces import SyntheticFacesOptions, synthetic_faces
from mtl_tasks.vggface2 import FaceAgeOptions, FaceGenderOptions, face_age, face_gender
from PIL import Image

import mtl
from benchmarks.indexing import write_identities
from mtl.build import load_data, make_tasks
from mtl.config import RunConfig
from mtl.data import Samples, Split

PEOPLE = {"train": 8, "test": 3}
PICTURES = 4
META = """Class_ID, Name, Sample_Num, Flag, Gender
n000001, "Åsa Öberg", 4, 1, f
n000002, "Smith, John", 4, 1, m,
n000003, "Ann ""Bo"" Lee", 4, 1, f
n000004, O'Neil, 4, 1, m
n000005, "佐藤", 4, 1, f
n000006, "X", 4, 1, unknown
n000007, "Y", 4, 1,m
n000009, "Z", 4, 0, f
n000010, "Z, Jr.", 4, 0, m
n000099, "not there", 4, 0, m
"""
GENDER = {1: 0, 2: 1, 3: 0, 4: 1, 5: 0, 7: 1, 9: 0, 10: 1}  # 6 is unknown, 8 and 11 have no row


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Faces of one grey level each, 10 times the identity's number plus the picture's."""
    folder = tmp_path / "root" / "vggface2"
    number = 0
    for split, people in PEOPLE.items():
        for _ in range(people):
            number += 1
            (folder / split / f"n{number:06}").mkdir(parents=True)
            for i in range(PICTURES):
                Image.new("RGB", (20, 24), (10 * number + i,) * 3).save(folder / split / f"n{number:06}" / f"{i:04}_01.jpg")
    (folder / "identity_meta.csv").write_text(META, encoding="utf-8")
    return folder


def config(folder: Path, tasks: Any = ("face_gender",), **options: Any) -> RunConfig:
    return RunConfig(
        tasks=list(tasks),
        backbone={"name": "mlp", "widths": [8]},
        data={"root": folder.parent, "validation": 0.25, "datasets": {"vggface2": {"size": [8, 8], **options}}, "workers": 0},
        epochs=1,
        batch_size=8,
        device="cpu",
        precision="fp32",
    )


def load(config: RunConfig) -> dict[Split, Samples]:
    return {split: parts["vggface2"] for split, parts in load_data(config, make_tasks(config)).items() if parts}


def identities(part: Samples) -> list[int]:
    """Whose picture each is, by its grey level."""
    return (part.images[:].float().mean((1, 2, 3)) / 10).floor().long().tolist()


def table(file: Path, header: list[str], rows: list[list[Any]]) -> None:
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


def path(number: int, picture: int) -> str:
    return f"n{number:06}/{picture:04}_01.jpg"


# --- tables -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", ["", "no header", "ages", "no header, ages", "bom", "crlf", "commas", "no header, commas", "ages, commas"]
)
def test_the_identities_table_in_all_its_forms(folder: Path, change: str) -> None:
    lines = META.strip().split("\n")
    if "ages" in change:
        lines = [f"{line.rstrip(',')}, {'Age' if not i else 20 + i}{',' * (i == 3)}" for i, line in enumerate(lines)]
    if "no header" in change:
        lines = lines[1:]
    if "commas" in change:
        lines = [f"{line}," for line in lines]
    text = ("\r\n" if change == "crlf" else "\n").join(lines)
    (folder / "identity_meta.csv").write_bytes((b"\xef\xbb\xbf" if change == "bom" else b"") + text.encode())
    tasks = ["face_gender", "face_age"] if "ages" in change else ["face_gender"]
    found = load(config(folder, tasks))
    for part in found.values():
        mask = part.valid["face_gender"]
        known = torch.ones(len(part), dtype=torch.bool) if mask is None else mask
        for who, gender, is_known in zip(identities(part), part.targets["face_gender"].tolist(), known.tolist(), strict=True):
            assert is_known == (who in GENDER)
            assert not is_known or gender == GENDER[who]
    assert found[Split.TRAIN].set_aside.total == 0
    if "ages" in change:
        part = found[Split.TEST]
        known = part.valid["face_age"]
        assert known is not None
        ages = zip(identities(part), part.targets["face_age"].tolist(), known.tolist(), strict=True)
        assert {(who, age) for who, age, is_known in ages if is_known} == {(9, 28.0), (10, 29.0)}


def test_a_table_of_all_identities(folder: Path) -> None:
    """9,131 lines with every oddity: each identity once, with its gender and age where it has them."""
    write_identities(folder / "identity_meta.csv", ages=True)
    said = tables_of(folder, LabelOptions())
    names, of_identity = said.identities
    assert len(names) == 9131 + 1  # one has a second row
    assert said.set_aside.counts == {"rows of identities that have one": 1}
    assert {name.decode() for name in names} == {f"n{i:06}" for i in range(9131)}
    assert np.flatnonzero(of_identity.gender[:9131] < 0).tolist() == list(range(7, 9131, 1000))
    assert np.flatnonzero(np.isnan(of_identity.age[:9131])).tolist() == list(range(0, 9131, 500))
    assert ((of_identity.age[1:9131:500] >= 16) & (of_identity.age[1:9131:500] <= 80)).all()


def test_tables_of_images_override_those_of_identities(folder: Path) -> None:
    """MAAD-Face's over the identity's, one's own over both, and where one says nothing the other counts."""
    maad = [
        [path(1, 0), 0, 1, -1, 1, -1],
        [path(1, 1), 0, 0, 1, -1, -1],
        [path(6, 0), 0, 1, -1, -1, 1],
        [path(2, 0), 0, 1, 1, 1, -1],
    ]
    table(folder / "maad.csv", ["Filename", "Identity", "Male", "Young", "Middle_Aged", "Senior"], maad)
    table(folder / "mine.csv", ["file", "sex", "years"], [[path(1, 0), "f", 30], [path(1, 2), "M", ""], [path(2, 0), "", 61.5]])
    mine = {"file": "mine.csv", "path": "file", "gender": "sex", "age": "years"}
    options = mtl.DataConfig(datasets={"vggface2": {"maad": "maad.csv", "images": mine}}).datasets["vggface2"].options
    from mtl.registry import DATASETS

    data = DATASETS.get("vggface2").create(Split.TRAIN, folder.parent, options=options)
    assert data.classes == {
        "gender": ("female", "male"),
        "age_group": ("young", "middle-aged", "senior"),
        "young": ("not young", "young"),
    }
    rows = [f"n{number:06}/{i:04}_01.jpg" for number in range(1, 9) for i in range(PICTURES)]

    def said(target: str, name: str) -> Any:
        i = rows.index(name)
        return data.labels[target][i].item() if data.valid[target][i] else None

    assert [said("gender", path(1, i)) for i in range(4)] == [0, 0, 1, 0]  # mine; the identity's, MAAD-Face is not sure; mine
    assert [said("gender", path(6, i)) for i in range(2)] == [1, None]  # MAAD-Face's, and nobody's
    assert [said("age_group", path(1, i)) for i in range(3)] == [1, 0, None]
    assert said("age_group", path(6, 0)) == 2
    assert said("age_group", path(2, 0)) is None  # young and middle-aged at once
    assert [said("young", path(1, i)) for i in range(2)] == [0, 1]
    assert [said("age", path(1, 0)), said("age", path(2, 0)), said("age", path(1, 2))] == [30.0, 61.5, None]


def test_groups_and_youth_are_made_of_years(folder: Path) -> None:
    ages = [5, 17.9, 18, 34, 35, 59, 60, 99]
    rows = [[path(1 + i // PICTURES, i % PICTURES), age] for i, age in enumerate(ages)]
    rows += [[path(number, i), 40] for number in range(3, 12) for i in range(PICTURES)]
    table(folder / "ages.csv", ["path", "age"], rows)
    images = {"file": "ages.csv", "age": "age"}
    tasks = [{"name": "face_age", "kind": "groups"}, {"name": "young", "task": "face_age", "kind": "young"}]
    given = config(folder, tasks, images=images, age_bounds=[18, 35, 60], young_below=35)
    made = make_tasks(given)
    part = load_data(given.replaced(data=given.data.model_copy(update={"validation": 0})), made)[Split.TRAIN]["vggface2"]
    assert part.classes["age_group"] == ("below 18", "18 to below 35", "35 to below 60", "60 and above")
    assert part.targets["face_age"][:8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert part.targets["young"][:8].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    for wrong in ([35, 18], [0, 10], [18, 18], [200]):
        with pytest.raises(mtl.ConfigError, match="must be ages in years, each above the one before"):
            config(folder, tasks, age_bounds=wrong)


def test_a_column_of_groups(folder: Path) -> None:
    rows = [
        [path(number, i), ("old", "young", "unknown")[(number + i) % 3]] for number in range(1, 12) for i in range(PICTURES)
    ]
    table(folder / "groups.csv", ["path", "group"], rows)
    images = {"file": "groups.csv", "age_group": "group"}
    part = load(config(folder, [{"name": "face_age", "kind": "groups"}], images=images, age_groups=["young", "old"]))[
        Split.TEST
    ]
    assert part.classes["age_group"] == ("young", "old")
    with pytest.raises(mtl.DataError, match="needs age_groups, its names in their order"):
        load(config(folder, images=images))


def test_rows_that_cannot_be_used_are_listed_with_file_and_line(folder: Path) -> None:
    with open(folder / "identity_meta.csv", "a") as stream:
        stream.write('n000001, "again", 4, 1, m\nn000050, "short"\nn000051, "odd", 4, 1, robot\n')
    with pytest.raises(
        mtl.DataError, match=r"1 of 13 rows of '.*/identity_meta.csv' cannot be used .*, more than bad=0.01 allows; the first"
    ):
        load(config(folder))
    part = load(config(folder, bad=0.2))[Split.TRAIN]
    file = folder / "identity_meta.csv"
    assert sorted(part.set_aside.listed) == [
        (f"{file}:12", "a second row of 'n000001'"),
        (f"{file}:13", "2 fields, where the header has 5"),
        (f"{file}:14", "Gender 'robot' is none of the classes female, male"),
    ]
    assert 1 not in {who for who, gender in zip(identities(part), part.targets["face_gender"].tolist(), strict=True) if gender}


def test_a_row_without_an_age_keeps_its_gender(folder: Path) -> None:
    lines = META.strip().split("\n")
    lines = [f"{line.rstrip(',')}, Age" if not i else f"{line.rstrip(',')}{', 30' * (i % 2)}" for i, line in enumerate(lines)]
    (folder / "identity_meta.csv").write_text("\n".join(lines))
    found = load(config(folder, ["face_gender", "face_age"]))
    assert found[Split.TRAIN].set_aside.total == 0
    known = {who for part in found.values() for who in identities(part)}
    assert known >= set(GENDER)


def test_a_table_that_speaks_of_no_image_is_refused(folder: Path) -> None:
    table(folder / "ages.csv", ["path", "age"], [[f"train/{path(1, 0)}", 30], [f"train/{path(2, 0)}", 40]])
    message = (
        r"none of 2 rows of a table speaks of one of the 32 training images: rows are named like 'train/n000001/0000_01.jpg'"
    )
    with pytest.raises(mtl.DataError, match=message):
        load(config(folder, images={"file": "ages.csv", "age": "age"}))


def test_maad_says_who_is_young_before_years_do(folder: Path) -> None:
    maad = [[path(n, i), 0, 1, 1, -1, -1] for n in range(1, 9) for i in range(PICTURES) if (n, i) != (1, 1)]
    table(folder / "maad.csv", ["Filename", "Identity", "Male", "Young", "Middle_Aged", "Senior"], maad)
    table(folder / "ages.csv", ["path", "age"], [[path(n, i), 70] for n in range(1, 12) for i in range(PICTURES)])
    young = [{"name": "young", "task": "face_age", "kind": "young"}]
    given = config(folder, young, maad="maad.csv", images={"file": "ages.csv", "age": "age"}, young_below=35)
    given = given.replaced(data=given.data.model_copy(update={"validation": 0}))
    part = load(given)[Split.TRAIN]
    assert part.targets["young"].tolist() == [1, 0] + [1] * 30


def test_what_no_table_says_cannot_be_a_task(folder: Path) -> None:
    with pytest.raises(mtl.DataError, match=r"task 'face_age' wants unknown target 'age'; known: gender"):
        load(config(folder, ["face_age"]))
    (folder / "identity_meta.csv").unlink()
    with pytest.raises(mtl.DataError, match=r"cannot read table '.*/identity_meta.csv'"):
        load(config(folder))


# --- identities -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_no_identity_is_in_two_splits(folder: Path, seed: int) -> None:
    given = config(folder)
    found = load(given.replaced(data=given.data.model_copy(update={"split_seed": seed, "validation": 0.5})))
    of = {split: set(identities(part)) for split, part in found.items()}
    assert set(of) == set(Split)
    assert of[Split.TRAIN].isdisjoint(of[Split.VAL])
    assert (of[Split.TRAIN] | of[Split.VAL]).isdisjoint(of[Split.TEST])
    assert all(identities(found[Split.VAL]).count(who) == PICTURES for who in of[Split.VAL])


def test_an_identity_in_both_folders_is_refused(folder: Path) -> None:
    (folder / "test" / "n000003").mkdir()
    with pytest.raises(mtl.DataError, match=r"1 identities are in both train/ and test/ of '.*', such as 'n000003'"):
        load(config(folder))


def test_a_folder_without_faces_says_what_would_be_one(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(mtl.DataError, match=r"there are no faces in '.*none/vggface2': VGGFace2's layout is train/ and test/"):
        load(config(folder.parent / "none" / "vggface2"))


def test_without_test_images_there_is_no_test_split(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / "test")
    assert set(load(config(folder))) == {Split.TRAIN, Split.VAL}


def test_files_that_are_none_are_set_aside(folder: Path) -> None:
    (folder / "train" / "loose.jpg").write_bytes(b"x")
    (folder / "train" / "n000001" / "deeper").mkdir()
    (folder / "train" / "n000001" / "deeper" / "x.jpg").write_bytes(b"x")
    (folder / "train" / "n000001" / "out.jpg").symlink_to("/etc/hostname")
    (folder / "train" / "n000001" / "notes.txt").write_bytes(b"x")
    with pytest.raises(
        mtl.DataError, match=r"3 of 35 train images in '.*' cannot be used .*, more than bad=0.01 allows; the first"
    ):
        load(config(folder))
    part = load(config(folder, bad=0.1))[Split.TRAIN]
    assert part.set_aside.counts == {"files: leads out of the folder": 1, "files that are in no identity's folder": 2}


# --- boxes ------------------------------------------------------------------------------------------------------------------


def test_the_face_is_cut_out_by_its_box(folder: Path) -> None:
    (folder / "bb").mkdir()
    number = 0
    for split, people in PEOPLE.items():
        rows = []
        for _ in range(people):
            number += 1
            for i in range(PICTURES):
                picture = np.zeros((24, 20, 3), np.uint8)
                picture[8:16, 4:12] = 10 * number + i
                Image.fromarray(picture).save(folder / split / f"n{number:06}" / f"{i:04}_01.png")
                (folder / split / f"n{number:06}" / f"{i:04}_01.jpg").unlink()
                rows.append([f"n{number:06}/{i:04}_01", 4, 8, 8, 8])
        table(folder / "bb" / f"loose_bb_{split}.csv", ["NAME_ID", "X", "Y", "W", "H"], rows[split == "train" :])
    with pytest.raises(mtl.DataError, match=r"1 of 32 train images .*has no box in loose_bb_train.csv"):
        load(config(folder, boxes="bb"))
    part = load(config(folder, boxes="bb", bad=0.1))[Split.TEST]
    assert identities(part) == [9] * 4 + [10] * 4 + [11] * 4
    assert part.images[:].flatten(1).float().std(1).max() == 0  # nothing but face
    assert "n000001/0000_01.png" in [
        where for where, _ in load(config(folder, boxes="bb", bad=0.1))[Split.TRAIN].set_aside.listed
    ]


# --- drawn faces ------------------------------------------------------------------------------------------------------------

FEW = {"people": 10, "test_people": 4, "pictures": 3}


def drawn(root: Path, **options: Any) -> RunConfig:
    tasks = [{"name": name, "dataset": "synthetic_faces"} for name in ("face_gender", "face_age")]
    return RunConfig(
        tasks=tasks,
        backbone={"name": "mlp", "widths": [8]},
        data={"root": root, "validation": 0.2, "datasets": {"synthetic_faces": {**FEW, **options}}, "workers": 0},
        epochs=1,
        batch_size=8,
        device="cpu",
        precision="fp32",
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_drawn_faces_are_in_vggface2s_layout_and_the_same_for_a_seed(in_tmp: Path) -> None:
    results = [mtl.train(drawn(in_tmp / root), in_tmp / f"run-{root}") for root in ("a", "b")]
    assert results[0].test == results[1].test
    [one], [other] = (list((in_tmp / root / "synthetic_faces").iterdir()) for root in ("a", "b"))
    assert one.name == other.name
    assert contents(one) == contents(other)
    assert len(list(one.rglob("*.jpg"))) == 14 * 3
    assert "Not photographs" in (one / "SYNTHETIC.txt").read_text()
    before = {file: file.stat().st_mtime_ns for file in one.rglob("*")}
    load_data(drawn(in_tmp / "a", boxes="bb_landmark", maad="MAAD_Face.csv"), make_tasks(drawn(in_tmp / "a")))
    assert {file: file.stat().st_mtime_ns for file in one.rglob("*")} == before, "drawn once"
    load_data(drawn(in_tmp / "a", seed=1), make_tasks(drawn(in_tmp / "a")))
    assert len(list((in_tmp / "a" / "synthetic_faces").iterdir())) == 2


def test_drawn_tables_say_the_same_as_one_another(tmp_path: Path) -> None:
    """Gender by identity and by image agree; MAAD-Face's groups follow the years; every image has a box inside it."""
    given = drawn(tmp_path, maad="MAAD_Face.csv", boxes="bb_landmark")
    part = load_data(given, make_tasks(given))[Split.TRAIN]["synthetic_faces"]
    [folder] = (tmp_path / "synthetic_faces").iterdir()
    with open(folder / "identity_meta.csv", encoding="utf-8", newline="") as stream:
        gender = {row[0]: row[4] for row in list(csv.reader(stream, skipinitialspace=True))[1:]}
    assert len(gender) == 14
    with open(folder / "attributes.csv", newline="") as stream:
        attributes = list(csv.DictReader(stream))
    assert all(row["gender"][0] == gender[row["path"][:7]] for row in attributes)
    assert all(16 <= float(row["age"]) <= 85 for row in attributes if row["age"])
    with open(folder / "MAAD_Face.csv", newline="") as stream:
        for row, other in zip(csv.DictReader(stream), attributes, strict=True):
            assert row["Filename"] == other["path"]
            if other["age"] and row["Young"] == "1":
                assert float(other["age"]) <= 32
    assert part.classes["age_group"] == ("young", "middle-aged", "senior")
    assert part.images.boxes is not None
    left, top, width, height = part.images.boxes.T
    assert ((left >= 0) & (top >= 0) & (left + width <= 72) & (top + height <= 88)).all()


@pytest.mark.parametrize("kind", ["gender", "years", "groups", "young"])
def test_tasks_of_faces_conform(kind: str, tmp_path: Path) -> None:
    options = SyntheticFacesOptions(people=20, test_people=6, pictures=4, maad=Path("MAAD_Face.csv"))

    @mtl.register_dataset("few_faces", splits=("train", "test"))
    def few_faces(split: mtl.Split, root: Path) -> mtl.ImageFiles | None:
        return synthetic_faces(split, root, options)

    @mtl.register_task("few")
    def few() -> mtl.Task:
        if kind == "gender":
            return face_gender(FaceGenderOptions(dataset="few_faces"))
        return face_age(FaceAgeOptions(dataset="few_faces", kind=kind))

    assert {check.name: check.detail for check in mtl.check_task("few", root=tmp_path) if not check.ok} == {}


def test_an_unwritable_root_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(mtl.DataError, match=r"cannot write drawn faces to '.*': Not a directory"):
        load_data(drawn(tmp_path / "file"), make_tasks(drawn(tmp_path)))


def test_a_half_drawn_folder_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtl_tasks import synthetic_faces

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(synthetic_faces, "_write_meta", dies)
        with pytest.raises(KeyboardInterrupt):
            load_data(drawn(tmp_path), make_tasks(drawn(tmp_path)))
    assert os.listdir(tmp_path / "synthetic_faces") == []
    assert len(load_data(drawn(tmp_path), make_tasks(drawn(tmp_path)))[Split.TEST]["synthetic_faces"]) == 12
