"""Folders that are there whole and verified, or not at all: the commit protocol of checkpoints.

    NAME.tmp-RANDOM/ is filled, every file synchronised -> its manifest, last, with sizes and SHA-256 -> the folder synchronised
    -> renamed to NAME -> the parent synchronised -> the pointer to the newest replaced -> older ones removed

Whatever moment a process is killed in, every folder that was committed before is as it was, and what was begun is no committed
folder. Nothing is removed before something newer is on the disk. The number in its name says which folder is the newest; the
pointer says which one was, so that a newest one that is lost is missed. A reader needs no lock: what a writer removes meanwhile
is passed over. Not covered: a disk that says that it has written and has not; two writers at once, who keep each other out by
`mtl.locking`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any, TypeVar

from mtl.errors import LaterVersionError, RunError
from mtl.strict_json import read_strict
from mtl.writing import synchronise, write_whole

MANIFEST = "manifest.json"
POINTER = "last.json"
"""Beside the folders: which of them is the newest."""
FORMAT = 1
"""Of a folder."""
LARGEST = 1 << 20
"""Bytes that a manifest may have."""
TEMPORARY = ".tmp-"
NAME = re.compile(r"[a-z]+-[0-9]+")
"""Of a committed folder: a word, and the number that orders them."""
FILE = re.compile(r"[a-z_]+\.(json|safetensors)")
DESCRIBED = {"bytes": int, "sha256": str}
"""What a manifest says of a file."""

T = TypeVar("T")


Content = bytes | Callable[[Path], None]
"""Of a file: its bytes, or what writes it to a path."""


def commit(parent: Path, name: str, files: Mapping[str, Content], keep: Callable[[str], bool]) -> Path:
    """Write the folder `parent / name`, then remove the committed ones that `keep` does not want.

    Args:
        parent: of all of them.
        name: of the new one, a word and a number that no other has.
        files: file name -> what is in it.
        keep: whether the folder of a name stays; the new one does.

    Raises:
        OSError: it cannot be written; everything is then as it was. Or the pointer cannot be, or what is old not removed; the
            folder is then there, whole.
    """
    temporary = parent / f"{name}{TEMPORARY}{secrets.token_hex(4)}"
    try:
        digests = fill(temporary, files)
        seal(temporary, digests)
        publish(temporary, parent / name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    point(parent, name)
    prune(parent, name, keep)
    return parent / name


def fill(folder: Path, files: Mapping[str, Content]) -> dict[str, str]:
    """Make the folder with its files, each on the disk. Returns their SHA-256."""
    folder.mkdir()
    return {name: write_file(folder / name, content) for name, content in files.items()}


def write_file(path: Path, content: Content) -> str:
    """Write one file and synchronise it. Returns its SHA-256."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.touch()
        mode = path.stat().st_mode  # as for any file; a library may have ideas of its own
        content(path)
        path.chmod(mode)
    synchronise(path)
    return digest(path)


