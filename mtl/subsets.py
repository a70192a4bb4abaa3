"""Which training samples are used: a share of them, each kind of sample in proportion, nested, and the same for every run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.seeding import permutation


def stratified(strata: Sequence[Tensor], among: Tensor, count: int, seed: int, *names: str | int) -> Tensor:
    """The positions of `count` samples, ascending, in which every stratum has its share, rounded up or down.

    Samples belong to one stratum where they agree in all of `strata`. Which way a stratum is rounded alternates along each of
    them, so that a value spread over many small strata has its share too. A pure function of its arguments, and nested: those
    chosen for a smaller `count` are among those chosen for a larger one.

    Args:
        strata: integers (N,), any number of them.
        among: int64 (M,), ascending: the positions to choose from.
        count: at most M.
        seed, names: of the random stream.
    """
    shuffled = among[permutation(len(among), seed, *names)]
    if not strata:
        return shuffled[:count].sort().values
    keys = torch.stack([of[shuffled].long().unique(return_inverse=True)[1] for of in strata], dim=1)
    values, stratum, size = keys.unique(dim=0, return_inverse=True, return_counts=True)
    by_stratum = stratum.argsort(stable=True)
    first = size.cumsum(0) - size
    rank = torch.empty_like(stratum)
    rank[by_stratum] = torch.arange(len(shuffled)) - first[stratum[by_stratum]]
    begin = (0.5 + values.double() @ torch.tensor(_steps(len(strata)), dtype=torch.float64)) % 1
    place = (rank + begin[stratum]) / size[stratum]  # evenly through the stratum: after a share f of all, a share f of it
    return shuffled[place.argsort(stable=True)[:count]].sort().values


def _steps(dimensions: int) -> list[float]:
    """Steps of a lattice that is even in every direction: powers of the root of g^(d+1) = 1 + g (Roberts 2018)."""
    root = 2.0
    for _ in range(40):
        root = (1 + root) ** (1 / (dimensions + 1))
    return [root ** -(i + 1) for i in range(dimensions)]


def how_many(given: int | float, total: int) -> int:
    """A count, or a share of `total` (a float), as a count."""
    return given if isinstance(given, int) else round(given * total)


def hashed_split(names: Iterable[bytes], share: float) -> NDArray[np.bool_]:
    """bool (N,): the names that belong to a share of all, each decided by its own hash: what is added moves nothing."""
    limit = int(share * 2**64)
    return np.array([int.from_bytes(blake2b(name, digest_size=8).digest(), "big") < limit for name in names], bool)
