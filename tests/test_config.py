"""Configs: reading, overriding, validating all at once, writing back, and the schema for editors."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from conftest import TINY, TinyOptions
from pydantic import BaseModel, ValidationError

import mtl
from mtl.arm_specs import _as_overrides, _as_yaml
from mtl.choices import Choice
from mtl.config import from_tree, json_schema, load, override
from mtl.registry import BACKBONES, BALANCERS, DATASETS, TASKS
from mtl.sharing import STRUCTURAL, kinds

EXAMPLES = sorted((Path(__file__).parent.parent / "examples" / "configs").glob("*.yaml"))
SHARINGS: dict[str, Any] = {
    "unshared": {"kind": "unshared", "points": ["pool1"]},
    "hard_shared": {"kind": "hard_shared"},
    "split": {"kind": "split", "at": "pool2", "points": ["pool1", "pool2"]},
    "cross_stitch": {
        "kind": "cross_stitch",
        "points": ["pool1", "fc3"],
        "init": {"same": 0.8, "cross": 0.2},
        "lr_multiplier": 10,
    },
}


def tiny(*overrides: str, **sections: Any) -> mtl.RunConfig:
    return from_tree(override({**TINY, **sections}, overrides))


def problems(*overrides: str, **sections: Any) -> tuple[str, ...]:
    """One line per mistake of a tiny config that is refused."""
    with pytest.raises(mtl.ConfigError) as caught:
        tiny(*overrides, **sections)
    return caught.value.problems


def problem(*overrides: str, **sections: Any) -> str:
    """The one mistake."""
    [line] = problems(*overrides, **sections)
    return line


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# Overrides


def test_overrides_reach_every_depth() -> None:
    config = tiny(
        "epochs=7",
        "optim.lr=0.5",
        "data.augment.flip=true",
        "backbone.dropout=0.25",
        "data.datasets.tiny.train=24",
        "patience=3",
    )
    assert (config.epochs, config.optim.lr, config.data.augment.flip, config.patience) == (7, 0.5, True, 3)
    assert config.backbone.options is not None
    assert config.backbone.options.model_dump() == {"width": 0.1, "dropout": 0.25}  # what was there stays
    assert config.data.validation == 12
    assert config.data.datasets == {"tiny": Choice("tiny", TinyOptions(train=24))}


def test_override_values_are_yaml() -> None:
    config = tiny(
        "tasks=[tiny_b, {name: tiny_a, weight: 2}]", "sharing={kind: split, at: pool1}", "patience=null", "optim.lr=1e-3"
    )
    assert [(task.name, task.weight) for task in config.tasks] == [("tiny_b", None), ("tiny_a", 2.0)]
    assert isinstance(config.sharing, mtl.SplitAt)
    assert config.sharing.at == "pool1"
    assert config.patience is None
    assert config.optim.lr == 0.001


def test_later_override_wins() -> None:
    assert tiny("epochs=3", "epochs=4").epochs == 4


def test_override_leaves_the_tree_alone() -> None:
    tree = {"sharing": {"kind": "split", "at": "b"}, "tasks": ["a", "b"]}
    result = override(tree, ["sharing.at=c", "tasks.0.weight=2"])
    assert result == {"sharing": {"kind": "split", "at": "c"}, "tasks": [{"name": "a", "weight": 2}, "b"]}
    assert tree == {"sharing": {"kind": "split", "at": "b"}, "tasks": ["a", "b"]}


def test_other_kind_begins_the_section_anew_and_keeps_points() -> None:
    tree = {"sharing": {"kind": "split", "at": "b", "points": ["a", "b"]}}
    assert override(tree, ["sharing.kind=cross_stitch"]) == {"sharing": {"kind": "cross_stitch", "points": ["a", "b"]}}
    assert override(tree, ["sharing.kind=split"]) == tree
    assert override(tree, ["sharing.kind=unshared", "sharing.points=[c]"]) == {"sharing": {"kind": "unshared", "points": ["c"]}}


@pytest.mark.parametrize("kind", SHARINGS)
@pytest.mark.parametrize("other", SHARINGS)
def test_every_kind_can_follow_every_other(kind: str, other: str) -> None:
    config = tiny(f"sharing.kind={other}", *(["sharing.at=pool1"] if other == "split" else []), sharing=SHARINGS[kind])
    assert config.sharing.kind == other


def test_other_backbone_begins_the_section_anew() -> None:
    assert override({"backbone": {"name": "small_cnn", "width": 2}}, ["backbone.name=mlp"]) == {"backbone": {"name": "mlp"}}


def test_override_inside_a_section_given_as_a_string() -> None:
    assert override({"sharing": "cross_stitch"}, ["sharing.granularity=scalar"]) == {
        "sharing": {"kind": "cross_stitch", "granularity": "scalar"}
    }
    assert override({"backbone": "small_cnn"}, ["backbone.width=0.5"]) == {"backbone": {"name": "small_cnn", "width": 0.5}}
    assert override({"sharing": "cross_stitch"}, ["sharing.kind=unshared"]) == {"sharing": {"kind": "unshared"}}


def test_override_inside_a_section_left_to_its_default() -> None:
    """The default backbone is small_cnn, so its width can be set without repeating the name."""
    config = from_tree(override({"tasks": ["tiny_a"]}, ["backbone.width=0.5"]))
    assert config.backbone.name == "small_cnn"
    assert config.backbone.options is not None
    assert config.backbone.options.model_dump()["width"] == 0.5


def test_override_at_a_position_of_a_list() -> None:
    config = tiny("tasks.0.weight=2", "tasks.1=tiny_c")
    assert [(task.name, task.weight) for task in config.tasks] == [("tiny_a", 2.0), ("tiny_c", None)]


def test_override_value_may_hold_an_equals_sign() -> None:
    assert override({}, ["data.root=/a=b/c"]) == {"data": {"root": "/a=b/c"}}
    assert tiny("data.root=/a=b").data.root == Path("/a=b")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("epochs", ("'epochs'", "key=value")),
        ("=3", ("'=3'", "key=value")),
        ("optim..lr=3", ("'optim..lr=3'", "key=value")),
        (".epochs=3", ("'.epochs=3'", "key=value")),
        ("tasks=[a", ("'tasks=[a'", "YAML")),
        ("optim={lr: 1, lr: 2}", ("'lr'", "twice")),
        ("epochs.x=3", ("epochs.x", "epochs is 2")),
        ("tasks.2.weight=3", ("tasks.2.weight", "'2'", "list of 2")),
        ("tasks.first=tiny_a", ("'first'", "list of 2")),
        ("tasks.-1=tiny_a", ("'-1'", "list of 2")),
    ],
)
def test_bad_override_is_refused(text: str, parts: Sequence[str]) -> None:
    line = problem(text)
    assert "override" in line
    assert all(part in line for part in parts), line


def test_all_bad_overrides_are_named_at_once() -> None:
    lines = " ".join(problems("epochs", "optim..lr=3", "seed=x"))
    assert all(part in lines for part in ("'epochs'", "'optim..lr=3'"))


# Names and mappings


def test_string_means_a_mapping_with_that_name() -> None:
    short = tiny(tasks=["tiny_a"], backbone="small_cnn", sharing="cross_stitch", balancer="uncertainty")
    long = tiny(
        tasks=[{"name": "tiny_a"}],
        backbone={"name": "small_cnn"},
        sharing={"kind": "cross_stitch"},
        balancer={"name": "uncertainty"},
    )
    assert short == long
    assert short.digest() == long.digest()
    assert isinstance(short.sharing, mtl.CrossStitch)


def test_string_means_the_optimizer_of_that_name() -> None:
    """ "a string where a mapping may stand means {name: that}": the optim section has a name too."""
    assert tiny(optim="sgd").optim.name == "sgd"


def test_defaults_are_those_of_the_sections() -> None:
    config = from_tree({"tasks": ["tiny_a"]})
    assert config.backbone.name == "small_cnn"
    assert config.backbone.options is not None
    assert config.backbone.options.model_dump() == {"width": 1.0, "dropout": 0.2}
    assert (config.sharing, config.optim, config.data) == (mtl.Unshared(), mtl.OptimConfig(), mtl.DataConfig())


def test_yaml_1_1_floats_are_numbers() -> None:
    assert yaml.safe_load("1e-3") == "1e-3"  # which is why this is worth a test
    config = tiny(
        "optim.lr=1e-3", "sharing.kind=cross_stitch", "sharing.lr_multiplier=1e2", "tasks.0.weight=5e-1", "backbone.width=1e-1"
    )
    assert (config.optim.lr, config.sharing.unit_lr_factor, config.tasks[0].weight) == (1e-3, 100.0, 0.5)
    assert config.optim == tiny("optim.lr=0.001").optim


# Mistakes


def test_all_mistakes_at_once_with_paths_and_suggestions() -> None:
    lines = problems(
        tasks=["tiny_a", "tiny_bb"],
        backbone={"name": "small_cnn", "widht": 2},
        sharing={"kind": "cros_stitch"},
        balancer="uncertanty",
        data={"augment": {"flop": True}, "validaton": 3},
        optim={"lr": "fast"},
        epochs=0,
        bach_size=3,
        epoch=2,
    )
    expected = {
        "tasks.1": ("'tiny_bb'", "did you mean 'tiny_b'"),
        "backbone.widht": ("did you mean 'width'",),
        "sharing": ("'cros_stitch'", "did you mean 'cross_stitch'"),
        "balancer": ("'uncertanty'", "did you mean 'uncertainty'"),
        "data.augment.flop": ("did you mean 'flip'",),
        "data.validaton": ("did you mean 'validation'",),
        "optim.lr": ("number", "'fast'"),
        "epochs": ("greater than or equal to 1", "found 0"),
        "bach_size": ("did you mean 'batch_size'",),
        "epoch": ("did you mean 'epochs'",),
    }
    found = {line.partition(": ")[0]: line for line in lines}
    assert sorted(found) == sorted(expected)
    for where, parts in expected.items():
        assert all(part in found[where] for part in parts), found[where]


def test_overrides_are_a_list() -> None:
    with pytest.raises(mtl.ConfigError, match=r"a list of key=value, as in \['epochs=2'\]; found 'epochs=2'"):
        override(TINY, "epochs=2")


def test_message_counts_and_names_its_source(tmp_path: Path) -> None:
    path = write(tmp_path, "tasks: [tiny_a]\nepochs: no\nseeed: 1\n")
    with pytest.raises(mtl.ConfigError, match="2 problems") as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert all(line in str(caught.value) for line in caught.value.problems)


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"tasks": []}, ("tasks", "at least 1")),
        ({"tasks": None}, ("tasks", "list")),
        ({"tasks": [3]}, ("tasks.0", "name", "3")),
        ({"tasks": [{"weight": 2}]}, ("tasks.0", "name")),
        ({"tasks": ["tiny_a", "tiny_b", "tiny_a"]}, ("tasks", "more than once", "tiny_a")),
        ({"tasks": [{"name": "tiny_a", "weight": 0}]}, ("tasks.0.weight", "greater than 0")),
        ({"tasks": [{"name": "tiny_a", "weigth": 2}]}, ("tasks.0", "weigth", "'weight'")),
        ({"backbone": {"width": 2}}, ("backbone", "name")),
        ({"backbone": {"name": "small_cnn", "width": -1}}, ("backbone.width", "greater than 0", "-1")),
        ({"backbone": {"name": "resnet18", "width": 2}}, ("backbone.width", "unknown key", "image_size")),
        ({"backbone": {"name": "small_cnn", "weight": 2}}, ("backbone.weight", "unknown key")),
        ({"sharing": {"at": "pool1"}}, ("sharing", "kind", "cross_stitch")),
        ({"sharing": {"kind": "split"}}, ("sharing.at", "required")),
        (
            {"sharing": {"kind": "split", "at": "pool1", "granularity": "dense"}},
            (
                "sharing.granularity: unknown key 'granularity' of sharing kind 'split'; cross_stitch has it: set",
                "cross_stitch too",
            ),
        ),
        ({"sharing": {"kind": "cross_stitch", "zzz": 1}}, ("sharing.zzz", "unknown key 'zzz'")),
        ({"sharing": {"kind": "cross_stitch", "granularity": "pixel"}}, ("sharing.granularity", "'channel'", "pixel")),
        ({"sharing": {"kind": "cross_stitch", "init": {"smae": 1}}}, ("sharing.init", "smae", "did you mean 'same'")),
        ({"sharing": {"kind": ["split"]}}, ("sharing", "split")),
        ({"sharing": {"kind": None}}, ("sharing", "kind")),
        ({"optim": {"lr": 0}}, ("optim.lr", "greater than 0")),
        ({"optim": {"lr": float("nan")}}, ("optim.lr", "finite")),
        ({"optim": {"name": "adma"}}, ("optim.name", "'adam'", "adma")),
        ({"batch_size": 1}, ("batch_size", "2")),
        ({"epochs": 2.5}, ("epochs", "whole number", "2.5")),
        ({"precision": "fp16"}, ("precision", "'bf16'", "fp16")),
        ({"data": {"validation": 1.5}}, ("data.validation:", "1.5")),
        ({"data": {"validation": -1}}, ("data.validation:", "-1")),
        ({"data": {"datasets": {"tinny": {}}}}, ("data.datasets", "unknown dataset 'tinny'", "did you mean 'tiny'")),
        ({"data": {"datasets": {"tiny": {"trian": 3}}}}, ("data.datasets.tiny.trian", "did you mean 'train'")),
        ({"data": {"datasets": {"tiny": {"train": "x"}}}}, ("data.datasets.tiny.train", "whole number", "'x'")),
        ({"data": {"datasets": {"tiny": 3}}}, ("data.datasets.tiny", "3")),
        ({"data": {"datasets": {"fashion_mnist": 3}}}, ("data.datasets", "fashion_mnist", "3")),
        ({"data": {"datasets": {"fashion_mnist": {"x": 3}}}}, ("data.datasets", "fashion_mnist", "no options", "x")),
    ],
)
def test_mistake_is_one_line_that_says_where_and_what(sections: dict[str, Any], parts: Sequence[str]) -> None:
    line = problem(**sections)
    assert "\n" not in line
    assert all(part in line for part in parts), line


def test_weight_decay_needs_adamw() -> None:
    for name in ("adam", "sgd"):
        line = problem("optim.weight_decay=0.1", f"optim.name={name}")
        assert all(part in line for part in ("optim", "weight_decay=0.1", "adamw", "l2", name))
    assert tiny("optim.weight_decay=0.1", "optim.name=adamw").optim.weight_decay == 0.1


def test_python_callers_get_the_same_error() -> None:
    with pytest.raises(mtl.ConfigError) as caught:
        mtl.RunConfig(tasks=["tiny_a", "tinyb"], epochs=0)
    assert len(caught.value.problems) == 2
    assert isinstance(caught.value, mtl.MTLError)
    with pytest.raises(mtl.ConfigError, match="tasks"):
        mtl.RunConfig()


def test_python_callers_may_give_sections_as_objects() -> None:
    sharing = mtl.CrossStitch(points=["pool1"])
    config = mtl.RunConfig(tasks=["tiny_a"], sharing=sharing, data=mtl.DataConfig(validation=12), optim=mtl.OptimConfig(lr=0.5))
    assert config == from_tree(
        {
            "tasks": ["tiny_a"],
            "sharing": {"kind": "cross_stitch", "points": ["pool1"]},
            "data": {"validation": 12},
            "optim": {"lr": 0.5},
        }
    )


def test_config_is_immutable_and_replaced_is_validated() -> None:
    config = tiny()
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 9
    assert (config.replaced(epochs=9).epochs, config.epochs) == (9, 2)
    assert config.replaced(epochs=9).replaced(epochs=2) == config
    with pytest.raises(mtl.ConfigError, match="epochs"):
        config.replaced(epochs=0)


# Files


def test_file_is_read_and_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(TINY))
    assert load(path) == tiny()
    assert load(str(path), ["epochs=5", "tasks=[tiny_a]"]).epochs == 5


@pytest.mark.parametrize(
    "text",
    ["tasks: [tiny_a]\nepochs: 1\nepochs: 2\n", "tasks: [tiny_a]\noptim:\n  lr: 1\n  lr: 2\n", "tasks: [{name: a, name: b}]"],
)
def test_key_given_twice_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(mtl.ConfigError, match=r"'(epochs|lr|name)' is given twice.*line \d"):
        load(write(tmp_path, text))


def test_missing_file_names_the_configs_there(tmp_path: Path) -> None:
    write(tmp_path, "", "fashion.yaml")
    write(tmp_path, "", "shapes.yml")
    write(tmp_path, "", "notes.txt")
    with pytest.raises(mtl.ConfigError) as caught:
        load(tmp_path / "fashoin.yaml")
    message = str(caught.value)
    assert all(part in message for part in ("fashoin.yaml", "No such file", "fashion.yaml", "shapes.yml"))
    assert "notes.txt" not in message
    with pytest.raises(mtl.ConfigError, match="cannot read config"):
        load(tmp_path / "no_such_folder" / "a.yaml")


@pytest.mark.parametrize(("text", "kind"), [("- tasks\n", "list"), ("tasks", "str"), ("3", "int")])
def test_file_that_is_no_mapping(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(mtl.ConfigError, match=f"mapping of keys; found {kind}"):
        load(write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "tasks: [a\n",
        "a: b: c\n",
        "tasks: !!python/object:os.system {}\n",
        "? [a, b]\n: 1\n",
        "a: *b\n",
        "2020-01-01: 3\n",
        "1: 2\n",
    ],
)
def test_file_that_is_not_a_config_is_a_config_error(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(mtl.ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(mtl.ConfigError, match="directory"):
        load(tmp_path)
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(mtl.ConfigError, match="UTF-8"):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [tiny_a]\nseed: &n 12\nepochs: *n\n", "anchors and aliases are not read"),
        ("tasks: [tiny_a]\n<<: {seed: 1}\n", "'<<' is not read"),
        ("tasks: [!!str tiny_a]\n", "tags are not read"),
        ("tasks: [tiny_a]\nself: 1\n", "unknown key 'self'"),
        ("tasks: [tiny_a]\noptim: {lr:1}\n", "a blank follows the colon"),
        (f"tasks: {'[' * 30}{']' * 30}\n", "more than 20 levels"),
        (f"tasks: [{'a,' * 30_000}]\n", "more than 20,000 keys and values"),
        (f"seed: 1{':1' * 40}.5\n", "a number of more than 64 characters"),
        (f"tasks: [tiny_a]\n#{' ' * (1 << 20)}", "more than 1,048,576 bytes"),
    ],
)
def test_yaml_of_a_stranger_is_plain_and_small(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(mtl.ConfigError, match=message):
        load(write(tmp_path, text))


def test_what_is_there_twice_is_written_twice() -> None:
    options = {"name": "small_cnn", "width": 0.5}
    assert (
        from_tree(override({"tasks": ["tiny_a"]}, _as_overrides("twice", {"backbone": options}))).backbone.name == "small_cnn"
    )
    assert "&" not in _as_yaml({"one": options, "other": options})


# Writing back


def changed() -> mtl.RunConfig:
    """A config in which as much as possible differs from the defaults."""
    return tiny(
        "tasks=[{name: tiny_a, weight: 0.3}, tiny_b]",
        "balancer=uncertainty",
        "data={root: /somewhere, validation: 0.1, split_seed: 3, standardize: pixel, augment: {crop: 2, flip: true}, "
        "datasets: {tiny: {train: 24, labelled: 0.5}, mine: {dataset: tiny, train: 24}, shapes: }}",
        "optim={name: adamw, lr: 1e-4, weight_decay: 0.05, schedule: one_cycle, warmup_epochs: 0.5, clip_norm: 1}",
        "optim.accumulate=2",
        "max_steps=9",
        "patience=2",
        "seed=5",
    )


@pytest.mark.parametrize("kind", SHARINGS)
@pytest.mark.parametrize("config", [tiny, changed])
def test_round_trip(config: Any, kind: str) -> None:
    before = config().replaced(sharing=SHARINGS[kind])
    after = from_tree(yaml.safe_load(before.to_yaml()))
    assert after == before
    assert type(after.sharing) is type(before.sharing)
    assert after.digest() == before.digest()
    assert after.to_yaml() == before.to_yaml()


def test_every_kind_of_sharing_is_tried_here() -> None:
    bundled = [point.name for point in metadata.entry_points(group="mtl.units")]
    assert set(SHARINGS) == {*STRUCTURAL, *bundled} <= set(kinds())  # other tests register units of their own


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_bundled_config_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    config = load(path)
    assert from_tree(yaml.safe_load(config.to_yaml())) == config
    assert load(write(tmp_path, config.to_yaml())) == config


def test_there_are_bundled_configs() -> None:
    assert EXAMPLES


def test_reference_protocol_is_the_bundled_one() -> None:
    config = load(next(path for path in EXAMPLES if path.stem == "fashion_two_task"))
    assert (config.optim.lr, config.optim.l2, config.data.standardize) == (1e-3, 1e-5, "pixel")
    assert isinstance(config.sharing, mtl.CrossStitch)
    assert (config.sharing.points, config.sharing.init) == (("pool1", "pool2", "fc3"), "identity")


# Digest


def test_digest_leaves_out_device_and_paths() -> None:
    config = tiny()
    assert config.digest() == tiny("device=cuda:1", "data.root=/elsewhere").digest()
    assert len(config.digest()) == 12
    assert int(config.digest(), 16) >= 0


@pytest.mark.parametrize(
    "change",
    ["optim.lr=0.002", "seed=1", "tasks=[tiny_b, tiny_a]", "tasks.0.weight=2", "sharing=cross_stitch", "backbone.width=0.2",
     "data.datasets.tiny.train=24", "data.split_seed=1", "precision=bf16", "balancer=uncertainty", "epochs=3"],
)  # fmt: skip
def test_digest_changes_with_what_decides_a_run(change: str) -> None:
    assert tiny(change).digest() != tiny().digest()


# Options, frozen


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys of a model; those of nested models instead of the model's own."""
    found = []
    for name, field in model.model_fields.items():
        union = get_origin(field.annotation) in (Union, UnionType)
        inner = get_args(field.annotation) if union else (field.annotation,)
        nested = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
        deeper = [key for kind in nested if kind.__name__ != "Sharing" for key in keys(kind, f"{prefix}{name}.")]
        found += deeper or [prefix + name]
    return found