def seal(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the manifest, without which a folder is none, and synchronise the folder."""
    about = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha} for name, sha in digests.items()}
    write_whole(folder / MANIFEST, json.dumps({"format": FORMAT, "files": about}, indent=2) + "\n")


def publish(temporary: Path, final: Path) -> None:
    """Give the folder its name, which is what commits it."""
    os.rename(temporary, final)
    synchronise(final.parent)


def point(parent: Path, name: str) -> None:
    """Say which folder is the newest."""
    write_whole(parent / POINTER, json.dumps({"newest": name}) + "\n")


def prune(parent: Path, newest: str, keep: Callable[[str], bool]) -> None:
    """Remove what is not wanted any more, and what crashes left."""
    for folder in committed(parent):
        if folder.name != newest and not keep(folder.name):
            remove(folder)
    for leftover in parent.glob(f"*{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder so that a crash leaves no half of it under its name."""
    temporary = folder.with_name(f"{folder.name}{TEMPORARY}{secrets.token_hex(4)}")
    os.rename(folder, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def number(name: str) -> int:
    """That orders folders."""
    return int(name.rpartition("-")[2])


def committed(parent: Path) -> list[Path]:
    """The folders in `parent` that were committed, the newest first."""
    found = [path for path in parent.glob("*-*") if NAME.fullmatch(path.name) and path.is_dir()] if parent.is_dir() else []
    return sorted(found, key=lambda path: number(path.name), reverse=True)


def listed(parent: Path) -> list[Path]:
    """As `committed`, beside a writer: what comes and goes while names are read may be left out, though not twice alike."""
    before = committed(parent)
    while (found := committed(parent)) != before:
        before = found
    return found


def examined(parent: Path, look: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    """The committed folders, the newest first, each with what `look` found. One that a writer removed meanwhile is passed over,
    and those that it has committed since come after the others.
    """
    seen: set[Path] = set()
    removed = True
    while removed:
        removed = False
        for folder in listed(parent):
            if folder in seen:
                continue
            seen.add(folder)
            try:
                found = look(folder)
            except RunError:
                if folder.exists():
                    raise
                removed = True
                continue
            if folder.exists():
                yield folder, found
            else:
                removed = True


def lost(parent: Path) -> str | None:
    """What the pointer says that is not so: that a folder is the newest which is not there; or that it is missing itself. None:
    nothing.

    It may be behind, where a crash came between a folder and its pointer: before anything is removed.
    """
    path = parent / POINTER
    before: object = None
    while True:
        if not path.exists():
            removed = any(number(folder.name) > 1 for folder in committed(parent)[-1:])
            return f"there is no {POINTER}, which says which folder is the newest" if removed else None
        try:
            said = read_strict(path, LARGEST)
        except RunError as error:
            return str(error)
        name = said.get("newest") if isinstance(said, dict) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            return f"{POINTER} names no checkpoint"
        if (parent / name).is_dir():
            return None
        if name == before:  # twice, and so it was not a writer that has gone on
            return f"{name} is not there, which {POINTER} says is the newest"
        before = name


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> `bytes` and `sha256`.

    Raises:
        LaterVersionError: it is of a later version.
        RunError: none, or damaged.
    """
    said = read_strict(folder / MANIFEST, LARGEST)
    if not isinstance(said, dict) or not isinstance(said.get("format"), int) or said["format"] < 1:
        raise RunError(f"{str(folder / MANIFEST)!r} is no manifest")
    if said["format"] > FORMAT:
        raise LaterVersionError(
            f"{str(folder)!r} has format {said['format']}, and this version reads up to {FORMAT}; use the version that wrote it"
        )
    if not isinstance(said.get("files"), dict):
        raise RunError(f"{str(folder / MANIFEST)!r} is no manifest")
    for name, about in said["files"].items():
        described = isinstance(about, dict) and {key: type(value) for key, value in about.items()} == DESCRIBED
        if not FILE.fullmatch(name) or not described:
            raise RunError(f"{str(folder / MANIFEST)!r} is no manifest: {name!r} is not described as a file is")
    return dict(said["files"])


def faults(folder: Path, files: Sequence[str] = ()) -> Iterator[str]:
    """What is wrong with a committed folder, file by file; nothing if it is as it was written.

    Args:
        folder: to look at.
        files: to look at in it; none: all, and whether there are others.

    Raises:
        LaterVersionError: it is of a later version, of which this one cannot tell.
    """
    try:
        manifest = manifest_of(folder)
    except LaterVersionError:
        raise
    except RunError as error:
        yield str(error)
        return
    for name in files or manifest:
        if (about := manifest.get(name)) is None:
            yield f"there is no {name} in it"
            continue
        if (folder / name).exists() and not (folder / name).is_file():  # a pipe would be waited for
            yield f"{name} is no file"
            continue
        try:
            if (size := (folder / name).stat().st_size) != about["bytes"]:
                yield f"{name} has {size:,} bytes where {about['bytes']:,} were written"
            elif digest(folder / name) != about["sha256"]:
                yield f"{name} is not what was written: its SHA-256 differs"
        except OSError as error:
            yield f"{name}: {error.strerror or error}"
    try:
        for name in () if files else sorted({path.name for path in folder.iterdir()} - {*manifest, MANIFEST}):
            yield f"{name} is not in its manifest"
    except OSError as error:
        yield f"{error.strerror or error}"


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()
