"""Image files: read by workers or not, they train, score and predict as the same pixels in memory do."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

import mtl
from mtl import auto, build
from mtl.checkpoints import weights_file
from mtl.config import RunConfig
from mtl.data import Samples
from mtl.decoding import Decoders
from mtl.files import FileImages, ImageFiles, Paths, Reading, Unreadable
from mtl.hardware import usable_cores
from mtl.images import read_image, resized
from mtl.seeding import permutation
from mtl.standardize import Standardize
from mtl.trainer import fit

TRAIN, TEST, SIZE = 60, 24, (16, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG and PNG files of several sizes, whose brightness tells `a` (0 to 2) and whose slope tells `b` (0 or 1)."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(TRAIN + TEST):
        height, width = [(32, 32), (32, 24), (16, 12)][i % 3]
        slope = np.linspace(-40, 40, width)[None, :, None] * (2 * ((i // 3) % 2) - 1)
        picture = 80 + 50 * (i % 3) + slope + random.normal(0, 8, (height, width, 3))
        image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i:03}.{'png' if i % 5 == 0 else 'jpg'}")
    return folder


def files(folder: Path, split: str) -> tuple[list[Path], dict[str, Any], dict[str, Any]]:
    """Paths, labels, masks of a split."""
    which = range(TRAIN) if split == "train" else range(TRAIN, TRAIN + TEST)
    number = np.array(which)
    labels = {"a": number % 3, "b": (number // 3) % 2}
    return [folder / f"{i:03}.{'png' if i % 5 == 0 else 'jpg'}" for i in which], labels, {"b": number % 7 != 0}


class PictureOptions(mtl.Options):
    files: bool = True


@pytest.fixture
def config(folder: Path, tiny_config: dict[str, Any]) -> Callable[..., RunConfig]:
    """Makes a config of two tasks on pictures in files (or, of the same name, in memory); a third is on other data."""

    @mtl.register_dataset("pictures", options=PictureOptions)
    def pictures(split: mtl.Split, root: Path, options: PictureOptions) -> mtl.ImageFiles | mtl.ArrayDataset:
        paths, labels, valid = files(folder, split)
        if options.files:
            return mtl.ImageFiles(paths, labels, valid, size=SIZE)
        return mtl.ArrayDataset([read_image(path, 3, SIZE).numpy() for path in paths], labels, valid)

    @mtl.register_dataset("arrays")
    def arrays(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return mtl.ArrayDataset(np.zeros((40, 3, *SIZE), np.uint8), {"a": np.arange(40) % 3})

    for dataset, target, classes in (
        ("pictures", "a", ("dark", "grey", "light")),
        ("pictures", "b", ("falling", "rising")),
        ("arrays", "a", ("x", "y", "z")),
    ):
        task = mtl.Task(dataset, target, mtl.Classification(classes))
        mtl.register_task(f"{dataset}_{target}")(lambda task=task: task)

    def make(workers: int | str = 0, options: dict[str, Any] | None = None, **more: Any) -> RunConfig:
        data = {"validation": 12, "workers": workers, "augment": {"flip": True, "crop": 1}}
        data["datasets"] = {"pictures": options or {}}
        return RunConfig(**{**tiny_config, "tasks": ["pictures_a", "pictures_b"], "data": data, **more})

    return make


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    """Two workers for the tests that do not end them."""
    with Decoders(2) as decoders:
        yield decoders


@pytest.fixture
def images(folder: Path, decoders: Decoders) -> FileImages:
    return ImageFiles(*files(folder, "train"), size=SIZE).placed("cpu", Reading(decoders))


def pixels(images: FileImages, bounds: list[tuple[int, int]], order: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """Batches of files that can all be read."""
    for batch, failed in images.batches(bounds, order):
        assert failed == []
        yield batch


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """What a run logged."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def children(pid: int) -> set[int]:
    """Processes that decode, below `pid`: the one that forks and the workers."""
    shown = subprocess.run(["ps", "-wweo", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    found: set[int] = set()
    for _ in range(2):  # generations
        for line in shown.splitlines():
            number, parent, state, command = line.split(maxsplit=3)
            if int(parent) in {pid, *found} and "Z" not in state and "mtl.decoder" in command:
                found.add(int(number))
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No process is there after a test that was not there before it."""
    before = children(os.getpid())
    yield
    assert children(os.getpid()) == before


# --- the same as in memory --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
def test_files_train_as_their_pixels_do_whatever_the_workers(config: Callable[..., RunConfig], in_tmp: Path) -> None:
    """Bitwise: losses, metrics, standardisation and weights, of masked labels, carved validation and augmentation."""
    arrays = mtl.train(config(options={"files": False}), in_tmp / "arrays")
    results = [mtl.train(config(workers), in_tmp / f"{workers}") for workers in (0, 1, 2)]
    assert {row["n"] for row in rows(in_tmp / "arrays") if row["split"] == "train"} == {48, 40}
    expected = load_file(weights_file(in_tmp / "arrays"))
    for workers, result in enumerate(results):
        assert rows(in_tmp / f"{workers}") == rows(in_tmp / "arrays")
        assert result.test == arrays.test
        found = load_file(weights_file(in_tmp / f"{workers}"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len({result.config_digest for result in results}) == 1
    figures = build.evaluate_run(in_tmp / "2")
    assert results[2].test is not None
    assert figures["score"] == results[2].test["score"]


def test_a_run_predicts_on_a_file_what_it_scored_it_as(config: Callable[..., RunConfig], folder: Path, in_tmp: Path) -> None:
    mtl.train(config(), in_tmp / "run")
    paths, labels, _ = files(folder, "test")
    said = [row["tasks"]["pictures_a"]["label"] for row in mtl.predict(in_tmp / "run", paths).predictions]
    right = np.mean([name == ("dark", "grey", "light")[y] for name, y in zip(said, labels["a"], strict=True)])
    assert right == pytest.approx(build.evaluate_run(in_tmp / "run")["pictures_a"]["accuracy"])


@pytest.mark.usefixtures("nothing_left")
def test_files_and_arrays_train_together(config: Callable[..., RunConfig], in_tmp: Path) -> None:
    both = [mtl.train(config(n, tasks=["pictures_b", "arrays_a"]), in_tmp / f"{n}") for n in (0, 1)]
    assert both[0].test == both[1].test
    assert mtl.dry_run(config(1))["input_shape"] == [3, *SIZE]


def test_a_batch_does_not_depend_on_who_decodes_it(images: FileImages, folder: Path) -> None:
    here = ImageFiles(*files(folder, "train"), size=SIZE).images
    order, bounds = permutation(TRAIN, 0, "x"), [(0, 37), (37, 38), (38, 60)]
    batches = list(pixels(images, bounds, order))
    for (a, b), x, y in zip(bounds, batches, pixels(here, bounds, order), strict=True):
        assert x.dtype == torch.uint8
        assert torch.equal(x, y)
        assert torch.equal(x, here[order[a:b]])
        for i, picture in zip(order[a:b].tolist(), x, strict=True):
            assert torch.equal(picture, read_image(files(folder, "train")[0][i], 3, SIZE))
    assert torch.equal(torch.cat(list(pixels(images, bounds))), here[:])
    assert torch.equal(here[3:5], here[torch.tensor([3, 4])])


def test_what_is_handed_out_is_not_written_again_while_it_is_used(images: FileImages) -> None:
    """A batch's memory goes to another one only when no tensor on it is left, a view of one included."""
    bounds = [(i, i + 6) for i in range(0, 60, 6)]
    first = [batch[2:3, 1] for _ in range(4) for batch in pixels(images, bounds)]
    copies = [view.clone() for view in first]
    for _ in range(4):
        for _ in images.batches(bounds, permutation(TRAIN, 1, "other")):
            pass
    assert all(torch.equal(view, copy) for view, copy in zip(first, copies, strict=True))
    assert images.decoders is not None
    assert len({view.data_ptr() for view in first}) == 40
    used = images.decoders._arena_bytes
    del first, copies
    for _ in range(10):
        for _ in images.batches(bounds):
            pass
    assert images.decoders._arena_bytes == used


def test_batches_given_up_half_way_do_no_harm(images: FileImages) -> None:
    bounds = [(i, i + 5) for i in range(0, 60, 5)]
    expected = list(pixels(images, bounds))
    for _ in range(20):
        assert torch.equal(next(pixels(images, bounds)), expected[0])
    assert all(torch.equal(x, y) for x, y in zip(pixels(images, bounds), expected, strict=True))


def test_the_global_random_state_is_left_alone(images: FileImages) -> None:
    before = torch.get_rng_state()
    list(images.batches([(0, 30), (30, 60)]))
    assert torch.equal(torch.get_rng_state(), before)


def test_standardisation_of_very_many_files_looks_at_some(
    folder: Path, monkeypatch: pytest.MonkeyPatch, config: Callable[..., RunConfig], in_tmp: Path
) -> None:
    monkeypatch.setattr("mtl.standardize.FILES", 20)
    part = Samples("d", ImageFiles(*files(folder, "train"), size=SIZE).images, {}, {}, {}, {})
    module = Standardize(part.shape, "channel")
    module.fit(part)
    torch.testing.assert_close(module.mean, part.images[::3].float().mean((0, 2, 3))[:, None, None])
    run, shown = build.run(config(), in_tmp / "run"), []
    monkeypatch.setattr(run.progress, "line", shown.append)
    fit(run)
    line = "pictures: 48 training images are files, decoded by the training process; mean and deviation are those of 20 of them"
    assert line in shown


# --- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 224}, r"size must be \(height, width\) in pixels, as in \(224, 224\); found 224"),
        ({"size": (0, 3)}, r"size must be .*; found \(0, 3\)"),
        ({"paths": []}, r"there are no paths"),
        ({"channels": 4}, r"channels must be 1 \(grey\) or 3"),
        ({"paths": "x.jpg"}, r"paths must be a sequence of them; found the single one 'x.jpg'"),
        ({"paths": [3] * TRAIN}, r"paths must be strings or pathlib.Path"),
        ({"paths": ["a\0b"] * TRAIN}, r"zero byte"),
        ({"paths": ["gone.jpg"] * TRAIN}, r"60 of 60 image files looked for do not exist, such as '.*/gone.jpg'"),
        ({"labels": {"a": np.arange(3)}}, r"labels\['a'\] must have one entry per image, 60; found shape \(3,\)"),
        ({"valid": {"a": np.zeros(60)}}, r"valid\['a'\] must be bool"),
    ],
)
def test_what_cannot_be_is_refused_when_the_dataset_is_made(folder: Path, change: dict[str, Any], message: str) -> None:
    paths, labels, _ = files(folder, "train")
    with pytest.raises(mtl.DataError, match=message):
        ImageFiles(**{"paths": paths, "labels": labels, "size": SIZE, **change})


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("nothing_left")
def test_a_file_that_cannot_be_read_is_named_with_the_reason(folder: Path, workers: int, tmp_path: Path) -> None:
    paths, labels, _ = files(folder, "train")
    bad = tmp_path / "bad.jpg"
    bad.write_text("<html>not found</html>")
    paths[41] = bad
    with Decoders(workers) as decoders:
        images = ImageFiles(paths, labels, size=SIZE).placed("cpu", Reading(decoders))
        batches = images.batches([(0, 20), (20, 40), (40, 60)])
        next(batches), next(batches)
        with pytest.raises(mtl.DataError, match=r"image file '.*/bad.jpg' cannot be read: neither a JPEG nor a PNG") as error:
            next(batches)
        assert error.value.__cause__ is None
        if workers:
            assert len(list(images.batches([(0, 20), (20, 40)]))) == 2


