"""Image files: one JPEG or PNG becomes one uint8 tensor, or a reason why not.

Files may come from anywhere, so the format is told by content, not by name, and the size by the header, before anything is
decoded. Decoding is Pillow's.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mtl.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png")
"""Of the files in a folder that are taken for images."""
FORMATS = ("JPEG", "PNG")
LARGEST = 100_000_000
"""Pixels; a larger image is refused before it is decoded."""


def read_image(path: Path, channels: int) -> Tensor:
    """uint8 (channels, H, W), turned upright where the file says how it was held.

    Args:
        path: of a JPEG or PNG file.
        channels: 1 for grey, 3 for red, green and blue; an image of another kind is converted, transparency dropped.

    Raises:
        DataError: no regular file, another format, too large or damaged; the reason only, without the path.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise DataError("no such file" if not path.exists() else "not a regular file")
    if not path.stat().st_size:
        raise DataError("the file is empty")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:  # the size is checked below
            width, height = image.size
            if width * height > LARGEST:
                raise DataError(f"{width} x {height} pixels are more than the {LARGEST:,} that are read")
            upright = _upright(image)
            if upright.mode.startswith("I"):  # 16 bits a channel
                upright = Image.fromarray((np.asarray(upright).astype(np.int32) >> 8).astype(np.uint8))
            pixels = np.array(upright.convert("L" if channels == 1 else "RGB"))
    except UnidentifiedImageError:
        raise DataError("neither a JPEG nor a PNG image") from None
    except DataError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # a hostile file makes the decoders raise anything
        raise DataError(f"damaged: {error}") from None
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1).contiguous()


TURNED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""EXIF orientation -> what undoes it, as numbers of PIL's `Transpose`."""


def _upright(image: Any) -> Any:
    """The picture as it was seen; one whose EXIF data are broken, as it is stored."""
    from PIL import Image

    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # of no use then, and no reason to lose the picture
        return image
    if not isinstance(orientation, int) or orientation not in TURNED:
        return image
    return image.transpose(Image.Transpose(TURNED[orientation]))


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, *size), bilinear with antialiasing; the aspect ratio is not kept."""
    if tuple(image.shape[1:]) == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