def test_options_change_only_on_purpose() -> None:
    """A key added, renamed or removed breaks somebody's config: change this list with the changelog."""
    assert keys(mtl.RunConfig) == [
        "tasks", "backbone", "sharing", "balancer", "init_from",
        "data.root", "data.validation", "data.split_seed", "data.standardize", "data.augment.crop", "data.augment.flip",
        "data.workers", "data.bad_files", "data.input_shape",
        "data.mixing.policy", "data.mixing.temperature", "data.mixing.epoch", "data.class_balanced",
        "data.fraction", "data.labelled", "data.datasets",
        "optim.name", "optim.lr", "optim.momentum", "optim.l2", "optim.weight_decay", "optim.schedule", "optim.warmup_epochs",
        "optim.clip_norm", "optim.freeze", "optim.accumulate",
        "epochs", "max_steps", "epoch_steps", "batch_size", "patience",
        "checkpoints.every_seconds", "checkpoints.every_steps", "checkpoints.keep", "checkpoints.keep_every_epochs",
        "precision", "execution", "compile", "device", "seed",
    ]  # fmt: skip
    assert keys(mtl.CrossStitch) == [
        "kind", "points", "lr_multiplier", "granularity", "init.same", "init.cross", "dense_limit_gib",
    ]  # fmt: skip
    assert keys(mtl.SplitAt) == ["kind", "points", "at"]
    assert keys(mtl.Unshared) == keys(mtl.HardShared) == ["kind", "points"]


