"""What the arms of `benchmarks.throughput` train: towers and random images, as the framework and as its peers read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mtl
from mtl.registry import BACKBONES

CLASSES = 10


@dataclass(frozen=True)
class Workload:
    """Towers and batches. `blocks` are the modules of a tower between its exchanges."""

    name: str
    backbone: str
    shape: tuple[int, int, int]
    batch: int
    points: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]

    @property
    def samples(self) -> int:
        """Enough for a few steps an epoch."""
        return 12 * self.batch


RESNET = (("conv1", "bn1", "relu", "maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4", "avgpool"))


WORKLOADS = {
    w.name: w
    for w in (
        Workload("small_cnn 28x28 b128", "small_cnn", (1, 28, 28), 128, ("pool1", "pool2", "fc3"),
                 (("pool1",), ("pool2",), ("fc3",), ("dropout",))),
        Workload("resnet18 64x64 b32", "resnet18", (3, 64, 64), 32, ("layer1", "layer2", "layer3"), RESNET),
        Workload("resnet18 64x64 b128", "resnet18", (3, 64, 64), 128, ("layer1", "layer2", "layer3"), RESNET),
        Workload("resnet50 224x224 b16", "resnet50", (3, 224, 224), 16, ("layer1", "layer2", "layer3"), RESNET),
    )
}  # fmt: skip


class NoiseOptions(mtl.Options):
    """How many images of which shape."""

    shape: tuple[int, int, int]
    samples: int
    tasks: int


def noise(shape: tuple[int, int, int], samples: int, tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (N, C, H, W) and a class per image and task (N, T)."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (samples, *shape), dtype=np.uint8)
    return images, np.stack([random.permutation(np.arange(samples) % CLASSES) for _ in range(tasks)], axis=1)


@mtl.register_dataset("noise", options=NoiseOptions)
def noise_dataset(split: mtl.Split, root: Path, options: NoiseOptions) -> mtl.ArrayDataset:
    """Random images, the same for both splits."""
    images, labels = noise(options.shape, options.samples, options.tasks)
    return mtl.ArrayDataset(images, {f"label{t}": labels[:, t] for t in range(options.tasks)})


def register_noise_task(t: int) -> None:
    """The task `noise<t>`: ten classes."""
    mtl.register_task(f"noise{t}")(lambda: mtl.Task("noise", f"label{t}", mtl.Classification([str(c) for c in range(CLASSES)])))


for _t in range(64):
    register_noise_task(_t)


class PilImages(Dataset[tuple[Tensor, Any]]):
    """What a peer's `DataLoader` reads: one image at a time through torchvision's transforms, as its datasets do."""

    def __init__(self, workload: Workload, tasks: int, names: list[str]) -> None:
        from torchvision.transforms import v2

        self.images, self.labels = noise(workload.shape, workload.samples, tasks)
        self.names = names
        channels = workload.shape[0]
        self.transform = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * channels, [0.25] * channels)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        from PIL import Image

        pixels = self.images[i].transpose(1, 2, 0)
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return self.transform(image), {name: int(self.labels[i, t]) for t, name in enumerate(self.names)}


def loader(workload: Workload, tasks: int, names: list[str], shuffle: bool, workers: int) -> DataLoader[Any]:
    """The loader both peers are given."""
    data = PilImages(workload, tasks, names)
    return DataLoader(
        data, workload.batch, shuffle=shuffle, num_workers=workers, persistent_workers=workers > 0, pin_memory=on_gpu()
    )


def on_gpu() -> bool:
    """Whether arms run on a GPU."""
    return torch.cuda.is_available()


def tower(workload: Workload) -> nn.Module:
    """A network as the framework's own arm has it."""
    made = BACKBONES.get(workload.backbone)
    options = made.options() if made.options is not None else None
    return made.create(workload.shape, options=options).network  # type: ignore[no-any-return]
