"""Processes that train and are killed, told to end, or run out of disk: the host's side, and the program that they are.

A fresh Python takes seconds to import torch. So a nursery, one process with everything imported and a single thread, forks a
child for every run, which calls the command line's `main` as `mtl` does. What it does a child tells byte by byte in a pipe,
so that the host can strike at a moment that it knows; a child can also kill itself at a named point of the path of a save, or
fill its disk there. The product knows nothing of this: the child wraps its functions. What a nursery leaves out is the drawing
of pictures, and that the metadata of installed packages are read again and again.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import queue
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

T, R = TypeVar("T"), TypeVar("R")

BEGUN, SAVING, PUBLISHED, SAVED, VALIDATING, TESTING, DECODING, STEP, FILLED, OVER, LATE, LOCKED = "bspevtdxfozl"
"""News of a child: the command line begins; a save begins, is committed, is over; validation and test begin; processes that
decode are started; the step that was asked for is done; there is no room any more; the command line is over; a signal came
after that; the run's directory is still locked then."""
MARK = "MTL_ENDURANCE"
"""A variable of the environment of whatever a child starts: its value is the run's directory."""
PATIENCE = 180.0
"""Seconds that a child may take."""
LINGER = 0.3
"""Seconds that a child waits at its end for a signal that is on its way, and comes too late."""
TRIES = 5
"""Of a strike that comes too late, earlier each time."""


# ---------------------------------------------------------------------------------------------------------------- the host


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


# ------------------------------------------------------------------------------------------------------------- the program


def serve() -> NoReturn:
    """Fork a child for every order on standard input; print its process number, and how it ended."""
    import numpy as np
    import torchmetrics.classification  # noqa: F401
    import torchvision.io  # noqa: F401
    from mtl_tasks import csv_images  # noqa: F401
    from tensorboard.compat.proto import event_pb2  # noqa: F401
    from torch.utils.tensorboard import summary  # noqa: F401

    from mtl import build, cli, logs, registry, resuming, survey  # noqa: F401

    picture = np.zeros((200, 200, 3), np.uint8)
    logs.draw_coupling = lambda *_: picture  # type: ignore[attr-defined]  drawing takes longer than training
    registry._entry_points = cache(registry._entry_points)
    for kind in (registry.BACKBONES, registry.BALANCERS, registry.DATASETS, registry.TASKS, registry.UNITS):
        kind.names()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    assert threading.active_count() == 1
    for line in sys.stdin:
        order = json.loads(line)
        if "command" in order:
            print(subprocess.run(order["command"], stdin=subprocess.DEVNULL, check=False).returncode, flush=True)
            continue
        if not (child := os.fork()):
            _child(**order)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)


def _child(arguments: list[str], run_dir: str, pipes: list[str], plan: dict[str, Any]) -> NoReturn:
    """Be `mtl`, and tell of it."""
    from filelock import FileLock, Timeout

    from mtl import cli

    news, said = (os.open(pipe, os.O_WRONLY) for pipe in pipes)
    for standard in (1, 2):
        os.dup2(said, standard)
    os.close(said)
    os.environ[MARK] = run_dir
    sys.argv = ["mtl", *arguments]
    status, how = 0, None
    try:
        _report(news, plan.pop("step", None))
        _obey(news, run_dir, **plan)
        cli.main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        how = error  # and with it whatever the run has not let go of
    except BaseException as error:
        traceback.print_exc()
        status, how = 1, error
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.write(news, LATE.encode()))
    os.write(news, OVER.encode())
    sys.stdout.flush()
    sys.stderr.flush()
    if (lock := Path(run_dir) / ".lock").exists():
        try:
            FileLock(lock).acquire(timeout=0)
        except Timeout:
            os.write(news, LOCKED.encode())
    del how
    if not status:
        time.sleep(LINGER)
    os._exit(status)


def _report(news: int, step: int | None) -> None:
    """Wrap what is told of; `step`: the first one that is, after it."""
    from mtl import cli, commit, trainer
    from mtl.data import Split
    from mtl.decoding import Decoders
    from mtl.keeping import Keeper

    def tell(one: str) -> None:
        os.write(news, one.encode())

    app, save, between, publish, score, start = (
        cli.app,
        Keeper.save,
        Keeper.between_steps,
        commit.publish,
        trainer.score_split,
        Decoders.start,
    )
    told: list[int] = []

    def begins() -> None:
        tell(BEGUN)
        app()

    def saves(keeper: Keeper, *kind: str) -> None:
        if keeper._saved == (keeper.state.steps, keeper.state.epoch):
            return
        tell(SAVING)
        save(keeper, *kind)
        tell(SAVED)

    def publishes(*folders: Path) -> None:
        publish(*folders)
        tell(PUBLISHED)

    def steps(keeper: Keeper) -> None:
        between(keeper)
        if step is not None and keeper.state.steps >= step and not told:
            told.append(step)
            tell(STEP)

    def scores(run: Any, split: Split, *more: Any) -> Any:
        tell(TESTING if split == Split.TEST else VALIDATING)
        return score(run, split, *more)

    def starts(decoders: Decoders) -> None:
        if decoders._process is None:
            tell(DECODING)
        start(decoders)

    cli.app = begins  # type: ignore[assignment]
    Keeper.save, Keeper.between_steps = saves, steps  # type: ignore[method-assign]
    commit.publish, trainer.score_split, Decoders.start = publishes, scores, starts  # type: ignore[method-assign]


