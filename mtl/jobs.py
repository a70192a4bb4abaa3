"""Trains many runs, one after the other or several at once. Finished ones are left as they are; one that was begun and cut off
goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch

from mtl.analysis import whole_rows
from mtl.build import train
from mtl.config import RunConfig, from_tree
from mtl.errors import ConfigError, DivergedError, MTLError, NoCheckpointError, RunError
from mtl.hardware import usable_cores
from mtl.interruption import belong_to_a_pool, ended_in_order
from mtl.locking import Lock, is_own
from mtl.progress import Progress, Silent
from mtl.registry import load_plugin_file
from mtl.resuming import is_of, is_run, resume
from mtl.rundir import share_machine


@dataclass(frozen=True)
class Job:
    """A run to train, where, and what to call it."""

    config: RunConfig
    directory: Path
    label: str


NEEDED = ("test", "steps", "training_seconds", "peak_memory_bytes")
"""Keys of a `result.json` without which a run does not count as finished."""


def finished(directory: Path) -> dict[str, Any] | None:
    """What a finished run came to; None where there is none, or what is there is damaged.

    Raises:
        RunError: it cannot be read.
    """
    try:
        said = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise RunError(f"cannot read the run {str(directory)!r}: {error.strerror or error}") from None
    whole = isinstance(said, dict) and all(key in said for key in NEEDED) and said["test"] != {}
    return said if whole else None


class Tally:
    """How many of all runs are done, and for how long the others will take.

    Args:
        total: runs.
        progress: told of each.
    """

    def __init__(self, total: int, progress: Progress) -> None:
        self.total, self.progress = total, progress
        self.done = 0
        self.trained = 0
        """Of those that are done, in this process and those that it started."""
        self._began = time.monotonic()

    def begin(self, kept: int, jobs: Sequence[Job]) -> None:
        """`kept` of the runs are there already, `jobs` are to be trained."""
        self.done += kept
        if jobs:
            self.progress.line(f"{len(jobs)} runs to train" + (f", {self.done} are there" if self.done else ""))

    def line(self, job: Job, text: str) -> None:
        """Say something of a run."""
        self.progress.line(f"[{min(self.done + 1, self.total)}/{self.total}] {job.label}{text}")

    def kept(self, job: Job) -> str:
        """What to say where a run ends in an error that nobody foresaw, a plugin's perhaps."""
        return (
            f"while training {job.label}, in {job.directory}; {self.done} of {self.total} runs are finished and kept, and the "
            "same again goes on"
        )

    def count(self, job: Job, why: str | None, seconds: float) -> None:
        """A run is done, or failed."""
        self.trained += 1
        left = (time.monotonic() - self._began) / self.trained * (self.total - self.done - 1)
        then = f"; about {spoken(left)} left" if self.done + 1 < self.total else ""
        self.line(job, f": failed: {why}{then}" if why is not None else f": {spoken(seconds)}{then}")
        self.done += 1


