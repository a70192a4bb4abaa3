"""Are towers that run as one network still the towers? Every torchvision backbone, two towers at once against one by one.

    python -m benchmarks.batching [NAME ...] [--out FILE.json]

Asks first whether a network can be run so, as a run does, or why not; then compares outputs, every gradient and every buffer in
training and in evaluation mode, in float64, dropout and stochastic depth off. Prints one row a network and, at the end, one a
family. What is in FILE.json already is kept, and not computed again. Networks that would need more memory than there is are
left out, and said to be.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.cutting import networks
from benchmarks.throughput import available
from mtl.backbones import Backbone
from mtl.batchable import Gap, calm, gaps, reason_against
from mtl.execution import Segment
from mtl.registry import BACKBONES
from mtl.stages import cut
from mtl.torchvision_backbones import FAMILIES, family_of

RESULTS = Path(__file__).parent / "results"
WHAT = ("outputs", "gradients", "buffers")
BYTES = 54
"""That a parameter of a network takes at the peak, all told: two towers in float64, their gradients, what runs them as one."""


def compare(name: str, side: int = 64, batch: int = 4) -> dict[str, Any]:
    """The reason against two towers as one, or the largest absolute differences and values, on `batch` random images."""
    torch.manual_seed(0)
    made: list[Backbone] = [BACKBONES.get(name).create((3, side, side)) for _ in range(2)]
    towers = [one.network.to(memory_format=torch.channels_last) for one in made]
    segments = [Segment((stage,)) for stage in cut(towers[0], made[0].points)]
    x = made[0].prepare(torch.randn(batch, 3, side, side)).contiguous(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in towers[0].parameters())
    row = {
        "network": name,
        "family": next(pattern for pattern, family in FAMILIES.items() if family is family_of(name)),
        "input": list(x.shape),
        "parameters": parameters,
        "reason": None,
    }
    if BYTES * parameters > available():
        return row | {"left_out": f"not tried, for it takes about {BYTES * parameters / 2**30:.0f} GiB of memory"}
    row["reason"] = reason_against(towers, segments, [x, x])
    if row["reason"] is not None:
        return row
    for tower in towers:
        tower.double()
    calm(towers)
    worst = dict.fromkeys(WHAT, Gap())
    for training in (True, False):
        for tower in towers:
            tower.train(training)
        for what, found in gaps(towers, segments, [x.double()] * 2).items():
            worst[what] = max(worst[what], found)
    return row | {what: list(found) for what, found in worst.items()}


def render() -> str:
    """The table of the recorded results."""
    recorded = json.loads((RESULTS / "batching.json").read_text())
    rows = recorded["rows"]
    batched = [row for row in rows if row["reason"] is None and "left_out" not in row]
    return (
        table(rows)
        + f"\n\nn = {len(rows)} networks, {len(batched)} of them run as one; two towers each, and the worst network of a line. "
        f"torch {recorded['torch']}, CPU, 1 thread. Not recorded, for want of memory: "
        f"{', '.join(sorted(set(networks()) - {row['network'] for row in rows})) or 'none'}.\n"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """One line a family, and one more for each reason in it: the largest difference, of the largest number of its kind."""
    lines = ["| networks | n | as one | outputs | gradients | buffers |", "|---|---:|---|---:|---:|---:|"]
    for family, why_not in dict.fromkeys((row["family"], _why_not(row)) for row in rows):
        of = [row for row in rows if (row["family"], _why_not(row)) == (family, why_not)]
        names = f"| {', '.join(row['network'] for row in of)} | {len(of)} |"
        if why_not is not None:
            lines.append(f"{names} {why_not} | | | |")
            continue
        worst = (max((row[what] for row in of), key=lambda gap: Gap(*gap).relative) for what in WHAT)
        cells = " | ".join("0" if not difference else f"{difference:.0e} of {size:.1g}" for difference, size in worst)
        lines.append(f"{names} yes | {cells} |")
    return "\n".join(lines)


def _why_not(row: dict[str, Any]) -> str | None:
    return row.get("left_out") or (f"no: {row['reason']}" if row["reason"] is not None else None)


def main() -> None:
    """Compare, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(given.out.read_text())["rows"] if given.out and given.out.exists() else []
    for name in given.names or networks():
        if name in [row["network"] for row in rows]:
            continue
        row = compare(name)
        print(f"{name}: {row['input']}", _why_not(row) or {what: row[what] for what in WHAT}, flush=True)
        rows.append(row)
        rows.sort(key=lambda row: (list(FAMILIES).index(row["family"]), row["parameters"]))
        if given.out:
            given.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
        gc.collect()
    print(table(rows))


if __name__ == "__main__":
    main()
