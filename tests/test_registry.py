"""Registration, lookup and the three doors by which a plugin comes in: decorator, file, installed distribution."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import mtl
from mtl.errors import MTLError
from mtl.registry import BACKBONES, BALANCERS, DATASETS, TASKS, UNITS, Plugin, Registry, load_plugin_file

REGISTRIES = {registry.word: registry for registry in (DATASETS, TASKS, BACKBONES, UNITS, BALANCERS)}
AddDistribution = Callable[..., None]

GOOD = """
import mtl

@mtl.register_dataset("fake_data")
def data(split, root):
    return mtl.ArrayDataset([[0.0], [1.0], [2.0]], {"y": [0, 1, 0]})

@mtl.register_task("fake_task")
def task():
    return mtl.Task("fake_data", "y", mtl.Classification(("no", "yes")))
"""
GOOD_POINTS = {"mtl.datasets": {"fake_data": "{module}:data"}, "mtl.tasks": {"fake_task": "{module}:task"}}


TEMPORARY = ("fake_", "mtl_plugin_", __name__)
"""How the modules begin whose plugins must not outlive a test."""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """What a test registers or imports is gone after it."""
    yield
    for registry in REGISTRIES.values():
        kept = {name: [c for c in claims if not c.identity.startswith(TEMPORARY)] for name, claims in registry._claims.items()}
        registry._claims = {name: claims for name, claims in kept.items() if claims}
    for name in [name for name in sys.modules if name.startswith(("fake_", "mtl_plugin_"))]:
        del sys.modules[name]


@pytest.fixture
def add_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AddDistribution:
    """Install a distribution, as pip would lay it out, with one module named like it."""

    def add(name: str, source: str, points: dict[str, dict[str, str]], version: str = "1.0") -> None:
        folder = tmp_path / f"site-{name}"
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = []
        for group, entries in points.items():
            lines += [f"[{group}]", *(f"{key} = {value.format(module=name)}" for key, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        (folder / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))

    return add


def refusal(action: Callable[[], Any], kind: type[MTLError] = mtl.PluginError) -> str:
    """The message with which `action` is refused."""
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def fresh() -> Registry:
    return Registry("fruit", ("ripeness",), {"seeds": 3})


# By decorator


@pytest.mark.parametrize("word", REGISTRIES)
def test_decorated_factory_is_found_and_called(word: str) -> None:
    registry = REGISTRIES[word]
    register = getattr(mtl, f"register_{word}")

    class Keys(mtl.Options):
        depth: int = 2

    def factory(*arguments: Any) -> tuple[Any, ...]:
        return arguments

    name = f"decorated_{word}"
    assert register(name, options=Keys)(factory) is factory  # a decorated function stays what it was
    assert name in registry.names()
    assert registry.origins()[name] == __file__
    plugin = registry.get(name)
    assert isinstance(plugin, Plugin)
    assert (plugin.name, plugin.kind, plugin.factory, plugin.options) == (name, registry.kind, factory, Keys)
    given = tuple(object() for _ in registry.arguments)
    assert plugin.create(*given) == (*given, Keys())
    assert plugin.create(*given, options=Keys(depth=5)) == (*given, Keys(depth=5))


def test_kinds_do_not_mix() -> None:
    mtl.register_task("only_a_task")(lambda: None)
    assert "only_a_task" in TASKS.names()
    for registry in (DATASETS, BACKBONES, UNITS, BALANCERS):
        assert "only_a_task" not in registry.names()


def test_factory_without_options_is_called_without() -> None:
    registry = fresh()
    registry.register("apple")(lambda ripeness: ("apple", ripeness))
    assert registry.get("apple").create(0.5) == ("apple", 0.5)


def test_declared_details_and_their_defaults() -> None:
    registry = fresh()
    registry.register("apple")(lambda ripeness: None)
    registry.register("mango", seeds=1)(lambda ripeness: None)
    assert registry.get("apple").details == {"seeds": 3}
    assert registry.get("mango").details == {"seeds": 1}
    message = refusal(lambda: registry.register("plum", seed=1))
    assert all(part in message for part in ("'plum'", "'seed'", "did you mean 'seeds'"))


@pytest.mark.parametrize("name", ["", "1st", "a-b", "a.b", "a b", "_a", "a/b", "é", "a\n", None, 3])
def test_illegal_name_is_refused(name: Any) -> None:
    registry = fresh()
    message = refusal(lambda: registry.register(name))
    assert repr(name) in message
    assert "letters" in message
    assert registry.names() == []


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (lambda: None, None),
        (lambda ripeness, other: None, None),
        (lambda ripeness: None, mtl.Options),
        (lambda *, ripeness: None, None),
    ],
)
def test_wrong_signature_is_refused_when_registered(factory: Callable[..., Any], options: type[BaseModel] | None) -> None:
    registry = fresh()
    message = refusal(lambda: registry.register("apple", options=options)(factory))
    wanted = "(ripeness, options)" if options else "(ripeness)"
    assert all(part in message for part in ("fruit 'apple'", Path(__file__).name, wanted))
    assert registry.names() == []


def test_thing_that_cannot_be_called_is_refused() -> None:
    message = refusal(lambda: fresh().register("apple")(3))  # type: ignore[type-var]
    assert all(part in message for part in ("'apple'", "3", "callable"))


def test_callable_without_a_signature_is_refused() -> None:
    assert "'apple'" in refusal(lambda: fresh().register("apple")(iter))


@pytest.mark.parametrize("options", [int, {"a": 1}, mtl.Options()])
def test_options_must_be_a_pydantic_class(options: Any) -> None:
    message = refusal(lambda: fresh().register("apple", options=options)(lambda ripeness, options: None))
    assert all(part in message for part in ("'apple'", repr(options), "pydantic"))


def test_unknown_name_offers_the_nearest() -> None:
    registry = fresh()
    for name in ("apple", "mango"):
        registry.register(name)(lambda ripeness: None)
    message = refusal(lambda: registry.get("appel"))
    assert "unknown fruit 'appel'; known: apple, mango (did you mean 'apple'?)" in message
    assert "did you mean" not in refusal(lambda: registry.get("xyz"))


# One name, two plugins


def write_plugin(path: Path, result: str = "None", name: str = "shared_name") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"import mtl\n@mtl.register_task('{name}')\ndef make():\n    return {result}\n")
    return path


def test_rivals_are_an_error_for_those_who_name_them_only(tmp_path: Path) -> None:
    load_plugin_file(write_plugin(tmp_path / "one.py"))
    load_plugin_file(write_plugin(tmp_path / "two.py"))
    load_plugin_file(write_plugin(tmp_path / "three.py", "'fine'", "other_name"))
    assert TASKS.get("other_name").create() == "fine"
    assert "shared_name" in TASKS.names()
    message = refusal(lambda: TASKS.get("shared_name"))
    assert all(part in message for part in ("'shared_name'", "one.py", "two.py"))


def test_rivals_from_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("left", "right"):
        load_plugin_file(write_plugin(tmp_path / folder / "plugin.py"))
    message = refusal(lambda: TASKS.get("shared_name"))
    assert "left" in message
    assert "right" in message


def test_rivals_in_one_file_are_told_apart() -> None:
    registry = fresh()

    @registry.register("apple")
    def granny_smith(ripeness: float) -> None: ...

    @registry.register("apple")
    def boskoop(ripeness: float) -> None: ...

    message = refusal(lambda: registry.get("apple"))
    assert "granny_smith" in message
    assert "boskoop" in message


def test_same_function_again_replaces_itself() -> None:
    registry = fresh()

    def cell(result: str) -> None:
        """A notebook cell, run again after an edit."""

        @registry.register("apple")
        def apple(ripeness: float) -> str:
            return result

    cell("first")
    cell("second")
    assert registry.get("apple").create(0.0) == "second"


def test_plugin_file_loaded_again_replaces_itself(tmp_path: Path) -> None:
    path = write_plugin(tmp_path / "edited.py", "'before'")
    load_plugin_file(path)
    assert TASKS.get("shared_name").create() == "before"
    write_plugin(path, "'after it was edited'")
    load_plugin_file(path)
    assert TASKS.get("shared_name").create() == "after it was edited"


def test_rival_of_a_bundled_name_hurts_that_name_only() -> None:
    mtl.register_backbone("mlp")(lambda input_shape: None)
    message = refusal(lambda: BACKBONES.get("mlp"))
    assert all(part in message for part in ("'mlp'", "test_registry.py"))
    assert BACKBONES.get("small_cnn").name == "small_cnn"


# By file


def test_plugin_file_registers_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "my tasks-2.py"  # no legal module name
    path.write_text(GOOD)
    load_plugin_file(path)
    assert isinstance(TASKS.get("fake_task").create(), mtl.Task)
    assert len(DATASETS.get("fake_data").create(mtl.Split.TRAIN, tmp_path)) == 3
    assert path.name in TASKS.origins()["fake_task"]


def test_missing_plugin_file(tmp_path: Path) -> None:
    assert str(tmp_path / "gone.py") in refusal(lambda: load_plugin_file(tmp_path / "gone.py"))
    assert str(tmp_path) in refusal(lambda: load_plugin_file(tmp_path))


def test_file_that_is_not_python(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("x = 1\n")
    assert ".py" in refusal(lambda: load_plugin_file(path))


@pytest.mark.parametrize(
    ("source", "original"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module_xyz", "ModuleNotFoundError: No module named 'no_such_module_xyz'"),
        ("def broken(:", "SyntaxError"),
        ("import sys\nsys.exit('goodbye')", "SystemExit: goodbye"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import mtl\nmtl.register_task('t')(lambda x: None)", "must be callable as ()"),
        ("import mtl\nmtl.Classification(['one'])", "two or more"),
    ],
)
def test_plugin_file_that_fails_says_why(tmp_path: Path, source: str, original: str) -> None:
    path = tmp_path / "failing.py"
    path.write_text(source + "\n")
    message = refusal(lambda: load_plugin_file(path))
    assert "failing.py" in message
    assert original in message
    assert not [name for name in sys.modules if name.startswith("mtl_plugin_failing")]


def test_to_be_told_to_end_is_no_failure_of_a_plugin(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text("from mtl.interruption import Terminated\nraise Terminated(143)\n")
    with pytest.raises(SystemExit, match="143"):
        load_plugin_file(path)
    assert not [name for name in sys.modules if name.startswith("mtl_plugin_slow")]


def test_a_file_that_fails_leaves_nothing_of_its_own(tmp_path: Path) -> None:
    """What it imported on the way stays, since that will not be imported again."""
    path = tmp_path / "half.py"
    path.write_text(GOOD + "import mtl_tasks.shapes\nraise BaseException('no more')\n")
    assert "BaseException: no more" in refusal(lambda: load_plugin_file(path))
    assert "fake_task" not in TASKS.names()
    assert TASKS.get("shapes_kind").name == "shapes_kind"


def test_a_name_registered_twice_in_one_file(tmp_path: Path) -> None:
    path = write_plugin(tmp_path / "copied.py")
    path.write_text(2 * path.read_text())
    message = refusal(lambda: load_plugin_file(path))
    assert all(part in message for part in ("copied.py, line 6", "'shared_name' is registered twice"))


def test_a_slow_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("mtl.registry.SLOW", 0.02)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.3)\n")
    load_plugin_file(tmp_path / "slow.py")
    assert f"still loading plugin file '{tmp_path / 'slow.py'}' after 0.02 s" in capsys.readouterr().err
    (tmp_path / "quick.py").write_text("")
    load_plugin_file(tmp_path / "quick.py")
    assert not capsys.readouterr().err


# By distribution


def test_a_broken_distribution_does_not_take_others_with_it(add_distribution: AddDistribution) -> None:
    source = "import fake_whole\nraise ImportError('no libfoo')"
    add_distribution("fake_whole", GOOD, GOOD_POINTS)
    add_distribution("fake_broken", source, {"mtl.tasks": {"fake_bad": "{module}:task"}})
    assert "no libfoo" in refusal(lambda: TASKS.get("fake_bad"))
    assert isinstance(TASKS.get("fake_task").create(), mtl.Task)


def test_distribution_is_found_and_used(add_distribution: AddDistribution, tmp_path: Path) -> None:
    add_distribution("fake_good", GOOD, GOOD_POINTS)
    assert isinstance(TASKS.get("fake_task").create(), mtl.Task)
    assert TASKS.get("fake_task").origin == "fake_good 1.0"
    assert len(DATASETS.get("fake_data").create(mtl.Split.TRAIN, tmp_path)) == 3


def test_distribution_of_several_modules(add_distribution: AddDistribution) -> None:
    """An entry point may name an object that lives elsewhere in the distribution."""
    source = (
        GOOD
        + "import types, sys\nfront = types.ModuleType('fake_front')\nfront.task = task\nsys.modules['fake_front'] = front\n"
    )
    add_distribution("fake_back", source, {"mtl.tasks": {"fake_task": "fake_front:task"}})
    importlib.import_module("fake_back")
    assert isinstance(TASKS.get("fake_task").create(), mtl.Task)


def test_distribution_imported_before_it_is_asked_for(add_distribution: AddDistribution) -> None:
    add_distribution("fake_early", GOOD, GOOD_POINTS)
    importlib.import_module("fake_early")
    assert isinstance(TASKS.get("fake_task").create(), mtl.Task)
    assert TASKS.origins()["fake_task"] == "fake_early 1.0"


def test_listing_imports_nothing(add_distribution: AddDistribution) -> None:
    add_distribution("fake_listed", GOOD, GOOD_POINTS)
    assert "fake_task" in TASKS.names()
    assert TASKS.origins()["fake_task"] == "fake_listed 1.0"
    assert DATASETS.origins()["fake_data"] == "fake_listed 1.0"
    assert "fake_listed" not in sys.modules
    TASKS.get("fake_task")
    assert "fake_listed" in sys.modules


def test_listing_is_light() -> None:
    code = (
        "import sys; from mtl.registry import TASKS, BACKBONES; assert TASKS.names() and BACKBONES.origins(); "
        "print([m for m in ('torch', 'pydantic', 'numpy', 'mtl_tasks', 'mtl.backbones') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "original"),
    [
        ("raise ImportError('no libfoo')", "ImportError: no libfoo"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("import sys\nsys.exit()", "SystemExit"),
        ("def broken(:", "SyntaxError"),
        ("x = 1", "AttributeError"),
        ("import mtl\n@mtl.register_task('fake_task')\ndef task(): ...\n1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_broken_distribution_hurts_only_those_who_name_it(
    add_distribution: AddDistribution, source: str, original: str
) -> None:
    add_distribution("fake_broken", source, {"mtl.tasks": {"fake_task": "{module}:task"}}, version="2.7")
    assert TASKS.get("tiny_a").create().dataset == "tiny"
    assert TASKS.get("shapes_kind").create().dataset == "shapes"
    assert TASKS.origins()["fake_task"] == "fake_broken 2.7"
    for _ in range(2):  # also when asked again
        message = refusal(lambda: TASKS.get("fake_task"))
        assert all(part in message for part in ("fake_broken 2.7", "'fake_task'", original))
    assert TASKS.get("tiny_a").create().dataset == "tiny"


def test_distribution_that_says_what_would_work_is_quoted(add_distribution: AddDistribution) -> None:
    source = "import mtl\nraise mtl.PluginError('libfoo is missing; install libfoo')"
    add_distribution("fake_needy", source, {"mtl.tasks": {"fake_task": "{module}:task"}})
    message = refusal(lambda: TASKS.get("fake_task"))
    assert message == "task 'fake_task' of fake_needy 1.0 cannot be loaded: libfoo is missing; install libfoo"


def test_broken_distribution_is_reported_by_a_config(add_distribution: AddDistribution, tiny_config: dict[str, Any]) -> None:
    add_distribution("fake_broken", "raise ImportError('no libfoo')", {"mtl.tasks": {"fake_task": "{module}:task"}})
    assert mtl.RunConfig(**tiny_config).tasks[0].name == "tiny_a"
    message = refusal(lambda: mtl.RunConfig(**{**tiny_config, "tasks": ["tiny_a", "fake_task"]}), mtl.ConfigError)
    assert all(part in message for part in ("tasks.1", "fake_broken 1.0", "no libfoo"))


def test_two_distributions_with_one_name(add_distribution: AddDistribution) -> None:
    for name in ("fake_left", "fake_right"):
        add_distribution(name, GOOD, {"mtl.tasks": {"fake_task": "{module}:task", f"{name}_task": "{module}:task"}})
    assert TASKS.names().count("fake_task") == 1
    assert all(part in TASKS.origins()["fake_task"] for part in ("fake_left 1.0", "fake_right 1.0"))
    message = refusal(lambda: TASKS.get("fake_task"))
    assert all(part in message for part in ("'fake_task'", "fake_left 1.0", "fake_right 1.0"))
    assert "fake_left" not in sys.modules
    assert TASKS.get("tiny_a").name == "tiny_a"


def test_distribution_seen_twice_counts_once(
    add_distribution: AddDistribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed, and once more on the path: an editable checkout."""
    add_distribution("fake_twice", GOOD, GOOD_POINTS)
    copy = tmp_path / "copy"
    copy.symlink_to(tmp_path / "site-fake_twice", target_is_directory=True)
    monkeypatch.syspath_prepend(str(copy))
    assert isinstance(TASKS.get("fake_task").create(), mtl.Task)


