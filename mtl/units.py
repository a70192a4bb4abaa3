"""Exchange units: modules that map T same-shaped feature maps, one per tower, to T feature maps of that shape.

The sharing code knows units by this interface alone. `mtl.cross_stitch` holds the bundled one; a third party registers its own
with `@mtl.register_unit`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ExchangeUnit(nn.Module, ABC):
    """Mixes the features of T towers at one layer point.

    A factory registered with `@mtl.register_unit` is called with (tasks, shape[, options]): the number of towers and the shape
    of one sample's feature there, (C, H, W) or (C,), and returns one of these.
    """

    compilable: bool = False
    """Whether its `forward` has a compiled form."""
    compiled: bool = False
    """Set on a compilable unit when a run wants that form (`compile: units`)."""

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """T tensors (B, C, H, W) or (B, C) -> T tensors of the same shape. Out of place: the inputs may be needed."""

    def forward_stacked(self, features: Tensor) -> Tensor:
        """As `forward`, of T features in one tensor: (T, B, C, ...) -> (T, B, C, ...), where towers run as one network.

        A unit that can mix them in one operation says so here; the two must agree.
        """
        return torch.stack(list(self(features.unbind(0))))

    def coupling(self) -> Tensor | None:
        """How strongly task t (row) receives from task s (column), (T, T), for logs; None where there is no such thing."""
        return None

    def channels(self) -> Tensor | None:
        """The same for each channel, (T, T, C), for reports; None where there is no such thing. A zero says that nothing at all
        is received.
        """
        return None

    @property
    def coupling_label(self) -> str:
        """What the numbers of `coupling` are, for the title of a picture."""
        return "coupling"
