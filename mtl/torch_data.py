"""Images that a map-style `torch.utils.data.Dataset` gives, item by item: `TorchDataset`, and the images behind it.

torch's `DataLoader` reads them in `data.workers` processes for each dataset. What an item draws from the global generators,
as torchvision's transforms do, it draws from a stream of its own (seed, epoch, sample): so a run does not depend on the
number of workers, and one that was cut goes on as if it had not been.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from mtl.datasets import Dataset
from mtl.errors import DataError, RunError, said
from mtl.images import resize_batch
from mtl.seeding import Draws, seeded

if TYPE_CHECKING:
    from mtl.files import Reading


LOOKED_AT = 32
"""Items of a split, evenly spaced, whose images are read to tell whether it is the same as another."""


class TorchImages:
    """The images of a map-style dataset, used as the tensor (N, C, H, W) that they would make: `images[index]`, or `batches`.

    Args:
        source: `source[i]` is an image, or a tuple that begins with one.
        training: the same, as it is trained on.
        rows: int64 (N,), which of them, in this order.
    """

    def __init__(self, source: Any, training: Any, rows: Tensor) -> None:
        self.source, self.training, self.rows = source, training, rows
        first = _image(source, int(rows[0]), 0, 0)
        self.dtype = first.dtype
        self._given = self._shape = tuple(first.shape)
        self.device = torch.device("cpu")
        self.workers = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        """Of all images, (N, C, H, W) or (N, D)."""
        return torch.Size((len(self), *self._shape))

    def placed(self, device: torch.device | str, workers: int) -> TorchImages:
        """The same images, read by so many processes and given out on a device."""
        images = copy(self)
        images.device, images.workers = torch.device(device), workers
        return images

    def subset(self, index: Tensor | slice) -> TorchImages:
        """Those at `index` (int64)."""
        images = copy(self)
        images.rows = self.rows[index]
        return images

    def brought_to(self, shape: tuple[int, ...]) -> TorchImages:
        """The same images, given out as (C, H, W) of this shape."""
        images = copy(self)
        images._shape = shape
        return images

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """(B, C, H, W) on the device; read here and now, by this process."""
        rows = self.rows[index if isinstance(index, slice) else index.cpu()].tolist()
        return self._finished(_Reader(self.source, self._given, self.dtype, 0).__getitems__([(row, row) for row in rows]))

    def batches(
        self, bounds: Sequence[tuple[int, int]], order: Tensor | None = None, draws: Draws | None = None
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """One batch (B, C, H, W) on the device for each (start, stop), of the images in `order`; all of them can be read. Where
        there is something to draw from, they are those to train on.

        Raises:
            DataError: an item that cannot be read, or is of another shape than the first.
            RunError: a process that reads died.
        """
        rows = self.rows if order is None else self.rows[order]
        source, seed, samples = (self.source, 0, rows) if draws is None else (self.training, *draws)
        loader: DataLoader[Tensor | str] = DataLoader(
            _Reader(source, self._given, self.dtype, seed),  # type: ignore[arg-type]  # it has items; no more is asked of it
            batch_sampler=_Wanted(bounds, rows, samples),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # torch would draw from the run's
            worker_init_fn=_left_alone,
        )
        batches = _started(loader)
        for _ in bounds:
            try:
                found = next(batches)
            except RuntimeError as error:
                raise RunError(
                    f"a process that reads items of {type(source).__name__} ended ({said(error)}); was it out of memory, "
                    "or killed, or could it not start (then it said so)? data.workers=0 reads in the main process"
                ) from error
            yield self._finished(found), []

    def _finished(self, found: Tensor | str) -> Tensor:
        if isinstance(found, str):
            raise DataError(found)
        if self.device.type == "cuda":
            found = found.pin_memory()
        images = found.to(self.device, non_blocking=True)
        return images if self._shape == self._given else resize_batch(images, self._shape)


class TorchDataset(Dataset):
    """One split of a dataset whose images a map-style `torch.utils.data.Dataset` gives, one of torchvision's or your own.

    Args:
        source: has a length, and `source[i]` is an image or a tuple that begins with one: a tensor (C, H, W), (H, W) or (D,), a
            PIL image or an array (H, W, C), uint8 or float, the same shape for all.
        labels: target name -> (N, ...) in the order of the items; integers or floats. They are known before any image is read.
        valid: target name -> bool, where that label exists: (N,), or (N, K) for a mask per label of several, or the label's
            shape for maps. A target not named here is labelled everywhere.
        classes: target name -> what its labels 0, 1, ... (or its K columns) stand for, where the data say so and not the task
            (`FromClasses`).
        groups: (N,) integers, one number for samples that belong together, as pictures of one person do, the same in every
            split: validation samples are held out in whole groups, and a group in two splits is an error. None: each sample by
            itself.
        training: the same items with the transforms that they are trained with, which may draw at random from the global
            generators of torch, Python and NumPy; the samples held out for validation are those of `source`. None: `source`.

    Raises:
        DataError: no map-style dataset, lengths that do not fit together, or a first item that is no image.
    """

    images: TorchImages

    def __init__(
        self,
        source: Any,
        labels: Mapping[str, Any],
        valid: Mapping[str, Any] | None = None,
        classes: Mapping[str, Sequence[str]] | None = None,
        groups: Any | None = None,
        *,
        training: Any = None,
    ) -> None:
        if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
            raise DataError(f"source must have a length and items, as map-style datasets have; found {type(source).__name__}")
        if not len(source):
            raise DataError("source holds no items; was it looked for in the right folder?")
        training = source if training is None else training
        if len(training) != len(source):
            raise DataError(f"training must have the items of source, {len(source)}; found {len(training)}")
        for one in (source, training):
            if not torch.equal(*(_image(one, 0, 0, 0) for _ in range(2))):
                raise DataError(
                    f"item 0 of {type(one).__name__} differs each time from the same random state; draw from the global "
                    "generators of torch, Python or NumPy, not from one of its own"
                )
        self.images = TorchImages(source, training, torch.arange(len(source)))
        super().__init__(len(source), labels, valid, classes, groups)

    def __len__(self) -> int:
        return len(self.images)

    def same_images(self, other: Dataset) -> bool:
        """Whether the other has the same rows, as far as some of their images tell."""
        if not isinstance(other, TorchDataset) or not torch.equal(self.images.rows, other.images.rows):
            return False
        if (self.images.shape, self.images.dtype) != (other.images.shape, other.images.dtype):
            return False
        some = torch.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).long()
        return self.images.source is other.images.source or torch.equal(self.images[some], other.images[some])

    def placed(self, device: torch.device | str, reading: Reading | None = None) -> TorchImages:
        """The images as training reads them."""
        decoders = None if reading is None else reading.decoders
        return self.images.placed(device, 0 if decoders is None else decoders.workers)

    def _images_at(self, index: Tensor) -> TorchImages:
        return self.images.subset(index)


class _Wanted(Sampler[list[tuple[int, int]]]):
    """(row, sample) of each item of each batch."""

    def __init__(self, bounds: Sequence[tuple[int, int]], rows: Tensor, samples: Tensor) -> None:
        self.bounds, self.rows, self.samples = bounds, rows, samples

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for a, b in self.bounds:
            yield list(zip(self.rows[a:b].tolist(), self.samples[a:b].tolist(), strict=True))


class _Reader:
    """Reads batches: a tensor, or what is wrong, for between processes an error keeps its type, but not its words."""

    def __init__(self, source: Any, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
        self.source, self.shape, self.dtype, self.seed = source, shape, dtype, seed

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> Tensor | str:
        batch = torch.empty(len(wanted), *self.shape, dtype=self.dtype)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker, for the same bits
        try:
            for place, (row, sample) in zip(batch, wanted, strict=True):
                image = _image(self.source, row, self.seed, sample)
                if tuple(image.shape) != self.shape or image.dtype != self.dtype:
                    return (
                        f"item {row} is {image.dtype} of shape {tuple(image.shape)}, others are {self.dtype} of shape "
                        f"{self.shape}; give all one shape, as by torchvision.transforms.v2.Resize((64, 64))"
                    )
                place.copy_(image)
        except DataError as error:
            return str(error)
        finally:
            torch.set_num_threads(threads)
        return batch


def _image(source: Any, row: int, seed: int, sample: int) -> Tensor:
    """An item's image, (C, H, W) or (D,); what it draws at random comes from the stream of (seed, sample).

    Raises:
        DataError: it cannot be read, or is no image.
    """
    try:
        with seeded(seed, "item", sample):
            item = source[row]
        image = item[0] if isinstance(item, tuple | list) and item else item
        image = image.detach() if isinstance(image, Tensor) else _from_picture(image, row)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"item {row} of {type(source).__name__} cannot be read: {said(error)}") from error
    image = image[None] if image.ndim == 2 else image
    image = image.float() if image.dtype == torch.float64 else image
    if image.ndim not in (1, 3) or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise DataError(
            f"item {row} must be uint8 or floating point, (C, H, W), (H, W) or (D,); found {image.dtype} of shape "
            f"{tuple(image.shape)}"
        )
    if image.is_floating_point() and not bool(image.isfinite().all()):
        raise DataError(f"item {row} holds a value that is not finite; remove or repair it")
    return image


def _from_picture(image: Any, row: int) -> Tensor:
    from PIL.Image import Image
    from torchvision.transforms.v2 import functional as F

    if isinstance(image, np.ndarray):
        image = np.ascontiguousarray(image)  # torch takes no negative strides, as flips have
        if image.ndim == 1:
            return torch.from_numpy(image)
    if not isinstance(image, np.ndarray | Image):
        raise DataError(
            f"item {row} must be an image (a tensor, a PIL image, an array), or a tuple that begins with one; found "
            f"{type(image).__name__}"
        )
    found: Tensor = F.to_image(image).as_subclass(Tensor)
    return found


def _as_it_is(found: Any) -> Any:
    return found


def _left_alone(worker: int) -> None:
    """A worker does not end by signals that are for the run: it saves, and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Its iterator, without the handler by which torch raises an error for a dead worker in the middle of whatever is computed:
    it is found dead when its batch is asked for.
    """
    if not loader.num_workers or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
    return batches
