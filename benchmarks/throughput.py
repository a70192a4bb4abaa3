"""How fast is a step? This framework against a plain PyTorch loop, LibMTL, no exchange, and what the machine could do.

    python -m benchmarks.throughput --quick                        # two cells of the table, under five minutes
    python -m benchmarks.throughput --libmtl PATH --out benchmarks/results/throughput.json
    python -m benchmarks.throughput --profile [--workload NAME]    # where a step's time goes

Arms take turns of a second or so, round after round, each in a process of its own; a turn begins with steps that are not timed.
Ratios are taken within a round, so that a drift of the machine meets both, and their median over rounds is reported. Compiling
and other warm-up come before the first turn. With --out, results are on disk after every cell of the table, and other cells in
that file are kept. OMP_NUM_THREADS, where it is set, is heeded by all arms.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import SETTLE, Ours, serve
from benchmarks.throughput_tables import COUNTS, tables
from benchmarks.workloads import WORKLOADS, on_gpu
from mtl.hardware import usable_cores

MODES = ("train", "infer")
TURN = 0.6
"""Seconds that a turn should last."""
LEAST, CELL, LONGEST = 3, 60.0, 400.0
"""Rounds of a cell that takes long; seconds for which more rounds follow; and seconds from which a cell is left out, unless
`--longest` says otherwise."""
QUICK = (("small_cnn 28x28 b128", 2), ("resnet18 64x64 b32", 2))

Arms = dict[str, tuple[str, dict[str, Any]]]
"""Name -> kind (see `benchmarks.arms`) and its arguments."""


def arms_of(tasks: int, libmtl: str | None, workers: int) -> Arms:
    """What is compared at T tasks. In fp32 too where peers have the same precision to compare with."""
    arms: Arms = {"stitched": ("ours", {}), "unshared": ("ours", {"sharing": "unshared"})}
    if tasks == 2:
        arms["stitched fp32"] = ("ours", {"precision": "fp32"})
        arms["unshared fp32"] = ("ours", {"sharing": "unshared", "precision": "fp32"})
    if tasks > 1:
        arms["single"] = ("ours", {"sharing": "unshared", "tasks": 1})
    arms["plain"] = ("plain", {"workers": workers})
    if libmtl and tasks > 1:
        arms["libmtl"] = ("libmtl", {"workers": workers, "checkout": libmtl})
    return arms


DIED = "its process died; too little memory, perhaps"


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
        try:
            self.pipe.send(words)
        except BrokenPipeError:
            raise RuntimeError(DIED) from None
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
        raise RuntimeError(DIED) from None
    if kind == "error":
        raise RuntimeError(value)
    return value


def measure(workload: str, tasks: int, arms: Arms, rounds: int, lasting: float, say: Callable[[str], None]) -> dict[str, Any]:
    """One cell of the table: every arm's seconds per step in every round, its peak of memory, and the machine's rates.

    At most so many rounds, fewer where they take longer than `lasting` seconds.

    Raises:
        RuntimeError: the framework's own arms failed, with their message.
    """
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
                if name in ("stitched", "unshared"):
                    raise RuntimeError(f"{name} failed: {error}") from None
                failed[name] = str(error)
                say(f"  {name} failed: {error}")
                seats.pop(name).close()
        running = [name for name in arms if name in seats]
        taking = {(n, m): min(seats[n].ask(m, 1) for _ in range(2)) for n in running for m in MODES}
        steps = {turn: max(1, min(24, round(TURN / seconds))) for turn, seconds in taking.items()}
        seconds = sum((steps[turn] + min(SETTLE, steps[turn])) * taking[turn] for turn in taking)
        taken: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in MODES} for name in running}
        rates = []
        count = max(LEAST, min(rounds, int(lasting / seconds)))
        say(f"  {', '.join(running)}: {count} rounds of about {seconds:.0f} s")
        for i in range(count):
            rates.append(machine.ask("measure"))
            for name in running[i % len(running) :] + running[: i % len(running)]:
                for mode in MODES:
                    taken[name][mode].append(seats[name].ask(mode, steps[name, mode]))
        found = {name: {"memory": seats[name].ask("memory"), **taken[name], **seats[name].ask("describe")} for name in running}
    finally:
        for seat in seats.values():
            seat.close()
    return {
        "workload": workload,
        "tasks": tasks,
        "environment": environment,
        "seconds_per_round": round(seconds, 2),
        "machine": rates,
        "arms": found,
        "failed": failed,
    }


def against(cells: list[dict[str, Any]], workload: str, tasks: int, arms: Arms, longest: float) -> str | None:
    """What speaks against measuring a cell, going by the one before it of this workload: memory, or time."""
    before = [cell for cell in cells if cell["workload"] == workload and cell["tasks"] < tasks]
    if not before:
        return None
    last = max(before, key=lambda cell: int(cell["tasks"]))
    more = tasks / last["tasks"]
    known = {name: of["memory"] for name, of in last["arms"].items()}
    memory = more * sum(known.get(name, max(known.values())) for name in arms if name != "single")
    if memory > 0.8 * available():
        return f"its arms would take about {memory / 2**30:.0f} GiB side by side, of {available() / 2**30:.0f} GiB"
    seconds = more * LEAST * last["seconds_per_round"]
    return f"{LEAST} rounds would take about {seconds / 60:.0f} minutes" if seconds > longest else None


def available() -> int:
    """Bytes that arms can still take: of the GPU where they run there; all there is, where the system does not tell."""
    if on_gpu():
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu()]) as recorded:
        arm.train(steps)
    spent: dict[str, float] = {}
    for event in recorded.key_averages():
        kind = next((k for k, parts in KINDS if any(part in event.key for part in parts)), "the rest")
        microseconds = event.self_device_time_total if on_gpu() else event.self_cpu_time_total
        spent[kind] = spent.get(kind, 0.0) + microseconds / 1000 / steps
    total = sum(spent.values())
    lines = [f"{workload}, T = {tasks}, {arm.precision}: {total:.1f} ms per step"]
    lines += [f"  {kind:20} {ms:8.1f} ms {100 * ms / total:5.1f} %" for kind, ms in sorted(spent.items(), key=lambda x: -x[1])]
    return "\n".join(lines)


def run_all(plan: list[tuple[str, int]], given: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the cells of a plan; what is done is written as soon as it is, and other cells in that file are kept."""
    result: dict[str, list[dict[str, Any]]] = {"cells": [], "left_out": []}
    if given.out and given.out.exists():
        result = {
            key: [cell for cell in cells if (cell["workload"], cell["tasks"]) not in plan]
            for key, cells in json.loads(given.out.read_text()).items()
        }
    for workload, tasks in plan:
        started = time.monotonic()
        arms = {k: v for k, v in arms_of(tasks, given.libmtl, given.workers).items() if k in (given.arms or [k])}
        why = against(result["cells"], workload, tasks, arms, given.longest)
        if why is not None:
            arms = {name: arm for name, arm in arms.items() if not name.endswith("fp32")}
            why = against(result["cells"], workload, tasks, arms, given.longest)
        if why is None:
            say(f"{workload}, T = {tasks}: starting, and compiling ...")
            try:
                cell = measure(workload, tasks, arms, given.rounds, given.seconds, say)
            except RuntimeError as error:
                why = str(error)
        if why is not None:
            result["left_out"].append({"workload": workload, "tasks": tasks, "why": why})
            say(f"{workload}, T = {tasks}: left out: {why}")
            write(result, given.out)
            continue
        result["cells"].append(cell)
        say(f"{workload}, T = {tasks}: {time.monotonic() - started:.0f} s")
        for name, arm in cell["arms"].items():
            milliseconds = [1000 * statistics.median(arm[mode]) for mode in ("train", "infer")]
            say(f"  {name:14} {milliseconds[0]:9.1f} ms train {milliseconds[1]:9.1f} ms infer {arm['memory'] / 2**20:8.0f} MiB")
        write(result, given.out)
    return result


