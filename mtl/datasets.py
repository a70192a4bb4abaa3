"""What a dataset plugin returns: labels with their masks, and images as an array or (`mtl.files`) as files.

Shapes, lengths and dtypes are checked here, where the plugin's author sees them; labels against what a head takes when a
dataset is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.columns import SetAside
from mtl.errors import DataError, unknown

if TYPE_CHECKING:
    from mtl.files import Reading


class Dataset(ABC):
    """One split of a dataset: labels and masks in memory, `images` however a subclass keeps them.

    `images` has `shape` (N, C, H, W) or (N, D), `dtype` and a length, and gives a tensor for a slice or an index tensor.

    Args:
        count: of images.
        labels: target name -> (N, ...) as the dataset stores them; integers or floats.
        valid: target name -> bool, where that label exists: (N,), or (N, K) for a mask per label of several, or the label's
            shape for maps. A target not named here is labelled everywhere.
        classes: target name -> what its labels 0, 1, ... (or its K columns) stand for, where the data say so and not the task.
        groups: (N,) integers, one number for samples that belong together, as pictures of one person do, the same in every
            split: validation samples are held out in whole groups, and a group in two splits is an error. None: each sample by
            itself.
        set_aside: what of the data is not used, and why; counted at the start of a run.

    Raises:
        DataError: shapes or lengths that do not fit together.
    """

    images: Any

    def __init__(
        self,
        count: int,
        labels: Mapping[str, Any],
        valid: Mapping[str, Any] | None,
        classes: Mapping[str, Sequence[str]] | None = None,
        groups: Any | None = None,
        set_aside: SetAside | None = None,
    ) -> None:
        self.set_aside = set_aside or SetAside()
        if not isinstance(labels, Mapping):
            raise DataError(f"labels must map target names to arrays, as in {{'digit': y}}; found {type(labels).__name__}")
        self.labels = {name: as_tensor(value, f"labels[{name!r}]") for name, value in labels.items()}
        self.valid: dict[str, Tensor] = {}
        for name, value in (valid or {}).items():
            if name not in self.labels:
                raise DataError(f"valid: {unknown('target', name, self.labels)}")
            mask = as_tensor(value, f"valid[{name!r}]")
            if mask.dtype != torch.bool or mask.shape != self.labels[name].shape[: mask.ndim]:
                raise DataError(f"valid[{name!r}] must be bool of shape (N,); found {mask.dtype} of shape {tuple(mask.shape)}")
            self.valid[name] = mask
        self.classes = {name: tuple(map(str, names)) for name, names in (classes or {}).items()}
        for name, names in self.classes.items():
            if name not in self.labels:
                raise DataError(f"classes: {unknown('target', name, self.labels)}")
            if twice := [one for one, count in Counter(names).items() if count > 1]:
                raise DataError(f"classes[{name!r}] holds {twice[0]!r} more than once")
        self.groups = None if groups is None else as_tensor(groups, "groups")
        if self.groups is not None and (self.groups.shape != (count,) or self.groups.is_floating_point()):
            raise DataError(f"groups must be {count} integers; found {self.groups.dtype} of shape {tuple(self.groups.shape)}")
        for name, value in self.labels.items():
            if value.ndim == 0 or len(value) != count:
                raise DataError(f"labels[{name!r}] must have one entry per image, {count}; found shape {tuple(value.shape)}")

    @abstractmethod
    def __len__(self) -> int:
        """How many images."""

    @abstractmethod
    def same_images(self, other: Dataset) -> bool:
        """Whether another dataset has the same images in the same order."""

    @abstractmethod
    def placed(self, device: torch.device | str, reading: Reading | None = None) -> Any:
        """`images` on a device; files are read as `reading` says."""

    @abstractmethod
    def _images_at(self, index: Tensor) -> Any:
        """`images` at `index` (int64)."""

    def subset(self, index: Tensor) -> Self:
        """The samples at `index` (int64), as a dataset."""
        part = copy(self)
        part.images = self._images_at(index)
        part.labels = {name: value[index] for name, value in self.labels.items()}
        part.valid = {name: value[index] for name, value in self.valid.items()}
        part.groups = None if self.groups is None else self.groups[index]
        return part


class ArrayDataset(Dataset):
    """One split of a dataset, in memory.

    Args:
        images: uint8 or float, (N, C, H, W), (N, H, W) for one channel, or (N, D) for feature vectors: a tensor, an array, or
            a sequence of equally shaped ones. Kept in its own dtype.
        labels: target name -> (N, ...) as the dataset stores them; integers or floats.
        valid: target name -> bool, where that label exists: (N,), or (N, K) for a mask per label of several, or the label's
            shape for maps. A target not named here is labelled everywhere.
        classes: target name -> what its labels 0, 1, ... (or its K columns) stand for, where the data say so and not the task
            (`FromClasses`).
        groups: (N,) integers, one number for samples that belong together, as pictures of one person do, the same in every
            split: validation samples are held out in whole groups, and a group in two splits is an error. None: each sample by
            itself.

    Raises:
        DataError: shapes or lengths that do not fit together, or values that are not finite.
    """

    def __init__(
        self,
        images: Any,
        labels: Mapping[str, Any],
        valid: Mapping[str, Any] | None = None,
        classes: Mapping[str, Sequence[str]] | None = None,
        groups: Any | None = None,
    ) -> None:
        self.images: Tensor = _images(images)
        super().__init__(len(self.images), labels, valid, classes, groups)

    def __len__(self) -> int:
        return len(self.images)

    def same_images(self, other: Dataset) -> bool:
        """Whether the other has the same images in the same order."""
        return isinstance(other, ArrayDataset) and torch.equal(self.images, other.images)

    def placed(self, device: torch.device | str, reading: Reading | None = None) -> Tensor:
        """The images on a device."""
        return self.images.to(device)

    def _images_at(self, index: Tensor) -> Tensor:
        return self.images[index]


def _images(images: Any) -> Tensor:
    if isinstance(images, Sequence):
        shapes = [tuple(np.shape(image)) for image in images]
        for i, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise DataError(
                    f"images differ in shape: image 0 is {shapes[0]}, image {i} is {shape}; resize or crop them to one shape"
                )
        images = np.stack([np.asarray(image) for image in images]) if shapes else np.empty((0, 1), np.uint8)
    dtype = getattr(images, "dtype", type(images).__name__)
    x = as_tensor(images, "images")
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim not in (2, 4):
        raise DataError(f"images must be (N, C, H, W), (N, H, W) or (N, D); found shape {tuple(x.shape)}")
    if not (x.dtype == torch.uint8 or x.is_floating_point()):
        wide = bool((x < 0).any() or (x > 255).any())
        to = "float32') and divide by their largest value" if wide else "uint8')"
        raise DataError(f"images must be uint8 or floating point; found {dtype}; convert them with .astype('{to}")
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] > 4 and x.shape[2] > 4:
        raise DataError(f"images look like (N, H, W, C), shape {tuple(x.shape)}; give (N, C, H, W), as torch has it")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        first = int((~x.flatten(1).isfinite()).any(1).nonzero()[0])
        raise DataError(f"image {first} holds a value that is not finite; remove or repair it")
    return x


def _writable(value: Any) -> NDArray[Any]:
    array = np.ascontiguousarray(value)
    return array if array.flags.writeable else array.copy()  # torch shares memory, and warns where it must not write


def as_tensor(value: Any, what: str) -> Tensor:
    """Numbers of a plugin as a tensor that torch computes with; float64 becomes float32.

    Raises:
        DataError: not numbers; `what` names them.
    """
    if not isinstance(value, Tensor) and np.asarray(value).dtype.kind in "USO":
        raise DataError(f"{what} must be numbers; found {np.asarray(value).dtype}; give each name its number, 0 to C-1")
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(_writable(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} cannot be made a tensor: {error}") from error
    if tensor.is_complex():
        raise DataError(f"{what} must be real numbers; found {tensor.dtype}")
    if tensor.dtype == torch.float64:
        return tensor.float()
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor  # torch computes in neither
