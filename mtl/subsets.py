"""Which training samples are used: a share of them, each kind of sample in proportion, nested, and the same for every run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.seeding import permutation


def stratified(strata: Sequence[Tensor], among: Tensor, count: int, seed: int, *names: str | int) -> Tensor:
    """The positions of `count` samples, ascending, in which every stratum has its share, rounded.

    Samples belong to one stratum where they agree in all of `strata`. A pure function of its arguments, and nested: those
    chosen for a smaller `count` are among those chosen for a larger one. With strata of one sample each it is a random choice.

    Args:
        strata: integers (N,), any number of them.
        among: int64 (M,), ascending: the positions to choose from.
        count: at most M.
        seed, names: of the random stream.
    """
    shuffled = among[permutation(len(among), seed, *names)]
    if not strata:
        return shuffled[:count].sort().values
    keys = torch.stack([of[shuffled].long() for of in strata], dim=1)
    _, stratum, size = keys.unique(dim=0, return_inverse=True, return_counts=True)
    by_stratum = stratum.argsort(stable=True)
    first = size.cumsum(0) - size
    rank = torch.empty_like(stratum)
    rank[by_stratum] = torch.arange(len(shuffled)) - first[stratum[by_stratum]]
    place = (rank + 0.5) / size[stratum]  # evenly through the stratum: after a share f of all, a share f of it has come
    return shuffled[place.argsort(stable=True)[:count]].sort().values


def how_many(given: int | float, total: int) -> int:
    """A count, or a share of `total` (a float), as a count."""
    return given if isinstance(given, int) else round(given * total)
