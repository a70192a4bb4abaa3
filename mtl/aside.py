"""What of its data a run does not use: told as it is found, and listed in `set_aside.csv`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mtl.columns import LISTED, SetAside
from mtl.data import Samples, Split
from mtl.errors import RunError
from mtl.files import FileImages
from mtl.tables import write_csv

LIST = "set_aside.csv"


class Aside:
    """Of one run: rows, values and files that its datasets set aside, and image files that turn out to be unreadable.

    Args:
        directory: of the run.
        samples: split -> dataset -> its samples.
        writes: whether this process writes the list.
    """

    def __init__(self, directory: Path, samples: Mapping[Split, Mapping[str, Samples]], writes: bool = True) -> None:
        self.directory = directory
        self.writes = writes
        self.samples = samples
        self._told: dict[str, dict[str, int]] = {}

    def counts(self) -> dict[str, dict[str, int]]:
        """Dataset -> why -> how many, of datasets of which something was set aside."""
        return {name: dict(found) for name in self._parts() if (found := self._counted(name))}

    def unreadable(self) -> dict[tuple[Split, str], dict[bytes, str]]:
        """Split and dataset -> the image files of it that this process could not read, and why."""
        parts = {(split, name): part for split, of in self.samples.items() for name, part in of.items()}
        return {key: dict(found) for key, part in parts.items() if (found := _unreadable(part))}

    def add(self, found: Mapping[tuple[Split, str], Mapping[bytes, str]]) -> None:
        """Take note of what another process gives as `unreadable`.

        Raises:
            DataError: with those of this process they are too many.
        """
        for (split, name), why in found.items():
            images = self.samples[split][name].images
            assert isinstance(images, FileImages)
            images.unreadable.take(why)

    def news(self) -> list[str]:
        """A line for each dataset of which something new was set aside; the list is then written again.

        Raises:
            RunError: the list cannot be written.
        """
        new = {name: found for name, found in self.counts().items() if self._told.get(name) != found}
        if new:
            self._told |= new
            if self.writes:
                try:
                    write_csv(self.directory / LIST, ("dataset", "where", "why"), self._listed())
                except OSError as error:
                    raise RunError(f"cannot write {str(self.directory / LIST)!r}: {error.strerror or error}") from None
        many = {name: "; ".join(f"{count:,} {why}" for why, count in found.items()) for name, found in new.items()}
        some = {name: "the first of them " * (sum(found.values()) > LISTED) for name, found in new.items()}
        return [
            f"dataset {name}: set aside: {what}; {some[name]}listed in {self.directory / LIST}" for name, what in many.items()
        ]

    def _parts(self) -> dict[str, list[Samples]]:
        """Dataset -> its splits."""
        parts: dict[str, list[Samples]] = {}
        for split in Split:
            for name, part in self.samples.get(split, {}).items():
                parts.setdefault(name, []).append(part)
        return parts

    def _counted(self, name: str) -> Counter[str]:
        parts = self._parts()[name]
        counts: Counter[str] = Counter()
        for found in _set_aside(parts):
            counts += found.counts
        counts["image files that cannot be read"] += sum(len(_unreadable(part)) for part in parts)
        return Counter(dict((+counts).most_common()))

    def _listed(self) -> Iterator[tuple[str, str, str]]:
        for name, parts in self._parts().items():
            for found in _set_aside(parts):
                for where, why in found.listed:
                    yield name, where, why
            for part in parts:
                for path, why in _unreadable(part).items():
                    yield name, os.fsdecode(path), why


def _set_aside(parts: Sequence[Samples]) -> list[SetAside]:
    """What a dataset's splits say; some say the same one thing."""
    return list({id(part.set_aside): part.set_aside for part in parts}.values())


def _unreadable(part: Samples) -> dict[bytes, str]:
    return part.images.unreadable.why if isinstance(part.images, FileImages) else {}
