"""Images that are there twice: in one split, in two (figures on those say nothing), or with two different labels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.data import Samples, Split

CHUNK = 512
"""Images that are read at a time."""
LARGEST = 1 << 30
"""Bytes of images in memory that a run looks at by itself before it begins; more, and files, `mtl inspect` does."""


@dataclass(frozen=True)
class Duplicates:
    """Of one dataset: how many images of a split are there already in it, how many of a later split are in an earlier one, and
    for how many images a task has different labels in two places.
    """

    within: dict[str, int] = field(default_factory=dict)
    shared: dict[tuple[str, str], int] = field(default_factory=dict)
    conflicting: dict[str, int] = field(default_factory=dict)

    def warnings(self, name: str) -> list[str]:
        """What a user should know before believing a figure."""
        return [
            f"dataset {name}: {count:,} {later} images are in {earlier} too: figures on them say nothing about new ones"
            for (earlier, later), count in self.shared.items()
            if count
        ]


def find(splits: Mapping[Split, Samples]) -> Duplicates:
    """Compare every image of a dataset with every other, by a hash of its pixels as training sees them; all are read."""
    prints = {split: _prints(part, split) for split, part in splits.items()}
    within = {split.value: len(found) - len(np.unique(found)) for split, found in prints.items()}
    shared = _shared(prints)
    tasks = {task for part in splits.values() for task in part.targets}
    return Duplicates(within, shared, {task: _conflicting(task, splits, prints) for task in sorted(tasks)})


def _shared(prints: Mapping[Split, NDArray[np.bytes_]]) -> dict[tuple[str, str], int]:
    """(Earlier split, later one) -> how many images of the later one are in the earlier one."""
    return {
        (one.value, other.value): int(np.isin(prints[other], prints[one]).sum())
        for one, other in combinations([split for split in Split if split in prints], 2)
    }


def _prints(part: Samples, split: str) -> NDArray[np.bytes_]:
    """(N,): 16 bytes for each image; images that cannot be read differ from all others."""
    text = bytearray()
    bounds = [(start, min(start + CHUNK, len(part))) for start in range(0, len(part), CHUNK)]
    for (start, _), (images, unread) in zip(bounds, part.image_batches(bounds), strict=True):
        rows = images.cpu().flatten(1).contiguous().numpy()
        for i, row in enumerate(rows):
            own = f"unreadable {split} {start + i}".encode() if i in unread else b""
            text += hashlib.blake2b(own or row.data, digest_size=16, person=b"own" if own else b"").digest()
    return np.frombuffer(bytes(text), "S16")


def _conflicting(task: str, splits: Mapping[Split, Samples], prints: Mapping[Split, NDArray[np.bytes_]]) -> int:
    """How many different images have two labels of a task that are not the same; labels with a part missing do not count."""
    found, labels = [], []
    for split, part in splits.items():
        target, mask = part.targets[task].cpu(), part.valid[task]
        seen = torch.ones(len(part), dtype=torch.bool) if mask is None else mask.cpu().view(len(part), -1).all(1)
        found.append(prints[split][seen.numpy()])
        labels.append(_hashes(target[seen]))
    image = np.unique(np.concatenate(found), return_inverse=True)[1]
    kinds = np.unique(np.concatenate(labels), return_inverse=True)[1]
    pairs = np.unique(np.stack([image, kinds]), axis=1)
    return int((np.bincount(pairs[0]) > 1).sum()) if image.size else 0


def _hashes(rows: Tensor) -> NDArray[np.bytes_]:
    """(N,): 16 bytes for each row (N, ...)."""
    text = b"".join(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows.contiguous().numpy())
    return np.frombuffer(text, "S16")


def warnings_of(samples: Mapping[Split, Mapping[str, Samples]]) -> list[str]:
    """Images in memory that are in two splits, said before a run begins."""
    names = {name for parts in samples.values() for name in parts}
    lines = []
    for name in sorted(names):
        splits = {split: parts[name] for split, parts in samples.items() if name in parts}
        images = [part.images for part in splits.values()]
        if sum(one.numel() * one.element_size() if isinstance(one, Tensor) else LARGEST + 1 for one in images) <= LARGEST:
            shared = _shared({split: _prints(part, split) for split, part in splits.items()})
            lines += Duplicates(shared=shared).warnings(name)
    return lines
