"""The program of the processes that decode image files, started by `mtl.decoding`.

One process imports what is needed, once, and forks the workers: it has a single thread, so forking is safe and takes no time,
which it would not be and do in the training process, with its OpenMP and CUDA threads. It is a program of its own, and
not one of `multiprocessing`'s, because those run the caller's main module again.

Workers take jobs in turn from one socket, write pixels into shared memory and the number of a finished job into one pipe. They
end when the socket is closed, which also happens when the training process is killed. When one of them dies, all end.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Lock
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from mtl.errors import DataError
from mtl.images import Box, read_image

READING, READ, FAILED = 1, 2, 3
"""What the byte of an image says, in the bytes behind the pixels of a batch; 0: not begun."""
RESULT = 8
"""Bytes of a finished job's number in the pipe; few enough to be written in one piece."""


class Asked(NamedTuple):
    """Files of a batch, and which part of each picture is wanted; no boxes: all of every one."""

    paths: list[bytes]
    boxes: list[Box] | None = None

    def part(self, start: int, stop: int) -> tuple[list[bytes], Sequence[Box | None]]:
        """Paths and boxes of some of them."""
        paths = self.paths[start:stop]
        return paths, [None] * len(paths) if self.boxes is None else self.boxes[start:stop]


class Job(NamedTuple):
    """Some consecutive images of a batch: `paths` go to `first`, `first + 1`, ... of the batch at `offset` of the arena.

    A batch is `images` of them, uint8 (H, W, channels), and a byte for each that says how far it is.
    """

    number: int
    offset: int
    images: int
    first: int
    channels: int
    size: tuple[int, int]
    paths: list[bytes]
    boxes: list[Box | None]


def work(jobs: Connection, turn: Lock, results: int, arena: int) -> None:
    """Take jobs until there are no more."""
    slots: dict[tuple[int, int], mmap.mmap] = {}
    while True:
        try:
            with turn:
                job: Job = jobs.recv()
        except (EOFError, OSError):  # the training process has closed its end, or is gone
            return
        pixels = job.size[0] * job.size[1] * job.channels
        length = job.images * (pixels + 1)
        if (job.offset, length) not in slots:
            slots[job.offset, length] = mmap.mmap(arena, length, offset=job.offset)
        memory = np.frombuffer(slots[job.offset, length], np.uint8)
        batch = torch.from_numpy(memory[: job.images * pixels].reshape(job.images, *job.size, job.channels))
        states = memory[job.images * pixels :]
        for i, (path, box) in enumerate(zip(job.paths, job.boxes, strict=True), job.first):
            states[i] = READING
            try:
                batch[i].copy_(read_image(path, job.channels, job.size, box).permute(1, 2, 0))
            except DataError:
                states[i] = FAILED  # why, the training process finds out, by reading it again
            else:
                states[i] = READ
        try:
            os.write(results, job.number.to_bytes(RESULT, "little"))
        except BrokenPipeError:
            return


def serve(jobs: int, results: int, arena: int, workers: int) -> int:
    """Fork the workers and wait for them. Returns 0, or what the first to fail ended with, 128 + N for signal N."""
    turn = get_context("fork").Lock()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process decides when to stop
    running = set()
    for _ in range(workers):
        if not (child := os.fork()):
            work(Connection(jobs), turn, results, arena)
            os._exit(0)
        running.add(child)
    os.close(jobs)
    os.close(results)
    while running:
        child, status = os.wait()
        running.discard(child)
        if code := os.waitstatus_to_exitcode(status):
            for other in running:
                os.kill(other, signal.SIGKILL)
            return code if code > 0 else 128 - code
    return 0


def main() -> NoReturn:
    """With the arguments JOBS RESULTS ARENA WORKERS: three file numbers, and how many processes."""
    import torchvision.io  # noqa: F401  registers the decoder that `mtl.images` uses

    torch.set_num_threads(1)
    signal.setitimer(signal.ITIMER_REAL, 0)  # from here on workers see for themselves that the training process is gone
    os._exit(serve(*map(int, sys.argv[1:])))  # there is nothing to tidy up, which takes torch a second
