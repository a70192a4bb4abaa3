"""A packed folder trains as the files that it was made of do, goes on where it was cut, and notices what has changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mtl
from mtl import packed, packing
from mtl.build import load_data, make_tasks
from mtl.config import RunConfig
from mtl.data import Split
from mtl.decoding import Decoders
from mtl.progress import Silent

COUNT, SIZE = 70, (10, 8)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures in folders, two of which are none, blocks of 16."""
    monkeypatch.setattr(packed, "BLOCK", 16)
    monkeypatch.setattr(packing, "BLOCK", 16)
    root = tmp_path / "root"
    random = np.random.default_rng(0)
    for split, count in (("train", COUNT), ("test", 20)):
        for i in range(count):
            file = root / "toys" / split / ("car", "doll")[i % 2] / f"{i:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = (random.integers(0, 60, (12, 14, 3)) + 150 * (i % 2)).astype(np.uint8)
            Image.fromarray(pixels).save(file)
    for name in ("train/car/006.jpg", "train/doll/051.jpg"):
        (root / "toys" / name).write_bytes(b"<html>")
    return root


OPTIONS = {"folder": "toys", "levels": ["kind"], "size": list(SIZE), "bad": 0.1}


def pack(root: Path, out: str = "p", workers: int = 0, bad_files: float = 0.1, **options: Any) -> dict[str, Any]:
    from mtl.choices import choose_dataset

    chosen = choose_dataset("image_folders", {**OPTIONS, **options}).options
    with Decoders(workers) as decoders:
        return packing.pack("image_folders", chosen, root, root / out, decoders, bad_files, Silent())


def config(root: Path, of: dict[str, Any]) -> RunConfig:
    return RunConfig(
        tasks=[{"name": "kind", "task": "column_class", "dataset": "toys"}],
        backbone={"name": "mlp", "widths": [8]},
        data={"root": root, "validation": 0.2, "datasets": {"toys": of}, "workers": 0, "bad_files": 0.1},
        epochs=3,
        batch_size=16,
        device="cpu",
        precision="fp32",
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != ".lock"}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_packed_is_what_the_files_show(root: Path, workers: int) -> None:
    found = pack(root, workers=workers)
    assert found["splits"] == {"train": {"images": COUNT, "unreadable": 2}, "test": {"images": 20, "unreadable": 0}}
    assert not packed.damaged(root / "p")
    given = config(root, {"dataset": "packed", "folder": "p", "verify": True})
    parts = {split: of["toys"] for split, of in load_data(given, make_tasks(given)).items()}
    files = config(root, {"dataset": "image_folders", **OPTIONS})
    others = {split: of["toys"] for split, of in load_data(files, make_tasks(files)).items()}
    assert len(parts[Split.TRAIN]) + len(parts[Split.VAL]) == COUNT - 2
    assert parts[Split.TRAIN].classes == {"kind": ("car", "doll")}
    assert torch.equal(parts[Split.TEST].images[:], others[Split.TEST].images[:])
    assert torch.equal(parts[Split.TEST].targets["kind"], others[Split.TEST].targets["kind"])
    assert parts[Split.TRAIN].set_aside.total == 2
    index = torch.tensor([5, 1, 5])
    assert torch.equal(parts[Split.TEST].images[index], others[Split.TEST].images[index])
    (batch, failed), *_ = parts[Split.TEST].images.batches([(2, 6)], torch.arange(19, -1, -1))
    assert (batch.tolist(), failed) == (others[Split.TEST].images[torch.tensor([17, 16, 15, 14])].tolist(), [])


def test_it_trains_as_the_same_pictures_in_files_do(root: Path, in_tmp: Path) -> None:
    for name in ("train/car/006.jpg", "train/doll/051.jpg"):
        (root / "toys" / name).unlink()
    pack(root)
    one = mtl.train(config(root, {"dataset": "packed", "folder": "p"}), in_tmp / "one")
    other = mtl.train(config(root, {"dataset": "image_folders", **OPTIONS}), in_tmp / "other")
    assert one.test == other.test
    assert (in_tmp / "one" / "metrics.jsonl").read_text() == (in_tmp / "other" / "metrics.jsonl").read_text()
    given = config(root, {"dataset": "packed", "folder": "p"})
    larger = mtl.train(given.replaced(data=given.data.model_copy(update={"input_shape": (3, 16, 16)})), in_tmp / "larger")
    assert mtl.load_model(in_tmp / "larger").shape == (3, 16, 16)
    assert set(larger.test) == {"kind", "score"}


