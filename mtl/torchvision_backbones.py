"""Every classification network of torchvision, by its torchvision name, as a backbone.

The last Linear (SqueezeNet: the last convolution) becomes an Identity, so that heads consume what it consumed; auxiliary
classifiers are off. Networks are built and initialised by torchvision, and pretrained weights are loaded by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pickle import UnpicklingError
from typing import Any

from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mtl.backbones import Backbone, need_image
from mtl.errors import ConfigError, unknown
from mtl.options import Options
from mtl.registry import register_backbone
from mtl.weights import load_state


class TorchvisionOptions(Options):
    """What every torchvision network takes."""

    weights: str | None = None
    """Pretrained weights by torchvision's name, such as DEFAULT or IMAGENET1K_V1, downloaded once into torch's hub folder;
    null: random ones. They were trained with what `data.standardize: imagenet` does."""
    norm_momentum: float | None = Field(None, gt=0, le=1)
    """Of batch norm's running statistics; null: torch's 0.1 with random weights, torchvision's own with pretrained ones. At
    those of MobileNetV3, MNASNet, MaxViT and the larger EfficientNets (0.01 to 0.0003) it takes thousands of steps to forget
    the variance of 1 that statistics begin with, and until then evaluation is at chance."""
    image_size: int | None = Field(None, ge=1)
    """Resize images to this height and width before the network; null: their own size, or the smallest the network takes."""


FRESH_MOMENTUM = 0.1


@dataclass(frozen=True)
class Family:
    """What networks of one architecture have in common.

    Args:
        points: default layer points: after pooling, or at the end of a resolution, as the paper places its units; or what
            finds them in a network.
        smallest: height and width below which the network fails.
        step: height and width must be a multiple of this.
        square: height and width must be equal.
        channels_last: see `Backbone`.
        arguments: of torchvision's builder, from the image size (H, W).
        pretrained: arguments of the builder that go with pretrained weights.
    """

    points: tuple[str, ...] | Callable[[nn.Module], tuple[str, ...]]
    smallest: int = 1
    step: int = 1
    square: bool = False
    channels_last: str | None = None
    arguments: Callable[[tuple[int, int]], dict[str, Any]] = lambda size: {}
    pretrained: tuple[tuple[str, Any], ...] = ()

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The nearest size, not below the image's, that the network takes."""
        height, width = (max(-(-extent // self.step) * self.step, self.smallest) for extent in (height, width))
        return (max(height, width),) * 2 if self.square else (height, width)


def _numbered(prefix: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{i}" for i in numbers)


def _pools(network: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in network.named_modules() if isinstance(module, nn.MaxPool2d))


def _quarters(network: nn.Module) -> tuple[str, ...]:
    layers = [name for name, _ in network.named_modules() if re.fullmatch(r"encoder\.layers\.\w+", name)]
    return tuple(layers[len(layers) * i // 4 - 1] for i in range(1, 5))


def _vit(patch: int) -> Family:
    return Family(
        _quarters,
        smallest=patch,
        step=patch,
        square=True,
        channels_last=r"encoder(\..+)?",
        arguments=lambda size: {"image_size": size[0]},
    )


SWIN = r"features(\.0|\.0\.[12]|\.[1-7](\..+)?)?|norm"
"""Points of a Swin transformer after its first convolution: (B, H, W, C)."""

FAMILIES: dict[str, Family] = {
    r"alexnet": Family(_pools, smallest=63),
    r"convnext_\w+": Family(_numbered("features.", 1, 3, 5, 7), smallest=32),
    r"densenet\d+": Family((*_numbered("features.transition", 1, 2, 3), "features.norm5"), smallest=29),
    r"efficientnet_(b\d|v2_[ml])": Family(_numbered("features.", 1, 2, 3, 5, 8)),
    r"efficientnet_v2_s": Family(_numbered("features.", 1, 2, 3, 5, 7)),
    r"googlenet": Family(
        ("maxpool2", "maxpool3", "maxpool4", "inception5b"),
        smallest=15,
        arguments=lambda size: {"aux_logits": False, "init_weights": True},
        pretrained=(("transform_input", True),),
    ),
    r"inception_v3": Family(
        ("maxpool1", "maxpool2", "Mixed_5d", "Mixed_6e", "Mixed_7c"),
        smallest=75,
        arguments=lambda size: {"aux_logits": False, "init_weights": True},
        pretrained=(("transform_input", True),),
    ),
    r"maxvit_t": Family(_numbered("blocks.", 0, 1, 2, 3), smallest=224, step=224, arguments=lambda size: {"input_size": size}),
    r"mnasnet\d_\d+": Family(_numbered("layers.", 7, 8, 9, 11, 13)),
    r"mobilenet_v2": Family(_numbered("features.", 1, 3, 6, 13, 18)),
    r"mobilenet_v3_large": Family(_numbered("features.", 1, 3, 6, 12, 16)),
    r"mobilenet_v3_small": Family(_numbered("features.", 0, 1, 3, 8, 12)),
    r"regnet_\w+": Family(_numbered("trunk_output.block", 1, 2, 3, 4)),
    r"(wide_)?resne(t|xt)\w+": Family(_numbered("layer", 1, 2, 3, 4)),
    r"shufflenet_v2_\w+": Family(("stage2", "stage3", "conv5")),
    r"squeezenet1_0": Family(lambda network: (*_pools(network), "features.12"), smallest=21),
    r"squeezenet1_1": Family(lambda network: (*_pools(network), "features.12"), smallest=17),
    r"swin_\w+": Family(_numbered("features.", 1, 3, 5, 7), smallest=4, channels_last=SWIN),
    r"vgg\w+": Family(_pools, smallest=32),
    r"vit_\w+_16": _vit(16),
    r"vit_\w+_32": _vit(32),
    r"vit_\w+_14": _vit(14),
}
"""Pattern of torchvision names -> family; each name matches one."""


def family_of(name: str) -> Family:
    """The family of a torchvision network.

    Raises:
        KeyError: a network that this module does not know, from a newer torchvision.
    """
    for pattern, family in FAMILIES.items():
        if re.fullmatch(pattern, name):
            return family
    raise KeyError(name)


def _backbone(name: str, input_shape: Sequence[int], options: TorchvisionOptions) -> Backbone:
    from torchvision import models  # half a second, paid by those who use one

    need_image(name, input_shape)
    if input_shape[0] not in (1, 3):
        raise ConfigError([f"backbone {name!r} takes images of 1 or 3 channels; found samples of shape {tuple(input_shape)}"])
    family = family_of(name)
    wanted = (options.image_size,) * 2 if options.image_size is not None else tuple(input_shape[1:])
    size = family.size(*wanted)
    if options.image_size is not None and size != wanted:
        raise ConfigError(
            [
                f"backbone.image_size={options.image_size}: {name!r} takes a multiple of {family.step} from {family.smallest} "
                f"on; the next is {size[0]}"
            ]
        )
    arguments = family.arguments(size)
    weights = None
    if options.weights is not None:
        weights = _weights(name, options.weights)
        arguments |= family.pretrained
        if "image_size" in arguments:  # position embeddings are of one size
            trained = weights.meta["min_size"][0]
            if options.image_size not in (None, trained):
                raise ConfigError(
                    [f"backbone.image_size={options.image_size}: {options.weights} of {name!r} takes {trained} only"]
                )
            arguments["image_size"] = trained
            size = (trained, trained)
    network = _without_classifier(models.get_model(name, weights=None, **arguments))
    momentum = options.norm_momentum or (FRESH_MOMENTUM if weights is None else None)
    if momentum is not None:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = momentum

    def load(fresh: nn.Module) -> None:
        found = _without_classifier(_loaded(name, weights, arguments)).state_dict()
        load_state(fresh, {key: found[key] for key in fresh.state_dict()})  # auxiliary classifiers stay behind

    return Backbone(
        network,
        family.points(network) if callable(family.points) else family.points,
        channels=3,
        size=None if size == tuple(input_shape[1:]) else size,
        channels_last=family.channels_last,
        pretrained=load if weights is not None else None,
    )


def _without_classifier(network: nn.Module) -> nn.Module:
    """`network` with its last Linear replaced by an Identity; where there is none, its last convolution."""
    layers = list(network.named_modules())
    last = [name for name, m in layers if isinstance(m, nn.Linear)] or [name for name, m in layers if isinstance(m, nn.Conv2d)]
    network.set_submodule(last[-1], nn.Identity())
    return network


def _weights(name: str, wanted: str) -> Any:
    from torchvision import models

    known = models.get_model_weights(name)
    if wanted not in known.__members__:
        raise ConfigError([f"backbone.weights: {unknown(f'weights of {name}', wanted, known.__members__)}"])
    return known[wanted]


def _loaded(name: str, weights: Any, arguments: dict[str, Any]) -> nn.Module:
    """A network with its pretrained weights, by torchvision.

    Raises:
        ConfigError: they can be neither found nor downloaded; with where to put them.
    """
    from torch import hub
    from torchvision import models

    own = {key: value for key, value in arguments.items() if key in ("image_size", "input_size")}
    try:
        return models.get_model(name, weights=weights, **own)  # type: ignore[no-any-return]
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, HTTPException) as error:
        file = weights.url.rpartition("/")[2]
        raise ConfigError(
            [
                f"backbone.weights: {weights.name} of {name} cannot be had: {' '.join(str(error).split())}; put {file} into "
                f"{hub.get_dir()}/checkpoints (in place of a damaged one), or set weights to null"
            ]
        ) from error


def _register(name: str) -> Callable[..., Backbone]:
    def factory(input_shape: Sequence[int], options: TorchvisionOptions) -> Backbone:
        return _backbone(name, input_shape, options)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = f"torchvision's {name} without its last Linear."
    return register_backbone(name, options=TorchvisionOptions)(factory)


def __getattr__(name: str) -> Callable[..., Backbone]:
    """The factory of a torchvision network, registered when it is asked for: entry points name them one by one."""
    try:
        family_of(name)
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    globals()[name] = made = _register(name)
    return made
