"""Map-style datasets of torch as data: the same as their images in memory, whatever the workers, and their transforms."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny
from PIL import Image
from test_resuming import cut_after
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

import mtl
from mtl.decoding import Decoders
from mtl.packed import PackedOptions, packed
from mtl.packing import pack
from mtl.progress import Silent
from mtl.registry import DATASETS
from mtl.seeding import Draws
from mtl.torch_data import TorchImages


class Items(Dataset[Any]):
    """Tiny images, one by one, with a transform of its own."""

    def __init__(self, split: str, transform: Any = None) -> None:
        self.images, self.transform = make_tiny(48 if split == "train" else 24, split).images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.images[i] if self.transform is None else self.transform(self.images[i]), i


def register(transform: Any = None, at_random: bool = False, name: str = "listed") -> None:
    @mtl.register_dataset(name)
    def items(split: mtl.Split, root: Path) -> mtl.TorchDataset:
        source = Items(split, None if at_random else transform)
        return mtl.TorchDataset(source, make_tiny(len(source), split).labels, training=Items(split, transform))

    DATASETS._claims[name] = DATASETS._claims[name][-1:]


mtl.register_task("listed_a")(lambda: mtl.Task("listed", "a", mtl.Classification(("dark", "grey", "light"))))
mtl.register_task("listed_b")(lambda: mtl.Task("listed", "b", mtl.Classification(("falling", "rising"))))


def config(tiny_config: dict[str, Any], **values: Any) -> mtl.RunConfig:
    return mtl.RunConfig(**{**tiny_config, "tasks": ["listed_a", "listed_b"], **values})


def weights(run: str) -> dict[str, Tensor]:
    return mtl.load_model(run).model.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_it_trains_as_its_images_in_memory_do(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    register()
    mtl.train(config(tiny_config, data={"validation": 12, "workers": 2}), "listed")

    @mtl.register_dataset("listed")
    def in_memory(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return make_tiny(48 if split == mtl.Split.TRAIN else 24, split)

    DATASETS._claims["listed"] = DATASETS._claims["listed"][-1:]
    mtl.train(config(tiny_config), "memory")
    assert same(weights("listed"), weights("memory"))


def noisy(image: Tensor) -> Tensor:
    """From all three generators."""
    brighter = image.float() + torch.randint(0, 9, ()) + random.randrange(9) + np.random.randint(9)
    return v2.RandomCrop(8, padding=1)(brighter).to(torch.uint8)


def test_what_is_drawn_depends_on_the_epoch_and_the_sample_alone(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    """Not on the number of workers, nor on whether the run was cut."""
    register(noisy, at_random=True)
    mtl.train(config(tiny_config, data={"validation": 12, "workers": 2}), "two")
    state = random.getstate()
    mtl.train(config(tiny_config, data={"validation": 12, "workers": 0}), "none")
    assert random.getstate() == state
    assert same(weights("two"), weights("none"))
    with cut_after(3):
        mtl.train(config(tiny_config, data={"validation": 12, "workers": 1}), "cut")
    mtl.resume("cut")
    assert same(weights("cut"), weights("none"))
    images = TorchImages(Items("train"), Items("train", noisy), torch.arange(48))
    drawn = [next(images.batches([(0, 8)], None, Draws(seed, torch.arange(48))))[0] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(next(images.batches([(0, 8)]))[0], make_tiny(48).images[:8])  # as they are evaluated


@pytest.mark.parametrize(
    ("item", "shape", "dtype"),
    [
        (Image.new("L", (6, 5)), (1, 5, 6), torch.uint8),
        (Image.new("RGB", (6, 5)), (3, 5, 6), torch.uint8),
        (np.zeros((5, 6, 3), np.uint8), (3, 5, 6), torch.uint8),
        (np.zeros((5, 6, 3), np.uint8)[:, ::-1, ::-1], (3, 5, 6), torch.uint8),
        (np.zeros(4), (4,), torch.float32),
        (torch.zeros(5, 6, dtype=torch.float64), (1, 5, 6), torch.float32),
        ((torch.zeros(3, 5, 6), 7), (3, 5, 6), torch.float32),
    ],
)
def test_what_an_image_may_be(item: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    images = mtl.TorchDataset([item] * 3, {"y": [0, 1, 0]}).images
    assert images.shape == (3, *shape)
    assert images[:2].dtype == dtype
    assert images[:2].shape == (2, *shape)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (iter([1]), "must have a length and items, as map-style datasets have; found list_iterator"),
        ([], "source holds no items"),
        (["a.png"], "item 0 must be an image .* found str"),
        ([torch.zeros(3, dtype=torch.int64)], r"item 0 must be uint8 or floating point, .*; found torch.int64 of shape \(3,\)"),
        ([torch.zeros(1, 1, 1, 1)], r"item 0 must be uint8 or floating point, .*; found torch.float32 of shape \(1, 1, 1, 1\)"),
        ([np.zeros((2, 2, 2, 2))], "item 0 of list cannot be read: "),
        ([np.array(["a"])], "item 0 of list cannot be read: "),
        ([torch.full((3,), float("nan"))], "item 0 holds a value that is not finite"),
        (TensorDataset(torch.zeros(2, 3)), r"labels\['y'\] must have one entry per image, 2; found shape \(1,\)"),
    ],
)
def test_what_is_no_dataset(source: Any, message: str) -> None:
    with pytest.raises(mtl.DataError, match=message):
        mtl.TorchDataset(source, {"y": [0]})
    with pytest.raises(mtl.DataError, match="training must have the items of source, 48; found 24"):
        mtl.TorchDataset(Items("train"), {"y": [0] * 48}, training=Items("test"))


@pytest.mark.parametrize("workers", [0, 2])
def test_items_that_cannot_be_used_are_named(workers: int) -> None:
    class Bad(Items):
        def __getitem__(self, i: int) -> Any:
            if i == 20:
                raise OSError("truncated file")
            return torch.zeros(1, 8, 9) if i == 30 else super().__getitem__(i)

    images = mtl.TorchDataset(Bad("train"), {"y": [0] * 48}).images.placed("cpu", workers)
    with pytest.raises(mtl.DataError, match="item 20 of Bad cannot be read: OSError: truncated file"):
        list(images.batches([(0, 24)]))
    with pytest.raises(mtl.DataError, match=r"item 30 is torch.float32 of shape \(1, 8, 9\), others are torch.uint8 of shape"):
        list(images.batches([(24, 48)]))


class Slow(Items):
    def __getitem__(self, i: int) -> Any:
        time.sleep(0.01)
        return super().__getitem__(i)


def test_a_worker_that_dies_is_told_when_its_batch_is_wanted() -> None:
    """And not in the middle of a step."""
    images = mtl.TorchDataset(Slow("train"), {"y": [0] * 48}).images.placed("cpu", 1)
    batches = images.batches([(i, i + 4) for i in range(0, 48, 4)])
    next(batches)
    [worker] = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    time.sleep(0.1)  # where torch would raise
    with pytest.raises(mtl.RunError, match=r"a process that reads items of Slow ended .*data.workers=0 reads in the main"):
        list(batches)


def test_workers_leave_signals_to_the_run() -> None:
    images = mtl.TorchDataset(Slow("train"), {"y": [0] * 48}).images.placed("cpu", 2)
    batches = images.batches([(i, i + 4) for i in range(0, 48, 4)])
    next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid or 0, number)
    assert len(list(batches)) == 11
    del batches
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_it_conforms_and_its_generators_are_the_global_ones(in_tmp: Path) -> None:
    register(noisy, at_random=True)
    checks = {check.name: check for check in mtl.check_task("listed_a", in_tmp)}
    assert checks["same twice"].ok, checks["same twice"].detail

    class Own(Items):
        def __init__(self) -> None:
            super().__init__("train")
            self.generator = np.random.default_rng(0)

        def __getitem__(self, i: int) -> Any:
            return self.images[i] + self.generator.random()

    with pytest.raises(mtl.DataError, match="item 0 of Own differs each time from the same random state; draw from the global"):
        mtl.TorchDataset(Items("train"), {"y": [0] * 48}, training=Own())


def test_it_is_resized_beside_another_dataset_and_can_be_packed(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    register(v2.Resize((10, 12)))
    result = mtl.train(config(tiny_config, tasks=["tiny_a", "listed_b"], epochs=1), "both")
    assert set(result.test or ()) == {"tiny_a", "listed_b", "score"}
    with Decoders(0) as decoders:
        about = pack("listed", None, Path(), Path("packed"), decoders, 0.0, Silent())
    assert about["splits"]["train"]["images"] == 48
    found = packed(mtl.Split.TEST, Path(), PackedOptions(folder=Path("packed")))
    assert found is not None
    resized = [v2.functional.resize(image, [10, 12]) for image in Items("test").images]
    assert torch.equal(found.images[:], torch.stack(resized))
