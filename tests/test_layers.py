"""The shape of the code: who imports whom, and what `import mtl` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtl

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in sorted((ROOT / "mtl").glob("*.py")) if path.stem != "__init__"}
PLUGINS = sorted((ROOT / "tasks" / "mtl_tasks").glob("*.py"))

RANK = {
    "errors": 0,
    "folders": 0,
    "findings": 1,
    "figures": 0,
    "exchange_figures": 1,
    "ablation": 9,
    "arms": 9,
    "arm_specs": 10,
    "jobs": 14,
    "analysis": 13,
    "report": 3,
    "sections": 2,
    "printing": 4,
    "comparison": 16,
    "comparison_dir": 10,
    "collecting": 15,
    "hardware": 0,
    "label_metrics": 0,
    "progress": 0,
    "seeding": 0,
    "stacking": 0,
    "scores": 0,
    "memory": 0,
    "interruption": 0,
    "processes": 1,
    "strict_yaml": 0,
    "strict_json": 1,
    "locking": 1,
    "commit": 2,
    "checkpoints": 3,
    "fingerprint": 6,
    "keeping": 10,
    "resuming": 13,
    "state": 1,
    "stats": 0,
    "subsets": 1,
    "sampling": 2,
    "resizing": 6,
    "duplicates": 6,
    "inspection": 13,
    "outliers": 6,
    "survey": 13,
    "packed": 6,
    "packing": 8,
    "columns": 1,
    "tables": 2,
    "tracking": 1,
    "units": 0,
    "writing": 0,
    "wide": 0,
    "weights": 1,
    "datasets": 2,
    "images": 1,
    "metrics": 1,
    "options": 1,
    "registry": 1,
    "stages": 1,
    "backbones": 2,
    "execution": 2,
    "mixing": 0,
    "balancing": 2,
    "decoder": 2,
    "files": 3,
    "torch_data": 3,
    "heads": 2,
    "optim": 2,
    "sharing": 2,
    "batched": 3,
    "choices": 3,
    "classification": 3,
    "cross_stitch": 3,
    "decoding": 3,
    "multilabel": 3,
    "ordinal": 3,
    "regression": 3,
    "task": 3,
    "torchjd_balancers": 3,
    "torchvision_backbones": 3,
    "batchable": 4,
    "portions": 4,
    "data": 5,
    "batches": 6,
    "standardize": 6,
    "config": 7,
    "factory": 3,
    "model": 7,
    "evaluation": 8,
    "aside": 8,
    "rundir": 8,
    "warm_start": 8,
    "auto": 9,
    "guard": 7,
    "run": 9,
    "logs": 10,
    "step": 10,
    "blame": 10,
    "trainer": 11,
    "build": 12,
    "conformance": 13,
    "prediction": 13,
    "cli": 17,
    "command": 2,
    "listing": 8,
    "__main__": 18,
}
"""A module imports from lower ranks only; `__init__` is exempt, since its table imports nothing until it is used."""


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import that runs, at any level: those under `if TYPE_CHECKING` do not."""
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for child in node.orelse:
            yield from statements(child)
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from statements(child)


def imported(source: str, package: str = "mtl") -> set[str]:
    """Dotted names that a module of `package` imports: `import a.b` gives a.b, `from a import b` gives a.b."""
    names: set[str] = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def own_modules(source: str) -> set[str]:
    """Which modules of `mtl` a source imports; "" is the package itself, whose table reaches every rank."""
    parts = [name.split(".") for name in imported(source) if name.split(".")[0] == "mtl"]
    return {path[1] if len(path) > 1 and path[1] in MODULES else "" for path in parts}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import mtl.data", {"data"}),
        ("from mtl.data import Split, Samples", {"data"}),
        ("from mtl import build", {"build"}),
        ("from . import build", {"build"}),
        ("from .build import run", {"build"}),
        ("def f():\n    class A:\n        from mtl.cli import main", {"cli"}),
        ("try:\n    import mtl.cli as c\nexcept ImportError:\n    import mtl.task", {"cli", "task"}),
        ("if TYPE_CHECKING:\n    import mtl.cli\nelse:\n    import mtl.task", {"task"}),
        ("import mtl", {""}),
        ("from mtl import Task", {""}),
        ("import mtlib\nimport torch", set()),
    ],
)
def test_every_form_of_import_is_seen(source: str, found: set[str]) -> None:
    assert own_modules(source) == found


def test_every_module_has_a_rank() -> None:
    assert sorted(RANK) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_come_from_lower_ranks(name: str) -> None:
    found = own_modules(MODULES[name].read_text())
    assert "" not in found, f"mtl/{name}.py imports from the package's public table; import from the module instead"
    wrong = {other: RANK[other] for other in found if RANK[other] >= RANK[name]}
    assert not wrong, f"mtl/{name}.py has rank {RANK[name]} and imports {wrong}"


@pytest.mark.parametrize("path", [ROOT / "mtl" / "__init__.py", *MODULES.values()], ids=lambda path: path.stem)
def test_the_framework_never_imports_a_plugin(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not [name for name in imported(path.read_text()) if name.split(".")[0] == "mtl_tasks"]
    text = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [value for value in text if value.split(".")[0] == "mtl_tasks"], "by import_module, then?"


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_plugins_see_the_public_names_only(path: Path) -> None:
    source = path.read_text()
    assert {name for name in imported(source, "mtl_tasks") if name.split(".")[0] == "mtl"} <= {"mtl"}
    used = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mtl"
    }
    assert used <= set(mtl.__all__)


def test_bundled_plugins_are_found() -> None:
    assert {path.stem for path in PLUGINS} >= {"fashion", "shapes"}


def test_import_mtl_is_cheap() -> None:
    code = "import sys, mtl; print([m for m in ('torch', 'pydantic', 'numpy', 'yaml', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", mtl.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(mtl, name)
    assert value.__name__ in (name, "load" if name == "load_config" else "register")
    assert name in dir(mtl)


def test_unknown_attribute_is_an_attribute_error() -> None:
    assert not hasattr(mtl, "no_such_name")


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse((ROOT / "mtl" / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in block.body:  # `from mtl.config import load as _load; load_config = _load`
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            seen[ast.unparse(node.targets[0])] = seen.pop(node.value.id)
    assert sorted(seen) == mtl.__all__
    assert {name: f"mtl.{module}" for name, module in mtl._MODULE_OF.items()} == seen


def test_no_public_name_is_a_module() -> None:
    assert not set(mtl.__all__) & set(MODULES)
