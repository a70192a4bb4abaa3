"""Dataset `glyphs`: the letters L, T and Y drawn with strokes, leaning at any angle."""

from pathlib import Path

import numpy as np
from pydantic import Field

import mtl

LETTERS = ("L", "T", "Y")
STROKES = {
    "L": [((-4, -6), (-4, 6)), ((-4, 6), (4, 6))],
    "T": [((-5, -6), (5, -6)), ((0, -6), (0, 6))],
    "Y": [((-5, -6), (0, 0)), ((5, -6), (0, 0)), ((0, 0), (0, 6))],
}
SIDE = 24


class GlyphsOptions(mtl.Options):
    """How many are drawn."""

    train: int = Field(2000, ge=2)
    """Pictures in the training split."""
    test: int = Field(500, ge=1)
    """Pictures in the test split."""
    tilt_labelled: float = Field(0.7, gt=0, le=1)
    """Share of the training pictures whose tilt is known."""


@mtl.register_dataset("glyphs", options=GlyphsOptions)
def glyphs(split: mtl.Split, root: Path, options: GlyphsOptions) -> mtl.ArrayDataset:
    """uint8 (N, 24, 24). Targets: `letter` (0 to 2), `tilt` (radians, -pi to pi), some tilts missing in training."""
    train = split == mtl.Split.TRAIN
    n, random = (options.train, np.random.default_rng(0)) if train else (options.test, np.random.default_rng(1))
    letter, tilt = random.integers(0, len(LETTERS), n), random.uniform(-np.pi, np.pi, n)
    images = np.stack([draw(LETTERS[k], angle, random) for k, angle in zip(letter, tilt, strict=True)])
    known = random.random(n) < options.tilt_labelled if train else np.ones(n, bool)
    tilt = np.where(known, tilt, np.nan)  # a label that is masked out may be anything
    return mtl.ArrayDataset(images, {"letter": letter, "tilt": tilt}, valid={"tilt": known})


def draw(letter: str, angle: float, random: np.random.Generator) -> np.ndarray:
    """One picture, uint8 (24, 24)."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] - (SIDE - 1) / 2
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    ink = np.zeros((SIDE, SIDE))
    for (ax, ay), (bx, by) in STROKES[letter]:
        length = np.hypot(bx - ax, by - ay)
        along = np.clip(((u - ax) * (bx - ax) + (v - ay) * (by - ay)) / length**2, 0, 1)
        distance = np.hypot(u - ax - along * (bx - ax), v - ay - along * (by - ay))
        ink = np.maximum(ink, np.clip(2 - distance, 0, 1))
    return np.clip(200 * ink + random.normal(30, 15, ink.shape), 0, 255).astype(np.uint8)
