"""What a person sees while a run trains: a rich bar on a terminal, plain lines elsewhere. Always on standard error."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType


class Progress(ABC):
    """Told about epochs and steps; asks for figures only when it is about to show them.

    A context manager: `with progress: ...` shows and clears what it draws.
    """

    seconds_between_updates = 1.0

    def __init__(self) -> None:
        self._shown = 0.0

    def due(self) -> bool:
        """Whether it is time to show fresh figures; the caller then pays for one synchronisation."""
        return time.monotonic() - self._shown >= self.seconds_between_updates

    def shown(self) -> None:
        """Start the wait for the next update."""
        self._shown = time.monotonic()

    @abstractmethod
    def begin(self, title: str, steps: int) -> None:
        """A piece of work of `steps` steps begins: an epoch, say."""

    @abstractmethod
    def step(self, done: int, figures: Mapping[str, float] | None) -> None:
        """`done` steps of it are done; figures (losses, images per second) where they were due."""

    @abstractmethod
    def line(self, text: str) -> None:
        """A line that stays."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return


class Silent(Progress):
    """Shows nothing."""

    def due(self) -> bool:
        return False

    def begin(self, title: str, steps: int) -> None:
        return

    def step(self, done: int, figures: Mapping[str, float] | None) -> None:
        return

    def line(self, text: str) -> None:
        return


class Plain(Progress):
    """A line where one is due, for logs and pipes."""

    seconds_between_updates = 20.0

    def begin(self, title: str, steps: int) -> None:
        self._where = title
        self._steps = steps
        self.shown()

    def step(self, done: int, figures: Mapping[str, float] | None) -> None:
        if figures is not None:
            self.line(f"{self._where} step {done}/{self._steps} {_text(figures)}")

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bar(Progress):
    """A bar for the epoch, with losses and images per second."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._id = self._bar.add_task("starting", total=None, figures="")

    def begin(self, title: str, steps: int) -> None:
        self._bar.reset(self._id, description=title, total=steps)

    def step(self, done: int, figures: Mapping[str, float] | None) -> None:
        self._bar.update(self._id, completed=done)
        if figures is not None:
            self._bar.update(self._id, figures=_text(figures))

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


def for_terminal() -> Progress:
    """A bar where standard error is a terminal, plain lines elsewhere."""
    return Bar() if sys.stderr.isatty() else Plain()


def _text(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.4g}" for name, value in figures.items())