def test_the_config_says_how_many_workers(config: Callable[..., RunConfig]) -> None:
    assert auto.resolved(config(3)).data.workers == 3
    assert auto.resolved(config("auto")).data.workers == min(16, usable_cores())
    for wrong in (-1, "many", 1.5):
        with pytest.raises(mtl.ConfigError, match=r"data.workers"):
            config(wrong)


def test_a_plugin_of_files_conforms(config: Callable[..., RunConfig]) -> None:
    assert {check.name: check.detail for check in mtl.check_task("pictures_a") if not check.ok} == {}


# --- files that cannot be read, and parts of pictures -----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("nothing_left")
def test_a_file_that_cannot_be_read_counts_as_unlabelled(folder: Path, workers: int, tmp_path: Path) -> None:
    """Its place in the batch is taken by the pixels of another, and the same files are read twice with one complaint."""
    paths, labels, valid = files(folder, "train")
    bad = [tmp_path / "bad.jpg", tmp_path / "gone.jpg"]
    for i, file in zip((20, 41), bad, strict=True):
        file.write_bytes(b"<html>")
        paths[i] = file
    good = ImageFiles(files(folder, "train")[0], labels, size=SIZE).images
    data = ImageFiles(paths, labels, valid, size=SIZE)
    bad[1].unlink()
    with Decoders(workers) as decoders:
        images = data.placed("cpu", Reading(decoders, 0.04))
        for _ in range(2):
            (first, nothing), (second, one), (third, other) = images.batches([(0, 20), (20, 41), (41, 60)])
            assert (nothing, one, other) == ([], [0], [0])
            assert torch.equal(first, good[:20])
            assert torch.equal(second, good[torch.tensor([21, *range(21, 41)])])
            assert torch.equal(third, good[torch.tensor([42, *range(42, 60)])])
        assert images.unreadable.why == {
            os.fsencode(bad[0]): "neither a JPEG nor a PNG image",
            os.fsencode(bad[1]): "no such file",
        }
        too_many = r"2 image files cannot be read, more than the 1 that data.bad_files allows; the first: '.*/bad.jpg': neither"
        with pytest.raises(mtl.DataError, match=too_many):
            list(data.placed("cpu", Reading(decoders, 0.03)).batches([(0, 60)]))
        alone, failed = next(data.placed("cpu", Reading(decoders, 0.04)).batches([(20, 21)]))
        assert (int(alone.sum()), failed) == (0, [0])


