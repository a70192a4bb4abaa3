"""A run's `execution`: what it becomes, what it says, and that it changes nothing but rounding."""

from __future__ import annotations

import pytest
import torch
import yaml

import mtl
from mtl import build
from mtl.batched import Batched
from mtl.execution import OneByOne
from mtl.trainer import fit

pytestmark = pytest.mark.usefixtures("in_tmp")


def config(**keys: object) -> mtl.RunConfig:
    """Two small tasks that exchange."""
    data = {"validation": 20, "datasets": {"shapes": {"train": 120, "test": 20}}}
    return mtl.RunConfig(
        **{
            "tasks": ["shapes_kind", "shapes_size"],
            "backbone": {"name": "small_cnn", "width": 0.1, "dropout": 0.0},
            "sharing": {"kind": "cross_stitch", "init": {"same": 0.9, "cross": 0.1}},
            "data": data,
            "epochs": 2,
            "batch_size": 50,
            "precision": "fp32",
            "device": "cpu",
            **keys,
        }
    )


def test_auto_is_one_by_one_on_a_cpu() -> None:
    run = build.run(config(), None)
    run.tracker.close()
    assert run.config.execution == "towers"
    assert isinstance(run.model.execution, OneByOne)
    assert not run.notes


@pytest.mark.parametrize("sharing", ["cross_stitch", "unshared", {"kind": "split", "at": "pool1"}])
def test_a_batched_run_learns_the_same_and_is_evaluated_from_its_files(sharing: object) -> None:
    runs = {kind: build.run(config(execution=kind, sharing=sharing), None) for kind in ("towers", "batched")}
    assert isinstance(runs["batched"].model.execution, Batched)
    results = {kind: fit(run) for kind, run in runs.items()}
    for task in ("shapes_kind", "shapes_size"):
        losses = [result.val[task]["loss"] for result in results.values() if result.val]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    weights = [run.model.state_dict() for run in runs.values()]
    assert list(weights[0]) == list(weights[1])
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0.01, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    again = mtl.evaluate_run(results["batched"].run_dir, "val", device="cpu")
    assert again["score"] == pytest.approx(results["batched"].val["score"], abs=1e-6)
    written = yaml.safe_load((runs["batched"].directory / "config.yaml").read_text())
    assert written["execution"] == "batched"


def test_one_tower_has_nothing_to_batch() -> None:
    run = build.run(config(execution="batched", sharing="hard_shared"), None)
    run.tracker.close()
    assert run.config.execution == "towers"


def test_what_cannot_be_batched_is_refused_by_name() -> None:
    half_frozen = config(execution="batched", optim={"freeze": ["towers.shapes_kind.*"]})
    with pytest.raises(
        mtl.ConfigError, match=r"execution: towers cannot be batched: .*; execution=towers runs them one by one"
    ):
        build.run(half_frozen, None)
