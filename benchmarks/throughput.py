"""How fast is a step? This framework against a plain PyTorch loop, LibMTL, no exchange, and what the machine could do.

    python -m benchmarks.throughput --quick                        # two workloads, under five minutes
    python -m benchmarks.throughput --libmtl PATH --out benchmarks/results/throughput.json
    python -m benchmarks.throughput --profile [--workload NAME]    # where a step's time goes

Arms take turns of a second or so, round after round, each in a process of its own; a turn begins with steps that are not timed.
Ratios are taken within a round, so that a drift of the machine meets both, and their median over rounds is reported. Compiling
and other warm-up come before the first turn. Results are on disk after every cell of the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.arms import WORKLOADS, Ours, serve

RESULTS = Path(__file__).parent / "results" / "throughput.json"
TURN = 1.0
"""Seconds that a turn should last."""
QUICK = (("small_cnn 28x28 b128", 2), ("small_cnn 28x28 b128", 8), ("resnet18 64x64 b32", 2))
COUNTS = (1, 2, 4, 8, 16)

Arms = dict[str, tuple[str, dict[str, Any]]]
"""Name -> kind (see `benchmarks.arms`) and its arguments."""


def arms_of(tasks: int, libmtl: str | None, workers: int) -> Arms:
    """What is compared at T tasks. In fp32 too where peers have the same precision to compare with."""
    arms: Arms = {"stitched": ("ours", {}), "unshared": ("ours", {"sharing": "unshared"})}
    if tasks == 2:
        arms["stitched fp32"] = ("ours", {"precision": "fp32"})
        arms["unshared fp32"] = ("ours", {"sharing": "unshared", "precision": "fp32"})
    arms["plain"] = ("plain", {"workers": workers})
    if libmtl and tasks > 1:
        arms["libmtl"] = ("libmtl", {"workers": workers, "checkout": libmtl})
    return arms


class Seat:
    """An arm's process, and the pipe to it."""

    def __init__(self, kind: str, workload: str, tasks: int, keys: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve, args=(end, kind, workload, tasks, keys))
        self.process.start()
        end.close()
        self.ready = False

    def ask(self, *words: Any) -> Any:
        """The answer to a request.

        Raises:
            RuntimeError: the arm failed, with its message, or its process is gone.
        """
        if not self.ready:
            _answer(self.pipe)
            self.ready = True
        self.pipe.send(words)
        return _answer(self.pipe)

    def close(self) -> None:
        """End the process."""
        self.pipe.close()  # it notices
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()


def _answer(pipe: Connection) -> Any:
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise RuntimeError("its process died; too little memory, perhaps") from None
    if kind == "error":
        raise RuntimeError(value)
    return value


def measure(workload: str, tasks: int, arms: Arms, rounds: int, modes: tuple[str, ...]) -> dict[str, Any]:
    """One cell of the table: every arm's seconds per step in every round, its peak of memory, and the machine's rates."""
    seats: dict[str, Seat] = {}
    failed: dict[str, str] = {}
    try:
        machine = Seat("machine", workload, tasks, {})
        seats["machine"] = machine
        for name, (kind, keys) in arms.items():
            seats[name] = Seat(kind, workload, tasks, keys)
        environment = machine.ask("environment")
        for name in arms:
            try:
                seats[name].ask("train", 1)
            except RuntimeError as error:
                failed[name] = str(error)
                seats.pop(name).close()
        running = [name for name in arms if name in seats]
        steps = {(n, m): _steps(min(seats[n].ask(m, 1) for _ in range(2))) for n in running for m in modes}
        taken: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in modes} for name in running}
        rates = []
        for i in range(rounds):
            rates.append(machine.ask("measure"))
            for name in running[i % len(running) :] + running[: i % len(running)]:
                for mode in modes:
                    taken[name][mode].append(seats[name].ask(mode, steps[name, mode]))
        found = {name: {**seats[name].ask("describe"), **taken[name], "memory": seats[name].ask("memory")} for name in running}
    finally:
        for seat in seats.values():
            seat.close()
    return {"workload": workload, "tasks": tasks, "environment": environment, "machine": rates, "arms": found, "failed": failed}


