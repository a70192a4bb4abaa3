"""Backbones: networks from an image, or a feature vector, to features, and the layer points they declare.

A factory registered with `@mtl.register_backbone` is called with (input_shape[, options]), the shape (C, H, W) or (D,) of one
sample, and returns a `Backbone`: a fresh network with random weights, whose output is what heads consume. The framework calls
it once per tower; it never copies a network.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mtl.errors import ConfigError
from mtl.options import Options
from mtl.registry import register_backbone


@dataclass(frozen=True)
class Backbone:
    """A network, and what is known about cutting it.

    Args:
        network: one tensor (B, *input_shape) -> one tensor of features (B, D) or (B, C, H, W).
        points: its default layer points, names of submodules in execution order.
        channels: input channels that the network insists on; one-channel images are repeated to that number.
        size: height and width that the network insists on; images are resized to it.
        channels_last: regular expression of the layer points at which features are (B, ..., C) instead of (B, C, ...), as in
            transformers. Exchange units there still receive (B, C, ...).
        pretrained: loads weights into a network that this factory made. Called when a run begins; a run that is restored has
            weights of its own.
    """

    network: nn.Module
    points: tuple[str, ...] = ()
    channels: int | None = None
    size: tuple[int, int] | None = None
    channels_last: str | None = None
    pretrained: Callable[[nn.Module], None] | None = None

    def prepare(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, channels, *size)."""
        return prepare(x, self.channels, self.size)

    def is_channels_last(self, point: str) -> bool:
        """Whether features at a layer point are (B, ..., C)."""
        return self.channels_last is not None and re.fullmatch(self.channels_last, point) is not None

    def channels_first(self, point: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape (C, ...) of one sample's features at a layer point, of which the network gives this shape."""
        return (shape[-1], *shape[:-1]) if self.is_channels_last(point) else shape


def prepare(x: Tensor, channels: int | None, size: tuple[int, int] | None) -> Tensor:
    """(B, C, H, W) -> (B, channels, *size): bilinear with antialiasing, then one channel repeated. None: as it is."""
    if size is not None and x.ndim == 4 and tuple(x.shape[2:]) != size:
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
    if channels is not None and x.shape[1] == 1 != channels:
        x = x.expand(-1, channels, *[-1] * (x.ndim - 2))
    return x


def initialise(module: nn.Module) -> None:
    """He initialisation (He et al. 2015, arXiv 1502.01852), as the reference protocol has it; biases zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class SmallCNNOptions(Options):
    """Size and regularisation of `small_cnn`."""

    width: float = Field(1.0, gt=0, le=64)
    """Factor of every channel count (32, 64, 1024), rounded, at least 1."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Probability of dropping a feature after `fc3` and its exchange; the reference's keep probability is 1 minus this."""


class SmallCNN(nn.Sequential):
    """The reference protocol's tower: two convolutions with pooling, one fully connected layer.

    (B, C, H, W) -> (B, 1024 x width). Batch norm before each ReLU, SAME padding; the pool precedes the ReLU, with which it
    commutes exactly, so that the ReLU touches a quarter of the values. Biases that batch norm would cancel are left out.
    """

    points = ("pool1", "pool2", "fc3")

    def __init__(self, input_shape: Sequence[int], width: float = 1.0, dropout: float = 0.2) -> None:
        channels, height, _ = input_shape
        c1, c2, c3 = (max(1, round(width * n)) for n in (32, 64, 1024))
        positions = (height // 4) * (input_shape[2] // 4)
        super().__init__(
            OrderedDict(
                pool1=_convolution(channels, c1),
                pool2=_convolution(c1, c2),
                fc3=nn.Sequential(
                    OrderedDict(
                        flatten=nn.Flatten(),
                        fc=nn.Linear(c2 * positions, c3, bias=False),
                        bn=nn.BatchNorm1d(c3),
                        relu=nn.ReLU(),
                    )
                ),
                dropout=nn.Dropout(dropout),
            )
        )
        self.apply(initialise)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            bn=nn.BatchNorm2d(outputs),
            pool=nn.MaxPool2d(2),
            relu=nn.ReLU(),
        )
    )


@register_backbone("small_cnn", options=SmallCNNOptions)
def small_cnn(input_shape: Sequence[int], options: SmallCNNOptions) -> Backbone:
    """The reference protocol's tower; points after both pools and the fully connected layer."""
    need_image("small_cnn", input_shape, smallest=4)
    return Backbone(SmallCNN(input_shape, options.width, options.dropout), SmallCNN.points)


class MLPOptions(Options):
    """Layers of `mlp`."""

    widths: tuple[int, ...] = Field((32, 32, 32), min_length=1)
    """Outputs of each fully connected layer."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Probability of dropping a feature after each layer but the first, and after its exchange (reference: keep 0.8)."""


class MLP(nn.Sequential):
    """Fully connected layers, each with batch norm and ReLU: (B, ...) -> (B, widths[-1]). Images are flattened."""

    def __init__(self, inputs: int, widths: Sequence[int], dropout: float) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for i, width in enumerate(widths, start=1):
            layers[f"fc{i}"] = nn.Sequential(
                OrderedDict(fc=nn.Linear(inputs, width, bias=False), bn=nn.BatchNorm1d(width), relu=nn.ReLU())
            )
            if i > 1:
                layers[f"dropout{i}"] = nn.Dropout(dropout)
            inputs = width
        super().__init__(layers)
        self.points = tuple(f"fc{i}" for i in range(1, len(widths) + 1))
        self.apply(initialise)


@register_backbone("mlp", options=MLPOptions)
def mlp(input_shape: Sequence[int], options: MLPOptions) -> Backbone:
    """Fully connected layers for feature vectors; a point after each, `fc1`, `fc2`, ..."""
    inputs = 1
    for extent in input_shape:
        inputs *= extent
    network = MLP(inputs, options.widths, options.dropout)
    return Backbone(network, network.points)


def need_image(name: str, input_shape: Sequence[int], smallest: int = 1) -> None:
    """Refuse samples that are no images, or too small ones.

    Raises:
        ConfigError: naming the backbone and the shape.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise ConfigError(
            [
                f"backbone {name!r} takes images (C, H, W) of at least {smallest} x {smallest}; "
                f"found samples of shape {tuple(input_shape)}" + ("; use 'mlp'" if len(input_shape) == 1 else "")
            ]
        )
