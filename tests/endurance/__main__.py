"""Runs every row, or those named, in full: python -m tests.endurance [ROW ...] [--short]"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from pathlib import Path

import torch

from tests.endurance.rows import line
from tests.endurance.table import ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", type=int, choices=[*ROWS, []], help="(default: all)")
    parser.add_argument("--short", action="store_true", help="a few cases of each, as the suite does")
    args = parser.parse_args()
    print("| # | promise | held | took | |\n|---:|---|---:|---:|---|")
    failed = 0
    for number in args.rows or sorted(ROWS):
        with tempfile.TemporaryDirectory() as folder:
            text, cases = line(ROWS[number], Path(folder), args.short)
        print(text, flush=True)
        failed += len(cases.failed)
    print(f"\nPython {platform.python_version()}, torch {torch.__version__}, {platform.machine()}; seeds are 0.")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