# Schema


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


def fits(value: Any, rule: Any, root: dict[str, Any]) -> bool:
    """Whether a plain value satisfies the part of JSON schema that is used here."""
    if "$ref" in rule:
        node: Any = root
        for part in rule["$ref"].removeprefix("#/").split("/"):
            node = node[part]  # an unresolved reference is a KeyError
        return fits(value, node, root)
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": int | float,
        "boolean": bool,
        "null": NoneType,
    }
    checks = [
        "anyOf" not in rule or any(fits(value, one, root) for one in rule["anyOf"]),
        "const" not in rule or value == rule["const"],
        "enum" not in rule or value in rule["enum"],
        "type" not in rule
        or (isinstance(value, types[rule["type"]]) and isinstance(value, bool) == (rule["type"] == "boolean")),
        "exclusiveMinimum" not in rule or not isinstance(value, int | float) or value > rule["exclusiveMinimum"],
        "minimum" not in rule or not isinstance(value, int | float) or value >= rule["minimum"],
    ]
    if isinstance(value, dict):
        known = rule.get("properties", {})
        checks += [key in value for key in rule.get("required", [])]
        checks += [fits(value[key], known[key], root) for key in value if key in known]
        others = rule.get("additionalProperties", True)
        checks += [fits(value[key], others, root) if isinstance(others, dict) else others for key in value if key not in known]
    if isinstance(value, list) and "items" in rule:
        checks += [fits(item, rule["items"], root) for item in value]
    return all(checks)


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values()))
    return set().union(*(references(item) for item in node)) if isinstance(node, list) else set()


