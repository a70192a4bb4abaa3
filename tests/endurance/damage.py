"""Row 4: checkpoints of which something is missing, cut off, or one bit not what it was."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import mtl
from mtl.checkpoints import MODEL, folder_of, newest, verify, weights_file
from mtl.commit import MANIFEST, POINTER, committed, digest, remove
from mtl.errors import LaterVersionError
from tests.endurance.rows import Cases, row

TRUNCATED, FLIPPED = 200, 500


def trained(folder: Path) -> Path:
    """A small run with two checkpoints."""
    count = 60

    @mtl.register_dataset("row_damaged", splits=("train",))
    def damaged(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        images = torch.arange(count * 64).view(count, 1, 8, 8) * 7 % 251
        return mtl.ArrayDataset(images.to(torch.uint8), {"t": torch.arange(count) % 3})

    mtl.register_task("row_damaged")(lambda: mtl.Task("row_damaged", "t", mtl.Classification(("x", "y", "z"))))
    given = mtl.RunConfig(
        tasks=["row_damaged"],
        backbone={"name": "small_cnn", "width": 0.1},
        data={"validation": 12},
        epochs=2,
        batch_size=16,
        checkpoints={"every_steps": 2},
        device="cpu",
        precision="fp32",
    )
    mtl.train(given, folder / "run")
    return folder / "run"


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def cut_off(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def damages(names: list[str], sizes: dict[str, int], short: bool) -> Iterator[tuple[str, str, Callable[[Path], object]]]:
    """What is called what, of which file, and how it is done."""
    chance = random.Random(0)
    for i in range(TRUNCATED // (10 if short else 1)):
        name = names[i % len(names)]
        size = chance.randrange(sizes[name])
        yield f"{name} cut off at {size}", name, lambda path, size=size: cut_off(path, size)
    for i in range(FLIPPED // (10 if short else 1)):
        name = names[i % len(names)]
        bit = chance.randrange(8 * sizes[name])
        yield f"bit {bit} of {name}", name, lambda path, bit=bit: flip(path, bit)
    for name in names:
        yield f"{name} of no bytes", name, lambda path: path.write_bytes(b"")
        yield f"{name} missing", name, Path.unlink
        yield f"{name} a byte longer", name, lambda path: path.write_bytes(path.read_bytes() + b"\0")
        yield f"{name} of zeros", name, lambda path: path.write_bytes(bytes(path.stat().st_size))
        yield f"{name} a folder", name, lambda path: (path.unlink(), path.mkdir())
    for name in ("extra.safetensors", "notes.txt", ".hidden"):
        yield f"{name} added", name, lambda path: path.write_bytes(b"x")


@row(4, "damage is detected")
def damage_is_detected(folder: Path, short: bool) -> Cases:
    cases, run = Cases(), trained(folder)
    last, before = committed(folder_of(run))
    cases.check("undamaged, nothing is found", not any(one["faults"] for one in verify(run)), verify(run))
    names = sorted(path.name for path in last.iterdir())
    shutil.copytree(last, folder / "kept")
    silent = 0
    for name, file, inflict in damages(names, {one: (last / one).stat().st_size for one in names}, short):
        shutil.rmtree(last)
        shutil.copytree(folder / "kept", last)
        inflict(last / file)
        found = {one["name"]: one["faults"] for one in verify(run)}
        told = bool(found[last.name]) and not found[before.name]
        used, said = taken(run)
        of_weights, warned = weights_taken(run)
        silent += used == last.name or not said or of_weights == last.name
        later = file == MANIFEST and "use the version that wrote it" in said  # as which a bit may make it appear
        falls_back = used == ("refused" if later else before.name) and last.name in said
        cases.check(f"{name}: verify", told, found)
        cases.check(f"{name}: resume", falls_back, (used, said[:200]))
        cases.check(
            f"{name}: weights", of_weights in (before.name, "refused", "as written") and bool(warned), (of_weights, warned)
        )
    shutil.rmtree(last)
    shutil.copytree(folder / "kept", last)
    cases.check("put back, nothing is found", not any(one["faults"] for one in verify(run)), verify(run))
    pointer = folder_of(run) / POINTER
    for name, inflict in {
        "of no bytes": lambda path: path.write_bytes(b""),
        "missing": Path.unlink,
        "cut off": lambda path: cut_off(path, 9),
        "of another": lambda path: path.write_text('{"newest": "checkpoint-000099"}'),
    }.items():
        text = pointer.read_bytes()
        inflict(pointer)
        used, said = taken(run)
        cases.check(f"pointer {name}: said, and no matter", used == last.name and POINTER in said, (used, said))
        cases.check(f"pointer {name}: verify", any(POINTER in str(one["faults"]) for one in verify(run)), verify(run))
        pointer.write_bytes(text)
    remove(last)
    used, said = taken(run)
    cases.check("the newest gone: resume", used == before.name and last.name in said, (used, said))
    cases.check("the newest gone: verify", any(last.name in str(one["faults"]) for one in verify(run)), verify(run))
    of_weights, warned = weights_taken(run)
    cases.check("the newest gone: weights", of_weights == before.name and last.name in warned, (of_weights, warned))
    cases.notes.append(f"{silent} silent loads; one process, seed 0; resume by what it chooses to go on from")
    return cases


def taken(run: Path) -> tuple[str, str]:
    """From which checkpoint a resumed run would go on, and what it would say of others."""
    try:
        folder, wrong = newest(run)
    except LaterVersionError as error:
        return "refused", str(error)
    return folder.name, "; ".join(wrong)


def weights_taken(run: Path) -> tuple[str, str]:
    """From which checkpoint a run's last weights come, and what is said of others; "as written" if what is damaged is not in
    them.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            file = weights_file(run, "last")
        except mtl.RunError as error:
            return "refused", str(error)
    said = "; ".join(str(one.message) for one in caught)
    if not said and digest(file) == digest(run.parent / "kept" / MODEL):
        return "as written", "what is damaged is no part of them"
    return file.parent.name, said
