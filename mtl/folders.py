"""Files under a root, by names from somebody's table: those that are there are used, nothing outside is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

OUTSIDE = "leads out of the folder"


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
    return "" if entry.is_file(follow_symlinks=False) else "is no regular file"


def _of_link(path: bytes, real: bytes) -> str:
    """What a link leads to, as `_listed` says it."""
    target = os.path.realpath(path)
    if not _under(target, real):
        return OUTSIDE
    return "" if os.path.isfile(target) else "is a link to no file"


def _under(path: bytes, real: bytes) -> bool:
    return path == real or path.startswith(real.rstrip(b"/") + b"/")
