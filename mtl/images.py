"""Image files: one JPEG or PNG becomes one uint8 tensor, or a reason why not.

Files may come from anywhere, so the format is told by content, not by name, and the size by the header, before anything is
decoded. Pillow decodes; for ordinary JPEG files torchvision's decoder, which is the same library without the copies, takes its
place where it has been imported: twice as fast, and equal in every pixel. Nothing depends on which of the two it was.
"""

from __future__ import annotations

import os
import stat
import warnings
from dataclasses import dataclass
from io import BytesIO
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
LARGEST_WHOLE = 25_000_000
"""Pixels of an image that is decoded whole, which takes up to ten bytes each; a JPEG much larger than wanted is not."""
LARGEST_FILE = 1 << 30
"""Bytes; a larger file is refused before it is read. The largest image without any compression is below that."""
SHRUNK = 4
"""A JPEG is decoded at 1/4 or 1/8 of its size where that leaves at least twice the wanted size: 2.5 times as fast for a photo
of 12 megapixels, and less than a grey level on average from decoding it whole, since the rest of the way is still a proper
resize. At 1/2 nothing would be gained over torchvision's decoder."""


Box = tuple[int, int, int, int]
"""Of a picture's pixels: left, top, width, height."""


def read_image(path: Path | str | bytes, channels: int, size: tuple[int, int] | None = None, box: Box | None = None) -> Tensor:
    """uint8 (channels, H, W), turned upright where the file says how it was held. Memory may be channels-last.

    Args:
        path: of a JPEG or PNG file.
        channels: 1 for grey, 3 for red, green and blue; an image of another kind is converted, transparency dropped.
        size: (H, W) to resize to, as `resized` does; None: as it is.
        box: of the upright picture, what is kept of it before it is resized; None: all. What lies outside the picture is not.

    Raises:
        DataError: no regular file, another format, too large or damaged, or a box outside the picture; the reason only, without
            the path.
    """
    data = _contents(path)
    header = jpeg_header(data)
    least = size if box is None else None  # a box counts the pixels of the whole picture
    image = _by_torchvision(data, header, channels, least) if header is not None else None
    if image is None:
        image = _by_pillow(data, channels, least)
    if box is not None:
        image = _cut(image, box)
    return image if size is None else resized(image, size)


def _cut(image: Tensor, box: Box) -> Tensor:
    left, top, width, height = box
    part = image[:, max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if not part.numel():
        raise DataError(
            f"the box {width} x {height} at {left}, {top} lies outside the {image.shape[2]} x {image.shape[1]} pixels"
        )
    return part


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, *size), bilinear with antialiasing; the aspect ratio is not kept."""
    if tuple(image.shape[1:]) == size:
        return image
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # so that torch sees what is channels-last, and keeps it so
    return F.interpolate(batch, size, mode="bilinear", antialias=True)[0]


def resize_batch(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, C, H, W) of any dtype -> (B, *shape) of that dtype: bilinear with antialiasing, grey repeated for each channel."""
    if tuple(x.shape[2:]) != tuple(shape[1:]):
        found = F.interpolate(x.float(), shape[1:], mode="bilinear", antialias=True)
        x = found.to(x.dtype) if x.is_floating_point() else found.round_().clamp_(0, 255).to(x.dtype)
    return x if x.shape[1] == shape[0] else x.expand(-1, shape[0], -1, -1).contiguous()


