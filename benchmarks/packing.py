"""How fast is a dataset packed and read, what does it hold in memory, and does a killed packing go on?

    python -m benchmarks.packing [--images N] [--workers N]

Draws JPEG files of 160 x 128 pixels in a temporary folder, 500 different ones written again and again under names of their own.
Three processes pack them to 64 x 64: one that is left alone; and one that is killed by SIGKILL half way, and its successor.
Both folders are compared byte by byte. Then passes over the packed images in a random order, batches of 128, beside the same
selection from a tensor in memory. Memory is what the packing processes hold, shared memory counted once and pages of files not
at all, the most in samples about ten times a second. Files are in the page cache: a disk is not measured.
"""

from __future__ import annotations

import argparse
import filecmp
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.decoding import draw
from mtl.batches import batch_bounds
from mtl.data import Split
from mtl.hardware import device_name, usable_cores
from mtl.packed import PackedOptions, packed
from mtl.seeding import permutation

RESULTS = Path(__file__).parent / "results"
DISTINCT, HEIGHT, WIDTH, SIZE, BATCH = 500, 128, 160, 64, 128
PASSES = 5


def write_files(folder: Path, count: int) -> float:
    """Megabytes of a file, on average."""
    random, files = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        stream = io.BytesIO()
        Image.fromarray(draw(random)[:HEIGHT, :WIDTH]).save(stream, "JPEG", quality=85)
        files.append(stream.getvalue())
    for i in range(count):
        place = folder / "train" / f"class{i % 10}" / f"{i // 1000:04}"
        if i < 10_000 or i % 1000 < 10:
            place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:07}.jpg").write_bytes(files[i % DISTINCT])
    return sum(map(len, files)) / DISTINCT / 1e6


def memory_of(pid: int) -> int:
    """Bytes that a process and those below it hold, what they share counted once, without pages of files."""
    pids, kilobytes = {pid}, 0
    for one in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            parent = int(Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent not in pids and one not in pids:
                continue
            pids.add(one)
            fields = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it ended meanwhile
            continue
        held = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in fields)}
        kilobytes += held["Pss_Anon"] + held["Pss_Shmem"]
    return 1024 * kilobytes


def run(root: Path, out: str, workers: int, kill_at: int | None = None) -> dict[str, float]:
    """Pack in a process of its own, killed when so many blocks are noted; seconds and bytes of memory."""
    command = [
        sys.executable,
        "-m",
        "mtl",
        "pack",
        "image_folders",
        "folder=toys",
        f"size=[{SIZE},{SIZE}]",
        "--data",
        str(root),
    ]
    command += ["--out", str(root / out), "--workers", str(workers), "--json"]
    started, most = time.perf_counter(), 0
    notes = root / out / "train.blocks"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            if kill_at is not None and notes.is_file() and notes.read_bytes().count(b"\n") >= kill_at:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.1)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        raise SystemExit(f"packing ended with {process.returncode}: {said}")
    return {"seconds": round(time.perf_counter() - started, 2), "memory": most}


def passes(root: Path, out: str) -> dict[str, Any]:
    """Images per second of passes over what is packed and over a tensor in memory, in turn; and the memory that they took."""
    data = packed(Split.TRAIN, root, PackedOptions(folder=Path(out)))
    assert data is not None
    images = data.placed("cpu")
    in_memory = images.pixels.clone()
    before = memory_of(os.getpid())
    rates: dict[str, list[float]] = {"packed": [], "in memory": []}
    for turn in range(PASSES + 1):
        order = permutation(len(images), 0, "packing", turn)
        bounds = batch_bounds(len(images), BATCH)
        started = time.perf_counter()
        count = sum(len(batch) for batch, _ in images.batches(bounds, order))
        middle = time.perf_counter()
        for start, stop in bounds:
            in_memory.index_select(0, order[start:stop])
        if turn:
            rates["packed"].append(round(count / (middle - started)))
            rates["in memory"].append(round(count / (time.perf_counter() - middle)))
    return {"rates": rates, "memory": memory_of(os.getpid()) - before}


def measure(count: int, workers: int) -> dict[str, Any]:
    """All of it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        megabytes = write_files(root / "toys", count)
        whole = run(root, "whole", workers)
        print("whole", whole, flush=True)
        blocks = -(-count // 512)
        cut = run(root, "cut", workers, kill_at=blocks // 2)
        noted = (root / "cut" / "train.blocks").read_bytes().count(b"\n")
        rest = run(root, "cut", workers)
        print("cut", cut, noted, "of", blocks, rest, flush=True)
        names = [name for name in os.listdir(root / "whole") if name != ".lock"]
        _, differ, missing = filecmp.cmpfiles(root / "whole", root / "cut", names, shallow=False)
        read = passes(root, "whole")
        size = sum((root / "whole" / name).stat().st_size for name in names)
    return {
        "torch": torch.__version__,
        "cpu": device_name(torch.device("cpu")),
        "cores": usable_cores(),
        "workers": workers,
        "images": count,
        "megabytes_per_file": round(megabytes, 4),
        "packed_bytes": size,
        "whole": whole,
        "cut": {**cut, "blocks": blocks, "noted": noted},
        "rest": rest,
        "different_files": len(differ) + len(missing),
        "read": read,
    }


def render() -> str:
    """The recorded results in words."""
    r = json.loads((RESULTS / "packing.json").read_text())
    packed_rate, memory_rate = (statistics.median(r["read"]["rates"][way]) for way in ("packed", "in memory"))
    low, high = (ends(r["read"]["rates"]["packed"]) for ends in (min, max))
    mega = 1e6
    lines = [
        "| | |",
        "|---|---:|",
        f"| images, 64 x 64 from JPEG files of {1e3 * r['megabytes_per_file']:.1f} kB | {r['images']:,} |",
        f"| packed, read back and verified, start of the program included | {r['whole']['seconds']:.0f} s, "
        f"{r['images'] / r['whole']['seconds']:,.0f} images/s |",
        f"| memory of all packing processes | {r['whole']['memory'] / mega:,.0f} MB |",
        f"| SIGKILL when {r['cut']['noted']} of {r['cut']['blocks']} blocks were noted, then the same command again | "
        f"{r['rest']['seconds']:.0f} s more |",
        f"| files that differ from those of the packing that was left alone | {r['different_files']} |",
        f"| read in a random order, batches of {BATCH} (median of {PASSES} passes, range) | {packed_rate:,.0f} images/s "
        f"({low:,.0f} to {high:,.0f}) |",
        f"| the same selection from a tensor in memory | {memory_rate:,.0f} images/s |",
        f"| memory that the passes took, of {r['packed_bytes'] / mega:,.0f} MB packed | {r['read']['memory'] / mega:,.0f} MB |",
    ]
    about = f"{r['cores']} cores of {r['cpu']}, {r['workers']} workers, torch {r['torch']}."
    return "\n".join(lines) + f"\n\n{about}"


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="(default: one a core)")
    parser.add_argument("--out", type=Path, default=RESULTS / "packing.json", help="(default: %(default)s)")
    args = parser.parse_args()
    args.out.write_text(json.dumps(measure(args.images, args.workers), indent=1) + "\n")


if __name__ == "__main__":
    main()
