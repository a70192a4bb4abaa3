"""CSV files as columns of numbers, classes and text: a million rows in seconds, in tens of bytes each, and nothing of what is
wrong with a row lost: where it stands and why it was set aside.
"""

from __future__ import annotations

import csv
import math
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from mtl.errors import DataError, unknown

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "unknown", "undefined", "?", "-"})
"""What stands for no value, in any case."""
LONGEST = 1 << 16
"""Characters of a field; a longer one is a mistake in quoting."""
LISTED = 1000
"""Things set aside that are listed one by one; of all there are counts."""


@dataclass
class SetAside:
    """What of a dataset is not used, and why: rows of tables, labels, files.

    `listed` holds (where, why) of the first thousand, `counts` why -> how many of all.
    """

    listed: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, why: str, kind: str | None = None) -> None:
        """One more; `kind` is what it is counted under, if not `why` itself."""
        self.counts[kind or why] += 1
        if len(self.listed) < LISTED:
            self.listed.append((where, why))

    @property
    def total(self) -> int:
        """How many in all."""
        return self.counts.total()

    def summary(self) -> str:
        """Why and how many, the most frequent first."""
        return "; ".join(f"{count:,} {why}" for why, count in self.counts.most_common())


class Column(ABC):
    """Of a table: takes texts one by one, and holds them compactly.

    Args:
        required: a row without a usable value here is set aside; else the row has no value.
    """

    def __init__(self, required: bool = False) -> None:
        self.required = required

    @abstractmethod
    def parse(self, text: str) -> Any:
        """The value of a text, None for none.

        Raises:
            ValueError: it is not one of this kind; the message says so, as in "is not a number".
        """

    @abstractmethod
    def append(self, value: Any) -> None:
        """Add a value as `parse` gave it."""


class NumberColumn(Column):
    """Finite numbers; `values` is float64 (N,), NaN where there is none."""

    def __init__(self, required: bool = False) -> None:
        super().__init__(required)
        self._values = array("d")

    def parse(self, text: str) -> float | None:
        if text.lower() in MISSING:
            return None
        try:
            value = float(text)
        except ValueError:
            raise ValueError("is not a number") from None
        if not math.isfinite(value) or "_" in text:
            raise ValueError("is not a finite number")
        return value

    def append(self, value: float | None) -> None:
        self._values.append(math.nan if value is None else value)

    @property
    def values(self) -> NDArray[np.float64]:
        """(N,)."""
        return np.frombuffer(self._values, np.float64) if self._values else np.empty(0)


class ClassColumn(Column):
    """One of several names; `codes` is int32 (N,), the position of a row's name in `names`, -1 where there is none.

    Args:
        names: those that are allowed, in this order; None: whatever is found, sorted (by value where all are integers).
    """

    def __init__(self, names: Sequence[str] | None = None, required: bool = False) -> None:
        super().__init__(required)
        self._open = names is None
        self._code_of = {name: i for i, name in enumerate(names or ())}
        self._codes = array("i")

    def parse(self, text: str) -> int | None:
        if (code := self._code_of.get(text)) is not None:
            return code
        if text.lower() in MISSING:
            return None
        if not self._open:
            raise ValueError(f"is none of the classes {', '.join(list(self._code_of)[:8])}")
        return self._code_of.setdefault(text, len(self._code_of))

    def append(self, value: int | None) -> None:
        self._codes.append(-1 if value is None else value)

    def _order(self) -> list[str]:
        names = list(self._code_of)
        if not self._open:
            return names
        whole = all(name.lstrip("+-").isdecimal() for name in names)
        return sorted(names, key=(lambda name: (int(name), name)) if whole else None)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return tuple(self._order())

    @property
    def codes(self) -> NDArray[np.int32]:
        """(N,)."""
        found = np.frombuffer(self._codes, np.int32) if self._codes else np.empty(0, np.int32)
        place = {name: i for i, name in enumerate(self._order())}
        renumber = np.array([*(place[name] for name in self._code_of), -1], np.int32)  # the last is where -1 points to
        return renumber[found]


class TextColumn(Column):
    """Any text that is not empty; `encoded` is all of it as UTF-8 (surrogates as the bytes that they stand for), `ends` int64
    (N,) where in it each one ends.
    """

    def __init__(self, required: bool = True) -> None:
        super().__init__(required)
        self._text = bytearray()
        self._ends = array("q")

    def parse(self, text: str) -> bytes | None:
        return text.encode("utf-8", "surrogateescape") if text else None

    def append(self, value: bytes | None) -> None:
        self._text += value or b""
        self._ends.append(len(self._text))

    @property
    def encoded(self) -> bytes:
        """One after the other."""
        return bytes(self._text)

    @property
    def ends(self) -> NDArray[np.int64]:
        """(N,)."""
        return np.frombuffer(self._ends, np.int64) if self._ends else np.empty(0, np.int64)

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in self._ends:
            yield bytes(self._text[start:end])
            start = end