def _steps(seconds: float) -> int:
    return max(1, min(24, round(TURN / seconds)))


def need(cells: list[dict[str, Any]], workload: str, tasks: int) -> float:
    """Bytes that all arms together will about take, from the largest cell of this workload so far; 0 if there is none."""
    before = [cell for cell in cells if cell["workload"] == workload and cell["tasks"] < tasks]
    if not before:
        return 0.0
    last = max(before, key=lambda cell: int(cell["tasks"]))
    return float(sum(arm["memory"] for arm in last["arms"].values()) * tasks / last["tasks"])


def available() -> int:
    """Bytes of memory that processes can still take."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def ratio(above: list[float], below: list[float]) -> float:
    """The median over rounds of a ratio taken within each."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def limit(cell: dict[str, Any], arm: str) -> float:
    """Seconds of an arm's training step at the machine's measured rates: the larger of arithmetic and memory traffic."""
    of = cell["arms"][arm]
    rate = statistics.median(m[of["precision"]] for m in cell["machine"])
    copy = statistics.median(m["copy"] for m in cell["machine"])
    return float(max(of["flops_per_step"] / rate, of["bytes_per_step"] / copy))


def row(cell: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, str]:
    """A line of the table: the stitched arm's training step, and how it compares."""
    arms, ours = cell["arms"], cell["arms"]["stitched"]
    low, median, high = statistics.quantiles(ours["train"], n=4)
    one = next((c for c in cells if c["workload"] == cell["workload"] and c["tasks"] == 1), None)

    def times(name: str, mine: str = "stitched", mode: str = "train") -> str:
        return f"{ratio(arms[name][mode], arms[mine][mode]):.2f}" if name in arms and mine in arms else ""

    per_task = median / cell["tasks"] / statistics.median(one["arms"]["unshared"]["train"]) if one else None
    return {
        "workload": cell["workload"],
        "T": str(cell["tasks"]),
        "ms per step (quartiles)": f"{1000 * median:.1f} ({1000 * low:.1f} to {1000 * high:.1f})",
        "images/s": f"{WORKLOADS[cell['workload']].batch / median:,.0f}",
        "x plain": times("plain"),
        "x LibMTL": times("libmtl"),
        "fp32 x plain": times("plain", "stitched fp32"),
        "fp32 x LibMTL": times("libmtl", "stitched fp32"),
        "of unshared": f"{ratio(ours['train'], arms['unshared']['train']):.2f}",
        "per task of T = 1": "" if per_task is None else f"{per_task:.2f}",
        "of limit": f"{100 * limit(cell, 'stitched') / median:.0f} %",
        "memory MiB": f"{ours['memory'] / 2**20:,.0f}",
        "of unshared's": f"{ours['memory'] / arms['unshared']['memory']:.2f}",
        "inference images/s": f"{WORKLOADS[cell['workload']].batch / statistics.median(ours['infer']):,.0f}",
        "inference x plain": times("plain", mode="infer"),
        "inference x LibMTL": times("libmtl", mode="infer"),
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [row(cell, cells) for cell in cells]
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join(lines + ["| " + " | ".join(one.values()) + " |" for one in rows])


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
        f"{table(cells)}\n\nn = {' or '.join(map(str, turns))} rounds a cell. {env['device']}, {env['cores']} cores, "
        f"{env['threads']} threads, torch {env['torch']}, Python {env['python']}; `auto` became {ours['precision']}. Measured "
        f"beside the arms: {rates['fp32']:.0f} GFLOP/s fp32, {rates['bf16']:.0f} bf16, copying {rates['copy']:.1f} GB/s.\n"
        + (f"\nLeft out:\n{left_out}\n" if left_out else "")
    )


KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("convolution", ("convolution",)),
    ("matrix product", ("mm", "addmm", "bmm", "matmul", "linear")),
    ("batch norm", ("batch_norm",)),
    ("pooling", ("max_pool", "avg_pool", "adaptive")),
    ("optimizer", ("fused_adam", "fused_sgd")),
    ("exchange, compiled", ("Compiled", "graph_", "cpp_fused")),
    ("activation", ("threshold", "relu", "clamp_min")),
    ("cast and copy", ("copy_", "_to_copy", "contiguous", "clone")),
    ("fill", ("fill_", "zero_")),
    ("add and multiply", ("mul", "add", "sum", "sub", "div", "addcmul")),
)


