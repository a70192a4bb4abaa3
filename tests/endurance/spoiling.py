"""Makes one step of a run not finite, and sees that nothing of it stays; alone, or in every process of several.

torchrun --nproc-per-node=N -m tests.endurance.spoiling OUT.json COUNT
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
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
from mtl.processes import ALONE, Processes, joined
from mtl.progress import Silent
from mtl.run import Run
from mtl.step import train_step

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
    """What differs, by name. A moment that is not there yet is zero."""
    same = {
        name: torch.equal(one.get(name, torch.zeros_like(b)), b) if isinstance(b, Tensor) else one[name] == b
        for name, b in other.items()
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


Spoiler = Callable[[Run, Step, str, float], Callable[[], None]]
"""Makes something of a step be that value, for a task; what it gives undoes it."""
SPOILERS: dict[str, Spoiler] = {"pixel": pixel, "loss": loss, "gradient": gradient}


def attempts(folder: Path, count: int, processes: Processes = ALONE) -> list[tuple[str, bool, str]]:
    """Each way of spoiling each task `count` times: what was tried, whether it held, and what was found. In several processes
    one of them, drawn, has the value; all draw the same.
    """
    draw, made = random.Random(0), []
    for name, spoil in SPOILERS.items():
        for task in TASKS:
            for i in range(count):
                number, value = draw.randrange(STEPS), draw.choice([float("nan"), float("inf"), -float("inf")])
                late, where = draw.choice([0, 2]), draw.randrange(processes.count)
                optim = {"name": draw.choice(["adam", "adamw", "sgd"]), "schedule": "cosine", "clip_norm": 10}
                of = run(config(seed=i, optim=optim), folder / f"{name}-{task}-{i}", Silent(), processes)
                of.guard.late = late
                found = left(of, spoil, task, number, value if where == processes.rank else None)
                everywhere = processes.gather((found, weights(of)))
                wrong = [text for texts, _ in everywhere for text in texts]
                if len({digest for _, digest in everywhere}) > 1:
                    wrong.append("the processes have other weights")
                tried = f"{optim['name']}, step {number}, {value}, late {late}, in process {where}"
                made.append((f"{name} of {task}", not wrong, f"{tried}: {wrong}"))
                of.close()
    return made


def left(of: Run, spoil: Spoiler, task: str, number: int, value: float | None) -> list[str]:
    """Train, with step `number` spoiled, in this process where there is a value: what is wrong then."""
    of.model.train()
    found: list[str] = []
    for k, step in zip(range(STEPS), of.feed.epoch(1), strict=False):
        if k != number:
            train_step(of, step)
            continue
        of.guard.settle()
        before = stands(of)
        undo = nothing if value is None else spoil(of, step, task, value)
        train_step(of, step)
        undo()
        of.guard.settle()
        found = [f"{name} changed" for name in changed(before, stands(of))]
    of.guard.settle()
    found += [f"{name} is not finite" for name, p in of.model.state_dict().items() if not bool(p.isfinite().all())]
    return found if of.guard.skipped == 1 else [*found, f"{of.guard.skipped} left out"]


def weights(of: Run) -> str:
    """A digest of all parameters, which are those of all processes."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in of.model.parameters())).hexdigest()


def nothing() -> None:
    """What is to be undone where nothing was done."""


def main() -> None:
    """Of several processes: try, and write what came of it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, joined("cpu") as processes:
        place = processes.first(lambda: folder)
        made = attempts(Path(place), int(sys.argv[2]), processes)
        if processes.writes:
            Path(sys.argv[1]).write_text(json.dumps(made))
        processes.all_reduce_max([0])  # the folder is gone with the first


if __name__ == "__main__":
    main()
