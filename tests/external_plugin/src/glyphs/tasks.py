"""Tasks `glyphs_letter` and `glyphs_tilt`."""

import mtl
from glyphs.angle import Angle
from glyphs.data import LETTERS


@mtl.register_task("glyphs_letter", options=mtl.ClassificationOptions)
def glyphs_letter(options: mtl.ClassificationOptions) -> mtl.Task:
    """Which letter."""
    return mtl.Task("glyphs", "letter", mtl.Classification(LETTERS, **dict(options)))


@mtl.register_task("glyphs_tilt")
def glyphs_tilt() -> mtl.Task:
    """How far it leans."""
    return mtl.Task("glyphs", "tilt", Angle())
