"""Is a cut network still the network? Every torchvision backbone, whole against stage by stage, in float64.

    python -m benchmarks.cutting [NAME ...] [--out FILE.json]

Compares the output in evaluation mode, and output, every gradient and every buffer after a step in training mode, dropout and
stochastic depth on; prints one row a network and, at the end, one a family. 0 means bitwise equal.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl.backbones import Backbone
from mtl.errors import MTLError
from mtl.registry import BACKBONES
from mtl.stages import cut
from mtl.torchvision_backbones import FAMILIES, family_of

RESULTS = Path(__file__).parent / "results"
WHAT = ("eval", "train", "gradients", "buffers")


def networks() -> list[str]:
    """The backbones that torchvision's classification networks are registered as."""
    from torchvision import models

    return sorted(models.list_models(module=models))


def compare(name: str, side: int = 64) -> dict[str, Any]:
    """Largest absolute differences between the whole network and its stages, on two random images of `side` pixels."""
    torch.manual_seed(0)
    made: Backbone = BACKBONES.get(name).create((3, side, side))
    network = made.network.double()
    x = made.prepare(torch.randn(2, 3, side, side, dtype=torch.float64))
    started = time.perf_counter()
    stages = cut(network, made.points)
    seconds = time.perf_counter() - started

    def staged(x: Tensor) -> Tensor:
        for stage in stages:
            x = stage(network, x)
        return x

    buffers = {key: value.clone() for key, value in network.named_buffers()}
    whole = run(network, network, x)
    with torch.no_grad():
        for key, value in network.named_buffers():
            value.copy_(buffers[key])
    parts = run(network, staged, x)
    return {
        "network": name,
        "family": next(pattern for pattern, family in FAMILIES.items() if family is family_of(name)),
        "input": list(x.shape[1:]),
        "points": list(made.points),
        "features": list(whole["eval"][0].shape[1:]),
        "parameters": sum(p.numel() for p in network.parameters()),
        "cut_seconds": round(seconds, 4),
        **{what: difference(whole[what], parts[what]) for what in whole},
    }


def run(network: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, list[Tensor]]:
    """Everything that one step leaves, and the output in evaluation mode after it."""
    network.train()
    network.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    y = forward(x)
    y.square().mean().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None]
    assert not missing, missing
    left = {
        "train": [y.detach()],
        "gradients": [p.grad for p in network.parameters() if p.grad is not None],
        "buffers": [b.detach().clone() for b in network.buffers()],
    }
    network.eval()
    with torch.no_grad():
        return {"eval": [forward(x)], **left}


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """max |a - b| over all tensors."""
    return max((float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0)


def render() -> str:
    """The table of the recorded results."""
    recorded = json.loads((RESULTS / "cutting.json").read_text())
    rows = recorded["rows"]
    seconds = [row["cut_seconds"] for row in rows]
    largest = max(row["parameters"] for row in rows)
    return (
        table(rows)
        + f"\n\nn = {len(rows)} networks, {sum(not any(row[w] for w in WHAT) for row in rows)} of them equal bit for bit; the "
        f"largest has {largest:,} parameters. Cutting took {min(seconds):.3f} to {max(seconds):.3f} s. "
        f"torch {recorded['torch']}, CPU.\n"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """One line a family."""
    lines = [
        "| networks | n | default layer points of the first | eval | train | gradients | buffers |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        of = [row for row in rows if row["family"] == family]
        worst = " | ".join(f"{max(row[what] for row in of):g}" for what in WHAT)
        names = ", ".join(row["network"] for row in of)
        lines.append(f"| {names} | {len(of)} | {', '.join(of[0]['points'])} | {worst} |")
    return "\n".join(lines)


def main() -> None:
    """Compare, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for name in given.names or networks():
        try:
            row = compare(name)
        except MTLError as error:
            print(f"{name}: refused: {error}", flush=True)
            continue
        print(
            f"{name}: {row['input']} -> {row['features']}",
            *(row[w] for w in WHAT),
            flush=True,
        )
        rows.append(row)
        gc.collect()
    rows.sort(key=lambda row: (list(FAMILIES).index(row["family"]), row["parameters"]))
    print(table(rows))
    if given.out:
        given.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
