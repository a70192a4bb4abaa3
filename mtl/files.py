"""Datasets of image files that do not fit in memory: `ImageFiles`, and the images behind it.

Nothing is read when a dataset is made; each image is decoded when its batch is. Labels and masks are in memory.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.datasets import Dataset
from mtl.errors import DataError
from mtl.images import LARGEST, read_image
from mtl.tables import SetAside

if TYPE_CHECKING:  # who decodes is handed in
    from mtl.decoding import Decoders

LOOKED_FOR = 10_000
"""Of the paths of a dataset, evenly spaced, whether they exist is asked when it is made."""


class Paths:
    """Paths of files: one string of bytes and where in it each begins, about 12 bytes more than their text takes.

    Raises:
        DataError: something that is no path.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        here = os.fsencode(Path.cwd()) + b"/"  # a path means the same file wherever it is opened
        try:
            encoded = [os.fsencode(path) for path in paths]
        except TypeError as error:
            raise DataError(f"paths must be strings or pathlib.Path; {error}") from None
        encoded = [path if path.startswith(b"/") else here + path for path in encoded]
        self._text = b"".join(encoded)
        if b"\0" in self._text:
            raise DataError("a path holds a zero byte; no file is called that")
        self._lengths: NDArray[np.int32] = np.fromiter(map(len, encoded), np.int32, len(encoded))
        self._starts: NDArray[np.int64] = np.cumsum(self._lengths, dtype=np.int64) - self._lengths

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: NDArray[np.int64] | slice) -> Paths:
        part = object.__new__(Paths)
        part._text = self._text
        part._starts, part._lengths = self._starts[index], self._lengths[index]
        return part

    def encoded(self) -> list[bytes]:
        """All of them, as the system knows them."""
        pairs = zip(self._starts.tolist(), self._lengths.tolist(), strict=True)
        return [self._text[start : start + length] for start, length in pairs]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Paths) and len(self) == len(other) and self.encoded() == other.encoded()

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        """Of a subset only its own text is pickled."""
        compact, lengths = b"".join(self.encoded()), self._lengths
        return {"_text": compact, "_lengths": lengths, "_starts": np.cumsum(lengths, dtype=np.int64) - lengths}


