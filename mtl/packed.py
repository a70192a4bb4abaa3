"""Packed datasets: images decoded and resized once, in one file per split that is mapped into memory, with labels beside it.

A folder that `mtl pack` wrote holds, for each split, `SPLIT.u8` (the pixels, uint8 (N, H, W, C), nothing else) and
`SPLIT.safetensors` (labels, masks, groups), and `manifest.json`, written last, with sizes and digests of all. It is read as the
dataset `packed`: pages come from the disk when a batch wants them, and stay in the system's cache.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mtl.columns import SetAside
from mtl.data import Split
from mtl.datasets import Dataset
from mtl.errors import DataError
from mtl.images import resize_batch
from mtl.options import Options
from mtl.registry import register_dataset

if TYPE_CHECKING:
    from mtl.files import Reading

FORMAT = 1
"""Of the folder; a folder of another is refused."""
MANIFEST = "manifest.json"
BLOCK = 512
"""Images with one digest."""


class PackedImages:
    """Images in a file, used as the tensor (N, C, H, W) that they are: `images[index]`, or `batches`.

    Args:
        pixels: uint8 (M, H, W, C), mapped.
        rows: int64 (N,), which of them, in this order.
    """

    dtype = torch.uint8

    def __init__(self, pixels: Tensor, rows: Tensor) -> None:
        self.pixels, self.rows = pixels, rows
        self.device = torch.device("cpu")
        self._shape = (int(pixels.shape[3]), int(pixels.shape[1]), int(pixels.shape[2]))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        """Of all images, (N, C, H, W)."""
        return torch.Size((len(self), *self._shape))

    def placed(self, device: torch.device | str) -> PackedImages:
        """The same images, given out on a device."""
        images = copy(self)
        images.device = torch.device(device)
        return images

    def subset(self, index: Tensor) -> PackedImages:
        """Those at `index` (int64)."""
        images = copy(self)
        images.rows = self.rows[index]
        return images

    def brought_to(self, shape: tuple[int, ...]) -> PackedImages:
        """The same images, given out as (C, H, W) of this shape."""
        images = copy(self)
        images._shape = (shape[0], shape[1], shape[2])
        return images

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """uint8 (B, C, H, W) on the device."""
        rows = self.rows[index if isinstance(index, slice) else index.cpu()]
        pixels = self.pixels.index_select(0, rows).permute(0, 3, 1, 2)  # five times as fast as indexing
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        return resize_batch(pixels.to(self.device, non_blocking=True), self._shape)

    def batches(
        self, bounds: Sequence[tuple[int, int]], order: Tensor | None = None, draws: object = None
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """One batch for each (start, stop), of the images in `order`; all of them can be read, and nothing is drawn."""
        images = self if order is None else self.subset(order)
        for start, stop in bounds:
            yield images[start:stop], []


class PackedDataset(Dataset):
    """One split of a packed folder; see `mtl.datasets.Dataset`."""

    images: PackedImages

    def __init__(self, images: PackedImages, labels: Mapping[str, Any], *more: Any) -> None:
        self.images = images
        super().__init__(len(images), labels, *more)

    def __len__(self) -> int:
        return len(self.images)

    def same_images(self, other: Dataset) -> bool:
        """Whether the other is of the same rows of the same file."""
        if not isinstance(other, PackedDataset) or not torch.equal(self.images.rows, other.images.rows):
            return False
        return torch.equal(self.images.pixels, other.images.pixels)

    def placed(self, device: torch.device | str, reading: Reading | None = None) -> PackedImages:
        """The images, which stay where they are until a batch wants them."""
        return self.images.placed(device)

    def _images_at(self, index: Tensor) -> PackedImages:
        return self.images.subset(index)


class PackedOptions(Options):
    """Which folder."""

    folder: Path
    """That `mtl pack` wrote, under the data root."""
    verify: bool = False
    """Read all of it and compare digests first."""


@register_dataset("packed", options=PackedOptions, splits=("train", "val", "test"))
def packed(split: Split, root: Path, options: PackedOptions) -> PackedDataset | None:
    """A folder that `mtl pack` wrote: targets, classes and groups as the dataset had them; files that could not be read are
    left out. None for a split that it did not have.
    """
    folder = root / options.folder
    manifest = read_manifest(folder)
    if split not in manifest["splits"]:
        return None
    if options.verify and (wrong := damaged(folder)):
        raise DataError(f"packed folder {str(folder)!r} is damaged: {'; '.join(wrong[:3])}; pack it again")
    about = manifest["splits"][split]
    height, width, channels = about["shape"]
    file = folder / f"{split}.u8"
    pixels = torch.from_file(str(file), shared=False, size=about["count"] * height * width * channels, dtype=torch.uint8)
    pixels = pixels.view(about["count"], height, width, channels)
    tensors = load_labels(folder, split)
    rows = tensors["readable"].nonzero().flatten()
    set_aside = SetAside()
    if split is Split.TRAIN:
        set_aside.take(SetAside([(where, why) for where, why in manifest["listed"]], Counter(manifest["set_aside"])))
    for path, why in about["unreadable"]:
        set_aside.add(path, why, "image files that could not be read when they were packed")
    groups = tensors.get("groups")
    return PackedDataset(
        PackedImages(pixels, rows),
        {name.removeprefix("labels."): value[rows] for name, value in tensors.items() if name.startswith("labels.")},
        {name.removeprefix("valid."): value[rows].bool() for name, value in tensors.items() if name.startswith("valid.")},
        {name: tuple(names) for name, names in manifest["classes"].items()},
        None if groups is None else groups[rows],
        set_aside,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a packed folder says of itself, its files' sizes checked.

    Raises:
        DataError: no packed folder, one that is not finished, of another format, or with files of other sizes.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise DataError(f"packed folder {str(folder)!r} has format {manifest['format']}; this version reads {FORMAT}")
        if manifest.pop("digest") != digest_of(json.dumps(manifest).encode()):
            raise DataError(f"packed folder {str(folder)!r} is damaged: {MANIFEST} has changed")
        for name, size in manifest["sizes"].items():
            if (found := (folder / name).stat().st_size) != size:
                raise DataError(f"packed folder {str(folder)!r} is damaged: {name} has {found:,} bytes instead of {size:,}")
    except FileNotFoundError as error:
        unfinished = "; it is not finished: run the same mtl pack again" if any(folder.glob("*.blocks")) else ""
        raise DataError(f"{str(folder)!r} is no packed folder: no {Path(error.filename).name} in it{unfinished}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"packed folder {str(folder)!r} has a damaged manifest: {error}") from None
    return manifest


def load_labels(folder: Path, split: str) -> dict[str, Tensor]:
    """The tensors beside the pixels of a split.

    Raises:
        DataError: they are damaged.
    """
    try:
        return load_file(folder / f"{split}.safetensors")
    except (OSError, SafetensorError) as error:
        raise DataError(f"packed folder {str(folder)!r} is damaged: {split}.safetensors: {error}") from None


def damaged(folder: Path) -> list[str]:
    """What of a packed folder is not as it was written; all of it is read.

    Raises:
        DataError: it cannot even be told what was written.
    """
    manifest, wrong = read_manifest(folder), []
    for split, about in manifest["splits"].items():
        if digest_of((folder / f"{split}.safetensors").read_bytes()) != about["labels"]:
            wrong.append(f"{split}.safetensors has changed")
        size = BLOCK * about["shape"][0] * about["shape"][1] * about["shape"][2]
        with open(folder / f"{split}.u8", "rb") as file:
            for i, digest in enumerate(about["blocks"]):
                if digest_of(file.read(size)) != digest:
                    wrong.append(f"images {i * BLOCK} to {min((i + 1) * BLOCK, about['count']) - 1} of {split}.u8 have changed")
    return wrong


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
