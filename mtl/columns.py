"""Columns of somebody's table: texts taken one by one, held compactly in tens of bytes each, and what of them is set aside."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl.errors import DataError

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "unknown", "undefined", "?", "-"})
"""What stands for no value, in any case."""
WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
"""Names of classes that are numbers."""
LARGEST_NUMBER = 3.4e38
"""That a label can be."""
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

    def take(self, other: SetAside) -> None:
        """All that another one holds, too."""
        self.counts.update(other.counts)
        self.listed += other.listed[: LISTED - len(self.listed)]

    def refuse_above(
        self, share: float, used: int, what: str, kinds: str | tuple[str, ...] = "", about: str | tuple[str, ...] = ""
    ) -> None:
        """Refuse data of which too much was set aside.

        Args:
            share: of all that may be.
            used: how many were not.
            what: they are.
            kinds: only what is counted under something that begins so counts.
            about: of what is listed, what is shown begins so.

        Raises:
            DataError: more than that was, or nothing is left.
        """
        lost = sum(count for why, count in self.counts.items() if why.startswith(kinds))
        if used and lost <= share * (used + lost):
            return
        if not lost:
            raise DataError(f"there are no {what}")
        first = "; ".join([f"{where}: {why}" for where, why in self.listed if not about or why.startswith(about)][:3])
        raise DataError(
            f"{lost:,} of {used + lost:,} {what} cannot be used ({self.summary(kinds)}), more than bad={share:g} allows; the "
            f"first: {first}"
        )

    @property
    def total(self) -> int:
        """How many in all."""
        return self.counts.total()

    def summary(self, kinds: str | tuple[str, ...] = "") -> str:
        """Why and how many, the most frequent first; of those that begin so."""
        return "; ".join(f"{count:,} {why}" for why, count in self.counts.most_common() if why.startswith(kinds))

    def refuse_values_above(self, share: float, file: object, usable: Mapping[str, int]) -> None:
        """Refuse a table of which a column holds too many values that are none of its kind; missing ones are not counted.

        Args:
            share: of a column's values that may be.
            file: the table.
            usable: column -> how many of its values can be used.

        Raises:
            DataError: more than that cannot.
        """
        for name, count in usable.items():
            if (kind := unusable(name)) in self.counts:
                self.refuse_above(share, count, f"values of {name} in {str(file)!r}", kind, (f"{name} '", f'{name} "'))


def unusable(column: str) -> str:
    """What values of a column that are none of its kind are counted under."""
    return f"values of {column} that cannot be used"


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
    """Finite numbers; `values` is float64 (N,), NaN where there is none.

    Args:
        between: the least and the greatest that are believed; None: any.
    """

    def __init__(self, required: bool = False, between: tuple[float, float] | None = None) -> None:
        super().__init__(required)
        self._values = array("d")
        self._between = between

    def parse(self, text: str) -> float | None:
        if text.lower() in MISSING:
            return None
        try:
            value = float(text)
        except ValueError:
            raise ValueError("is not a number") from None
        if not math.isfinite(value) or "_" in text:
            raise ValueError("is not a finite number")
        if abs(value) > LARGEST_NUMBER:
            raise ValueError("is too large")
        if self._between is not None and not self._between[0] <= value <= self._between[1]:
            raise ValueError("is not between {:g} and {:g}".format(*self._between))
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
        also: other spellings -> one of the names.
        missing: what else stands for no value.
        what: they are, for messages.
    """

    def __init__(
        self,
        names: Sequence[str] | None = None,
        required: bool = False,
        also: Mapping[str, str] | None = None,
        missing: Iterable[str] = (),
        what: str = "the classes",
    ) -> None:
        super().__init__(required)
        self._what = what
        self._open = names is None
        self._code_of = {name: i for i, name in enumerate(names or ())}
        self._also = {other: self._code_of[name] for other, name in (also or {}).items()}
        self._missing = MISSING | {text.lower() for text in missing}
        self._codes = array("i")

    def parse(self, text: str) -> int | str | None:
        if (code := self._code_of.get(text)) is not None:
            return code
        if (code := self._also.get(text)) is not None:
            return code
        if text.lower() in self._missing:
            return None
        if not self._open:
            raise ValueError(f"is none of {self._what} {', '.join(list(self._code_of)[:8])}")
        return text  # has no number before its row is used

    def append(self, value: int | str | None) -> None:
        code = self._code_of.setdefault(value, len(self._code_of)) if isinstance(value, str) else value
        self._codes.append(-1 if code is None else code)

    def forget(self, unused: NDArray[np.bool_]) -> None:
        """Rows (N,) that are not used after all: names that occur in no other are none, unless they were given."""
        if self._open:
            codes = np.frombuffer(self._codes, np.int32)
            occur = {int(code) for code in np.unique(codes[~unused]) if code >= 0}
            kept = {name: i for i, (name, code) in enumerate((n, c) for n, c in self._code_of.items() if c in occur)}
            place = np.full(len(self._code_of) + 1, -1, np.int32)  # the last is where -1 points to
            for name, code in self._code_of.items():
                place[code] = kept.get(name, -1)
            self._codes = array("i", place[codes].tobytes())
            self._code_of = kept

    def _order(self) -> list[str]:
        names = list(self._code_of)
        if not self._open:
            return names
        whole = all(WHOLE.fullmatch(name) for name in names)
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

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> bytes:
        return bytes(self._text[self._ends[row - 1] if row else 0 : self._ends[row]])

    def __iter__(self) -> Iterator[bytes]:
        start = 0
        for end in self._ends:
            yield bytes(self._text[start:end])
            start = end