def _obey(
    news: int,
    run_dir: str,
    die: tuple[str, int] | None = None,
    full: tuple[str, int] | None = None,
    how: str = "",
    slow: int | None = None,
) -> None:
    """Wrap what is to go wrong.

    Args:
        news: where to tell that the disk is full.
        run_dir: of the run.
        die: a point of the path of a save, and at which time that it is passed the process kills itself there.
        full: a file, and at which time that it is written the disk is full.
        how: "disk": fill the disk that the run is on; "limit": forbid files to grow beyond what this one has.
        slow: a step that takes a minute.
    """
    if die is not None:
        _die_at(*die)
    if full is not None:
        fill = _fill_disk if how == "disk" else _limit_files

        def told(run_dir: Path, path: Path) -> None:
            fill(run_dir, path)
            os.write(news, FILLED.encode())

        _fill_at(Path(run_dir), *full, fill=told)
    if slow is not None:
        from mtl import trainer

        step, done = trainer.train_step, count(1)

        def slowly(*given: Any) -> Any:
            if next(done) == slow:
                time.sleep(60)
            return step(*given)

        trainer.train_step = slowly


def kill_myself() -> None:
    """At once."""
    os.kill(os.getpid(), signal.SIGKILL)


FILES = {"model": "model.safetensors", "best": "best.safetensors", "training": "training.safetensors", "state": "state.json"}
POINTS = (
    "log",  # the rows of the logs are about to be synchronised
    *FILES,  # half of this file is written
    "manifest",  # half of it is written
    "sealed",  # the folder is whole, and not renamed
    "renamed",  # it is renamed, and the parent not synchronised
    "synchronised",  # the parent is, and the pointer is as it was
    "pointer",  # half of it is written
    "pointed",  # it is replaced, and nothing pruned
    "pruning",  # an old folder is renamed, and nothing of it removed
    "pruned by half",  # some of its files are removed
    "over",  # all is done
)
"""Where a process kills itself in a save."""


def _die_at(point: str, time_passed: int) -> None:
    """Kill this process at a point of the path of a save, when it is passed for the n-th time."""
    from mtl import commit, keeping
    from mtl.tracking import Rows

    passed = count(1)

    def now() -> bool:
        return next(passed) == time_passed

    def before(function: Callable[..., Any], matches: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*given: Any, **named: Any) -> Any:
            if matches(*given) and now():
                kill_myself()
            return function(*given, **named)

        return wrapped

    def half_written(path: Path, data: str | bytes) -> None:
        if path.name == {"manifest": commit.MANIFEST, "pointer": commit.POINTER}[point] and now():
            path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(data.encode()[: len(data) // 2])  # type: ignore[union-attr]
            kill_myself()
        write_whole(path, data)

    def half_filled(path: Path, content: Any) -> str:
        if path.name == FILES[point] and now():
            write_file(path, content)
            os.truncate(path, path.stat().st_size // 2)
            kill_myself()
        return write_file(path, content)

    def half_removed(folder: Path, **named: Any) -> None:
        if now():
            for file in sorted(folder.iterdir())[: 0 if point == "pruning" else 2]:
                file.unlink()
            kill_myself()
        remove(folder, **named)

    def committed(*given: Any) -> Any:
        done = keep(*given)
        if now():
            kill_myself()
        return done

    write_whole, write_file, remove, keep = commit.write_whole, commit.write_file, shutil.rmtree, keeping.commit
    if point == "log":
        Rows.synchronise = before(Rows.synchronise)  # type: ignore[method-assign]
    elif point in FILES:
        commit.write_file = half_filled
    elif point in ("manifest", "pointer"):
        commit.write_whole = half_written  # type: ignore[attr-defined]
    elif point == "sealed":
        commit.publish = before(commit.publish)
    elif point == "renamed":
        commit.synchronise = before(commit.synchronise, lambda path: path.is_dir())  # type: ignore[attr-defined]
    elif point == "synchronised":
        commit.point = before(commit.point)
    elif point == "pointed":
        commit.prune = before(commit.prune)
    elif point in ("pruning", "pruned by half"):
        commit.shutil = SimpleNamespace(rmtree=half_removed)  # type: ignore[assignment]
    elif point == "over":
        keeping.commit = committed  # type: ignore[attr-defined]
    else:
        raise ValueError(point)


def _fill_at(run_dir: Path, file: str, time_passed: int, fill: Callable[[Path, Path], None]) -> None:
    """Have no room on the disk from when a file is written for the n-th time; "": any file of the run."""
    from mtl import commit

    passed, write_file, under = count(1), commit.write_file, str(run_dir)

    def look(path: Path) -> None:
        if (not file or path.name.lstrip(".").startswith(file)) and next(passed) == time_passed:
            fill(run_dir, path)

    def opened(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in ("a", "w"):
            path = Path(os.fsdecode(arguments[0]))
            if str(path).startswith(under):
                look(path)

    def written(path: Path, content: Any) -> str:
        if not isinstance(content, bytes):  # another library opens it, and Python does not hear of that
            look(path)
        return write_file(path, content)

    sys.addaudithook(opened)
    commit.write_file = written


def _fill_disk(run_dir: Path, path: Path) -> None:
    """Leave no page of the disk free."""
    ballast = os.open(run_dir.parent / "ballast", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for size in (1 << 20, 1 << 12):
        while True:
            try:
                os.write(ballast, bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                break
    os.close(ballast)


def _limit_files(run_dir: Path, path: Path) -> None:
    """Let no file grow beyond what this one has."""
    size = path.stat().st_size if path.exists() else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
