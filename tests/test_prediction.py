"""Prediction: a run directory alone says the same about a sample as it did in training, from files, folders and arrays."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import mtl
from mtl import cli
from mtl.errors import MTLError
from mtl.images import read_image, resized
from mtl.prediction import flat

PLUGIN = """
import torch
import mtl

@mtl.register_dataset("blocks")
def blocks(split, root):
    g = torch.Generator().manual_seed(0 if split == "train" else 1)
    y = torch.arange(60) % 3
    images = (60 + 60 * y.view(-1, 1, 1, 1) + 20 * torch.randn(60, 3, 8, 10, generator=g)).clamp(0, 255).to(torch.uint8)
    return mtl.ArrayDataset(images, {"y": y, "light": torch.stack([y == 0, y == 2], 1), "level": 10.0 * y})

@mtl.register_task("blocks_class")
def a():
    return mtl.Task("blocks", "y", mtl.Classification(("dark", "=grey", "light")))

@mtl.register_task("blocks_order")
def b():
    return mtl.Task("blocks", "y", mtl.Ordinal(("dark", "grey", "light")))

@mtl.register_task("blocks_several")
def c():
    return mtl.Task("blocks", "light", mtl.MultiLabel(("is dark", "is light")))

@mtl.register_task("blocks_level")
def d():
    return mtl.Task("blocks", "level", mtl.Regression(unit="cd"))
