"""Row 5: the disk is full, at whatever is written, and when there is room again the run goes on."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.endurance.nursery import Ended, Nursery, Strike, can_be_apart, each
from tests.endurance.rig import Rig, rig
from tests.endurance.rows import Cases, row
from tests.endurance.victims import FILLED, LOCKED, SAVED

DISK, LIMIT, SMALL = "disk", "limit", "small"
"""A small disk that is filled when a file is about to be written; a limit to the size of files from then on; a disk that is too
small from the beginning."""
AT_FIRST, LATER = 1, 3
PLACES = (
    *((file, time) for file in ("model", "best", "training", "state", "manifest", "last.json") for time in (AT_FIRST, LATER)),
    *((file, AT_FIRST) for file in ("metrics", "exchange", "events", "set_aside", "result")),
)
"""Files, and at which time that they are written there is no room."""
AGAIN = ("lock.json", "env", "config")
"""Those that a run that goes on writes before anything else."""
LIMITED = (
    *((file, LATER) for file in ("metrics", "exchange", "events", "state", "training", "manifest", "last.json", "model")),
    *((file, AT_FIRST) for file in ("result", "set_aside")),
)
SIZES = 10
"""Disks that are too small."""
ROOM, MORE_ROOM = "32m", "64m"


@dataclass(frozen=True)
class Full:
    """A case."""

    how: str
    file: str = ""
    time: int = 1
    again: bool = False
    """The run is killed first, and the disk is full when it goes on."""
    kilobytes: int = 0
    """Of a small disk."""

    def __str__(self) -> str:
        if self.how == SMALL:
            return f"a disk of {self.kilobytes} kB"
        return f"{self.file or 'anything'}, time {self.time}{', going on' * self.again}, {self.how}"


def wrong_end(ended: Ended) -> str:
    """What is wrong with how a run ended that had no room; "" if nothing is."""
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    if ended.status != 2 or len(errors) != 1 or ended.said.rstrip().splitlines()[-1] != errors[0]:
        return f"exit status {ended.status}: {ended.said[-400:]}"
    if "Traceback" in ended.said or "Exception" in ended.said:
        return ended.said[-400:]
    if "No space left" not in errors[0] and "too large" not in errors[0]:
        return f"it says {errors[0]}"
    return "the directory is still locked" if LOCKED in ended.news else ""


def fill_and_go_on(rig: Rig, folder: Path, nursery: Nursery, case: Full) -> str:
    """Try a case. Returns what was wrong; "" if nothing was."""
    place = Path(tempfile.mkdtemp(dir=folder))
    run_dir, on_disk = place / "run", nursery.apart
    if on_disk:
        size = f"{case.kilobytes}k" if case.how == SMALL else ROOM
        nursery.command("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
    try:
        arguments, plan = rig.begin(run_dir), {"full": (case.file, case.time), "how": case.how}
        if case.again:
            killed = nursery.run(run_dir, arguments, Strike(SAVED, 3, 0.0))
            if killed.status != -signal.SIGKILL:
                return f"it was not killed: {killed.status}"
            arguments = rig.resume(run_dir)
        ended = nursery.run(run_dir, arguments, None, **({} if case.how == SMALL else plan))
        if case.how != SMALL and FILLED not in ended.news:
            return f"it did not come to that: {ended.said[-300:]}"
        if wrong := wrong_end(ended):
            return wrong
        if on_disk:
            nursery.command("mount", "-o", f"remount,size={MORE_ROOM}", place)
        begun = nursery.seen(run_dir / "config.yaml").exists()  # if not, the same command again begins it
        again = nursery.run(run_dir, (rig.resume if begun else rig.begin)(run_dir))
        return rig.wrong(nursery.seen(run_dir), again)
    finally:
        if on_disk:
            nursery.command("umount", place)


def used(rig: Rig, folder: Path, nursery: Nursery, _: None) -> int:
    """Kilobytes of a disk that a run takes when it is over."""
    place = Path(tempfile.mkdtemp(dir=folder))
    nursery.command("mount", "-t", "tmpfs", "-o", f"size={MORE_ROOM}", "tmpfs", place)
    ended = nursery.run(place / "run", rig.begin(place / "run"))
    assert not ended.status, ended.said
    about = os.statvfs(nursery.seen(place))
    nursery.command("umount", place)
    return (about.f_blocks - about.f_bfree) * about.f_frsize // 1024


@row(5, "a full disk is survivable")
def a_full_disk_is_survivable(folder: Path, short: bool) -> Cases:
    cases, made, draw, apart = Cases(), rig(short), random.Random(0), can_be_apart()
    how = DISK if apart else LIMIT
    filled = [Full(how, *one) for one in PLACES] + [Full(how, file, again=True) for file in AGAIN]
    limited = [Full(LIMIT, *one) for one in LIMITED]
    if apart:
        [most] = each(partial(used, made, folder), [None], made.at_once, apart)
        sizes = [Full(SMALL, kilobytes=draw.randint(40, most)) for _ in range(SIZES)]
    else:
        sizes = [Full(LIMIT, "", draw.randint(1, made.steps)) for _ in range(SIZES)]
    if short:
        filled, limited, sizes = filled[::7], limited[::6], sizes[:1]
    tried = filled + limited + sizes
    for case, wrong in zip(tried, each(partial(fill_and_go_on, made, folder), tried, made.at_once, apart), strict=True):
        cases.check(str(case), not wrong, wrong)
    kinds = [case.how for case in tried]
    cases.notes.append(
        f"{kinds.count(DISK)} on a disk that is filled, {kinds.count(SMALL)} on one that is too small, "
        f"{kinds.count(LIMIT)} by a limit to the size of files"
    )
    return cases