@pytest.mark.parametrize("imported", [False, True])
def test_decorator_and_distribution_with_one_name(add_distribution: AddDistribution, imported: bool) -> None:
    """The distribution is named also where its module was imported before the registry had to load it."""
    add_distribution("fake_rival", GOOD, GOOD_POINTS)
    if imported:
        importlib.import_module("fake_rival")
    mtl.register_task("fake_task")(lambda: None)
    message = refusal(lambda: TASKS.get("fake_task"))
    assert all(part in message for part in ("'fake_task'", "fake_rival 1.0", "test_registry.py"))


@pytest.mark.parametrize(
    "source", ["def task(): ...\n", GOOD.replace('"fake_task"', '"another_name"'), "import mtl\ntask = mtl.Options\n"]
)
def test_entry_point_that_is_not_registered_under_its_name(add_distribution: AddDistribution, source: str) -> None:
    add_distribution("fake_bare", source, {"mtl.tasks": {"fake_task": "{module}:task"}})
    message = refusal(lambda: TASKS.get("fake_task"))
    assert all(part in message for part in ("fake_bare 1.0", "fake_bare:task", "@mtl.register_task('fake_task')"))


@pytest.mark.parametrize("word", REGISTRIES)
def test_every_bundled_name_loads_through_its_entry_point(word: str) -> None:
    bundled = [name for name, origin in REGISTRIES[word].origins().items() if origin.startswith("crosstitch")]
    assert bundled
    for name in bundled:
        plugin = REGISTRIES[word].get(name)
        assert (plugin.name, plugin.kind) == (name, REGISTRIES[word].kind)
