"""Ctrl-C and SIGTERM, held back until training can stop without losing anything.

None is lost: one that comes after the last look at it is raised at the end of the block. Where an error ends the block, that
error stands for both.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

HELD_BACK = (signal.SIGINT, signal.SIGTERM)


class Terminated(SystemExit):
    """The process was told to end, by a signal; no plugin called `sys.exit`."""


def end(number: int, frame: FrameType | None) -> None:
    """Handle a signal as Ctrl-C is: what is under way is cleared up; the status is what a shell gives to who is told to end."""
    raise Terminated(128 + number)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """While entered, a SIGTERM that would end this process at once raises `Terminated`; not in a thread but the main one."""
    own = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if own:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


_of_a_pool = False
"""Whether a pool may tell this process to end more than once, and mean the same: it does so when the first of its processes is
gone, and the others may still be saving.
"""


def belong_to_a_pool() -> None:
    """From now on this process takes a second SIGTERM for the first."""
    global _of_a_pool
    _of_a_pool = True


class Interruption:
    """While entered, the first signal is only noted, and `check` raises what it stands for; a second one is raised at once,
    unless a pool sends it.

    In a thread that is not the main one, and for a signal that the process ignores, nothing changes.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in HELD_BACK:
                if (before := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if error is None:
            self.check()

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self._received = self._received, True
        self.signal = signal.Signals(number)
        if again and not (_of_a_pool and number == signal.SIGTERM):
            self.check()

    def agree(self, number: int) -> None:
        """Take note that another process of the training has received a signal; one of this process's own is then its first."""
        self.signal = self.signal or signal.Signals(number)

    def check(self) -> None:
        """Stop here if that was asked for.

        Raises:
            KeyboardInterrupt: by Ctrl-C (SIGINT).
            Terminated: by SIGTERM, with the status 143 of a shell.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise Terminated(128 + self.signal)
