"""Rows 16, 17 and 23: images, archives and IDX files as anybody may have made them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.endurance.rows import Cases, row

DECODED, REFUSED = "decoded", "refused"


def picture(height: int = 24, width: int = 32) -> np.ndarray[Any, Any]:
    """Smooth, in colour, the same every time."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.stack([255 * x, 255 * y, 255 * (1 - x)], axis=2).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, body: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def hostile() -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, what must become of them)."""
    rgb = Image.fromarray(picture())
    jpeg, whole = encoded(rgb, "JPEG", quality=95), encoded(rgb, "PNG")
    files: dict[str, tuple[bytes, str]] = {
        "plain.jpg": (jpeg, DECODED),
        "plain.png": (whole, DECODED),
        "jpeg-called.png": (jpeg, DECODED),
        "png-called.jpg": (whole, DECODED),
        "grey.jpg": (encoded(rgb.convert("L"), "JPEG"), DECODED),
        "cmyk.jpg": (encoded(rgb.convert("CMYK"), "JPEG"), DECODED),
        "progressive.jpg": (encoded(rgb, "JPEG", progressive=True), DECODED),
        "alpha.png": (encoded(rgb.convert("RGBA"), "PNG"), DECODED),
        "palette.png": (encoded(rgb.convert("P"), "PNG"), DECODED),
        "palette-alpha.png": (encoded(rgb.convert("RGBA").quantize(16), "PNG", transparency=3), DECODED),
        "sixteen.png": (encoded(Image.fromarray(picture()[..., 0].astype(np.uint16) * 257), "PNG"), DECODED),
        "bilevel.png": (encoded(rgb.convert("1"), "PNG"), DECODED),
        "animated.png": (encoded(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)]), DECODED),
        "one-pixel.png": (encoded(Image.fromarray(picture(1, 1)), "PNG"), DECODED),
        "one-pixel.jpg": (encoded(Image.fromarray(picture(1, 1)), "JPEG"), DECODED),
        "very-wide.jpg": (encoded(Image.fromarray(picture(1, 65500)), "JPEG"), DECODED),
        "very-tall.png": (encoded(Image.fromarray(picture(65500, 1)), "PNG"), DECODED),
        "trailing.jpg": (jpeg + b"x" * 1000, DECODED),
        "broken-exif.jpg": (encoded(rgb, "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"), DECODED),
        "zero-byte.jpg": (b"", REFUSED),
        "html.jpg": (b"<!DOCTYPE html><title>404 Not Found</title>", REFUSED),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], REFUSED),
        "header-only.jpg": (jpeg[:20], REFUSED),
        "truncated.png": (whole[: len(whole) // 2], REFUSED),
        "bad-checksum.png": (whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], REFUSED),
        "animated.gif": (encoded(rgb, "GIF", save_all=True, append_images=[rgb]), REFUSED),
        "tiff.jpg": (encoded(rgb, "TIFF"), REFUSED),
        "webp.jpg": (encoded(rgb, "WEBP"), REFUSED),
        "bomb.png": (png(20_000, 20_000, zlib.compress(bytes(1 << 20))), REFUSED),
        "bomb.jpg": (jpeg.replace(struct.pack(">HH", 24, 32), struct.pack(">HH", 60_000, 60_000), 1), REFUSED),
        "no-size.png": (png(0, 5), REFUSED),
        "huge-chunk.png": (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR" + bytes(30), REFUSED),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"exif-{orientation}.png"] = (encoded(rgb, "PNG", exif=exif), DECODED)
    return files


CHILD = """
import hashlib, resource, sys
from pathlib import Path
import torch, torchvision.io
from mtl.errors import DataError
from mtl.images import read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        image = read_image(path, 3, (24, 32))
        print("decoded", path.name, hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:12])
    except DataError as error:
        print("refused", path.name, error)
print("memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@row(16, "hostile images are contained")
def images_are_contained(folder: Path, short: bool) -> Cases:
    cases, files = Cases(), hostile()
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    expected = {**{name: kind for name, (_, kind) in files.items()}, "pipe.jpg": REFUSED, "folder.jpg": REFUSED}
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, timeout=120, check=False)
    cases.check("the child ends by itself", done.returncode == 0, done.stderr[-300:])
    said = {line.split()[1]: line.split() for line in done.stdout.splitlines() if line.split()[0] in (DECODED, REFUSED)}
    for name, kind in expected.items():
        cases.check(name, name in said and said[name][0] == kind, said.get(name))
        if kind == REFUSED and name in said:
            cases.check(f"{name}: a reason without a path", len(said[name]) > 2 and str(folder) not in " ".join(said[name]))
    digest = hashlib.sha256(np.ascontiguousarray(picture().transpose(2, 0, 1)).tobytes()).hexdigest()[:12]
    for name in ("plain.png", "png-called.jpg", "alpha.png", "animated.png", "exif-1.png"):
        cases.check(f"{name} shows what was drawn", name in said and said[name][2] == digest, said.get(name))
    cases.check(
        "one EXIF orientation, one picture",
        len({said[f"exif-{i}.png"][2] for i in range(1, 9) if f"exif-{i}.png" in said}) == 8,
    )
    memory = next((int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("memory")), 1 << 40)
    cases.check("memory grows by less than 300 MB", memory < 300_000, f"{memory} kB")
    cases.notes.append(f"{len(expected)} files, {memory / 1000:.0f} MB more memory")
    return cases


FUZZ = """
import resource, sys, time
from pathlib import Path
import numpy as np
import torch, torchvision.io
from mtl.errors import MTLError
from mtl.images import read_image
sys.path.insert(0, sys.argv[3])
from tests.endurance.images import mutated, read_idx
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
kind, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[4])
slowest, outcomes = 0.0, {"read": 0, "refused": 0}
for i, data in enumerate(mutated(kind, count)):
    path = folder / f"fuzzed.{kind}"
    path.write_bytes(data)
    started = time.perf_counter()
    try:
        read_idx(folder, data) if kind == "idx" else read_image(path, 3, (16, 16))
        outcomes["read"] += 1
    except MTLError:
        outcomes["refused"] += 1
    slowest = max(slowest, time.perf_counter() - started)
print(outcomes["read"], outcomes["refused"], slowest)
"""


def mutated(kind: str, count: int) -> Any:
    """A good file with some bytes changed, cut, doubled or swapped; the same every time."""
    random = np.random.default_rng(0)
    good = np.frombuffer(idx(6) if kind == "idx" else encoded(Image.fromarray(picture()), "JPEG"), np.uint8)
    for _ in range(count):
        data = good.copy()
        head = min(len(data), 64 if random.random() < 0.5 else len(data))
        where = random.integers(0, head, random.integers(1, 8))
        data[where] = random.integers(0, 256, len(where))
        text = data.tobytes()
        if random.random() < 0.3:
            text = text[: random.integers(0, len(text))]
        elif random.random() < 0.1:
            text = text + text
        yield text


def idx(count: int) -> bytes:
    """Images of an IDX file: magic, dimensions, pixels."""
    return struct.pack(">HBBIII", 0, 8, 3, count, 28, 28) + (bytes(range(256)) * (count * 784 // 256 + 1))[: count * 784]


def read_idx(folder: Path, images: bytes) -> None:
    """Read a folder of Fashion-MNIST whose training images are these bytes."""
    from mtl_tasks.fashion import read_fashion_mnist

    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes(struct.pack(">HBBI", 0, 8, 1, 6) + bytes([0, 1, 2, 3, 4, 5]))
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        (raw / name).write_bytes(images)
    read_fashion_mnist(folder, train=True)


@row(17, "decoders are fuzzed")
def decoders_are_fuzzed(folder: Path, short: bool) -> Cases:
    cases = Cases()
    for kind, share in (("jpg", 0.8), ("idx", 0.2)):
        count = int(share * (250 if short else 10_000))
        command = [sys.executable, "-c", FUZZ, kind, str(count), str(Path(__file__).parents[2]), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        words = done.stdout.split()
        if done.returncode or len(words) != 3:
            cases.check(f"{kind}: ended with {done.returncode}", False, done.stderr[-400:])
            continue
        tried = int(words[0]) + int(words[1])
        cases.held += tried
        cases.check(f"{kind}: all were tried", tried == count, tried)
        cases.check(f"{kind}: some are still whole", int(words[0]) > 0, words)
        cases.check(f"{kind}: none took 2 s", float(words[2]) < 2, words[2])
        cases.notes.append(f"{kind}: {words[0]} read, {words[1]} refused, slowest {1000 * float(words[2]):.0f} ms")
    return cases


@row(23, "archives and IDX files are safe")
def archives_are_safe(folder: Path, short: bool) -> Cases:
    from mtl_tasks import vectors

    import mtl

    cases = Cases()

    def refused(name: str, action: Any, message: str = "") -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            action()
        except mtl.MTLError as error:
            cases.check(name, message in str(error), str(error)[:200])
        except Exception as error:
            cases.check(name, False, f"{type(error).__name__}: {error}"[:200])
        else:
            cases.check(name, False, "it was read")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
        cases.check(f"{name}: memory", grown < 300, f"{grown:.0f} MB")

    for name, header in {
        "IDX with another magic number": struct.pack(">HBBIII", 7, 8, 3, 6, 28, 28),
        "IDX of an unknown type": struct.pack(">HBBIII", 0, 99, 3, 6, 28, 28),
        "IDX of 2^31 x 2^31": struct.pack(">HBBIII", 0, 8, 3, 2**31 - 1, 2**31 - 1, 28),
        "IDX that says more than it holds": struct.pack(">HBBIII", 0, 8, 3, 60_000, 28, 28),
        "IDX with no dimensions": struct.pack(">HBB", 0, 8, 0),
        "empty IDX": b"",
    }.items():
        refused(name, lambda header=header: read_idx(folder / "idx", header + bytes(100 if header else 0)))
    other = folder / "gz"
    raw = other / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    bomb = gzip.compress(bytes(200_000_000 if not short else 20_000_000))
    for name in (
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ):
        (raw / name).write_bytes(bomb)
    from mtl_tasks.fashion import read_fashion_mnist

    refused("gzip bomb in place of Fashion-MNIST", lambda: read_fashion_mnist(other, train=True))
    unpacked = sum(file.stat().st_size for file in raw.iterdir() if file.suffix != ".gz")
    cases.check("of the bomb nothing was unpacked", unpacked == 0, unpacked)
    before = set(folder.rglob("*"))
    np.savez_compressed(folder / "bomb.npz", features=np.zeros((200, 100_000)))
    limit, vectors.LARGEST = vectors.LARGEST, 1_000_000
    refused("npz bomb", lambda: vectors.read_arrays(folder / "bomb.npz"), "unpacks to")
    vectors.LARGEST = limit
    for name, data in {"npz that is none": b"PK\x03\x04rubbish", "npz cut": (folder / "bomb.npz").read_bytes()[:200]}.items():
        (folder / "bad.npz").write_bytes(data)
        refused(name, lambda: vectors.read_arrays(folder / "bad.npz"), "cannot read")
    for name, data in {
        "safetensors with a header of 2^60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
        "safetensors that overlap": _overlapping(),
        "safetensors cut": _overlapping()[:20],
    }.items():
        (folder / "bad.safetensors").write_bytes(data)
        refused(name, lambda: vectors.read_arrays(folder / "bad.safetensors"), "cannot read")
    import zipfile

    with zipfile.ZipFile(folder / "slip.npz", "w") as archive:
        stream = io.BytesIO()
        np.save(stream, np.zeros((4, 2)))
        archive.writestr("../../outside.npy", stream.getvalue())
    refused("npz whose member leads out", lambda: _vectors_of(folder / "slip.npz"), "no array")
    written = (
        set(folder.rglob("*")) - before - {folder / name for name in ("bomb.npz", "bad.npz", "bad.safetensors", "slip.npz")}
    )
    cases.check("nothing was written outside", not written and not (folder.parent / "outside.npy").exists(), written)
    return cases


def _vectors_of(file: Path) -> None:
    from mtl_tasks import vectors

    import mtl

    vectors.vectors(mtl.Split.TRAIN, file.parent, vectors.VectorsOptions(file=Path(file.name)))


def _overlapping() -> bytes:
    tensors = {
        name: {"dtype": "F32", "shape": [2, 2], "data_offsets": at} for name, at in (("features", [0, 16]), ("x", [8, 24]))
    }
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + bytes(24)