def test_schema_has_every_key_with_a_description(schema: dict[str, Any]) -> None:
    assert list(schema["properties"]) == list(mtl.RunConfig.model_fields)
    assert schema["required"] == ["tasks"]
    assert schema["additionalProperties"] is False
    for key, rule in schema["properties"].items():
        referred = schema["$defs"][rule["$ref"].rpartition("/")[2]] if "$ref" in rule else {}
        assert rule.get("description") or referred.get("description"), key


def test_schema_references_resolve(schema: dict[str, Any]) -> None:
    found = references(schema)
    assert found
    assert {name.removeprefix("#/$defs/") for name in found} <= set(schema["$defs"])


def test_schema_offers_what_is_registered(schema: dict[str, Any]) -> None:
    for word, names in (("task", TASKS.names()), ("backbone", BACKBONES.names()), ("balancer", BALANCERS.names())):
        names_there, *mappings = schema["$defs"][word]["anyOf"]
        assert names_there["enum"] == names
        assert [rule["properties"]["name"]["const"] for rule in mappings[: len(names)]] == names
        under_other_names = [rule["properties"]["task"]["const"] for rule in mappings[len(names) :]]
        assert under_other_names == (names if word == "task" else [])
    assert {"fashion_category", "shapes_kind", "tiny_a"} <= set(TASKS.names())
    kinds_there, *sharings = schema["$defs"]["sharing"]["anyOf"]
    assert sorted(kinds_there["enum"]) == sorted(kinds())
    assert sorted(rule["properties"]["kind"]["const"] for rule in sharings) == sorted(kinds())
    assert list(schema["$defs"]["datasets"]["properties"]) == DATASETS.names()


