"""Balancers: the interface, and TorchJD's methods through it."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_training import SHARINGS
from torch import Tensor, nn
from torchjd import aggregation, scalarization

import mtl
from mtl import build, guard
from mtl.balancing import Balancer
from mtl.batches import Step
from mtl.checkpoints import weights_file
from mtl.config import RunConfig
from mtl.registry import BALANCERS
from mtl.run import Run, State
from mtl.step import expected_labels, losses_again, task_losses, train_step
from mtl.torchjd_balancers import METHODS, Aggregation, LossCombination, NNLSProjector, first_sentences
from mtl.trainer import fit, train_epoch
from mtl.weights import load_weights, weights_of, write_weights

THREE = ["tiny_a", {"name": "tiny_b", "weight": 2.0}, "tiny_c"]
REQUIRED: dict[str, dict[str, Any]] = {
    "cagrad": {"c": 0.5},
    "constant_gradients": {"weights": [0.5, 1.0, 2.0]},
    "constant_losses": {"weights": [0.5, 1.0, 2.0]},
    "cosmos": {"lambda_": 0.1, "weights": [0.5, 1.0, 2.0]},
    "fairgrad": {"alpha": 1.0},
    "krum": {"n_byzantine": 0},
    "pbi": {"theta": 0.5, "weights": [0.5, 1.0, 2.0]},
    "stch": {"mu": 0.1},
    "trimmedmean": {"trim_number": 1},
}
"""What must be given, for three tasks."""

NEEDS_GPL = {"nashmtl"} if find_spec("ecos") is None else set()
RUNNABLE = sorted(METHODS.keys() - NEEDS_GPL)
GRADIENTS = [name for name in RUNNABLE if METHODS[name][1] is Aggregation]
LOSSES = [name for name in RUNNABLE if METHODS[name][1] is LossCombination]


@pytest.fixture
def ready(tmp_path: Path, tiny_config: dict[str, Any]) -> Callable[..., Run]:
    """Builds a run from the tiny config with keys replaced; each in a directory of its own."""
    count = itertools.count()

    def make(**values: Any) -> Run:
        run = build.run(RunConfig(**{**tiny_config, **values}), tmp_path / f"run{next(count)}")
        run.model.train()
        return run

    return make


def choice(name: str) -> Any:
    return {"name": name, **REQUIRED.get(name, {})}


def create(name: str, tasks: Sequence[str] = ("a", "b", "c"), **options: Any) -> Any:
    plugin = BALANCERS.get(name)
    given = {**REQUIRED.get(name, {}), **options}
    return plugin.create(list(tasks), options=plugin.options.model_validate(given) if plugin.options else None)


def backward(run: Run, step: Step, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of a step's losses, as the run's balancer makes them; dropout drawn from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        features, losses = task_losses(run, run.model, step[0], expected_labels(run, step))
        weighted = [loss * weight for loss, weight in zip(losses, run.weights, strict=True)]
        run.model.zero_grad()
        run.balancer.backward(weighted, features, run.shared_parameters)
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def refusal(action: Callable[[], Any], kind: type[mtl.MTLError]) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


# Names


def test_every_method_that_torchjd_exports_has_a_name_and_an_entry_point() -> None:
    bases = {"Aggregator", "WeightedAggregator", "GramianWeightedAggregator", "Scalarizer"}
    exported = {name for name in aggregation.__all__ if not name.endswith("Weighting")} - bases
    on_losses = set(scalarization.__all__) - bases
    both = exported & on_losses
    assert both == {"Constant", "Mean", "Random", "Sum"}
    expected = {name.lower() for name in exported ^ on_losses}
    expected |= {f"{name.lower()}_{side}" for name in both for side in ("gradients", "losses")}
    assert set(METHODS) == expected
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"]["mtl.balancers"]
    ours = {name: value for name, value in points.items() if value.startswith("mtl.balancing:")}
    assert set(ours) == {"fixed", "uncertainty", "random"}
    assert {name: value for name, value in points.items() if name not in ours} == {
        name: f"mtl.torchjd_balancers:{name}" for name in METHODS
    }


def test_descriptions_come_from_torchjd(ready: Callable[..., Run]) -> None:
    for name in METHODS:
        options = BALANCERS.get(name).options
        for key, field in options.model_fields.items() if options else ():
            assert field.description, (name, key)
            assert not re.search(r"``|:math:|:class:|\n", field.description), (name, key)
    text = """Words.

    :param a: The value of :math:`a`, i.e. ``1``, or
        :class:`~x.Y`. Then more.
    :param b: Short
    :returns: nothing
    """
    assert first_sentences(text) == {"a": "The value of a, i.e. 1, or x.Y.", "b": "Short"}
    message = refusal(lambda: mtl.RunConfig(tasks=["tiny_a"], balancer="cagrad"), mtl.ConfigError)
    assert "balancer.c: required: The scale of the radius of the ball constraint." in message


# What every method does


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_step_fills_every_gradient(ready: Callable[..., Run], name: str) -> None:
    """Of shared parameters, heads and the balancer's own; all finite; and the heads' are those of their task's loss alone."""
    run = ready(tasks=THREE, sharing="hard_shared", balancer=choice(name))
    found = backward(run, next(run.feed.epoch(1)))
    assert found.keys() == dict(run.model.named_parameters()).keys()
    own = [p.grad for p in run.balancer.optimised()]
    assert all(g is not None and g.isfinite().all() and g.any() for g in own)
    assert all(g.isfinite().all() for g in found.values())
    assert not any(hasattr(p, "jac") for p in run.model.parameters())
    shared = [g for key, g in found.items() if not key.startswith("heads.")]
    assert sum(g.square().sum() for g in shared) > 0
    if METHODS[name][1] is Aggregation:
        fixed = ready(tasks=THREE, sharing="hard_shared")
        for key, gradient in backward(fixed, next(fixed.feed.epoch(1))).items():
            if key.startswith("heads."):
                torch.testing.assert_close(found[key], gradient)


