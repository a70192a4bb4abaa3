"""Rows 7 and 8: SIGTERM and Ctrl-C end a run cleanly, and nothing outlives the process that trains."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.endurance.nursery import TRIES, Nursery, Strike, can_be_apart, command, each
from tests.endurance.rig import Rig, rig
from tests.endurance.rows import Cases, row
from tests.endurance.victims import BEGUN, DECODING, LOCKED, MARK, SAVED, SAVING, STEP, TESTING, VALIDATING

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
SECONDS_TO_END = 10.0
AT_ONCE_SECONDS = 3.0
"""What "at once" is."""
START_SECONDS = 6.0
"""In which processes that decode start."""


@dataclass(frozen=True)
class Moment:
    """When a run is told to end."""

    name: str
    strike: Strike
    workers: int = 0
    by_command: bool = False


def told_to_end(rig: Rig, folder: Path, nursery: Nursery, moment: Moment) -> str:
    """Try a moment. Returns what was wrong; "" if nothing was."""
    for i in range(TRIES):
        run_dir, strike = folder / f"{moment.name} {i}", moment.strike.earlier(i)
        run = command if moment.by_command else nursery.run
        ended = run(run_dir, rig.begin(run_dir, moment.workers), strike)
        if not ended.too_late:
            break
    wanted = STATUS[moment.strike.signals[0]]
    if ended.status != wanted or ended.struck is None:
        return f"exit status {ended.status}, not {wanted}: {ended.said[-400:]}"
    if ended.seconds_to_end > SECONDS_TO_END:
        return f"it took {ended.seconds_to_end:.1f} s"
    if "Traceback" in ended.said or "Exception" in ended.said or "error:" in ended.said:
        return ended.said[-400:]
    if LOCKED in ended.news:
        return "the directory is still locked"
    begun = (run_dir / "config.yaml").exists()  # if not, the same command again begins it
    return rig.wrong(run_dir, nursery.run(run_dir, (rig.resume if begun else rig.begin)(run_dir)))


def moments(rig: Rig, short: bool) -> list[Moment]:
    """At random: anywhere, while processes that decode start, in validation, test and saves; Ctrl-C and SIGTERM in turn."""
    draw, pace, saves = random.Random(0), rig.pace, rig.steps // 5
    kinds = {"anywhere": 34, "the command": 6, "start of decoding": 10, "validation": 15, "test": 10, "save": 25}
    found = []
    for kind, count in kinds.items():
        for i in range((kind != "the command") if short else count):
            share, after = draw.random(), draw.randint(0, saves - 1)
            number = tuple(STATUS)[len(found) % 2]
            news, passed, most = {
                "anywhere": (SAVED, after, pace["between"]) if after else (BEGUN, 1, pace["start"]),
                "the command": ("", 0, (saves - 1) * pace["between"]),
                "start of decoding": (DECODING, 1, START_SECONDS),
                "validation": (VALIDATING, draw.randint(1, 3), pace["validation"]),
                "test": (TESTING, 1, pace["test"]),
                "save": (SAVING, draw.randint(1, saves), pace["save"]),
            }[kind]
            workers = 2 if kind in ("the command", "start of decoding") else 0
            found.append(Moment(f"{kind} {i}", Strike(news, passed, share * most, (number,)), workers, kind == "the command"))
    return found


def told_twice(rig: Rig, folder: Path, nursery: Nursery, number: int) -> str:
    """Press Ctrl-C twice in a step that takes a minute. Returns what was wrong; "" if nothing was."""
    run_dir = folder / f"twice {number}"
    twice = Strike(STEP, 1, 0.2, (signal.SIGINT, signal.SIGINT), apart=0.5)
    ended = nursery.run(run_dir, rig.begin(run_dir), twice, step=number, slow=number + 1)
    if ended.status != STATUS[signal.SIGINT] or ended.struck is None or LOCKED in ended.news:
        return f"exit status {ended.status}: {ended.said[-300:]}"
    if not 0 < ended.seconds_to_end < AT_ONCE_SECONDS:
        return f"it took {ended.seconds_to_end:.1f} s"
    return rig.wrong(run_dir, nursery.run(run_dir, rig.resume(run_dir)))


@row(7, "SIGTERM and SIGINT end cleanly")
def signals_end_cleanly(folder: Path, short: bool) -> Cases:
    cases, made = Cases(), rig(short)
    tried = moments(made, short)
    for moment, wrong in zip(tried, each(partial(told_to_end, made, folder), tried, made.at_once), strict=True):
        cases.check(f"{moment.name}, {moment.strike.signals[0].name}", not wrong, wrong)
    steps = [7] if short else [1, 7, 13, 31]
    for step, wrong in zip(steps, each(partial(told_twice, made, folder), steps, made.at_once), strict=True):
        cases.check(f"Ctrl-C twice in step {step + 1}", not wrong, wrong)
    cases.notes.append(
        f"{len(tried)} moments, {sum(one.by_command for one in tried)} of the command, {sum(one.workers > 0 for one in tried)} "
        f"with 2 processes that decode; Ctrl-C twice in {len(steps)} runs"
    )
    return cases


WORKERS = 4


def marked(run_dir: Path) -> list[int]:
    """Processes that have the run's mark in their environment, which whatever a child starts has."""
    mark, found = f"{MARK}={run_dir}".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended, or is another user's
            continue
    return found


def orphaned(rig: Rig, folder: Path, nursery: Nursery, case: tuple[int, Strike]) -> tuple[str, float]:
    """End a process that has others decode. Returns what outlived it by ten seconds, "" if nothing, and how long some did."""
    number, strike = case
    run_dir, memory = folder / str(number), nursery.seen(Path("/dev/shm"))
    before = {*os.listdir(memory)}
    ended = nursery.run(run_dir, rig.begin(run_dir, WORKERS), strike)
    wanted = STATUS.get(strike.signals[0], -signal.SIGKILL)
    if ended.status != wanted or DECODING not in ended.news:
        return f"exit status {ended.status}: {ended.said[-300:]}", 0.0
    while (left := marked(run_dir)) and time.monotonic() < ended.ended + SECONDS_TO_END:
        time.sleep(0.05)
    took = time.monotonic() - ended.ended
    more = {*os.listdir(memory)} - before
    return (f"{len(left)} processes, {sorted(more)} in shared memory" if left or more else ""), took


@row(8, "no orphans")
def nothing_is_left(folder: Path, short: bool) -> Cases:
    cases, made, draw = Cases(), rig(short), random.Random(0)
    kinds = [(signal.SIGKILL, 1 if short else 20), (signal.SIGTERM, 1 if short else 5)]
    tried = []
    for number, count in kinds:
        for _ in range(count):
            early = Strike(DECODING, 1, draw.random() * START_SECONDS, (number,))
            late = Strike(SAVED, draw.randint(1, 3), draw.random() * made.pace["between"], (number,))
            tried.append((len(tried), late if len(tried) % 2 else early))
    ends = each(partial(orphaned, made, folder), tried, made.at_once, can_be_apart())
    for (i, strike), (wrong, _) in zip(tried, ends, strict=True):
        when = "while they start" if strike.news == DECODING else "while they decode"
        cases.check(f"run {i}, {strike.signals[0].name} {when}", not wrong, wrong)
    cases.notes.append(f"{WORKERS} processes that decode; the last were gone after {max(took for _, took in ends):.1f} s")
    return cases
