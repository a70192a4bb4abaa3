"""Who made a step not finite: which tasks, which samples, which weights, found by computing the step again."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.func import functional_call

from mtl.batches import Batch
from mtl.data import Split
from mtl.evaluation import summed_loss
from mtl.files import FileImages
from mtl.guard import LeftOut
from mtl.run import Run
from mtl.seeding import seeded
from mtl.task import Task

SHOWN = 4
"""Samples, or weights, that are named."""


def blame(run: Run, left_out: LeftOut) -> str:
    """Who it was, in words. Costs a few passes over the step's batches; changes nothing."""
    try:
        with seeded(run.config.seed, "blame"):
            return _blame(run, left_out)
    except torch.OutOfMemoryError:
        return "who it was could not be found out, for lack of memory"


def _blame(run: Run, left_out: LeftOut) -> str:
    names = [task.name for task in run.model.tasks]
    lost = [name for name, loss in zip(names, left_out.losses, strict=False) if not _finite(loss)]
    batches = [batch for of_step in left_out.step for batch in of_step]
    if bad := [said for batch in batches if (said := _images(run, batch))]:
        return f"{'; '.join(bad)} ({', '.join(lost) or 'no loss is, but a gradient'})"
    if lost:
        return "; ".join(_of_task(run, batches, task) for task in run.model.tasks if task.name in lost)
    found = [said for task in run.model.tasks if (said := _gradient(run, left_out, task))]
    return "; ".join(found) or "a gradient, or its square, was not finite, and is when it is computed again"


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _images(run: Run, batch: Batch) -> str:
    """Of a batch in which values of images are not finite."""
    if not batch.images.is_floating_point():
        return ""
    bad = ~batch.images.flatten(1).isfinite().all(1)
    return f"pixels of {_named(run, batch, bad)} are not finite" if bad.any() else ""


@torch.no_grad()
def _of_task(run: Run, batches: list[Batch], task: Task) -> str:
    """Whose loss is not finite, and of which samples, as the network sees them by themselves."""
    said = []
    was_training = run.model.training
    run.model.eval()
    try:
        for batch in batches:
            if batch.dataset != task.dataset:
                continue
            with run.autocast():
                output = run.model({batch.dataset: batch.images}).outputs[task.name]
            losses = [summed_loss(task, output[i : i + 1], _sample(batch, i)) for i in range(len(batch))]
            bad = ~torch.stack(losses).isfinite()
            if 0 < int(bad.sum()) < len(bad):
                said.append(_named(run, batch, bad))
    finally:
        run.model.train(was_training)
    whose = f" for {', '.join(said)}" if said else ""
    return f"the loss of {task.name} is not finite{whose}"


def _gradient(run: Run, left_out: LeftOut, task: Task) -> str:
    """Which weights get a gradient from a task that is not finite, though its loss is."""
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    named = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    bad: dict[str, None] = {}
    for batches in left_out.step:
        of = {batch.dataset: batch for batch in batches}
        with run.autocast():
            _, outputs = functional_call(run.model, buffers, ({name: batch.images for name, batch in of.items()},))
        loss = summed_loss(task, outputs[task.name], of[task.dataset])
        if not loss.requires_grad:
            continue
        found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        pairs = zip(named, found, strict=True)
        bad |= dict.fromkeys(name for (name, _), g in pairs if g is not None and not bool(g.abs().max().square().isfinite()))
    more = f" and {len(bad) - SHOWN} more" * (len(bad) > SHOWN)
    what = f"the gradient of {task.name}, or its square, is not finite"
    return f"{what} for {', '.join(list(bad)[:SHOWN])}{more}" if bad else ""


def _sample(batch: Batch, i: int) -> Batch:
    """One of a batch."""
    targets = {name: target[i : i + 1] for name, target in batch.targets.items()}
    valid = {name: None if mask is None else mask[i : i + 1] for name, mask in batch.valid.items()}
    return Batch(batch.dataset, batch.images[i : i + 1], targets, valid)


def _named(run: Run, batch: Batch, chosen: Tensor) -> str:
    """Some samples of a training batch: files by their names, others by their numbers in the split."""
    positions = chosen.nonzero()[:, 0].cpu()
    numbers = positions if batch.index is None else torch.as_tensor(batch.index).cpu()[positions]
    part = run.samples[Split.TRAIN][batch.dataset]
    more = f" and {len(numbers) - SHOWN} more" * (len(numbers) > SHOWN)
    if isinstance(part.images, FileImages):
        return ", ".join(os.fsdecode(path) for path in part.images.paths[numbers[:SHOWN].numpy()].encoded()) + more
    kind = "sample" if len(numbers) == 1 else "samples"
    return f"{kind} {', '.join(map(str, numbers[:SHOWN].tolist()))}{more} of {batch.dataset}"