def profile(workload: str, tasks: int, steps: int = 5) -> str:
    """Where the time of a training step goes, by kind of operation, one thread of control, profiler's cost included."""
    from torch.profiler import ProfilerActivity, profile

    arm = Ours(WORKLOADS[workload], tasks)
    arm.train(3)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        arm.train(steps)
    spent: dict[str, float] = {}
    for event in recorded.key_averages():
        kind = next((k for k, parts in KINDS if any(part in event.key for part in parts)), "the rest")
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total / 1000 / steps
    total = sum(spent.values())
    lines = [f"{workload}, T = {tasks}, {arm.precision}: {total:.1f} ms per step"]
    lines += [f"  {kind:20} {ms:8.1f} ms {100 * ms / total:5.1f} %" for kind, ms in sorted(spent.items(), key=lambda x: -x[1])]
    return "\n".join(lines)


def run_all(plan: list[tuple[str, int]], given: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the cells of a plan; what is done is written as soon as it is."""
    result: dict[str, Any] = {"cells": [], "left_out": []}
    for workload, tasks in plan:
        wanted = need(result["cells"], workload, tasks)
        if wanted > 0.8 * available():
            why = f"its arms would take about {wanted / 2**30:.0f} GiB side by side, of {available() / 2**30:.0f} GiB"
            result["left_out"].append({"workload": workload, "tasks": tasks, "why": why})
            say(f"{workload}, T = {tasks}: left out: {why}")
            continue
        started = time.monotonic()
        arms = {k: v for k, v in arms_of(tasks, given.libmtl, given.workers).items() if k in (given.arms or [k])}
        cell = measure(workload, tasks, arms, given.rounds, ("train", "infer"))
        result["cells"].append(cell)
        for name, why in cell["failed"].items():
            say(f"{workload}, T = {tasks}: {name} failed: {why}")
        say(f"{workload}, T = {tasks}: {time.monotonic() - started:.0f} s")
        for name, arm in cell["arms"].items():
            milliseconds = [1000 * statistics.median(arm[mode]) for mode in ("train", "infer")]
            say(f"  {name:14} {milliseconds[0]:9.1f} ms train {milliseconds[1]:9.1f} ms infer {arm['memory'] / 2**20:8.0f} MiB")
        if given.out:
            given.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    """Measure, or profile, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cells, three rounds")
    parser.add_argument("--workload", action="append", choices=sorted(WORKLOADS), help="(default: all)")
    parser.add_argument("--tasks", type=lambda text: [int(t) for t in text.split(",")], default=list(COUNTS), metavar="T,T,...")
    parser.add_argument("--rounds", type=int, help="(default: 7, quick: 3)")
    parser.add_argument("--arms", type=lambda text: ["stitched", "unshared", *text.split(",")], help="fewer of them")
    parser.add_argument("--workers", type=int, default=2, help="of the peers' DataLoader (default: %(default)s)")
    parser.add_argument("--libmtl", metavar="PATH", help="a checkout of LibMTL, to measure it too")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--profile", action="store_true", help="show where a training step's time goes, and nothing else")
    given = parser.parse_args()
    if given.profile:
        for workload in given.workload or [QUICK[0][0], QUICK[2][0]]:
            print(profile(workload, 2), flush=True)
        return
    if given.libmtl and not (Path(given.libmtl) / "LibMTL").is_dir():
        sys.exit(f"no LibMTL checkout at {given.libmtl}: it has no folder LibMTL")
    given.rounds = given.rounds or (3 if given.quick else 7)
    plan = list(QUICK) if given.quick else [(w, t) for w in given.workload or WORKLOADS for t in given.tasks]
    result = run_all(plan, given, lambda line: print(line, flush=True))
    print()
    print(table(result["cells"]))


if __name__ == "__main__":
    main()
