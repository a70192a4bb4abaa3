"""Files under a root, by names from somebody's table: those that are there are used, nothing outside is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

OUTSIDE = "leads out of the folder"


class Listed(NamedTuple):
    """What a folder holds of files with certain suffixes.

    Args:
        folder: relative to the root, with slashes; empty: the root itself.
        files: names in it, sorted.
        refused: (name, why) of what is not used.
    """

    folder: bytes
    files: list[bytes]
    refused: list[tuple[bytes, str]]


def walk(root: Path, suffixes: Sequence[str]) -> Iterator[Listed]:
    """Every folder below `root`, itself included, that holds files with one of these suffixes (in any case), sorted by name.

    As `usable_files` has it: regular files, and links whose target is under `root` too; a folder that is met again by a link is
    not looked into twice, and names that begin with a point are skipped.
    """
    real = os.path.realpath(os.fsencode(root))
    wanted = tuple(suffix.lower().encode() for suffix in suffixes)
    met: set[bytes] = set()
    pending = [b""]
    while pending:
        folder = pending.pop()
        place = os.path.join(os.fsencode(root), folder)
        if (target := os.path.realpath(place)) in met:
            continue
        met.add(target)
        found, why = _listed(place, real)
        if why is not None:
            yield Listed(folder, [], [(b"", why)])
            continue
        files, refused, below = [], [], []
        for name in sorted(name for name in found if not name.startswith(b".")):
            said = found[name] if found[name] != LINK else _of_link(os.path.join(place, name), real)
            if said == FOLDER:
                below.append(os.path.join(folder, name))
            elif name.lower().endswith(wanted):
                if said:
                    refused.append((name, said))
                else:
                    files.append(name)
        pending += reversed(below)
        if files or refused:
            yield Listed(folder, files, refused)


def usable_files(root: Path, names: Iterable[bytes]) -> tuple[NDArray[np.bool_], Iterator[tuple[int, str]]]:
    """Which of these files are regular files under `root`, and why the others are not used.

    Each folder is listed once, so a million files take seconds. A symbolic link counts where what it leads to is under `root`
    too; a name with `..`, a backslash or a zero byte does not, nor an absolute one outside.

    Args:
        root: a folder.
        names: relative to it, with slashes, or absolute.

    Returns:
        bool (N,), and (position, why) of each that is not used, ascending.
    """
    real = os.path.realpath(os.fsencode(root))
    refused: dict[int, str] = {}
    in_folder: dict[bytes, list[tuple[int, bytes]]] = {}
    count = 0
    for i, name in enumerate(names):
        count += 1
        if (why := _refused(name, os.fsencode(root), real)) is not None:
            refused[i] = why
            continue
        folder, _, file = name.rpartition(b"/")
        in_folder.setdefault(folder, []).append((i, file))
    for folder, files in in_folder.items():
        place = os.path.join(os.fsencode(root), folder)
        found, why = _listed(place, real)
        for i, file in files:
            said = found.get(file, "is not there") if why is None else why
            if said == LINK:
                said = _of_link(os.path.join(place, file), real)
            if said:
                refused[i] = said
    mask = np.ones(count, bool)
    mask[list(refused)] = False
    return mask, iter(sorted(refused.items()))


def _refused(name: bytes, root: bytes, real: bytes) -> str | None:
    """Why a name is refused before anything is looked at."""
    if not name or name.endswith(b"/"):
        return "names no file"
    if b"\0" in name:
        return "holds a zero byte"
    if b"\\" in name:
        return "holds a backslash; write slashes"
    if name.startswith(b"/") and not name.startswith((root.rstrip(b"/") + b"/", real.rstrip(b"/") + b"/")):
        return OUTSIDE
    return OUTSIDE if b".." in name.split(b"/") else None


LINK = "is a link"
FOLDER = "is a folder"


def _listed(place: bytes, real: bytes) -> tuple[dict[bytes, str], str | None]:
    """Name -> "" for a regular file, else what it is; or why the folder is not looked into."""
    if not _under(os.path.realpath(place), real):
        return {}, OUTSIDE
    try:
        with os.scandir(place) as entries:
            return {entry.name: _what(entry) for entry in entries}, None
    except FileNotFoundError:
        return {}, "is not there"
    except OSError as error:
        return {}, f"is in a folder that cannot be read ({error.strerror or error})"


def _what(entry: os.DirEntry[bytes]) -> str:
    if entry.is_symlink():
        return LINK
    if entry.is_dir(follow_symlinks=False):
        return FOLDER
    return "" if entry.is_file(follow_symlinks=False) else "is no regular file"


def _of_link(path: bytes, real: bytes) -> str:
    """What a link leads to, as `_listed` says it."""
    target = os.path.realpath(path)
    if not _under(target, real):
        return OUTSIDE
    if os.path.isdir(target):
        return FOLDER
    return "" if os.path.isfile(target) else "is a link to no file"


def _under(path: bytes, real: bytes) -> bool:
    return path == real or path.startswith(real.rstrip(b"/") + b"/")