def spoken(seconds: float) -> str:
    """A time in words.

    >>> spoken(84), spoken(600), spoken(9000)
    ('84 s', '10 min', '2.5 h')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def train_all(jobs: Sequence[Job], at_once: int, plugins: Sequence[Path], tally: Tally) -> dict[Path, str]:
    """Train every job that is not finished.

    Args:
        jobs: in the order in which they begin.
        at_once: how many at a time. More than one run in processes of their own: on CUDA they take turns at the visible
            devices, on a CPU each has its share of the cores.
        plugins: files that these processes load.
        tally: told of each.

    Returns:
        Directory -> why, of those that failed by themselves: a loss that is no longer finite.

    Raises:
        MTLError: what fails for other runs as well: the config, the data, a plugin, a process that died.
    """
    left = [job for job in jobs if finished(job.directory) is None]
    for job in jobs:
        done = job not in left
        if not is_of(job.directory, job.config) and (done or is_run(job.directory)):
            raise RunError(
                f"{str(job.directory)!r} is {'finished' if done else 'begun'}, and of another config than this comparison's "
                "(was it made longer?); move it away"
            )
    tally.begin(len(jobs) - len(left), left)
    if not left:
        return {}
    if at_once == 1 or len(left) == 1:
        return _one_by_one(left, tally)
    with ended_in_order():
        return _at_once(left, min(at_once, len(left)), plugins, tally)


def _one_by_one(left: Sequence[Job], tally: Tally) -> dict[Path, str]:
    failed = {}
    for job in left:
        tally.line(job, f" ({job.directory.name})")
        started = time.monotonic()
        try:
            why = _train(job, tally.progress)
        except MTLError:
            raise
        except Exception as error:
            error.add_note(tally.kept(job))
            raise
        if why is not None:
            failed[job.directory] = why
        tally.count(job, why, time.monotonic() - started)
    return failed


def _train(job: Job, progress: Progress) -> str | None:
    try:
        if not _resumed(job, progress):
            _clear(job.directory)
            train(job.config, job.directory, progress)
    except DivergedError as error:
        return str(error)
    return None


def _resumed(job: Job, progress: Progress) -> bool:
    """Go on with a run that was begun and cut; False where that cannot be done."""
    if not is_of(job.directory, job.config):
        return False
    data, where = job.config.data, [f"checkpoints={job.config.checkpoints.model_dump_json()}"]
    if data.root is not None:
        where.append(f"data.root={json.dumps(str(data.root))}")
    try:
        resume(job.directory, [*where, f"device={job.config.device}", f"data.workers={data.workers}"], progress)
    except NoCheckpointError as error:  # whatever else fails may hold next time: what is there stays
        progress.line(f"{job.label or job.directory.name} begins anew: {error}")
        return False
    return True


def _clear(directory: Path) -> None:
    """Empty what is left of a run that cannot be gone on with; its seed gives the same again.

    Raises:
        RunError: another process is writing it.
    """
    if not directory.exists():
        return
    with Lock(directory):
        for one in directory.iterdir():
            if one.is_dir() and not one.is_symlink():
                shutil.rmtree(one)
            elif not is_own(one.name):
                one.unlink()


_device = ""
"""Of this process, where it is one of several that train."""


def _begin(plugins: Sequence[Path], devices: Queue[str], threads: int, at_once: int) -> None:
    global _device
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends this one
    belong_to_a_pool()
    _device = devices.get()
    torch.set_num_threads(threads)
    share_machine(at_once)
    for path in plugins:
        load_plugin_file(path)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # killed: nobody is left to train for, and another may begin this run anew


def _work(tree: dict[str, Any], directory: Path, workers: int) -> tuple[str | None, float]:
    """Train in a process of its own. Returns why it failed, if it did, and the seconds that it took."""
    started = time.monotonic()
    try:
        config = from_tree(tree)
    except ConfigError as error:  # which held in the process that asks
        raise RunError(
            f"a training process does not know what this one knows: {'; '.join(error.problems)}; it imports installed plugins, "
            "the files given as plugins (--plugin), and the script that calls mtl.compare, and nothing typed into an "
            "interactive session: register it in a file, or use jobs=1"
        ) from None
    decoders = min(workers, config.data.workers) if isinstance(config.data.workers, int) else workers
    config = config.replaced(device=_device, data=config.data.model_copy(update={"workers": decoders}))
    try:
        return _train(Job(config, directory, ""), Silent()), time.monotonic() - started
    except SystemExit as ended:  # saved and told to end, which the pool would take for a run that failed, and go on
        os._exit(ended.code if isinstance(ended.code, int) else 1)


PATIENCE = 60.0
"""Seconds without news after which several at once say that they are at work."""


def _at_once(left: Sequence[Job], at_once: int, plugins: Sequence[Path], tally: Tally) -> dict[Path, str]:
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for device in _spread(left[0].config.device, at_once):
        devices.put(device)
    threads = max(1, usable_cores() // at_once)
    failed: dict[Path, str] = {}
    others = multiprocessing.active_children()
    executor = ProcessPoolExecutor(at_once, context, _begin, (list(plugins), devices, threads, at_once))
    try:
        futures = {executor.submit(_work, job.config.model_dump(mode="json"), job.directory, threads): job for job in left}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, PATIENCE, FIRST_COMPLETED)
            if not done:
                begun = [job for future, job in futures.items() if future in waiting][:at_once]  # they begin in this order
                tally.progress.line("under way: " + "; ".join(f"{job.label}, epoch {_epoch(job)}" for job in begun))
            for future in done:
                try:
                    why, seconds = future.result()
                except MTLError as error:
                    error.__cause__ = None  # the traceback of the process that trained
                    raise
                except Exception as error:
                    error.add_note(tally.kept(futures[future]))
                    raise
                tally.count(futures[future], why, seconds)
                if why is not None:
                    failed[futures[future].directory] = why
    except BrokenProcessPool:
        causes = [
            "it ran out of memory (use fewer jobs or a smaller batch_size)",
            "the call of mtl.compare is not in a file, there under if __name__ == '__main__'",
        ]
        raise RunError(
            f"a training process died. Perhaps {', or '.join(causes if tally.trained else reversed(causes))}. Finished runs "
            "are kept, and the same call goes on with the others"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    return failed


def _epoch(job: Job) -> str:
    """The one that a run is in, of how many."""
    over = max((row["epoch"] for row in whole_rows(job.directory / "metrics.jsonl")), default=0)
    return f"{min(over + 1, job.config.epochs)} of {job.config.epochs}"


def _spread(device: str, at_once: int) -> list[str]:
    """A device for each process: the visible CUDA devices in turn, unless one is named."""
    if device != "cuda":
        return [device] * at_once
    return [f"cuda:{i % torch.cuda.device_count()}" for i in range(at_once)]
