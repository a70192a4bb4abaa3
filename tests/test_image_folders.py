"""Folders of images as a dataset: every level a target, by config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mtl
from mtl.build import load_data, make_tasks
from mtl.config import RunConfig
from mtl.data import Samples, Split

KINDS, COLOURS = ("car", "doll"), {"blue": (20, 20, 220), "green": (20, 200, 20), "red": (220, 20, 20)}


def write(folder: Path, *more: str) -> None:
    """Toys by kind and colour, five of each, and empty pictures at `more`."""
    for kind in KINDS:
        for colour, rgb in COLOURS.items():
            for i in range(5):
                file = folder / kind / colour / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (12, 10), rgb).save(file)
    for name in more:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (1, 1, 1)).save(folder / name)


def config(root: Path, tasks: Any = ("kind", "colour"), **options: Any) -> RunConfig:
    given = {"folder": "toys", "levels": ["kind", "colour"], "size": [8, 8], **options}
    return RunConfig(
        tasks=[{"name": name, "task": "column_class", "dataset": "image_folders"} for name in tasks],
        backbone={"name": "mlp", "widths": [8]},
        data={"root": root, "validation": 0.2, "datasets": {"image_folders": given}, "workers": 0},
        epochs=2,
        batch_size=8,
        device="cpu",
        precision="fp32",
    )


def load(config: RunConfig) -> dict[Split, Samples]:
    return {split: parts["image_folders"] for split, parts in load_data(config, make_tasks(config)).items() if parts}


def test_folders_of_splits_are_trained_on_by_config_alone(tmp_path: Path, in_tmp: Path) -> None:
    for split in ("Train", "valid", "TEST"):
        write(tmp_path / "toys" / split)
    result = mtl.train(config(tmp_path), "run")
    assert set(result.test) == {"kind", "colour", "score"}
    model = mtl.load_model("run").model
    assert [task.head.class_names() for task in model.tasks] == [KINDS, tuple(COLOURS)]
    found = load(config(tmp_path))
    assert {split: len(part) for split, part in found.items()} == dict.fromkeys(Split, 30)
    for part in found.values():
        for image, colour in zip(part.images[:], part.targets["colour"].tolist(), strict=True):
            assert tuple(image[:, 0, 0].tolist()) == list(COLOURS.values())[colour]


def test_without_them_a_hash_of_the_name_decides_and_what_is_added_moves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "toys")

    def held_out() -> set[bytes]:
        return set(load(config(tmp_path, test=0.3))[Split.TEST].images.paths.encoded())

    before = held_out()
    assert 0 < len(before) < 20
    write(tmp_path / "toys", *(f"car/red/more{i}.png" for i in range(20)))
    after = held_out()
    assert before < after
    assert all(b"more" in name for name in after - before)


def test_groups_are_never_parted(tmp_path: Path) -> None:
    write(tmp_path / "toys", *(f"toy{i}/red/{j}.png" for i in range(12) for j in range(4)))
    found = load(config(tmp_path, ["colour"], group="kind", test=0.3))
    of = {split: {name.split(b"/")[-3] for name in part.images.paths.encoded()} for split, part in found.items()}
    assert set(of) == set(Split)
    assert len(of[Split.TRAIN]) + len(of[Split.VAL]) + len(of[Split.TEST]) == len(set().union(*of.values())) == 14


def test_what_no_folder_says_is_a_missing_label(tmp_path: Path) -> None:
    write(tmp_path / "toys" / "train", "car/1.png", "car/unknown/2.png", "doll/red/deeper/3.png", "4.png")
    part = load(config(tmp_path).replaced(data=config(tmp_path).data.model_copy(update={"validation": 0})))[Split.TRAIN]
    names = [name.removeprefix(bytes(tmp_path / "toys" / "train") + b"/").decode() for name in part.images.paths.encoded()]
    assert "4.png" not in names  # no task has a label there
    said = {name: i for i, name in enumerate(names)}
    assert part.valid["kind"] is None
    assert part.valid["colour"] is not None
    assert [bool(part.valid["colour"][said[name]]) for name in ("car/1.png", "car/unknown/2.png", "doll/red/deeper/3.png")] == [
        False,
        False,
        True,
    ]
    assert part.classes["colour"] == tuple(COLOURS)


def test_files_that_are_none_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "toys" / "train")
    (tmp_path / "toys" / "train" / "car" / "out.png").symlink_to("/etc/hostname")
    write(tmp_path / "toys" / "spare")
    with pytest.raises(
        mtl.DataError, match=r"31 of 61 JPEG and PNG files in '.*toys' cannot be used .*, more than bad=0.01 allows; the first"
    ):
        load(config(tmp_path))
    part = load(config(tmp_path, bad=0.6))[Split.TRAIN]
    assert part.set_aside.counts == {"files: is in no split's folder": 30, "files: leads out of the folder": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": "none"}, r"there is no folder '.*none'"),
        ({"folder": "."}, r"there are no JPEG and PNG files in '.*'"),
        ({"folder": "flat"}, r"no folder in '.*flat' says a 'kind': all images lie higher up"),
        ({"levels": ["kind", "kind"]}, r"must be different names; found \['kind', 'kind'\]"),
        ({"group": "owner"}, r"must be one of the levels kind, colour; found 'owner'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    if options.get("folder") == "flat":
        (tmp_path / "flat").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "1.png")
    with pytest.raises(mtl.MTLError, match=message):
        load(config(tmp_path, **options))