"""
TASKS = ["blocks_class", "blocks_order", "blocks_several", "blocks_level"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four tasks, trained by a process that had the plugin; this one has not."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "plugin.py").write_text(PLUGIN)
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "tasks": TASKS, "backbone": {"name": "small_cnn", "width": 0.25}, "sharing": "cross_stitch", "epochs": 25,
                "data": {"validation": 12}, "batch_size": 12, "device": "cpu", "precision": "fp32",
            }
        )
    )  # fmt: skip
    command = [sys.executable, "-m", "mtl", "train", "config.yaml", "--plugin", "plugin.py", "--run-dir", "run", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test"]["score"] > 0.9
    return folder / "run"


@pytest.fixture
def samples() -> np.ndarray:
    generator = np.random.default_rng(5)
    level = 60 + 60 * np.arange(7)[:, None, None, None] % 180
    return np.clip(level + generator.normal(0, 10, (7, 3, 8, 10)), 0, 255).astype(np.uint8)


def save(array: np.ndarray, path: Path) -> Path:
    Image.fromarray(array.transpose(1, 2, 0)).save(path)
    return path


def test_files_arrays_and_folders_say_the_same_whatever_the_batch(run: Path, samples: np.ndarray, in_tmp: Path) -> None:
    """PNG is lossless, so a file, the array it was made from and the model by hand agree; plugins are not needed."""
    folder = in_tmp / "images"
    (folder / "deeper").mkdir(parents=True)
    for i, one in enumerate(samples):
        save(one, folder / ("deeper" if i >= 4 else ".") / f"{i}.png")
    (folder / "notes.txt").write_text("not an image")
    np.save(in_tmp / "all.npy", samples)
    np.savez(in_tmp / "all.npz", images=samples, other=np.zeros(3))
    np.savez(in_tmp / "labelled.npz", pictures=samples, level=np.zeros(7), kind=np.zeros((7, 3), np.uint8))
    save_file({"features": torch.from_numpy(samples), "level": torch.zeros(7)}, in_tmp / "all.safetensors")
    from_array = mtl.predict(run, [samples])
    assert [row["index"] for row in from_array.predictions] == list(range(7))
    said = [row["tasks"] for row in from_array.predictions]
    assert said == [row["tasks"] for row in mtl.predict(run, [in_tmp / "all.npy"]).predictions]
    assert said == [row["tasks"] for row in mtl.predict(run, [in_tmp / "all.npz"], batch_size=100).predictions]
    for name in ("labelled.npz", "all.safetensors"):
        assert said == [row["tasks"] for row in mtl.predict(run, [in_tmp / name]).predictions]
    from_files = mtl.predict(run, [folder], batch_size=3)
    assert [Path(row["path"]).name for row in from_files.predictions] == [f"{i}.png" for i in range(7)]
    assert [row["tasks"]["blocks_class"]["label"] for row in from_files.predictions] == [
        t["blocks_class"]["label"] for t in said
    ]
    assert [row["tasks"]["blocks_level"]["value"] for row in from_files.predictions] == pytest.approx(
        [t["blocks_level"]["value"] for t in said], abs=1e-4
    )
    mixed = mtl.predict(run, [folder / "0.png", samples[:2], folder / "1.png"])
    assert [(row.get("path") is not None, row.get("index")) for row in mixed.predictions] == [
        (True, None), (False, 0), (False, 1), (True, None),
    ]  # fmt: skip


def test_what_is_said_is_right(run: Path, samples: np.ndarray) -> None:
    rows = [row["tasks"] for row in mtl.predict(run, [samples]).predictions]
    assert [t["blocks_class"]["label"] for t in rows] == (["dark", "=grey", "light"] * 3)[:7]
    assert [t["blocks_order"]["label"] for t in rows] == (["dark", "grey", "light"] * 3)[:7]
    assert [t["blocks_several"]["labels"] for t in rows] == ([["is dark"], [], ["is light"]] * 3)[:7]
    assert [t["blocks_level"]["value"] for t in rows] == pytest.approx(([0, 10, 20] * 3)[:7], abs=4)
    assert rows[0]["blocks_level"]["unit"] == "cd"


def test_a_model_is_restored_in_evaluation_mode(run: Path, samples: np.ndarray) -> None:
    restored = mtl.load_model(run)
    assert not restored.model.training
    assert restored.shape == (3, 8, 10)
    with torch.no_grad():
        output = restored.model({"blocks": torch.from_numpy(samples)}).outputs["blocks_class"]
    scores = [row["tasks"]["blocks_class"]["score"] for row in mtl.predict(run, [samples]).predictions]
    assert output.softmax(1).amax(1).tolist() == pytest.approx(scores, abs=1e-5)


def test_a_file_that_is_no_image_is_listed_and_does_not_stop_the_others(run: Path, samples: np.ndarray, in_tmp: Path) -> None:
    folder = in_tmp / "images"
    folder.mkdir()
    save(samples[0], folder / "good.jpg")
    (folder / "text.jpg").write_text("this is text")
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:200])
    os.mkfifo(folder / "pipe.jpg")
    done = CliRunner().invoke(cli.app, ["predict", str(run), str(folder), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [Path(row["path"]).name for row in found["predictions"]] == ["good.jpg"]
    assert {Path(row["path"]).name: row["reason"].split(":")[0] for row in found["failed"]} == {
        "text.jpg": "neither a JPEG nor a PNG image",
        "empty.png": "the file is empty",
        "cut.jpg": "damaged",
        "pipe.jpg": "not a regular file",
    }
    assert "not read: " in done.stderr
    (folder / "good.jpg").unlink()
    with pytest.raises(MTLError, match="none of 4 files could be read"):
        CliRunner().invoke(cli.app, ["predict", str(run), str(folder), "--json"], catch_exceptions=False)


def test_csv_has_a_column_per_figure_and_no_formulas(run: Path, samples: np.ndarray, in_tmp: Path) -> None:
    save(samples[1], in_tmp / "grey.png")
    done = CliRunner().invoke(cli.app, ["predict", str(run), str(in_tmp / "grey.png"), "--csv"])
    (row,) = csv.DictReader(io.StringIO(done.stdout))
    assert row["path"].endswith("grey.png")
    assert row["blocks_class.label"] == "'=grey"
    assert row["blocks_several.labels"] == ""
    assert 0 <= float(row["blocks_several.scores.is dark"]) < 0.5
    assert flat({"index": 3, "tasks": {"t": {"labels": ["a", "b"], "score": -1.5}}}) == {
        "index": 3, "t.labels": "a;b", "t.score": -1.5,
    }  # fmt: skip
    for_people = CliRunner().invoke(cli.app, ["predict", str(run), str(in_tmp / "grey.png")]).stdout
    assert "blocks_class: =grey (score 0." in for_people
    assert re.search(r"blocks_level: [0-9.]+ cd\n", for_people)
    assert "blocks_several: none" in for_people


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["nowhere.jpg"], r"no such file or folder: 'nowhere.jpg'"),
        (["."], r"no images in folder '.'; their names end in .jpg"),
        ([np.zeros((2, 3, 9, 10), np.uint8)], r"takes uint8 samples of shape \(3, 8, 10\); found uint8 \(3, 9, 10\)"),
        ([np.zeros((2, 3, 8, 10), np.float32)], r"takes uint8 samples .*; found float32"),
        ([np.zeros((2, 3, 8, 10), np.int64)], r"the array: images must be uint8 or floating point"),
        (["bad.npy"], r"'bad.npy' is no readable array"),
        (
            ["two.npz"],
            r"'two.npz' holds 2 arrays, x, y, and which .* cannot be told: none of shape \(N, 3, 8, 10\); call one",
        ),
    ],
)
def test_bad_inputs_are_refused_at_once(run: Path, in_tmp: Path, inputs: list[Any], message: str) -> None:
    Path("bad.npy").write_bytes(b"\x93NUMPY nonsense")
    np.savez("two.npz", x=np.zeros(2), y=np.zeros(2))
    with pytest.raises(mtl.DataError, match=message):
        mtl.predict(run, inputs)


def test_pickled_arrays_are_not_opened(run: Path, in_tmp: Path) -> None:
    np.save("objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(mtl.DataError, match=r"no readable array: .*Python objects"):
        mtl.predict(run, ["objects.npy"])


@dataclass(frozen=True)
class OwnHead(mtl.Classification):
    """A head that only its plugin knows."""

    def build(self, features: tuple[int, ...]) -> nn.Module:
        return nn.Sequential(mtl.FeatureHead(features, 4), nn.ReLU(), nn.Linear(4, len(self.classes)))


def test_a_head_of_its_own_needs_its_plugin_and_says_so(
    tiny_config: dict[str, Any], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl.registry import TASKS as REGISTERED

    @mtl.register_task("tiny_own")
    def own() -> mtl.Task:
        return mtl.Task("tiny", "a", OwnHead(("dark", "grey", "light")))

    result = mtl.train(mtl.RunConfig(**{**tiny_config, "tasks": ["tiny_b", "tiny_own"]}), in_tmp / "run")
    images = np.zeros((2, 1, 8, 8), np.uint8)
    rows = mtl.predict(result.run_dir, [images]).predictions
    assert set(rows[0]["tasks"]) == {"tiny_own", "tiny_b"}
    monkeypatch.delitem(REGISTERED._claims, "tiny_own")
    with pytest.raises(
        mtl.PluginError, match=r"'tiny_own' has a head of its own, test_prediction:OwnHead, .* --plugin FILE.py"
    ):
        mtl.predict(result.run_dir, [images])


def test_no_run_no_weights(in_tmp: Path, run: Path) -> None:
    with pytest.raises(mtl.RunError, match="not a run directory"):
        mtl.predict(in_tmp, [np.zeros((1, 3, 8, 10), np.uint8)])
    with pytest.raises(mtl.ConfigError, match="unknown weights 'bets'"):
        mtl.predict(run, [np.zeros((1, 3, 8, 10), np.uint8)], weights="bets")


# --- image files ------------------------------------------------------------------------------------------------------------


def test_images_of_every_kind_become_uint8_of_the_wanted_channels(in_tmp: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)
    grey = Image.fromarray(rgb).convert("L")
    Image.fromarray(rgb).save("rgb.png")
    grey.save("grey.png")
    Image.fromarray(np.dstack([rgb, rgb[:, :, :1]])).save("alpha.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) << 8).save("sixteen.png")
    Image.fromarray(rgb).quantize(256).save("palette.png")
    Image.fromarray(rgb).convert("CMYK").save("cmyk.jpg", quality=100)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.repeat(np.repeat(rgb, 8, 0), 8, 1)).save("turned.jpg", exif=exif)
    assert torch.equal(read_image(Path("rgb.png"), 3), torch.from_numpy(rgb).permute(2, 0, 1))
    assert torch.equal(read_image(Path("alpha.png"), 3), read_image(Path("rgb.png"), 3))
    assert torch.equal(read_image(Path("sixteen.png"), 1), read_image(Path("grey.png"), 1))
    assert torch.equal(read_image(Path("grey.png"), 3), read_image(Path("grey.png"), 1).expand(3, -1, -1))
    for name in ("palette.png", "cmyk.jpg"):
        assert (read_image(Path(name), 3).float() - torch.from_numpy(rgb).permute(2, 0, 1)).abs().mean() < 30, name
    assert read_image(Path("turned.jpg"), 3).shape == (3, 32, 48)


def test_too_large_an_image_is_refused_by_its_header(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl.images.LARGEST", 100)
    Image.new("L", (11, 10)).save("large.png")
    with pytest.raises(mtl.DataError, match=r"11 x 10 pixels are more than the 100 that are read"):
        read_image(Path("large.png"), 1)


def test_resizing_keeps_a_flat_image_flat_and_leaves_the_right_size_alone() -> None:
    image = torch.full((3, 40, 30), 200, dtype=torch.uint8)
    assert resized(image, (40, 30)) is image
    assert torch.equal(resized(image, (8, 10)), torch.full((3, 8, 10), 200, dtype=torch.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_hostile_files_are_told_from_images_and_nothing_else_is_raised(in_tmp: Path, suffix: str) -> None:
    """Bytes changed at random, in the header most of all, with EXIF in it: a picture or a reason, never another error."""
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "text", 72.0
    Image.fromarray(generator.integers(0, 256, (16, 12, 3)).astype(np.uint8)).save(f"good.{suffix}", exif=exif)
    good = np.frombuffer(Path(f"good.{suffix}").read_bytes(), np.uint8)
    outcomes = set()
    for _ in range(400):
        data = good.copy()
        where = generator.integers(2, min(len(data), 200), generator.integers(1, 6))
        data[where] = generator.integers(0, 256, len(where))
        Path(f"bad.{suffix}").write_bytes(data[: generator.integers(len(data) // 2, len(data) + 1)].tobytes())
        try:
            assert read_image(Path(f"bad.{suffix}"), 3).dtype == torch.uint8
            outcomes.add("read")
        except mtl.DataError:
            outcomes.add("refused")
    assert "refused" in outcomes
    assert suffix == "png" or "read" in outcomes  # a PNG carries checksums


def test_broken_exif_data_do_not_lose_the_picture(in_tmp: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = "sideways"
    image = Image.new("RGB", (4, 6), (9, 9, 9))
    image.save("odd.png")
    image.save("odd.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x02\xff\xff\xff\xff")
    assert read_image(Path("odd.jpg"), 3).shape == read_image(Path("odd.png"), 3).shape == (3, 6, 4)


def test_damaged_array_files_are_explained(run: Path, samples: np.ndarray, in_tmp: Path) -> None:
    np.savez_compressed("good.npz", images=samples)
    data = bytearray(Path("good.npz").read_bytes())
    Path("cut.npz").write_bytes(data[: len(data) // 2])
    data[60:90] = bytes(30)
    Path("flipped.npz").write_bytes(data)
    header = np.lib.format.magic(1, 0) + (118).to_bytes(2, "little")
    for name, shape in (("huge", "(1000000000000, 3, 8, 10)"), ("negative", "(-1, 3, 8, 10)")):
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
        Path(f"{name}.npy").write_bytes(header + text.ljust(117).encode() + b"\n" + bytes(40))
    np.savez("empty.npz")
    save_file({}, "empty.safetensors")
    Path("cut.safetensors").write_bytes(Path("empty.safetensors").read_bytes()[:5])
    for name in ("empty.safetensors", "cut.safetensors", "cut.npz", "flipped.npz", "huge.npy", "negative.npy", "empty.npz"):
        with pytest.raises(mtl.DataError, match=name):
            mtl.predict(run, [name])


def test_one_input_one_sample_and_the_network_itself(run: Path, samples: np.ndarray, in_tmp: Path) -> None:
    save(samples[0], in_tmp / "one.png")
    assert len(mtl.predict(run, "one.png").predictions) == 1
    assert len(mtl.predict(run, samples).predictions) == len(mtl.predict(run, samples[0]).predictions) + 6 == 7
    restored = mtl.load_model(run)
    outputs = restored(samples)
    assert {name: tuple(y.shape) for name, y in outputs.items()} == {
        "blocks_class": (7, 3), "blocks_order": (7, 2), "blocks_several": (7, 2), "blocks_level": (7,),
    }  # fmt: skip
    with pytest.raises(TypeError, match=r"takes images by dataset, as in \{'blocks': images\}"):
        restored.model(torch.from_numpy(samples))


def test_numbers_that_json_has_no_word_for_are_null(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    @mtl.register_dataset("floats")
    def floats(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return mtl.ArrayDataset(torch.randn(40, 5), {"y": torch.arange(40) % 2})

    @mtl.register_task("floats_y")
    def y() -> mtl.Task:
        return mtl.Task("floats", "y", mtl.Classification(("a", "b")))

    tiny_config |= {"tasks": ["floats_y"], "backbone": "mlp", "epochs": 1}
    mtl.train(mtl.RunConfig(**tiny_config), in_tmp / "run")
    (row,) = mtl.predict(in_tmp / "run", torch.full((1, 5), 3e38)).predictions
    json.dumps(row, allow_nan=False)
    save(np.zeros((3, 4, 4), np.uint8), in_tmp / "x.png")
    with pytest.raises(mtl.DataError, match=r"takes float32 samples of shape \(5,\), which image files do not give"):
        mtl.predict(in_tmp / "run", "x.png")
    config = (in_tmp / "run" / "config.yaml").read_text()
    (in_tmp / "run" / "config.yaml").write_text(config.replace("precision:", "precise:"))
    with pytest.raises(mtl.RunError, match=r"is incomplete, or of another version: KeyError: 'precision'"):
        mtl.load_model(in_tmp / "run")


def test_a_network_of_a_plugin_is_asked_for(tiny_config: dict[str, Any], in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtl.registry import BACKBONES

    @mtl.register_backbone("own_net")
    def own_net(input_shape: tuple[int, ...]) -> nn.Module:
        return nn.Flatten()

    mtl.train(mtl.RunConfig(**{**tiny_config, "backbone": "own_net", "epochs": 1}), in_tmp / "run")
    monkeypatch.delitem(BACKBONES._claims, "own_net")
    with pytest.raises(mtl.RunError, match=r"unknown backbone 'own_net'.* needs that plugin, installed or by --plugin FILE.py"):
        mtl.load_model(in_tmp / "run")