def test_a_packed_folder_stands_in_for_its_dataset(root: Path) -> None:
    """The tasks of that dataset need no other name."""
    pack(root)
    tasks = [{"name": "kind", "task": "column_class", "dataset": "image_folders"}]
    datasets = {"image_folders": {"dataset": "packed", "folder": "p"}}
    given = RunConfig(tasks=tasks, data={"root": root, "validation": 0.2, "datasets": datasets}, device="cpu")
    assert len(load_data(given, make_tasks(given))[Split.TEST]["image_folders"]) == 20
    assert RunConfig(**given.model_dump(mode="json")) == given


def test_the_same_command_again_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pack(root)
    before = contents(root / "p")
    monkeypatch.setattr(packing, "_write_split", None)
    assert pack(root) == first
    assert contents(root / "p") == before


@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_a_packing_that_was_cut_goes_on_and_comes_to_the_same(root: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after some blocks, with the note of the last one torn; what is noted is not decoded again."""
    pack(root, "whole")
    read: list[int] = []
    real = packing._blocks

    def cut(p: Any, reading: Any, done: int) -> Any:
        for i, block in enumerate(real(p, reading, done)):
            if i == after:
                raise KeyboardInterrupt
            yield block

    def counted(p: Any, reading: Any, done: int) -> Any:
        for block in real(p, reading, done):
            read.append(len(block[0]))
            yield block

    with monkeypatch.context() as broken:
        broken.setattr(packing, "_blocks", cut)
        with pytest.raises(KeyboardInterrupt):
            pack(root)
    with pytest.raises(
        mtl.DataError, match=r"is no packed folder: no manifest.json in it; it is not finished: run the same mtl pack"
    ):
        packed.read_manifest(root / "p")
    notes = root / "p" / "train.blocks"
    if notes.is_file():
        with open(notes, "a") as stream:
            stream.write('["torn')
    monkeypatch.setattr(packing, "_blocks", counted)
    pack(root)
    assert sum(read) == COUNT + 20 - min(after * 16, COUNT)
    assert contents(root / "p") == contents(root / "whole")


def test_a_noted_block_that_is_not_on_the_disk_is_packed_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(root, "whole")
    real = packing._blocks
    with monkeypatch.context() as broken:
        broken.setattr(packing, "_manifest", None)
        with pytest.raises(TypeError):
            pack(root)
    with open(root / "p" / "train.u8", "r+b") as file:
        file.seek(20 * SIZE[0] * SIZE[1] * 3)
        file.write(b"\0" * 50)
    begun: list[int] = []
    monkeypatch.setattr(packing, "_blocks", lambda p, reading, done: begun.append(done) or real(p, reading, done))
    pack(root)
    assert begun == [1, 2]
    assert contents(root / "p") == contents(root / "whole")


@pytest.mark.parametrize("file", ["train.u8", "test.u8", "train.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_is_noticed(root: Path, file: str, how: str) -> None:
    pack(root)
    path = root / "p" / file
    data = bytearray(path.read_bytes())
    match how:
        case "flip":
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[:-3])
        case "gone":
            path.unlink()
    with pytest.raises(mtl.MTLError, match=r"damaged|no packed folder|is damaged|format"):
        packing.from_command("image_folders", [], root / "p", root, 0, 0.01, True, Silent())
    given = config(root, {"dataset": "packed", "folder": "p", "verify": True})
    with pytest.raises(mtl.MTLError):
        load_data(given, make_tasks(given))


def test_nothing_is_packed_over_something_else(root: Path) -> None:
    pack(root)
    before = contents(root / "p")
    with pytest.raises(mtl.DataError, match="holds that dataset with other files, labels or options, packed or half packed"):
        pack(root, size=[6, 6])
    assert contents(root / "p") == before
    (root / "mine").mkdir()
    (root / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(mtl.DataError, match=r"is not empty: it holds thesis.tex; give a new folder"):
        pack(root, "mine")
    assert contents(root / "mine") == {"thesis.tex": b"x"}
    with pytest.raises(mtl.DataError, match=r"2 image files cannot be read, more than the 1 that data.bad_files allows"):
        pack(root, "strict", bad_files=0.02)


def test_other_pixels_under_the_same_names_are_noticed(root: Path) -> None:
    pack(root)
    file = root / "toys" / "train" / "car" / "000.jpg"
    Image.new("RGB", (14, 12), (1, 200, 1)).save(file)
    with pytest.raises(mtl.DataError, match="holds that dataset with other files, labels or options"):
        pack(root)

    seeds = [0]

    @mtl.register_dataset("changing", splits=("train",))
    def changing(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        images = np.random.default_rng(seeds[0]).integers(0, 255, (40, 6, 6)).astype(np.uint8)
        return mtl.ArrayDataset(images, {"x": np.arange(40) % 2}, classes={"x": (f"a{seeds[0]}", "b")})

    with Decoders(0) as decoders:
        packing.pack("changing", None, root, root / "c", decoders, 0.0, Silent())
        seeds[0] = 1
        with pytest.raises(mtl.DataError, match="holds that dataset with other files, labels or options"):
            packing.pack("changing", None, root, root / "c", decoders, 0.0, Silent())


@pytest.mark.parametrize("how", ["torn note", "half a first note", "odd note"])
def test_what_a_kill_may_leave_does_not_stop_the_next_packing(root: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(root, "whole")
    (root / "p").mkdir()
    if how == "torn note":
        (root / "p" / ".packing.json.7.tmp").write_text('{"data')
    else:
        with monkeypatch.context() as broken:
            broken.setattr(packing, "_manifest", None)
            with pytest.raises(TypeError):
                pack(root)
        notes = root / "p" / "train.blocks"
        notes.write_text("5\n" if how == "odd note" else notes.read_text()[:10])
    pack(root)
    (root / "p" / ".packing.json.7.tmp").unlink(missing_ok=True)
    assert contents(root / "p") == contents(root / "whole")


def test_a_damaged_folder_is_packed_again(root: Path) -> None:
    pack(root, "whole")
    pack(root)
    with open(root / "p" / "train.u8", "r+b") as file:
        file.truncate(100)
    pack(root)
    assert contents(root / "p") == contents(root / "whole")


def test_vectors_and_floats_are_not_packed(root: Path) -> None:
    @mtl.register_dataset("unpackable", splits=("train",))
    def unpackable(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return mtl.ArrayDataset(np.zeros((4, 3), np.float32), {"x": np.arange(4)})

    with Decoders(0) as decoders, pytest.raises(mtl.DataError, match="only uint8 images"):
        packing.pack("unpackable", None, root, root / "f", decoders, 0.0, Silent())


def test_what_is_in_memory_can_be_packed_too(root: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (40, 6, 6)).astype(np.uint8)

    @mtl.register_dataset("small", splits=("train",))
    def small(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return mtl.ArrayDataset(images, {"x": np.arange(40) % 3}, {"x": np.arange(40) > 5}, groups=np.arange(40) // 4)

    with Decoders(0) as decoders:
        packing.pack("small", None, root, root / "s", decoders, 0.0, Silent())
    found = packed.packed(mtl.Split.TRAIN, root, packed.PackedOptions(folder=Path("s")))
    assert found is not None
    assert torch.equal(found.images[:][:, 0], torch.from_numpy(images))
    assert torch.equal(found.valid["x"], torch.arange(40) > 5)
    assert found.groups is not None
    assert found.groups.tolist() == [i // 4 for i in range(40)]


def test_the_command(root: Path) -> None:
    command = [sys.executable, "-m", "mtl", "pack", "image_folders", "folder=toys", "levels=[kind]", "size=[10,8]", "bad=0.1"]
    more = ["--data", str(root), "--workers", "1", "--bad-files", "0.1", "--json"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["splits"]["train"] == {"images": COUNT, "unreadable": 2}
    assert json.loads(done.stdout)["folder"] == str(root / "packed" / "image_folders")
    again = subprocess.run([*command, *more, "--verify"], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["damaged"] == 0
    wrong = subprocess.run([*command, "sizee=3", *more], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "unknown key 'sizee'" in wrong.stderr


@pytest.mark.spawns
def test_killed_in_the_middle_it_goes_on(root: Path) -> None:
    """A real process, SIGKILL; then the same command, and the same bytes as of one that was left alone."""
    for i in range(COUNT, 3000):
        os.link(
            root / "toys" / "train" / ("car/000.jpg", "doll/001.jpg")[i % 2], root / "toys" / "train" / "car" / f"{i:05}.jpg"
        )
    command = [sys.executable, "-m", "mtl", "pack", "image_folders", "folder=toys", "levels=[kind]", "size=[10,8]", "bad=0.1"]
    more = ["--data", str(root), "--workers", "1", "--bad-files", "0.1", "--out"]
    for _ in range(2):
        process = subprocess.Popen([*command, *more, str(root / "k")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(notes.read_text().splitlines()) if (notes := root / "k" / "train.blocks").is_file() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if notes.is_file() and len(notes.read_text().splitlines()) > before:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    for out in ("k", "whole"):
        subprocess.run([*command, *more, str(root / out)], check=True, capture_output=True)
    assert contents(root / "k") == contents(root / "whole")