class FileImages:
    """Images in files, used as the tensor (N, C, H, W) that they would make: `images[index]`, or better `batches`.

    Args:
        paths: of JPEG or PNG files.
        channels: 1 or 3.
        size: (H, W) that every image is resized to.
    """

    dtype = torch.uint8

    def __init__(self, paths: Paths, channels: int, size: tuple[int, int]) -> None:
        self.paths, self.channels, self.size = paths, channels, size
        self.device = torch.device("cpu")
        self.decoders: Decoders | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> torch.Size:
        """Of all images, (N, C, H, W)."""
        return torch.Size((len(self), self.channels, *self.size))

    def placed(self, device: torch.device | str, decoders: Decoders | None) -> FileImages:
        """The same images, decoded by worker processes (None: in this one) and given out on a device."""
        images = copy(self)
        images.device = torch.device(device)
        images.decoders = decoders if decoders is not None and decoders.workers else None
        if images.decoders is not None:
            images.decoders.start()  # which takes them seconds, while the network is built
        return images

    def subset(self, index: NDArray[np.int64] | slice) -> FileImages:
        """Those at `index`."""
        images = copy(self)
        images.paths = self.paths[index]
        return images

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """uint8 (B, C, H, W) on the device; read here and now, by this process.

        Raises:
            DataError: a file cannot be read.
        """
        return self._read_all(self.paths[index if isinstance(index, slice) else index.cpu().numpy()].encoded())

    def _read_all(self, paths: list[bytes]) -> Tensor:
        images = torch.empty(len(paths), *self.size, self.channels, dtype=torch.uint8)  # channels-last, as they are decoded
        for image, path in zip(images, paths, strict=True):
            image.copy_(self._read(path).permute(1, 2, 0))
        return self._moved(images.permute(0, 3, 1, 2))

    def batches(self, bounds: Sequence[tuple[int, int]], order: Tensor | None = None) -> Iterator[Tensor]:
        """One batch uint8 (B, C, H, W) on the device for each (start, stop), of the images in `order`, int64 on the CPU.

        Raises:
            DataError: a file cannot be read.
            RunError: a worker process died.
        """
        paths = self.paths if order is None else self.paths[order.numpy()]
        if self.decoders is None:
            for start, stop in bounds:
                yield self._read_all(paths[start:stop].encoded())
            return
        asked = (paths[start:stop].encoded() for start, stop in bounds)
        for (start, stop), (images, failed) in zip(bounds, self.decoders.batches(asked, self.channels, self.size), strict=True):
            for i in failed:
                images[i] = self._read(paths[start:stop].encoded()[i])
            yield self._moved(images)

    def _read(self, path: bytes) -> Tensor:
        """One image, (C, H, W). This is where every file that cannot be read ends, whichever process found it."""
        try:
            return read_image(path, self.channels, self.size)
        except DataError as error:
            raise DataError(
                f"image file {os.fsdecode(path)!r} cannot be read: {error}; repair it, or leave it out of the dataset"
            ) from None

    def _moved(self, images: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return images.to(self.device)
        return images.pin_memory().to(self.device, non_blocking=True)


class ImageFiles(Dataset):
    """One split of a dataset whose images are files: JPEG or PNG, decoded batch by batch by worker processes.

    Args:
        paths: of the files, `str` or `pathlib.Path`, in the order of the labels; relative ones to the current folder.
        labels: target name -> (N, ...) as the dataset stores them; integers or floats.
        valid: target name -> bool, where that label exists: (N,), or (N, K) for a mask per label of several, or the label's
            shape for maps. A target not named here is labelled everywhere.
        classes: target name -> what its labels 0, 1, ... (or its K columns) stand for, where the data say so and not the task
            (`FromClasses`).
        groups: (N,) integers, one number for samples that belong together, as pictures of one person do: validation samples are
            held out in whole groups. None: each sample by itself.
        size: (height, width) in pixels that every image is resized to; the aspect ratio is not kept.
        channels: 1 for grey, 3 for red, green and blue; images of another kind are converted.
        set_aside: what of the data is not used, and why; counted at the start of a run.

    The images are uint8 (channels, *size), resized and turned upright as `mtl predict` does. Of up to 10,000 files, evenly
    spaced, it is asked at once whether they exist; a file that cannot be read is reported when its turn comes.

    Raises:
        DataError: lengths that do not fit together, a size that is none, or a file that does not exist.
    """

    images: FileImages

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: Mapping[str, Any],
        valid: Mapping[str, Any] | None = None,
        classes: Mapping[str, Sequence[str]] | None = None,
        groups: Any | None = None,
        *,
        size: tuple[int, int],
        channels: int = 3,
        set_aside: SetAside | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise DataError(f"channels must be 1 (grey) or 3 (red, green, blue); found {channels!r}")
        try:
            height, width = (operator.index(side) for side in size)
        except (TypeError, ValueError):
            height = width = 0
        if not (0 < height * width <= LARGEST and height > 0):
            raise DataError(f"size must be (height, width) in pixels, as in (224, 224); found {size!r}")
        if isinstance(paths, str | bytes | Path):
            raise DataError(f"paths must be a sequence of them; found the single one {os.fspath(paths)!r}")
        self.images = FileImages(Paths(paths), channels, (height, width))
        if not len(self.images):
            raise DataError("there are no paths; were the files looked for in the right folder?")
        super().__init__(len(self.images), labels, valid, classes, groups, set_aside)
        _look_for(self.images.paths)

    def __len__(self) -> int:
        return len(self.images)

    def same_images(self, other: Dataset) -> bool:
        """Whether the other names the same files in the same order."""
        return isinstance(other, ImageFiles) and self.images.paths == other.images.paths

    def placed(self, device: torch.device | str, decoders: Decoders | None) -> FileImages:
        """The images as training reads them."""
        return self.images.placed(device, decoders)

    def _images_at(self, index: Tensor) -> FileImages:
        return self.images.subset(index.numpy())


def _look_for(paths: Paths) -> None:
    """Complain about a file that does not exist, of those that are looked for."""
    some = paths[np.linspace(0, len(paths) - 1, min(len(paths), LOOKED_FOR)).astype(np.int64)]
    missing = [path for path in some.encoded() if not os.path.exists(path)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(some)} image files looked for do not exist, such as {os.fsdecode(missing[0])!r}; is this "
            "the right folder?"
        )
