"""Comparisons: what arms consist of, that nothing is trained twice, and that what is said is what was planted."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Lines, TinyOptions, load_samples
from matplotlib.axes import Axes
from pydantic import Field
from safetensors.torch import save_file
from torch import nn

import mtl
from benchmarks import comparisons
from benchmarks.comparison_tables import tried
from mtl import analysis, comparison, exchange_figures, figures, jobs, keeping, trainer
from mtl.arm_specs import arms_of
from mtl.arms import Arm, Setting, member_seed, widened
from mtl.auto import resolved
from mtl.backbones import SmallCNN
from mtl.build import model_with_weights, reopened
from mtl.checkpoints import newest, state_of
from mtl.cli import app
from mtl.collecting import Facts, circumstances
from mtl.comparison import cells_of
from mtl.comparison_dir import begun, with_tasks
from mtl.config import RunConfig, load
from mtl.findings import BETTER, FEW, OPEN, WORSE, tell
from mtl.locking import Lock
from mtl.printing import print_comparison, readable
from mtl.rundir import DISTRIBUTION
from mtl.sections import exchange_parts, in_points, score_parts, summary, transfer_parts
from mtl.stats import estimate
from mtl.task import make_task


@pytest.fixture
def base(tiny_config: dict[str, Any]) -> RunConfig:
    return RunConfig(**tiny_config, sharing="cross_stitch")


@pytest.fixture
def setting(base: RunConfig) -> Setting:
    return Facts(resolved(base)).setting


def the(name: str, setting: Setting) -> Arm:
    [arm] = arms_of([name], setting.base, setting.points)
    return arm


# Arms


def test_most_arms_are_one_run_of_all_tasks(setting: Setting) -> None:
    for name, kind in (("unshared", "unshared"), ("hard_shared", "hard_shared"), ("cross_stitch", "cross_stitch")):
        [piece] = the(name, setting).pieces(setting, 0.5, 3)
        assert piece.config.sharing.kind == kind
        assert piece.tasks == ("tiny_a", "tiny_b")
        assert (piece.config.seed, piece.config.data.fraction) == (3, 0.5)


def test_split_is_an_arm_per_layer_point(setting: Setting) -> None:
    arms = arms_of(["split"], setting.base, setting.points)
    assert [arm.name for arm in arms] == ["split:pool1", "split:pool2", "split:fc3"]
    [piece] = the("split:pool2", setting).pieces(setting, 1.0, 0)
    assert piece.config.sharing.model_dump()["at"] == "pool2"


@pytest.mark.parametrize("sharing", ["unshared", "hard_shared", {"kind": "unshared", "points": ["pool1", "fc3"]}])
def test_split_is_every_point_whatever_the_config_shares(sharing: Any, base: RunConfig) -> None:
    setting = Facts(resolved(base.replaced(sharing=sharing))).setting
    points = ["pool1", "fc3"] if isinstance(sharing, dict) else ["pool1", "pool2", "fc3"]
    assert [arm.name for arm in arms_of(["split"], setting.base, setting.points)] == [f"split:{point}" for point in points]


def test_what_an_arm_is_given_beyond_the_others_is_noted(setting: Setting, in_tmp: Path) -> None:
    save_file(SmallCNN((1, 8, 8), 0.1).state_dict(), "w.safetensors")
    assert the("a:optim.lr=0.1 init_from=single_task", setting).unlike(setting) == {}
    assert the("a:batch_size=32", setting).unlike(setting) == {"images": 32}
    assert the("a:batch_size=8 optim.accumulate=2", setting).unlike(setting) == {}
    odd = "a:optim.accumulate=2 data.mixing=proportional data.class_balanced=[tiny_a]"
    assert the(odd, setting).unlike(setting) == {"images": 32, "draws": ["class_balanced"]}
    several = replace(setting, datasets={"tiny_a": "tiny", "tiny_b": "another"})
    assert the(odd, several).unlike(several) == {"images": 32, "draws": ["mixing", "class_balanced"]}
    assert the("a:init_from.tiny_b=w.safetensors", setting).unlike(setting) == {"init_from": ["tiny_b"]}


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("warm:backbone.width=0.2 init_from=single_task", r"arm 'warm': init_from\.tiny_a: .*weights of another network"),
        ("own:init_from.tiny_a=nowhere", r"arm 'own': init_from\.tiny_a: .*no such file or run"),
        ("own:backbone.width=0.2 init_from.tiny_a=w.safetensors", r"arm 'own': init_from\.tiny_a: .*another network"),
    ],
)
def test_weights_that_do_not_fit_an_arm_are_told_before_anything_is_trained(
    arm: str, message: str, base: RunConfig, in_tmp: Path
) -> None:
    save_file(SmallCNN((1, 8, 8), 0.1).state_dict(), "w.safetensors")
    with pytest.raises(mtl.ConfigError, match=message):
        mtl.compare(base, ["unshared", arm], 1, out="one")
    assert not Path("one").exists()


def test_single_task_is_a_run_per_task_and_the_first_member_of_an_ensemble(setting: Setting) -> None:
    alone, ensemble = (the(name, setting).pieces(setting, 1.0, 0) for name in ("single_task", "ensemble"))
    assert [piece.tasks for piece in alone] == [("tiny_a",), ("tiny_b",)]
    assert [piece.tasks[0] for piece in ensemble] == ["tiny_a", "tiny_a", "tiny_b", "tiny_b"]
    assert {piece.digest for piece in alone} < {piece.digest for piece in ensemble}
    assert all(piece.config.sharing.kind == "unshared" for piece in ensemble)


def test_no_member_of_an_ensemble_belongs_to_two_seeds() -> None:
    members = [member_seed(seed, member) for seed in range(200) for member in range(8)]
    assert len(set(members)) == len(members)


def test_a_wide_network_of_one_task_has_the_parameters_of_all_tasks(setting: Setting) -> None:
    wanted = setting.parameters(setting.base)
    for piece in the("single_task_wide", setting).pieces(setting, 1.0, 0):
        assert setting.parameters(piece.config) == pytest.approx(wanted, rel=0.02)


class WholeWidth(mtl.Options):
    width: int = Field(2, ge=2)


@mtl.register_backbone("whole_width", options=WholeWidth)
def whole_width(shape: tuple[int, ...], options: WholeWidth) -> mtl.Backbone:
    return mtl.Backbone(nn.Sequential(nn.Flatten(), nn.Linear(64, options.width)))


def test_the_weight_of_a_loss_among_others_is_not_that_of_a_task_alone(base: RunConfig) -> None:
    for given in ("tiny_c", {"name": "tiny_c", "weight": 0.5}):
        setting = Facts(resolved(base.replaced(tasks=["tiny_a", given]))).setting
        pieces = the("single_task", setting).pieces(setting, 1.0, 0)
        assert [piece.config.tasks[0].weight for piece in pieces] == [None, 1.0]


def test_a_width_may_be_a_whole_number_and_may_lead_nowhere(base: RunConfig) -> None:
    tasks = ["tiny_a", "tiny_b", "tiny_c"]
    config = resolved(base.replaced(backbone="whole_width", sharing="unshared", tasks=tasks))
    setting = Facts(config).setting
    pieces = the("single_task_wide", setting).pieces(setting, 1.0, 0)
    assert [piece.config.backbone.options for piece in pieces] == [WholeWidth(width=6)] * 3  # of 414 parameters 411 or 404
    with pytest.raises(mtl.ConfigError, match=r"backbone\.width=128 trains 100 parameters, no more than the config's does"):
        widened(config, 1000, lambda _: 100)
    alone = config.replaced(tasks=["tiny_a"], backbone={"name": "whole_width", "width": 8})
    widths = {wanted: widened(alone, wanted, setting.parameters).backbone.options for wanted in (100, 200, 547, 5000)}
    assert widths == {wanted: WholeWidth(width=width) for wanted, width in {100: 2, 200: 3, 547: 8, 5000: 73}.items()}


def test_a_warm_start_is_from_the_single_task_runs_of_the_same_seed(setting: Setting) -> None:
    [piece] = the("warm:init_from=single_task optim.lr=0.01", setting).pieces(setting, 0.5, 4)
    alone = the("single_task", setting).pieces(setting, 0.5, 4)
    assert piece.starts == {one.tasks[0]: one for one in alone}
    assert piece.config.optim.lr == 0.01


@pytest.mark.parametrize(
    "given",
    [
        "wide:backbone.width=0.2 epochs=1",
        {"wide": ["backbone.width=0.2", "epochs=1"]},
        {"wide": {"backbone.width": 0.2, "epochs": 1}},
        {"wide": {"backbone": {"width": 0.2, "name": "small_cnn"}, "epochs": 1}},
    ],
)
def test_an_arm_of_ones_own(given: Any, setting: Setting) -> None:
    [arm] = arms_of([given], setting.base, setting.points)
    [piece] = arm.pieces(setting, 1.0, 0)
    assert (arm.name, piece.config.epochs) == ("wide", 1)
    assert piece.config.backbone.options is not None
    assert piece.config.backbone.options.model_dump()["width"] == 0.2


def test_a_section_of_an_arm_of_ones_own_keeps_what_it_does_not_name(setting: Setting) -> None:
    changed = setting.base.replaced(optim=setting.base.optim.model_copy(update={"lr": 0.3}))
    given = {"optim": {"l2": 0.1}, "sharing": {"init": "identity", "kind": "cross_stitch"}}
    [arm] = arms_of([{"a": given}], changed, ())
    assert arm.about == "the config with optim.l2=0.1 sharing.kind=cross_stitch sharing.init=identity"
    [piece] = arm.pieces(replace(setting, base=changed), 1.0, 0)
    assert (piece.config.optim.lr, piece.config.optim.l2) == (0.3, 0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cross_stich"], r"unknown arm 'cross_stich'; .*did you mean 'cross_stitch'"),
        (["unshared", "unshared"], "arm 'unshared' is given more than once"),
        (["backbone.width=2"], "has no name; write NAME:key=value"),
        (["_mine:epochs=2"], "arm name '_mine': letters, .* the first a letter or a digit"),
        (["wide:"], "arm 'wide' has no overrides after ':'"),
        (["wide:backbone.width=2,0 optim"], "'optim' is no key=value; blanks part overrides"),
        (["x:data.root='a"], "a quote in .* is not closed"),
        (["x:sharing={kind: split"], "a bracket in .* is not closed"),
        (["naïve:seed=1"], "letters, digits"),
        (["ensemble:epochs=3"], "is a bundled one"),
        (["unshared:epochs=3"], "is a bundled one"),
        ([], "no arms; known: single_task"),
        ([3], "an arm is a name"),
    ],
)
def test_arms_that_mean_nothing(given: Sequence[Any], message: str, setting: Setting) -> None:
    with pytest.raises(mtl.ConfigError, match=message):
        arms_of(given, setting.base, setting.points)


def test_a_mistake_in_an_arm_names_the_arm(setting: Setting) -> None:
    facts = Facts(setting.base)
    for given, message in (
        ("mine:optim.lrr=1", r"arm 'mine': optim.lrr: unknown key 'lrr'"),
        ("mine:seed=3", "arm 'mine': seed: must be the same for all arms"),
        ("mine:data.split_seed=3 data.validation=0.5", "data.validation, data.split_seed: must be the same"),
        ("mine:tasks.1.name=shapes_kind", "tasks: must be the same"),
        ("mine:sharing.kind=hard_shared init_from=single_task", "the tasks share a trunk"),
    ):
        with pytest.raises(mtl.ConfigError, match=message):
            cells_of([the(given, setting)], [1.0], [0], facts)


def test_what_is_frozen_is_frozen_where_it_is(base: RunConfig, in_tmp: Path) -> None:
    config = base.replaced(optim=base.optim.model_copy(update={"freeze": ("units", "towers.tiny_b")}), epochs=1)
    found = mtl.compare(config, ["single_task", "unshared", "cross_stitch"], 1, out="one")
    costs = {cell["arm"]: cell["cost"]["parameters"] for cell in found.results["cells"]}
    assert costs["unshared"] == costs["cross_stitch"] == costs["single_task"]


def test_single_task_runs_take_as_many_steps_as_all_tasks_together(tiny_config: dict[str, Any]) -> None:
    tiny_config["data"] = {**tiny_config["data"], "labelled": {"tiny_a": 9}}
    setting = Facts(resolved(RunConfig(**tiny_config))).setting
    few, all_of_them = the("single_task", setting).pieces(setting, 1.0, 0)
    assert few.config.epoch_steps == Facts(setting.base).survey(1.0).epoch_steps
    assert all_of_them.config.epoch_steps is None
    assert few.config.data.labelled == {"tiny_a": 9}
    assert all_of_them.config.data.labelled == {}


# Keeping and continuing


def without_times(results: dict[str, Any]) -> Any:
    """What must not depend on when and how fast it ran."""
    plain = json.loads(json.dumps(results))
    plain.pop("environment")
    for cell in plain["cells"]:
        cell["cost"] = {key: cell["cost"][key] for key in ("parameters", "flops_per_image")}
    for said in plain["findings"]:
        for arm in said["arms"].values():
            arm.pop("cost")
    return plain


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_comparison_goes_on_and_ends_as_an_uninterrupted_one(
    base: RunConfig, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = ["single_task", "cross_stitch", "warm:init_from=single_task"]
    whole = mtl.compare(base, arms, 1, out="whole")
    trained: list[str] = []

    def some(config: RunConfig, run_dir: Path, progress: Any) -> Any:
        trained.append(run_dir.name)
        if len(trained) == 3:
            with monkeypatch.context() as patch:
                patch.setattr(trainer, "train_step", interrupted)
                real(config, run_dir, progress)
        return real(config, run_dir, progress)

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    real, step = jobs.train, trainer.train_step
    monkeypatch.setattr(jobs, "train", some)
    progress = Lines()
    with pytest.raises(KeyboardInterrupt):
        mtl.compare(base, arms, 1, out="cut", progress=progress)
    assert progress.lines[0].startswith("1 seed: whether arms differ cannot be shown, which with 3 arms takes 7 or more;")
    assert progress.lines[1] == "3 runs to train"
    assert any(re.fullmatch(r"\[1/4\] single_task tiny_a, seed 0: \d+ s; about \d+ s left", line) for line in progress.lines)
    assert progress.lines[-1].startswith("interrupted: 2 of 4 runs are finished, in cut/runs; the same command goes on")
    kept = {path.parent.name for path in Path("cut/runs").glob("*/result.json")}
    assert len(kept) == 2
    progress = Lines()
    cut = mtl.compare(base, arms, 1, out="cut", progress=progress)
    assert sorted(trained) == sorted(path.name for path in Path("cut/runs").iterdir())  # each begun once
    assert any(line.startswith("goes on after step 1, from checkpoint-") for line in progress.lines)
    assert without_times(cut.results) == without_times(whole.results)

    monkeypatch.setattr(jobs, "train", lambda *_: pytest.fail("nothing is left to train"))
    monkeypatch.setattr(jobs, "resume", lambda *_: pytest.fail("nothing is left to train"))
    again = mtl.compare(base, arms, 1, out="cut")
    assert without_times(again.results) == without_times(whole.results)


def test_a_folder_of_something_else_is_left_alone(base: RunConfig, in_tmp: Path) -> None:
    for name in ("report.md", "figures/thesis.svg", "tb/events"):
        path = Path("mine") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    with pytest.raises(mtl.RunError, match="holds 'figures' and no comparison"):
        mtl.compare(base, ["unshared"], 1, out="mine")
    assert {path.read_text() for path in Path("mine").rglob("*") if path.is_file() and path.name != ".lock"} == {"mine"}
    Path("file").write_text("")
    with pytest.raises(mtl.RunError, match="'file' is a file"):
        mtl.compare(base, ["unshared"], 1, out="file")


def test_a_mistake_leaves_no_directory(base: RunConfig, in_tmp: Path) -> None:
    with pytest.raises(mtl.ConfigError, match="unknown arm"):
        mtl.compare(base, ["unshraed"], 1, out="new")
    assert not Path("new").exists()


def test_other_starting_weights_are_another_comparison(base: RunConfig, in_tmp: Path) -> None:
    source = mtl.train(base.replaced(epochs=1, seed=5), "source")
    config = base.replaced(epochs=1, init_from={"tiny_a": {"path": source.run_dir}})
    mtl.compare(config, ["unshared"], 1, out="one")
    shutil.rmtree("source")
    mtl.train(base.replaced(epochs=1, seed=6), "source")
    with pytest.raises(mtl.ConfigError, match=r"init_from.tiny_a.digest: .* there, .* now"):
        mtl.compare(config, ["unshared"], 1, out="one")


@pytest.mark.parametrize("damage", ["{}", "null", "{", "[1]"])
def test_a_damaged_run_is_trained_again(base: RunConfig, in_tmp: Path, damage: str) -> None:
    whole = mtl.compare(base.replaced(epochs=1), ["unshared"], 1, out="one")
    [run] = Path("one/runs").iterdir()
    (run / "result.json").write_text(damage)
    again = mtl.compare(base.replaced(epochs=1), ["unshared"], 1, out="one")
    assert without_times(again.results) == without_times(whole.results)


@pytest.mark.parametrize("damage", ["{}", "null", "{", '{"asked": {}, "base": {}}'])
def test_a_damaged_note_is_told(base: RunConfig, in_tmp: Path, damage: str) -> None:
    Path("one").mkdir()
    Path("one/comparison.json").write_text(damage)
    with pytest.raises(mtl.RunError, match=r"comparison.json' is damaged"):
        mtl.compare(base, ["unshared"], 1, out="one")


def test_what_cannot_be_written_is_told_and_no_run_is_lost(base: RunConfig, in_tmp: Path) -> None:
    Path("one").mkdir()
    Path("one/comparison.json").write_text(begun(Path("one"), base.replaced(epochs=1))[1])
    Path("one/report.html").mkdir()
    with pytest.raises(mtl.RunError, match=r"cannot write the comparison in 'one': .*; finished runs are kept"):
        mtl.compare(base.replaced(epochs=1), ["unshared"], 1, out="one")
    [run] = Path("one/runs").iterdir()
    trained = (run / "result.json").read_bytes()
    Path("one/report.html").rmdir()
    mtl.compare(base.replaced(epochs=1), ["unshared"], 1, out="one")
    assert (run / "result.json").read_bytes() == trained
    assert Path("one/report.html").is_file()


def test_a_plan_says_what_would_be_trained_and_leaves_nothing(base: RunConfig, in_tmp: Path) -> None:
    said = comparison.plan(base, ["single_task", "unshared", "warm:init_from=single_task"], 2, out="one")
    assert (said["runs"], said["finished"], said["arms"]["single_task"]["runs"]) == (8, 0, 4)
    assert not Path("one").exists()
    assert said["notes"] == [
        "2 seeds: whether arms differ cannot be shown, which with 3 arms takes 7 or more; runs are kept, so that more can be "
        "added"
    ]
    arms = ["single_task", "unshared", "big:batch_size=12", "long:epochs=5 max_steps=7"]
    shares = comparison.plan(base, arms, 10, [0.5, 1], out="one")
    assert (shares["notes"], shares["seeds"], shares["fractions"]) == ([], [*range(10)], [0.5, 1.0])
    steps = {name: of["steps"] for name, of in shares["arms"].items()}
    assert steps["single_task"] == steps["unshared"] == {"0.5": 4, "1": 6}
    assert (steps["big"], steps["long"]) == ({"0.5": 4, "1": 6}, {"0.5": 7, "1": 7})
    people = readable(shares)
    assert people["arms"]["long"]["steps of a run"] == {"50 %": 7, "100 %": 7}
    assert readable(comparison.plan(base, ["unshared"], 1, out="one"))["arms"]["unshared"]["steps of a run"] == 6
    alone = comparison.plan(base.replaced(tasks=["tiny_a"]), ["unshared"], 1, out="one")
    assert alone["notes"] == [
        "there is one task: it has nothing to share, and kinds of sharing are alike",
        "there is one arm, unshared: nothing to compare it with",
    ]
    mtl.compare(base, ["unshared"], 1, out="one")
    assert comparison.plan(base, ["unshared"], 2, out="one")["finished"] == 1


def test_records_of_different_seeds_are_joined(base: RunConfig, in_tmp: Path) -> None:
    def record(seeds: Sequence[int]) -> dict[str, Any]:
        found = mtl.compare(base, ["unshared", "hard_shared"], seeds, out=f"of{len(seeds)}{seeds[0]}")
        return {**comparisons.kept(found.results), "given": ["unshared", "hard_shared"], "tuning": {}}

    together, first, then = record([0, 1, 2]), record([0]), record([1, 2])
    for joined in (comparisons.joined(first, then), comparisons.joined(then, first)):
        assert [(cell["seed"], cell["arm"], cell["test"]) for cell in joined["cells"]] == [
            (cell["seed"], cell["arm"], cell["test"]) for cell in together["cells"]
        ]
        assert joined["seeds"] == [0, 1, 2]
        assert joined["machines"] == together["machines"]
        assert without_times(joined)["findings"] == without_times(together)["findings"]
    again = comparisons.joined(together, then)
    assert again["seeds"] == [0, 1, 2]
    assert len(again["cells"]) == 6
    assert again["machines"] == together["machines"]  # and counted once
    [place] = then["machines"]
    with pytest.raises(ValueError, match=r"seeds \[1, 2\] are in both records, and not of one machine; train others"):
        comparisons.joined(together, {**then, "machines": [{**place, "device": "another"}]})
    with pytest.raises(ValueError, match="of another comparison, for these differ: reference"):
        comparisons.joined({**first, "reference": "hard_shared"}, then)
    with pytest.raises(ValueError, match=r"digest of the config \([0-9a-f]{12} and"):
        comparisons.joined({**first, "config": {**first["config"], "epochs": 7}}, then)
    there = {**first, "config": {**first["config"], "precision": "bf16"}}
    twice = comparisons.joined(comparisons.joined(there, then), {**there, "seeds": [3], "cells": []})
    assert twice["config"]["precision"] == "bf16 and fp32"


def test_a_trial_that_failed_is_not_chosen() -> None:
    tuning: comparisons.Tuning = {"a": {"x": None, "y": 0.5, "z": 0.5}, "b": {"x": 0.7, "y": None, "z": 0.1}}
    assert [comparisons.best(arm, scores) for arm, scores in tuning.items()] == ["y", "x"]
    assert tried(tuning).rows == [["x", "failed", "0.7000 (best)"], ["y", "0.5000 (best)", "failed"], ["z", "0.5000", "0.1000"]]
    with pytest.raises(ValueError, match="every trial of a failed"):
        comparisons.best("a", {"x": None})


def test_seeds_and_arms_can_be_added(base: RunConfig, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mtl.compare(base, ["unshared"], 1, out="one")
    trained: list[str] = []
    real = jobs.train
    monkeypatch.setattr(
        jobs, "train", lambda config, run_dir, progress: (trained.append(run_dir.name), real(config, run_dir))[1]
    )
    found = mtl.compare(base, ["unshared", "hard_shared"], 2, out="one")
    assert [name.rpartition("-")[0] for name in trained] == ["hard_shared-seed0", "unshared-seed1", "hard_shared-seed1"]
    assert found.results["seeds"] == [0, 1]


def test_what_else_is_there_is_told(base: RunConfig, in_tmp: Path) -> None:
    mtl.compare(base, ["unshared", "hard_shared"], 2, out="one")
    found = mtl.compare(base, ["unshared"], [0], out="one")
    assert len(found.results["not_shown"]) == 3
    assert "3 finished runs of this directory are not in these figures" in Path("one/report.md").read_text()
    assert "not in these figures" not in report_of(mtl.compare(base, ["unshared", "hard_shared"], 2, out="one"))


def report_of(found: comparison.Comparison) -> str:
    return Path(found.directory, "report.md").read_text()


def test_an_edited_plugin_is_noticed(base: RunConfig, in_tmp: Path) -> None:
    """Other tasks and networks are refused; of what may or may not matter the reader is told."""
    smooth = 0.0

    @mtl.register_task("tiny_edited")
    def edited() -> mtl.Task:
        return mtl.Task("tiny", "a", mtl.Classification(("dark", "grey", "light"), label_smoothing=smooth))

    width = 4

    @mtl.register_backbone("edited_net")
    def net(shape: tuple[int, ...]) -> mtl.Backbone:
        return mtl.Backbone(nn.Sequential(nn.Flatten(), nn.Linear(64, width)))

    file = Path("plugin.py")
    file.write_text("x = 1")
    config = base.replaced(tasks=["tiny_edited", "tiny_b"], backbone="edited_net", sharing="unshared")
    again = lambda seeds: mtl.compare(config, ["unshared"], seeds, out="one", plugins=[file])  # noqa: E731
    assert "edited while" not in report_of(again(1))
    file.write_text("x = 2")
    assert "plugin.py was edited while this comparison came about" in report_of(again(2))
    width = 5
    with pytest.raises(mtl.RunError, match=r"another network: it trained .* parameters, and its config now gives"):
        again(3)
    width = 4
    mtl.compare(config, ["single_task"], 1, fractions=[0.5], out="part")
    width = 5
    with pytest.raises(mtl.RunError, match=r"another network: it trained .* parameters, and its config now gives"):
        mtl.compare(config, ["single_task"], 2, fractions=[0.5], out="part")
    width, smooth = 4, 0.1
    with pytest.raises(mtl.RunError, match=r"other tasks, for a plugin was edited since: tiny_edited\.head\.label_smoothing 0"):
        again(3)


def test_tasks_are_the_same_on_another_machine_and_in_another_process(tmp_path: Path) -> None:
    """What is fitted differs in its last digits, and what has no text of its own by its address."""
    there = {"a": {"head": {"mean": [0.1, 3], "classes": ("x", "y"), "kind": object()}}}
    note = with_tasks("{}", there, tmp_path)
    same = {"a": {"head": {"mean": [0.1 + 1e-12, 3], "classes": ["x", "y"], "kind": object()}}}
    assert with_tasks(note, same, tmp_path) == note
    with pytest.raises(mtl.RunError, match=r"other tasks.*a\.head\.mean \[0\.1, 3\] there, \[0\.2, 3\] now"):
        with_tasks(note, {"a": {"head": {**same["a"]["head"], "mean": [0.2, 3]}}}, tmp_path)


def test_arms_that_are_the_same_runs_are_told(base: RunConfig, in_tmp: Path) -> None:
    found = mtl.compare(base, ["unshared", "cross_stitch", "mine:sharing.init=identity", "x:optim.lr=0.01"], 1, out="one")
    assert "cross_stitch and mine are the very same runs" in report_of(found)
    assert "x: the config with optim.lr=0.01; its sharing is cross_stitch." in report_of(found)


def test_a_directory_of_another_comparison_is_refused_with_what_differs(base: RunConfig, in_tmp: Path) -> None:
    mtl.compare(base, ["unshared"], 1, out="one")
    with pytest.raises(mtl.ConfigError, match=r"holds a comparison of another config .*\n  optim\.lr: 0\.001 there, 0\.01 now"):
        mtl.compare(base.replaced(optim={"lr": 0.01}), ["unshared"], 1, out="one")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 0}, "seeds: how many"),
        ({"seeds": "3"}, "seeds: how many.*found '3'"),
        ({"seeds": True}, "seeds: how many.*found True"),
        ({"seeds": [0, 1.5]}, "seeds: how many"),
        ({"seeds": 10**23}, "seeds: how many"),
        ({"fractions": 0.5}, "fractions: shares above 0.*found 0.5"),
        ({"fractions": "0.5"}, "fractions: shares above 0"),
        ({"jobs": "2"}, "jobs: at least 1; found '2'"),
        ({"out": 5}, "out: a directory; found 5"),
        ({"seeds": 0, "jobs": 0, "fractions": [0, 2]}, r"(?s)3 problems.*seeds.*fractions.*jobs"),
        ({"seeds": -1}, "seeds: how many, from 1 to 10,000, or different ones from 0 to .*; found -1"),
        ({"seeds": [1, 1]}, "seeds: how many"),
        ({"fractions": [0.5, 0]}, "fractions: shares above 0"),
        ({"fractions": [0.3333333, 0.33333334]}, "fractions: .* different in six digits"),
        ({"jobs": 0}, "jobs: at least 1"),
        ({"reference": "unshard"}, "reference: unknown arm 'unshard'"),
        ({"reference": "ensemble"}, "reference: 'ensemble' is not among the arms that are compared, unshared; add it"),
    ],
)
def test_plans_that_mean_nothing(given: dict[str, Any], message: str, base: RunConfig, in_tmp: Path) -> None:
    with pytest.raises(mtl.ConfigError, match=message):
        mtl.compare(base, ["unshared"], **{"seeds": 1, "out": "x", **given})
    with pytest.raises(mtl.ConfigError, match=message):
        comparison.plan(base, ["unshared"], **{"seeds": 1, "out": "x", **given})
    assert not Path("x/runs").exists()


def test_a_first_seed_below_zero_is_told_as_the_configs(base: RunConfig) -> None:
    with pytest.raises(mtl.ConfigError, match=r"seed: the first of 3, from 0 to 2,147,483,645; found -1"):
        comparison.wanted(base.replaced(seed=-1), 3, None, 1)


def test_a_plan_is_not_made_for_where_nothing_can_be_written(base: RunConfig, in_tmp: Path) -> None:
    Path("file").touch()
    with pytest.raises(mtl.RunError, match="'file' is a file; give a folder"):
        comparison.plan(base, ["unshared"], 1, out="file")
    with pytest.raises(mtl.RunError, match="cannot write to '/proc/x'"):
        comparison.plan(base, ["unshared"], 1, out="/proc/x")


def test_a_share_that_lacks_a_class_is_named(base: RunConfig, in_tmp: Path) -> None:
    with pytest.raises(
        mtl.DataError, match=r"with data\.fraction=0\.03 \(a larger share may do\): .*'tiny_a': 1 of 3 classes never"
    ):
        comparison.plan(base, ["unshared"], 1, [0.03], out="one")


def test_numbers_of_arrays_are_plain_ones(base: RunConfig) -> None:
    seeds, shares = comparison.wanted(base, np.arange(2), np.array([1, 0.5], np.float32), 1)
    assert json.dumps([seeds, shares]) == "[[0, 1], [0.5, 1.0]]"


def test_what_is_saved_when_may_change_and_a_note_that_was_cut_is_none(base: RunConfig, in_tmp: Path) -> None:
    Path("one").mkdir()
    Path("one/.comparison.json.4711.tmp").write_text("{")
    mtl.compare(base, ["unshared"], 1, out="one")
    fewer = base.replaced(checkpoints={"keep": 1})
    assert begun(Path("one"), fewer)[0].checkpoints.keep == 1
    [run] = Path("one/runs").iterdir()
    (run / "result.json").unlink()
    mtl.compare(fewer, ["unshared"], 1, out="one")
    assert load(run / "config.yaml").checkpoints.keep == 1


def test_a_run_that_fails_is_missing_and_the_others_are_not(
    base: RunConfig, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = mtl.compare(base, ["unshared", "wild:optim.lr=1e30 optim.name=sgd"], 1, out="one")
    assert [(cell["arm"]) for cell in found.results["cells"]] == ["unshared"]
    [lost] = found.results["failed"]
    assert (lost["arm"], lost["seed"]) == ("wild", 0)
    assert "not finite" in lost["why"]
    report = Path("one/report.md").read_text()
    assert "1 cell missing, for a run failed (wild, seed 0); the report says why." in report
    assert f"| wild | 0 | {lost['why']} |" in report.partition("## Runs that failed")[2]
    assert found.results["findings"][0]["answer"].endswith("wild failed with every seed.")
    found = mtl.compare(base, ["wild:optim.lr=1e30 optim.name=sgd", "unshared"], 1, out="one", reference="wild")
    assert "no run of wild, the reference, is finished" in found.results["findings"][0]["answer"]


@pytest.mark.filterwarnings("error")
def test_where_every_run_fails_the_report_says_so_and_draws_nothing(base: RunConfig, in_tmp: Path) -> None:
    wild = base.replaced(optim=base.optim.model_copy(update={"name": "sgd", "lr": 1e30}))
    found = mtl.compare(wild, ["unshared", "cross_stitch"], 1, fractions=[0.5, 1], out="one")
    assert len(found.results["failed"]) == 4
    page = Path("one/report.html").read_text()
    assert page.count("failed with every seed.") == 4
    assert (
        "4 cells missing, for a run failed (unshared at 50 %, seed 0; cross_stitch at 50 %, seed 0; unshared at 100 %" in page
    )
    assert "<svg" not in page


def test_how_many_trained_at_once_outlives_a_cut_and_a_lost_note(tmp_path: Path) -> None:
    where = {"device_name": "cpu", "threads": 1, "versions": {"torch": "2", DISTRIBUTION: "1"}}
    noted = {"a": {**where, "at_once": 1, "resumed": [{**where, "at_once": 3}]}, "b": {**where, "at_once": 2}, "lost": None}
    for name, note in noted.items():
        (tmp_path / name).mkdir()
        if note is not None:
            (tmp_path / name / "env.json").write_text(json.dumps(note))
    config = RunConfig(tasks=["tiny_a"], sharing="unshared", device="cpu")
    found = circumstances([{"runs": ["a", "b", "lost"], "starts": []}], tmp_path, config)
    assert found["at_once"] == 3
    assert found["machines"] == [{"device": "cpu", "threads": 1, "torch": "2", "mtl": "1", "runs": 2}]


def test_runs_under_way_say_where_they_are(tmp_path: Path) -> None:
    job = jobs.Job(mtl.RunConfig(tasks=["tiny_a"], sharing="unshared", epochs=3), tmp_path, "unshared, seed 0")
    assert jobs._epoch(job) == "1 of 3"
    for rows, said in {'{"epoch": 1}\n': "2 of 3", '{"epoch": 1}\n{"epo': "2 of 3", '{"epoch": 3}\n': "3 of 3"}.items():
        (tmp_path / "metrics.jsonl").write_text(rows)
        assert jobs._epoch(job) == said


def test_data_that_changed_are_refused(in_tmp: Path) -> None:
    """Finished runs of the old labels beside new ones of the new would be paired, and tell of the labels."""

    def write(flipped: int) -> None:
        random = np.random.default_rng(0)
        kind = np.arange(60) % 2
        x = (kind[:, None] + 0.1 * random.standard_normal((60, 4))).astype(np.float32)
        kind[:flipped] = 1 - kind[:flipped]
        np.savez("data/v.npz", x=x, kind=kind)

    Path("data").mkdir()
    write(20)
    config = RunConfig(
        tasks=[{"name": "kind", "task": "column_class", "dataset": "vectors"}],
        backbone={"name": "mlp", "widths": [4]},
        sharing="unshared",
        data={"validation": 0.2, "root": "data", "datasets": {"vectors": {"file": "v.npz", "features": "x", "test": 0.3}}},
        epochs=1,
        batch_size=16,
        device="cpu",
    )
    mtl.compare(config, ["unshared"], 1, out="out")
    write(0)
    with pytest.raises(
        mtl.RunError, match=r"'out' holds a comparison on other data: vectors, test; .*vectors, train.* changed"
    ):
        mtl.compare(config, ["unshared"], 2, out="out")
    write(20)
    mtl.compare(config, ["unshared"], 2, out="out")


def test_an_arm_cannot_make_another_task_of_one(in_tmp: Path) -> None:
    config = RunConfig(
        tasks=[{"name": "first", "task": "shapes_kind"}, "shapes_colour"],
        backbone={"name": "small_cnn", "width": 0.1},
        sharing="unshared",
        data={"validation": 20, "datasets": {"shapes": {"train": 60, "test": 40}}},
        device="cpu",
    )
    other = "odd:tasks=[{name: first, task: shapes_count}, shapes_colour]"
    with pytest.raises(mtl.ConfigError) as told:
        mtl.compare(config, ["unshared", other, "worse:optim.freeze=[nothing]"], 1, out="out")
    assert [line for line in told.value.problems if "arm 'odd': task 'first' is another one there" in line]
    assert not Path("out", "runs").exists()
    weighted = "even:tasks=[{name: first, task: shapes_kind, weight: 2}, shapes_colour]"
    cells_of(arms_of(["unshared", weighted], resolved(config), ()), [1.0], [0], Facts(resolved(config)))


def test_an_arm_whose_score_is_lost_with_its_loss_fails_alone(in_tmp: Path) -> None:
    """In epochs too short for the guard to give up, R^2 is no number before anything says that the loss is none."""
    config = RunConfig(
        tasks=["shapes_kind", "shapes_radius"],
        backbone={"name": "small_cnn", "width": 0.1},
        sharing="unshared",
        data={"validation": 20, "datasets": {"shapes": {"train": 200, "test": 40}}},
        optim={"name": "sgd", "lr": 0.01},
        epochs=2,
        batch_size=64,
        precision="fp32",
        device="cpu",
    )
    found = mtl.compare(config, ["unshared", "boom:optim.lr=1e9", "hard_shared"], 1, out="out").results
    assert [one["arm"] for one in found["failed"]] == ["boom"]
    assert "is not finite" in found["failed"][0]["why"]
    assert [cell["arm"] for cell in found["cells"]] == ["unshared", "hard_shared"]


@pytest.mark.spawns
def test_several_jobs_at_once_give_the_same(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PATIENCE", 1.0)
    config = RunConfig(
        tasks=["shapes_kind", "shapes_colour"],
        backbone={"name": "small_cnn", "width": 0.1},
        data={"validation": 20, "datasets": {"shapes": {"train": 100, "test": 40}}},
        epochs=1,
        precision="fp32",
        device="cpu",
    )
    progress = Lines()
    at_once = mtl.compare(config, ["unshared", "hard_shared"], 1, out="two", jobs=2, progress=progress)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        in_turn = mtl.compare(config, ["unshared", "hard_shared"], 1, out="one")
    finally:
        torch.set_num_threads(threads)
    assert [cell["test"] for cell in at_once.results["cells"]] == [cell["test"] for cell in in_turn.results["cells"]]
    assert any(re.match(r"\[2/2\] .*: \d+ s", line) for line in progress.lines)
    assert "under way: unshared, seed 0, epoch 1 of 1; hard_shared, seed 0, epoch 1 of 1" in progress.lines
    assert "Up to 2 runs trained at once" in Path("two/report.md").read_text()
    mtl.compare(config, ["unshared", "hard_shared"], 1, out="two")  # trains nothing
    assert "Up to 2 runs trained at once" in Path("two/report.md").read_text()


@pytest.mark.spawns
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import mtl\n"
        "if __name__ == '__main__':\n"
        "    data = {'validation': 20, 'datasets': {'shapes': {'train': 2000, 'test': 40}}}\n"
        "    network = {'name': 'small_cnn', 'width': 0.1}\n"
        "    config = mtl.RunConfig(tasks=['shapes_kind'], backbone=network, device='cpu', data=data, epochs=10**6)\n"
        f"    mtl.compare(config, ['unshared', 'hard_shared'], 1, out={str(tmp_path / 'out')!r}, jobs=2)\n"
    )
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, str(script)], stderr=said)
    try:
        runs = tmp_path / "out" / "runs"
        wait_for(lambda: len(list(runs.glob("*/metrics.jsonl"))) == 2)
        workers = children(process.pid)
        assert len(workers) >= 2
        process.send_signal(number)
        assert process.wait(20) == (143 if number is signal.SIGTERM else -signal.SIGKILL)
        wait_for(lambda: not any(alive(pid) for pid in workers))
        if number is signal.SIGTERM:  # saved in the middle of an epoch, and nothing left behind for Python to warn of
            assert (tmp_path / "said").read_text() == ""
            assert all(state_of(newest(run)[0])["partial"] is not None for run in runs.iterdir())
    finally:
        process.kill()


def wait_for(what: Callable[[], bool], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.2)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]


def test_a_script_that_is_imported_again_is_told(monkeypatch: pytest.MonkeyPatch, base: RunConfig) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(mtl.RunError, match="if __name__ == '__main__':"):
        mtl.compare(base, ["unshared"], 1)


def test_a_call_with_the_wrong_things(base: RunConfig) -> None:
    with pytest.raises(mtl.ConfigError, match=r"takes an mtl.RunConfig, as mtl.load_config gives; found str"):
        mtl.compare("config.yaml", ["unshared"])  # type: ignore[arg-type]
    with pytest.raises(mtl.ConfigError, match="arms is a sequence"):
        mtl.compare(base, "unshared")


def test_a_dataset_without_a_test_split_is_refused_before_anything_is_trained(base: RunConfig, in_tmp: Path) -> None:
    @mtl.register_dataset("untested", splits=("train",))
    def untested(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return coin(split, root)

    mtl.register_task("untested_a")(lambda: mtl.Task("untested", "a", mtl.Classification(("0", "1", "2"))))
    config = base.replaced(tasks=["untested_a"])
    for call in (mtl.compare, comparison.plan):
        with pytest.raises(mtl.ConfigError, match="dataset 'untested' has no test split, on which arms are compared"):
            call(config, ["unshared"], 1, out="one")  # type: ignore[operator]
    assert not list(Path("one").glob("runs/*"))


def test_steps_that_were_left_out_are_told(base: RunConfig, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, numbers = trainer.train_step, iter(range(999))

    def sometimes_not_finite(run: Any, step: Any) -> Any:
        weight = next(p for name, p in run.model.named_parameters() if name.startswith("heads."))
        hook = weight.register_hook(lambda gradient: gradient * (float("nan") if next(numbers) in (2, 3) else 1.0))
        found = real(run, step)
        hook.remove()
        return found

    monkeypatch.setattr(trainer, "train_step", sometimes_not_finite)
    found = mtl.compare(base, ["unshared", "hard_shared"], 1, out="one")
    assert [list(cell["left_out"].values()) for cell in found.results["cells"]] == [[2], [0]]
    told = "Steps whose loss or gradient was not finite were left out: of unshared up to 2 of a run. Differences are also of"
    assert told in Path("one/report.md").read_text()


# What is said


def test_figures_are_those_of_the_runs(base: RunConfig, in_tmp: Path) -> None:
    """What is tested, on what was trained, what it cost: read again from the runs, by other means."""
    config = base.replaced(data={"validation": 12, "datasets": {"tiny": {"labelled": 0.6}}}, sharing="cross_stitch")
    arms = ["single_task", "ensemble", "unshared", "cross_stitch", "warm:init_from=single_task"]
    cells = mtl.compare(config, arms, [3, 4], fractions=[0.5], out="one").results["cells"]
    of = {(cell["arm"], cell["seed"]): cell for cell in cells}
    run = lambda name: json.loads(Path("one/runs", name, "result.json").read_text())  # noqa: E731
    trained_on = set()
    for cell in cells:
        for name in cell["runs"]:
            trained = load(Path("one/runs", name, "config.yaml"))
            assert (trained.data.split_seed, trained.data.fraction, trained.data.validation) == (0, 0.5, 12)
            trained_on.add((len(trained.tasks), run(name)["images_per_second"] > 0, run(name)["steps"]))
        if cell["arm"] != "ensemble":
            for name in cell["runs"]:
                for task, figures_of_task in run(name)["test"].items():
                    if task != "score":
                        assert cell["test"][task] == figures_of_task
        sources = [*cell["runs"], *cell["starts"]]
        assert cell["cost"]["training_seconds"] == pytest.approx(sum(run(name)["training_seconds"] for name in sources))
        assert cell["cost"]["parameters"] == sum(run(name)["parameters"] for name in cell["runs"])
        if cell["exchange"]:
            assert cell["exchange"]["split"] == "val"
    assert len(trained_on) == 2  # alone and together, for equally many steps
    assert sorted(of["warm", 3]["starts"]) == sorted(of["single_task", 3]["runs"])
    one, two = of["unshared", 3]["cost"], of["ensemble", 3]["cost"]
    assert two["flops_per_image"] == 2 * one["flops_per_image"] == 2 * of["single_task", 3]["cost"]["flops_per_image"]
    for task in ("tiny_a", "tiny_b"):
        members = [name for name in of["ensemble", 3]["runs"] if f"-{task}-" in name]
        assert of["ensemble", 3]["test"][task]["accuracy"] == pytest.approx(accuracy_together(members, task))
        rows = [json.loads(line) for line in Path("one/runs", members[0], "metrics.jsonl").read_text().splitlines()]
        validated = [row["accuracy"] for row in rows if row["split"] == "val"]
        assert of["single_task", 3]["curves"][task] == validated


def accuracy_together(runs: Sequence[str], task: str) -> float:
    """Of the average of what runs give as probabilities, on the test split."""
    test = load_samples("tiny", [make_task(task)], TinyOptions(labelled=0.6))[mtl.Split.TEST]
    valid = test.valid[task]
    said = []
    for name in runs:
        config, tasks = reopened(Path("one/runs", name), "cpu")
        model = model_with_weights(Path("one/runs", name), config, tasks, test.shape).eval()
        with torch.no_grad():
            said.append(model({"tiny": test.images[:]}).outputs[task].softmax(1))
    right = torch.stack(said).mean(0).argmax(1) == test.targets[task]
    return float(right[valid if valid is not None else slice(None)].float().mean())


def test_delta_m_and_the_tables_follow_each_metrics_direction() -> None:
    results = results_of({"single_task": [0.5] * 3, "unshared": [0.6] * 3, "x": [0.8] * 3}, tasks=2)
    results["reference"] = "unshared"
    results["tasks"]["t1"] |= {"metrics": {"accuracy": "higher", "error": "lower"}, "relative": "error"}
    for cell in results["cells"]:
        cell["test"]["t1"]["error"] = {"single_task": 4.0, "unshared": 3.0, "x": 1.0}[cell["arm"]]
    [said] = tell(results)
    assert said["arms"]["x"]["delta_m"]["mean"] == pytest.approx(100 * (0.3 / 0.5 + 3 / 4) / 2)
    assert said["arms"]["unshared"]["delta_m"]["mean"] == pytest.approx(100 * (0.1 / 0.5 + 1 / 4) / 2)
    table = summary({**results, "findings": [said]}, said)
    row = dict(zip(table.head, table.rows[2], strict=True))
    assert row["points over unshared"].startswith("+20.00")
    assert row["delta_m, %"].startswith("+67.50")


def test_the_heat_maps_show_the_last_epoch_and_the_ablation_in_points(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(exchange_figures, "matrices", lambda of, tasks, label, *_, **__: drawn.setdefault(label, of) and "")
    monkeypatch.setattr(exchange_figures, "channels", lambda *_: "")
    results = results_of({"x": [0.5] * 2}, tasks=2)
    for cell in results["cells"]:
        coupling = {"epochs": [0, 1], "coupling": [[[1.0, 0.0], [0.0, 1.0]], [[0.9, 0.1 + 0.2 * cell["seed"]], [0.3, 0.8]]]}
        cell["exchange"] = {
            "split": "val",
            "coupling": {"p": coupling},
            "channels": {"p": [[[1.0], [0.1]], [[0.3], [1.0]]]},
            "falls": {"p": [[None, 0.02], [0.04 * cell["seed"], None]]},
        }
    list(exchange_parts(results, 1.0))
    assert drawn["x: what each task receives from each other"]["p"] == [[0.9, pytest.approx(0.2)], [0.3, 0.8]]
    assert drawn["x: fall of scores where a contribution is cut"]["p"] == [
        [None, pytest.approx(2.0)],
        [pytest.approx(2.0), None],
    ]


def test_a_heat_map_has_receivers_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(Axes, "imshow", lambda self, values, **_: shown.append(values.tolist()))
    exchange_figures.matrices({"p": [[1.0, 0.5], [0.0, 1.0]]}, ["a", "b"], "label", ".2f", 0.1, identity=True)
    assert shown == [[[0.0, 0.5], [0.0, 0.0]]]


def test_the_frozen_identity_is_unshared(base: RunConfig, in_tmp: Path) -> None:
    found = mtl.compare(base, ["unshared", "cross_stitch_frozen"], 2, out="one")
    said = found.results["findings"][0]["arms"]["cross_stitch_frozen"]
    assert said["difference"]["mean"]["mean"] == 0.0
    assert said["difference"]["mean"]["verdict"] == FEW
    for cell in found.results["cells"]:
        if cell["arm"] == "cross_stitch_frozen":
            assert cell["exchange"]["falls"] == {point: [[None, 0.0], [0.0, None]] for point in ("pool1", "pool2", "fc3")}
            assert all(matrix == [[1, 0], [0, 1]] for matrix in cell["exchange"]["coupling"]["fc3"]["coupling"])
    assert "Nothing is exchanged: all weights between different tasks are zero." in Path("one/report.html").read_text()


def test_what_exchanges_nothing_is_known_by_its_units_not_by_its_name(base: RunConfig) -> None:
    facts = Facts(resolved(base))
    frozen = {"sharing.init": "identity", "optim.freeze": ["units"]}
    own = {
        "mine": frozen,
        "some": {"optim.freeze": ["units.pool1"]},
        "mixed": {**frozen, "sharing.init": {"same": 0.9, "cross": 0.1}},
    }
    arms = arms_of(["cross_stitch_frozen", "cross_stitch", "unshared", own], facts.base, facts.setting.points)
    assert [arm.name for arm in arms if facts.besides(arm)["apart"]] == ["cross_stitch_frozen", "mine"]
    data = {"validation": 12, "datasets": {"shapes": {"train": 60, "test": 40}}}
    two = Facts(resolved(base.replaced(tasks=["tiny_a", "shapes_kind"], data=data)))  # whose towers see the images of both
    [frozen_too] = arms_of(["cross_stitch_frozen"], two.base, two.setting.points)
    assert not two.besides(frozen_too)["apart"]


@dataclass(frozen=True)
class Deep(mtl.Classification):
    hidden: int = 0

    def build(self, features: tuple[int, ...]) -> nn.Module:
        classes = len(self.classes)
        more = [nn.Linear(classes, self.hidden), nn.Linear(self.hidden, classes)] if self.hidden else []
        return nn.Sequential(super().build(features), *more)


class DeepOptions(mtl.Options):
    hidden: int = 0


@mtl.register_task("tiny_deep", options=DeepOptions)
def tiny_deep(options: DeepOptions) -> mtl.Task:
    return mtl.Task("tiny", "a", Deep(("dark", "grey", "light"), hidden=options.hidden))


def test_a_head_of_an_arm_of_its_own_is_counted_as_its_own(base: RunConfig, in_tmp: Path) -> None:
    config = base.replaced(tasks=["tiny_deep", "tiny_b"], epochs=1)
    arms = ["unshared", "deep:tasks.0.hidden=5 sharing.kind=unshared"]
    for seeds in (1, 2):  # the second finds the runs of the first, which are not of another network
        plain, deep = mtl.compare(config, arms, seeds, out="one", fractions=[0.5]).results["cells"][:2]
        assert deep["cost"]["parameters"] - plain["cost"]["parameters"] == (3 * 5 + 5) + (5 * 3 + 3)


def test_what_a_run_cannot_do_is_no_other_config(base: RunConfig, in_tmp: Path) -> None:
    """One tower is not batched, and no unit compiled where there is none, which runs write down."""
    config = base.replaced(execution="batched", epochs=1)
    mtl.compare(config, ["single_task"], 1, out="one")
    [run, _] = Path("one/runs").iterdir()
    assert load(run / "config.yaml").execution == "towers"
    (run / "result.json").unlink()
    mtl.compare(config, ["single_task"], 2, out="one")


def test_images_of_two_sizes_are_analysed_as_they_were_trained(in_tmp: Path) -> None:
    config = RunConfig(
        tasks=["tiny_a", "shapes_kind"],
        backbone={"name": "small_cnn", "width": 0.1},
        sharing={"kind": "cross_stitch", "init": {"same": 0.9, "cross": 0.1}},
        data={"validation": 12, "datasets": {"shapes": {"train": 60, "test": 40}}},
        epochs=1,
        batch_size=16,
        precision="fp32",
        device="cpu",
    )
    found = mtl.compare(config, ["cross_stitch", "ensemble"], 1, out="one").results
    stitched, ensemble = found["cells"]
    assert set(stitched["exchange"]["falls"]) == {"pool1", "pool2", "fc3"}
    config, tasks = reopened(Path("one/runs", stitched["runs"][0]), "cpu")
    seen = analysis.Analyst(Path("x"), "cpu")._samples(config, tasks)
    assert {part.shape for parts in seen.values() for part in parts.values()} == {(3, 32, 32)}
    assert set(ensemble["test"]) == {"tiny_a", "shapes_kind"}


def test_a_run_that_was_trained_anew_is_analysed_anew(base: RunConfig, in_tmp: Path) -> None:
    mtl.compare(base, ["cross_stitch"], 1, out="one")
    [kept] = Path("one/analysis").glob("*.json")
    before = json.loads(kept.read_text())
    others = {point: [[None, 0.7], [0.7, None]] for point in before["falls"]}
    kept.write_text(json.dumps({**before, "falls": others}))
    assert mtl.compare(base, ["cross_stitch"], 1, out="one").results["cells"][0]["exchange"]["falls"] == others
    shutil.rmtree(next(Path("one/runs").iterdir()))
    assert mtl.compare(base, ["cross_stitch"], 1, out="one").results["cells"][0]["exchange"]["falls"] == before["falls"]


def test_whose_weights_are_damaged_keeps_its_scores(base: RunConfig, in_tmp: Path) -> None:
    arms = ["cross_stitch", "unshared"]
    found = mtl.compare(base, arms, 1, out="one")
    [name] = found.results["cells"][0]["runs"]
    for file in Path("one/runs", name).rglob("*.safetensors"):
        os.truncate(file, 1000)
    for file in Path("one/analysis").glob("*.json"):
        file.write_text('{"x": 1}')  # no figures either
    again = mtl.compare(base, arms, 1, out="one")
    assert [cell["test"] for cell in again.results["cells"]] == [cell["test"] for cell in found.results["cells"]]
    assert again.results["cells"][0]["exchange"] is None
    assert f"What {name} exchanges is not shown: no best weights in" in Path("one/report.md").read_text()
    shutil.rmtree(Path("one/runs", name))
    assert mtl.compare(base, arms, 1, out="one").results["cells"][0]["exchange"] == found.results["cells"][0]["exchange"]


def test_an_ensemble_whose_weights_are_damaged_says_what_to_do(base: RunConfig, in_tmp: Path) -> None:
    found = mtl.compare(base, ["ensemble"], 1, out="one")
    for file in Path("one/runs", found.results["cells"][0]["runs"][0]).rglob("*.safetensors"):
        os.truncate(file, 1000)
    shutil.rmtree("one/analysis")
    with pytest.raises(mtl.RunError, match="move that run's folder away, and the same again trains it anew"):
        mtl.compare(base, ["ensemble"], 1, out="one")


def test_a_stop_after_training_says_so(base: RunConfig, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mtl.analysis.ablate", stopped)
    lines = Lines()
    with pytest.raises(KeyboardInterrupt):
        mtl.compare(base, ["cross_stitch"], 1, out="one", progress=lines)
    assert any(line.startswith("all is trained; now what exchange is worth, in 1 runs") for line in lines.lines)
    assert lines.lines[-1].startswith("interrupted: all is trained, in one/runs; the same command reads the rest and reports")


def test_an_error_that_nobody_foresaw_says_in_which_run(base: RunConfig, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    mtl.compare(base, ["unshared"], 1, out="one")
    monkeypatch.setattr(jobs, "train", broken)
    with pytest.raises(ZeroDivisionError) as found:
        mtl.compare(base, ["unshared"], 2, out="one")
    [note] = found.value.__notes__
    assert re.match(
        r"while training unshared, seed 1, in one/runs/unshared-seed1-\w+; 1 of 2 runs are finished and kept,", note
    )


def test_a_process_that_knows_less_says_what_it_imports(tmp_path: Path) -> None:
    with pytest.raises(mtl.RunError, match=r"does not know what this one knows: .*unknown task 'nobody'.*nothing typed into"):
        jobs._work({"tasks": ["nobody"]}, tmp_path, 1)


@mtl.register_task("tiny_same")
def tiny_same() -> mtl.Task:
    """What `tiny_a` predicts, for a tower that cannot learn it."""
    return mtl.Task("tiny", "a", mtl.Classification(("dark", "grey", "light")))


@mtl.register_dataset("coin")
def coin(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
    """Images that say everything about `a` and nothing about `toss`."""
    generator = torch.Generator().manual_seed(len(split))
    a = torch.arange(90) % 3
    images = (40 + 80 * a.view(-1, 1, 1) + 4 * torch.randn(90, 8, 8, generator=generator)).to(torch.uint8)
    return mtl.ArrayDataset(images, {"a": a, "toss": torch.randint(0, 2, (90,), generator=generator)})


mtl.register_task("coin_a")(lambda: mtl.Task("coin", "a", mtl.Classification(("0", "1", "2"))))
mtl.register_task("coin_toss")(lambda: mtl.Task("coin", "toss", mtl.Classification(("heads", "tails"))))


def test_a_planted_useful_exchange_is_found(base: RunConfig, in_tmp: Path) -> None:
    """The tower of `tiny_same` is frozen at zero: what it knows, it has from that of `tiny_a`."""
    part = load_samples("tiny", [make_task("tiny_a")])[mtl.Split.TRAIN]
    network = SmallCNN(part.shape, 0.1)
    save_file({name: torch.zeros_like(value) for name, value in network.state_dict().items()}, "zero.safetensors")
    config = base.replaced(
        tasks=["tiny_a", "tiny_same"],
        sharing={"kind": "cross_stitch", "points": ["fc3"], "lr_multiplier": 30},
        optim={"lr": 0.01, "freeze": ["towers.tiny_same"]},
        init_from={"tiny_same": "zero.safetensors"},
        epochs=3,
    )
    found = mtl.compare(config, ["unshared", "cross_stitch"], 7, out="useful")
    said = found.results["findings"][0]
    difference = said["arms"]["cross_stitch"]["difference"]
    assert (difference["tiny_same"]["verdict"], difference["mean"]["verdict"]) == (BETTER, BETTER)
    assert "cross_stitch" in said["answer"]
    assert "does better" in said["answer"]
    falls = [cell["exchange"]["falls"]["fc3"] for cell in found.results["cells"] if cell["exchange"]]
    assert sum(fall[1][0] for fall in falls) / len(falls) > 0.05  # without tiny_a's features tiny_same is worse


def test_a_planted_useless_exchange_is_not_found(base: RunConfig, in_tmp: Path) -> None:
    """One task is easy, the other cannot be learned: neither can be of use to the other."""
    config = base.replaced(tasks=["coin_a", "coin_toss"], optim={"lr": 0.003}, epochs=3)
    found = mtl.compare(config, ["unshared", "cross_stitch"], 7, out="useless")
    difference = found.results["findings"][0]["arms"]["cross_stitch"]["difference"]
    assert {difference[of]["verdict"] for of in ("coin_a", "coin_toss", "mean")} == {OPEN}
    assert "no difference is shown for cross_stitch" in found.results["findings"][0]["answer"]


def test_an_ensemble_averages_what_its_members_say() -> None:
    outputs = [torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]])]
    mean = mtl.Classification(("a", "b")).averaged(outputs).softmax(1)
    torch.testing.assert_close(mean, torch.stack([output.softmax(1) for output in outputs]).mean(0))
    for head in (mtl.MultiLabel(("a", "b")), mtl.Ordinal(("a", "b", "c"))):
        mean = head.averaged(outputs).sigmoid()
        torch.testing.assert_close(mean, torch.stack([output.sigmoid() for output in outputs]).mean(0))
    torch.testing.assert_close(mtl.Regression().averaged(outputs), torch.stack(outputs).mean(0))


ALONE = ("single_task", "single_task_wide", "ensemble")


def results_of(scores: dict[str, list[float]], tasks: int = 1, fractions: tuple[float, ...] = (1.0,)) -> dict[str, Any]:
    """What `tell` needs, of arms with a score per seed that all tasks have, at every share of the data."""
    names = [f"t{i}" for i in range(tasks)]
    cost = dict.fromkeys(("parameters", "flops_per_image", "seconds_per_step", "peak_memory_bytes", "training_seconds"), 1)
    return {
        "tasks": {
            name: {"score": "accuracy", "metrics": {"accuracy": "higher"}, "relative": "accuracy", "dataset": "d"}
            for name in names
        },
        "arms": [{"name": name, "about": ""} for name in scores],
        "config": {"batch_size": 16, "optim": {"accumulate": 1}},
        "samples": {f"{at:g}": {"train": {"d": 1600}} for at in fractions},
        "labelled": {f"{at:g}": dict.fromkeys(names, 1600) for at in fractions},
        "reference": next(iter(scores)),
        "baseline": "single_task" if "single_task" in scores else None,
        "fractions": list(fractions),
        "failed": [],
        "cells": [
            {
                "arm": name,
                "seed": seed,
                "fraction": at,
                "cost": cost,
                "steps": dict.fromkeys(names if name in ALONE else names[:1], 100),
                "runs": [f"{'unshared' if name in ALONE else name}-seed{seed}-abc"],
                "starts": [],
                "images": dict.fromkeys(names if name in ALONE else names[:1], 1600),
                "test": {t: {"accuracy": value} for t in names},
            }
            for at in fractions
            for name, values in scores.items()
            for seed, value in enumerate(values)
        ],
    }


def test_what_single_tasks_lose_is_told_where_only_the_mean_is_shown() -> None:
    """A harm in every seed, for which the family of tasks takes more seeds than that of means."""
    results = results_of({"single_task": [0.5] * 6, "x": [0.5] * 6}, tasks=2)
    for cell in results["cells"]:
        if cell["arm"] == "x":
            cell["test"] = {"t0": {"accuracy": 0.88 + 0.001 * cell["seed"]}, "t1": {"accuracy": 0.3}}
    [said] = tell(results)
    assert "does better. What single tasks gain or lose cannot be told from so few seeds, it takes 7: x on t0" in said["answer"]
    assert "t1 (-20.00)" in said["answer"]


def test_transfer_is_between_tasks_that_are_trained_together() -> None:
    means = {"single_task": 0.5, "ensemble": 0.7, "single_task_wide": 0.3, "x": 0.6, "unshared": 0.4}
    results = results_of({arm: [mean] * 10 for arm, mean in means.items()}, tasks=2)
    for reference in ("single_task", "unshared"):
        [said] = tell({**results, "reference": reference})
        assert [name for name, of in said["arms"].items() if "transfer" in of] == ["x", "unshared"]
        by_task, _, of_transfer = said["answer"].partition("Positive transfer, against single_task: ")
        assert of_transfer.startswith("x on t0 (+10.00), t1 (+10.00). Negative transfer, against single_task, is not shown.")
        assert of_transfer.endswith(
            "Worse than single_task without sharing anything, which is no transfer: unshared on t0 (-10.00), t1 (-10.00)."
        )
        assert "ensemble is better on t0 (" in by_task
        assert "single_task_wide is worse on t0 (" in by_task


def test_the_answer_says_who_was_given_more() -> None:
    results = results_of({"unshared": [0.5] * 8, "big": [0.6] * 8, "pre": [0.6] * 8})
    results["arms"][1]["unlike"] = {"images": 64}
    results["arms"][2]["unlike"] = {"init_from": ["t0"], "draws": ["class_balanced"]}
    for cell in results["cells"]:
        if cell["arm"] == "big":
            cell["images"] = {"t0": 6400}
    [said] = tell(results)
    assert "big takes 64 images in a step instead of 16, and in all 4 times as many as unshared; differences" in said["answer"]
    assert "pre draws its samples otherwise (class_balanced), and differences are also of that." in said["answer"]
    assert "pre starts t0 from given weights, whose training is not counted" in said["answer"]
    for cell in results["cells"]:
        if cell["arm"] == "big":
            cell["images"], cell["steps"] = {"t0": 1600}, {"t0": 25}
    [said] = tell(results)
    assert "(unshared 100, big 25, pre 100)" in said["answer"]
    assert "big takes 64 images in a step instead of 16, and in all as many as unshared; differences" in said["answer"]
    results["reference"] = "pre"
    for cell in results["cells"]:
        if cell["arm"] == "pre":
            cell["images"] = {"t0": 3200}
    assert "and in all 0.5 times as many as pre; differences" in tell(results)[0]["answer"]


def test_the_answer_says_who_saw_labels_more_often() -> None:
    results = results_of({"unshared": [0.5] * 8, "single_task": [0.6] * 8}, tasks=2)
    assert "label" not in tell(results)[0]["answer"]
    results["labelled"] = {"1": {"t0": 300, "t1": 1600}}
    assert "Not every sample has every label, and a run of one task alone" in tell(results)[0]["answer"]
    together = results_of({"unshared": [0.5] * 8, "x": [0.6] * 8}, tasks=2)
    assert "label" not in tell({**together, "labelled": results["labelled"]})[0]["answer"]


def test_verdicts_are_what_the_figures_allow() -> None:
    a = [0.5, 0.52, 0.51, 0.53, 0.5, 0.52, 0.51]
    up, noise = [0.011, 0.01, 0.012, 0.009, 0.01, 0.013, 0.01], [0.01, -0.01, 0.004, -0.004, 0.002, -0.003, 0.001]
    scores = {
        "unshared": a,
        "up": [x + d for x, d in zip(a, up, strict=True)],
        "same": [x + d for x, d in zip(a, noise, strict=True)],
    }
    [said] = tell(results_of({**scores, "down": [x - d for x, d in zip(a, up, strict=True)]}, tasks=2))
    assert {name: of["difference"]["mean"]["verdict"] for name, of in said["arms"].items() if name != "unshared"} == {
        "up": "better", "same": "not shown", "down": "worse",
    }  # fmt: skip
    assert said["arms"]["up"]["difference"]["t0"]["raw_p"] == 2 / 2**7
    assert said["arms"]["up"]["difference"]["t0"]["p"] == pytest.approx(3 * 2 * 2 / 2**7)  # of three arms and two tasks
    assert said["arms"]["up"]["difference"]["t0"]["verdict"] == FEW
    assert said["answer"].startswith("Compared with unshared, in points of the mean test score: up (+1.07, 95 % interval +0.9")
    [said] = tell(results_of({name: values[:6] for name, values in scores.items()}, tasks=2))
    assert said["arms"]["up"]["difference"]["mean"]["verdict"] == FEW
    assert "cannot be told from 6 seeds, since with 2 arms to compare it takes 7 or more" in said["answer"]
    [said] = tell(results_of({name: scores[name][:6] for name in ("unshared", "up")}, tasks=2))
    assert said["arms"]["up"]["difference"]["mean"]["verdict"] == "better"  # a single comparison: 2^-5
    assert said["arms"]["up"]["difference"]["t0"]["verdict"] == FEW


def test_the_answer_says_where_it_hurts() -> None:
    results = results_of({"unshared": [0.5] * 8, "x": [0.5] * 8}, tasks=2)
    for cell in results["cells"]:
        if cell["arm"] == "x":
            noise = 0.001 * (cell["seed"] % 3)
            cell["test"] = {"t0": {"accuracy": 0.555 + noise}, "t1": {"accuracy": 0.45 - noise}}
    [said] = tell(results)
    assert said["answer"].endswith("Task by task: x is better on t0 (+5.59); x is worse on t1 (-5.09).")


def test_the_answer_says_who_trained_for_longer() -> None:
    results = results_of({"unshared": [0.5] * 8, "a": [0.6] * 8, "b": [0.5] * 8}, fractions=(0.5, 1.0))
    for cell in results["cells"]:
        if cell["fraction"] == 1.0:
            cell["steps"] = {"t0": {"unshared": 100, "a": 1500, "b": 100 + cell["seed"]}[cell["arm"]]}
    half, whole = tell(results)
    assert "steps" not in half["answer"]
    assert whole["answer"].endswith(
        "Not all trained for equally many optimizer steps (unshared 100, a 1,500, b 100 to 107), and differences are also of "
        "that."
    )


def test_of_many_arms_that_are_all_alike_hardly_one_comparison_in_twenty_claims_anything() -> None:
    random = np.random.default_rng(0)
    claims = 0
    for _ in range(60):
        scores = {name: list(0.9 + 0.01 * random.standard_normal(10)) for name in ["unshared", *(f"arm{i}" for i in range(12))]}
        [said] = tell(results_of(scores, tasks=2))
        claims += " better" in said["answer"] or " worse" in said["answer"]
    assert claims <= 6  # each has one reference, so its comparisons go wrong together; uncorrected it is 22


def test_p_is_corrected_over_the_shares_of_the_data_too() -> None:
    up = [0.9 + 0.001 * seed for seed in range(8)]
    scores = {"unshared": [0.8] * 8, "up": up, "same": [0.8, 0.81] * 4}
    for fractions, verdict in {(1.0,): "better", (0.1, 0.5, 1.0): "better", tuple(i / 10 for i in range(1, 11)): FEW}.items():
        found = tell(results_of(scores, fractions=fractions))
        assert [said["fraction"] for said in found] == list(fractions)
        for said in found:
            mean = said["arms"]["up"]["difference"]["mean"]
            assert mean["p"] == pytest.approx(min(1.0, 2 / 2**8 * 2 * len(fractions)), rel=0.5)
            assert mean["verdict"] == verdict
    assert "with 20 comparisons it takes 10 or more" in found[0]["answer"]


def test_who_has_fewer_seeds_than_others_is_judged_by_what_those_can_show() -> None:
    """Holm steps down: beside a smaller p, six seeds can be enough where with all alike they were not."""
    base = [0.5 + 0.01 * (seed % 3) for seed in range(8)]
    scores = {"unshared": base, "a": [x + 0.1 for x in base], "b": [x + 0.1 for x in base[:6]]}
    [said] = tell(results_of(scores))
    assert {name: of["difference"]["mean"]["verdict"] for name, of in said["arms"].items() if name != "unshared"} == {
        "a": BETTER, "b": BETTER,
    }  # fmt: skip
    assert "cannot be told" not in said["answer"]
    [said] = tell(results_of({**scores, "a": base}))
    assert said["arms"]["b"]["difference"]["mean"]["verdict"] == FEW
    assert (
        "whether b (+10.00, 95 % interval +10.00 to +10.00) differs cannot be told from 6 seeds, since with 2 arms"
        in said["answer"]
    )
    missing = results_of({**scores, "c": base[:5]}, fractions=(0.5, 1.0))
    missing["cells"] = [cell for cell in missing["cells"] if cell["arm"] not in "bc" or cell["fraction"] == 1.0]
    half, whole = tell(missing)
    assert half["arms"]["a"]["difference"]["mean"]["comparisons"] == 4  # one at the half, three at the whole
    assert whole["answer"].endswith(
        "whether b (+10.00, 95 % interval +10.00 to +10.00), c (+0.00, 95 % interval +0.00 to +0.00) differ cannot be told "
        "from 5 seeds, since with 4 comparisons it takes 7 or more."
    )


def test_where_nothing_differs_hardly_one_comparison_in_twenty_claims_a_mean_or_a_task() -> None:
    """The verdicts of all arms, tasks and shares together: each of the four families is wrong in one of twenty."""
    random = np.random.default_rng(0)
    wrong: Counter[tuple[str, bool]] = Counter()
    arms = ("unshared", "single_task", "a", "b")
    for _ in range(60):
        results = results_of({name: [0.0] * 10 for name in arms}, tasks=2, fractions=(0.1, 0.5, 1.0))
        for cell in results["cells"]:
            cell["test"] = {t: {"accuracy": 0.9 + 0.01 * random.standard_normal()} for t in results["tasks"]}
        found = tell(results)
        claims = {
            (key, what == "mean")
            for said in found
            for of in said["arms"].values()
            for key in ("difference", "transfer")
            for what, d in of.get(key, {}).items()
            if d["verdict"] in (BETTER, WORSE)
        }
        wrong.update(claims)
        answers = " ".join(said["answer"] for said in found)
        claimed = ("Task by task: ", " transfer, against single_task: ", " than single_task without sharing anything")
        assert any(words in answers for words in claimed) == any(not mean for _, mean in claims)
    assert max(wrong.values(), default=0) <= 6  # of 60, of which 3 are due


def test_many_arms_of_one_verdict_are_counted() -> None:
    scores = {name: [0.9, 0.91, 0.92] for name in ["unshared", "a", "b", "c", "d", "e"]}
    [said] = tell(results_of(scores))
    assert "whether 5 arms (from a +0.00 to e +0.00) differ cannot be told from 3 seeds" in said["answer"]


def test_negative_transfer_is_named_task_by_task() -> None:
    results = results_of({"single_task": [0.5] * 8, "unshared": [0.5] * 8, "x": [0.5] * 8}, tasks=2)
    results["reference"] = "unshared"
    for cell in results["cells"]:
        noise = 0.001 * (cell["seed"] % 3)
        if cell["arm"] == "x":
            cell["test"] = {"t0": {"accuracy": 0.55 + noise}, "t1": {"accuracy": 0.45 - noise}}
    [said] = tell(results)
    assert said["answer"].endswith(
        "Task by task: x is better on t0 (+5.09); x is worse on t1 (-5.09). Negative transfer, against single_task: x on t1 "
        "(-5.09). Positive transfer, against single_task: x on t0 (+5.09)."
    )
    [said] = tell({**results, "reference": "single_task"})  # which are the same differences, said once
    assert "Task by task" not in said["answer"]
    assert said["answer"].count("t1 (-5.09)") == 1
    few = {**results, "cells": [cell for cell in results["cells"] if cell["seed"] < 3]}
    assert "transfer" not in tell(few)[0]["answer"]
    same = {**results, "cells": [{**cell, "test": results["cells"][0]["test"]} for cell in results["cells"]]}
    assert tell(same)[0]["answer"].endswith(" Negative transfer, against single_task, is not shown.")


def test_the_answer_says_who_starts_from_trained_towers() -> None:
    results = results_of({"unshared": [0.5] * 8, "warm": [0.6] * 8})
    for cell in results["cells"]:
        cell["starts"] = ["single_task-t0"] * (cell["arm"] == "warm")
    assert tell(results)[0]["answer"].endswith(
        "warm starts from towers already trained on each task alone, and differences are also of that."
    )


def test_the_reference_and_the_single_task_runs_are_compared_once() -> None:
    """Where both families had them, one could say that unshared is worse and the other that it is not."""
    base = [0.5 + 0.01 * (seed % 3) for seed in range(7)]
    results = results_of({"unshared": base, "single_task": [x + 0.1 for x in base], "x": base, "y": base})
    results["reference"] = "unshared"
    [said] = tell(results)
    alone, joint = said["arms"]["single_task"]["difference"]["mean"], said["arms"]["unshared"]["transfer"]["mean"]
    assert (alone["p"], alone["verdict"], alone["mean"]) == (joint["p"], BETTER, -joint["mean"])
    assert joint["verdict"] == WORSE
    assert (joint["low"], joint["high"]) == (-alone["high"], -alone["low"])
    assert "Worse than single_task without sharing anything" in said["answer"]
    assert "Worse than single_task without sharing anything, which is no transfer: unshared on t0 (-10.00)." in said["answer"]
    assert "Negative transfer, against single_task: x on t0 (-10.00); y on t0 (-10.00)." in said["answer"]


def test_of_whom_negative_transfer_cannot_be_told_is_named() -> None:
    base = [0.5 + 0.01 * (seed % 3) for seed in range(8)]
    scores = {"unshared": base, "single_task": base, "x": [x - 0.2 for x in base[:4]]}
    results = {**results_of(scores, tasks=2), "reference": "unshared"}
    assert tell(results)[0]["answer"].endswith(
        "Negative transfer, against single_task, is not shown; of x it cannot be told, from so few seeds."
    )


def test_transfer_is_against_the_single_task_runs() -> None:
    [said] = tell(results_of({"single_task": [0.8, 0.5], "joint": [0.84, 0.45]}))
    assert said["arms"]["joint"]["delta_m"]["mean"] == pytest.approx((5 - 10) / 2)
    assert said["arms"]["joint"]["transfer"]["t0"]["mean"] == pytest.approx((0.04 - 0.05) / 2)


def test_no_two_of_many_look_alike() -> None:
    look = figures.Look([f"arm{i}" for i in range(42)])
    assert len({(look.colour(arm), str(look.dashes(arm))) for arm in look.of}) == 42
    assert len({(look.colour(arm), look.marker(arm)) for arm in look.of}) == 42


def test_an_interval_that_is_not_even_is_shown_by_its_ends() -> None:
    found = asdict(estimate([0.001] * 19 + [0.02] * 3))
    below, above = 100 * (found["mean"] - found["low"]), 100 * (found["high"] - found["mean"])
    assert above > 1.2 * below
    assert in_points(found) == f"{100 * found['mean']:+.2f} (-{below:.2f} +{above:.2f})"


def test_one_seed_has_no_interval_to_speak_of() -> None:
    few, more = results_of({"single_task": [0.9], "b": [0.8]}), results_of({"single_task": [0.9] * 3, "b": [0.8, 0.7, 0.75]})
    for results, words in ((few, False), (more, True)):
        results["findings"] = tell(results)
        parts = list(score_parts(results, results["findings"][0], figures.Look(["single_task", "b"])))
        parts += transfer_parts(results, results["findings"][0], figures.Look(["single_task", "b"]))
        assert ["95 %" in part.picture for part in parts if part.picture] == [False, words, words]
        assert ("interval" in parts[0].caption) == words


@pytest.mark.parametrize(("columns", "first"), [(250, "test score         seeds  "), (130, "test score               ")])
def test_a_table_wider_than_the_terminal_has_a_column_per_arm(
    columns: int, first: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "shapes.json").read_text())
    results["findings"] = tell(results)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_comparison(results)
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert table[0].startswith(first)
    assert max(map(len, table)) <= columns


def test_the_report_stands_alone_and_escapes_names(base: RunConfig, in_tmp: Path) -> None:
    arms = ["single_task", "ensemble", "cross_stitch"]
    found = mtl.compare(base.replaced(epochs=1), arms, 2, fractions=[0.5, 1.0], out="one")
    page, text = Path("one/report.html").read_text(), Path("one/report.md").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"|@import|<script", page)  # nothing from elsewhere
    assert found.results["findings"][0]["answer"][1:] in page
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (Path("one") / figure).read_text().startswith("<svg ")
    from mtl import report

    results = json.loads(Path("one/results.json").read_text())
    assert report.html(results, list(report.sections_of(results))) == page  # from the file alone
    text = json.dumps(results).replace("cross_stitch", "<script>alert(1)</script>").replace('"accuracy"', '"acc $x_{$ *z*"')
    hostile = json.loads(text)
    sections = list(report.sections_of(hostile))
    assert "<script" not in report.html(hostile, sections)
    said = report.markdown(hostile, sections, Path("one/figures"))
    assert "<script" not in said
    assert r"acc \$x_{\$ \*z\*" in said
    assert "$x_{$ *" not in said
    events = list(Path("one/tb").glob("*/events*"))
    assert len(events) == len(results["cells"]) == 12


def test_the_command_line_prints_one_json_object_and_finds_its_arms(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(
        "{tasks: [tiny_a, tiny_b], backbone: {name: small_cnn, width: 0.1}, data: {validation: 12}, epochs: 1, batch_size: 16}"
    )
    Path("arms.yaml").write_text("[unshared, {slow: {optim.lr: 1.0e-5}}]")
    arguments = ["compare", "c.yaml", "--arms", "arms.yaml", "--arm", "mine:epochs=2", "--seeds", "1", "--json"]
    app(arguments, standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert [arm["name"] for arm in found["arms"]] == ["unshared", "slow", "mine"]
    app([*arguments, "--dry-run"], standalone_mode=False)
    plan = json.loads(capsys.readouterr().out)
    assert (plan["runs"], plan["finished"], plan["directory"]) == (3, 3, found["directory"])
    app([*arguments[:-1], "--dry-run", "--arms", "", "--seeds", "5,"], standalone_mode=False)
    people = yaml.safe_load(capsys.readouterr().out)
    assert (people["seeds"], people["arms"]["mine"]["steps of a run"]) == ([5], 6)
    assert re.fullmatch("runs/compare-c-[0-9a-f]{12}", found["directory"])


def test_towers_of_one_seed_start_alike_in_every_arm(base: RunConfig, in_tmp: Path) -> None:
    from mtl.build import model_of

    facts = Facts(resolved(base))
    models: dict[str, nn.Module] = {}
    for name in ("single_task", "unshared", "cross_stitch"):
        piece = the(name, facts.setting).pieces(facts.setting, 1.0, 5)[0]
        tasks = [task for task in facts.tasks if task.name in piece.tasks]
        models[name] = model_of(piece.config, tasks, facts.shape)
    for name, value in models["single_task"].state_dict().items():
        assert all(torch.equal(model.state_dict()[name], value) for model in models.values())


def test_what_is_saved_of_a_run_is_never_removed_for_an_error_that_may_pass(
    base: RunConfig, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full, or another process at work in the run, end the comparison; what was saved stays, and it goes on."""
    whole = mtl.compare(base, ["unshared"], 1, out="whole")
    base = base.replaced(checkpoints={"every_steps": 2})
    step = trainer.train_step
    left = [4]

    def killed(*arguments: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise Killed
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", killed)
        with pytest.raises(Killed):
            mtl.compare(base, ["unshared"], 1, out="cut")
    (run_dir,) = Path("cut/runs").iterdir()
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "commit", no_space)
        with pytest.raises(mtl.RunError, match=r"cannot save step 4 .* No space left on device; step 2 is saved"):
            mtl.compare(base, ["unshared"], 1, out="cut")
    with Lock(run_dir), pytest.raises(mtl.RunError, match="is in use by another process"):
        mtl.compare(base, ["unshared"], 1, out="cut")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == saved
    cut = mtl.compare(base, ["unshared"], 1, out="cut")
    assert [cell["test"] for cell in cut.results["cells"]] == [cell["test"] for cell in whole.results["cells"]]
    mtl.resume(run_dir, ["epochs=5"])
    with pytest.raises(mtl.RunError, match=r"is finished, and of another config .* made longer"):
        mtl.compare(base, ["unshared"], 1, out="cut")
    (run_dir / "result.json").unlink()
    with pytest.raises(mtl.RunError, match=r"is begun, and of another config .* made longer"):
        mtl.compare(base, ["unshared"], 1, out="cut")
    assert newest(run_dir)[0].is_dir()


class Killed(BaseException):
    """In place of SIGKILL."""


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
