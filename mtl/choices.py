"""Choices in a config: a registered name with its options, looked up and validated while the config is.

So a misspelt task and a misspelt key are reported together. The sections that are choices are open: what they may hold depends
on what is registered, which is also how their JSON schema is made.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema, to_jsonable_python

from mtl.errors import MTLError, unknown
from mtl.options import Options
from mtl.registry import BACKBONES, BALANCERS, DATASETS, NAME, TASKS, Plugin, Registry
from mtl.sharing import STRUCTURAL, Sharing, kinds, model_of

CHOICE = "x-choice"
"""Stands in a JSON schema for a reference to what is registered, until `json_schema` knows that."""


@dataclass(frozen=True)
class Choice:
    """A registered name and its options (None: the plugin takes none).

    `of` is what is registered where the name is one's own, as of two tasks that are made alike; empty: the name itself.
    """

    name: str
    options: BaseModel | None = None
    weight: float | None = None
    of: str = ""

    @property
    def plugin(self) -> str:
        """The registered name."""
        return self.of or self.name

    def dump(self) -> Any:
        """As it stands in a config: the bare name where that says all."""
        rest: dict[str, Any] = {"task": self.of} if self.of else {}
        rest |= self.dump_options()
        if self.weight is not None:
            rest["weight"] = self.weight
        return {"name": self.name, **rest} if rest else self.name

    def dump_options(self) -> dict[str, Any]:
        """The options as they stand in a config."""
        return self.options.model_dump(mode="json") if self.options else {}


class _Entry(Options):
    """What every mapping for a task may hold beside the task's own options."""

    weight: float | None = Field(None, gt=0)
    task: str = ""


def choose(registry: Registry, value: Any) -> Choice:
    """A name, or a mapping with a name and options -> the registered thing with its validated options.

    Raises:
        ValueError, ValidationError: unknown or broken, or mistakes in its keys; for pydantic to collect.
    """
    if isinstance(value, Choice) and value.options is not None:
        return value
    if isinstance(value, Choice):
        value = value.dump()
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ValueError(f"must be a name, or a mapping with a name; found {value!r}")
    given = dict(given)
    name = given.pop("name")
    own = list(_Entry.model_fields) if registry is TASKS else []
    misspelt = difflib.get_close_matches("task", [*map(str, given)], n=1) if own and name not in registry.names() else []
    if misspelt and misspelt != ["task"]:
        raise ValueError(f"{unknown('key', misspelt[0], own)}, and {name!r} is no registered task")
    entry = _Entry.model_validate({key: given.pop(key) for key in own if key in given})
    plugin = _registered(registry, name, entry.task)
    return Choice(name, _options(plugin, given, ["name", *own]), entry.weight, entry.task)


def _registered(registry: Registry, name: str, of: str) -> Plugin:
    """The plugin that a name of a config means, or that it gives a name of its own to.

    Raises:
        ValueError: for pydantic to collect.
    """
    if of and not NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be a name: use letters, digits and underscores, beginning with a letter")
    if of and of != name and registry is TASKS and name in registry.names():  # a dataset may stand in for another
        raise ValueError(f"{name!r} is a registered {registry.kind}; give your {of!r} another name")
    try:
        return registry.get(of or name)
    except MTLError as error:
        raise ValueError(str(error)) from error


def _options(plugin: Plugin, given: Any, own: Sequence[str] = ()) -> BaseModel | None:
    """The options of a plugin from a mapping; `own` are the keys that may stand beside them."""
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"the options of {plugin.name!r} are a mapping of keys; found {given!r}")
    if plugin.options is not None:
        return plugin.options.model_validate(given or {})
    if given:
        raise ValueError(f"{plugin.name!r} takes no options of its own: {unknown('key', str(next(iter(given))), own)}")
    return None


def choose_sharing(value: Any) -> Sharing:
    """A kind, or a mapping with a kind -> its validated options.

    Raises:
        ValueError, ValidationError: unknown or broken kind, or mistakes in its keys; for pydantic to collect.
    """
    if isinstance(value, Sharing):
        return value
    given = {"kind": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or "kind" not in given:
        raise ValueError(f"must be a kind, or a mapping with a kind; found {value!r}; kinds: {', '.join(kinds())}")
    try:
        model = model_of(given["kind"])
    except MTLError as error:
        raise ValueError(str(error)) from error
    return model.model_validate(given)


@dataclass(frozen=True)
class Registered:
    """Annotation of a `Choice` field: which registry its name is looked up in."""

    registry: Registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda value: choose(self.registry, value),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda choice: choice.dump()),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {CHOICE: self.registry.word}


