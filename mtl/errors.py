"""The one family of errors a user can meet, and the wording they share.

Every message says what was wrong, what was found and what would work. `assert` is for our own invariants only; a user's
mistake is always an `MTLError`, which the command line prints without a traceback and answers with exit status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MTLError(Exception):
    """A user can mend this: the message says what was wrong, what was found and what would work."""


class ConfigError(MTLError):
    """A configuration that cannot be run. `problems` holds one line per mistake, all of them at once."""

    def __init__(self, problems: Iterable[str], source: str = "config") -> None:
        self.problems = tuple(problems)
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = "".join(f"\n  {line}" for line in self.problems)
        super().__init__(f"{source}: {len(self.problems)} {noun}{lines}")
        self.source = source

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...], str]]:
        """Between processes an error travels by its arguments."""
        return type(self), (self.problems, self.source)


class PluginError(MTLError):
    """A plugin that cannot be loaded or does not do what its kind promises; names the plugin and where it is from."""


class DataError(MTLError):
    """A dataset, split or label that cannot be used."""


class RunError(MTLError):
    """A run directory that cannot be written, read or continued."""


class LaterVersionError(RunError):
    """What a later version has written: nothing is wrong with it, and it is not for this one to judge, to use or to remove."""


class DivergedError(RunError):
    """A training whose loss is no longer finite."""


def listing(names: Iterable[str], limit: int = 12) -> str:
    """`a, b, c` for an error message; long lists are cut, and say so."""
    known = sorted(names)
    shown = ", ".join(known[:limit])
    rest = f", ... ({len(known) - limit} more)" if len(known) > limit else ""
    return (shown + rest) or "(none)"


class NoCheckpointError(RunError):
    """A run of which no checkpoint is whole, so that it cannot be gone on with."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not among `known`, with the nearest one offered.

    >>> unknown("layer point", "res5", ["res2", "res3"])
    "unknown layer point 'res5'; known: res2, res3 (did you mean 'res2'?)"
    """
    known = [str(one) for one in known]
    other = [one for one in (f"{name}s", name.removesuffix("s")) if one in known]  # of one, or of several
    longer = sorted(one for one in known if len(name) > 2 and one.startswith(f"{name}_"))
    near = other or longer[:1] or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {what} {name!r}; known: {listing(known)}{hint}"


def said(error: BaseException) -> str:
    """Somebody else's error in one line: its type, and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
