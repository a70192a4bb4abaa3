"""What the tests share: a tiny registered dataset with its tasks, and the real data where they can be had."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import mtl
from mtl import logs
from mtl.data import Samples, checked_splits, read_splits
from mtl.portions import Portion
from mtl.progress import Progress
from mtl.registry import DATASETS
from mtl.tracking import draw_coupling

torch.set_num_threads(1)  # pytest-xdist runs one process per core
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: threads that wait spin, and cost minutes


class Lines(Progress):
    """Keeps the lines that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def begin(self, title: str, steps: int) -> None: ...
    def step(self, done: int, figures: Mapping[str, float] | None) -> None: ...
    def line(self, text: str) -> None:
        self.lines.append(text)


class TinyOptions(mtl.Options):
    train: int = 48
    labelled: float = 1.0
    """Share of the samples that carry a `b` label."""


@mtl.register_dataset("tiny", options=TinyOptions)
def tiny(split: mtl.Split, root: Path, options: TinyOptions) -> mtl.ArrayDataset:
    """uint8 (N, 1, 8, 8) whose brightness tells `a` (0 to 2) and whose slope tells `b` (0 or 1)."""
    return make_tiny(options.train if split == mtl.Split.TRAIN else 24, split, options.labelled)


def load_samples(name: str, tasks: Sequence[mtl.Task], options: Any = None, **portion: Any) -> dict[mtl.Split, Samples]:
    """The splits of a registered dataset, checked."""
    parts = read_splits(DATASETS.get(name), Path(), options, validation=bool(portion.get("validation")))
    return checked_splits(name, parts, tasks, Portion(**portion))


def make_tiny(n: int, split: str = "train", labelled: float = 1.0) -> mtl.ArrayDataset:
    generator = torch.Generator().manual_seed({"train": 1, "val": 2, "test": 3}[split])
    a, b = torch.arange(n) % 3, (torch.arange(n) // 3) % 2
    slope = torch.linspace(-40, 40, 8).view(1, 1, 1, 8) * (2 * b.view(-1, 1, 1, 1) - 1)
    noise = 10 * torch.randn(n, 1, 8, 8, generator=generator)
    images = (60 + 60 * a.view(-1, 1, 1, 1) + slope + noise).clamp(0, 255).to(torch.uint8)
    valid = {"b": torch.rand(n, generator=generator) < labelled} if labelled < 1 else None
    return mtl.ArrayDataset(images, {"a": a, "b": b}, valid)


@mtl.register_task("tiny_a")
def tiny_a() -> mtl.Task:
    return mtl.Task("tiny", "a", mtl.Classification(("dark", "grey", "light")))


@mtl.register_task("tiny_b")
def tiny_b() -> mtl.Task:
    return mtl.Task("tiny", "b", mtl.Classification(("falling", "rising")))


@mtl.register_task("tiny_c")
def tiny_c() -> mtl.Task:
    """The same target as `tiny_a`, for a third task."""
    return mtl.Task("tiny", "a", mtl.Classification(("dark", "grey", "light")), weight=0.5)


TINY: dict[str, Any] = {
    "tasks": ["tiny_a", "tiny_b"],
    "backbone": {"name": "small_cnn", "width": 0.1},
    "data": {"validation": 12},
    "epochs": 2,
    "batch_size": 16,
    "precision": "fp32",
    "device": "cpu",
}
"""A config that trains in a second."""


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """The tree of a config that trains in a second; change it freely."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}


@cache
def _picture(tasks: int) -> NDArray[np.uint8]:
    return draw_coupling(np.eye(tasks), [f"task {i}" for i in range(tasks)], "drawn once")


@pytest.fixture(autouse=True)
def _drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture of the exchange for all that trainings log: drawing takes longer than these trainings."""
    monkeypatch.setattr(logs, "draw_coupling", lambda _, tasks, __: _picture(len(tasks)))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests run as a background job, which ignores it; and so it does what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def fashion_root() -> Path:
    """Where Fashion-MNIST is; skips, visibly, when it is neither there nor downloadable."""
    from mtl_tasks.fashion import fashion_mnist

    root = Path(os.environ.get("MTL_DATA_ROOT", "data")).absolute()
    try:
        fashion_mnist(mtl.Split.TEST, root)
    except mtl.DataError as error:
        pytest.skip(str(error))
    return root
