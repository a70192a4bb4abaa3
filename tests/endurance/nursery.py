"""Starts processes that train, and kills them, tells them to end, or lets their disk fill: the side of whoever tries that.

A fresh Python takes seconds to import torch. So a nursery, one process with everything imported and a single thread, forks a
child for every run, which calls the command line's `main` as `mtl` does; what it does, it tells byte by byte in a pipe, so that
its end can come at a moment that is known. `victims` is the program that the nursery and its children are.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from tests.endurance.victims import LATE, OVER, SAVED, SAVING

T, R = TypeVar("T"), TypeVar("R")

PATIENCE = 180.0
"""Seconds that a child may take."""
TRIES = 5
"""Of a strike that comes too late, earlier each time."""


def temporary() -> Path:
    """A folder that is there as long as this process is."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Strike:
    """Signals that the host sends: `delay` seconds after the `time`-th news of a kind, further ones `apart` seconds later."""

    news: str
    time: int
    delay: float
    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)
    apart: float = 0.3

    def earlier(self, tries: int) -> Strike:
        """Sooner, for every try that came too late."""
        return replace(self, delay=self.delay / 2**tries)


@dataclass
class Ended:
    """How a child ended: exit status or minus the signal, what it told and when, what it printed."""

    status: int = 0
    news: str = ""
    times: list[float] = field(default_factory=list)
    said: str = ""
    struck: float | None = None
    """When the last signal was sent; None: it ended before."""
    ended: float = 0.0

    def when(self, news: str) -> list[float]:
        """The times of a kind of news."""
        return [time for one, time in zip(self.news, self.times, strict=True) if one == news]

    @property
    def saving(self) -> bool:
        """Whether a save was under way at the end."""
        return self.news.count(SAVING) > self.news.count(SAVED)

    @property
    def too_late(self) -> bool:
        """The strike came when the command was over."""
        return self.status == 0 and (self.struck is None or LATE in self.news)

    @property
    def seconds_to_end(self) -> float:
        """From the last signal."""
        return self.ended - (self.struck or self.ended)


class Nursery:
    """One that forks children. With `apart` it and they see mounts of their own, if the system allows that."""

    _numbers = count()

    def __init__(self, apart: bool = False) -> None:
        self.apart = apart
        program = [sys.executable, "-c", "from tests.endurance.victims import serve; serve()"]
        root = str(Path(__file__).parents[2])
        places = [root, f"{root}/tasks", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), **SINGLE}
        self._folder = temporary()
        self._process = subprocess.Popen(
            ["unshare", "-rm", *program] if apart else program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        if apart:  # shared memory of its own: what is in it is theirs
            self.command("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def seen(self, path: Path) -> Path:
        """A path of the nursery's, as the host can open it."""
        return Path(f"/proc/{self._process.pid}/root{path}")

    def command(self, *command: object) -> None:
        """Run a program where the children run."""
        self._tell({"command": [*map(str, command)]})
        if status := self._hear():
            raise RuntimeError(f"{command}: exit status {status}")

    def run(self, run_dir: Path, arguments: Sequence[str], strike: Strike | None = None, **plan: Any) -> Ended:
        """Fork a child that runs `mtl` with these arguments; wait for its end, and strike meanwhile. `plan`: see `_obey`."""
        number = next(self._numbers)
        pipes = [self._folder / f"{name}{number}" for name in ("news", "said")]
        for pipe in pipes:
            os.mkfifo(pipe)
        news, said = (os.open(pipe, os.O_RDONLY | os.O_NONBLOCK) for pipe in pipes)
        ended = Ended()
        try:
            self._tell({"arguments": arguments, "run_dir": str(run_dir), "pipes": [*map(str, pipes)], "plan": plan})
            self._watch(ended, self._hear(), news, said, strike)
            ended.ended = time.monotonic()
            ended.status = self._hear()
        finally:
            os.close(news)
            os.close(said)
        return ended

    def _watch(self, ended: Ended, pid: int, news: int, said: int, strike: Strike | None) -> None:
        """Read what a child tells until it is gone, and send it signals when it is time."""
        left = list(strike.signals) if strike is not None else []
        due, give_up, heard, alive = None, time.monotonic() + PATIENCE, bytearray(), True
        while alive:
            now = time.monotonic()
            if due is not None and now >= due:
                with suppress(ProcessLookupError):
                    os.kill(pid, left.pop(0))
                    ended.struck = time.monotonic()
                assert strike is not None
                due = time.monotonic() + strike.apart if left else None
                continue
            if now > give_up:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                give_up = now + PATIENCE
            ready, _, _ = select.select([news, said], [], [], min(due or give_up, give_up) - now)
            if said in ready:
                heard += os.read(said, 1 << 16)
            if news in ready:
                data = os.read(news, 1 << 10)
                alive = bool(data)  # standard error stays open for as long as a process that decodes has it
                ended.news += data.decode()
                ended.times += [time.monotonic()] * len(data)
                if strike is not None and due is None and len(left) == len(strike.signals):
                    due = _due(ended, strike)
                if OVER in ended.news:
                    due, left = None, []
        with suppress(BlockingIOError):
            while data := os.read(said, 1 << 16):
                heard += data
        ended.said = heard.decode(errors="replace")

    def _tell(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def _hear(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def _due(ended: Ended, strike: Strike) -> float | None:
    """When to strike, if the news for it are there."""
    times = ended.when(strike.news)
    return times[strike.time - 1] + strike.delay if len(times) >= strike.time else None


SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def command(run_dir: Path, arguments: Sequence[str], strike: Strike | None = None) -> Ended:
    """`python -m mtl` with these arguments, as a user starts it. A strike counts from the first new checkpoint's beginning."""
    before = set((run_dir / "checkpoints").glob("*"))
    with tempfile.TemporaryFile() as said:
        ours = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  a job in the background ignores it
        process = subprocess.Popen(
            [sys.executable, "-m", "mtl", *arguments],
            stdout=said,
            stderr=said,
            env={**os.environ, **SINGLE},
            cwd=Path(__file__).parents[2],
            preexec_fn=ours,
            start_new_session=True,
        )
        ended = Ended()
        try:
            if strike is not None:
                while process.poll() is None and set((run_dir / "checkpoints").glob("*")) <= before:
                    time.sleep(0.005)
                time.sleep(strike.delay)
                if process.poll() is None and not (run_dir / "result.json").exists():
                    process.send_signal(strike.signals[0])
                    ended.struck = time.monotonic()
            ended.status = process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()
        ended.ended = time.monotonic()
        said.seek(0)
        ended.said = said.read().decode(errors="replace")
    return ended


@cache
def nurseries(at_once: int, apart: bool = False) -> queue.Queue[Nursery]:
    """Those that are free."""
    free: queue.Queue[Nursery] = queue.Queue()
    for _ in range(at_once):
        one = Nursery(apart)
        atexit.register(one.close)
        free.put(one)
    return free


@cache
def can_be_apart() -> bool:
    """Whether this system lets a process have mounts of its own."""
    try:
        tried = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
        return subprocess.run(tried, capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def each(attempt: Callable[[Nursery, T], R], cases: Iterable[T], at_once: int, apart: bool = False) -> list[R]:
    """Try cases, so many at a time; what came of them, in order."""
    free = nurseries(at_once, apart)

    def with_nursery(case: T) -> R:
        nursery = free.get()
        try:
            return attempt(nursery, case)
        finally:
            free.put(nursery)

    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(with_nursery, cases))
