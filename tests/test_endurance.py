"""Each row of the table of promises in its short form; `python -m tests.endurance` runs them in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.endurance.rows import line
from tests.endurance.table import ROWS


@pytest.mark.parametrize("number", sorted(ROWS))
def test_a_row_holds(number: int, tmp_path: Path) -> None:
    text, cases = line(ROWS[number], tmp_path, short=True)
    assert cases.failed == [], text
    assert cases.held > 1