def choose_dataset(name: str, given: Any) -> Choice:
    """The dataset `name` with its validated options; with a key `dataset` the registered one of that name under another, or in
    the place of another.

    Raises:
        ValueError, ValidationError: unknown or broken dataset, or mistakes in its keys; for pydantic to collect.
    """
    if isinstance(given, Choice):
        return given
    of = ""
    if isinstance(given, Mapping) and isinstance(given.get("dataset"), str):
        of, given = given["dataset"], {key: value for key, value in given.items() if key != "dataset"}
    return Choice(name, _options(_registered(DATASETS, name, of), given, ["dataset"]), of=of)


def dump_datasets(datasets: Mapping[str, Choice]) -> dict[str, Any]:
    """Datasets as they stand in a config."""
    return {name: {**({"dataset": one.of} if one.of else {}), **one.dump_options()} for name, one in datasets.items()}


def options_of(plugin: Plugin) -> dict[str, dict[str, Any]]:
    """What a plugin takes: option -> `about`, and its `default` or `required`, as in a config; parts of one with a dot."""
    return {} if plugin.options is None else _options_of(plugin.options)


def _options_of(model: type[BaseModel], within: str = "") -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, field in model.model_fields.items():
        default = {"required": True} if field.is_required() else {"default": field.get_default(call_default_factory=True)}
        found[within + name] = {"about": " ".join((field.description or "").split()), **to_jsonable_python(default)}
        for part in get_args(field.annotation) or (field.annotation,):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= _options_of(part, f"{within}{name}.")
    return found


def with_choices(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` of a config, with everything that is registered and loads in place of the placeholders."""
    schema = _referring(schema)
    definitions = schema.setdefault("$defs", {})
    for registry in (TASKS, BACKBONES, BALANCERS):
        extra = {"weight": {"type": "number", "exclusiveMinimum": 0}} if registry is TASKS else {}
        models = {name: plugin.options for name in registry.names() if (plugin := _loadable(registry, name))}
        definitions[registry.word] = _alternatives("name", models, extra, definitions)
        if registry is TASKS:  # under a name of one's own
            named = [
                {
                    **one,
                    "properties": {**one["properties"], "name": {"type": "string"}, "task": one["properties"]["name"]},
                    "required": [*one["required"], "task"],
                }
                for one in definitions[registry.word]["anyOf"][1:]
            ]
            definitions[registry.word]["anyOf"] += named
    sharing = {name: model for name in kinds() if (model := _loadable_sharing(name)) is not None}
    definitions["sharing"] = _alternatives("kind", sharing, {}, definitions)
    definitions["datasets"] = _by_name(definitions)
    return schema


def _by_name(definitions: dict[str, Any]) -> dict[str, Any]:
    """Datasets: each with its own options, or with those of the one that its key `dataset` names."""
    models = {name: plugin.options for name in DATASETS.names() if (plugin := _loadable(DATASETS, name))}
    definitions["dataset"] = {"anyOf": _alternatives("dataset", models, {}, definitions)["anyOf"][1:]}
    named = {"$ref": "#/$defs/dataset"}
    own = {name: _mapping(model, definitions) for name, model in models.items()}
    return {
        "type": "object",
        "properties": {name: {"anyOf": [keys, {"type": "null"}, named]} for name, keys in own.items()},
        "additionalProperties": named,
    }


def _referring(schema: Any) -> Any:
    """`schema` with every placeholder for what is registered replaced by a reference."""
    if isinstance(schema, list):
        return [_referring(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _referring(part) for key, part in schema.items() if key != CHOICE}
    return {**result, "$ref": f"#/$defs/{schema[CHOICE]}"} if CHOICE in schema else result


def _loadable(registry: Registry, name: str) -> Plugin | None:
    try:
        return registry.get(name)
    except MTLError:
        return None  # a broken plugin hurts only those who name it


def _loadable_sharing(name: str) -> type[Sharing] | None:
    try:
        return STRUCTURAL.get(name) or model_of(name)
    except MTLError:
        return None


def _alternatives(
    key: str, models: Mapping[str, type[BaseModel] | None], extra: Mapping[str, Any], definitions: dict[str, Any]
) -> dict[str, Any]:
    """A bare name, or a mapping per plugin; what their schemas define is hoisted into `definitions`."""
    mappings: list[dict[str, Any]] = []
    for name, model in models.items():
        keys = _mapping(model, definitions)
        keys["properties"] = {**keys["properties"], key: {"const": name}, **extra}
        keys["required"] = [key, *(k for k in keys.get("required", []) if k != key)]
        mappings.append(keys)
    return {"anyOf": [{"enum": sorted(models)}, *mappings]}


def _mapping(model: type[BaseModel] | None, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a plugin's options; what it defines is hoisted into `definitions`."""
    keys: dict[str, Any] = {"type": "object", "properties": {}}
    if model is not None:
        keys = model.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(keys.pop("$defs", {}))
    return {**keys, "additionalProperties": False}
