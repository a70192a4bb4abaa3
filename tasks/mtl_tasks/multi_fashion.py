"""`multi_fashion`: two garments in one picture, a classic construction of tasks that compete for a network's capacity.

Every picture of Fashion-MNIST is laid over another one on a canvas of 36 x 36 pixels, itself in the upper left corner, the
other in the lower right; where they overlap the brighter pixel is seen. The canvas is resized to 28 x 28. Which one it is laid
over is drawn at random, so that a label says nothing about the other. With digits: Sabour et al. 2017, arXiv 1710.09829; as two
tasks: Sener and Koltun 2018, arXiv 1810.04650.
"""

from __future__ import annotations

from pathlib import Path

import mtl
from mtl_tasks.fashion import CATEGORIES, read_fashion_mnist

SIDE, CANVAS = 28, 36
CHUNK = 4096
SEED = 0
"""Of which picture is laid over which."""


@mtl.register_dataset("multi_fashion")
def multi_fashion(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
    """60,000 and 10,000 grey images 28 x 28, the same on every machine; from the files of `fashion_mnist`.

    Targets: `left` and `right`, the categories (0 to 9) of the two garments.
    """
    import torch
    from torch.nn.functional import interpolate

    train = split == mtl.Split.TRAIN
    images, category = read_fashion_mnist(root, train=train)
    generator = torch.Generator().manual_seed(2 * SEED + (not train))
    other = torch.randperm(len(images), generator=generator)
    pieces = []
    for start in range(0, len(images), CHUNK):
        left, right = images[start : start + CHUNK], images[other[start : start + CHUNK]]
        canvas = torch.zeros(len(left), 1, CANVAS, CANVAS)
        canvas[:, 0, :SIDE, :SIDE] = left
        corner = canvas[:, 0, CANVAS - SIDE :, CANVAS - SIDE :]
        torch.maximum(corner, right.float(), out=corner)
        small = interpolate(canvas, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        pieces.append(small.round().clamp(0, 255).to(torch.uint8))
    return mtl.ArrayDataset(torch.cat(pieces), labels={"left": category, "right": category[other]})


@mtl.register_task("multi_fashion_left", options=mtl.ClassificationOptions)
def multi_fashion_left(options: mtl.ClassificationOptions) -> mtl.Task:
    """The garment in the upper left."""
    return mtl.Task("multi_fashion", "left", mtl.Classification(CATEGORIES, **dict(options)))


@mtl.register_task("multi_fashion_right", options=mtl.ClassificationOptions)
def multi_fashion_right(options: mtl.ClassificationOptions) -> mtl.Task:
    """The garment in the lower right."""
    return mtl.Task("multi_fashion", "right", mtl.Classification(CATEGORIES, **dict(options)))
