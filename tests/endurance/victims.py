"""The program that a nursery is, and the children that it forks: they train, tell of it, and die where they are asked to.

What a child does it tells byte by byte in a pipe; it can also kill itself at a named point of the path of a save, or fill its
disk there. The product knows nothing of this: the child wraps its functions. What a nursery leaves out is the drawing of
pictures, and that the metadata of installed packages are read again and again.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache, wraps
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

BEGUN, SAVING, PUBLISHED, SAVED, VALIDATING, TESTING, DECODING, STEP, FILLED, OVER, LATE, LOCKED = "bspevtdxfozl"
"""News of a child: the command line begins; a save begins, is committed, is over; validation and test begin; processes that
decode are started; the step that was asked for is done; there is no room any more; the command line is over; a signal came
after that; the run's directory is still locked then."""
MARK = "MTL_ENDURANCE"
"""A variable of the environment of whatever a child starts: its value is the run's directory."""
LINGER = 0.3
"""Seconds that a child waits at its end for a signal that is on its way, and comes too late."""


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
