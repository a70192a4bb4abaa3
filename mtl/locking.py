"""One writer per directory: a lock that the kernel lets go of when the process that holds it is gone, however it went."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from mtl.errors import RunError
from mtl.writing import write_whole

LOCK = ".lock"
HOLDER = ".lock.json"
"""Who holds it, as it said itself: for a message only. What a process that was killed leaves holds nobody up."""
OWN = (LOCK, HOLDER)


class Lock:
    """Of a directory, held from its making to `close`, or to the end of the process.

    Raises:
        RunError: another process holds it; with which one. Or it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = FileLock(directory / LOCK)
        try:
            self._lock.acquire(timeout=0)
            write_whole(directory / HOLDER, json.dumps(_myself()) + "\n")
        except Timeout:
            raise RunError(
                f"{str(directory)!r} is in use by another process{_holder(directory)}; wait for it, or give another directory"
            ) from None
        except OSError as error:
            self._lock.release()
            raise RunError(f"cannot write to {str(directory)!r}: {error.strerror or error}") from None

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
    try:
        said: Mapping[str, Any] = json.loads((directory / HOLDER).read_text(encoding="utf-8"))
        return f": process {said['pid']} on {said['host']}, since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it has only just begun
        return ""