@pytest.mark.usefixtures("nothing_left")
def test_a_run_goes_on_without_the_files_that_cannot_be_read(
    config: Callable[..., RunConfig], folder: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every split: n counts what was read; the run says so, lists the files, and is the same for any number of workers."""
    broken = {3, 17, 30, TRAIN + 2}
    real = files

    def with_broken(folder: Path, split: str) -> tuple[list[Path], dict[str, Any], dict[str, Any]]:
        paths, labels, valid = real(folder, split)
        first = 0 if split == "train" else TRAIN
        return [in_tmp / f"{i}.jpg" if first + i in broken else path for i, path in enumerate(paths)], labels, valid

    for i in (3, 17, 30, 2):
        (in_tmp / f"{i}.jpg").write_bytes(b"\xff\xd8\xff no picture")
    monkeypatch.setitem(globals(), "files", with_broken)
    base = config(0)
    allowed = base.data.model_copy(update={"bad_files": 0.1})
    results = []
    for workers in (0, 1):
        data = allowed.model_copy(update={"workers": workers})
        results.append(mtl.train(base.replaced(data=data, epochs=3, batch_size=5), in_tmp / f"run{workers}"))
    assert results[0].test == results[1].test
    assert results[0].test["pictures_a"]["n"] == TEST - 1
    assert results[0].set_aside == {"pictures": {"image files that cannot be read": 4}}
    seen = {
        split: sum(row["n"] for row in rows(in_tmp / "run0") if row["split"] == split and row["task"] == "pictures_a")
        for split in ("train", "val")
    }
    assert sum(seen.values()) == 3 * (TRAIN - 3)
    listed = [(in_tmp / f"run{workers}" / "set_aside.csv").read_text().splitlines() for workers in (0, 1)]
    assert listed[0] == listed[1]
    assert len(listed[0]) == 1 + 4
    assert all(re.search("damaged|neither", line) for line in listed[0][1:])
    assert all(math.isfinite(row["loss"]) for row in rows(in_tmp / "run0"))


def test_grey_pictures_stay_grey_where_others_are_in_colour(folder: Path, decoders: Decoders) -> None:
    paths, labels, _ = files(folder, "train")
    grey = ImageFiles(paths, labels, size=SIZE, channels=1)
    larger = (3, 2 * SIZE[0], SIZE[1])
    expected = ImageFiles(paths, labels, size=larger[1:], channels=1).images[:].expand(-1, 3, -1, -1)
    for reading in (Reading(), Reading(decoders)):
        images = grey.placed("cpu", reading).brought_to(larger)
        assert images.shape == (TRAIN, *larger)
        assert torch.equal(torch.cat(list(pixels(images, [(0, 20), (20, TRAIN)]))), expected)


def test_of_a_picture_the_box_is_read(folder: Path, decoders: Decoders) -> None:
    """Whoever reads it, in any order; what lies outside the picture is not in it."""
    paths, labels, _ = files(folder, "train")
    random = np.random.default_rng(0)
    boxes = np.column_stack([random.integers(-2, 6, (TRAIN, 2)), random.integers(4, 40, (TRAIN, 2))])
    data = ImageFiles(paths, labels, size=SIZE, boxes=boxes)
    order = permutation(TRAIN, 0, "x")
    (here,) = pixels(data.placed("cpu"), [(0, TRAIN)], order)
    (there,) = pixels(data.placed("cpu", Reading(decoders)), [(0, TRAIN)], order)
    assert torch.equal(here, there)
    for i, picture in zip(order.tolist(), here, strict=True):
        left, top, width, height = boxes[i].tolist()
        whole = read_image(paths[i], 3)[:, max(top, 0) : top + height, max(left, 0) : left + width]
        assert torch.equal(picture, resized(whole, SIZE))
    assert data.same_images(ImageFiles(paths, labels, size=SIZE, boxes=boxes))
    assert not data.same_images(ImageFiles(paths, labels, size=SIZE))
    part = pickle.loads(pickle.dumps(data.subset(order[:5])))
    assert torch.equal(part.images[:], here[:5])


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (np.zeros((TRAIN, 3), int), r"boxes must be 60 x 4 integers; found torch.int64 of shape \(60, 3\)"),
        (np.ones((TRAIN, 4)), r"boxes must be 60 x 4 integers; found torch.float32"),
        (np.array([[0, 0, 4, 4]] * 59 + [[0, 0, 4, 0]]), r"box 59 is \[0, 0, 4, 0\]: width and height must be above 0"),
    ],
)
def test_boxes_that_are_none_are_refused(folder: Path, boxes: Any, message: str) -> None:
    with pytest.raises(mtl.DataError, match=message):
        ImageFiles(*files(folder, "train"), size=SIZE, boxes=boxes)


def test_a_box_outside_its_picture_is_an_unreadable_file(folder: Path) -> None:
    paths, labels, _ = files(folder, "train")
    boxes = np.array([[0, 0, 4, 4]] * 59 + [[40, 2, 8, 8]])
    images = ImageFiles(paths, labels, size=SIZE, boxes=boxes).placed("cpu")
    with pytest.raises(mtl.DataError, match=r"the box 8 x 8 at 40, 2 lies outside the 12 x 16 pixels|outside the 24 x 32"):
        images[:]


# --- processes --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
def test_a_killed_worker_is_an_error_and_not_a_hang(folder: Path) -> None:
    with Decoders(2) as decoders:
        images = ImageFiles(*files(folder, "train"), size=SIZE).placed("cpu", Reading(decoders))
        batches = images.batches([(0, 60)] * 100_000)
        next(batches)
        assert decoders._process is not None
        deadline = time.monotonic() + 60
        while len(workers := children(decoders._process.pid)) < 2:
            next(batches)
            assert time.monotonic() < deadline
        os.kill(min(workers), signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(mtl.RunError, match=r"a process that decodes images ended \(signal SIGKILL\)"):
            deque(batches, maxlen=0)
        assert time.monotonic() - started < 20


PROGRAM = """
import sys, time
import numpy as np
import mtl
from mtl.decoding import Decoders
from mtl.files import Reading

images = mtl.ImageFiles(sys.argv[2:], {}, size=(16, 12))
with Decoders(2) as decoders:
    batches = images.placed("cpu", Reading(decoders)).batches([(0, 20)] * 5000)  # half a minute, should nobody end it
    next(batches)
    print("ready", flush=True)
    for _ in batches:
        time.sleep(0.01)
"""


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_training_is_interrupted_or_killed(folder: Path, how: signal.Signals) -> None:
    """Ctrl-C goes to the whole group of processes; SIGKILL leaves no chance to tidy up."""
    paths = [str(path) for path in files(folder, "train")[0]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "-", *paths],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        try:
            assert program.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 60
            while len(below := children(program.pid)) < 3 and time.monotonic() < deadline:  # a slow machine forks slowly
                time.sleep(0.1)
            assert len(below) == 3
            os.killpg(program.pid, how)
            errors = program.stderr.read()
        finally:
            program.kill()
    assert errors.count("Traceback") == (how == signal.SIGINT), errors  # its own
    deadline = time.monotonic() + 10
    while (left := [pid for pid in below if Path("/proc", str(pid)).exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


# --- decoders ---------------------------------------------------------------------------------------------------------------


def smooth(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_torchvision_and_pillow_read_the_same(
    mode: str, orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.io  # noqa: F401  from now on its decoder is used

    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth(64, 48).convert(mode).save(tmp_path / "x.jpg", exif=exif, progressive=orientation % 2 == 0)
    with Image.open(tmp_path / "x.jpg") as image:
        upright = np.array(ImageOps.exif_transpose(image.convert("RGB") if mode == "RGB" else image).convert("RGB"))
    assert torch.equal(read_image(tmp_path / "x.jpg", 3), torch.from_numpy(upright).permute(2, 0, 1))
    one, three = (read_image(tmp_path / "x.jpg", channels) for channels in (1, 3))
    monkeypatch.setattr("mtl.images._by_torchvision", lambda *_: None)
    assert torch.equal(read_image(tmp_path / "x.jpg", 1), one)
    assert torch.equal(read_image(tmp_path / "x.jpg", 3), three)


def test_a_large_photo_is_decoded_small_and_looks_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(512, 640).save(tmp_path / "x.jpg", quality=90, exif=exif)
    small = read_image(tmp_path / "x.jpg", 3, (64, 48))
    with monkeypatch.context() as whole:
        whole.setattr("mtl.images.SHRUNK", 10**6)
        difference = (small.float() - read_image(tmp_path / "x.jpg", 3, (64, 48)).float()).abs()
    assert 0 < difference.mean() < 1
    assert difference.max() <= 5


def test_what_has_to_be_decoded_whole_may_be_less_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth(512, 640).save(tmp_path / "x.jpg")
    smooth(512, 640).save(tmp_path / "x.png")
    monkeypatch.setattr("mtl.images.LARGEST_WHOLE", 300_000)
    assert read_image(tmp_path / "x.jpg", 3, (48, 64)).shape == (3, 48, 64)  # a quarter of it is decoded
    for file, size in (("x.png", (48, 64)), ("x.jpg", (400, 400)), ("x.jpg", None)):
        with pytest.raises(mtl.DataError, match=r"640 x 512 pixels are more than the 300,000 that are read"):
            read_image(tmp_path / file, 3, size)


# --- the index --------------------------------------------------------------------------------------------------------------


def test_an_index_of_a_million_paths_is_small_and_quick() -> None:
    started = time.process_time()
    paths = Paths(f"/data/photos/class{i % 100:03}/image{i:07}.jpg" for i in range(1_000_000))
    part = paths[permutation(1_000_000, 0, "x").numpy()]
    batch = part[5000:5128].encoded()
    seconds = time.process_time() - started
    assert len(batch) == 128
    text = len("/data/photos/class000/image0000000.jpg")
    held = len(paths._text) + paths._starts.nbytes + paths._lengths.nbytes
    assert held <= (text + 12) * 1_000_000
    assert part._text is paths._text
    assert seconds < 10
    assert len(pickle.dumps(part[:100])) < 100 * (text + 12) + 1000


def test_paths_are_those_given_wherever_one_goes(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["a.jpg", Path("b/ü.png"), "/c d.jpg", os.fsdecode(b"\xff.jpg")]
    paths = Paths(given)
    monkeypatch.chdir("/")
    expected = [os.fsencode(in_tmp / path) for path in given]
    assert paths.encoded() == expected
    assert paths[np.array([2, 0, 2])].encoded() == [expected[2], expected[0], expected[2]]
    again = pickle.loads(pickle.dumps(paths[1:3]))
    assert again == paths[1:3]
    assert again != paths[0:2]


def test_what_several_processes_find_is_counted_together() -> None:
    found = Unreadable(most=1.5)
    found.take({b"a.png": "empty"})
    with pytest.raises(mtl.DataError, match=r"2 image files cannot be read, more than the 1 that data.bad_files allows"):
        found.take({b"b.png": "no image"})
