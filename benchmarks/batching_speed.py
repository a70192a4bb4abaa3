"""What towers cost one by one and as one network: a forward and a backward pass, cross-stitched and not.

    python -m benchmarks.batching_speed [--device cuda] [--precision bf16] [--steps 9] [--out FILE.json]

Both take turns in one process; the median of `--steps` passes each, after two that do not count. One thread on a CPU. What
FILE.json holds of other devices or precisions is kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl.backbones import Backbone
from mtl.batched import Batched
from mtl.cross_stitch import CrossStitchUnit
from mtl.execution import Execution, OneByOne, Segment
from mtl.registry import BACKBONES
from mtl.stages import cut, probe

RESULTS = Path(__file__).parent / "results"
CASES = (("small_cnn", (64, 1, 28, 28)), ("resnet18", (8, 3, 64, 64)))
TOWERS = (2, 8)


def network(
    name: str, shape: tuple[int, ...], tasks: int, stitched: bool, device: str
) -> tuple[list[nn.Module], list[Segment], Tensor]:
    """T towers, what they run, and a batch."""
    torch.manual_seed(0)
    made: list[Backbone] = [BACKBONES.get(name).create(shape[1:]) for _ in range(tasks)]
    towers = [one.network.to(device).to(memory_format=torch.channels_last) for one in made]
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    stages = cut(towers[0], made[0].points if stitched else ())
    shapes = probe(towers[0], stages, x)
    units = [CrossStitchUnit(tasks, of, "channel", 0.9, 0.1).to(device) for of in shapes[:-1]]
    return towers, [Segment((stage,), unit) for stage, unit in zip(stages, [*units, None], strict=True)], x


def seconds(execution: Execution, towers: Sequence[nn.Module], segments: Sequence[Segment], x: Tensor, precision: str) -> float:
    """One forward and backward pass."""
    for tower in towers:
        tower.zero_grad()
    if x.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        outputs = execution.run(towers, segments, [x] * len(towers))
    torch.stack([y.float().square().mean() for y in outputs]).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(device: str, precision: str, steps: int) -> list[dict[str, Any]]:
    """One row a network, number of towers, and with or without exchange."""
    rows = []
    on = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, 1 thread"
    for name, shape in CASES:
        for tasks in TOWERS:
            for stitched in (False, True):
                parts = network(name, shape, tasks, stitched, device)
                taken: list[list[float]] = [[], []]
                for step in range(steps + 2):
                    for execution, times in zip((OneByOne(), Batched()), taken, strict=True):
                        found = seconds(execution, *parts, precision)
                        if step >= 2:
                            times.append(found)
                row = {"network": name, "batch": list(shape), "towers": tasks, "stitched": stitched, "steps": steps}
                row |= {"device": on, "precision": precision, "torch": torch.__version__}
                for key, times in zip(("one_by_one", "as_one"), taken, strict=True):
                    row[key] = round(statistics.median(times), 5)
                rows.append(row)
                print(row, flush=True)
    return rows


def render() -> str:
    """The table of the recorded results."""
    rows = json.loads((RESULTS / "batching_speed.json").read_text())
    lines = [
        "| network | batch | towers | cross-stitched | one by one | as one | ratio |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for where in dict.fromkeys((row["device"], row["precision"], row["torch"], row["steps"]) for row in rows):
        lines.append(f"| **{where[0]}, {where[1]}**, torch {where[2]}, medians of {where[3]} | | | | | | |")
        for row in rows:
            if (row["device"], row["precision"], row["torch"], row["steps"]) == where:
                batch = " x ".join(map(str, row["batch"]))
                times = " | ".join(f"{1000 * row[key]:.1f} ms" for key in ("one_by_one", "as_one"))
                ratio = row["as_one"] / row["one_by_one"]
                stitched = "yes" if row["stitched"] else "no"
                lines.append(f"| {row['network']} | {batch} | {row['towers']} | {stitched} | {times} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(given.device, given.precision, given.steps)
    if given.out:
        kept = json.loads(given.out.read_text()) if given.out.exists() else []
        new = {(row["device"], row["precision"]) for row in rows}
        kept = [row for row in kept if (row["device"], row["precision"]) not in new]
        given.out.write_text(json.dumps(kept + rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
