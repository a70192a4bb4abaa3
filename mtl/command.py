"""What commands have in common: options that several take, and what they do first."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
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
    """With `--json` send to standard error what plugins and libraries print, here and in processes that are started meanwhile,
    so that standard output is one JSON object.
    """
    with redirect_stdout(sys.stderr) if as_json else nullcontext(), _descriptor_too() if as_json else nullcontext():
        yield


@contextmanager
def _descriptor_too() -> Iterator[None]:
    """What is written past `sys.stdout` as well; not where one of the two is closed."""
    try:
        _flush()
        before = os.dup(1)
    except (OSError, ValueError):
        yield
        return
    try:
        with suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        with suppress(OSError, ValueError):
            _flush()
        os.dup2(before, 1)
        os.close(before)


def _flush() -> None:
    """Write what the interpreter's own standard output still holds, and what libraries in C do."""
    if sys.__stdout__ is not None:
        sys.__stdout__.flush()
    with suppress(AttributeError, OSError, TypeError):  # elsewhere than on POSIX
        ctypes.CDLL(None).fflush(None)


def load_plugins(paths: list[Path] | None) -> None:
    """Run the files given with `--plugin`."""
    if paths:
        from mtl.registry import load_plugin_file

        for path in paths:
            load_plugin_file(path)
