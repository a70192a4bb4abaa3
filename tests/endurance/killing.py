"""Rows 1, 2 and 3: a process that trains is killed, at any moment and at every point of a save, and the run goes on."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import mtl
from mtl.checkpoints import newest, verify
from mtl.commit import number
from tests.endurance.nursery import TRIES, Ended, Nursery, Strike, command, each
from tests.endurance.rig import Rig, rig
from tests.endurance.rows import Cases, row
from tests.endurance.victims import BEGUN, FILES, POINTS, PUBLISHED, SAVED, SAVING, STEP

KILLED = -9
SAVES_HIT = 15
"""Random kills that have to come while a save is under way, for row 1 to say anything."""


@dataclass
class Trial:
    """A run that was killed, once or more often, and went on."""

    name: str
    wrong: str = ""
    hit: bool = False
    """A kill came while a save was under way."""
    none_yet: bool = False
    """The kill came before there was a run to go on with: the same command again has to begin one."""
    lost: list[str] = field(default_factory=list)
    """For every kill: what was wrong with the checkpoints after it; "" if nothing was."""


def lost(run_dir: Path, published: int) -> str:
    """What is wrong with the checkpoints of a run that has just been killed, after so many were committed; "" if nothing is."""
    try:
        found = verify(run_dir)
    except mtl.RunError as error:
        return str(error) if published else ""
    if damaged := [one["faults"] for one in found if one["faults"]]:
        return f"damaged: {damaged}"
    last = newest(run_dir)[0].name
    return "" if number(last) >= published else f"{published} were committed, and {last} is the newest"


def cut(rig: Rig, folder: Path, nursery: Nursery, case: tuple[str, Callable[[Nursery, Path, int], Ended], int]) -> Trial:
    """Kill a run once, and go on with it."""
    name, kill, workers = case
    for i in range(TRIES):
        trial, run_dir = Trial(name), folder / f"{name} {i}"
        ended = kill(nursery, run_dir, i)
        if not ended.too_late:
            break
    if ended.status != KILLED:
        trial.wrong = f"it was not killed: exit status {ended.status}: {ended.said[-300:]}"
        return trial
    trial.hit = ended.saving
    trial.lost.append(lost(run_dir, ended.news.count(PUBLISHED)))
    trial.none_yet = not (run_dir / "config.yaml").exists()
    arguments = (rig.begin if trial.none_yet else rig.resume)(run_dir, workers)
    trial.wrong = rig.wrong(run_dir, command(run_dir, arguments) if workers else nursery.run(run_dir, arguments))
    return trial


@cache
def cut_once(short: bool) -> tuple[list[Trial], list[Trial]]:
    """Runs that are killed at random moments, and those that are at the points of a save."""
    made, draw = rig(short), random.Random(0)
    folder = Path(tempfile.mkdtemp(dir=made.folder))
    saves = made.steps // 5

    def at_random(strike: Strike, nursery: Nursery, run_dir: Path, tries: int) -> Ended:
        return nursery.run(run_dir, made.begin(run_dir), strike.earlier(tries))

    def by_command(strike: Strike, nursery: Nursery, run_dir: Path, tries: int) -> Ended:
        return command(run_dir, made.begin(run_dir, 2), strike.earlier(tries))

    def at_point(point: str, time: int, nursery: Nursery, run_dir: Path, tries: int) -> Ended:
        return nursery.run(run_dir, made.begin(run_dir), die=(point, time))

    moments = []
    for i in range(1 if short else 25):
        strike = Strike(SAVING, draw.randint(1, saves), draw.random() * made.pace["save"])
        moments.append((f"in a save {i}", partial(at_random, strike), 0))
    for i in range(1 if short else 20):
        after = draw.randint(0, saves - 1)
        until = made.pace["between"] if after else made.pace["start"]
        strike = Strike(SAVED if after else BEGUN, max(after, 1), draw.random() * until)
        moments.append((f"anywhere {i}", partial(at_random, strike), 0))
    for i in range(0 if short else 5):
        strike = Strike("", 0, draw.random() * (saves - 1) * made.pace["between"])
        moments.append((f"the command {i}", partial(by_command, strike), 2))
    points = POINTS[1::7] if short else POINTS
    named = [
        (f"{point}, {'first' if time == 1 else 'a later'} time", partial(at_point, point, time), 0)
        for point in points
        for time in ((1, 3) if point in FILES or point == "log" else (1, 2))
    ]
    found = each(partial(cut, made, folder), moments + named, made.at_once)
    return found[: len(moments)], found[len(moments) :]


@row(1, "SIGKILL at any time loses nothing committed")
def nothing_is_lost(folder: Path, short: bool) -> Cases:
    cases = Cases()
    moments, points = cut_once(short)
    for trial in moments + points:
        cases.check(trial.name, not trial.wrong, trial.wrong)
    hits, early = (sum(which) for which in zip(*((trial.hit, trial.none_yet) for trial in moments), strict=True))
    if not short and hits < SAVES_HIT:
        cases.check(f"{SAVES_HIT} random kills come in a save", False, hits)
    commands = sum(trial.name.startswith("the command") for trial in moments)
    cases.notes.append(
        f"{len(moments)} random moments, {hits} of them in a save, {early} before there was a run to go on with, "
        f"{commands} of the command with 2 processes that decode; "
        f"{len(points)} at {len({trial.name.split(',')[0] for trial in points})} points of a save"
    )
    return cases


def cut_often_once(rig: Rig, folder: Path, nursery: Nursery, case: tuple[str, list[int], random.Random]) -> Trial:
    """Kill a run soon after each of these steps, and go on with it each time."""
    name, steps, draw = case
    trial, run_dir, published = Trial(name), folder / name, 0
    for step in steps:
        arguments = rig.resume(run_dir) if trial.lost else rig.begin(run_dir)
        ended = nursery.run(run_dir, arguments, Strike(STEP, 1, draw.random() * rig.pace["between"] / 5), step=step)
        if ended.status != KILLED:
            trial.wrong = f"it was not killed after step {step}: exit status {ended.status}: {ended.said[-300:]}"
            return trial
        published += ended.news.count(PUBLISHED)
        trial.hit |= ended.saving
        trial.lost.append(lost(run_dir, published))
    trial.wrong = rig.wrong(run_dir, nursery.run(run_dir, rig.resume(run_dir)))
    return trial


@cache
def cut_often(short: bool) -> list[Trial]:
    """Runs that are killed many times."""
    made, draw = rig(short), random.Random(0)
    folder = Path(tempfile.mkdtemp(dir=made.folder))
    runs, kills = (2, 3) if short else (20, 10)
    cases = []
    for i in range(runs):
        steps = sorted(draw.sample(range(1, made.steps - 2, 2), kills))
        cases.append((f"run {i}, killed after steps {', '.join(map(str, steps))}", steps, random.Random(draw.random())))
    return each(partial(cut_often_once, made, folder), cases, made.at_once)


@row(2, "many resumes do not drift")
def nothing_drifts(folder: Path, short: bool) -> Cases:
    cases = Cases()
    trials = cut_often(short)
    for trial in trials:
        cases.check(trial.name, not trial.wrong, trial.wrong)
    kills = sum(len(trial.lost) for trial in trials)
    cases.notes.append(f"{kills} kills; {sum(trial.hit for trial in trials)} runs were killed in a save")
    return cases


@row(3, "a valid checkpoint exists from the first commit on")
def one_is_always_whole(folder: Path, short: bool) -> Cases:
    cases = Cases()
    for trial in [*cut_once(short)[0], *cut_once(short)[1], *cut_often(short)]:
        for i, found in enumerate(trial.lost):
            cases.check(f"{trial.name}, kill {i + 1}", not found, found)
    cases.notes.append("after the kills of rows 1 and 2, which are not made again")
    return cases
