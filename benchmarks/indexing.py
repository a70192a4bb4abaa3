"""How long does a dataset of a million files take until it can be trained on, and what does its index hold?

    python -m benchmarks.indexing [--images N]

In a temporary folder: VGGFace2's layout with 9,131 identities, `identity_meta.csv` in the distributed form with every oddity
that is known of it (a comma and a space, quoted names with commas, quotes and letters of every kind, an age, stray commas, no
value, a second row), and a table of ages with a row per image; and that table for `csv_images`. Files are links to a few. Each
is loaded in a process of its own; memory is what that process holds more than before, pages of files not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import mtl
from benchmarks.packing import memory_of
from mtl.choices import choose_dataset
from mtl.files import ImageFiles
from mtl.hardware import device_name, usable_cores
from mtl.registry import DATASETS

RESULTS = Path(__file__).parent / "results"
IDENTITIES, TRAINING = 9131, 8631
NAMES = ("Åsa Öberg", "Smith, John", 'Ann ""Bo"" Lee', "O'Neil", "佐藤 花子", "Žižek, S., Jr.", "X Æ A-12", "José  Núñez")
LINKS = 50_000
"""That one file may have; some file systems take no more than 65,000."""


def write_identities(file: Path, ages: bool) -> None:
    """As it is distributed, 9,131 lines of identities under a header, and a second row of one of them."""
    random = np.random.default_rng(0)
    lines = ["Class_ID, Name, Sample_Num, Flag, Gender" + ", Age" * ages]
    for i in range(IDENTITIES):
        gender = "mf"[random.integers(2)] if i % 1000 != 7 else ""
        fields = [f"n{i:06}", f'"{NAMES[i % len(NAMES)]} {i}"', str(random.integers(80, 600)), str(int(i < TRAINING)), gender]
        fields += [f"{random.uniform(16, 80):.1f}" if i % 500 else "unknown"] if ages else []
        lines.append(", ".join(fields) + "," * (i % 97 == 0))
    lines.append('n000000, "again", 1, 1, m' + ", 30" * ages)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_faces(folder: Path, count: int) -> None:
    """Links to a few files, and a table of ages."""
    folder.mkdir()
    write_identities(folder / "identity_meta.csv", ages=True)
    sources = []
    for i in range(-(-count // LINKS)):
        sources.append(folder / f"source{i}.bin")
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(sources[-1], "JPEG")
    random, each = np.random.default_rng(0), -(-count // IDENTITIES)
    with open(folder / "ages.csv", "w") as table:
        table.write("path,age\n")
        made = 0
        for i in range(IDENTITIES):
            place = folder / ("train" if i < TRAINING else "test") / f"n{i:06}"
            place.mkdir(parents=True)
            for j in range(min(each, count - made)):
                name = f"{j:04}_01.jpg"
                os.link(sources[made // LINKS], place / name)
                table.write(f"n{i:06}/{name},{random.integers(16, 80)}\n")
                made += 1


def loaded(name: str, root: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load the training and the test split; how long that took, and what they hold."""
    chosen = choose_dataset(name, options).options
    before, started = memory_of(os.getpid()), time.perf_counter()
    parts: dict[str, ImageFiles] = {
        split.value: DATASETS.get(name).create(split, root, options=chosen) for split in (mtl.Split.TRAIN, mtl.Split.TEST)
    }
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 2),
        "memory": memory_of(os.getpid()) - before,
        "images": {split: len(part) for split, part in parts.items()},
        "labelled": {split: labelled(part) for split, part in parts.items()},
        "index": sum(map(held, parts.values())),
        "set_aside": dict(parts["train"].set_aside.counts),
    }


def labelled(part: ImageFiles) -> dict[str, int]:
    """Target -> how many images have a label."""
    return {name: int(part.valid[name].sum()) if name in part.valid else len(part) for name in part.labels}


def held(part: ImageFiles) -> int:
    """Bytes of its paths, labels, masks and groups."""
    paths = part.images.paths
    tensors = [*part.labels.values(), *part.valid.values(), *([] if part.groups is None else [part.groups])]
    return len(paths._text) + paths._starts.nbytes + paths._lengths.nbytes + sum(tensor.nbytes for tensor in tensors)


def load(name: str, root: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.indexing", "--load", name, str(root), json.dumps(options)]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(name, found, flush=True)
    return found


def measure(count: int) -> dict[str, Any]:
    """Both."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_faces(root / "vggface2", count)
        table = {"file": "ages.csv", "age": "age"}
        faces = load("vggface2", root, {"size": [64, 64], "images": table})
        columns = {"file": "vggface2/ages.csv", "folder": "vggface2/train", "size": [64, 64], "numbers": ["age"], "bad": 0.2}
        csv_images = load("csv_images", root, columns)
    return {
        "torch": torch.__version__,
        "cpu": device_name(torch.device("cpu")),
        "cores": usable_cores(),
        "identities": IDENTITIES,
        "loaded": {"vggface2": faces, "csv_images": csv_images},
    }


def render() -> str:
    """The recorded results as a table."""
    recorded = json.loads((RESULTS / "indexing.json").read_text())
    lines = [
        "| dataset | images | until it is loaded | index, bytes a row | memory of the process, bytes a row |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in recorded["loaded"].items():
        images = sum(found["images"].values())
        cells = (
            f"`{name}`",
            f"{images:,}",
            f"{found['seconds']:.1f} s",
            *(f"{found[of] / images:.0f}" for of in ("index", "memory")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name, found in recorded["loaded"].items():
        labels = ", ".join(f"{target} of {n:,}" for target, n in found["labelled"]["train"].items())
        aside = "; ".join(f"{count:,} {why}" for why, count in found["set_aside"].items()) or "nothing"
        lines.append(f"- `{name}`, train: {found['images']['train']:,} images, {labels}; set aside: {aside}.")
    lines.append(f"\n{recorded['cores']} cores of {recorded['cpu']}, torch {recorded['torch']}; one process.")
    return "\n".join(lines)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "indexing.json", help="(default: %(default)s)")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        name, root, options = args.load
        print(json.dumps(loaded(name, Path(root), json.loads(options))))
        return
    args.out.write_text(json.dumps(measure(args.images), indent=1) + "\n")


if __name__ == "__main__":
    main()