@pytest.mark.parametrize("kind", SHARINGS)
def test_schema_accepts_what_loads(schema: dict[str, Any], kind: str) -> None:
    for config in (tiny(), changed()):
        assert fits(yaml.safe_load(config.replaced(sharing=SHARINGS[kind]).to_yaml()), schema, schema)
    assert fits({**TINY, "sharing": SHARINGS[kind]}, schema, schema)


@pytest.mark.parametrize(
    "sections",
    [
        {"epocs": 3},
        {"epochs": 0},
        {"tasks": ["tiny_d"]},
        {"tasks": [{"name": "tiny_a", "weigth": 1}]},
        {"backbone": {"name": "small_cnn", "widht": 2}},
        {"backbone": {"width": 2}},
        {"sharing": "cros_stitch"},
        {"sharing": {"kind": "unshared", "granularity": "dense"}},
        {"sharing": {"kind": "split"}},
        {"optim": {"lr": -1}},
        {"data": {"augment": {"flop": True}}},
        {"data": {"datasets": {"tiny": {"trian": 24}}}},
        {"data": {"datasets": {"mine": {"train": 24}}}},
        {"data": {"datasets": {"mine": {"dataset": "tyni"}}}},
        {"data": {"datasets": {"csv_images": {"file": "a.csv"}}}},
    ],
)
def test_schema_refuses_what_does_not_load(schema: dict[str, Any], sections: dict[str, Any]) -> None:
    assert fits(TINY, schema, schema)
    assert not fits({**TINY, **sections}, schema, schema)
    assert problems(**sections)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_schema_accepts_bundled_configs(schema: dict[str, Any], path: Path) -> None:
    assert fits(yaml.safe_load(load(path).to_yaml()), schema, schema)


