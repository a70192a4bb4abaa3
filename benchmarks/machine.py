"""What a machine gives, and which one it is."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.workloads import on_gpu
from mtl.hardware import device_name, usable_cores


class Machine:
    """What the hardware gives: the rate of a large matrix product in each precision, and of copying memory."""

    def __init__(self) -> None:
        device = "cuda" if on_gpu() else "cpu"
        side = 8192 if on_gpu() else 1536
        self.factors = {
            name: [torch.randn(side, side, device=device, dtype=dtype) for _ in range(2)]
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
        self.block = torch.zeros(2**28 if on_gpu() else 2**25, device=device)
        self.target = torch.empty_like(self.block)

    def measure(self) -> dict[str, float]:
        """FLOP/s per precision, and bytes read and written per second."""
        found = {}
        for name, (a, b) in self.factors.items():
            found[name] = 2 * len(a) ** 3 / median_of(5, lambda a=a, b=b: a @ b)
        found["copy"] = 2 * self.block.numel() * 4 / median_of(5, lambda: self.target.copy_(self.block))
        return found


def median_of(n: int, call: Any) -> float:
    """The median of n timings, seconds, after one that is not counted."""
    taken = []
    for _ in range(n + 1):
        started = time.perf_counter()
        call()
        if on_gpu():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def environment() -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    import torchvision

    return {
        "device": device_name(torch.device("cuda" if on_gpu() else "cpu")),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "mtl": version("crosstitch"),
    }


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else the largest resident size that this process had."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
