"""How towers are run: the interface of every execution, and the plainest of them, one tower after the other.

An execution is not a format: parameters, their names, checkpoints and results are those of the towers, whatever ran them; a
test holds each execution to the plain one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mtl.stages import Stage
from mtl.units import ExchangeUnit


@dataclass(frozen=True)
class Segment:
    """What towers run between two exchanges: some stages, then a unit that mixes their features (None: the towers end).

    `channels_last` says whether features are (B, ..., C) where the unit mixes them.
    """

    stages: tuple[Stage, ...]
    unit: ExchangeUnit | None = None
    channels_last: bool = False

    def __call__(self, tower: nn.Module, x: Tensor) -> Tensor:
        """The stages alone, with the modules of one tower."""
        for stage in self.stages:
            x = stage(tower, x)
        return x

    def exchange(self, features: Sequence[Tensor]) -> list[Tensor]:
        """T tensors -> T tensors, mixed, as the stages have them."""
        if self.unit is None:
            return list(features)
        if not self.channels_last:
            return list(self.unit(features))
        return [y.movedim(1, -1) for y in self.unit([f.movedim(-1, 1) for f in features])]

    def exchange_stacked(self, features: Tensor) -> Tensor:
        """As `exchange`, of T features in one tensor: (T, B, ...) -> (T, B, ...)."""
        if self.unit is None:
            return features
        if not self.channels_last:
            return self.unit.forward_stacked(features)
        return self.unit.forward_stacked(features.movedim(-1, 2)).movedim(2, -1)


class Execution(ABC):
    """Runs T towers of one architecture."""

    @abstractmethod
    def run(self, towers: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The features of T towers.

        Args:
            towers: T networks of one architecture.
            segments: in order; only the last has no unit.
            inputs: T tensors (B_t, ...), the very same one where towers share it. B_t differ only where nothing is exchanged.

        Returns:
            T tensors (B_t, ...), what the heads consume.
        """


class OneByOne(Execution):
    """One tower after the other, each with all threads of the process."""

    def run(self, towers: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Segment by segment, tower by tower."""
        features = list(inputs)
        for segment in segments:
            features = segment.exchange([segment(tower, x) for tower, x in zip(towers, features, strict=True)])
        return features
