"""The configuration of a run: one closed schema, read from YAML, changed by dotted overrides, validated once.

Names resolve through the registry while the config is validated, so that a misspelt task and a misspelt key are reported
together. In a config a string where a mapping may stand means `{name: that}`, or `{kind: that}` for sharing.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    PositiveInt,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from mtl.batches import Augment
from mtl.choices import CHOICE, Choice, Registered, choose_dataset, choose_sharing, dump_datasets, with_choices
from mtl.errors import ConfigError, unknown
from mtl.optim import OptimConfig
from mtl.options import Options, problems, within
from mtl.registry import BACKBONES, BALANCERS, TASKS
from mtl.sampling import Mixing
from mtl.sharing import Sharing, Unshared
from mtl.strict_yaml import PlainDumper, parsed, read_text

DATASET_SCHEMA = WithJsonSchema({CHOICE: "datasets"})


class DataConfig(Options):
    """Where data are, and what is done to them."""

    root: Path | None = None
    """Folder of the datasets; null: the environment's MTL_DATA_ROOT, else ./data."""
    validation: int | float = Field(5000, ge=0)
    """Training samples held out to select weights on: a count, or a share below 1. 0: the last epoch is taken, untested."""
    split_seed: int = 0
    """Which samples are held out; not the run's seed, so that arms and seeds share one split."""
    standardize: Literal["pixel", "channel", "imagenet", "none"] = "channel"
    """Subtract mean and divide by standard deviation of the training split, per position and channel, or per channel;
    imagenet: by the constants of torchvision's pretrained weights."""
    augment: Augment = Augment()
    """Random changes to training images."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Processes that decode image files; 0: the training process does, and waits for it. What is in memory needs none. Batches
    do not depend on it. auto: as many as there are cores to use, at most 16."""
    bad_files: float = Field(0.01, ge=0, le=1)
    """Share of a split's image files (one at least) that may turn out to be unreadable: their labels are taken for missing, and
    they are listed in the run's set_aside.csv. More is an error; 0: any is."""
    input_shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """(channels, height, width) that the images of every dataset are brought to. null: as they are; where datasets differ, the
    largest of each, which `config.yaml` then records."""
    mixing: Mixing = Mixing()
    """How a step's batches are made of several datasets: equal, proportional, or {policy: temperature, temperature: 2}."""
    class_balanced: tuple[str, ...] = ()
    """Tasks of which every class is drawn equally often in training, one of a dataset at most; evaluation is as it was."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training samples that is used, once validation samples are held out: every combination of integer labels in
    proportion, a smaller share part of a larger one, and the same whatever the run's seed and tasks."""
    labelled: dict[str, Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    """Task -> how many of its training labels are used (a count, or a share as a number with a point); the others are taken for
    missing. A sample on which no task of the run has a label is left out."""
    datasets: Annotated[dict[str, Any], PlainSerializer(dump_datasets), DATASET_SCHEMA] = Field(default_factory=dict)
    """Options of datasets, by dataset name; with `dataset: NAME` those of the registered one under a name of your own, or in
    the place of another, as packed images stand in for files."""

    @field_validator("validation")
    @classmethod
    def _count_or_share(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            raise ValueError(f"must be a count (an integer) or a share below 1; found {value!r}")
        return value

    @field_validator("datasets")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        chosen, wrong = {}, []
        for name, given in value.items():
            try:
                chosen[name] = choose_dataset(name, given)
            except ValueError as error:
                wrong += within(name, error)
        if wrong:
            raise ValidationError.from_exception_data("datasets", wrong)
        return chosen


class CheckpointConfig(Options):
    """When a run is saved. Nothing that it computes depends on it."""

    every_seconds: float = Field(60.0, gt=0)
    """Save in the middle of an epoch when this time has passed, and at the end of every epoch; in both cases not so often that
    it takes more than 1 % of the time."""
    every_steps: int | None = Field(None, ge=1)
    """Save after every so many steps instead, whatever it takes; null: by time."""
    keep: int = Field(2, ge=1)
    """Checkpoints that stay, the newest ones; with two, one may be damaged."""
    keep_every_epochs: int | None = Field(None, ge=1)
    """Also keep for good those of every so many epochs; null: of none."""


class InitFrom(Options):
    """What a task's tower starts from."""

    path: Path
    """A run directory, or a .safetensors file of the plain network's weights."""
    weights: Literal["best", "last"] = "best"
    """Which weights of a run."""
    task: str | None = None
    """Which task of the run to start from; null: the task itself."""
    digest: str | None = None
    """Of the weights file, SHA-256, filled in when a run begins; another file under that path is then refused."""

    @model_validator(mode="before")
    @classmethod
    def _by_path(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str | Path) else data


class RunConfig(Options):
    """Everything that decides a run.

    Raises:
        ConfigError: every mistake at once, each with what was found and what would work.
    """

    tasks: list[Annotated[Choice, Registered(TASKS)]] = Field(min_length=1)
    """Registered tasks, by name or as {name, weight, options...}; as {name, task: NAME, ...} one under a name of your own."""
    backbone: Annotated[Choice, Registered(BACKBONES)] = Choice("small_cnn")
    """The network that each tower is."""
    sharing: Annotated[
        Sharing,
        PlainValidator(choose_sharing),
        PlainSerializer(lambda sharing: sharing.model_dump(mode="json")),
        WithJsonSchema({CHOICE: "sharing"}),
    ] = Unshared()
    """What the towers have in common, or exchange."""
    balancer: Annotated[Choice, Registered(BALANCERS)] = Choice("fixed")
    """How task losses become one update."""
    init_from: dict[str, InitFrom] = Field(default_factory=dict)
    """Task -> run directory or weights file that its tower (and, from a run of that task, its head) starts from."""
    data: DataConfig = DataConfig()
    """Where data are, and what is done to them."""
    optim: OptimConfig = OptimConfig()
    """How weights are updated."""
    epochs: int = Field(30, ge=1)
    """Passes over the training split (the largest one, where there are several datasets)."""
    max_steps: int | None = Field(None, ge=1)
    """End after this many updates, if that comes before `epochs`."""
    epoch_steps: int | None = Field(None, ge=1)
    """Updates in an epoch, after each of which the validation split is read; null: as many as one pass over the training split
    (the largest one) takes."""
    batch_size: int = Field(128, ge=2)
    """Samples of each dataset in a batch."""
    patience: int | None = Field(None, ge=1)
    """End when the validation score has not risen for this many epochs; null: never."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """When the run is saved, to go on from there with `mtl train --resume`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward and backward pass. auto: bf16 autocast on hardware that computes in it, else fp32."""
    execution: Literal["auto", "batched", "towers"] = "auto"
    """How towers are run. batched: as one network with stacked parameters; towers: one after the other. auto: batched on CUDA
    where the network allows it, else towers (a CPU loses by batching). Results differ by rounding only."""
    compile: Literal["auto", "none", "units"] = "auto"
    """What torch.compile makes one pass over memory of. units: exchange units of towers that run one after the other; none:
    nothing. auto: units on a CPU with a C++ compiler when the run is long enough to make up for compiling, else none. Results
    differ by rounding only."""
    device: str = "auto"
    """As torch names it: cpu, cuda, cuda:1, mps. auto: CUDA where there is one, else the CPU."""
    seed: int = 0
    """Of initial weights, order, augmentation and dropout."""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(problems(error)) from None

    @field_validator("tasks", mode="before")
    @classmethod
    def _one_task(cls, tasks: Any) -> Any:
        return [tasks] if isinstance(tasks, str) else tasks

    @field_validator("device")
    @classmethod
    def _device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?|xpu(:\d+)?", device):
            raise ValueError(f"must be auto, cpu, cuda, cuda:N, xpu or mps; found {device!r}")
        return device

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: list[Choice]) -> list[Choice]:
        names = [task.name for task in tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"named more than once: {', '.join(twice)}")
        return tasks

    @model_validator(mode="after")
    def _starts_are_of_tasks(self) -> RunConfig:
        names = [task.name for task in self.tasks]
        if wrong := [name for name in self.init_from if name not in names]:
            raise ValueError(f"init_from: {unknown('task', wrong[0], names)}")
        if wrong := [name for name in self.data.labelled if name not in names]:
            raise ValueError(f"data.labelled: {unknown('task', wrong[0], names)}")
        if wrong := [name for name in self.data.class_balanced if name not in names]:
            raise ValueError(f"data.class_balanced: {unknown('task', wrong[0], names)}")
        return self

    @model_validator(mode="after")
    def _patience_needs_validation(self) -> RunConfig:
        if self.patience is not None and not self.data.validation:
            raise ValueError(f"patience={self.patience} waits for a validation score, and data.validation is 0")
        return self

    def replaced(self, **values: Any) -> RunConfig:
        """A copy with top-level keys replaced, validated."""
        return RunConfig(**{**{name: getattr(self, name) for name in RunConfig.model_fields}, **values})

    def to_yaml(self) -> str:
        """The config as a YAML document that `load` reads back to an equal one."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=PlainDumper, sort_keys=False)

    def digest(self) -> str:
        """Twelve hexadecimal digits that two configs share when they describe the same run. Paths, device, the number of
        workers and when it is saved are left out.
        """
        tree = self.model_dump(mode="json")
        del tree["device"], tree["checkpoints"], tree["data"]["root"], tree["data"]["workers"]
        for start in tree["init_from"].values():
            del start["path"]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, apply `key.sub=value` overrides, validate once.

    Raises:
        ConfigError: no such file, not a mapping, or every mistake in it.
    """
    tree = read_tree(path)
    return from_tree(override(tree, overrides), source=str(path))


def read_tree(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, its keys not yet looked at.

    Raises:
        ConfigError: no such file, too large, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        near = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"; configs there: {', '.join(near[:8])}" if near else ""
        raise ConfigError([f"cannot read config {str(path)!r}: {_reason(error)}{hint}"]) from None
    try:
        tree = parsed(text)
    except ValueError as error:
        raise ConfigError([str(error)], source=str(path)) from None
    if tree is None:
        raise ConfigError(["the file is empty"], source=str(path))
    if not isinstance(tree, dict):
        raise ConfigError([f"a config is a mapping of keys; found {type(tree).__name__}"], source=str(path))
    return tree


def from_tree(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Validate a tree of plain values."""
    try:
        return RunConfig(**tree)
    except ConfigError as error:
        raise ConfigError(error.problems, source=source) from None


NAMED_BY = {"sharing": "kind", "backbone": "name", "balancer": "name", "optim": "name"}
"""Sections for which a string may stand, with the key that the string is the value of."""
BEGUN_ANEW = ("sharing", "backbone", "balancer")
"""Of these the ones whose other keys belong to that choice: setting it to another replaces the section."""


def override(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` with `key.sub=value` overrides applied in order; values are parsed as YAML.

    Setting `sharing.kind` (or the name of a backbone or balancer) to something else replaces the whole section, since its
    other keys belong to the old choice; a sharing's `points` stay.

    >>> override({"sharing": {"kind": "split", "at": "b", "points": ["a", "b"]}}, ["sharing.kind=unshared"])
    {'sharing': {'kind': 'unshared', 'points': ['a', 'b']}}
    """
    if isinstance(overrides, str):
        raise ConfigError([f"overrides are a list of key=value, as in [{overrides!r}]; found {overrides!r}"])
    result, wrong = copy.deepcopy(dict(tree)), []
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not all(key.split(".")):
            wrong.append(f"override {text!r} is not of the form key=value or key.sub=value")
            continue
        try:
            _set(result, key, parsed(raw))
        except ValueError as error:
            wrong.append(f"override {text!r}: the value is not YAML: {error}")
        except ConfigError as error:
            wrong += error.problems
    if wrong:
        raise ConfigError(wrong)
    return result


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    section, *rest = key.split(".")
    if section in NAMED_BY and rest:
        default = RunConfig.model_fields[section].default
        named = tree.get(section, getattr(default, NAMED_BY[section]))
        tree[section] = {NAMED_BY[section]: named} if isinstance(named, str) else named
    old = tree.get(section)
    if section in BEGUN_ANEW and rest == [NAMED_BY[section]] and isinstance(old, dict) and old.get(rest[0]) != value:
        tree[section] = {rest[0]: value, **({"points": old["points"]} if "points" in old else {})}
        return
    node: Any = tree
    parts = [section, *rest]
    for i, part in enumerate(parts[:-1]):
        node = _item(node, part, key) if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            where = ".".join(parts[: i + 1])
            raise ConfigError([f"override {key!r}: {where} is {node!r}, which has no keys; override {where} itself"])
    if isinstance(node, list):
        _item(node, parts[-1], key)
        node[int(parts[-1])] = value
    else:
        node[parts[-1]] = value


def _item(node: list[Any], part: str, key: str) -> Any:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError([f"override {key!r}: {part!r} is not a position in a list of {len(node)}"])
    i = int(part)
    if isinstance(node[i], str):
        node[i] = {"name": node[i]}
    return node[i]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config with everything that is registered and loads, for editors."""
    return with_choices(RunConfig.model_json_schema())


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
