"""CSV files, read into columns: a million rows in seconds, and nothing of what is wrong with a row lost: where it stands and
why it was set aside.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from mtl.columns import Column, SetAside, TextColumn, unusable
from mtl.errors import DataError, unknown

LONGEST = 1 << 16
"""Characters of a field; a longer one is a mistake."""
LONGEST_LINE = 1 << 20
"""Characters of a line that are read."""
JOINED = 16
"""Lines that a field may go on for."""


def read_table(
    path: str | Path,
    columns: Iterable[tuple[str, Column]],
    set_aside: SetAside,
    *,
    delimiter: str = ",",
    encoding: str = "utf-8",
    names: Sequence[str] | None = None,
    optional: int = 0,
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
        optional: how many of the last columns a row may lack altogether.

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
        if isinstance(first, str) or max(map(len, first), default=0) > LONGEST:
            why = first if isinstance(first, str) else f"a field has {max(map(len, first)):,} characters"
            raise DataError(f"{path}:1: the header cannot be read: {why}")
        headless = names is not None and (not first or first[0].lower() != names[0].lower())
        header = list(names or ())[: len(_ended(first))] if headless else _ended(first)
        wanted = [(_place(path, name, header, delimiter), name, column) for name, column in columns]
        if headless:
            _take(path, 1, first, len(header), optional, wanted, set_aside, lines)
        for number, row in rows:
            _take(path, number, row, len(header), optional, wanted, set_aside, lines)
    if not lines:
        reason = f"; set aside: {set_aside.summary()}" if set_aside.total else ""
        raise DataError(f"table {str(path)!r} has a header and no rows that can be used{reason}")
    return np.frombuffer(lines, np.int32)


def table_columns(
    path: str | Path, *, delimiter: str = ",", encoding: str = "utf-8", names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The names of a table's columns: those of its header, or the first of `names` where it has none; see `read_table`.

    Raises:
        DataError: no such file, or an empty one.
    """
    path = Path(path)
    with _rows(path, delimiter, encoding) as rows:
        first = next(rows, (0, ""))[1]
    if not first or isinstance(first, str):
        raise DataError(f"table {str(path)!r} has no first row" + (f": {first}" if first else ""))
    headless = names is not None and first[0].lower() != names[0].lower()
    return tuple(list(names or ())[: len(_ended(first))] if headless else _ended(first))


def _ended(first: list[str] | str) -> list[str]:
    """The first row without what a stray delimiter adds at its end; one that cannot be read has no column."""
    fields = [] if isinstance(first, str) else list(first)
    while len(fields) > 1 and not fields[-1]:
        fields.pop()
    return fields


