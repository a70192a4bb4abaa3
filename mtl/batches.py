"""From samples on a device to the batches of a step.

Order is a pure function of (seed, dataset, epoch); augmentation of (seed, dataset, epoch, sample). Neither depends on what ran
before, so nothing about them needs to be saved. A batch is an index into tensors that already lie on the device; images that
are files are decoded ahead of it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mtl.data import Samples
from mtl.errors import ConfigError
from mtl.options import Options
from mtl.sampling import Mixing, class_balanced, earlier
from mtl.seeding import Draws, derive_seed, hash_uniform, permutation


class Augment(Options):
    """Random changes to training images; none by default."""

    crop: int = Field(0, ge=0)
    """Pad by this many black pixels on every side, then crop back at a random place; 0: no crop."""
    flip: bool = False
    """Mirror left and right with probability one half."""

    def __bool__(self) -> bool:
        return self.crop > 0 or self.flip

    def __call__(self, images: Tensor, sample: Tensor, seed: int, *stream: str | int) -> Tensor:
        """images (B, C, H, W) and their sample numbers (B,) -> images of the same shape and dtype."""
        if not self:
            return images
        batch, channels, height, width = images.shape
        device = images.device
        rows = torch.arange(height, device=device).expand(batch, height)
        columns = torch.arange(width, device=device).expand(batch, width)
        if self.flip:
            mirrored = hash_uniform(sample, seed, "flip", *stream) < 0.5
            columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
        if self.crop:
            images = F.pad(images, (self.crop,) * 4)
            span = 2 * self.crop + 1
            rows = rows + (hash_uniform(sample, seed, "top", *stream) * span).long()[:, None]
            columns = columns + (hash_uniform(sample, seed, "left", *stream) * span).long()[:, None]
        b = torch.arange(batch, device=device)[:, None, None, None]
        c = torch.arange(channels, device=device)[None, :, None, None]
        return images[b, c, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class Batch:
    """Some samples of one dataset: images (B, ...) in their own dtype, targets and masks of its tasks.

    `index` (B,) are their numbers in the split, where somebody may ask for them: in training. `whole` is how many samples the
    batch has in all processes; None: these are all.
    """

    dataset: str
    images: Tensor
    targets: Mapping[str, Tensor]
    valid: Mapping[str, Tensor | None]
    index: Tensor | None = None
    whole: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def count(self) -> int:
        """Samples of the batch in all processes."""
        return len(self) if self.whole is None else self.whole

    def labels(self, task: str) -> int | Tensor:
        """How many labels of a task there are; a tensor on the device where some are missing."""
        mask = self.valid[task]
        return len(self) if mask is None else mask.sum()


Step = list[list[Batch]]
"""What one optimizer update consumes: micro-batches, each a list of one batch per dataset, ordered by dataset name."""


class Feed:
    """The training batches of one or several datasets.

    One dataset drives: an epoch is one pass over it. The others take as many batches, in passes of their own over fresh
    permutations. `mixing` says which one it is, and how many samples of each are in a batch.

    Args:
        samples: dataset name -> its training samples.
        batch_size: samples per dataset and micro-batch, on average. A remainder of one joins the batch before it: batch norm
            refuses it.
        accumulate: micro-batches per step.
        seed: of the run.
        augment: applied to images.
        epoch_steps: length of an epoch; None: one pass over the largest dataset. A longer one goes on with further passes, each
            in an order of its own; a shorter one sees a part, another one each time.
        mixing: of several datasets.
        balanced: tasks whose classes are drawn equally often, one of a dataset at most.
        shard: (rank, count) of the process, of several that share every batch.

    Raises:
        ConfigError: augmentation of what is no image, or classes to be balanced that are none.
    """

    def __init__(
        self,
        samples: Mapping[str, Samples],
        batch_size: int,
        accumulate: int,
        seed: int,
        augment: Augment | None = None,
        epoch_steps: int | None = None,
        mixing: Mixing | None = None,
        balanced: Sequence[str] = (),
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.samples = {name: samples[name] for name in sorted(samples)}
        self.augment = augment or Augment()
        for name, part in self.samples.items():
            if self.augment and len(part.shape) != 3:
                raise ConfigError([f"data.augment needs images (C, H, W); samples of dataset {name!r} are {part.shape}"])
            if self.augment.crop >= min(part.shape[-2:], default=0) > 0 and self.augment.crop:
                raise ConfigError([f"data.augment.crop={self.augment.crop} is not below the image size {part.shape[-2:]}"])
        self.seed = seed
        self.accumulate = accumulate
        self.shard = shard
        mixing = mixing or Mixing()
        counts = {name: len(part) for name, part in self.samples.items()}
        self.batch_sizes = mixing.batch_sizes(counts, batch_size)
        self.bounds = self._bounds(counts, mixing.epoch, None if epoch_steps is None else epoch_steps * accumulate)
        self.steps_per_epoch = math.ceil(len(next(iter(self.bounds.values()))) / accumulate)
        self.classes = {name: found for name in self.samples if (found := self._balanced(name, balanced)) is not None}

    def _bounds(self, counts: Mapping[str, int], epoch: str, needed: int | None) -> dict[str, list[tuple[int, int]]]:
        """Dataset -> (start, stop) of each of its batches in an epoch; equally many for all."""
        passes = {name: batch_bounds(count, self.batch_sizes[name]) for name, count in counts.items()}
        chosen = max if epoch == "longest" else min
        driver = chosen(passes, key=lambda name: (len(passes[name]), counts[name]))
        bounds = {}
        for name, size in self.batch_sizes.items():
            if needed is not None:
                bounds[name] = batch_bounds(needed * size, size)
            elif size == self.batch_sizes[driver]:
                bounds[name] = passes[driver]
            elif len(passes[name]) == len(passes[driver]):
                bounds[name] = passes[name]
            else:
                bounds[name] = batch_bounds(len(passes[driver]) * size, size)
        return bounds

    def _balanced(self, name: str, tasks: Sequence[str]) -> Tensor | None:
        """The classes (N,) of a dataset that are drawn equally often, -1 where a sample has none; None: it does not matter."""
        part = self.samples[name]
        wanted = [task for task in tasks if task in part.targets]
        if len(wanted) > 1:
            raise ConfigError([f"data.class_balanced: {' and '.join(wanted)} are both of dataset {name!r}; only one can be"])
        if not wanted:
            return None
        target, mask = part.targets[wanted[0]].cpu(), part.valid[wanted[0]]
        if target.ndim != 1 or target.is_floating_point():
            raise ConfigError([f"data.class_balanced: the labels of {wanted[0]!r} are no classes, one of several per sample"])
        return target if mask is None else torch.where(mask.cpu(), target, -1)

    def epoch(self, epoch: int, done: int = 0) -> Iterator[Step]:
        """The steps of epoch `epoch` (from 1) after the first `done`, of which nothing is read."""
        first, count = done * self.accumulate, len(next(iter(self.bounds.values())))
        batches = {name: self._batches(name, epoch, first) for name in self.samples}
        for i in range(first, count, self.accumulate):
            yield [[next(of_dataset) for of_dataset in batches.values()] for _ in range(min(self.accumulate, count - i))]

    def digest(self, epoch: int) -> str:
        """Twelve digits of the order of an epoch's samples."""
        digest = hashlib.sha256()
        for name in self.samples:
            digest.update(repr((name, self.bounds[name], self.accumulate)).encode())
            digest.update(self._epoch_order(name, epoch).numpy().tobytes())
        return digest.hexdigest()[:12]

    def _epoch_order(self, name: str, epoch: int) -> Tensor:
        """Of the samples of a dataset in an epoch: pass after pass, each in an order of its own."""
        needed, count = self.bounds[name][-1][1], len(self.samples[name])
        return torch.cat([self._order(name, epoch, i) for i in range(math.ceil(needed / count))])[:needed]

    def _batches(self, name: str, epoch: int, first: int) -> Iterator[Batch]:
        """As many batches of dataset `name` as the driving dataset has, from number `first` on."""
        part, bounds = self.samples[name], self.bounds[name][first:]
        order = self._epoch_order(name, epoch)
        device = part.images.device
        sample = order + earlier(order) * len(part)
        wholes = [b - a for a, b in bounds]
        if self.shard[1] > 1 and bounds:
            shards = [shard_of(a, b, *self.shard) for a, b in bounds]
            places, padded = [torch.tensor(mine) for mine, _ in shards], [padding for _, padding in shards]
            order, sample = order[torch.cat(places)], sample[torch.cat(places)]
            bounds = list(itertools.pairwise(itertools.accumulate(map(len, places), initial=0)))
        else:
            padded = [[] for _ in bounds]
        draws = Draws(derive_seed(self.seed, "sample", name, epoch), sample)
        index, sample = order.to(device), sample.to(device)
        batches = zip(bounds, part.image_batches(bounds, order, draws), wholes, padded, strict=True)
        for (a, b), (images, unread), whole, padding in batches:
            images = self.augment(images, sample[a:b], self.seed, "augment", name, epoch)
            yield _batch(part, index[a:b], images, [*unread, *padding], whole)

    def _order(self, name: str, epoch: int, turn: int) -> Tensor:
        """Of the samples of a dataset in one of its passes in an epoch."""
        stream = ("order", name, epoch, turn)
        if name in self.classes:
            return class_balanced(self.classes[name], self.seed, *stream)
        return permutation(len(self.samples[name]), self.seed, *stream)


def batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each batch over `count` samples; a remainder of one joins the batch before it.

    >>> batch_bounds(7, 3)
    [(0, 3), (3, 7)]
    """
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], count], strict=True))


def shard_of(start: int, stop: int, rank: int, count: int) -> tuple[list[int], list[int]]:
    """A process's shard of a batch: every `count`-th position, and which of its own places only fill it up.

    All shards have the same length, at least 2, for batch norm refuses one; what fills them up is the batch's first samples
    again, and is not to be counted.

    >>> shard_of(10, 15, 1, 2)
    ([11, 13, 10], [2])
    """
    mine = list(range(start + rank, stop, count))
    length = max(-(-(stop - start) // count), 2)
    filled = [start + i % (stop - start) for i in range(length - len(mine))]
    return [*mine, *filled], list(range(len(mine), length))


def in_order(part: Samples, batch_size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
    """The samples of a split in their own order, for evaluation: of what is in memory slices, without a copy. Of several
    processes, (rank, count), each takes every `count`-th batch.
    """
    rank, count = shard
    bounds = [(a, min(a + batch_size, len(part))) for a in range(0, len(part), batch_size)][rank::count]
    for (a, b), (images, unread) in zip(bounds, part.image_batches(bounds), strict=True):
        yield _batch(part, slice(a, b), images, unread)


def first(part: Samples, count: int) -> Batch:
    """The first samples of a split, of which nothing more is read; their labels whether or not the images can be."""
    index = slice(0, count)
    return _batch(part, index, part.images[index], [])


def _batch(part: Samples, index: Tensor | slice, images: Tensor, unread: list[int], whole: int | None = None) -> Batch:
    """Samples and their images; those whose image could not be read, or that only fill up a shard, have no labels."""
    targets = {task: target[index] for task, target in part.targets.items()}
    valid = {task: None if mask is None else mask[index] for task, mask in part.valid.items()}
    if unread:
        valid = {task: _without(mask, targets[task], unread) for task, mask in valid.items()}
    return Batch(part.dataset, images, targets, valid, index if isinstance(index, Tensor) else None, whole)


def _without(mask: Tensor | None, target: Tensor, positions: list[int]) -> Tensor:
    mask = torch.ones(len(target), dtype=torch.bool, device=target.device) if mask is None else mask.clone()
    mask[positions] = False
    return mask
