"""A step that is not finite leaves everything as it was, whoever brought it about; a task that explodes is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Lines
from test_balancing import RUNNABLE, choice
from torch import Tensor

import mtl
from mtl import blame as blame_module
from mtl import step as step_module
from mtl import trainer
from mtl.batches import Batch, Step
from mtl.build import run as built
from mtl.checkpoints import verify
from mtl.guard import IN_A_ROW, LATE, LeftOut
from mtl.run import Run
from mtl.step import train_step

NAN = float("nan")


@pytest.fixture
def ready(tiny_config: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Makes a run of the tiny tasks, in training mode, with this many steps between a step and the host's look at it."""
    made: list[Run] = []

    def make(late: int = 0, **changes: Any) -> Run:
        of = built(mtl.RunConfig(**{**tiny_config, "epochs": 9, **changes}), tmp_path / f"run{len(made)}")
        of.guard.late = late
        of.model.train()
        made.append(of)
        return of

    yield make
    for one in made:
        one.close()


def everything(run: Run) -> list[tuple[str, Any]]:
    """What a step changes."""
    names = {p: name for name, p in [*run.model.named_parameters(), *run.balancer.named_parameters()]}
    found: list[tuple[str, Any]] = [(name, p) for p, name in names.items()]
    found += [*run.model.named_buffers(), *run.balancer.named_buffers(), ("memory", run.balancer.memory())]
    found += [(f"{names[p]}.{key}", value) for p, state in run.optimizer.state.items() for key, value in state.items()]
    found += [("rates", [group["lr"] for group in run.optimizer.param_groups]), ("schedule", run.schedule.state_dict())]
    return [(name, value.detach().clone() if isinstance(value, Tensor) else repr(value)) for name, value in found]


def check_same(one: list[tuple[str, Any]], other: list[tuple[str, Any]]) -> None:
    assert [name for name, _ in one] == [name for name, _ in other]
    pairs = [(name, a, b) for (name, a), (_, b) in zip(one, other, strict=True)]
    assert [name for name, a, b in pairs if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b)] == []


def poisoned(step: Step) -> Step:
    """Its first batch with one pixel that is not a number."""
    [[batch], *others] = step
    images = batch.images.float()
    images[3, 0, 2, 2] = NAN
    return [[Batch(batch.dataset, images, batch.targets, batch.valid, batch.index)], *others]


@contextmanager
def bad_loss(task: str) -> Iterator[None]:
    """The loss of a task is not a number."""
    real = step_module.summed_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "summed_loss", lambda t, *rest: real(t, *rest) * (NAN if t.name == task else 1.0))
        yield


@contextmanager
def bad_gradient(run: Run, task: str) -> Iterator[None]:
    """The gradient of a weight of a task's head is not a number."""
    weight = next(p for name, p in run.model.named_parameters() if name.startswith(f"heads.{task}"))
    hook = weight.register_hook(lambda gradient: gradient * NAN)
    yield
    hook.remove()


def step_of(run: Run, number: int = 0) -> Step:
    return list(run.feed.epoch(1))[number]


