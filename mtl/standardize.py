"""Standardisation: what is subtracted from an input and what it is divided by, taken from the training split."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtl.data import Samples
from mtl.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of red, green and blue in [0, 1], as torchvision's weights declare them."""
CHUNK = 4096
"""Samples per piece, at most, when moments are taken over a training split."""
CHUNK_NUMBERS = 1 << 24
"""Numbers per piece, at most; each takes 16 bytes meanwhile."""
FILES = 20_000
"""Image files that moments are taken from, at most: the mean of so many is known to a hundredth of a grey level or so."""


class Standardize(nn.Module):
    """(x - mean) / std in float32. Buffers of the shape of one sample, or broadcastable to it.

    Args:
        shape: of one sample, (C, H, W) or (D,).
        kind: "pixel": a mean and deviation per position and channel; "channel": per channel; "imagenet": the constants that
            torchvision's pretrained weights were trained with, their mean where there is one channel; "none": 0 and 1.

    Raises:
        ConfigError: "imagenet" for samples that are not images of one or three channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, ...], kind: str) -> None:
        super().__init__()
        per_channel = (shape[0], *[1] * (len(shape) - 1))
        extent = {"pixel": shape, "channel": per_channel, "imagenet": per_channel, "none": (1,) * len(shape)}[kind]
        if kind == "imagenet" and (len(shape) != 3 or shape[0] not in (1, 3)):
            raise ConfigError([f"data.standardize=imagenet is for images of one or three channels; found samples of {shape}"])
        self.register_buffer("mean", torch.zeros(extent))
        self.register_buffer("std", torch.ones(extent))
        self.kind = kind
        self.fitted_on = 0  # samples

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) of any dtype -> (B, ...) float32; images in channels-last memory, where convolutions are fastest."""
        x = (x.to(torch.float32) - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    @torch.no_grad()
    def fit(self, part: Samples) -> None:
        """Take mean and deviation from a training split; of more than 20,000 images that are not in memory from that many.

        A deviation counts as at least one grey level for uint8 images, and as 1 for a float that never varies, so that a pixel
        that is almost always black does not blow up where it is not. "none" scales uint8 to [0, 1] and leaves floats alone.
        """
        x = part.images
        grey = x.dtype == torch.uint8
        if self.kind == "imagenet":
            scale = 255.0 if grey else 1.0  # floats are taken to lie in [0, 1], as torchvision's do
            for buffer, constants in ((self.mean, IMAGENET_MEAN), (self.std, IMAGENET_STD)):
                rgb = torch.tensor(constants, device=buffer.device) * scale
                buffer.copy_((rgb if len(buffer) == 3 else rgb.mean(0, keepdim=True))[:, None, None])
            return
        if self.kind == "none":
            self.std.fill_(255.0 if grey else 1.0)
            return
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
        moments = torch.zeros(2, *part.shape, dtype=wide, device=x.device)
        order = torch.arange(FILES) * len(x) // FILES if not isinstance(x, Tensor) and len(x) > FILES else None
        count = len(x) if order is None else FILES
        size = min(CHUNK, max(1, CHUNK_NUMBERS // math.prod(part.shape)))
        self.fitted_on = 0
        for piece, unread in part.image_batches([(a, min(a + size, count)) for a in range(0, count, size)], order):
            value = piece.to(wide)
            if unread:
                value[unread] = 0.0
            moments += torch.stack([value.sum(0), value.square().sum(0)])
            self.fitted_on += len(piece) - len(unread)
        moments /= max(1, self.fitted_on)
        if self.kind == "channel" and len(part.shape) > 1:
            moments = moments.mean(dim=tuple(range(2, moments.ndim)), keepdim=True)
        mean, square = moments
        std = (square - mean.square()).clamp_min(0).sqrt()
        flat = std <= 1e-6 * mean.abs().clamp_min(1e-6)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(1.0) if grey else torch.where(flat, torch.ones_like(std), std))