def write(result: dict[str, list[dict[str, Any]]], out: Path | None) -> None:
    """What there is so far, in the order of the tables, where it is to be kept."""
    for cells in result.values():
        cells.sort(key=lambda cell: (list(WORKLOADS).index(cell["workload"]), cell["tasks"]))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def counts(text: str) -> list[int]:
    """Numbers of tasks, separated by commas."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers from 1 on, as 1,2,4 is")
    return [int(part) for part in text.split(",")]


def named_arms(text: str) -> list[str]:
    """Arms, separated by commas, and those that no table is without."""
    names = [*arms_of(2, None, 0), "libmtl"]
    if wrong := [name for name in text.split(",") if name not in names]:
        raise argparse.ArgumentTypeError(f"unknown arm {wrong[0]!r}; known: {', '.join(names)}")
    return ["stitched", "unshared", *text.split(",")]


def arguments() -> argparse.Namespace:
    """What the command line says; ends with a message where it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cells, three rounds")
    parser.add_argument("--workload", action="append", choices=sorted(WORKLOADS), help="may be given again (default: all)")
    parser.add_argument("--tasks", type=counts, metavar="T,T,...", help="(default: 1,2,4,8,16; with --profile: 2)")
    parser.add_argument("--rounds", type=int, help=f"at most, {LEAST} where they take long (default: 7; quick: {LEAST})")
    parser.add_argument(
        "--seconds",
        type=float,
        default=CELL,
        metavar="S",
        help="after which no round begins beyond the third (default: %(default)s)",
    )
    parser.add_argument("--longest", type=float, default=LONGEST, metavar="S", help="seconds of a cell (default: %(default)s)")
    parser.add_argument("--arms", type=named_arms, metavar="ARM,...", help="stitched, unshared and these only")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="of the peers' DataLoader (default: %(default)s)")
    parser.add_argument("--libmtl", metavar="PATH", help="a checkout of LibMTL, to measure it too")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write results there, and keep its other cells")
    parser.add_argument("--profile", action="store_true", help="show where a training step's time goes, and nothing else")
    given = parser.parse_args()
    if given.quick and (given.workload or given.tasks):
        parser.error("--quick has cells of its own; leave out --workload and --tasks, or --quick")
    if given.libmtl and not (Path(given.libmtl) / "LibMTL").is_dir():
        parser.error(f"no LibMTL checkout at {given.libmtl}: it has no folder LibMTL")
    if given.out and not given.out.parent.is_dir():
        parser.error(f"there is no folder {given.out.parent} to write to")
    if given.rounds is not None and given.rounds < LEAST:
        parser.error(f"at least {LEAST} rounds make a median with a spread; found --rounds {given.rounds}")
    given.rounds = given.rounds or (LEAST if given.quick else 7)
    return given


def main() -> None:
    """Measure, or profile, and print."""
    given = arguments()
    if given.profile:
        for workload in given.workload or [name for name, _ in QUICK]:
            for tasks in given.tasks or [2]:
                print(profile(workload, tasks), flush=True)
        return
    plan = list(QUICK) if given.quick else [(w, t) for w in given.workload or WORKLOADS for t in given.tasks or COUNTS]
    try:
        result = run_all(plan, given, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        sys.exit("interrupted" + (f"; cells that were done are in {given.out}" if given.out else ""))
    if result["cells"]:
        print("\n" + tables(result["cells"]))


if __name__ == "__main__":
    main()