def test_plugin_options_reach_the_schema(schema: dict[str, Any]) -> None:
    [rule] = [
        rule
        for rule in schema["$defs"]["backbone"]["anyOf"]
        if rule.get("properties", {}).get("name") == {"const": "small_cnn"}
    ]
    assert set(rule["properties"]) == {"name", "width", "dropout"}
    [rule] = [
        rule for rule in schema["$defs"]["task"]["anyOf"] if rule.get("properties", {}).get("name") == {"const": "tiny_a"}
    ]
    assert set(rule["properties"]) == {"name", "weight"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs=true", "epochs: must be a whole number; found 'True'"),
        ("data.class_balanced=5", r"data.class_balanced: must be a list, as in \[a, b\]; found 5"),
        ("data.mixing=proportionl", r"data.mixing.policy: .* \(did you mean 'proportional'\?\); found 'proportionl'"),
        ("data.labelled=5", "data.labelled: must be a mapping, as in {key: value}; found 5"),
        ("data.validation=yes", "data.validation"),
        ("seed=2024-13-45", "is not YAML"),
        ("seed=0x_", "is not YAML"),
        ("patience=3 data.validation=0", "patience=3 waits for a validation score"),
    ],
)
def test_values_that_yaml_makes_something_else_of(text: str, message: str) -> None:
    with pytest.raises(mtl.ConfigError, match=message):
        from_tree(override({"tasks": ["tiny_a"]}, text.split()))


