"""Do two processes train what one trains, how fast, and what do checkpoints cost?

    python -m benchmarks.processes [--rounds N] [--steps N] [--epochs N] [--only PART] [--out FILE.json]

Each is the real command on `examples/configs/fashion_two_task.yaml` in processes of their own. Agreement: two epochs of a
network without batch norm and dropout, and of the config's own, trained by one process and by two; the largest difference of a
loss, relative, and of a metric. Throughput: rounds of one process with one thread, with as many as there are cores, and as many
processes with one thread each, interleaved. Safety: some epochs of the config as it is, and how long of them went into saving,
and into looking whether a step is finite.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import mtl
from benchmarks.machine import environment
from mtl.guard import Guard
from mtl.hardware import usable_cores
from mtl.keeping import NEW, Keeper

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CONFIG = HERE.parent / "examples" / "configs" / "fashion_two_task.yaml"
PLAIN = ("backbone=benchmark_plain", "sharing.points=[pool]")
PARTS = ("agreement", "throughput", "safety")
FEW = ("epoch_steps=40", "epochs=2", "data.fraction=0.1", "precision=fp32", "device=cpu", "compile=none")


@mtl.register_backbone("benchmark_plain")
def plain(input_shape: tuple[int, ...]) -> nn.Module:
    """No batch norm and no dropout: nothing that depends on how a batch is shared out."""
    layers = {
        "conv": nn.Conv2d(input_shape[0], 16, 3, stride=2),
        "act": nn.ReLU(),
        "pool": nn.MaxPool2d(2),
        "flat": nn.Flatten(),
        "fc": nn.Linear(16 * 6 * 6, 64),
        "out": nn.ReLU(),
    }
    network = nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    return network


def train(folder: Path, processes: int, threads: int, *overrides: str) -> dict[str, Any]:
    """What a run came to, and the rows of its log."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    plugin = ["--plugin", str(HERE / "processes.py")] * any("benchmark_plain" in one for one in overrides)
    command = [sys.executable, *launch, "-m", "mtl", "train", str(CONFIG), *overrides, *plugin]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    done = subprocess.run(
        [*command, "--run-dir", str(folder), "--json"], env=variables, check=True, stdout=subprocess.PIPE, text=True
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {**json.loads(done.stdout), "rows": rows}


def agreement(folder: Path, *overrides: str) -> dict[str, float]:
    """How far the figures of two processes are from those of one."""
    one, two = (train(folder / str(n), n, 1, *FEW, *overrides) for n in (1, 2))
    pairs = [(a, b) for a, b in zip(one["rows"], two["rows"], strict=True)]
    losses = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in pairs]
    metrics = [abs(a[key] - b[key]) for a, b in pairs for key in a if key not in ("epoch", "step", "split", "task", "loss")]
    metrics += [
        abs(one["test"][task][key] - two["test"][task][key])
        for task in one["test"]
        if task != "score"
        for key in one["test"][task]
        if key != "loss"
    ]
    return {"loss": max(losses), "metric": max(metrics), "steps": one["steps"]}


def throughput(folder: Path, rounds: int, steps: int) -> dict[str, list[float]]:
    """Images a second of training, by arm, round for round."""
    cores = usable_cores()
    arms = {
        "one process, 1 thread": (1, 1),
        f"one process, {cores} threads": (1, cores),
        f"{cores} processes, 1 thread each": (cores, 1),
    }
    found: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds):
        for name, (processes, threads) in arms.items():
            run = train(folder / f"{i}-{processes}-{threads}", processes, threads, "epochs=1", f"epoch_steps={steps}")
            found[name].append(run["images_per_second"])
            print(name, found[name][-1], flush=True)
    return found