def match_names(names: Iterable[bytes], table: Iterable[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which row of a table speaks of which name; names are compared by their hash of 128 bits, in 16 bytes each.

    Args:
        names: N of them.
        table: the name in each of M rows.

    Returns:
        (N,): the first row of each name, -1 where there is none; and, ascending, the rows whose name an earlier one has.
    """
    wanted, held = _hashes(names), _hashes(table)
    order = np.argsort(held, kind="stable")
    ranked = held[order]
    again = np.zeros(len(held), bool)
    again[1:] = ranked[1:] == ranked[:-1]
    if not len(held):
        return np.full(len(wanted), -1), np.empty(0, np.int64)
    place = np.searchsorted(ranked, wanted)  # of the first that is equal, if there is one
    row = order[np.minimum(place, len(held) - 1)]
    return np.where(held[row] == wanted, row, -1), np.sort(order[again])


def _hashes(names: Iterable[bytes]) -> NDArray[np.bytes_]:
    text = bytearray()
    for name in names:
        text += hashlib.blake2b(name, digest_size=16).digest()
    return np.frombuffer(bytes(text), "S16")


Wanted = Sequence[tuple[int, str, Column]]


def _take(
    path: Path,
    line: int,
    row: list[str] | str,
    width: int,
    optional: int,
    wanted: Wanted,
    set_aside: SetAside,
    lines: array[int],
) -> None:
    """Add a row to its columns, or set it aside; `row` is why, where it could not be read at all."""
    if not row:
        return  # a blank line
    if isinstance(row, str):
        set_aside.add(f"{path}:{line}", row, "rows that cannot be read")
        return
    if width - optional <= len(row) < width:
        row = row + [""] * (width - len(row))
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
                set_aside.add(f"{path}:{line}", f"{name} {_short(text)} {why}", unusable(name))
        if value is None and column.required:
            set_aside.add(f"{path}:{line}", f"{name} {_short(text)} {why}", f"rows without a usable {name}")
            return
        values.append(value)
    for (_, _, column), value in zip(wanted, values, strict=True):
        column.append(value)
    lines.append(line)


@contextmanager
def _rows(path: Path, delimiter: str, encoding: str) -> Iterator[Iterator[tuple[int, list[str] | str]]]:
    """(Line, fields) of each row; of one that cannot be read, (line, why).

    A quote that is opened in one line and closed in a later one is a line break in a field if the lines together are a row of
    the table; else it is a mistake in its own line, and the lines after it are rows.
    """
    with _opened(path, encoding) as stream:
        yield _parsed(_lines(stream, path), delimiter)


def _lines(stream: TextIO, path: Path) -> Iterator[tuple[int, str | None]]:
    """(Number, text) of each line; None for one that is too long to be one."""
    number = 0
    try:
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            whole = len(line) <= LONGEST_LINE
            while len(line) > LONGEST_LINE and not line.endswith("\n"):
                line = stream.readline(LONGEST_LINE + 1)
            yield number, line.rstrip("\n") if whole else None
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read table {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None


def _parsed(lines: Iterator[tuple[int, str | None]], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    ahead: deque[tuple[int, str | None]] = deque()
    width = 0
    while line := (ahead.popleft() if ahead else next(lines, None)):
        number, text = line
        if text is None:
            yield number, f"the line has more than {LONGEST_LINE:,} characters"
            continue
        if '"' not in text:
            row: list[str] | None = [field.strip() for field in text.split(delimiter)] if text.strip() else []
        elif text.count('"') % 2 == 0:
            row = _fields(text, delimiter, strict=False)
        else:
            number, row = _joined(number, text, ahead, lines, delimiter, width)
        if row is None:
            yield number, "a quote is opened and not closed"
            continue
        width = width or len(row)
        yield number, row


def _joined(
    number: int,
    text: str,
    ahead: deque[tuple[int, str | None]],
    lines: Iterator[tuple[int, str | None]],
    delimiter: str,
    width: int,
) -> tuple[int, list[str] | None]:
    """A row of several lines, and where it ends; None if it is none. `ahead` holds lines that were looked at."""
    taken, whole = 0, text
    while taken < JOINED:
        if taken == len(ahead):
            if (further := next(lines, None)) is None:
                break
            ahead.append(further)
        following = ahead[taken][1]
        taken += 1
        if following is None:
            break
        whole += "\n" + following
        if following.count('"') % 2 == 0:
            continue
        row = _fields(whole, delimiter, strict=True)
        if row is not None and (not width or len(row) == width or (not any(row[width:]) and len(row) > width)):
            end = ahead[taken - 1][0]
            for _ in range(taken):
                ahead.popleft()
            return end, row
        break
    return number, None


def _fields(text: str, delimiter: str, strict: bool) -> list[str] | None:
    """Of a row; None where its quotes do not fit together."""
    try:
        lines = [f"{line}\n" for line in text.split("\n")]
        rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=strict))
    except csv.Error:
        return None
    return [field.strip() for field in rows[0]] if len(rows) == 1 else None


def _opened(path: Path, encoding: str) -> TextIO:
    try:
        if not path.is_file() and path.exists():
            raise DataError(f"table {str(path)!r} is no regular file")
        utf_8 = codecs.lookup(encoding).name == "utf-8"
        if utf_8 and (found := _wide_encoding(path)):
            raise DataError(f"table {str(path)!r} is {found}, not UTF-8: save it as UTF-8, or give its encoding")
        return open(path, encoding="utf-8-sig" if utf_8 else encoding, errors="surrogateescape")
    except (OSError, LookupError) as error:
        raise DataError(f"cannot read table {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None


def _wide_encoding(path: Path) -> str | None:
    """The encoding of a table with more than one byte for every letter, by its mark or by the zero bytes of a header."""
    with open(path, "rb") as stream:
        begin = stream.read(8)
    for name in ("utf-32", "utf-16"):  # the mark of the first begins with that of the second
        marks = [getattr(codecs, f"BOM_{name.upper().replace('-', '')}_{order}") for order in ("LE", "BE")]
        if begin.startswith(tuple(marks)):
            return name
    return {b"\0\0": "utf-16-le", b"": None}.get(begin[1:4:2]) or ("utf-16-be" if begin[0:3:2] == b"\0\0" else None)


def _place(path: Path, name: str, header: Sequence[str], delimiter: str) -> int:
    places = [i for i, one in enumerate(header) if one == name]
    if len(places) == 1:
        return places[0]
    if places:
        raise DataError(f"{path}:1: the header has column {name!r} {len(places)} times; rename one")
    other = next((sign for sign in ",;\t|" if sign != delimiter and len(header) == 1 and sign in header[0]), None)
    hint = f"; its fields look parted by {json.dumps(other)}: give it, or save with {delimiter!r}" if other else ""
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