def test_positions_in_a_list_of_nothing() -> None:
    with pytest.raises(mtl.ConfigError):
        from_tree(override({"tasks": [None]}, ["tasks.0.weight=2"]))


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("# nothing but a comment\n")
    with pytest.raises(mtl.ConfigError, match="the file is empty"):
        mtl.load_config(path)


def test_a_required_key_without_a_description_is_asked_for() -> None:
    class Bare(mtl.Options):
        size: int

    with pytest.raises(ValidationError, match="required"):
        Bare.model_validate({})


# Names of one's own


def test_a_registered_task_under_names_of_ones_own_is_several(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    twice = [{"name": "first", "task": "tiny_a"}, {"name": "second", "task": "tiny_a", "weight": 2.0}, "tiny_b"]
    config = mtl.RunConfig(**{**tiny_config, "tasks": twice, "epochs": 1})
    assert [(one.name, one.plugin, one.weight) for one in config.tasks] == [
        ("first", "tiny_a", None), ("second", "tiny_a", 2.0), ("tiny_b", "tiny_b", None),
    ]  # fmt: skip
    assert config.model_dump(mode="json")["tasks"] == twice
    assert from_tree(config.model_dump(mode="json")) == config
    result = mtl.train(config, "run")
    assert set(result.test) - {"score"} == {"first", "second", "tiny_b"}
    assert from_tree(load("run/config.yaml").model_dump(mode="json")).tasks == config.tasks


def test_a_dataset_under_a_name_of_ones_own(tiny_config: dict[str, Any]) -> None:
    config = mtl.RunConfig(
        **{**tiny_config, "data": {"validation": 0.25, "datasets": {"mine": {"dataset": "tiny", "train": 24}}}}
    )
    assert config.data.datasets["mine"].plugin == "tiny"
    assert config.model_dump(mode="json")["data"]["datasets"]["mine"]["dataset"] == "tiny"
    assert from_tree(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"tasks": [{"name": "first", "task": "tinny_a"}]}, "unknown task 'tinny_a'.*did you mean 'tiny_a'"),
        ({"tasks": [{"name": "tiny_b", "task": "tiny_a"}]}, "'tiny_b' is a registered task; give your 'tiny_a' another name"),
        (
            {"tasks": [{"name": "first", "taks": "tiny_a"}]},
            "unknown key 'taks'; .*did you mean 'task'.* 'first' is no registered task",
        ),
        ({"tasks": [{"name": "a b", "task": "tiny_a"}]}, "'a b' cannot be a name"),
        ({"tasks": [{"name": "first", "task": 3}]}, "task.*string"),
        ({"tasks": ["tiny_a"], "data": {"datasets": {"mine": {"dataset": "tinny"}}}}, "unknown dataset 'tinny'"),
        ({"tasks": ["tiny_a"], "data": {"datasets": {"mine": {"dataset": "tiny", "trian": 3}}}}, "did you mean 'train'"),
    ],
)
def test_mistakes_in_names_of_ones_own(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(mtl.ConfigError, match=message):
        from_tree(tree)
