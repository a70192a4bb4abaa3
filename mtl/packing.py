"""Packing: the images of a dataset decoded and resized once into one file per split; see `mtl.packed` for what it gives.

Blocks of 512 images are written and synchronised one after the other, each noted with its digest in `SPLIT.blocks` when it is
on the disk. A packing that was killed goes on behind the last noted block whose digest is still right, and at the end
everything is read back before `mtl pack` says that it is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import save
from torch import Tensor

from mtl.choices import choose_dataset
from mtl.config import override
from mtl.data import Split, data_root, read_splits
from mtl.datasets import Dataset
from mtl.decoding import Decoders
from mtl.errors import ConfigError, DataError, RunError
from mtl.files import FileImages, Reading
from mtl.hardware import usable_cores
from mtl.locking import Lock, is_own
from mtl.options import problems
from mtl.packed import BLOCK, FORMAT, MANIFEST, damaged, digest_of, read_manifest
from mtl.progress import Progress
from mtl.registry import DATASETS, Plugin
from mtl.writing import temporary_prefix, write_whole

NOTE = "packing.json"
"""What is being packed, so that nothing else is packed on top of it."""


@dataclass
class Packing:
    """One split on its way: where, the digests of its finished blocks, and its files that cannot be read (row, path, why)."""

    folder: Path
    split: str
    data: Dataset
    blocks: list[str] = field(default_factory=list)
    unreadable: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        channels, height, width = self.data.images.shape[1:]
        return height, width, channels


def pack(
    name: str,
    options: BaseModel | None,
    root: Path,
    out: Path,
    decoders: Decoders,
    bad_files: float,
    progress: Progress,
) -> dict[str, Any]:
    """Pack every split of a registered dataset, or go on packing it; what is finished stays as it is.

    Args:
        name: of the dataset.
        options: of it.
        root: folder of the datasets.
        out: folder that becomes the packed one.
        decoders: who reads image files.
        bad_files: share of a split's files that may be unreadable.
        progress: what to show meanwhile.

    Returns:
        {split: {images, unreadable}}, and `bytes` in all.

    Raises:
        DataError: data that cannot be packed, more unreadable files than may be, or another dataset in that folder.
        RunError: another process packs there, or the folder cannot be written.
    """
    plugin = DATASETS.get(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with Lock(out):
            return _pack(plugin, options, root, out, decoders, bad_files, progress)
    except OSError as error:
        raise RunError(f"cannot pack into {str(out)!r}: {error.strerror or error}") from None


def _pack(
    plugin: Plugin, options: BaseModel | None, root: Path, out: Path, decoders: Decoders, bad_files: float, progress: Progress
) -> dict[str, Any]:
    parts = read_splits(plugin, root, options)
    for split, data in parts.items():
        if data.images.dtype != torch.uint8 or len(data.images.shape) != 4:
            raise DataError(
                f"dataset {plugin.name!r}: only uint8 images (C, H, W) can be packed; {split} has {data.images.dtype}"
            )
    fingerprint = {split.value: _fingerprint(data) for split, data in parts.items()}
    _begin(out, {"dataset": plugin.name, "fingerprint": fingerprint})
    if (out / MANIFEST).is_file():
        if not (wrong := _wrong(out)):
            progress.line(f"{out} is packed already, and as it was written")
            return _about(read_manifest(out))
        progress.line(f"{out} is packed already, and is damaged: {wrong[0]}; packing it again")
        (out / MANIFEST).unlink()
    packings = {}
    with progress:
        for split, data in parts.items():
            packings[split] = packing = Packing(out, split, data)
            _write_split(packing, Reading(decoders, bad_files), progress)
    manifest = _manifest(plugin.name, packings)
    digest = digest_of(json.dumps(manifest).encode())
    write_whole(out / MANIFEST, json.dumps({"digest": digest, **manifest}, indent=1).encode())
    progress.line("reading it back")
    if wrong := damaged(out):
        (out / MANIFEST).unlink()
        raise RunError(f"what was read back from {str(out)!r} is not what was written: {wrong[0]}; is the disk all right?")
    for split in packings:
        (out / f"{split}.blocks").unlink()
    return _about(manifest)


def _wrong(out: Path) -> list[str]:
    """What of a packed folder is not as it was written."""
    try:
        return damaged(out)
    except DataError as error:
        return [str(error)]


def _about(manifest: dict[str, Any]) -> dict[str, Any]:
    splits = manifest["splits"].items()
    images = {split: {"images": about["count"], "unreadable": len(about["unreadable"])} for split, about in splits}
    return {"splits": images, "bytes": sum(manifest["sizes"].values())}


def _fingerprint(data: Dataset) -> str:
    """Of what is packed: pixels, or names, sizes and times of files; boxes, labels, classes, shape."""
    digest = hashlib.blake2b(repr((tuple(data.images.shape), data.classes)).encode(), digest_size=16)
    if isinstance(data.images, FileImages):
        for path in data.images.paths.encoded():
            digest.update(path + b"\0" + _seen(path))
        if data.images.boxes is not None:
            digest.update(data.images.boxes.tobytes())
    else:
        for start in range(0, len(data), BLOCK):
            digest.update(data.images[start : start + BLOCK].contiguous().numpy().tobytes())
    for name, tensor in sorted(_labels(data).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _seen(path: bytes) -> bytes:
    """What tells one content of a file from another without reading it."""
    try:
        about = os.stat(path)
    except OSError:
        return b"?"
    return b"%d %d" % (about.st_size, about.st_mtime_ns)


def _labels(data: Dataset) -> dict[str, Tensor]:
    """What is kept beside the pixels."""
    tensors = {f"labels.{name}": value for name, value in data.labels.items()}
    tensors |= {f"valid.{name}": value for name, value in data.valid.items()}
    if data.groups is not None:
        tensors["groups"] = data.groups
    return {name: value.clone().contiguous() for name, value in tensors.items()}


def _begin(out: Path, about: dict[str, Any]) -> None:
    """Note what is packed here.

    Raises:
        DataError: something else is, or files of somebody's.
    """
    note = out / NOTE
    if not note.is_file():
        if strange := sorted(
            one.name for one in out.iterdir() if not is_own(one.name) and not one.name.startswith(temporary_prefix(note))
        ):
            raise DataError(f"{str(out)!r} is not empty: it holds {', '.join(strange[:5])}; give a new folder")
        write_whole(note, json.dumps(about).encode())
        return
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{str(note)!r} is damaged: {error}") from None
    if before != about:
        what = (
            "another dataset"
            if before.get("dataset") != about["dataset"]
            else "that dataset with other files, labels or options"
        )
        raise DataError(f"{str(out)!r} holds {what}, packed or half packed; give another folder, or remove it")


def _write_split(packing: Packing, reading: Reading, progress: Progress) -> None:
    """The pixels, block after block, behind those that are there; then labels."""
    count, (height, width, channels) = len(packing.data), packing.shape
    size = height * width * channels
    total = -(-count // BLOCK)
    path = packing.folder / f"{packing.split}.u8"
    with open(path, "r+b" if path.exists() else "w+b") as file, open(packing.folder / f"{packing.split}.blocks", "a+") as notes:
        _take_up(packing, file, notes, size)
        done = len(packing.blocks)
        if done:
            progress.line(f"{packing.split}: {min(done * BLOCK, count):,} of {count:,} images are there")
        file.truncate(count * size)
        progress.begin(f"pack {packing.split}", total)
        for i, (images, failed) in enumerate(_blocks(packing, reading, done), done):
            data = images.permute(0, 2, 3, 1).contiguous().numpy().reshape(-1).data
            file.seek(i * BLOCK * size)
            file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
            packing.blocks.append(digest_of(data))
            packing.unreadable += failed
            notes.write(json.dumps([packing.blocks[-1], failed]) + "\n")
            notes.flush()
            os.fdatasync(notes.fileno())
            progress.step(i + 1, {})
    readable = torch.ones(count, dtype=torch.bool)
    readable[[row for row, _, _ in packing.unreadable]] = False
    write_whole(packing.folder / f"{packing.split}.safetensors", save({**_labels(packing.data), "readable": readable}))


def _take_up(packing: Packing, file: Any, notes: Any, size: int) -> None:
    """Blocks that are noted and on the disk, up to the first that is not; later notes are dropped."""
    notes.seek(0)
    count, kept = len(packing.data), []
    for line in notes.read().splitlines():
        images = min(BLOCK, count - len(packing.blocks) * BLOCK)
        try:
            digest, failed = json.loads(line)
            failed = [(int(row), str(path), str(why)) for row, path, why in failed]
        except (ValueError, TypeError):  # torn when it was written
            break
        if images <= 0 or digest_of(os.pread(file.fileno(), images * size, len(packing.blocks) * BLOCK * size)) != digest:
            break
        packing.blocks.append(digest)
        packing.unreadable += failed
        kept.append(line)
    notes.seek(0)
    notes.truncate()
    notes.writelines(f"{line}\n" for line in kept)
    notes.flush()


def _blocks(packing: Packing, reading: Reading, done: int) -> Iterator[tuple[Tensor, list[tuple[int, str, str]]]]:
    """uint8 (B, C, H, W) of each block from `done` on, and (row, path, why) of those that cannot be read."""
    count = len(packing.data)
    bounds = [(start, min(start + BLOCK, count)) for start in range(done * BLOCK, count, BLOCK)]
    images = packing.data.placed("cpu", reading)
    if isinstance(images, Tensor):
        yield from ((images[start:stop], []) for start, stop in bounds)
        return
    if isinstance(images, FileImages):
        images.unreadable.why.update({os.fsencode(path): why for _, path, why in packing.unreadable})
    for (start, _), (pixels, failed) in zip(bounds, images.batches(bounds), strict=True):
        rows = [start + i for i in failed]
        paths = [images.paths[row : row + 1].encoded()[0] for row in rows]
        why = [images.unreadable.why[path] for path in paths]
        if failed:
            pixels = pixels.clone()
            pixels[failed] = 0
        yield pixels, [(row, os.fsdecode(path), said) for row, path, said in zip(rows, paths, why, strict=True)]


def _manifest(name: str, packings: dict[Split, Packing]) -> dict[str, Any]:
    splits, sizes = {}, {}
    for split, packing in packings.items():
        for file in (f"{split}.u8", f"{split}.safetensors"):
            sizes[file] = (packing.folder / file).stat().st_size
        splits[split.value] = {
            "count": len(packing.data),
            "shape": packing.shape,
            "blocks": packing.blocks,
            "labels": digest_of((packing.folder / f"{split}.safetensors").read_bytes()),
            "unreadable": [[path, why] for _, path, why in packing.unreadable],
        }
    first = next(iter(packings.values())).data
    set_aside = dict(packings[Split.TRAIN].data.set_aside.counts) if Split.TRAIN in packings else {}
    return {
        "format": FORMAT,
        "dataset": name,
        "classes": first.classes,
        "set_aside": set_aside,
        "listed": [list(one) for one in packings[Split.TRAIN].data.set_aside.listed] if Split.TRAIN in packings else [],
        "splits": splits,
        "sizes": sizes,
    }


def from_command(
    name: str,
    options: Sequence[str],
    out: Path | None,
    root: Path | None,
    workers: int | None,
    bad_files: float,
    verify: bool,
    progress: Progress,
) -> dict[str, Any]:
    """`mtl pack`: arguments as they are on the command line, and what was packed, or found to be right.

    Raises:
        MTLError: as `pack` says, or the packed folder is damaged.
    """
    place = data_root(root)
    out = out if out is not None else place / "packed" / name
    if verify:
        if wrong := damaged(out):
            raise DataError(f"packed folder {str(out)!r} is damaged: {'; '.join(wrong[:3])}")
        return {"folder": str(out), "damaged": 0, **_about(read_manifest(out))}
    try:
        chosen = choose_dataset(name, override({}, options)).options
    except ValidationError as error:
        raise ConfigError(problems(error), source=f"options of {name}") from None
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    with Decoders(min(16, usable_cores()) if workers is None else workers) as decoders:
        return {"folder": str(out), **pack(name, chosen, place, out, decoders, bad_files, progress)}
