"""Each row of the table of promises in its short form; `python -m tests.endurance` runs them in full."""

from __future__ import annotations

from pathlib import Path

import pytest

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
from tests.endurance.rows import ROWS, line


@pytest.mark.parametrize("number", sorted(ROWS))
def test_a_row_holds(number: int, tmp_path: Path) -> None:
    text, cases = line(ROWS[number], tmp_path, short=True)
    assert cases.failed == [], text
    assert cases.held > 1
