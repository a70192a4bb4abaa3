"""What the machine can do, asked once, for the rules by which `auto` is resolved and for the record beside a figure."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def processes_here() -> int:
    """How many processes of one training `torchrun` started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_name(device: torch.device) -> str:
    """The product name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo("model name") or platform.processor() or platform.machine()


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
"""Keys of glibc's mallopt, from malloc.h."""
KEEP = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26))
USUAL = ((M_MMAP_MAX, 65536), (M_TRIM_THRESHOLD, 2**26), (M_TOP_PAD, 2**17), (M_MMAP_THRESHOLD, 2**25))


_keeping = 0
"""Blocks of `memory_kept` that this process is in."""


@contextmanager
def memory_kept() -> Iterator[None]:
    """Keep freed memory within the process while a block runs; give it back afterwards.

    glibc returns every large tensor's pages to the system when it is freed and has the next one faulted in anew, page by page,
    zeroed: a fifth to a third of a training step on two cores, measured. It adapts its threshold by itself up to 32 MB; what it
    adapted to cannot be asked for, so afterwards it is at that end (`USUAL`). Does nothing where there is no mallopt, as on
    macOS and musl. The setting is the process's: other threads are subject to it while the block runs, and it takes the place
    of what `MALLOC_...` variables said. Blocks may lie within one another, or overlap.
    """
    global _keeping
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    if not _keeping:
        for key, value in KEEP:
            libc.mallopt(key, value)
    _keeping += 1
    try:
        yield
    finally:
        _keeping -= 1
        if not _keeping:
            for key, value in USUAL:
                libc.mallopt(key, value)
            libc.malloc_trim(0)


def forget_peak_memory(device: torch.device) -> None:
    """Begin to measure the peak of memory anew, where the system lets a process do so (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that was allocated on a CUDA device, else the largest resident size that this process had, since
    `forget_peak_memory`. None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _cpuinfo(key: str) -> str:
    """An entry of /proc/cpuinfo, where the system has that (Linux), else nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
