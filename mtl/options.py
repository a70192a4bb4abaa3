"""The base of every options model: a closed schema, immutable once validated, whose errors offer the right spelling."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from mtl.errors import unknown

WORDS = {
    "tuple_type": "must be a list, as in [a, b]",
    "list_type": "must be a list, as in [a, b]",
    "dict_type": "must be a mapping, as in {key: value}",
    "model_type": "must be a mapping, as in {key: value}",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
}
"""For what pydantic says in Python's words."""


class Options(BaseModel):
    """Keys of a plugin or of a section of the config. An unknown key is an error, never ignored.

    Subclass it, give every field a type and a default, and pass the class as `options=` when registering.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="wrap")
    @classmethod
    def _offer_spelling(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        if isinstance(data, dict):  # YAML's `yes` would pass for 1
            numbers = {key for key, field in cls.model_fields.items() if _numeric(field.annotation)}
            data = {k: repr(v) if k in numbers and isinstance(v, bool) else v for k, v in data.items()}
        try:
            return handler(data)
        except ValidationError as error:
            found = [cls._explain(dict(line)) for line in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(error.title, found) from None

    @classmethod
    def unknown_key(cls, key: str) -> str:
        """What to say of a key that is none."""
        return unknown("key", key, cls.model_fields)

    @classmethod
    def _explain(cls, line: dict[str, Any]) -> InitErrorDetails:
        message = line["msg"].removeprefix("Value error, ")
        where = line["loc"]
        if line["type"] == "extra_forbidden" and len(where) == 1:
            message = cls.unknown_key(str(where[0]))
            if str(where[0]).partition(":")[0] in cls.model_fields:
                message += " (in YAML a blank follows the colon)"
        message = WORDS.get(line["type"], message)
        if line["type"] == "literal_error" and "expected" in line.get("ctx", {}):
            known = re.findall("'([^']*)'", line["ctx"]["expected"])
            if near := difflib.get_close_matches(str(line["input"]), known, n=1):
                message += f" (did you mean {near[0]!r}?)"
        if line["type"] == "missing" and len(where) == 1:
            about = (cls.model_fields[str(where[0])].description or "").strip().splitlines()
            message = f"required: {about[0]}" if about else "required"
        return _line(line["type"], message, where, line["input"])


def _numeric(annotation: Any) -> bool:
    parts = get_args(annotation) or (annotation,)
    return any(part is int or part is float for part in parts)


def within(name: str, error: ValueError) -> list[InitErrorDetails]:
    """The mistakes of `error`, for the key `name` of a mapping that pydantic does not know as a model."""
    if isinstance(error, ValidationError):
        return [_line(d["type"], d["msg"], (name, *d["loc"]), d["input"]) for d in error.errors(include_url=False)]
    return [_line("value_error", str(error), (name,), None)]


def _line(kind: str, message: str, where: tuple[int | str, ...], found: Any) -> InitErrorDetails:
    reason = PydanticCustomError(kind, "{message}", {"message": message})
    return InitErrorDetails(type=reason, loc=where, input=found)


def problems(error: ValidationError) -> list[str]:
    """One line per mistake: where (dotted), what was wrong, and what was found where that is short."""
    lines = []
    for line in error.errors(include_url=False):
        where = ".".join(str(part) for part in line["loc"])
        found = repr(line["input"])
        shown = f"; found {found}" if line["type"] not in ("extra_forbidden", "value_error", "missing") else ""
        message = line["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {message}" + (shown if len(found) <= 60 else "") if where else message)
    return lines
