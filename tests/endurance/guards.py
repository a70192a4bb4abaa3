"""Rows 24 and 25: what is not finite never enters a run, and a task that explodes does not sink the others."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtl
from mtl import step as step_module
from mtl.batches import Batch, Step
from mtl.build import run
from mtl.progress import Silent
from mtl.run import Run
from mtl.step import train_step
from tests.endurance.rows import Cases, row

TASKS = ("shapes_kind", "shapes_radius")
STEPS = 12


def config(seed: int = 0, **changes: Any) -> mtl.RunConfig:
    """Of a run of a classification and a regression that exchange, with batch norm, dropout and a schedule."""
    return mtl.RunConfig(
        **{
            "tasks": list(TASKS),
            "backbone": {"name": "small_cnn", "width": 0.05},
            "sharing": {"kind": "cross_stitch", "init": {"same": 0.9, "cross": 0.1}},
            "data": {"datasets": {"shapes": {"train": 500, "test": 50}}, "validation": 0.1},
            "optim": {"schedule": "cosine", "clip_norm": 10},
            "batch_size": 32,
            "epochs": 2,
            "device": "cpu",
            "precision": "fp32",
            "compile": "none",
            "seed": seed,
            **changes,
        }
    )


def stands(of: Run) -> dict[str, Any]:
    """All that a step changes, by name."""
    found: dict[str, Any] = {**dict(of.model.named_parameters()), **dict(of.model.named_buffers())}
    for i, (_, moments) in enumerate(of.optimizer.state.items()):
        found |= {f"{i}.{key}": value for key, value in moments.items()}
    values = {name: value.detach().clone() for name, value in found.items()}
    return {**values, "schedule": repr(of.schedule.state_dict()), "rates": [group["lr"] for group in of.optimizer.param_groups]}


def changed(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs, by name."""
    same = {
        name: torch.equal(a, other[name]) if isinstance(a, Tensor) else a == other[name]
        for name, a in one.items()
        if name in other
    }
    return [name for name in {**one, **other} if not same.get(name, False)]


def pixel(of: Run, step: Step, task: str, value: float) -> Callable[[], None]:
    """One value of one image is `value`."""
    batch = step[0][0]
    images = batch.images.float()
    images[3, 0, 5, 5] = value
    step[0][0] = Batch(batch.dataset, images, batch.targets, batch.valid, batch.index)
    return lambda: None


def loss(of: Run, step: Step, task: str, value: float) -> Callable[[], None]:
    """A task's loss is `value` times what it is."""
    patch, real = pytest.MonkeyPatch(), step_module.summed_loss
    patch.setattr(step_module, "summed_loss", lambda t, *rest: real(t, *rest) * (value if t.name == task else 1.0))
    return patch.undo


def gradient(of: Run, step: Step, task: str, value: float) -> Callable[[], None]:
    """The first number in the gradient of a task's tower is `value`."""
    weight = next(p for name, p in of.model.named_parameters() if name.startswith(f"towers.{task}") and p.ndim > 1)

    def spoiled(found: Tensor) -> Tensor:
        found = found.clone()
        found[(0,) * found.ndim] = value
        return found

    return weight.register_hook(spoiled).remove


@row(24, "NaN never enters the weights")
def not_a_number(folder: Path, short: bool) -> Cases:
    cases, draw = Cases(), random.Random(0)
    for spoil in (pixel, loss, gradient):
        for task in TASKS:
            for i in range(2 if short else 20):
                number, value = draw.randrange(STEPS), draw.choice([float("nan"), float("inf"), -float("inf")])
                of = run(config(seed=i), folder / f"{spoil.__name__}-{task}-{i}", Silent())
                of.model.train()
                of.guard.late = draw.choice([0, 2])
                found: list[str] = []
                for k, step in zip(range(STEPS), of.feed.epoch(1), strict=False):
                    if k != number:
                        train_step(of, step)
                        continue
                    of.guard.settle()
                    before, undo = stands(of), spoil(of, step, task, value)
                    train_step(of, step)
                    undo()
                    of.guard.settle()
                    # of an optimizer that has not stepped yet, the moments are made, and zero
                    found = [name for name in changed(before, stands(of)) if number or not name[0].isdigit()]
                of.guard.settle()
                bad = [name for name, p in of.model.state_dict().items() if not bool(p.isfinite().all())]
                held = not found and not bad and of.guard.skipped == 1
                said = f"step {number}, {value}, late {of.guard.late}: {found} changed, {bad}, {of.guard.skipped} left out"
                cases.check(f"{spoil.__name__} of {task}", held, said)
                of.close()
    cases.notes.append("a pixel, a loss or a gradient is NaN or infinite at a random step; half of them read late, as on a GPU")
    return cases


@row(25, "an exploding task does not sink the others")
def exploding(folder: Path, short: bool) -> Cases:
    cases = Cases()
    for seed in range(1 if short else 3):
        for task in TASKS:
            for begins in (0, 1, 15) if short else (0, 1, 5, 15, 20):
                real, calls = step_module.summed_loss, iter(range(10**6))

                def grown(of: mtl.Task, output: Tensor, batch: Batch) -> Tensor:
                    factor = 1e12 if of.name == task and next(calls) >= begins else 1.0  # noqa: B023
                    return real(of, output, batch) * factor  # noqa: B023

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(step_module, "summed_loss", grown)
                    try:
                        mtl.train(config(seed, epochs=4), folder / f"{task}-{seed}-{begins}")
                    except mtl.MTLError as error:
                        said = str(error)
                        named = f"the loss of {task} has been over" in said and f"up to step {begins + 10}," in said
                        cases.check(f"{task} from step {begins}, seed {seed}", named, said)
                    else:
                        cases.check(f"{task} from step {begins}, seed {seed}", False, "it went on")
    cases.notes.append("stopped after ten steps, naming it; what was saved before stays")
    return cases
