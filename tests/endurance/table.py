"""All rows: whoever imports this has them."""

from __future__ import annotations

from tests.endurance import (  # noqa: F401  they register their rows
    damage,
    directories,
    disk,
    guards,
    images,
    killing,
    labels,
    malicious,
    normalisation,
    older,
    parallel,
    plugins,
    resumption,
    stopping,
    tables,
)
from tests.endurance.rows import ROWS

__all__ = ["ROWS"]
