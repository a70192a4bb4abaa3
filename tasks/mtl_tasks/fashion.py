"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) with two tasks: the garment's category, and the group it belongs to.

The group is the one of the cross-stitch reference implementation: shoes, for women, other. It is a function of the category, so
expect little from sharing on this data alone.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import mtl

if TYPE_CHECKING:
    from torch import Tensor

CATEGORIES = (
    "t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
GROUPS = ("shoes", "for women", "other")
GROUP_OF_CATEGORY = (2, 2, 2, 1, 2, 0, 1, 0, 1, 0)


@mtl.register_dataset("fashion_mnist")
def fashion_mnist(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
    """60,000 and 10,000 grey images 28 x 28, read by torchvision, which downloads them into `root` where they are missing.

    Targets: `category` (0 to 9) and `group` (0 to 2).
    """
    import torch

    images, category = read_fashion_mnist(root, train=split == mtl.Split.TRAIN)
    group = torch.tensor(GROUP_OF_CATEGORY)[category]
    return mtl.ArrayDataset(images, labels={"category": category, "group": group})


def read_fashion_mnist(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, 28, 28), and categories (N,), downloaded into `root` where they are missing.

    Raises:
        DataError: they are neither there nor to be had, or are damaged.
    """
    from torchvision.datasets import FashionMNIST

    raw = Path(root) / "FashionMNIST" / "raw"
    try:
        try:
            data = FashionMNIST(root, train=train, download=True)
        except PermissionError:  # a read-only folder holds the archives only: unpack a copy elsewhere
            with tempfile.TemporaryDirectory() as copy:
                shutil.copytree(Path(root) / "FashionMNIST", Path(copy) / "FashionMNIST")
                data = FashionMNIST(copy, train=train, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise mtl.DataError(
            f"Fashion-MNIST is neither under {str(root)!r} nor can it be downloaded ({reason}); put its four .gz files into "
            f"{str(raw)!r}, or set MTL_DATA_ROOT to a folder that holds FashionMNIST/"
        ) from error
    except Exception as error:  # torchvision checks what it unpacks, and not what is unpacked already
        raise mtl.DataError(
            f"the files in {str(raw)!r} are damaged ({type(error).__name__}: {error}); remove those without .gz, then they "
            "are unpacked again"
        ) from None
    if data.data.shape[1:] != (28, 28) or len(data.data) != len(data.targets):
        found = f"images {tuple(data.data.shape)}, labels {tuple(data.targets.shape)}"
        raise mtl.DataError(f"the files in {str(raw)!r} are not Fashion-MNIST's: {found}")
    return data.data, data.targets


@mtl.register_task("fashion_category", options=mtl.ClassificationOptions)
def fashion_category(options: mtl.ClassificationOptions) -> mtl.Task:
    """Which of ten kinds of garment."""
    return mtl.Task("fashion_mnist", "category", mtl.Classification(CATEGORIES, **dict(options)))


@mtl.register_task("fashion_group", options=mtl.ClassificationOptions)
def fashion_group(options: mtl.ClassificationOptions) -> mtl.Task:
    """Shoes, for women, or other."""
    return mtl.Task("fashion_mnist", "group", mtl.Classification(GROUPS, **dict(options)))
