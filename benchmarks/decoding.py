"""How fast are image files read, against the bare decoder on the same cores?

    python -m benchmarks.decoding [--images N] [--rounds N] [--workers N] [--out FILE.json]

Draws JPEG files of 500 x 375 pixels, quality 90, in a temporary folder. Bare: one process a core, each reading its share of the
files with `open().read()` and decoding them with `torchvision.io.decode_jpeg`, nothing else; and the same with the operator
under that function, which does not warn that it is deprecated. Against it a pass of `mtl.ImageFiles` through its worker
processes, in a random order, batches of 64 that the main process takes and drops: at the size of the files, and resized; and
the same images, read by the same function, through `torch.utils.data.DataLoader` with as many workers. Rounds are interleaved,
and the first is not counted. Files are in the page cache: a disk is not measured.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mtl.batches import batch_bounds
from mtl.decoding import Decoders
from mtl.files import ImageFiles, Reading
from mtl.hardware import device_name, usable_cores
from mtl.images import read_image
from mtl.seeding import permutation

RESULTS = Path(__file__).parent / "results"
HEIGHT, WIDTH = 375, 500
BATCH = 64
DISTINCT = 500
"""Pictures that are drawn; the files repeat them."""
BARE, OPERATOR = "bare", "bare, the operator alone"


def draw(random: np.random.Generator) -> NDArray[np.uint8]:
    """A picture whose spectrum falls as that of a photo does, (H, W, 3): noise of six scales, and a little of the finest."""
    picture = 128 + random.normal(0, 4, (HEIGHT, WIDTH, 3))
    for octave in range(1, 7):
        coarse = torch.from_numpy(random.normal(0, 60 / 1.5**octave, (1, 3, 2**octave + 1, 2**octave + 1)))
        picture += F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return picture.clip(0, 255).astype(np.uint8)


def write_files(folder: Path, count: int) -> list[Path]:
    """JPEG files, `DISTINCT` different ones."""
    random, pictures = np.random.default_rng(0), []
    for _ in range(min(count, DISTINCT)):
        encoded = io.BytesIO()
        Image.fromarray(draw(random)).save(encoded, "JPEG", quality=90)
        pictures.append(encoded.getvalue())
    paths = [folder / f"{i:06}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(pictures[i % len(pictures)])
    return paths


def decode_bare(paths: list[str], commands: Connection) -> None:
    """What a bare process does at each command: every file once. Answers with the seconds that took."""
    from torchvision.io import ImageReadMode, decode_jpeg

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        BARE: lambda data: decode_jpeg(data, ImageReadMode.RGB),
        OPERATOR: lambda data: torch.ops.image.decode_jpeg(data, ImageReadMode.RGB.value, False),
    }
    commands.send(0.0)
    while way := commands.recv():  # empty when all is measured
        decode = ways[way]
        started = time.perf_counter()
        for path in paths:
            with open(path, "rb") as file:
                data = bytearray(file.read())
            decode(torch.frombuffer(data, dtype=torch.uint8))
        commands.send(time.perf_counter() - started)


class Bare:
    """Processes that only decode."""

    def __init__(self, paths: list[Path], processes: int) -> None:
        self.ends, self.counts = [], []
        for i in range(processes):
            ours, theirs = get_context("spawn").Pipe()
            share = [str(path) for path in paths[i::processes]]
            get_context("spawn").Process(target=decode_bare, args=(share, theirs), daemon=True).start()
            self.ends.append(ours)
            self.counts.append(len(share))
        for end in self.ends:
            end.recv()

    def __call__(self, way: str) -> float:
        """Images per second: the sum of what each process reached, so that none is slowed by waiting for another."""
        for end in self.ends:
            end.send(way)
        return float(sum(count / end.recv() for count, end in zip(self.counts, self.ends, strict=True)))

    def close(self) -> None:
        """End the processes."""
        for end in self.ends:
            end.send("")


def loader(paths: list[Path], size: tuple[int, int], decoders: Decoders) -> Callable[[int], float]:
    """A pass over the files through worker processes; gives images per second."""
    images = ImageFiles(paths, {}, size=size).placed("cpu", Reading(decoders))

    def measure(round_: int) -> float:
        order = permutation(len(images), 0, "decoding", round_)
        started = time.perf_counter()
        seen = sum(len(batch) for batch, _ in images.batches(batch_bounds(len(images), BATCH), order))
        return seen / (time.perf_counter() - started)

    return measure


class Read(Dataset[Tensor]):
    """Image files as a `DataLoader` wants them."""

    def __init__(self, paths: list[Path], size: tuple[int, int]) -> None:
        self.paths, self.size = [str(path) for path in paths], size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return read_image(self.paths[i], 3, self.size)


def data_loader(paths: list[Path], size: tuple[int, int], workers: int) -> Callable[[int], float]:
    """A pass over the files through torch's own loader, whose workers stay from pass to pass; gives images per second."""
    import torchvision.io  # noqa: F401  registers the decoder that `read_image` uses

    loader = DataLoader(Read(paths, size), BATCH, shuffle=True, num_workers=workers, persistent_workers=True, prefetch_factor=4)

    def measure(round_: int) -> float:
        started = time.perf_counter()
        seen = sum(len(batch) for batch in loader)
        return seen / (time.perf_counter() - started)

    return measure