def _contents(path: Path | str | bytes) -> bytearray:
    """The bytes of a file, by one read."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))  # a FIFO would block
    except FileNotFoundError:
        raise DataError("no such file") from None
    except OSError as error:
        raise DataError(error.strerror or str(error)) from None
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise DataError("not a regular file")
        if not about.st_size:
            raise DataError("the file is empty")
        if about.st_size > LARGEST_FILE:
            raise DataError(f"{about.st_size:,} bytes are more than the {LARGEST_FILE:,} that are read")
        data = bytearray(about.st_size)
        with open(file, "rb", buffering=0, closefd=False) as raw:
            filled = raw.readinto(data) or 0
            while filled < len(data) and (more := raw.readinto(memoryview(data)[filled:])):  # a network's file system
                filled += more
    except OSError as error:
        raise DataError(error.strerror or str(error)) from None
    finally:
        os.close(file)
    return data


@dataclass(frozen=True)
class JpegHeader:
    """What decides how a JPEG is decoded. `described` is whether EXIF or XMP data may say how the picture was held."""

    height: int
    width: int
    components: int
    described: bool


def jpeg_header(data: bytes | bytearray) -> JpegHeader | None:
    """Of a JPEG; None for anything else, and for one that is odd enough to be left to Pillow."""
    if data[:2] != b"\xff\xd8":
        return None
    at, end, described = 2, len(data) - 9, False
    while at < end:
        marker = data[at + 1]
        if data[at] != 0xFF or not 0xC0 <= marker < 0xFF or 0xD0 <= marker <= 0xDA:  # padding, or no tables before a scan
            return None
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame begins: T.81, B.2.2
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return JpegHeader(height, width, data[at + 9], described) if height and width else None
        described |= marker == 0xE1
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _by_torchvision(data: bytearray, header: JpegHeader, channels: int, size: tuple[int, int] | None) -> Tensor | None:
    """A JPEG decoded by torchvision's operator; None where Pillow is to decode it, or to say what is wrong with it.

    The operator itself, since the functions around it are deprecated from torchvision 0.29 on and say so at every call. Where
    it is gone, or torchvision has not been imported (which takes longer than a thousand images), Pillow does as well.
    """
    if header.components not in (1, channels) or _shrinks(header.width, header.height, size):  # grey from colour: Pillow's way
        return None
    if header.width * header.height > min(LARGEST, LARGEST_WHOLE) or not hasattr(torch.ops.image, "decode_jpeg"):
        return None
    orientation = _orientation(data) if header.described else 1
    try:
        image: Tensor = torch.ops.image.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), channels, False)
    except RuntimeError:
        return None
    return _turned(image, orientation)


def _by_pillow(data: bytearray, channels: int, size: tuple[int, int] | None) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with (
            warnings.catch_warnings(action="ignore"),  # the size is checked below
            Image.open(BytesIO(data), formats=FORMATS) as image,
        ):
            width, height = image.size
            small = image.format == "JPEG" and size is not None and _shrinks(width, height, size)
            most = LARGEST if small else min(LARGEST, LARGEST_WHOLE)
            if width * height > most:
                raise DataError(f"{width} x {height} pixels are more than the {most:,} that are read")
            orientation = _orientation_of(image)
            if small and size is not None:
                image.draft(image.mode, (2 * max(size), 2 * max(size)))
            upright: Any = image
            if image.mode.startswith("I"):  # 16 bits a channel
                upright = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).astype(np.uint8))
            pixels = np.array(upright.convert("L" if channels == 1 else "RGB"))
    except UnidentifiedImageError:
        raise DataError("neither a JPEG nor a PNG image") from None
    except DataError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # a hostile file makes the decoders raise anything
        raise DataError(f"damaged: {error}") from None
    return _turned(torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1), orientation)


def _shrinks(width: int, height: int, size: tuple[int, int] | None) -> bool:
    """Whether a JPEG of these sides, however it is turned, is decoded smaller than it is."""
    return size is not None and min(width, height) >= SHRUNK * 2 * max(size)


TURNED = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}
"""EXIF orientation -> what undoes it: whether rows and columns are exchanged, and the axes of (C, H, W) mirrored after that."""


def _turned(image: Tensor, orientation: int) -> Tensor:
    if orientation not in TURNED:
        return image
    exchanged, mirrored = TURNED[orientation]
    return (image.transpose(1, 2) if exchanged else image).flip(mirrored)


def _orientation(data: bytearray) -> int:
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(data), formats=FORMATS) as image:
            return _orientation_of(image)
    except Exception:  # the decoder has its own say on such a file
        return 1


def _orientation_of(image: Any) -> int:
    """How the picture was held, as EXIF numbers it; 1, as stored, where its EXIF data are missing or broken."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # of no use then, and no reason to lose the picture
        return 1
    return orientation if isinstance(orientation, int) else 1
