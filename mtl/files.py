"""Datasets of image files that do not fit in memory: `ImageFiles`, and the images behind it.

Nothing is read when a dataset is made; each image is decoded when its batch is. Labels and masks are in memory.
"""

from __future__ import annotations

import operator
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.columns import SetAside
from mtl.datasets import Dataset, as_tensor
from mtl.decoder import Asked
from mtl.errors import DataError
from mtl.images import LARGEST, Box, read_image

if TYPE_CHECKING:  # who decodes is handed in
    from mtl.decoding import Decoders

LOOKED_FOR = 10_000
"""Of the paths of a dataset, evenly spaced, whether they exist is asked when it is made."""


class Paths:
    """Paths of files: one string of bytes and where in it each begins, about 12 bytes more than their text takes.

    Args:
        paths: of files, taken one by one.
        folder: what those that are not absolute are relative to; None: the current folder.

    Raises:
        DataError: something that is no path.
    """

    def __init__(self, paths: Iterable[str | bytes | Path], folder: Path | None = None) -> None:
        self._folder = os.fsencode((folder or Path()).absolute()) + b"/"  # the same file wherever it is opened
        text, lengths = bytearray(), array("i")
        try:
            for path in paths:
                encoded = os.fsencode(path).removeprefix(self._folder)
                text += encoded
                lengths.append(len(encoded))
        except TypeError as error:
            raise DataError(f"paths must be strings or pathlib.Path; {error}") from None
        self._text = bytes(text)
        if b"\0" in self._text:
            raise DataError("a path holds a zero byte; no file is called that")
        self._lengths: NDArray[np.int32] = np.array(lengths, np.int32)
        self._starts: NDArray[np.int64] = np.cumsum(self._lengths, dtype=np.int64) - self._lengths

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: NDArray[np.int64] | slice) -> Paths:
        part = object.__new__(Paths)
        part._folder, part._text = self._folder, self._text
        part._starts, part._lengths = self._starts[index], self._lengths[index]
        return part

    def encoded(self) -> list[bytes]:
        """All of them, absolute, as the system knows them."""
        return [path if path.startswith(b"/") else self._folder + path for path in self._relative()]

    def _relative(self) -> list[bytes]:
        """All of them, as they are kept."""
        pairs = zip(self._starts.tolist(), self._lengths.tolist(), strict=True)
        return [self._text[start : start + length] for start, length in pairs]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Paths) and len(self) == len(other) and self.encoded() == other.encoded()

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        """Of a subset only its own text is pickled."""
        compact, lengths = b"".join(self._relative()), self._lengths
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return {"_folder": self._folder, "_text": compact, "_lengths": lengths, "_starts": starts}


@dataclass
class Unreadable:
    """The files of a split that turned out to be no images: path -> why. More than `most` are an error."""

    most: float = 0.0
    why: dict[bytes, str] = field(default_factory=dict)

    def add(self, path: bytes, why: str) -> None:
        """Take note of one.

        Raises:
            DataError: that is one too many.
        """
        self.take({path: why})

    def take(self, found: Mapping[bytes, str]) -> None:
        """Take note of some.

        Raises:
            DataError: those are too many.
        """
        self.why.update(found)
        if len(self.why) <= self.most:
            return
        path, why = next(reversed(self.why.items()))
        if len(self.why) == 1:
            raise DataError(
                f"image file {os.fsdecode(path)!r} cannot be read: {why}; repair it, leave it out of the dataset, or allow "
                "some by data.bad_files"
            )
        first = "; ".join(f"{os.fsdecode(path)!r}: {why}" for path, why in list(self.why.items())[:3])
        raise DataError(
            f"{len(self.why):,} image files cannot be read, more than the {int(self.most):,} that data.bad_files allows; the "
            f"first: {first}"
        )


@dataclass(frozen=True)
class Reading:
    """How image files are read: by which worker processes (None: by this one), and which share of them may be unreadable."""

    decoders: Decoders | None = None
    bad_files: float = 0.0


