"""Whether data are still those that a run began with: twelve digits of a split."""

from __future__ import annotations

import hashlib

import torch

from mtl.data import Samples

LOOKED_AT = 32
"""Images of a split that are read for it, evenly spaced; labels are all of them."""


def fingerprint(part: Samples) -> str:
    """Of a split: how many samples of which shape, every label and whether it is there, and some of the images."""
    digest = hashlib.sha256(repr((part.dataset, len(part), part.shape, str(part.images.dtype))).encode())
    for task in sorted(part.targets):
        mask = part.valid[task]
        for tensor in (part.targets[task], *([] if mask is None else [mask])):
            digest.update(repr((task, tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    index = torch.linspace(0, len(part) - 1, min(LOOKED_AT, len(part))).long()
    digest.update(part.images[index.to(part.images.device)].cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:12]
