"""`train_step`, which is one optimizer update: what the tasks' losses are, and how they become one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtl.batches import Batch, Step
from mtl.evaluation import summed_loss
from mtl.model import Outputs
from mtl.optim import lay_out_gradients
from mtl.run import Run


def train_step(run: Run, step: Step) -> Tensor:
    """One optimizer update from micro-batches of one batch per dataset, of which each of several processes has its share.

    A task's loss is the sum over its labelled samples, divided by the number it would expect in a step of this size: its
    dataset's samples in the step times the share of training samples that carry its label. With every sample labelled that
    is the mean; with rare labels it is steady, and micro-batches add up to exactly the whole.

    A step with a loss or a gradient that is not finite leaves everything as it was; `run.guard` knows, and keeps count.

    Returns:
        (T + 1,), detached, on the device: the unweighted loss of each task, and the objective that was differentiated.
    """
    expected = expected_labels(run, step)
    total = torch.zeros(len(run.model.tasks) + 1, device=run.weights.device)
    run.guard.begin()
    for i, batches in enumerate(step, start=1):
        with run.processes.no_sync(run.forward) if i < len(step) else nullcontext():
            features, losses = task_losses(run, run.forward, batches, expected)
            if run.processes.count > 1:
                losses = list(run.processes.all_reduce(torch.stack(losses)))
            weighted = [loss * weight for loss, weight in zip(losses, run.weights, strict=True)]
            if run.guard.admits(weighted):
                objective = run.balancer.backward(weighted, features, run.shared_parameters)
            else:
                objective = weighted[0].new_full((), float("nan"))
        total += torch.stack([*losses, objective.reshape(())]).detach()
    run.l2.add_gradients()
    if run.config.optim.clip_norm is not None:
        nn.utils.clip_grad_norm_(run.parameters, run.config.optim.clip_norm)
    lay_out_gradients(run.parameters)
    taken = run.guard.update(total, step)
    run.optimizer.zero_grad(set_to_none=True)
    if taken:
        run.balancer.after_step(partial(losses_again, run, step))
    return total


def task_losses(
    run: Run, forward: Callable[[dict[str, Tensor]], Outputs], batches: list[Batch], expected: list[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """What the heads consumed, and the unweighted loss of each task, a scalar over `expected` labels, for one micro-batch."""
    of = {batch.dataset: batch for batch in batches}
    with run.autocast():
        features, outputs = forward({name: batch.images for name, batch in of.items()})
    tasks = zip(run.model.tasks, expected, strict=True)
    return list(features.values()), [summed_loss(task, outputs[task.name], of[task.dataset]) / n for task, n in tasks]


@torch.no_grad()
def losses_again(run: Run, step: Step) -> Tensor:
    """(T,): the weighted losses of a step under the parameters as they are now, in training mode. Batch norm takes no note of
    the pass; dropout draws anew.
    """
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}

    def forward(images: dict[str, Tensor]) -> Outputs:
        return functional_call(run.model, buffers, (images,))  # type: ignore[no-any-return]

    expected = expected_labels(run, step)
    losses = [torch.stack(task_losses(run, forward, batches, expected)[1]) for batches in step]
    return run.weights * run.processes.all_reduce(torch.stack(losses).sum(0))


def expected_labels(run: Run, step: Step) -> list[float]:
    """Per task: samples of its dataset in this step times the share of training samples that carry its label."""
    size: dict[str, int] = {}
    for batches in step:
        for batch in batches:
            size[batch.dataset] = size.get(batch.dataset, 0) + batch.count
    return [size[t.dataset] * run.feed.samples[t.dataset].labelled_share[t.name] for t in run.model.tasks]


def _on(device: torch.device, count: int | Tensor) -> Tensor:
    """A number on a device, of which the host does not wait for the copy: it is filled in there."""
    return count if isinstance(count, Tensor) else torch.full((), count, device=device)


def seen_labels(run: Run, step: Step) -> list[int | Tensor]:
    """Per task: how many labels this step holds; on the device where some are missing."""
    counts: list[int | Tensor] = [0] * len(run.model.tasks)
    for batches in step:
        of = {batch.dataset: batch for batch in batches}
        for i, task in enumerate(run.model.tasks):
            counts[i] = counts[i] + of[task.dataset].labels(task.name)
    if run.processes.count == 1:
        return counts
    return list(run.processes.all_reduce(torch.stack([_on(run.weights.device, n) for n in counts])))
