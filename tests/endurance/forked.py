"""Many processes that train, for the price of one start: a small parent imports everything, and forks each of them.

    forked([Call(["train", "c.yaml", "--run-dir", "a"], kill_after=7), Call(["train", "--resume", "a"])])

Each is the real command in a process of its own, with its own standard output and error. What it may be given beside its
arguments is what a test does to it: a step after which it kills itself, another wall clock, a log of the samples it consumed.
"""

from __future__ import annotations

import atexit
import datetime as dates
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Call:
    """A command, and what is done to it.

    `kill_after` is the step after which it sends itself SIGKILL; `clock` is by how many seconds the wall clock is wrong, from
    which step on; `samples` the file to which it adds the number of each step and what the step consumed.
    """

    arguments: Sequence[str]
    kill_after: int | None = None
    clock: Sequence[tuple[int, float]] = ()
    samples: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, below zero by a signal; what it said; the seconds that it took."""

    pid: int
    status: int
    out: str
    err: str
    seconds: float


OTHERS = "others"
"""The file that says that all processes but one have ended."""
PATIENCE = 60.0
"""Seconds for which a process of several that began at once waits for the others, after its first step."""


def forked(calls: Sequence[Call], at_once: bool = False, timeout: float = 600) -> list[Ended]:
    """What became of each of the calls, made one after the other. Or all at the same moment; who trains then waits, after its
    first step, until all others have ended.
    """
    parent = _parent()
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(json.dumps({"calls": [asdict(call) for call in calls], "at_once": at_once}) + "\n")
    parent.stdin.flush()
    late = threading.Timer(timeout, parent.kill)
    late.start()
    said = parent.stdout.readline()
    late.cancel()
    if not said:
        _parent.cache_clear()
        raise RuntimeError(f"the parent that forks ended with {parent.wait()}")
    return [Ended(**one) for one in json.loads(said)]


@cache
def _parent() -> subprocess.Popen[str]:
    """One for all rows; it ends when its standard input does."""
    command = [sys.executable, "-m", "tests.endurance.forked"]
    parent = subprocess.Popen(command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(parent.communicate)
    return parent


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def program(*arguments: object, timeout: float = 300) -> Ended:
    """The command as a user starts it."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "mtl", *map(str, arguments)]
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate(timeout=timeout)
    return Ended(process.pid, process.returncode, out, err, time.perf_counter() - started)


def main() -> None:
    """The parent: reads calls from standard input, a list to a line, and says how each of them ended."""
    import_everything()
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            ended = made([Call(**one) for one in asked["calls"]], asked["at_once"], Path(folder))
        print(json.dumps([asdict(one) for one in ended]), flush=True)


def made(calls: Sequence[Call], at_once: bool, folder: Path) -> list[Ended]:
    """How the calls ended, which keep in `folder` what they say."""
    begin, gate = os.pipe()
    started: list[tuple[int, float]] = []
    ends: list[tuple[int, float]] = []
    for i, call in enumerate(calls):
        started.append((fork(call, folder / str(i), begin if at_once else None, gate), time.perf_counter()))
        if not at_once:
            ends.append(waited(started[-1][0]))
    os.close(gate)  # which is what they wait for, if all are to begin at once
    if at_once:
        found: dict[int, tuple[int, float]] = {}
        while len(found) < len(calls):
            pid, status = os.wait()
            found[pid] = (os.waitstatus_to_exitcode(status), time.perf_counter())
            if len(found) == len(calls) - 1:
                (folder / OTHERS).touch()
        ends = [found[pid] for pid, _ in started]
    os.close(begin)
    return [
        Ended(pid, status, (folder / f"{i}.1").read_text("utf-8"), (folder / f"{i}.2").read_text("utf-8"), end - since)
        for i, ((pid, since), (status, end)) in enumerate(zip(started, ends, strict=True))
    ]


def import_everything() -> None:
    """What a run imports late, so that no child has to."""
    import torchvision.io  # noqa: F401
    from matplotlib.backends import backend_agg  # noqa: F401
    from mtl_tasks import csv_images  # noqa: F401

    import mtl.build
    import mtl.cli
    import mtl.comparison
    import mtl.cross_stitch
    import mtl.packing
    import mtl.resuming
    import mtl.survey  # noqa: F401


def fork(call: Call, said: Path, begin: int | None, gate: int) -> int:
    """Begin a child; with `begin` it waits until the other end of that pipe, `gate`, is closed everywhere."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.close(gate)
        for number, place in ((0, os.devnull), (1, f"{said}.1"), (2, f"{said}.2")):
            os.dup2(os.open(place, os.O_RDWR | os.O_CREAT), number)
        if begin is not None:
            os.read(begin, 1)
        child(call, None if begin is None else said.with_name(OTHERS))
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def waited(pid: int) -> tuple[int, float]:
    """How a child ended, and when."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter()


def child(call: Call, others: Path | None) -> None:
    """The command, and what is done to it; `others` is the file that it waits for."""
    import torch

    from mtl import cli, trainer
    from mtl.keeping import Keeper

    torch.set_num_threads(1)
    after: list[Callable[[Any], None]] = []
    if call.clock:
        wrong_clock(call.clock, after)
    between, train_step = Keeper.between_steps, trainer.train_step

    def between_steps(keeper: Keeper) -> None:
        between(keeper)
        until = time.monotonic() + PATIENCE
        while others is not None and not others.exists() and time.monotonic() < until:
            time.sleep(0.05)
        for one in after:
            one(keeper.state.steps)
        if keeper.state.steps == call.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def noting(run: Any, step: Any) -> Any:
        """Images say in their pixels which they are."""
        noted = {batch.dataset: batch.images.flatten(1)[:, :2].long() @ torch.tensor([256, 1]) for one in step for batch in one}
        with open(str(call.samples), "a", encoding="utf-8") as file:
            file.write(json.dumps({name: numbers.tolist() for name, numbers in noted.items()}) + "\n")
        return train_step(run, step)

    Keeper.between_steps = between_steps  # type: ignore[method-assign]
    if call.samples is not None:
        trainer.train_step = noting
    sys.argv = ["mtl", *call.arguments]
    cli.main()


def wrong_clock(clock: Sequence[tuple[int, float]], after: list[Callable[[Any], None]]) -> None:
    """Let `time.time` and `datetime` be wrong by as many seconds as `clock` says, from its steps on."""
    right, real = time.time, dates.datetime
    wrong = {"by": 0.0}

    def turn(steps: int) -> None:
        for since, by in clock:
            if steps >= since:
                wrong["by"] = by

    class Wrong(real):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real.fromtimestamp(right() + wrong["by"], tz)

    time.time = lambda: right() + wrong["by"]
    dates.datetime = Wrong  # type: ignore[misc]
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("mtl") and vars(module).get("datetime") is real:
            vars(module)["datetime"] = Wrong
    turn(0)
    after.append(turn)


if __name__ == "__main__":
    main()
