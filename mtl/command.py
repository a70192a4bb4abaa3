"""What commands have in common: options that several take, and what they do first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin", metavar="FILE.py", help="Python file that registers tasks and more. It is run: trust it like a program."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]


@contextmanager
def json_only(as_json: bool) -> Iterator[None]:
    """With `--json` send to standard error what plugins and libraries print, so that standard output is one JSON object."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def load_plugins(paths: list[Path] | None) -> None:
    """Run the files given with `--plugin`."""
    if paths:
        from mtl.registry import load_plugin_file

        for path in paths:
            load_plugin_file(path)
