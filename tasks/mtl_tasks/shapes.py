"""`shapes`: small drawn pictures with several labels each, for use without any download.

Every picture shows one to four copies of one shape, in one colour and one size, partly hidden by each other, over a shaded
background with clutter and noise. Tasks: kind of shape, colour and size (classification), count (ordinal), radius (regression)
and four traits that may come together (multi-label). They are not independent: some kinds prefer some
colours, and many shapes are rarely large, so that one task's features tell something about another's label. They are not
trivial either: colours overlap, small shapes are a few pixels wide, and copies occlude each other.

Synthetic: nothing measured on it says anything about photographs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

import mtl

KINDS = ("disc", "square", "triangle", "cross", "ring", "star")
COLOURS = ("red", "orange", "green", "cyan", "blue", "purple")
COUNTS = ("one", "two", "three", "four")
SIZES = ("small", "medium", "large")
TRAITS = ("warm", "round", "lit from left", "lit from above")

SIDE = 32
"""Height and width of a picture, pixels."""
RGB = np.array([[200, 50, 50], [205, 120, 45], [70, 150, 60], [55, 150, 165], [60, 85, 190], [130, 65, 170]], np.float32)
RADIUS = np.array([4.0, 5.2, 6.8], np.float32)
"""Mean radius of each size, pixels."""
TILT = 0.35
"""Shapes lean by up to this, radians."""
CHUNK = 1024

Array = NDArray[np.floating]


class ShapesOptions(mtl.Options):
    """How much is drawn, and how hard it is to see."""

    train: int = Field(8000, ge=2)
    """Pictures in the training split."""
    test: int = Field(2000, ge=1)
    """Pictures in the test split."""
    noise: float = Field(14.0, ge=0)
    """Standard deviation of the noise on each pixel, grey levels of 255."""
    seed: int = Field(0, ge=0)
    """Of everything that is drawn."""


@mtl.register_dataset("shapes", options=ShapesOptions)
def shapes(split: mtl.Split, root: Path, options: ShapesOptions) -> mtl.ArrayDataset:
    """uint8 (N, 3, 32, 32), the same for the same options on every machine with the same NumPy; nothing is read or written.

    Targets: `kind` (0 to 5), `colour` (0 to 5), `count` (0 to 3, one less than the number), `size` (0 to 2), `radius` (pixels)
    and `traits` (N, 4): a warm colour, a round shape, a background that is brighter on the left, one brighter at the top.
    """
    count, stream = (options.train, 0) if split == mtl.Split.TRAIN else (options.test, 1)
    random = np.random.Generator(np.random.PCG64([options.seed, stream]))
    labels = draw_labels(count, random)
    pieces = [
        paint({name: label[i : i + CHUNK] for name, label in labels.items()}, options.noise, random)
        for i in range(0, count, CHUNK)
    ]
    images, radius, ramp = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    warm, round_ = np.isin(labels["colour"], (0, 1, 5)), np.isin(labels["kind"], (0, 4))
    traits = np.stack([warm, round_, ramp[:, 0] < 0, ramp[:, 1] < 0], axis=1)
    return mtl.ArrayDataset(images, {**labels, "radius": radius, "traits": traits})


def draw_labels(n: int, random: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """Labels of `n` pictures: half of the colours follow the kind, and size falls as count grows."""
    kind = random.integers(0, len(KINDS), n)
    free = random.integers(0, len(COLOURS), n)
    colour = np.where(random.random(n) < 0.5, (kind + random.integers(0, 2, n)) % len(COLOURS), free)
    count = random.integers(0, len(COUNTS), n)
    large = random.random(n) < 0.45 - 0.1 * count
    size = np.where(large, 2, random.integers(0, 2, n))
    return {"kind": kind, "colour": colour, "count": count, "size": size}


def paint(
    labels: dict[str, NDArray[np.int64]], noise: float, random: np.random.Generator
) -> tuple[NDArray[np.uint8], Array, Array]:
    """Pictures (N, 3, 32, 32) of these labels, the radius of their shapes (N,), and how shading rises along x and y (N, 2)."""
    n = len(labels["kind"])
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    ramp = random.uniform(-2.0, 2.0, (n, 2, 1, 1)).astype(np.float32)
    shade = random.uniform(70, 150, (n, 1, 1)) + ramp[:, 0] * (x - SIDE / 2) + ramp[:, 1] * (y - SIDE / 2)
    canvas = np.repeat(shade[:, None], 3, axis=1).astype(np.float32)
    for _ in range(3):  # clutter: thin grey bars
        across, along = rotated(
            x, y, random.uniform(2, SIDE - 2, n), random.uniform(2, SIDE - 2, n), random.uniform(0, np.pi, n)
        )
        bar = coverage(np.maximum(np.abs(across) - 0.6, np.abs(along) - random.uniform(2, 5, (n, 1, 1))))
        blend(canvas, bar, np.repeat(random.uniform(30, 210, (n, 1)), 3, axis=1))
    tint = RGB[labels["colour"]] + random.normal(0, 14, (n, 3))
    radius = RADIUS[labels["size"]] * random.uniform(0.88, 1.12, n)
    places = spread(n, len(COUNTS), random)
    for i in range(len(COUNTS)):
        u, v = rotated(x, y, places[:, i, 0], places[:, i, 1], random.uniform(-TILT, TILT, n))
        mask = coverage(distance(u, v, radius[:, None, None], labels["kind"]))
        mask *= (labels["count"] >= i)[:, None, None]
        blend(canvas, mask, tint * random.uniform(0.85, 1.15, (n, 1)))
    canvas += random.normal(0, noise, canvas.shape).astype(np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8), radius, ramp[:, :, 0, 0]


def spread(n: int, places: int, random: np.random.Generator) -> Array:
    """(n, places, 2) centres, each the one of six candidates farthest from those before: few shapes are hidden whole."""
    margin = 6.0
    centres = random.uniform(margin, SIDE - margin, (n, 1, 2))
    for _ in range(places - 1):
        candidates = random.uniform(margin, SIDE - margin, (n, 6, 2))
        gap = np.linalg.norm(candidates[:, :, None] - centres[:, None], axis=-1).min(axis=2)
        best = candidates[np.arange(n), gap.argmax(axis=1)]
        centres = np.concatenate([centres, best[:, None]], axis=1)
    order = random.permuted(np.tile(np.arange(places), (n, 1)), axis=1)
    return np.take_along_axis(centres, order[..., None], axis=1)


def rotated(x: Array, y: Array, cx: Array, cy: Array, angle: Array) -> tuple[Array, Array]:
    """Coordinates (N, 32, 32) in frames centred at (cx, cy) and turned by `angle`, each (N,)."""
    dx, dy = x - cx[:, None, None], y - cy[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return (cos * dx + sin * dy).astype(np.float32), (cos * dy - sin * dx).astype(np.float32)


def distance(u: Array, v: Array, r: Array, kind: NDArray[np.int64]) -> Array:
    """Signed distance, about, to the outline of each picture's shape of radius r: negative inside."""
    length = np.hypot(u, v)
    side = 0.82 * r
    corner = np.maximum(np.abs(u), np.abs(v))
    slope = np.abs(u) * 0.866 + v * 0.5
    arm = np.minimum(np.maximum(np.abs(u) - 0.32 * r, np.abs(v) - r), np.maximum(np.abs(u) - r, np.abs(v) - 0.32 * r))
    petal = length - r * (0.72 + 0.36 * np.cos(5 * np.arctan2(v, u)))
    outlines = [
        length - 0.9 * r,
        corner - side,
        np.maximum(slope, -v) - 0.55 * r,
        arm,
        np.abs(length - 0.72 * r) - 0.26 * r,
        petal,
    ]
    result = np.empty_like(u)
    for i, outline in enumerate(outlines):
        result[kind == i] = np.broadcast_to(outline, u.shape)[kind == i]
    return result


