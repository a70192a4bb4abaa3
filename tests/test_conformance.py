"""Conformance: every bundled task passes, and every way of breaking a promise is found and explained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import mtl
from mtl import cli, conformance
from mtl.registry import BALANCERS, DATASETS, TASKS

ROOT = Path(__file__).parent.parent
BUNDLED = sorted(name for name, origin in TASKS.origins().items() if origin.startswith("crosstitch "))
SPAWN = [check for check in conformance.CHECKS if check[0] == "pickles"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A worker process costs seconds: it is started in the tests that are about it."""
    if "spawns" not in request.keywords:
        monkeypatch.setattr(conformance, "CHECKS", tuple(check for check in conformance.CHECKS if check not in SPAWN))


def results(name: str, **options: Any) -> dict[str, tuple[bool | None, str]]:
    return {check.name: (check.ok, check.detail) for check in mtl.check_task(name, **options)}


def test_there_are_bundled_tasks() -> None:
    assert {"fashion_category", "fashion_group", "shapes_kind", "shapes_radius", "shapes_traits", "shapes_count"} <= set(
        BUNDLED
    )


@pytest.mark.parametrize("name", [name for name in BUNDLED if not name.startswith(("column_", "face_"))])  # which need data
def test_every_bundled_task_conforms(name: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue("fashion_root") if "fashion" in name else None
    failed = {title: detail for title, (ok, detail) in results(name, root=root).items() if not ok}
    assert not failed


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third-party plugin of `tests/external_plugin`, from its source: CI installs it beside a wheel instead."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "external_plugin" / "src"))
    import glyphs.balancing
    import glyphs.network
    import glyphs.tasks  # noqa: F401


@pytest.mark.spawns
@pytest.mark.parametrize("name", ["glyphs_letter", "glyphs_tilt"])
def test_the_third_party_plugin_conforms_on_its_own_backbone(outside: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the worker
    found = results(name, backbone="glyph_net")
    assert {title: detail for title, (ok, detail) in found.items() if not ok} == {}
    assert "on glyph_net" in found["builds"][1]
    assert {"glyphs"} <= set(DATASETS.names())
    assert "softmax_losses" in BALANCERS.names()


# --- broken promises --------------------------------------------------------------------------------------------------------


def register(name: str, head: mtl.Head, data: Callable[[str], mtl.ArrayDataset] | None = None, **more: Any) -> None:
    @mtl.register_dataset(f"{name}_data")
    def dataset(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return data(split) if data is not None else make_tiny(60 if split == mtl.Split.TRAIN else 24, split)

    @mtl.register_task(name)
    def task() -> mtl.Task:
        return mtl.Task(f"{name}_data", "a", head, **more)

    DATASETS._claims[f"{name}_data"] = DATASETS._claims[f"{name}_data"][-1:]
    TASKS._claims[name] = TASKS._claims[name][-1:]


THREE = mtl.Classification(("dark", "grey", "light"))


class Detached(mtl.FeatureHead):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@dataclass(frozen=True)
class Broken(mtl.Classification):
    """Breaks what it is told to."""

    how: str = ""

    def build(self, features: tuple[int, ...]) -> nn.Module:
        return Detached(features, 3) if self.how == "detached" else super().build(features)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        match self.how:
            case "coupled":
                return super().loss(output - output.mean(0), target)
            case "infinite":
                return super().loss(output, target) / 0
            case "reduced":
                return F.cross_entropy(output, target)
            case "opposite":
                return 20 - super().loss(output, target).clamp_max(20)
        return super().loss(output, target)

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        match self.how:
            case "tensor":
                return [{"label": i} for i in output.argmax(1)]
            case "one":
                return [{"label": "dark"}]
        return super().decode(output)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "class_weights": None} if self.how == "forgets" else super().describe()


def shuffled(split: str) -> mtl.ArrayDataset:
    tiny = make_tiny(60, split)
    return mtl.ArrayDataset(np.random.default_rng().permutation(tiny.images.numpy()), tiny.labels)


def out_of_range(split: str) -> mtl.ArrayDataset:
    tiny = make_tiny(60, split)
    return mtl.ArrayDataset(tiny.images, {"a": torch.where(torch.arange(60) == 31, 3, tiny.labels["a"])})


def other_size(split: str) -> mtl.ArrayDataset:
    tiny = make_tiny(60, split)
    return mtl.ArrayDataset(tiny.images if split == "train" else tiny.images[..., :6], tiny.labels)


def same_pictures(split: str) -> mtl.ArrayDataset:
    tiny = make_tiny(60, split)
    return mtl.ArrayDataset(tiny.images[:1].expand(60, -1, -1, -1), tiny.labels)


@pytest.mark.parametrize(
    ("check", "message", "parts"),
    [
        ("dataset", r"splits differ in shape or dtype", {"head": THREE, "data": other_size}),
        ("same twice", r"two calls give different training samples", {"head": THREE, "data": shuffled}),
        ("labels", r"label 3 of sample 31 is out of range", {"head": THREE, "data": out_of_range}),
        ("builds", r"must be unreduced", {"head": Broken(THREE.classes, how="reduced")}),
        ("loss", r"not finite before anything is learned", {"head": Broken(THREE.classes, how="infinite")}),
        ("loss", r"depends on the other samples of its batch", {"head": Broken(THREE.classes, how="coupled")}),
        ("gradient", r"is a result detached\?", {"head": Broken(THREE.classes, how="detached")}),
        ("decodes", r"must give what JSON can hold", {"head": Broken(THREE.classes, how="tensor")}),
        ("decodes", r"must give one mapping per sample, 32; found 1", {"head": Broken(THREE.classes, how="one")}),
        ("restores", r"restored\(describe\(\)\) gives another loss", {"head": Broken(THREE.classes, (1, 2, 9), how="forgets")}),
        (
            "overfits a batch",
            r"is its direction right\?",
            {"head": Broken(THREE.classes, how="opposite")},
        ),
        ("overfits a batch", r"do labels belong to their images", {"head": THREE, "data": same_pictures}),
        pytest.param(
            "pickles",
            r"lambda",
            {"head": THREE, "loss": lambda output, target: F.cross_entropy(output, target, reduction="none")},
            marks=pytest.mark.spawns,
        ),
    ],
)
def test_a_broken_promise_is_found_and_explained(check: str, message: str, parts: dict[str, Any]) -> None:
    import re

    register("broken", **parts)
    found = results("broken")
    ok, detail = found[check]
    assert ok is False, found
    assert re.search(message, detail), detail


def test_checks_that_need_a_failed_one_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    register("broken", THREE, other_size)
    found = results("broken")
    assert found["loads"][0] is True
    assert found["builds"] == (None, "not tried: an earlier check failed")


def test_the_command_reports_and_says_by_its_status_whether_all_is_well() -> None:
    register("broken", THREE, out_of_range)
    done = CliRunner().invoke(cli.app, ["check-plugin", "tiny_a", "broken"])
    assert done.exit_code == 1
    assert "tiny_a: conforms\n" in done.stdout
    assert "broken: does not conform\n" in done.stdout
    assert "  FAILED  labels            dataset 'broken_data', train split, task 'broken': label 3 of sample 31" in done.stdout
    sound = CliRunner().invoke(cli.app, ["check-plugin", "tiny_a", "--json"])
    assert sound.exit_code == 0
    with pytest.raises(mtl.PluginError, match=r"unknown task 'tinya'; .*did you mean 'tiny_a'"):
        CliRunner().invoke(cli.app, ["check-plugin", "tinya"], catch_exceptions=False)
    with pytest.raises(mtl.PluginError, match=r"unknown backbone 'resnet_18'"):
        CliRunner().invoke(cli.app, ["check-plugin", "tiny_a", "--backbone", "resnet_18"], catch_exceptions=False)


def test_data_that_come_class_by_class_conform() -> None:
    def by_class(split: str) -> mtl.ArrayDataset:
        tiny = make_tiny(120, split)
        order = tiny.labels["a"].argsort(stable=True)
        return mtl.ArrayDataset(tiny.images[order], {"a": tiny.labels["a"][order].float()})

    register("sorted_data", mtl.Regression(), by_class)
    assert {title: detail for title, (ok, detail) in results("sorted_data").items() if not ok} == {}


def test_a_loss_that_explodes_is_named() -> None:
    def explodes(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none") * torch.where(output.abs().sum(1) > 5, torch.nan, 1.0)

    register("broken", THREE, loss=explodes)
    ok, detail = results("broken")["overfits a batch"]
    assert ok is False
    assert "the loss became nan at step" in detail


def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    """Checking starts a process, which must not run the caller again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nsys.path.insert(0, sys.argv[1])\nimport conftest, mtl\nprint('begun')\n"
        "print([c.ok for c in mtl.check_task('tiny_a') if c.name == 'pickles'])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(ROOT / "tests")], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.split("\n") == ["begun", "[True]", ""], done.stderr
