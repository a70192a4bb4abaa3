"""Rows 19 to 21: labels out of range, labels that are missing, images in two splits, classes without a sample."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mtl
from mtl.batches import Batch
from mtl.build import load_data, make_tasks, run
from mtl.config import RunConfig
from mtl.evaluation import summed_loss
from mtl.inspection import inspect
from mtl.progress import Silent
from mtl.run import Run
from mtl.step import train_step
from tests.endurance.rows import Cases, row

N = 100
HEADS: dict[str, tuple[mtl.Head, Any]] = {
    "classification": (mtl.Classification(("x", "y", "z")), np.arange(N) % 3),
    "ordinal": (mtl.Ordinal(("x", "y", "z")), np.arange(N) % 3),
    "multilabel": (mtl.MultiLabel(("x", "y")), np.stack([np.arange(N) % 2, np.arange(N) // 2 % 2], 1)),
    "regression": (mtl.Regression(), np.arange(N) / 7.0),
}


def config(task: str, **more: Any) -> RunConfig:
    return RunConfig(
        **{
            "tasks": [task, "row_other"],
            "backbone": {"name": "mlp", "widths": [8], "dropout": 0},
            "data": {"validation": 0},
            "batch_size": N,
            "device": "cpu",
            "precision": "fp32",
            **more,
        }
    )


def register(name: str, head: mtl.Head, labels: Any, valid: Any = None) -> None:
    """A dataset of N small pictures with these labels, and one that needs none of them."""

    @mtl.register_dataset(f"row_{name}", splits=("train",))
    def dataset(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        images = np.random.default_rng(0).integers(0, 255, (N, 4, 4)).astype(np.uint8)
        masks = {} if valid is None else {"t": valid}
        return mtl.ArrayDataset(images, {"t": labels, "other": np.arange(N) % 2}, masks)

    mtl.register_task(f"row_{name}")(lambda: mtl.Task(f"row_{name}", "t", head))
    mtl.register_task("row_other")(lambda: mtl.Task(f"row_{name}", "other", mtl.Classification(("no", "yes"))))


@row(19, "label range is checked before the device sees it")
def label_ranges(folder: Path, short: bool) -> Cases:
    cases = Cases()
    for name, (head, good) in HEADS.items():
        wrong: list[Any] = [math.nan, math.inf] if name == "regression" else [-1, good.max() + 1, 2**31, 2.7]
        for value in wrong:
            labels = good.astype(np.float64 if isinstance(value, float) else np.int64).copy()
            labels.reshape(N, -1)[5, 0] = value
            case = f"{name} {value}"
            register(name, head, labels)
            try:
                load_data(config(f"row_{name}"), make_tasks(config(f"row_{name}")))
            except mtl.DataError as error:
                cases.check(case, "sample 5" in str(error) and f"row_{name}" in str(error), str(error)[:200])
            else:
                cases.check(case, False, "it was accepted")
            # masked out it may be anything
            register(name, head, labels, np.arange(N) != 5)
            try:
                load_data(config(f"row_{name}"), make_tasks(config(f"row_{name}")))
                cases.check(f"{case}, masked", True)
            except mtl.MTLError as error:
                cases.check(f"{case}, masked", False, str(error)[:200])
    return cases


def gradients(of: Run, batch: Batch) -> dict[str, Tensor | None]:
    """Of one step."""
    of.optimizer.zero_grad = lambda *_, **__: None  # type: ignore[method-assign]
    torch.manual_seed(0)
    train_step(of, [[batch]])
    return {name: p.grad for name, p in of.model.named_parameters()}


@row(20, "missing labels are neutral")
def missing_labels(folder: Path, short: bool) -> Cases:
    cases = Cases()
    for name, (head, good) in HEADS.items():
        register(name, head, good)
        runs = [run(config(f"row_{name}"), folder / f"{name}{i}") for i in range(2)]
        (batch,) = next(runs[0].feed.epoch(1))[0]
        none = torch.zeros(N, dtype=torch.bool)
        hidden = Batch(batch.dataset, batch.images, batch.targets, {**batch.valid, f"row_{name}": none})
        runs[1].weights = torch.tensor([0.0, 1.0])
        got, expected = gradients(runs[0], hidden), gradients(runs[1], batch)
        same = all(
            a is not None and b is not None and torch.equal(a, b) for a, b in zip(got.values(), expected.values(), strict=True)
        )
        of_head = [grad for key, grad in got.items() if key.startswith(f"heads.row_{name}.")]
        zero = bool(of_head) and all(grad is not None and not grad.any() for grad in of_head)
        cases.check(f"{name}: all masked is weight 0, bitwise", same)
        cases.check(f"{name}: the head's gradient is zero and there", zero)
        task = runs[0].model.tasks[0]
        output = task.head.build((8,))(torch.randn(N, 8, generator=torch.Generator().manual_seed(0)))
        for share in (0.5, 0.99):
            mask = torch.arange(N) >= (N // 2 if share == 0.5 else 99)
            part = Batch(batch.dataset, batch.images, batch.targets, {**batch.valid, task.name: mask})
            masked = summed_loss(task, output, part)
            subset = task.unreduced_loss(output[mask], batch.targets[task.name][mask])
            alone = subset.flatten(1).mean(1).sum() if subset.ndim > 1 else subset.sum()
            held = bool(torch.isfinite(masked)) and torch.allclose(masked, alone, rtol=1e-6)
            cases.check(f"{name}: {share:.0%} masked is the loss of the rest", held, (masked.item(), alone.item()))
        for one in runs:
            one.close()
    return cases


@row(21, "duplicates, leakage and empty classes are reported")
def duplicates(folder: Path, short: bool) -> Cases:
    cases = Cases()
    for seed in range(2 if short else 20):
        random = np.random.default_rng(seed)
        train = random.integers(0, 255, (60, 4, 4)).astype(np.uint8)
        test = random.integers(0, 255, (30, 4, 4)).astype(np.uint8)
        copies, leaks, other = (int(random.integers(0, 8)) for _ in range(3))
        other = min(other, leaks)
        train[60 - copies :] = train[:copies]
        test[:leaks] = train[20 : 20 + leaks]
        label = np.arange(60) % 3
        label[60 - copies :] = label[:copies]
        of_test = np.arange(30) % 2
        of_test[:leaks] = label[20 : 20 + leaks]
        of_test[:other] = (of_test[:other] + 1) % 3
        absent = [name for i, name in enumerate("xyz") if not (of_test == i).any()]

        @mtl.register_dataset("row_leaky")
        def leaky(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
            images, labels = (train, label) if split == mtl.Split.TRAIN else (test, of_test)  # noqa: B023
            return mtl.ArrayDataset(images, {"t": labels})

        mtl.register_task("row_leaky")(lambda: mtl.Task("row_leaky", "t", mtl.Classification(("x", "y", "z"))))
        given = config("row_leaky", tasks=["row_leaky"])
        about = inspect(given, Silent())["row_leaky"]
        cases.check(f"seed {seed}: copies", about["duplicates"] == {"train": copies, "test": 0}, about["duplicates"])
        cases.check(f"seed {seed}: leaks", about["shared"] == {"train, test": leaks}, about["shared"])
        cases.check(f"seed {seed}: conflicts", about["conflicting"] == {"row_leaky": other}, about["conflicting"])
        found = about["tasks"]["row_leaky"]["absent"]["test"]
        cases.check(f"seed {seed}: absent classes", found == absent, found)
        if seed < 2:
            result = mtl.train(given.replaced(epochs=1), folder / f"leaky{seed}")
            assert result.test is not None
            values = result.test["row_leaky"].values()
            cases.check(f"seed {seed}: no metric is NaN", all(value is None or math.isfinite(value) for value in values))
    return cases
