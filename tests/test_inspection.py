"""What is wrong with data is counted exactly: images in two splits, twice, with two labels; classes that are not there."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Lines
from PIL import Image
from typer.testing import CliRunner

import mtl
from mtl import cli
from mtl.build import run
from mtl.config import RunConfig
from mtl.inspection import inspect
from mtl.progress import Silent


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, Any]:
    """40 training images of which 3 are copies, 12 for testing of which 4 are training images, 2 with another label; no test
    image is a "c", and one label is missing.
    """
    random = np.random.default_rng(0)
    train = random.integers(0, 255, (40, 6, 6)).astype(np.uint8)
    test = random.integers(0, 255, (12, 6, 6)).astype(np.uint8)
    train[37:] = train[:3]
    test[:4] = train[10:14]
    label = np.arange(40) % 3
    label[37:] = label[:3]
    of_test = np.arange(12) % 2
    of_test[:4] = label[10:14]
    of_test[0] = (of_test[0] + 1) % 2
    label[39] = (label[39] + 1) % 3  # of the copy of image 2
    of_test[:4] = np.minimum(of_test[:4], 1)
    expected = int(sum(a != b for a, b in zip(of_test[:4], label[10:14], strict=True))) + 1

    @mtl.register_dataset("planted")
    def dataset(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        if split == mtl.Split.TRAIN:
            return mtl.ArrayDataset(train, {"kind": label, "size": label / 2}, {"kind": np.arange(40) != 20})
        return mtl.ArrayDataset(test, {"kind": of_test, "size": of_test / 2})

    mtl.register_task("planted_kind")(lambda: mtl.Task("planted", "kind", mtl.Classification(("a", "b", "c"))))
    mtl.register_task("planted_size")(lambda: mtl.Task("planted", "size", mtl.Regression()))
    return {"conflicting": expected}


def config(**data: Any) -> RunConfig:
    tasks = ["planted_kind", "planted_size"]
    network = {"name": "mlp", "widths": [4]}
    return RunConfig(tasks=tasks, backbone=network, data={"validation": 0, **data}, epochs=1, batch_size=8, device="cpu")


@pytest.fixture
def numbers() -> np.ndarray[Any, np.dtype[np.float64]]:
    """200 labels of a task `measured_number` with a deviation of 1, for a test to spoil."""
    labels = np.random.default_rng(0).normal(30.0, 1.0, 200)

    @mtl.register_dataset("measured")
    def dataset(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        n = 200 if split == mtl.Split.TRAIN else 20
        images = np.random.default_rng(n).integers(0, 255, (n, 4, 4)).astype(np.uint8)
        return mtl.ArrayDataset(images, {"number": labels[:n]}, {"number": ~np.isnan(labels[:n])})

    mtl.register_task("measured_number")(lambda: mtl.Task("measured", "number", mtl.Regression()))
    return labels


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, None),
        ({7: 34.0}, None),
        ({7: 9999.0}, "1 of 200 training labels lie far from the others (the farthest is 9999"),
        ({7: -1e30, 8: 1e20}, "2 of 200 training labels lie far from the others (the farthest is -1e+30"),
        ({7: 9999.0, 9: np.nan}, "1 of 199 training labels"),
        (dict.fromkeys(range(20), 9999.0), None),
    ],
)
def test_labels_that_set_the_scale_are_told(numbers: Any, wrong: dict[int, float], said: str | None) -> None:
    for i, value in wrong.items():
        numbers[i] = value
    measured = RunConfig(
        tasks=["measured_number"],
        backbone={"name": "mlp", "widths": [4]},
        data={"validation": 0},
        epochs=1,
        batch_size=20,
        device="cpu",
        sharing="unshared",
    )
    warnings = [line for line in inspect(measured, Silent())["warnings"] if "training labels" in line]
    with closing(run(measured)) as ready:
        assert [note for note in ready.notes if "training labels" in note] == warnings
    assert len(warnings) == (said is not None), warnings
    assert all(str(said) in line for line in warnings), warnings


def test_counts_are_exact(planted: dict[str, Any]) -> None:
    found = inspect(config(), Silent())
    about = found["planted"]
    assert about["splits"] == {"train": {"images": 40, "unreadable": 0}, "test": {"images": 12, "unreadable": 0}}
    assert about["duplicates"] == {"train": 3, "test": 0}
    assert about["shared"] == {"train, test": 4}
    assert about["conflicting"] == {"planted_kind": planted["conflicting"], "planted_size": planted["conflicting"]}
    kind = about["tasks"]["planted_kind"]
    assert kind["labelled"] == {"train": 39, "test": 12}
    assert sum(kind["classes"]["train"].values()) == 39
    assert kind["absent"] == {"train": [], "test": ["c"]}
    assert found["warnings"] == [
        "dataset planted: 4 test images are in train too: figures on them say nothing about new ones",
        "task planted_kind: no test sample of c",
        f"task planted_kind: {planted['conflicting']} images are there twice with different labels",
        f"task planted_size: {planted['conflicting']} images are there twice with different labels",
    ]


def test_a_run_says_which_images_leak_and_an_absent_class_is_no_number(planted: dict[str, Any], in_tmp: Path) -> None:
    shown = Lines()
    result = mtl.train(config(), "run", shown)
    assert any("4 test images are in train too" in line for line in shown.lines)
    assert result.test is not None
    assert 0 <= result.test["planted_kind"]["f1_macro"] <= 1
    assert all(value == value for value in result.test["planted_kind"].values())  # no NaN


def test_classes_that_are_spelt_in_two_ways_are_named(planted: dict[str, Any]) -> None:
    mtl.register_task("planted_cars")(lambda: mtl.Task("planted", "kind", mtl.Classification(("red car", "Red  Car", "b"))))
    said = inspect(config().replaced(tasks=["planted_cars"]), Silent())["warnings"]
    assert "task planted_cars: classes 'red car' and 'Red  Car' differ in case or spaces only; are they one?" in said


def test_files_are_read_and_the_command_prints_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for i in range(count):
            file = tmp_path / "toys" / split / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (6, 6, 3)).astype(np.uint8)).save(file)
    (tmp_path / "toys" / "test" / "a" / "0.png").write_bytes((tmp_path / "toys" / "train" / "b" / "1.png").read_bytes())
    (tmp_path / "toys" / "train" / "a" / "2.png").write_bytes(b"x")
    (tmp_path / "toys" / "train" / "a" / "4.png").write_bytes(b"x")
    (tmp_path / "toys" / "test" / "a" / "2.png").write_bytes(b"x")  # in the same place as a training image that is none
    Path(tmp_path / "c.yaml").write_text(
        f"tasks: [{{name: kind, task: column_class, dataset: image_folders}}]\nbackbone: {{name: mlp, widths: [4]}}\n"
        f"data: {{root: {tmp_path}, validation: 0, bad_files: 0.1, workers: 0, datasets: {{image_folders: {{folder: toys, "
        "levels: [kind], size: [6, 6]}}}\n"
    )
    done = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "c.yaml"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["warnings"][1:] == [
        "task kind: 1 images are there twice with different labels",
        "dataset image_folders: 2 of 12 train images cannot be read: more than data.bad_files",
    ]
    assert found["image_folders"]["shared"] == {"train, test": 1}
    assert found["image_folders"]["conflicting"] == {"kind": 1}
    assert found["image_folders"]["duplicates"] == {"train": 0, "test": 0}  # two unreadable files are not one image
    assert found["image_folders"]["splits"]["train"] == {"images": 12, "unreadable": 2}
