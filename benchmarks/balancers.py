"""What a balancer costs: the time of a training step, interleaved, against fixed weights.

    python -m benchmarks.balancers [NAME ...] [--steps N]

Two tasks on drawn shapes, `small_cnn`, batch 128, fp32; every round takes one step with each balancer in turn, so that a drift
of the machine meets all alike. Medians and quartiles over rounds, after warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mtl.build import run
from mtl.config import RunConfig
from mtl.hardware import device_name
from mtl.run import Run
from mtl.step import train_step

WARM_UP = 3


def ready(folder: Path, balancer: str, sharing: str) -> Run:
    """A run with this balancer, about to begin."""
    data = {"validation": 100, "datasets": {"shapes": {"train": 600, "test": 10}}}
    config = RunConfig(tasks=["shapes_kind", "shapes_colour"], balancer=balancer, sharing=sharing, data=data, precision="fp32")
    return run(config, folder / f"{sharing}-{balancer}")


def measure(balancers: list[str], sharing: str, steps: int) -> dict[str, list[float]]:
    """Balancer -> milliseconds of each measured step."""
    taken: dict[str, list[float]] = {name: [] for name in balancers}
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: ready(Path(folder), name, sharing) for name in balancers}
        batches = {name: next(one.feed.epoch(1)) for name, one in runs.items()}
        for i in range(WARM_UP + steps):
            for name, one in runs.items():
                started = time.perf_counter()
                train_step(one, batches[name]).tolist()  # waits for the device
                if i >= WARM_UP:
                    taken[name].append(1000 * (time.perf_counter() - started))
        for one in runs.values():
            one.tracker.close()
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", default=["fixed", "upgrad", "pcgrad", "famo", "uw"])
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, n = {given.steps} steps each")
    for sharing in ("hard_shared", "cross_stitch"):
        taken = measure(given.names, sharing, given.steps)
        base = statistics.median(taken[given.names[0]])
        for name, times in taken.items():
            low, median, high = statistics.quantiles(times, n=4)
            print(f"{sharing:13} {name:10} {median:7.1f} ms ({low:.1f} to {high:.1f})  x {median / base:.2f}")


if __name__ == "__main__":
    main()