def safety(folder: Path, epochs: int) -> dict[str, Any]:
    """How long saving took of a run with checkpoints as they are by default."""
    spent: list[float] = []
    guarding = 0.0
    save = Keeper.save

    def timed(keeper: Keeper, kind: str = NEW) -> None:
        started = time.perf_counter()
        before = keeper._saved
        save(keeper, kind)
        if keeper._saved != before:
            spent.append(time.perf_counter() - started)

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal guarding
            started = time.perf_counter()
            found = method(*args)
            guarding += time.perf_counter() - started
            return found

        return call

    begin, not_finite = Guard.begin, Guard._not_finite
    Guard.begin, Guard._not_finite = watched(begin), watched(not_finite)  # type: ignore[method-assign]
    Keeper.save = timed  # type: ignore[assignment, method-assign]
    started = time.perf_counter()
    result = mtl.train(mtl.load_config(CONFIG, [f"epochs={epochs}"]), folder)
    seconds = time.perf_counter() - started
    Keeper.save = save  # type: ignore[method-assign]
    Guard.begin, Guard._not_finite = begin, not_finite  # type: ignore[method-assign]
    size = max(sum(file.stat().st_size for file in one.iterdir()) for one in (folder / "checkpoints").glob("checkpoint-*"))
    times = {"saves": spent, "guarding": guarding, "training": result.training_seconds, "seconds": seconds}
    return {**times, "steps": result.steps, "bytes": size}


def measure(rounds: int, steps: int, epochs: int, only: str | None, before: dict[str, Any]) -> dict[str, Any]:
    """All of it, or one part: the others as they were before.

    Raises:
        ValueError: they were measured somewhere else.
    """
    here = environment()
    if only and before["environment"] != here:
        raise ValueError(f"the rest is of another machine, {before['environment']}, and this is {here}: measure all of it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "agreement": lambda: {"plain": agreement(folder / "plain", *PLAIN), "own": agreement(folder / "own")},
            "throughput": lambda: throughput(folder, rounds, steps),
            "safety": lambda: safety(folder / "safety", epochs),
        }
        assert set(parts) == set(PARTS)
        return {"environment": here, **{key: part() if only in (None, key) else before[key] for key, part in parts.items()}}


def render() -> str:
    """The tables of the record."""
    found = json.loads((RESULTS / "processes.json").read_text())
    agree, rates, safe = found["agreement"], found["throughput"], found["safety"]
    one = statistics.median(next(iter(rates.values())))
    lines = [
        "| trained by two processes, against one | largest relative difference of a loss | of a metric |",
        "|---|---:|---:|",
    ]
    names = {"plain": "without batch norm and dropout", "own": "`small_cnn`, with both"}
    lines += [f"| {names[key]}, {of['steps']} steps | {of['loss']:.1g} | {of['metric']:.2g} |" for key, of in agree.items()]
    lines += ["", "| | images/s, median (range) | ratio |", "|---|---:|---:|"]
    for name, values in rates.items():
        middle = statistics.median(values)
        lines.append(f"| {name} | {middle:,.0f} ({min(values):,.0f} to {max(values):,.0f}) | {middle / one:.2f} |")
    n, where = len(next(iter(rates.values()))), found["environment"]
    spent, inner = sum(safe["saves"]), sum(safe["saves"][1:-1])
    guarding = 100 * safe["guarding"] / safe["training"]
    lines += [
        "",
        f"n = {n} rounds, interleaved; {where['cores']} cores of {where['device']}, torch {where['torch']}.",
        "",
        f"Saving took {spent:.2f} of {safe['seconds']:.0f} seconds ({100 * spent / safe['seconds']:.2f} %): "
        f"{len(safe['saves'])} checkpoints of {safe['bytes'] / 1e6:.0f} MB; the first and last are written in every run, and "
        f"those between them took {100 * inner / safe['seconds']:.2f} %. Looking whether losses and gradients are finite, and "
        f"keeping what a forward pass changes, took {guarding:.2f} % of {safe['steps']:,} steps.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of throughput (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of a run that is timed (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="of the run whose saves are timed (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, help="measure this again, and keep the rest of the record")
    parser.add_argument("--out", type=Path, default=RESULTS / "processes.json", help="(default: %(default)s)")
    args = parser.parse_args()
    before = json.loads(args.out.read_text()) if args.only else {}
    found = measure(args.rounds, args.steps, args.epochs, args.only, before)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
