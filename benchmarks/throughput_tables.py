"""What the recorded results of `benchmarks.throughput` say: two tables, a sentence for README.md, and a picture."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results" / "throughput.json"
COUNTS = (1, 2, 4, 8, 16)
"""Numbers of tasks in the whole table."""


def ratio(above: list[float], below: list[float]) -> float:
    """The median over rounds of a ratio taken within each."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def limit(cell: dict[str, Any], arm: str) -> float:
    """Seconds of an arm's training step at the machine's measured rates: the larger of arithmetic and memory traffic."""
    of = cell["arms"][arm]
    rate = statistics.median(m[of["precision"]] for m in cell["machine"])
    copy = statistics.median(m["copy"] for m in cell["machine"])
    return float(max(of["flops_per_step"] / rate, of["bytes_per_step"] / copy))


def row(cell: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """A line of each table: the stitched arm's training step and how it compares; its memory and inference."""
    arms, ours = cell["arms"], cell["arms"]["stitched"]
    low, median, high = statistics.quantiles(ours["train"], n=4)

    def times(name: str, mine: str = "stitched", mode: str = "train") -> str:
        return f"{ratio(arms[name][mode], arms[mine][mode]):.2f}" if name in arms and mine in arms else ""

    single = arms.get("single") if cell["tasks"] > 1 else arms["unshared"]
    per_task = ratio(ours["train"], single["train"]) / cell["tasks"] if single else None
    which = {"workload": cell["workload"], "T": str(cell["tasks"])}
    training = {
        **which,
        "ms per step (quartiles)": f"{1000 * median:.1f} ({1000 * low:.1f} to {1000 * high:.1f})",
        "images/s": f"{WORKLOADS[cell['workload']].batch / median:,.0f}",
        "x plain": times("plain"),
        "x LibMTL": times("libmtl"),
        "fp32 x plain": times("plain", "stitched fp32"),
        "fp32 x LibMTL": times("libmtl", "stitched fp32"),
        "of unshared": f"{ratio(ours['train'], arms['unshared']['train']):.2f}",
        "per task of a single": "" if per_task is None else f"{per_task:.2f}",
        "of limit": f"{100 * limit(cell, 'stitched') / median:.0f} %",
    }
    rest = {
        **which,
        "memory MiB": f"{ours['memory'] / 2**20:,.0f}",
        "of unshared's": f"{ours['memory'] / arms['unshared']['memory']:.2f}",
        "inference images/s": f"{WORKLOADS[cell['workload']].batch / statistics.median(ours['infer']):,.0f}",
        "inference x plain": times("plain", mode="infer"),
        "inference x LibMTL": times("libmtl", mode="infer"),
    }
    return training, rest


def tables(cells: list[dict[str, Any]]) -> str:
    """Markdown."""
    made = []
    for rows in zip(*(row(cell) for cell in cells), strict=True):
        lines = [
            " | ".join(rows[0]),
            " | ".join(["---", *["---:"] * (len(rows[0]) - 1)]),
            *(" | ".join(one.values()) for one in rows),
        ]
        made.append("\n".join(f"| {line} |" for line in lines))
    return "\n\n".join(made)


def render() -> str:
    """The table of the recorded results, and what they belong to."""
    recorded = json.loads(RESULTS.read_text())
    cells = recorded["cells"]
    env = cells[0]["environment"]
    rates = {
        key: statistics.median(m[key] for cell in cells for m in cell["machine"]) / 1e9 for key in ("fp32", "bf16", "copy")
    }
    turns = sorted({len(cell["machine"]) for cell in cells})
    ours = cells[0]["arms"]["stitched"]
    left_out = "".join(f"\n- {one['workload']}, T = {one['tasks']}: {one['why']}" for one in recorded["left_out"])
    return (
        f"{tables(cells)}\n\nn = {' or '.join(map(str, turns))} rounds a cell. {env['device']}, {env['cores']} cores, "
        f"{env['threads']} threads, torch {env['torch']}, Python {env['python']}; `auto` became {ours['precision']}. Measured "
        f"beside the arms: {rates['fp32']:.0f} GFLOP/s fp32, {rates['bf16']:.0f} bf16, copying {rates['copy']:.1f} GB/s.\n"
        + (f"\nLeft out:\n{left_out}\n" if left_out else "")
    )


def headline() -> str:
    """What README.md says of the recorded results."""
    recorded = json.loads(RESULTS.read_text())["cells"]
    of = {(cell["workload"], cell["tasks"]): row(cell)[0] for cell in recorded}
    small, many = (of["small_cnn 28x28 b128", tasks] for tasks in (2, 16))
    large = of["resnet18 64x64 b128", 2]
    machine = f"{recorded[0]['environment']['cores']} cores of {recorded[0]['environment']['device']}"
    return (
        f"On {machine}, two stitched `small_cnn` train {small['x plain']} times as fast as a plain PyTorch loop and "
        f"{small['x LibMTL']} times as fast as LibMTL ({small['fp32 x plain']} and {small['fp32 x LibMTL']} in fp32), resnet18 "
        f"{large['x plain']} and {large['x LibMTL']} times. A step with exchange takes {small['of unshared']} times as long as "
        f"one without, and with sixteen tasks {many['per task of a single']} times as long per task as a single network."
    )


ARMS = {
    "stitched": ("this framework", "#0072b2", "o", "-"),
    "unshared": ("the same without exchange", "#56b4e9", "s", "--"),
    "plain": ("plain PyTorch loop", "#d55e00", "^", "-"),
    "libmtl": ("LibMTL", "#009e73", "D", "-"),
}
"""Arm -> its name in the picture, colour (apart for the colour-blind too), mark and line."""


def draw(path: Path) -> None:
    """A picture of the recorded results, SVG: a training step's time per task over the number of tasks, a panel a workload."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    cells = json.loads(RESULTS.read_text())["cells"]
    names = [name for name in WORKLOADS if any(cell["workload"] == name for cell in cells)]
    figure = Figure(figsize=(3.1 * len(names), 3.3), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for arm, (label, colour, mark, line) in ARMS.items():
            mine = [cell for cell in cells if cell["workload"] == name and arm in cell["arms"]]
            if mine:
                tasks = [cell["tasks"] for cell in mine]
                quartiles = [statistics.quantiles(cell["arms"][arm]["train"], n=4) for cell in mine]
                low, middle, high = 1000 * np.array(quartiles).T / tasks
                spread = (middle - low, high - middle)
                axes.errorbar(tasks, middle, spread, label=label, color=colour, marker=mark, ls=line, ms=5, lw=1.5, capsize=2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(COUNTS, [str(t) for t in COUNTS])
        axes.set_xlim(0.85, 19)
        axes.set_ylim(bottom=0)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("tasks")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("training step per task, ms")
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    with matplotlib.rc_context({"svg.hashsalt": "mtl", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None})
