"""The bundled datasets: the real Fashion-MNIST where it can be had, and the drawn shapes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mtl_tasks.fashion import GROUP_OF_CATEGORY, fashion_mnist
from mtl_tasks.multi_fashion import multi_fashion
from mtl_tasks.shapes import TRAITS, ShapesOptions, draw_labels, shapes
from torch.nn.functional import interpolate

import mtl
from mtl.config import RunConfig


def test_fashion_mnist_is_the_real_one(fashion_root: Path) -> None:
    train, test = (fashion_mnist(split, fashion_root) for split in (mtl.Split.TRAIN, mtl.Split.TEST))
    assert train.images.shape == (60000, 1, 28, 28)
    assert test.images.shape == (10000, 1, 28, 28)
    assert torch.bincount(train.labels["category"]).tolist() == [6000] * 10
    assert torch.bincount(test.labels["group"]).tolist() == [3000, 3000, 4000]
    groups = {0: {5, 7, 9}, 1: {3, 6, 8}, 2: {0, 1, 2, 4}}  # the protocol's
    assert all(category in groups[group] for category, group in enumerate(GROUP_OF_CATEGORY))


def test_a_short_run_on_the_real_data_learns(fashion_root: Path, tmp_path: Path) -> None:
    config = mtl.load_config(
        Path(__file__).parent.parent / "examples/configs/fashion_two_task.yaml",
        [f"data.root={fashion_root}", "max_steps=40", "backbone.width=0.25", "data.validation=1000"],
    )
    result = mtl.train(config, tmp_path / "run")
    assert result.test is not None
    assert result.test["score"] > 0.75


def test_archives_in_a_read_only_folder_are_unpacked_elsewhere(
    fashion_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in (fashion_root / "FashionMNIST" / "raw").glob("t10k*.gz"):
        shutil.copy(archive, raw)
    for archive in (fashion_root / "FashionMNIST" / "raw").glob("train*.gz"):
        shutil.copy(archive, raw)
    import torchvision.datasets.mnist as library

    real = library.extract_archive if hasattr(library, "extract_archive") else None
    from torchvision.datasets import utils

    genuine = utils.extract_archive

    def refuse(source: str, target: str | None = None, remove_finished: bool = False) -> str:
        if str(source).startswith(str(tmp_path)):  # root may write anywhere, so chmod proves nothing here
            raise PermissionError(13, "read-only", source)
        return genuine(source, target, remove_finished)

    monkeypatch.setattr(utils, "extract_archive", refuse)
    if real is not None:
        monkeypatch.setattr(library, "extract_archive", refuse)
    data = fashion_mnist(mtl.Split.TEST, tmp_path)
    assert len(data) == 10000
    assert sorted(path.suffix for path in raw.iterdir()) == [".gz"] * 4


def test_a_folder_without_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import FashionMNIST

    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    with pytest.raises(mtl.DataError, match=r"neither under .* nor can it be downloaded .*; put its four .gz files into"):
        fashion_mnist(mtl.Split.TRAIN, tmp_path)


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder in which nobody can write")
def test_a_folder_that_cannot_be_written_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import FashionMNIST

    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(mtl.DataError, match=r"neither under '/sys' nor can it be downloaded"):
        fashion_mnist(mtl.Split.TRAIN, Path("/sys"))


def test_shapes_are_deterministic_and_depend_on_the_seed() -> None:
    options = ShapesOptions(train=50, test=20)
    a, b = (shapes(mtl.Split.TRAIN, Path(), options) for _ in range(2))
    assert torch.equal(a.images, b.images)
    assert a.images.dtype == torch.uint8
    assert a.images.shape == (50, 3, 32, 32)
    assert set(a.labels) == {"kind", "colour", "count", "size", "radius", "traits"}
    assert a.labels["traits"].shape == (50, 4)
    left, right = (half.float().mean((1, 2, 3)) for half in a.images.split(16, dim=3))
    lit_from_left = a.labels["traits"][:, TRAITS.index("lit from left")]
    assert ((left > right) == lit_from_left).float().mean() > 0.8
    other = shapes(mtl.Split.TRAIN, Path(), ShapesOptions(train=50, seed=1))
    assert not torch.equal(a.images, other.images)
    test = shapes(mtl.Split.TEST, Path(), options)
    assert len(test) == 20
    assert not torch.equal(test.images, a.images[:20])


def test_shapes_tasks_are_not_independent() -> None:
    """Mutual information in bits, well above the bias of this many samples (below 0.001)."""
    labels = draw_labels(40_000, np.random.default_rng(0))

    def information(a: str, b: str) -> float:
        joint = np.zeros((6, 6))
        np.add.at(joint, (labels[a], labels[b]), 1)
        p = joint / joint.sum()
        outer = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
        seen = p > 0
        return float((p[seen] * np.log2(p[seen] / outer[seen])).sum())

    assert information("kind", "colour") > 0.2
    assert information("count", "size") > 0.005
    assert information("kind", "count") < 0.002


def test_shapes_are_not_trivial(tmp_path: Path) -> None:
    """A linear readout of the pixels stays far from right on every task but does learn colour."""

    @mtl.register_backbone("pixels")
    def pixels(input_shape: tuple[int, ...]) -> torch.nn.Module:
        return torch.nn.Flatten()

    tasks = ["shapes_kind", "shapes_colour", "shapes_size"]
    data = {"validation": 200, "datasets": {"shapes": {"train": 2200, "test": 500}}}
    result = mtl.train(RunConfig(tasks=tasks, backbone="pixels", data=data, epochs=3, precision="fp32"), tmp_path / "run")
    assert result.test is not None
    scores = {name: result.test[name]["accuracy"] for name in tasks}
    assert scores["shapes_colour"] > 0.3
    assert max(scores[name] for name in tasks if name != "shapes_colour") < 0.55


def test_two_garments_in_a_picture(fashion_root: Path) -> None:
    pair, single = (dataset(mtl.Split.TEST, fashion_root) for dataset in (multi_fashion, fashion_mnist))
    assert pair.images.shape == single.images.shape == (10000, 1, 28, 28)
    assert torch.equal(pair.labels["left"], single.labels["category"])
    assert torch.equal(pair.labels["right"].bincount(), single.labels["category"].bincount())
    both = torch.stack([pair.labels["left"], pair.labels["right"]]).float()
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.05  # nothing but the picture tells one from the other
    assert torch.equal(pair.images, multi_fashion(mtl.Split.TEST, fashion_root).images)
    small = interpolate(single.images.float(), (22, 22), mode="bilinear", antialias=True)  # 28 of 36 are 22 of 28
    left, right = pair.images[:, :, :6, :6].float(), pair.images[:, :, -6:, -6:].float()  # where one garment is alone
    assert float((left - small[:, :, :6, :6]).abs().mean()) < 8
    assert float(right.mean()) > 2
    assert float((right - small[:, :, -6:, -6:]).abs().mean()) > 2 * float((left - small[:, :, :6, :6]).abs().mean())