def measure(count: int, rounds: int, workers: int) -> dict[str, Any]:
    """Images per second of every way, round after round."""
    sizes = {"as the files are": (HEIGHT, WIDTH), "to 224 x 224": (224, 224), "to 64 x 64": (64, 64)}
    with tempfile.TemporaryDirectory() as folder, Decoders(workers) as decoders:
        paths = write_files(Path(folder), count)
        bare = Bare(paths, usable_cores())
        ways = {f"`ImageFiles`, {name}": loader(paths, size, decoders) for name, size in sizes.items()}
        ways |= {f"`DataLoader`, {name}": data_loader(paths, size, workers) for name, size in sizes.items()}
        rates: dict[str, list[float]] = {name: [] for name in (BARE, OPERATOR, *ways)}
        for i in range(rounds + 1):
            found = {**{name: bare(name) for name in (BARE, OPERATOR)}, **{name: way(i) for name, way in ways.items()}}
            if i:
                print(", ".join(f"{name} {rate:,.0f}" for name, rate in found.items()), flush=True)
                for name, rate in found.items():
                    rates[name].append(rate)
        bare.close()
        megabytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e6
    return {
        "torch": torch.__version__,
        "cpu": device_name(torch.device("cpu")),
        "cores": usable_cores(),
        "workers": workers,
        "images": count,
        "megabytes_per_file": round(megabytes, 4),
        "rates": {name: [round(rate, 1) for rate in of] for name, of in rates.items()},
    }


def table(recorded: dict[str, Any]) -> str:
    """One line a way: median and range of the rate, and of its ratio to the bare one of the same round."""
    lines = ["| | images/s, median (range) | ratio to bare, median (range) |", "|---|---:|---:|"]
    bare = recorded["rates"][BARE]
    for name, rates in recorded["rates"].items():
        ratios = [rate / of_round for rate, of_round in zip(rates, bare, strict=True)]
        spread = "" if name == BARE else f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        lines.append(f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {spread} |")
    return "\n".join(lines)


def render() -> str:
    """The table of the recorded results."""
    recorded = json.loads((RESULTS / "decoding.json").read_text())
    return (
        table(recorded) + f"\n\nn = {len(recorded['rates'][BARE])} rounds of {recorded['images']:,} files of "
        f"{1000 * recorded['megabytes_per_file']:.0f} kB, interleaved, after one that is not counted; {recorded['workers']} "
        f"workers on {recorded['cores']} cores of {recorded['cpu']}, torch {recorded['torch']}.\n"
    )


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    recorded = measure(given.images, given.rounds, given.workers)
    print(table(recorded))
    if given.out:
        given.out.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
