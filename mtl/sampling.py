"""How often which sample is drawn: datasets of unequal size mixed in a batch, classes of unequal size in a dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mtl.options import Options
from mtl.seeding import permutation


class Mixing(Options):
    """How the batches of a step are made of several datasets; with one dataset it says nothing.

    A step holds `batch_size` samples for each dataset on average. Losses are means over each dataset's own samples, so a policy
    changes how exactly a task's gradient is known, not its weight.
    """

    policy: Literal["equal", "proportional", "temperature"] = "equal"
    """equal: as many samples of each dataset; proportional: in proportion to their sizes, so that all are passed over once in
    the same time; temperature: in proportion to size^(1/temperature), between the two."""
    temperature: float = Field(2.0, ge=1)
    """Of that policy; 1 is proportional, a large number equal."""
    epoch: Literal["longest", "shortest"] = "longest"
    """An epoch is one pass over the dataset that takes most steps, the others repeated, or over the one that takes fewest, of
    the others another part in each epoch."""

    @model_validator(mode="before")
    @classmethod
    def _by_policy(cls, data: Any) -> Any:
        if isinstance(data, dict) and "temperature" in data and "policy" not in data:
            return {"policy": "temperature", **data}
        return {"policy": data} if isinstance(data, str) else data

    def batch_sizes(self, counts: Mapping[str, int], batch_size: int) -> dict[str, int]:
        """Dataset -> its samples in a batch, two at least (batch norm takes no fewer); together about `batch_size` for each."""
        exponent = {"equal": 0.0, "proportional": 1.0, "temperature": 1 / self.temperature}[self.policy]
        weights = {name: count**exponent for name, count in counts.items()}
        whole = batch_size * len(counts) / sum(weights.values())
        return {name: max(2, round(whole * weight)) for name, weight in weights.items()}


def class_balanced(classes: Tensor, seed: int, *names: str | int) -> Tensor:
    """An order of N samples, int64 (N,), in which every class comes as often as any other, or once more.

    Samples of a rare class are repeated, and none of a class once more than another before all of them had their turn; of a
    frequent class some are left out, others each time. What has no class keeps its share.

    Args:
        classes: int64 (N,), -1 where there is none.
        seed, names: of the random stream.
    """
    found = [int(one) for one in classes.unique() if one >= 0]
    unlabelled = (classes < 0).nonzero().flatten()
    total = len(classes) - len(unlabelled)
    chosen = [unlabelled]
    extra = permutation(len(found), seed, "extra", *names).argsort().tolist()  # which classes have one more
    for i, one in enumerate(found):
        members = (classes == one).nonzero().flatten()
        wanted = total // len(found) + (extra[i] < total % len(found))
        passes = math.ceil(wanted / len(members))
        orders = [members[permutation(len(members), seed, "class", one, turn, *names)] for turn in range(passes)]
        chosen.append(torch.cat(orders)[:wanted] if orders else members[:0])
    order = torch.cat(chosen)
    return order[permutation(len(order), seed, "shuffle", *names)]


def earlier(order: Tensor) -> Tensor:
    """How often the sample at each position of `order` (N,) came before it."""
    ranked, place = order.sort(stable=True)
    first = torch.searchsorted(ranked, ranked)  # where the run of equal ones begins
    counts = torch.empty_like(order)
    counts[place] = torch.arange(len(order)) - first
    return counts
