"""JSON that this program wrote and nothing else: no number that is none, no key twice, no file larger than it can be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mtl.errors import RunError


def read_strict(path: Path, largest: int) -> Any:
    """What a JSON file of at most `largest` bytes holds.

    Raises:
        RunError: not there, no file, larger, or not strict JSON.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise RunError(f"{str(path)!r} is no file")
        with open(path, "rb") as file:
            data = file.read(largest + 1)
        if len(data) > largest:
            raise RunError(f"{str(path)!r} is larger than the {largest:,} bytes that it can have")
        return json.loads(data, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)
    except OSError as error:
        raise RunError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{str(path)!r} is damaged: {error}") from None


def write_strict(value: Any) -> bytes:
    """`value` as a JSON file holds it. Numbers come back as they were, to the last bit.

    Raises:
        ValueError: a number in it is not finite.
    """
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is larger than a number can be")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found
