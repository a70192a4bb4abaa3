"""Backbone `glyph_net`: a plain convolutional network with two layer points."""

from collections import OrderedDict
from collections.abc import Sequence

from pydantic import Field
from torch import nn

import mtl


class GlyphNetOptions(mtl.Options):
    """Size of `glyph_net`."""

    width: int = Field(16, ge=1)
    """Channels of the first block; the second has twice as many."""


@mtl.register_backbone("glyph_net", options=GlyphNetOptions)
def glyph_net(input_shape: Sequence[int], options: GlyphNetOptions) -> mtl.Backbone:
    """Two strided convolutions and a fully connected layer; points after each convolution."""
    channels, height, width = input_shape
    inner = options.width
    extent = -(-height // 4) * -(-width // 4)
    network = nn.Sequential(
        OrderedDict(
            first=_block(channels, inner),
            second=_block(inner, 2 * inner),
            flatten=nn.Flatten(),
            linear=nn.Linear(2 * inner * extent, 4 * inner),
            relu=nn.ReLU(),
        )
    )
    return mtl.Backbone(network, points=("first", "second"))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