@pytest.mark.parametrize("name", RUNNABLE)
def test_an_epoch_changes_the_weights_and_repeats(ready: Callable[..., Run], name: str) -> None:
    runs = [ready(tasks=THREE, sharing="hard_shared", balancer=choice(name), max_steps=2) for _ in range(2)]
    before = {key: tensor.clone() for key, tensor in runs[0].model.state_dict().items()}
    for run in runs:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            train_epoch(run, State())
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(tensor.isfinite().all() for tensor in first.values())
    assert all(not torch.equal(before[key], first[key]) for key, _ in runs[0].model.named_parameters())


def one_gradient(name: str, matrix: Tensor) -> Tensor:
    """What a fresh aggregator makes of gradients (T, P)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result: Tensor = create(name, [f"t{i}" for i in range(len(matrix))]).method(matrix)
    return result


@pytest.mark.parametrize("name", GRADIENTS)
def test_equal_gradients_are_followed(name: str) -> None:
    """Where all tasks want the same, so does the update, and its length is that of the sum, the mean or the like."""
    g = torch.tensor([3.0, -1.0, 2.0, 0.5])
    update = one_gradient(name, g.repeat(3, 1))
    scale = (update @ g / (g @ g)).item()
    torch.testing.assert_close(update, scale * g)
    averages = ("upgrad", "dualproj", "mgda", "alignedmtl", "imtlg", "mean_gradients", "krum", "trimmedmean", "excessmtl")
    sums = ("pcgrad", "gradvac", "graddrop", "config", "sum_gradients")
    expected = 1.0 if name in averages else 3.0 if name in sums else None
    assert scale == pytest.approx(expected, rel=2e-3) if expected else scale > 0


SYMMETRIC = ("alignedmtl", "cagrad", "config", "dualproj", "excessmtl", "fairgrad", "imtlg", "mean_gradients", "mgda")
SYMMETRIC += ("sum_gradients", "trimmedmean", "upgrad")


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_order_of_tasks_does_not_matter_to_gradients(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        matrix = torch.randn(3, 6, generator=generator)
        update = one_gradient(name, matrix)
        for order in itertools.permutations(range(3)):
            torch.testing.assert_close(one_gradient(name, matrix[list(order)]), update, rtol=2e-3, atol=2e-3)


def test_the_order_of_tasks_matters_to_a_method_with_a_primary_task() -> None:
    """What the test above would say of a method that is not symmetric."""
    matrix = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(one_gradient("pcd", matrix), one_gradient("pcd", matrix.flip(0)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["sum_losses", "mean_losses", "geometricmean", "stch", "uw", "imtll", "famo", "dwa"])
def test_the_order_of_tasks_does_not_matter_to_losses(name: str) -> None:
    losses = torch.tensor([0.3, 2.0, 1.1], requires_grad=True)
    (expected,) = torch.autograd.grad(create(name).combine(losses), losses)
    for order in itertools.permutations(range(3)):
        (gradient,) = torch.autograd.grad(create(name).combine(losses[list(order)]), losses)
        torch.testing.assert_close(gradient, expected)


def conflicts(name: str, matrix: Tensor) -> float:
    """How much the update of a method hurts the task that it hurts most, relative to the gradients; 0: nobody."""
    update = one_gradient(name, matrix)
    return max(0.0, -((matrix @ update).min() / matrix.square().sum()).item())


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(2, 8), st.integers(0, 10**6))
def test_no_task_is_hurt_by_methods_that_promise_it(tasks: int, parameters: int, seed: int) -> None:
    """UPGrad (arXiv 2406.16232, Proposition 1), DualProj and MGDA for any gradients; PCGrad (arXiv 2001.06782) for two."""
    matrix = torch.randn(tasks, parameters, generator=torch.Generator().manual_seed(seed))
    for name in ("upgrad", "dualproj", "mgda", *(["pcgrad"] if tasks == 2 else [])):
        assert conflicts(name, matrix) < 2e-3, name


def test_some_task_is_hurt_by_methods_that_do_not() -> None:
    matrix = torch.tensor([[3.0, 0.1], [-1.0, 0.1]])
    for name in ("mean_gradients", "sum_gradients", "random_gradients"):
        assert conflicts(name, matrix) > 0.01, name


# Equivalences


def stepped(run: Run, steps: int = 3) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in itertools.islice(run.feed.epoch(1), steps):
            train_step(run, step)
    return run.model.state_dict()


@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
def test_fixed_is_the_sum_of_losses_and_of_gradients(ready: Callable[..., Run], sharing: Any) -> None:
    runs = {name: ready(tasks=THREE, sharing=sharing, balancer=name) for name in ("fixed", "sum_losses", "sum_gradients")}
    found = {name: backward(run, next(run.feed.epoch(1))) for name, run in runs.items()}
    for name in ("sum_losses", "sum_gradients"):
        assert found[name].keys() == found["fixed"].keys()
        for key, gradient in found["fixed"].items():
            torch.testing.assert_close(found[name][key], gradient, msg=f"{name} {key}")


@pytest.mark.parametrize("optim", [{"name": "sgd", "lr": 0.05}, {"name": "adam"}, {"name": "adamw", "clip_norm": 1.0}], ids=str)
def test_updates_are_the_same_however_gradients_lie_in_memory(ready: Callable[..., Run], optim: dict[str, Any]) -> None:
    """The fused optimizers read weights and gradients as flat arrays, and the weights of convolutions are channels last."""
    backbone = {"name": "small_cnn", "width": 0.25, "dropout": 0}
    runs = [
        ready(tasks=THREE, backbone=backbone, sharing="hard_shared", balancer=b, optim=optim)
        for b in ("fixed", "sum_gradients")
    ]
    weight = runs[0].model.get_parameter("trunk.pool2.conv.weight")
    assert not weight.is_contiguous()
    one, other = map(stepped, runs)
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, msg=key, rtol=1e-3, atol=1e-4)


def test_the_mean_divides_what_is_shared_and_leaves_the_heads(ready: Callable[..., Run]) -> None:
    runs = {name: ready(sharing="hard_shared", balancer=name) for name in ("fixed", "mean_losses", "mean_gradients")}
    found = {name: backward(run, next(run.feed.epoch(1))) for name, run in runs.items()}
    for key, gradient in found["fixed"].items():
        torch.testing.assert_close(found["mean_losses"][key], gradient / 2)
        factor = 1 if key.startswith("heads.") else 2
        torch.testing.assert_close(found["mean_gradients"][key], gradient / factor)


def test_gradients_accumulate(ready: Callable[..., Run]) -> None:
    """A second backward adds to the first, as torch's does."""
    run = ready(balancer="upgrad", sharing="cross_stitch", backbone={"name": "small_cnn", "width": 0.1, "dropout": 0})
    step = next(run.feed.epoch(1))
    once = backward(run, step)
    features, losses = task_losses(run, run.model, step[0], expected_labels(run, step))
    objective = run.balancer.backward(losses, features, run.shared_parameters)
    torch.testing.assert_close(objective, (losses[0] + losses[1]).detach())
    assert not objective.requires_grad
    for key, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[key], rtol=1e-3, atol=1e-5)


