"""Randomness as an argument: every random stream is named, and is a pure function of the run's seed and that name.

Nothing here touches the global random state for longer than a `with` block. Two arms of a comparison that share a seed
therefore start a tower of the same task from the same weights and see the same samples in the same order.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names`, independent of every other stream of the same run.

    >>> derive_seed(0, "order", 1) == derive_seed(0, "order", 1) != derive_seed(0, "order", 2)
    True
    """
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Draws(NamedTuple):
    """Where what is drawn for samples comes from: for each a stream of its own, (seed, number)."""

    seed: int
    sample: Tensor
    """int64 (N,) on the CPU, the numbers."""


def permutation(n: int, seed: int, *names: str | int) -> Tensor:
    """The order of `n` samples, int64 (n,) on the CPU: a pure function of the seed and the stream's name."""
    generator = torch.Generator().manual_seed(derive_seed(seed, *names))
    return torch.randperm(n, generator=generator)


@contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Run a block under its own global random state of torch, Python and NumPy, then restore the caller's.

    Third-party layers (initialisation, dropout, stochastic depth) draw from torch's global generators, other plugins from
    Python's and NumPy's, and take no argument, so this is how their randomness is made one.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        own = derive_seed(seed, *names)
        torch.manual_seed(own)
        random.seed(own)
        np.random.seed(own & _MASK32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def hash_uniform(index: Tensor, seed: int, *names: str | int) -> Tensor:
    """One number in [0, 1) per entry of `index` (int64, any shape), float32, on the device of `index`.

    A counter-based generator (two rounds of a 32-bit integer hash): the number depends on the stream and on the entry alone,
    not on the batch it sits in, on the worker that asks or on what was drawn before. Good enough to place crops; not
    cryptographic.
    """
    key = derive_seed(seed, *names) & _MASK32
    x = (index ^ key) & _MASK32
    for _ in range(2):
        x = (x ^ (x >> 16)) * 0x045D9F3B & _MASK32
        x = (x ^ (x >> 16)) * 0x045D9F3B & _MASK32
        x = (x ^ (x >> 16) ^ (key >> 7)) & _MASK32
    return (x >> 8).to(torch.float32) * (1.0 / (1 << 24))