@pytest.mark.parametrize("late", [0, LATE])
@pytest.mark.parametrize("optim", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("what", ["pixel", "loss of tiny_a", "loss of tiny_b", "gradient of tiny_a", "gradient of tiny_b"])
def test_such_a_step_changes_nothing(what: str, optim: str, late: int, ready: Callable[..., Run]) -> None:
    run = ready(late, optim={"name": optim, "schedule": "cosine", "clip_norm": 5.0, "l2": 1e-4}, sharing="cross_stitch")
    for number in (0, 1):
        train_step(run, step_of(run, number))
    run.guard.settle()
    before = everything(run)
    if what == "pixel":
        train_step(run, poisoned(step_of(run, 2)))
    elif what.startswith("loss"):
        with bad_loss(what.split()[-1]):
            train_step(run, step_of(run, 2))
    else:
        with bad_gradient(run, what.split()[-1]):
            train_step(run, step_of(run, 2))
    run.guard.settle()
    check_same(everything(run), before)
    assert (run.guard.skipped, run.guard.in_a_row) == (1, 1)
    assert int(run.guard.counted) == 0
    train_step(run, step_of(run, 2))
    run.guard.settle()
    assert (run.guard.skipped, run.guard.in_a_row) == (1, 0)
    with pytest.raises(AssertionError):
        check_same(everything(run), before)


@pytest.mark.parametrize("late", [0, LATE])
@pytest.mark.parametrize("optim", ["adam", "adamw", "sgd"])
def test_a_first_step_that_is_left_out_might_not_have_been(optim: str, late: int, ready: Callable[..., Run]) -> None:
    backbone = {"name": "small_cnn", "width": 0.1, "dropout": 0}
    given: dict[str, Any] = {"optim": {"name": optim, "schedule": "cosine"}, "sharing": "cross_stitch", "backbone": backbone}
    other, run = ready(late, **given), ready(late, **given)
    with bad_gradient(run, "tiny_a"):
        train_step(run, step_of(run, 0))
    run.guard.settle()
    for number in (1, 2, 0, 1):
        for one in (run, other):
            train_step(one, step_of(one, number))
            one.guard.settle()
    assert (run.guard.skipped, other.guard.skipped) == (1, 0)
    check_same(everything(run), everything(other))


@pytest.mark.parametrize("late", [0, LATE])
def test_a_gradient_whose_square_is_not_finite_is_left_out(late: int, ready: Callable[..., Run]) -> None:
    """Adam would keep it for ever, and never move that weight again."""
    run = ready(late, sharing="cross_stitch")
    train_step(run, step_of(run, 0))
    run.guard.settle()
    before = everything(run)
    weight = next(p for name, p in run.model.named_parameters() if name.startswith("heads.tiny_a"))
    hook = weight.register_hook(lambda gradient: torch.full_like(gradient, 2e19))
    train_step(run, step_of(run, 1))
    run.guard.settle()
    check_same(everything(run), before)
    random = torch.get_rng_state()
    said = blame_module.blame(run, LeftOut([1.0, 1.0, 2.0], step_of(run, 1)))
    assert "the gradient of tiny_a, or its square, is not finite for heads.tiny_a" in said
    assert torch.equal(torch.get_rng_state(), random)
    check_same(everything(run), before)
    hook.remove()


@pytest.mark.parametrize("name", ["fixed", "uncertainty", "random", *RUNNABLE])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_no_balancer_remembers_it(name: str, what: str, ready: Callable[..., Run]) -> None:
    run = ready(balancer=choice(name), sharing="hard_shared", tasks=["tiny_a", "tiny_b", "tiny_c"])
    for number in (0, 1):
        train_step(run, step_of(run, number))
    before = everything(run)
    if what == "loss":
        with bad_loss("tiny_b"):
            train_step(run, step_of(run, 2))
    else:
        shared = run.shared_parameters[0]
        hook = shared.register_hook(lambda gradient: gradient * NAN)
        train_step(run, step_of(run, 2))
        hook.remove()
    check_same(everything(run), before)
    assert run.guard.skipped == 1


def test_the_schedule_stands_where_it_would_have_stood(ready: Callable[..., Run]) -> None:
    """Also where the host knows only steps later."""
    changes: dict[str, Any] = {
        "optim": {"name": "sgd", "schedule": "one_cycle"},
        "data": {"validation": 12, "datasets": {"tiny": {"train": 480}}},
    }
    straight = ready(**changes)
    for step in list(straight.feed.epoch(1))[:10]:
        train_step(straight, step)
    for late in (0, LATE):
        run = ready(late, **changes)
        for number, step in enumerate(list(run.feed.epoch(1))[:14]):
            train_step(run, poisoned(step) if number in (3, 5, 6, 11) else step)
        run.guard.settle()
        assert run.guard.skipped == 4
        assert [group["lr"] for group in run.optimizer.param_groups] == [g["lr"] for g in straight.optimizer.param_groups]


def test_a_step_that_is_left_out_is_told_with_who_it_was(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    lines = Lines()
    of = built(mtl.RunConfig(**tiny_config), tmp_path / "run", lines)
    real, calls = trainer.train_step, iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", lambda run, step: real(run, poisoned(step) if next(calls) in (1, 4) else step))
        result = trainer.fit(of)
    assert result.steps_left_out == 2
    told = [line for line in lines.lines if "left out" in line]
    number = list(of.feed.epoch(1))[1][0][0].index[3]
    assert told[0] == f"step 2 was left out: pixels of sample {number} of tiny are not finite (tiny_a, tiny_b)"
    assert len(told) == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["split"] == "train"]
    assert all(math.isfinite(row["loss"]) for row in trained)
    assert {row["n"] for row in trained} == {36 - 16 - 0, 36 - 16}


BY_LOSS = r"10 steps in a row were left out, up to step 12 in epoch 1: the loss of tiny_b is not finite; step 12 is saved"
BY_GRADIENT = r"10 steps in a row were left out.*the gradient of tiny_b, or its square, is not finite for heads\.tiny_b"


@pytest.mark.parametrize("message", [BY_LOSS, BY_GRADIENT])
def test_where_they_do_not_end_training_does(message: str, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    data = {"validation": 12, "datasets": {"tiny": {"train": 480}}}
    of = built(mtl.RunConfig(**{**tiny_config, "data": data, "checkpoints": {"every_steps": 1}}), tmp_path / "run")
    real, blamed, steps = trainer.train_step, trainer.blame, iter(range(1000))

    def bad(run: Run, step: Step) -> Tensor:
        if next(steps) < 2:
            return real(run, step)
        with bad_loss("tiny_b") if message == BY_LOSS else bad_gradient(run, "tiny_b"):
            return real(run, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", bad)
        if message == BY_GRADIENT:
            patch.setattr(trainer, "blame", lambda run, out: with_bad_gradient(run, blamed, out))
        with pytest.raises(mtl.RunError, match=message):
            trainer.fit(of)
    assert verify(tmp_path / "run")[0]["faults"] == []


def test_an_epoch_of_which_no_step_is_left_ends_training(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = built(mtl.RunConfig(**tiny_config), tmp_path / "run")
    real = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda run, step: real(run, poisoned(step)))
    with pytest.raises(mtl.RunError, match=r"3 steps in a row were left out, up to step 3 in epoch 1: pixels of"):
        trainer.fit(of)


def with_bad_gradient(run: Run, blamed: Callable[..., str], out: Any) -> str:
    """What brought it about is still there when somebody looks."""
    with bad_gradient(run, "tiny_b"):
        return blamed(run, out)


def test_a_sample_whose_loss_is_not_finite_is_named(ready: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready(sharing="unshared")
    step = step_of(run)
    batch = step[0][0]
    real = blame_module.summed_loss
    number = int(batch.index[5])

    def bad(task: mtl.Task, output: Tensor, one: Batch) -> Tensor:
        is_it = task.name == "tiny_a" and torch.equal(one.images[0], batch.images[5])
        return real(task, output, one) * (NAN if is_it else 1.0)

    monkeypatch.setattr(blame_module, "summed_loss", bad)
    said = blame_module.blame(run, LeftOut([NAN, 1.0, NAN], step))
    assert said == f"the loss of tiny_a is not finite for sample {number} of tiny"


def test_a_task_that_explodes_is_named(tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = built(mtl.RunConfig(**{**tiny_config, "epochs": 20, "optim": {"name": "sgd", "lr": 1e-20}}), tmp_path / "run")
    real = step_module.summed_loss
    monkeypatch.setattr(step_module, "summed_loss", lambda t, *rest: real(t, *rest) * (1e12 if t.name == "tiny_b" else 1.0))
    with pytest.raises(mtl.RunError, match=r"the loss of tiny_b has been over 2e\+07 times that of any other"):
        trainer.fit(of)


def test_a_task_that_is_learned_perfectly_does_not_make_another_explode(ready: Callable[..., Run]) -> None:
    run = ready()
    for loss in (1.0, 1e-3, 1e-9, 0.0):
        for _ in range(IN_A_ROW + 1):
            run.guard._judge([0.0, loss, 2.0, 2.0 + loss], [])
    assert run.guard.exploding == [0, 0]