# Frozen and unused parameters, several datasets, precision


@mtl.register_backbone("spare_parts")
def spare_parts(input_shape: tuple[int, ...]) -> nn.Module:
    """A network with a frozen layer and one that is never used."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8))
    network[3].requires_grad_(False)
    network.spare = nn.Linear(2, 2)
    network.forward = lambda x: network[3](network[2](network[1](network[0](x))))  # type: ignore[method-assign]
    return network


@mtl.register_backbone("all_frozen")
def all_frozen(input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8)).requires_grad_(False)


@pytest.mark.parametrize("name", ["upgrad", "graddrop"])
@pytest.mark.parametrize("sharing", ["hard_shared", "unshared"])
def test_frozen_and_unused_parameters_are_left_alone(ready: Callable[..., Run], sharing: str, name: str) -> None:
    backbone, optim = "spare_parts", {"name": "adamw"}
    runs = [ready(backbone=backbone, sharing=sharing, balancer=b, optim=optim) for b in ("fixed", name)]
    before = {key: tensor.clone() for key, tensor in runs[1].model.state_dict().items()}
    expected, found = (backward(run, next(run.feed.epoch(1))) for run in runs)
    assert found.keys() == expected.keys()
    after = stepped(runs[1])
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved == found.keys()


def test_nothing_shared_to_train_is_an_error(ready: Callable[..., Run]) -> None:
    run = ready(backbone="all_frozen", sharing="hard_shared", balancer="upgrad")
    message = refusal(lambda: stepped(run), mtl.ConfigError)
    assert "UPGrad combines gradients of shared parameters; all are frozen; use fixed" in message
    run = ready(sharing="unshared", balancer="upgrad")
    for part in (run.model.towers["tiny_a"], run.model.heads["tiny_a"]):
        part.requires_grad_(False)
    message = refusal(lambda: stepped(run), mtl.ConfigError)
    assert "1 of 2 losses depend on nothing that is trained; use fixed" in message


@mtl.register_dataset("tiny_second")
def tiny_second(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
    return make_tiny(30, split)


@mtl.register_task("second_b")
def second_b() -> mtl.Task:
    return mtl.Task("tiny_second", "b", mtl.Classification(("falling", "rising")))


@pytest.mark.parametrize("name", ["upgrad", "graddrop", "famo"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
def test_two_datasets_in_either_precision(ready: Callable[..., Run], sharing: Any, precision: str, name: str) -> None:
    tasks = ["second_b", "tiny_a", "tiny_b"]
    run = ready(tasks=tasks, sharing=sharing, precision=precision, balancer=name)
    before = {key: p.detach().clone() for key, p in run.model.named_parameters()}
    after = stepped(run, 1)
    for key, value in before.items():
        assert after[key].dtype == torch.float32
        assert after[key].isfinite().all()
        assert not torch.equal(after[key], value), key


# The projector


def brute_force(gramian: Tensor, u: Tensor) -> Tensor:
    """min v^T G v over v >= u, by trying every set of constraints that hold with equality."""
    best, least = u, float("inf")
    tasks = range(len(u))
    for free in itertools.chain.from_iterable(itertools.combinations(tasks, n) for n in range(len(u) + 1)):
        v, f = u.clone(), list(free)
        if f:
            held = [i for i in tasks if i not in free]
            v[f] = torch.linalg.solve(gramian[f][:, f], -gramian[f][:, held] @ u[held])
        value = (v @ gramian @ v).item()
        if (v >= u - 1e-9).all() and value < least:
            best, least = v, value
    return best


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.floats(-3, 3), st.integers(0, 10**6))
def test_the_projection_is_the_best_there_is(tasks: int, parameters: int, exponent: float, seed: int) -> None:
    """Against brute force, and the conditions of Karush, Kuhn and Tucker: v >= u, Gv >= 0, Gv = 0 where v > u."""
    generator = torch.Generator().manual_seed(seed)
    jacobian = 10**exponent * torch.randn(tasks, parameters, generator=generator, dtype=torch.float64)
    jacobian[-1] = -jacobian[0] if seed % 3 == 0 else jacobian[-1]  # dependent ones too
    gramian, wanted = jacobian @ jacobian.T, torch.rand(2, tasks, generator=generator, dtype=torch.float64)
    projected = NNLSProjector(norm_eps=0.0)(wanted, gramian)
    solved = gramian / gramian.trace() + 1e-4 * torch.eye(tasks, dtype=torch.float64)
    assert projected.shape == wanted.shape
    for u, v in zip(wanted, projected, strict=True):
        slack, pull = v - u, solved @ v
        assert slack.min() >= 0
        assert pull.min() >= -1e-9
        assert (slack * pull).abs().max() <= 1e-8
        torch.testing.assert_close(v, brute_force(solved, u), rtol=1e-6, atol=1e-8)


def test_the_projection_at_its_limits() -> None:
    u = torch.tensor([0.5, 0.5])
    project = NNLSProjector()
    torch.testing.assert_close(project(u, torch.zeros(2, 2)), u)
    torch.testing.assert_close(project(u, 1e-5 * torch.tensor([[1.0, -1.0], [-1.0, 2.0]])), u)  # below norm_eps, as in TorchJD
    torch.testing.assert_close(project(u, torch.eye(2)), u)
    assert project(u, torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]])).isnan().all()
    assert project(u.double(), torch.eye(2).double()).dtype == torch.float64
    opposed = project(torch.diag(u), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    torch.testing.assert_close(opposed, torch.full((2, 2), 0.5), atol=1e-3, rtol=0)


def test_upgrad_gives_the_figures_of_its_documentation() -> None:
    """https://torchjd.org, on its first page: UPGrad with the projector that is not used here."""
    update = one_gradient("upgrad", torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
    torch.testing.assert_close(update, torch.tensor([0.2929, 1.9004, 1.9004]), atol=1e-4, rtol=0)


# Methods with steps of their own


class Spy(mtl.Scalarization):
    """Adds losses up, and notes what is called when."""

    def __init__(self, ask: bool) -> None:
        super().__init__()
        self.ask = ask
        self.calls: list[Any] = []

    def combine(self, losses: Tensor) -> Tensor:
        self.calls.append("backward")
        return losses.sum()

    def after_step(self, losses: Callable[[], Tensor]) -> None:
        self.calls.append(losses() if self.ask else "after_step")

    def after_epoch(self) -> None:
        self.calls.append("after_epoch")


@pytest.fixture
def spied(ready: Callable[..., Run]) -> Callable[..., Run]:
    def make(ask: bool, **values: Any) -> Run:
        run = ready(**values)
        run.balancer = Spy(ask)
        return run

    return make


def test_hooks_are_called_after_steps_and_epochs(spied: Callable[..., Run]) -> None:
    run = spied(ask=False, batch_size=18)
    passes: list[int] = []
    run.model.register_forward_hook(lambda *_: passes.append(1))
    for epoch in (1, 2):
        train_epoch(run, State(epoch=epoch - 1))
    assert run.balancer.calls == 2 * [*2 * ["backward", "after_step"], "after_epoch"]
    assert len(passes) == 4  # what nobody asks for is not computed


@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
def test_the_losses_after_a_step_are_those_of_the_new_weights_and_leave_no_trace(
    spied: Callable[..., Run], sharing: Any
) -> None:
    values: dict[str, Any] = {"tasks": THREE, "sharing": sharing, "backbone": {"name": "small_cnn", "width": 0.1, "dropout": 0}}
    asking, silent = (spied(ask, optim={"name": "sgd", "lr": 0.05}, **values) for ask in (True, False))
    step = next(asking.feed.epoch(1))
    first = train_step(asking, step)
    train_step(silent, step)
    for key, tensor in silent.model.state_dict().items():  # batch norm's statistics among them
        assert torch.equal(asking.model.state_dict()[key], tensor), key
    _, again = asking.balancer.calls
    assert again.shape == (3,)
    assert not again.requires_grad
    _, by_hand = task_losses(silent, silent.model, step[0], expected_labels(silent, step))
    torch.testing.assert_close(again, torch.stack(by_hand).detach() * silent.weights)
    assert again.sum() < first[-1]


def test_the_losses_after_a_step_are_over_all_micro_batches(spied: Callable[..., Run]) -> None:
    whole, halves = spied(True, batch_size=16), spied(True, batch_size=8, optim={"accumulate": 2})
    for run in (whole, halves):
        run.model.eval()
    one, two = (losses_again(run, next(run.feed.epoch(1))) for run in (whole, halves))
    torch.testing.assert_close(one, two)


def test_famo_learns_from_every_step(ready: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[Tensor] = []
    original = scalarization.FAMO.update
    monkeypatch.setattr(scalarization.FAMO, "update", lambda self, values: (updates.append(values), original(self, values)))
    run = ready(tasks=THREE, sharing="hard_shared", balancer="famo", optim={"name": "adamw"})
    (logits,) = run.balancer.parameters()
    assert "balancer" not in {group["name"] for group in run.optimizer.param_groups}  # its own Adam steps them
    train_epoch(run, State())
    assert len(updates) == run.feed.steps_per_epoch > 1
    assert logits.abs().max() > 0
    assert logits.unique().numel() == 3


def test_famo_turns_to_the_task_that_falls_least() -> None:
    balancer = create("famo", ("a", "b"))
    losses = torch.tensor([1.0, 1.0], requires_grad=True)
    balancer.combine(losses).backward()
    torch.testing.assert_close(losses.grad, torch.tensor([0.5, 0.5]))
    for _ in range(20):
        balancer.after_step(lambda: torch.tensor([1.0, 0.5]))
    losses.grad = None
    balancer.combine(losses).backward()
    assert losses.grad is not None
    assert losses.grad[0] > 0.55 > 0.45 > losses.grad[1]


def test_dwa_weighs_by_how_epochs_fell(ready: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equation 7 of arXiv 1803.10704, from the losses that the run itself reports."""
    ended: list[int] = []
    original = scalarization.DWA.step
    monkeypatch.setattr(scalarization.DWA, "step", lambda self: (ended.append(1), original(self)))
    run = ready(sharing="hard_shared", balancer="dwa", batch_size=18)
    averages = []
    for epoch in (1, 2):
        x = torch.ones(2, requires_grad=True)
        assert torch.autograd.grad(create("dwa", ("a", "b")).combine(x), x)[0].tolist() == [1, 1]
        averages.append(torch.tensor(train_epoch(run, State(epoch=epoch - 1)).losses[:2]))
        assert len(ended) == epoch
    x = torch.ones(2, requires_grad=True)
    (weights,) = torch.autograd.grad(run.balancer.combine(x), x)  # type: ignore[operator]
    torch.testing.assert_close(weights, 2 * torch.softmax(averages[1] / averages[0] / 2, 0))
    assert weights[0] != weights[1]


@pytest.mark.parametrize("name", ["uw", "imtll", "uncertainty"])
def test_a_balancers_parameters_are_optimised_without_decay(ready: Callable[..., Run], name: str) -> None:
    run = ready(balancer=name, optim={"name": "adamw", "weight_decay": 0.3, "lr": 0.01})
    groups = {group["name"]: group for group in run.optimizer.param_groups}
    (parameter,) = run.balancer.parameters()
    assert [id(p) for p in groups["balancer"]["params"]] == [id(parameter)]
    assert (groups["balancer"]["weight_decay"], groups["balancer"]["lr"]) == (0, 0.01)
    train_epoch(run, State())
    assert parameter.abs().min() > 0


@pytest.mark.parametrize("name", ["fixed", "uncertainty", "sum_losses", "uw", "stch"])
def test_the_loop_does_not_wait_for_the_device(ready: Callable[..., Run], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_training import Arrived, Synchronisations

    run = ready(balancer={"name": "stch", "mu": 0.1} if name == "stch" else name, sharing="cross_stitch")
    assert not run.balancer.needs_finite
    run.guard.late = guard.LATE  # as on a GPU, where the host reads what was sent to it earlier
    monkeypatch.setattr(guard, "_sent", lambda verdict: (Arrived(len(verdict)), None))
    step = next(run.feed.epoch(1))
    train_step(run, step)
    with Synchronisations(monkeypatch) as waits:
        train_step(run, step)
    assert waits.count == 0


# Weights on disk


@pytest.mark.parametrize("name", ["fixed", "uncertainty", *RUNNABLE])
def test_a_balancer_is_saved_beside_the_model(ready: Callable[..., Run], tmp_path: Path, name: str) -> None:
    values: dict[str, Any] = {"tasks": THREE, "sharing": "hard_shared", "balancer": choice(name)}
    run, fresh, alone = ready(**values), ready(**values, seed=1), ready(**values, seed=2)
    stepped(run)
    path = tmp_path / "weights.safetensors"
    write_weights(path, weights_of(run.model, run.balancer), {"some": "words"})
    names = load_file(path).keys()
    assert names == {*run.model.state_dict(), *(f"balancer.{key}" for key in run.balancer.state_dict())}
    assert {f"balancer.{key}" for key, _ in run.balancer.named_parameters()} <= names
    size = sum(tensor.numel() for key, tensor in load_file(path).items() if key.startswith("balancer."))
    assert size <= 6  # a number or two per task, not one per parameter and task
    assert load_weights(path, fresh.model, fresh.balancer) == {"some": "words"}
    assert load_weights(path, alone.model) == {"some": "words"}
    for other in (fresh, alone):
        assert all(torch.equal(run.model.state_dict()[k], v) for k, v in other.model.state_dict().items())
    assert all(torch.equal(run.balancer.state_dict()[k], v) for k, v in fresh.balancer.state_dict().items())


def test_weights_of_another_balancer_are_refused_whole(ready: Callable[..., Run], tmp_path: Path) -> None:
    run, other = ready(balancer="uw"), ready(balancer="imtll", seed=1)
    path = tmp_path / "weights.safetensors"
    write_weights(path, weights_of(run.model, run.balancer), {})
    before = {key: tensor.clone() for key, tensor in other.model.state_dict().items()}
    message = refusal(lambda: load_weights(path, other.model, other.balancer), mtl.RunError)
    assert "are of another balancer: 1 missing, 1 unknown, 0 of another shape; first: method.log_scale" in message
    assert all(torch.equal(before[key], tensor) for key, tensor in other.model.state_dict().items())
    write_weights(path, weights_of(run.model), {})
    assert "of another balancer: 1 missing" in refusal(lambda: load_weights(path, run.model, run.balancer), mtl.RunError)


def test_a_run_keeps_its_balancer_and_can_be_evaluated(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    result = mtl.train(RunConfig(**{**tiny_config, "balancer": "uw"}), tmp_path / "run")
    for which in ("best", "last"):
        saved = load_file(weights_file(tmp_path / "run", which))
        assert saved["balancer.method.log_var"].abs().min() > 0
    assert mtl.evaluate_run(tmp_path / "run") == result.test


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_pickled_balancer_goes_on_where_it_was(ready: Callable[..., Run], name: str) -> None:
    """With all that it has gathered, which a file of weights does not hold."""
    run = ready(tasks=THREE, sharing="hard_shared", balancer=choice(name), max_steps=1)
    for epoch in (1, 2):
        train_epoch(run, State(epoch=epoch - 1))
    copy = pickle.loads(pickle.dumps(run.balancer))
    original = run.balancer
    step = next(run.feed.epoch(3))
    found = []
    for run.balancer in (original, copy):
        found.append(backward(run, step))
        run.balancer.after_step(lambda: torch.tensor([0.5, 0.7, 0.9]))
    assert all(torch.equal(found[0][key], gradient) for key, gradient in found[1].items())
    for p, q in zip(original.parameters(), copy.parameters(), strict=True):
        assert torch.equal(p, q)


# Devices


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("stch", {"weights": [1, 2, 3], "reference": [0, 0, 1]}),
        ("pbi", {"reference": [0, 0, 1]}),
        ("constant_losses", {}),
        ("constant_gradients", {}),
        ("upgrad", {"pref_vector": [1, 2, 3]}),
        ("graddrop", {"leak": [0, 0, 1]}),
        ("config", {"pref_vector": [1, 2, 3]}),
        ("famo", {"min_losses": [0, 0, 0.1]}),
        ("uw", {}),
        ("dwa", {}),
    ],
)
def test_all_of_a_balancer_moves_to_a_device(name: str, options: dict[str, Any]) -> None:
    """Also what TorchJD keeps as plain attributes: options, averages."""

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, dict | list):
            return [t for one in (value.values() if isinstance(value, dict) else value) for t in tensors(one)]
        return []

    balancer = create(name, **options)
    if isinstance(balancer, LossCombination):
        for _ in range(2):
            balancer.combine(torch.ones(3))
            balancer.after_epoch()
        balancer.combine(torch.ones(3))
    found = [tensor for part in balancer.modules() for tensor in tensors(vars(part))]
    assert found
    balancer.to("meta")
    assert {t.device.type for part in balancer.modules() for t in tensors(vars(part))} == {"meta"}


# Errors


@pytest.mark.parametrize(
    ("balancer", "parts"),
    [
        ({"name": "constant_losses", "weights": [1, 2, 3]}, ("balancer.weights", "2 tasks (tiny_a, tiny_b)", "found 3")),
        ({"name": "upgrad", "pref_vector": [1]}, ("balancer.pref_vector", "2 tasks", "found 1")),
        ({"name": "famo", "min_losses": []}, ("balancer.min_losses", "found 0")),
        ({"name": "pbi", "theta": 1, "weights": [1], "reference": [1]}, ("balancer.weights", "balancer.reference")),
        ({"name": "pcd", "tau": [0.1, 0.1]}, ("'pcd' with 2 tasks", "one value per secondary objective")),
        ({"name": "dwa", "temperature": -1}, ("'dwa' with 2 tasks", "temperature", "strictly positive", "-1")),
        ({"name": "krum", "n_byzantine": 1}, ("'krum' with 2 tasks", "at least 4 rows")),
        ({"name": "trimmedmean", "trim_number": 1}, ("'trimmedmean' with 2 tasks", "at least 3 rows")),
        ({"name": "cagrad", "c": -1}, ("'cagrad'", "c must be non-negative")),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_config: dict[str, Any], balancer: Any, parts: tuple[str, ...]
) -> None:
    config = RunConfig(**{**tiny_config, "balancer": balancer})
    message = refusal(lambda: mtl.train(config, tmp_path / "run"), mtl.ConfigError)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("balancer", "parts"),
    [
        ({"name": "upgrad", "pref_vektor": [1]}, ("pref_vektor", "did you mean 'pref_vector'")),
        ({"name": "upgrad", "projector": 1}, ("unknown key 'projector'",)),
        ({"name": "graddrop", "f": 1}, ("unknown key 'f'",)),
        ({"name": "uw", "shape": 3}, ("takes no options", "'shape'")),
        ({"name": "alignedmtl", "scale_mode": "max"}, ("balancer.scale_mode", "'min'", "'rmse'")),
        ({"name": "dwa", "temperature": "hot"}, ("balancer.temperature", "'hot'")),
        ("upgrd", ("unknown balancer 'upgrd'", "did you mean 'upgrad'")),
    ],
    ids=str,
)
def test_keys_that_do_not_exist_are_refused(tiny_config: dict[str, Any], balancer: Any, parts: tuple[str, ...]) -> None:
    message = refusal(lambda: RunConfig(**{**tiny_config, "balancer": balancer}), mtl.ConfigError)
    assert all(part in message for part in parts), message


def test_a_method_under_the_gpl_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchjd import _mixins

    missing = {"ecos"}
    monkeypatch.setattr(_mixins, "find_spec", lambda name: None if name in missing else True)
    message = refusal(lambda: create("nashmtl"), mtl.PluginError)
    assert "'nashmtl' needs ecos, which is not installed; ecos is under the GPL" in message
    assert "no part of crosstitch[balance]" in message
    missing = {"cvxpy", "clarabel"}
    message = refusal(lambda: create("cagrad"), mtl.PluginError)
    assert "'cagrad' needs cvxpy and clarabel, which is not installed; pip install 'crosstitch[balance]'" in message


def test_without_torchjd_the_extra_is_named(in_tmp: Path) -> None:
    """By the command line, in one line; and what needs no TorchJD goes on working."""
    Path("torchjd.py").write_text("raise ModuleNotFoundError(\"No module named 'torchjd'\", name='torchjd')\n")
    Path("config.yaml").write_text("{tasks: [shapes_kind], balancer: upgrad, device: cpu}\n")
    path = os.pathsep.join([str(in_tmp), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "mtl", "train", "config.yaml"]
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "400"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"balancer 'upgrad' of crosstitch \S+ cannot be loaded: .*No module named 'torchjd'", done.stderr)
    assert "pip install 'crosstitch[balance]'" in done.stderr
    code = "from mtl.registry import BALANCERS; assert 'upgrad' in BALANCERS.names(); print(BALANCERS.get('fixed').name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "fixed\n", done.stderr


@pytest.mark.parametrize("name", ["upgrad", "pcgrad", "uw", "famo", "sum_losses"])
def test_accumulation_is_refused(ready: Callable[..., Run], name: str) -> None:
    assert f"'{name}' is not additive" in refusal(lambda: ready(balancer=name, optim={"accumulate": 2}), mtl.ConfigError)


@pytest.mark.parametrize("name", ["upgrad", "pcgrad", "cagrad", "fairgrad", "alignedmtl", "config", "graddrop"])
def test_a_run_that_explodes_ends_in_an_error_for_users(ready: Callable[..., Run], name: str) -> None:
    """Whether the method passes what is not a number on, or fails on it."""
    run = ready(sharing="hard_shared", balancer=choice(name), optim={"name": "sgd", "lr": 1e30})
    message = refusal(lambda: fit(run), mtl.RunError)
    assert "finite" in message


def test_building_a_balancer_leaves_the_callers_random_state() -> None:
    before = torch.get_rng_state()
    for name in RUNNABLE:
        create(name)
    assert torch.equal(torch.get_rng_state(), before)


# Two tasks in conflict


@mtl.register_backbone("one_number")
def one_number(input_shape: tuple[int, ...]) -> mtl.Backbone:
    """What both tasks need must pass through two numbers, so that they pull against each other."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 2))
    return mtl.Backbone(network, points=("1", "3"))


@mtl.register_dataset("opposites")
def opposites(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
    data = make_tiny(48 if split == mtl.Split.TRAIN else 24, split)
    b = torch.as_tensor(data.labels["b"])
    return mtl.ArrayDataset(data.images, {"b": b, "not_b": 1 - b})


@mtl.register_task("is_rising")
def is_rising() -> mtl.Task:
    return mtl.Task("opposites", "b", mtl.Classification(("no", "yes")), weight=3.0)


@mtl.register_task("is_falling")
def is_falling() -> mtl.Task:
    return mtl.Task("opposites", "not_b", mtl.Classification(("no", "yes")))


def conflicting_step(run: Run) -> tuple[list[Tensor], list[Tensor]]:
    """Both heads alike and labels opposed: what one task gains the other loses. Returns the update of what is shared and, per
    task, the rate at which its loss changes along it, both relative to the gradients."""
    heads = run.model.heads
    heads["is_falling"].load_state_dict(heads["is_rising"].state_dict())
    step = next(run.feed.epoch(1))
    shared = [p for p in run.shared_parameters if p.requires_grad]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features, losses = task_losses(run, run.model, step[0], expected_labels(run, step))
        weighted = [loss * weight for loss, weight in zip(losses, run.weights, strict=True)]
        own = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in weighted]
        assert sum((a * b).sum() for a, b in zip(*own, strict=True)) < 0
        run.balancer.backward(weighted, features, run.shared_parameters)
    rates = [sum(((g * p.grad).sum() for g, p in zip(gs, shared, strict=True)), torch.zeros(())) for gs in own]
    size = sum((g.square().sum() for gs in own for g in gs), torch.zeros(()))
    return [p.grad for p in shared], [rate / size for rate in rates]


@pytest.mark.parametrize("name", ["upgrad", "pcgrad", "mgda"])
def test_a_conflicting_step_hurts_nobody(ready: Callable[..., Run], name: str) -> None:
    """To first order, and where the plain sum would raise the loss of the task with the smaller weight."""
    values: dict[str, Any] = {"tasks": ["is_rising", "is_falling"], "sharing": "hard_shared", "backbone": "one_number"}
    _, rates = conflicting_step(ready(**values))
    assert rates[0] > 0
    assert rates[1] < -0.05
    update, rates = conflicting_step(ready(**values, balancer=name))
    assert min(rates) > -1e-3
    assert any(part.any() for part in update)


@pytest.mark.parametrize("sharing", ["hard_shared", {"kind": "cross_stitch", "init": {"same": 0.5, "cross": 0.5}}], ids=str)
@pytest.mark.parametrize("name", ["upgrad", "pcgrad"])
def test_two_conflicting_tasks_train(
    tmp_path: Path, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, sharing: Any
) -> None:
    """Brightness and slope through two numbers: gradients do conflict on the way, and both losses fall by half."""
    gramians: list[Tensor] = []
    method = METHODS[name][0]
    weighting = type(method().gramian_weighting) if name == "pcgrad" else aggregation.UPGradWeighting
    original = weighting.forward
    monkeypatch.setattr(weighting, "forward", lambda self, gramian: (gramians.append(gramian), original(self, gramian))[1])
    values = {"backbone": "one_number", "sharing": sharing, "balancer": name, "epochs": 30, "optim": {"lr": 0.01}}
    result = mtl.train(RunConfig(**{**tiny_config, **values}), tmp_path / "run")
    gramians = gramians[1:]  # the first is that of the trial
    assert len(gramians) == result.steps
    assert sum(bool(g[0, 1] < 0) for g in gramians) >= 5
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for task in ("tiny_a", "tiny_b"):
        losses = [row["loss"] for row in rows if row["split"] == "train" and row["task"] == task]
        assert len(losses) == 30
        assert np.mean(losses[-3:]) < 0.5 * losses[0]
    assert result.test is not None
    assert result.test["score"] > 0.6


def test_the_interface_of_a_third_party() -> None:
    """A balancer needs `backward` alone."""

    class First(Balancer):
        def backward(
            self, losses: Sequence[Tensor], features: Sequence[Tensor], shared_parameters: Sequence[nn.Parameter]
        ) -> Tensor:
            losses[0].backward()
            return losses[0].detach()

    balancer = First()
    balancer.after_step(lambda: pytest.fail("nobody asked"))
    balancer.after_epoch()
    assert list(balancer.optimised()) == []
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert balancer.backward([x[0] ** 2, x[1] ** 2], [], []) == 1
    assert x.grad is not None
    assert x.grad.tolist() == [2, 0]
