"""Datasets whose images differ in size or channels, brought to one shape: towers that exchange need it, and so do fair arms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mtl.data import Samples
from mtl.errors import DataError
from mtl.images import resize_batch

CHUNK = 1024
"""Images that are resized at a time."""

Shape = tuple[int, ...]


def common_shape(samples: Mapping[str, Samples], wanted: Shape | None = None) -> Shape:
    """The shape of one sample, (C, H, W) or (D,), that all these datasets are brought to.

    Args:
        samples: dataset name -> samples of one split.
        wanted: (C, H, W); None: the largest of each where they differ.

    Raises:
        DataError: vectors of different lengths, or channels that cannot be made others.
    """
    shapes = {name: part.shape for name, part in samples.items()}
    first = next(iter(shapes.values()))
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    if wanted is None and all(shape == first for shape in shapes.values()):
        return first
    if any(len(shape) != 3 for shape in shapes.values()):
        raise DataError(
            f"datasets trained together must have samples of one shape, and only images can be resized; found {found}"
        )
    shape = wanted or tuple(max(sides) for sides in zip(*shapes.values(), strict=True))
    if any(own[0] not in (1, shape[0]) for own in shapes.values()):
        raise DataError(f"images cannot be brought to {shape[0]} channels; found {found}; only grey ones can get more")
    return shape


def in_shape(samples: Mapping[str, Samples], wanted: Shape | None) -> dict[str, Samples]:
    """Samples of one split with images of one shape, as `common_shape` gives it."""
    shape = common_shape(samples, wanted) if samples else ()
    return {name: brought_to(part, shape) for name, part in samples.items()}


def brought_to(part: Samples, shape: Shape) -> Samples:
    """The samples with images of another shape: resized, bilinear with antialiasing, and grey repeated for each channel. Files
    are decoded to that size at once.
    """
    if part.shape == shape:
        return part
    if isinstance(part.images, Tensor):
        return replace(part, images=torch.cat([resize_batch(piece, shape) for piece in part.images.split(CHUNK)]))
    return replace(part, images=part.images.brought_to(shape))
