"""Rows 6, 9 and 10: directories that cannot be written, or that another process holds, held or seems to hold."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mtl.locking import HOLDER, LOCK
from mtl.writing import temporary_prefix
from tests.endurance.forked import Call, Ended, forked
from tests.endurance.rows import Cases, row

LIMIT = 5.0
"""Seconds in which an output that cannot be written is refused, beyond the start of Python and torch."""
SLOW = 8.0
"""Seconds that data take which must not be waited for."""
PLUGIN = '''
"""A dataset that takes its time, and says in a file that it was asked for."""
import time
from pathlib import Path
import torch
import mtl

class Options(mtl.Options):
    seconds: float = 0.0
    asked: Path = Path("asked")

@mtl.register_dataset("slow", options=Options, splits=("train",))
def slow(split, root, options):
    options.asked.touch()
    time.sleep(options.seconds)
    images = (torch.arange(24 * 64).view(24, 1, 8, 8) * 7 % 251).to(torch.uint8)
    return mtl.ArrayDataset(images, {"t": torch.arange(24) % 2})

mtl.register_task("slow_t")(lambda: mtl.Task("slow", "t", mtl.Classification(("even", "odd"))))
'''


def config(folder: Path, seconds: float, **changes: Any) -> list[str]:
    """The arguments of a small run, whose data take so long."""
    (folder / "slow.py").write_text(PLUGIN, encoding="utf-8")
    tree = {
        "tasks": ["slow_t"],
        "backbone": {"name": "mlp", "widths": [4]},
        "data": {"validation": 4, "datasets": {"slow": {"seconds": seconds, "asked": str(folder / "asked")}}},
        "epochs": 1,
        "batch_size": 8,
        "checkpoints": {"every_steps": 1},
        "device": "cpu",
        "precision": "fp32",
        **changes,
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return [str(file), "--plugin", str(folder / "slow.py")]


def refused(cases: Cases, name: str, ended: Ended, seconds: float = 0.0) -> None:
    """One line, status 2, soon."""
    lines = ended.err.strip().splitlines()
    cases.check(f"{name}: status 2", ended.status == 2, (ended.status, ended.err[-300:]))
    cases.check(f"{name}: one line", len(lines) == 1 and lines[0].startswith("error: "), lines[-5:])
    cases.check(f"{name}: at once", ended.seconds - seconds < LIMIT, f"{ended.seconds:.1f} s")


READ_ONLY = """
import os, subprocess, sys
place = sys.argv[1]
for command in (["mount", "--bind", place, place], ["mount", "-o", "remount,bind,ro", place]):
    if subprocess.run(command, capture_output=True).returncode:
        sys.exit(77)
sys.exit(subprocess.run([sys.executable, "-m", "mtl", *sys.argv[2:]]).returncode)
"""


def mounted(place: Path, *arguments: object) -> Ended | None:
    """The command where `place` is a read-only mount; None where namespaces are not allowed."""
    started = time.perf_counter()
    command = ["unshare", "-rm", sys.executable, "-c", READ_ONLY, str(place), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        return None
    return Ended(0, done.returncode, done.stdout, done.stderr, time.perf_counter() - started)


@row(6, "an unwritable output fails at once")
def unwritable_outputs(folder: Path, short: bool) -> Cases:
    cases, train = Cases(), config(folder, SLOW)
    (folder / "file").write_text("somebody's")
    (folder / "dangling").symlink_to(folder / "nowhere" / "at all")
    (folder / "readonly").mkdir()
    places = {
        "a read-only place": "/proc/mtl",
        "a missing parent in one": "/proc/mtl/a/b",
        "a file in its place": str(folder / "file"),
        "a file for a parent": str(folder / "file" / "run"),
        "a link to nothing for a parent": str(folder / "dangling" / "run"),
    }
    quick = config(folder, 0.0)
    made = folder / "made"
    ended = forked([Call(["train", *quick, "--run-dir", str(made / "in" / "parents")])])[0]
    cases.check("a missing parent that can be made is", ended.status == 0, ended.err[-300:])
    run = folder / "run"
    forked([Call(["train", *quick, "--run-dir", str(run)], kill_after=1)])
    (folder / "asked").unlink()
    config(folder, SLOW)
    commands: dict[str, list[str]] = {}
    for name, place in places.items():
        commands[f"train, {name}"] = ["train", *train, "--run-dir", place]
        if short and name != "a file in its place":
            continue
        commands[f"compare, {name}"] = ["compare", *train, "--out", place]
        commands[f"pack, {name}"] = ["pack", "slow", "--plugin", train[-1], "--out", place, "--workers", "0"]
    broken = folder / "broken"
    subprocess.run(["cp", "-r", str(run), str(broken)], check=True)
    (broken / LOCK).unlink()
    (broken / LOCK).mkdir()  # so that it cannot be locked, which root can wherever it can write
    commands["resume, no file can be made"] = ["train", "--resume", str(broken), "--plugin", train[-1]]
    commands["resume, no run"] = ["train", "--resume", str(folder / "file"), "--plugin", train[-1]]
    for (name, _), one in zip(commands.items(), forked([Call(one) for one in commands.values()]), strict=True):
        refused(cases, name, one)
    cases.check("no data were asked for", not (folder / "asked").exists())
    cases.check("somebody's file is as it was", (folder / "file").read_text() == "somebody's")
    mistaken = forked(
        [Call(["train", *quick, "sharing={kind: split, at: nowhere}", "--run-dir", str(folder / "new" / "run")])]
    )[0]
    cases.check("a mistake that is found later leaves no directory", mistaken.status == 2 and not (folder / "new").exists())
    config(folder, SLOW)
    imports = import_seconds()
    outputs = {"train": ["train", *train, "--run-dir", str(folder / "readonly" / "run")]}
    if not short:
        outputs["train, in the mount"] = ["train", *train, "--run-dir", str(folder / "readonly")]
        outputs["compare"] = ["compare", *train, "--out", str(folder / "readonly" / "c")]
        outputs["pack"] = ["pack", "slow", "--plugin", train[-1], "--out", str(folder / "readonly" / "p"), "--workers", "0"]
        outputs["resume"] = ["train", "--resume", str(run), "--plugin", train[-1]]
    count = 0
    for name, arguments in outputs.items():
        one = mounted(run if name == "resume" else folder / "readonly", *arguments)
        if one is not None:
            refused(cases, f"{name}, a read-only mount", one, imports)
            cases.check(f"{name}, a read-only mount: it says so", "Read-only file system" in one.err, one.err[-200:])
            count += 1
    mounts = f"{count} as the command on a read-only mount" if count else "no mounts could be made"
    cases.notes.append(f"{len(commands)} forked, data of {SLOW:.0f} s; {mounts}")
    return cases


def import_seconds() -> float:
    """What a command's imports take, on this machine as it is now."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import mtl.build, mtl.cli, mtl.resuming, mtl.comparison, mtl.packing"], check=True)
    return time.perf_counter() - started


