"""What the machine can do, asked once, for the rules by which `auto` is resolved and for the record beside a figure."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware has instructions for bf16 products, as opposed to emulating them.

    CUDA: compute capability 8 or more. CPU: AVX512-BF16 or AMX. Anything else: no.
    """
    match device.type:
        case "cuda":
            return torch.cuda.get_device_capability(device)[0] >= 8
        case "cpu":
            flags = _cpuinfo("flags").split()
            return "avx512_bf16" in flags or "amx_bf16" in flags
        case _:
            return False


def usable_cores() -> int:
    """How many cores this process may use, which on a shared machine may be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """The product name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """An entry of /proc/cpuinfo, where the system has that (Linux), else nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
