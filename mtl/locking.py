"""One writer per directory: a lock that the kernel lets go of when the process that holds it is gone, however it went."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Self

from filelock import FileLock, Timeout

from mtl.errors import RunError
from mtl.writing import temporary_prefix, write_whole

LOCK = ".lock"
HOLDER = ".lock.json"
"""Who holds it, as it said itself: for a message only. What a process that was killed leaves holds nobody up."""
BEGINNING = 1.0
"""Seconds that a holder is given to say who it is."""
GLANCE = 0.2
"""Seconds for which a directory is waited for: another process may only look whether it is in use."""


def is_own(name: str) -> bool:
    """Whether a file in a directory is the lock's, and nothing that anybody has written there."""
    return name in (LOCK, HOLDER) or name.startswith(temporary_prefix(Path(HOLDER)))


def refuse_held(directory: Path) -> None:
    """Complain of a directory that is in use, and change nothing in it.

    Raises:
        RunError: another process holds it, with which one; or it cannot be looked at.
    """
    if (directory / LOCK).is_file():
        _acquired(directory).release()


def refuse_unwritable(directory: Path) -> None:
    """Complain of a directory in which nothing can be written, there or to be made, and change nothing in it.

    Permissions say little, where a mount is read-only and to those whom they do not concern: a file is made and removed.

    Raises:
        RunError: with why not.
    """
    there = next(place for place in (directory, *directory.absolute().parents) if os.path.lexists(place))
    try:
        NamedTemporaryFile(prefix=temporary_prefix(Path(HOLDER)), dir=there).close()
    except OSError as error:
        raise _unwritable(directory, error) from None


def _acquired(directory: Path) -> FileLock:
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=GLANCE)
    except Timeout:
        raise RunError(
            f"{str(directory)!r} is in use by another process{_holder(directory)}; wait for it, or give another directory"
        ) from None
    except OSError as error:
        raise _unwritable(directory, error) from None
    return lock


def _unwritable(directory: Path, error: OSError) -> RunError:
    return RunError(f"cannot write to {str(directory)!r}: {error.strerror or error}")


class Lock:
    """Of a directory, held from its making to `close`, or to the end of the process.

    Raises:
        RunError: another process holds it; with which one. Or it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = _acquired(directory)
        try:
            write_whole(directory / HOLDER, json.dumps(_myself()) + "\n")
        except OSError as error:
            self._lock.release()
            raise _unwritable(directory, error) from None

    def close(self) -> None:
        """Let go of it."""
        if self._lock.is_locked:
            try:
                (self._directory / HOLDER).unlink(missing_ok=True)
            finally:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _myself() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}


def _holder(directory: Path) -> str:
    """Who holds it. One that has only just begun has not said so yet, and who held it before may have been killed."""
    until = time.monotonic() + BEGINNING
    while time.monotonic() < until:
        try:
            said: Mapping[str, Any] = json.loads((directory / HOLDER).read_text(encoding="utf-8"))
            if said["host"] != socket.gethostname() or _is_running(int(said["pid"])):
                return f": process {said['pid']} on {said['host']}, since {said['since']}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        time.sleep(BEGINNING / 50)
    return ""


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True