@row(9, "one writer per directory")
def one_writer(folder: Path, short: bool) -> Cases:
    cases, count = Cases(), 4 if short else 20
    for name in ("a new directory", "a run that was cut", "an empty one")[: 2 if short else 3]:
        place = folder / name.replace(" ", "-")
        place.mkdir()
        train, run = config(place, 0.0), place / "run"
        if name == "an empty one":
            run.mkdir()
        call = Call(["train", *train, "--run-dir", str(run)])
        if name == "a run that was cut":
            forked([Call(["train", *train, "--run-dir", str(run)], kill_after=1)])
            call = Call(["train", "--resume", str(run), "--plugin", train[-1], f"data.root={place}"])
        ended = forked([call] * count, at_once=True)
        settled(cases, name, ended)
        done = json.loads((run / "result.json").read_text(encoding="utf-8"))
        cases.check(f"{name}: the winner's run is whole", done["epochs"] == 1, done)
    if not short:
        place = folder / "commands"
        place.mkdir()
        train = config(place, 0.0, epochs=100_000)
        command = [sys.executable, "-m", "mtl", "train", *train, "--run-dir", str(place / "run")]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
        until = time.monotonic() + 120
        while sum(one.poll() is None for one in started) > 1 and time.monotonic() < until:
            time.sleep(0.1)
        for one in started:
            one.terminate()
        said = [one.communicate(timeout=60) for one in started]
        settled(cases, "as the command", [Ended(p.pid, p.returncode, *s, 0.0) for p, s in zip(started, said, strict=True)])
    often = "twice" if short else "three times, and 4 as the command"
    cases.notes.append(f"{count} at the same moment, forked, {often}")
    return cases


def settled(cases: Cases, name: str, ended: Sequence[Ended]) -> None:
    """One winner, and losers that name it."""
    winners = [one for one in ended if one.status in (0, 143)]
    cases.check(f"{name}: one winner", len(winners) == 1, [(one.status, one.err[-200:]) for one in ended][:4])
    for i, one in enumerate(one for one in ended if one not in winners):
        named = re.search(r"is in use by another process: process (\d+) on (\S+), since", one.err)
        held = one.status == 2 and named is not None and int(named[1]) in {winner.pid for winner in winners}
        cases.check(f"{name}: loser {i + 1} ends with 2 and names it", held, (one.status, one.err[-300:]))


@row(10, "no stale lock")
def no_stale_lock(folder: Path, short: bool) -> Cases:
    cases, train = Cases(), config(folder, 0.0)
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        ended = subprocess.Popen(["true"])
        ended.wait()
        pids = {"a process that is gone": ended.pid, "one that runs": bystander.pid, "the first": 1, "our own": os.getpid()}
        calls: dict[str, tuple[Path, Call]] = {}
        for i in range(4 if short else 20):
            name, pid = list(pids.items())[i % 4]
            run = folder / f"run{i}"
            run.mkdir()
            resumed = i // 4 % 2 == 1
            call = Call(["train", *train, "--run-dir", str(run)])
            if resumed:
                expect = forked([Call(["train", *train, "--run-dir", str(run)], kill_after=1)])[0]
                assert expect.status == -9, expect.err
                call = Call(["train", "--resume", str(run), "--plugin", train[-1]])
            left = {"pid": pid, "host": socket.gethostname(), "since": "2020-01-01T00:00:00+00:00"}
            (run / LOCK).touch()
            (run / HOLDER).write_text(json.dumps(left) if i % 5 else "{", encoding="utf-8")
            (run / f"{temporary_prefix(Path(HOLDER))}{pid}.tmp").write_text("{", encoding="utf-8")
            calls[f"{'resumed' if resumed else 'new'} {i}, left by {name}"] = (run, call)
        for (name, (run, _)), one in zip(calls.items(), forked([call for _, call in calls.values()]), strict=True):
            cases.check(f"{name}: starts", one.status == 0, one.err[-300:])
            held = (run / "result.json").is_file() and not (run / HOLDER).exists()
            cases.check(f"{name}: ends, and leaves no holder", held)
        bystander.kill()
    cases.notes.append(f"{len(calls)} forked, half of them resumed, of processes gone and running")
    return cases
