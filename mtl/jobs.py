"""Trains many runs, one after the other or several at once. Finished ones are left as they are; one that was begun and cut off
starts anew.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch

from mtl.build import train
from mtl.config import RunConfig, from_tree
from mtl.errors import DivergedError, RunError
from mtl.hardware import usable_cores
from mtl.progress import Progress, Silent
from mtl.registry import load_plugin_file


@dataclass(frozen=True)
class Job:
    """A run to train, and where."""

    config: RunConfig
    directory: Path


def finished(directory: Path) -> dict[str, Any] | None:
    """What a finished run came to; None where there is none."""
    try:
        return dict(json.loads((directory / "result.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def train_all(jobs: Sequence[Job], at_once: int, plugins: Sequence[Path], progress: Progress) -> dict[Path, str]:
    """Train every job that is not finished.

    Args:
        jobs: in the order in which they begin.
        at_once: how many at a time. More than one run in processes of their own: on CUDA they take turns at the visible
            devices, on a CPU each has its share of the cores.
        plugins: files that these processes load.
        progress: told of each.

    Returns:
        Directory -> why, of those that failed by themselves: a loss that is no longer finite.

    Raises:
        MTLError: what fails for other runs as well: the config, the data, a plugin, a process that died.
    """
    left = [job for job in jobs if finished(job.directory) is None]
    if not left:
        return {}
    if at_once == 1 or len(left) == 1:
        return _one_by_one(left, len(jobs), progress)
    return _at_once(left, len(jobs), min(at_once, len(left)), plugins, progress)


def _one_by_one(left: Sequence[Job], total: int, progress: Progress) -> dict[Path, str]:
    failed = {}
    for i, job in enumerate(left, start=1 + total - len(left)):
        progress.line(f"[{i}/{total}] {job.directory.name}")
        if (why := _train(job, progress)) is not None:
            failed[job.directory] = why
            progress.line(f"[{i}/{total}] {job.directory.name} failed: {why}")
    return failed


def _train(job: Job, progress: Progress) -> str | None:
    if job.directory.exists():
        shutil.rmtree(job.directory)  # without a result; its seed would give the same again
    try:
        train(job.config, job.directory, progress)
    except DivergedError as error:
        return str(error)
    return None


_device = ""
"""Of this process, where it is one of several that train."""


def _begin(plugins: Sequence[Path], devices: Queue[str], threads: int) -> None:
    global _device
    _device = devices.get()
    torch.set_num_threads(threads)
    for path in plugins:
        load_plugin_file(path)


def _work(tree: dict[str, Any], directory: Path, workers: int) -> tuple[str | None, float]:
    """Train in a process of its own. Returns why it failed, if it did, and the seconds that it took."""
    started = time.monotonic()
    config = from_tree(tree)
    decoders = min(workers, config.data.workers) if isinstance(config.data.workers, int) else workers
    config = config.replaced(device=_device, data=config.data.model_copy(update={"workers": decoders}))
    return _train(Job(config, directory), Silent()), time.monotonic() - started


def _at_once(left: Sequence[Job], total: int, at_once: int, plugins: Sequence[Path], progress: Progress) -> dict[Path, str]:
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for device in _spread(left[0].config.device, at_once):
        devices.put(device)
    threads = max(1, usable_cores() // at_once)
    failed, done = {}, total - len(left)
    executor = ProcessPoolExecutor(at_once, context, _begin, (list(plugins), devices, threads))
    try:
        futures = {executor.submit(_work, job.config.model_dump(mode="json"), job.directory, threads): job for job in left}
        for future in as_completed(futures):
            name, (why, seconds) = futures[future].directory.name, future.result()
            done += 1
            progress.line(f"[{done}/{total}] {name}: " + (f"failed: {why}" if why is not None else f"{seconds:.0f} s"))
            if why is not None:
                failed[futures[future].directory] = why
    except BrokenProcessPool:
        raise RunError(
            "a training process died, for lack of memory perhaps; finished runs are kept: the same command goes on with the "
            "others; use fewer jobs or a smaller batch_size"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    return failed


def _spread(device: str, at_once: int) -> list[str]:
    """A device for each process: the visible CUDA devices in turn, unless one is named."""
    if device != "cuda":
        return [device] * at_once
    return [f"cuda:{i % torch.cuda.device_count()}" for i in range(at_once)]
