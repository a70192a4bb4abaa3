"""The data of the golden runs: pictures by whole numbers alone, the same on every machine and with every version."""

from __future__ import annotations

from pathlib import Path

import torch

import mtl

COUNT = 60


@mtl.register_dataset("golden", splits=("train", "test"))
def golden(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
    """uint8 (N, 1, 8, 8): how bright they are says `level`, where they are bright says `side`."""
    index = torch.arange(COUNT) + (COUNT if split == mtl.Split.TEST else 0)
    row, column = torch.arange(8).view(1, 1, 8, 1), torch.arange(8).view(1, 1, 1, 8)
    level, side = index % 3, index // 3 % 2
    i = index.view(-1, 1, 1, 1)
    bright = 60 * level.view(-1, 1, 1, 1) + 40 * ((column // 4) == side.view(-1, 1, 1, 1))
    images = bright + (i * 37 + row * column * 13 + row * i * 5) % 71
    return mtl.ArrayDataset(images.to(torch.uint8), {"level": level, "side": side})


@mtl.register_task("golden_level")
def golden_level() -> mtl.Task:
    return mtl.Task("golden", "level", mtl.Classification(("dark", "grey", "light")))


@mtl.register_task("golden_side")
def golden_side() -> mtl.Task:
    return mtl.Task("golden", "side", mtl.Classification(("left", "right")))