class FileImages:
    """Images in files, used as the tensor (N, C, H, W) that they would make: `images[index]`, or better `batches`.

    Args:
        paths: of JPEG or PNG files.
        channels: 1 or 3.
        size: (H, W) that every image is resized to.
        boxes: int32 (N, 4), left, top, width and height of what is kept of each picture; None: all.

    Of a file that cannot be read the pixels are those of the first of its batch that can (black, where there is none), and what
    uses them is told not to count it.
    """

    dtype = torch.uint8
    repeated = 1
    """How often a grey picture is repeated, for as many channels."""

    def __init__(self, paths: Paths, channels: int, size: tuple[int, int], boxes: NDArray[np.int32] | None = None) -> None:
        self.paths, self.channels, self.size, self.boxes = paths, channels, size, boxes
        self.device = torch.device("cpu")
        self.decoders: Decoders | None = None
        self.unreadable = Unreadable()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> torch.Size:
        """Of all images, (N, C, H, W)."""
        return torch.Size((len(self), self.channels * self.repeated, *self.size))

    def placed(self, device: torch.device | str, reading: Reading) -> FileImages:
        """The same images, read as `reading` says and given out on a device."""
        images = copy(self)
        images.device = torch.device(device)
        images.unreadable = Unreadable(max(1.0, reading.bad_files * len(self)) if reading.bad_files else 0.0)
        images.decoders = reading.decoders if reading.decoders is not None and reading.decoders.workers else None
        if images.decoders is not None:
            images.decoders.start()  # which takes them seconds, while the network is built
        return images

    def subset(self, index: NDArray[np.int64] | slice) -> FileImages:
        """Those at `index`."""
        images = copy(self)
        images.paths = self.paths[index]
        images.boxes = None if self.boxes is None else self.boxes[index]
        return images

    def brought_to(self, shape: tuple[int, ...]) -> FileImages:
        """The same images, decoded to (C, H, W) of this shape; grey ones stay grey, repeated for each channel."""
        images = copy(self)
        images.repeated, images.size = shape[0] // self.channels, (shape[1], shape[2])
        return images

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """uint8 (B, C, H, W) on the device; read here and now, by this process.

        Raises:
            DataError: more files cannot be read than may be.
        """
        part = self.subset(index if isinstance(index, slice) else index.cpu().numpy())
        return part._read_all(part._asked())[0]

    def _asked(self) -> Asked:
        """All of them, for who decodes."""
        boxes: list[Box] | None = None if self.boxes is None else [tuple(box) for box in self.boxes.tolist()]
        return Asked(self.paths.encoded(), boxes)

    def _read_all(self, asked: Asked) -> tuple[Tensor, list[int]]:
        count = len(asked.paths)
        images = torch.empty(count, *self.size, self.channels, dtype=torch.uint8)  # channels-last, as they are decoded
        images = images.permute(0, 3, 1, 2)
        failed = [i for i in range(count) if not self._read(images, asked, i)]
        return self._finished(images, failed)

    def batches(
        self, bounds: Sequence[tuple[int, int]], order: Tensor | None = None, draws: object = None
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """One batch uint8 (B, C, H, W) on the device for each (start, stop), of the images in `order`, int64 on the CPU; and
        the positions in it of files that cannot be read. Nothing is drawn.

        Raises:
            DataError: more files cannot be read than may be.
            RunError: a worker process died.
        """
        images = self if order is None else self.subset(order.numpy())
        wanted = (images.subset(slice(start, stop))._asked() for start, stop in bounds)
        if self.decoders is None:
            yield from map(self._read_all, wanted)
            return
        under_way: deque[Asked] = deque()
        for pixels, failed in self.decoders.batches(noted(wanted, under_way), self.channels, self.size):
            asked = under_way.popleft()
            yield self._finished(pixels, [i for i in failed if not self._read(pixels, asked, i)])

    def _read(self, images: Tensor, asked: Asked, i: int) -> bool:
        """Read one image into its place. This is where every file that cannot be read ends, whichever process found it."""
        path = asked.paths[i]
        if path in self.unreadable.why:
            return False
        try:
            images[i] = read_image(path, self.channels, self.size, None if asked.boxes is None else asked.boxes[i])
        except DataError as error:
            self.unreadable.add(path, str(error))
            return False
        return True

    def _finished(self, images: Tensor, failed: list[int]) -> tuple[Tensor, list[int]]:
        """A batch on the device, with something in the place of what could not be read."""
        if failed:
            readable = next((i for i in range(len(images)) if i not in failed), None)
            images[failed] = 0 if readable is None else images[readable].clone()
        images = self._moved(images)
        return images.expand(-1, self.repeated, -1, -1) if self.repeated > 1 else images, failed

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
        groups: (N,) integers, one number for samples that belong together, as pictures of one person do, the same in every
            split: validation samples are held out in whole groups, and a group in two splits is an error. None: each sample by
            itself.
        size: (height, width) in pixels that every image is resized to; the aspect ratio is not kept.
        channels: 1 for grey, 3 for red, green and blue; images of another kind are converted.
        folder: what paths are relative to; None: the current folder. It is kept once, not with every path.
        boxes: (N, 4) integers, left, top, width and height in pixels of what is kept of each picture before it is resized.
            None: all of every one.
        set_aside: what of the data is not used, and why; counted at the start of a run.

    The images are uint8 (channels, *size), resized and turned upright as `mtl predict` does. Of up to 10,000 files, evenly
    spaced, it is asked at once whether they exist. A file that cannot be read is found when its turn comes; its labels are then
    taken for missing, as long as such files are no more than the share `data.bad_files`.

    Raises:
        DataError: lengths that do not fit together, a size that is none, or a file that does not exist.
    """

    images: FileImages

    def __init__(
        self,
        paths: Iterable[str | bytes | Path],
        labels: Mapping[str, Any],
        valid: Mapping[str, Any] | None = None,
        classes: Mapping[str, Sequence[str]] | None = None,
        groups: Any | None = None,
        *,
        size: tuple[int, int],
        channels: int = 3,
        folder: Path | None = None,
        boxes: Any | None = None,
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
        self.images = FileImages(Paths(paths, folder), channels, (height, width))
        if not len(self.images):
            raise DataError("there are no paths; were the files looked for in the right folder?")
        if boxes is not None:
            self.images.boxes = _checked_boxes(boxes, len(self.images))
        super().__init__(len(self.images), labels, valid, classes, groups, set_aside)
        _look_for(self.images.paths)

    def __len__(self) -> int:
        return len(self.images)

    def same_images(self, other: Dataset) -> bool:
        """Whether the other names the same files in the same order, and the same parts of them."""
        if not isinstance(other, ImageFiles) or self.images.paths != other.images.paths:
            return False
        mine, others = self.images.boxes, other.images.boxes
        return mine is others or (mine is not None and others is not None and np.array_equal(mine, others))

    def placed(self, device: torch.device | str, reading: Reading | None = None) -> FileImages:
        """The images as training reads them."""
        return self.images.placed(device, reading or Reading())

    def _images_at(self, index: Tensor) -> FileImages:
        return self.images.subset(index.numpy())


def noted(wanted: Iterable[Asked], note: deque[Asked]) -> Iterator[Asked]:
    """The same, each added to `note` when it is asked for."""
    for one in wanted:
        note.append(one)
        yield one


def _checked_boxes(boxes: Any, count: int) -> NDArray[np.int32]:
    given = as_tensor(boxes, "boxes")
    if given.shape != (count, 4) or given.is_floating_point():
        raise DataError(f"boxes must be {count} x 4 integers; found {given.dtype} of shape {tuple(given.shape)}")
    if (none := (given[:, 2:] <= 0).any(1)).any():
        first = int(none.nonzero()[0])
        raise DataError(f"box {first} is {given[first].tolist()}: width and height must be above 0")
    return given.numpy().astype(np.int32)


def _look_for(paths: Paths) -> None:
    """Complain about a file that does not exist, of those that are looked for."""
    some = paths[np.linspace(0, len(paths) - 1, min(len(paths), LOOKED_FOR)).astype(np.int64)]
    missing = [path for path in some.encoded() if not os.path.exists(path)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(some)} image files looked for do not exist, such as {os.fsdecode(missing[0])!r}; is this "
            "the right folder?"
        )
