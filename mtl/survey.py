"""What a config comes to before anything is trained: samples, steps, parameters, FLOPs, one step."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtl.build import fitted, in_one_shape, input_shape, load_data, make_decoders, make_feed, make_tasks, model_of, run
from mtl.config import RunConfig
from mtl.data import Samples, Split
from mtl.fingerprint import fingerprint
from mtl.model import MultiTaskModel
from mtl.step import train_step
from mtl.task import Task


@dataclass(frozen=True)
class Survey:
    """What a config comes to, before anything is trained.

    Args:
        tasks: with what their heads took from the training data.
        shape: of one sample.
        points: layer points of the config, or the backbone's own, in order.
        samples: split -> dataset -> how many.
        labelled: task -> training samples with its label.
        epoch_steps: updates in an epoch.
        batch_sizes: dataset -> its samples in a batch.
        input_shape: that images were brought to; None: they were left alone.
        fingerprints: "dataset, split" -> whether it is still the same; see `mtl.fingerprint`.
    """

    tasks: list[Task]
    shape: tuple[int, ...]
    points: tuple[str, ...]
    samples: dict[str, dict[str, int]]
    labelled: dict[str, int]
    epoch_steps: int
    batch_sizes: dict[str, int]
    input_shape: tuple[int, int, int] | None
    fingerprints: dict[str, str]


def survey(config: RunConfig) -> Survey:
    """Load the data of a resolved config and build its network, and forget both again.

    Raises:
        MTLError: as `train` does before training.
    """
    with make_decoders(config) as decoders:
        tasks = make_tasks(config)
        samples = load_data(config, tasks, decoders=decoders)
        tasks = fitted(config, tasks, samples[Split.TRAIN])
        prints = {f"{name}, {split}": fingerprint(part) for split, parts in samples.items() for name, part in parts.items()}
        config, samples, _ = in_one_shape(config, samples)
        training = samples[Split.TRAIN]
        feed = make_feed(config, training)
        shape = input_shape(training)
        model = model_of(config, tasks, shape, pretrained=False)
        return Survey(
            tasks=tasks,
            shape=shape,
            points=config.sharing.points or model.declared,
            samples={split: {name: len(part) for name, part in parts.items()} for split, parts in samples.items()},
            labelled={task.name: _samples_with_label(training[task.dataset], task.name) for task in tasks},
            epoch_steps=feed.steps_per_epoch,
            batch_sizes=feed.batch_sizes,
            input_shape=config.data.input_shape,
            fingerprints=prints,
        )


def _samples_with_label(part: Samples, task: str) -> int:
    mask = part.valid[task]
    return len(part) if mask is None else int(mask.reshape(len(part), -1).any(1).sum())


def parameters_and_flops(config: RunConfig, tasks: list[Task], shape: tuple[int, ...]) -> tuple[int, int]:
    """Numbers that a config's network trains, and FLOPs (2 per multiply-add) of a forward pass of one image per dataset."""
    model = model_of(config, tasks, shape, pretrained=False)
    model.freeze(config.optim.freeze)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, forward_flops(model, {name: torch.zeros(1, *shape, device=config.device) for name in model.inputs})


def forward_flops(model: MultiTaskModel, images: Mapping[str, Tensor]) -> int:
    """FLOPs (2 per multiply-add) of a forward pass in evaluation mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(images)
    model.train(was_training)
    return int(forward.get_total_flops())


def dry_run(config: RunConfig) -> dict[str, Any]:
    """Build a run, take one step, and say what it consists of. Leaves no run directory."""
    with tempfile.TemporaryDirectory() as folder, closing(run(config, Path(folder) / "run")) as ready:
        step = next(ready.feed.epoch(1))
        images = {batch.dataset: batch.images for batch in step[0]}
        flops = forward_flops(ready.model, {name: x[:1] for name, x in images.items()})
        ready.model.train()
        started = time.monotonic()
        losses = train_step(ready, step).tolist()
        seconds = time.monotonic() - started
    model = ready.model
    return {
        "tasks": {task.name: {"dataset": task.dataset, "target": task.target, **task.head.describe()} for task in model.tasks},
        "samples": {split: {name: len(part) for name, part in parts.items()} for split, parts in ready.samples.items()},
        "labelled": {
            split: {task: n for part in parts.values() for task, n in part.labelled.items()}
            for split, parts in ready.samples.items()
        },
        "set_aside": ready.aside.counts(),
        "input_shape": list(next(iter(ready.samples[Split.TRAIN].values())).shape),
        "layer_points": [{"point": p.name, "shape": list(p.shape), "role": p.role} for p in model.points],
        "parameters": model.parameter_count(),
        "parameters_frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "parameters_exchange": sum(p.numel() for unit in model.exchange().values() for p in unit.parameters()),
        "flops_forward_per_image": flops,
        "steps": min(ready.feed.steps_per_epoch * config.epochs, config.max_steps or sys.maxsize),
        "first_step_loss": dict(zip([task.name for task in model.tasks], losses, strict=False)),
        "first_step_seconds": round(seconds, 4),
        "device": ready.config.device,
        "precision": ready.config.precision,
        "execution": ready.config.execution,
        "compile": ready.config.compile,
        "config_digest": ready.config.digest(),
        "parameter_names": [name for name, _ in model.named_parameters()],
    }
