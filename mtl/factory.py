"""The backbone factory: fresh networks of a plugin, one per task; and what a backbone's layer points are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mtl.backbones import Backbone
from mtl.errors import PluginError
from mtl.registry import Plugin
from mtl.stages import cut, legal_points, module_outputs, probe


def backbone_maker(plugin: Plugin, input_shape: tuple[int, ...], options: object) -> Callable[[], Backbone]:
    """Calls a backbone plugin for one fresh network a time, and checks what it gives."""

    def make() -> Backbone:
        made = plugin.create(input_shape, options=options)  # type: ignore[arg-type]
        if isinstance(made, nn.Module):
            made = Backbone(made)
        if not isinstance(made, Backbone):
            raise PluginError(f"{plugin} must give an mtl.Backbone or an nn.Module; found {type(made).__name__}")
        if any(is_lazy(p) for p in (*made.network.parameters(), *made.network.buffers())):
            probe(
                made.network, cut(made.network, ()), made.prepare(torch.zeros(2, *input_shape))
            )  # lazy layers learn their sizes
        return made

    return make


def _stride(before: int, after: int) -> float:
    """The power of two that brings an extent to another, rounding either way; their ratio where none does."""
    powers = (2**i for i in range(before.bit_length() + 1))
    return next((s for s in powers if after in (before // s, -(-before // s))), before / after)


def describe_backbone(plugin: Plugin, input_shape: tuple[int, ...], options: object = None) -> dict[str, Any]:
    """Every legal layer point of a backbone, with channels, stride and shape at this input shape, and why others are not."""
    made = backbone_maker(plugin, input_shape, options)()
    x = made.prepare(torch.zeros(2, *input_shape))
    outputs = module_outputs(made.network, x)
    legal, illegal = legal_points(made.network)
    features = probe(made.network, cut(made.network, ()), x)[-1]
    modules = dict(made.network.named_modules())
    points = []
    for name in sorted(legal, key=list(outputs).index):
        shape = outputs[name]
        if isinstance(modules[name], nn.Identity):
            illegal[name] = "it does nothing: it stands for a layer that was left out"
            continue
        if isinstance(shape, str):
            illegal[name] = f"it gives {shape}, not one tensor (B, C, ...)"
            continue
        shape = made.channels_first(name, shape)
        stride = _stride(x.shape[-1], shape[-1]) if len(shape) == x.ndim - 1 == 3 else None
        points.append(
            {"name": name, "channels": shape[0], "stride": stride, "shape": list(shape), "default": name in made.points}
        )
    return {
        "name": plugin.name,
        "input_shape": list(input_shape),
        "resized_to": list(made.size) if made.size is not None else None,
        "features": list(features),
        "parameters": sum(p.numel() for p in made.network.parameters()),
        "points": points,
        "illegal": illegal,
    }