def read_table(
    path: str | Path,
    columns: Iterable[tuple[str, Column]],
    set_aside: SetAside,
    *,
    delimiter: str = ",",
    encoding: str = "utf-8",
    names: Sequence[str] | None = None,
) -> NDArray[np.int32]:
    """Read columns of a CSV file; quotes may hold delimiters and line breaks, and blanks around a field do not count.

    Args:
        path: of the file, with a header or without (`names`).
        columns: name in the file, and what takes its texts; a name may come several times.
        set_aside: told of every row and every value that is not used, with file and line.
        delimiter: one character.
        encoding: of the file; a byte order mark is no part of the first name.
        names: of its columns, if it may lack a header: the first row is one where its first field is the first of these,
            whatever the case. Rows may have fewer columns than names, as long as those in `columns` are there.

    Returns:
        int32 (N,): the line on which each row that is used ends.

    Raises:
        DataError: no such file, no rows, or a header without these columns or with one of them twice.
    """
    path = Path(path)
    lines = array("i")
    with _rows(path, delimiter, encoding) as rows:
        try:
            first = next(rows)[1]
        except StopIteration:
            raise DataError(f"table {str(path)!r} is empty") from None
        headless = names is not None and (not first or first[0].lower() != names[0].lower())
        header = list(names or ())[: len(first)] if headless else first
        wanted = [(_place(path, name, header, delimiter), name, column) for name, column in columns]
        if headless:
            _take(path, 1, first, len(header), wanted, set_aside, lines)
        for number, row in rows:
            _take(path, number, row, len(header), wanted, set_aside, lines)
    if not lines:
        reason = f"; set aside: {set_aside.summary()}" if set_aside.total else ""
        raise DataError(f"table {str(path)!r} has a header and no rows that can be used{reason}")
    return np.frombuffer(lines, np.int32)


Wanted = Sequence[tuple[int, str, Column]]


def _take(
    path: Path, line: int, row: list[str] | str, width: int, wanted: Wanted, set_aside: SetAside, lines: array[int]
) -> None:
    """Add a row to its columns, or set it aside; `row` is why, where it could not be read at all."""
    if not row:
        return  # a blank line
    if isinstance(row, str):
        set_aside.add(f"{path}:{line}", row, "rows that cannot be read")
        return
    if len(row) != width and not (len(row) > width and not any(row[width:])):  # a stray comma at the end is none
        set_aside.add(f"{path}:{line}", f"{len(row)} fields, where the header has {width}", "rows of another length")
        return
    values = []
    for place, name, column in wanted:
        text = row[place]
        value, why = None, "is missing"
        try:
            if len(text) > LONGEST:
                raise ValueError(f"has {len(text):,} characters")
            if "\0" in text:
                raise ValueError("holds a zero byte")
            if not text.isascii() and not isinstance(column, TextColumn):
                _check_unicode(text)
            value = column.parse(text)
        except ValueError as error:
            why = str(error)
            if not column.required:
                set_aside.add(f"{path}:{line}", f"{name} {_short(text)} {why}", f"values of {name} that cannot be used")
        if value is None and column.required:
            set_aside.add(f"{path}:{line}", f"{name} {_short(text)} {why}", f"rows without a usable {name}")
            return
        values.append(value)
    for (_, _, column), value in zip(wanted, values, strict=True):
        column.append(value)
    lines.append(line)


@contextmanager
def _rows(path: Path, delimiter: str, encoding: str) -> Iterator[Iterator[tuple[int, list[str] | str]]]:
    """(Line, fields) of each row; of one that cannot be read, (line, why)."""
    with _opened(path, encoding) as stream:
        reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=True)

        def each() -> Iterator[tuple[int, list[str] | str]]:
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield reader.line_num, str(error)
                    continue
                except OSError as error:
                    raise DataError(f"cannot read table {str(path)!r}: {error.strerror or error}") from None
                yield reader.line_num, [text.strip() for text in row]

        yield each()


def _opened(path: Path, encoding: str) -> TextIO:
    try:
        return open(path, encoding="utf-8-sig" if encoding == "utf-8" else encoding, errors="surrogateescape", newline="")
    except (OSError, LookupError) as error:
        raise DataError(f"cannot read table {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None


def _place(path: Path, name: str, header: Sequence[str] | str, delimiter: str) -> int:
    if isinstance(header, str):
        raise DataError(f"{path}:1: the header cannot be read: {header}")
    places = [i for i, one in enumerate(header) if one == name]
    if len(places) == 1:
        return places[0]
    if places:
        raise DataError(f"{path}:1: the header has column {name!r} {len(places)} times; rename one")
    other = next((sign for sign in ";\t|" if sign != delimiter and len(header) == 1 and sign in header[0]), None)
    hint = f"; the fields look parted by {other!r}: give delimiter" if other else ""
    raise DataError(f"{path}:1: {unknown('column', name, header)}{hint}")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table that a spreadsheet may open: no cell is taken for a formula."""
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"'{cell}" if cell.startswith(FORMULA) else cell for cell in row] for row in rows)


FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of one."""


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8 text (give the table's encoding, such as latin-1)") from None


def _short(text: str) -> str:
    """A field's text for a message, however long and whatever is in it."""
    return ascii(text if len(text) <= 40 else f"{text[:40]}...")
