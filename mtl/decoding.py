"""Decoding ahead: worker processes fill batches of images in shared memory while the training step computes.

    with Decoders(workers=4) as decoders:
        for images, failed in decoders.batches([Asked([b"a.jpg", b"b.png"]), ...], channels=3, size=(64, 64)):
            ...

`torch.utils.data.DataLoader` allocates the shared memory of every batch anew, and the page faults of that take as long as
decoding; here a batch's memory is used again once no tensor on it is left, and a batch is handed out without a copy.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.decoder import FAILED, READING, RESULT, Asked, Job
from mtl.errors import RunError

CHUNK = 32
"""Images in a job: few enough that all workers share in every batch, enough that handing it over costs nothing beside it."""
AHEAD = 3
"""Batches being decoded while one is in use, at least."""
PATIENCE = 5.0
"""Seconds in which workers end by themselves once told to, before they are killed."""
PROGRAM = """
import json, os, select, signal, sys
sys.path[:] = json.loads(sys.argv.pop())
jobs = select.poll()
jobs.register(int(sys.argv[1]), 0)  # only whether the other side is gone
signal.signal(signal.SIGALRM, lambda *_: jobs.poll(0) and os._exit(1))
signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
from mtl.decoder import main
main()
"""
"""Folders of modules are set when Python is up: by PYTHONPATH, a file beside the caller's could hide one of Python's own. While
it imports torch, which takes seconds, the process looks now and then whether there still is somebody to decode for."""


class _Slot(NamedTuple):
    """A piece of the arena."""

    offset: int
    memory: mmap.mmap


class _Ordered:
    """A batch under way: where it goes, to which list that returns, and how many of its jobs are not finished."""

    def __init__(self, slot: _Slot, free: list[_Slot], paths: list[bytes], channels: int, size: tuple[int, int]) -> None:
        self.slot, self.free, self.paths = slot, free, paths
        count, pixels = len(paths), channels * size[0] * size[1]
        memory: NDArray[np.uint8] = np.frombuffer(slot.memory, np.uint8, count * (pixels + 1))
        self.images = memory[: count * pixels].reshape(count, *size, channels)
        self.states = memory[count * pixels :]
        self.states[:] = 0
        self.missing = math.ceil(count / CHUNK)
        self.abandoned = False


class Decoders:
    """Processes that decode image files; started when they are first needed, or by `start`.

    Args:
        workers: how many; with 0 there is nobody to decode, and the caller has to.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._process: subprocess.Popen[bytes] | None = None
        self._free: list[_Slot] = []
        self._under_way: dict[int, _Ordered] = {}
        self._jobs_given = 0
        self._arena_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes, without waiting until they are ready."""
        if self._process is not None:
            return
        self._arena = _anonymous_file()
        ours, theirs = socket.socketpair()
        self._results, results = os.pipe()
        self._news = select.poll()  # a pipe of any number, which select.select does not take
        self._news.register(self._results, select.POLLIN)
        self._jobs = Connection(ours.detach(), readable=False)
        inherited = (theirs.fileno(), results, self._arena)
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # one core each
        command = [sys.executable, "-c", PROGRAM, *map(str, (*inherited, self.workers)), json.dumps(sys.path)]
        try:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **single},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # standard output may be one JSON object
                pass_fds=inherited,
                start_new_session=True,  # Ctrl-C goes to a terminal's whole process group: not to these
            )
        except OSError as error:
            raise RunError(
                f"no process that decodes images can be started: {error}; data.workers=0 decodes in the main process"
            ) from None
        finally:
            theirs.close()
            os.close(results)
        self._last_resort = weakref.finalize(self, _end, self._process, self._jobs, self._results, self._arena)

    def close(self) -> None:
        """End the processes and wait for them. Tensors that were handed out stay valid."""
        if self._process is not None:
            self._last_resort()
            self._process = None
            self._free = []  # another list: what is still in use returns its memory to the old one
            self._under_way = {}
            self._arena_bytes = 0

    def batches(self, batches: Iterable[Asked], channels: int, size: tuple[int, int]) -> Iterator[tuple[Tensor, list[int]]]:
        """Decode batches of files, several ahead.

        Yields:
            uint8 (B, channels, *size), channels-last in memory, and the positions of those that could not be read, whose
            pixels mean nothing. The same for any number of workers.

        Raises:
            RunError: a worker process died.
        """
        self.start()
        pending: deque[_Ordered] = deque()
        try:
            for asked in batches:
                pending.append(self._order(asked, channels, size))
                if len(pending) > max(AHEAD, math.ceil(2 * CHUNK * self.workers / len(asked.paths))):
                    yield self._finished(pending.popleft())
            while pending:
                yield self._finished(pending.popleft())
        finally:
            for batch in pending:
                self._abandon(batch)

    def _order(self, asked: Asked, channels: int, size: tuple[int, int]) -> _Ordered:
        count = len(asked.paths)
        slot = self._slot(count * (channels * size[0] * size[1] + 1))
        batch = _Ordered(slot, self._free, asked.paths, channels, size)
        for first in range(0, count, CHUNK):
            self._jobs_given += 1
            self._under_way[self._jobs_given] = batch
            paths, boxes = asked.part(first, first + CHUNK)
            try:
                self._jobs.send(Job(self._jobs_given, slot.offset, count, first, channels, size, paths, list(boxes)))
            except OSError:  # all ends of the socket on the other side are closed
                raise self._death() from None
        return batch

    def _slot(self, length: int) -> _Slot:
        """Shared memory of at least `length` bytes that nothing uses: the smallest there is, else new."""
        if fitting := [slot for slot in self._free if len(slot.memory) >= length]:
            slot = min(fitting, key=lambda slot: len(slot.memory))
            self._free.remove(slot)
            return slot
        offset = self._arena_bytes
        self._arena_bytes += math.ceil(length / mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self._arena, self._arena_bytes)
        return _Slot(offset, mmap.mmap(self._arena, self._arena_bytes - offset, offset=offset))

    def _finished(self, batch: _Ordered) -> tuple[Tensor, list[int]]:
        while batch.missing:
            self._receive()
        failed = np.flatnonzero(batch.states == FAILED).tolist()
        images = batch.images.view()  # this object lives exactly as long as a tensor on its memory does
        weakref.finalize(images, batch.free.append, batch.slot).atexit = False
        return torch.from_numpy(images).permute(0, 3, 1, 2), failed

    def _abandon(self, batch: _Ordered) -> None:
        """Nobody wants this batch any more; its memory is free when the last of its jobs is done."""
        batch.abandoned = True
        if not batch.missing:
            batch.free.append(batch.slot)

    def _receive(self) -> None:
        """Take note of finished jobs; wait for one if there is none."""
        assert self._process is not None
        while not self._news.poll(1000):
            if self._process.poll() is not None:
                raise self._death()
        numbers = os.read(self._results, 512 * RESULT)
        if not numbers:
            raise self._death()
        for at in range(0, len(numbers), RESULT):
            batch = self._under_way.pop(int.from_bytes(numbers[at : at + RESULT], "little"))
            batch.missing -= 1
            if batch.abandoned and not batch.missing:
                batch.free.append(batch.slot)

    def _death(self) -> RunError:
        """What to say of workers that are gone."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):  # it is about to end
            self._process.wait(PATIENCE)
        code = self._process.returncode or 0
        number = -code if code < 0 else code - 128  # of the one that forks, or of a worker, as that one hands it on
        by = f"signal {signal.Signals(number).name}" if number > 0 else f"exit status {code}"
        reading = [
            os.fsdecode(batch.paths[i])
            for batch in dict.fromkeys(self._under_way.values())
            for i in np.flatnonzero(batch.states == READING).tolist()
        ]
        files = f" while these were read: {', '.join(reading[:8])}" if reading else ""
        return RunError(
            f"a process that decodes images ended ({by}){files}; was it out of memory, or killed? Fewer data.workers take less "
            "memory; data.workers=0 decodes in the main process"
        )


def _anonymous_file() -> int:
    """A file that is only memory, and has no name that could be left behind."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mtl-images", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _end(process: subprocess.Popen[bytes], jobs: Connection, results: int, arena: int) -> None:
    """Close all ends, so that the workers end; kill what does not."""
    jobs.close()
    os.close(results)
    os.close(arena)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
