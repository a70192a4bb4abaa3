"""What a row of the table is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Cases:
    """What came of a row's cases: how many held, and of those that did not, which and how."""

    held: int = 0
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, name: str, held: bool, found: object = "") -> None:
        """One more case."""
        if held:
            self.held += 1
        else:
            self.failed.append(f"{name}: {found}" if found != "" else name)

    @property
    def total(self) -> int:
        """How many were tried."""
        return self.held + len(self.failed)


Try = Callable[[Path, bool], Cases]
"""Tries a row in a fresh folder; with True, in its short form."""


@dataclass(frozen=True)
class Row:
    """One promise."""

    number: int
    promise: str
    attempt: Try


ROWS: dict[int, Row] = {}


def row(number: int, promise: str) -> Callable[[Try], Try]:
    """Register the function below as this row of the table."""

    def register(attempt: Try) -> Try:
        ROWS[number] = Row(number, promise, attempt)
        return attempt

    return register


def line(of: Row, folder: Path, short: bool) -> tuple[str, Cases]:
    """Try a row; its line in the table."""
    started = time.perf_counter()
    cases = of.attempt(folder, short)
    figure = f"{cases.held} of {cases.total}"
    notes = "; ".join([*cases.notes, *[f"FAILED {one}" for one in cases.failed[:5]]])
    return f"| {of.number} | {of.promise} | {figure} | {time.perf_counter() - started:.1f} s | {notes} |", cases