def coverage(signed: Array) -> Array:
    """How much of a pixel lies inside an outline at this signed distance from it, 0 to 1."""
    return np.asarray(np.clip(0.5 - signed, 0, 1))


def blend(canvas: Array, mask: Array, colour: Array) -> None:
    """Paint `colour` (N, 3) over `canvas` (N, 3, 32, 32) where `mask` (N, 32, 32), in place."""
    canvas += mask[:, None] * (colour[:, :, None, None] - canvas)


@mtl.register_task("shapes_kind", options=mtl.ClassificationOptions)
def shapes_kind(options: mtl.ClassificationOptions) -> mtl.Task:
    """Which of six shapes."""
    return mtl.Task("shapes", "kind", mtl.Classification(KINDS, **dict(options)))


@mtl.register_task("shapes_colour", options=mtl.ClassificationOptions)
def shapes_colour(options: mtl.ClassificationOptions) -> mtl.Task:
    """Which of six colours."""
    return mtl.Task("shapes", "colour", mtl.Classification(COLOURS, **dict(options)))


@mtl.register_task("shapes_size", options=mtl.ClassificationOptions)
def shapes_size(options: mtl.ClassificationOptions) -> mtl.Task:
    """Small, medium or large."""
    return mtl.Task("shapes", "size", mtl.Classification(SIZES, **dict(options)))


@mtl.register_task("shapes_count")
def shapes_count() -> mtl.Task:
    """One to four copies, in that order."""
    return mtl.Task("shapes", "count", mtl.Ordinal(COUNTS))


@mtl.register_task("shapes_radius")
def shapes_radius() -> mtl.Task:
    """How large the shapes are, pixels."""
    return mtl.Task("shapes", "radius", mtl.Regression(unit="px"))


@mtl.register_task("shapes_traits")
def shapes_traits() -> mtl.Task:
    """Which of four traits, in any combination."""
    return mtl.Task("shapes", "traits", mtl.MultiLabel(TRAITS))
