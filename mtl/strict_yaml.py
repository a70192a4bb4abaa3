"""YAML as if a stranger had written it: plain values alone, and no more of them than are read in a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import yaml

LARGEST = 1 << 20
"""Bytes that a file of YAML may have."""
DEEPEST, MOST = 20, 20_000
"""Levels, and keys and values, that it may have."""
LONGEST = 64
"""Characters of a number in it."""
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
MERGE = "tag:yaml.org,2002:merge"


def read_text(path: Path) -> str:
    """The text of a file of YAML.

    Raises:
        OSError: it cannot be read; ValueError: it is not UTF-8, or too large.
    """
    with open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    return data.decode()


def parsed(text: str) -> Any:
    """What YAML says.

    Raises:
        ValueError: it is not YAML, or more than plain values; in one line.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number of an impossible form
        raise ValueError(_flat(error)) from None


class _StrictLoader(yaml.SafeLoader):
    """YAML of plain values: no tags, no anchors (a few lines of which can stand for more than any memory holds), no key twice
    (of which plain YAML loaders silently keep the last), and nothing so deep, or so much, that reading it takes long.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self._refuse("anchors and aliases are not read; write the value out", event)
        if event.tag is not None:
            self._refuse(f"tag {event.tag!r}: tags are not read", event)
        self._depth, self._values = self._depth + 1, self._values + 1
        if self._depth > DEEPEST:
            self._refuse(f"more than {DEEPEST} levels", event)
        if self._values > MOST:
            self._refuse(f"more than {MOST:,} keys and values", event)
        made: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return made

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag in NUMBERS and len(node.value) > LONGEST:  # 1:30 is a number in base 60, for which a long one takes hours
            self._refuse(f"a number of more than {LONGEST} characters", node)
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == MERGE:
                self._refuse("'<<' is not read; write the keys out", key)
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                self._refuse(f"key {key.value!r} is given twice", key)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        made = super().construct_mapping(node, deep)
        if odd := [key for key in made if not isinstance(key, str)]:
            self._refuse(f"key {odd[0]!r} is not a string", node)
        return made

    def _refuse(self, why: str, at: yaml.Node | yaml.Event) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=why, problem_mark=at.start_mark)  # type: ignore[arg-type]


class PlainDumper(yaml.SafeDumper):
    """Writes YAML without anchors, which are not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _flat(error: Exception) -> str:
    """A YAML error in one line, without the name that YAML gives to text."""
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
