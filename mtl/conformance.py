"""Conformance: what a registered task promises, tried out, with what to mend where it does not hold.

    mtl check-plugin NAME

Each check is a function of what the ones before it found. A check that fails stops those that need its result, not the others.
Not covered: whether the task can be learned from its whole training split, or is worth learning, and whether what it decodes is
in the right words: a decoded sample is shown beside its target.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mtl.batches import Batch
from mtl.build import make_model
from mtl.choices import choose
from mtl.data import Samples, Split, checked_splits, data_root, fit_heads, load_dataset, read_splits
from mtl.datasets import Dataset
from mtl.errors import MTLError
from mtl.evaluation import evaluate, summed_loss, try_tasks
from mtl.metrics import score_of
from mtl.model import MultiTaskModel
from mtl.portions import Portion
from mtl.registry import BACKBONES, DATASETS, TASKS
from mtl.seeding import permutation, seeded
from mtl.sharing import Unshared
from mtl.standardize import Standardize
from mtl.task import Task, make_task

BATCH = 32
"""Labelled training samples that are overfitted."""
STEPS = 500
EVERY = 25
RATE = 3e-3
FALLS_TO = 0.25
SCORES = 0.9
"""Overfitted: the loss falls to this share of what it was, or the score of the batch reaches this."""


@dataclass(frozen=True)
class Check:
    """One promise: `ok` is None where it could not be tried because an earlier one failed."""

    name: str
    ok: bool | None
    detail: str


@dataclass
class _Subject:
    """A task, and what the checks have found of it so far."""

    name: str
    root: Path
    backbone: str | None
    parts: dict[Split, Dataset] = field(default_factory=dict)
    task: Task | None = None
    samples: dict[Split, Samples] = field(default_factory=dict)
    model: MultiTaskModel | None = None
    batch: Batch | None = None


class _BrokenError(Exception):
    """A promise that does not hold; the message says what was found and what to mend."""


def check_task(name: str, root: Path | None = None, backbone: str | None = None) -> list[Check]:
    """Try everything that the framework relies on with the registered task `name`, on the CPU.

    Args:
        name: of a registered task; its default options are used.
        root: folder of the datasets; None: as for a run.
        backbone: a registered name; None: small_cnn for images, mlp for feature vectors.

    Raises:
        PluginError: no such task or backbone.
    """
    TASKS.get(name)
    if backbone is not None:
        BACKBONES.get(backbone)
    subject = _Subject(name, data_root(root), backbone)
    checks: list[Check] = []
    for title, needs, check in CHECKS:
        if not all(getattr(subject, need) for need in needs):
            checks.append(Check(title, None, "not tried: an earlier check failed"))
            continue
        try:
            with seeded(0, "conformance", title):
                checks.append(Check(title, True, check(subject)))
        except (_BrokenError, MTLError) as error:
            checks.append(Check(title, False, str(error)))
        except Exception as error:  # a plugin's code may raise anything
            checks.append(Check(title, False, f"{type(error).__name__}: {error}"))
    return checks


def _loads(of: _Subject) -> str:
    of.task = make_task(of.name)
    task, score = of.task, score_of(of.name, of.task.all_metrics)
    return f"{task.dataset}.{task.target}, {type(task.head).__name__}, score {score.name}, weight {task.weight:g}"


def _dataset(of: _Subject) -> str:
    assert of.task is not None
    plugin = DATASETS.get(of.task.dataset)
    parts = read_splits(plugin, of.root, None)
    shapes = {(tuple(part.images.shape[1:]), part.images.dtype) for part in parts.values()}
    if len(shapes) > 1:
        raise _BrokenError(f"splits differ in shape or dtype: {shapes}; bring them to one")
    of.parts = parts
    (shape, dtype) = shapes.pop()
    counts = ", ".join(f"{split} {len(part):,}" for split, part in parts.items())
    return f"{counts} samples of {str(dtype).removeprefix('torch.')} {shape}"


def _same_twice(of: _Subject) -> str:
    assert of.task is not None
    again = load_dataset(DATASETS.get(of.task.dataset), Split.TRAIN, of.root, None)
    first = of.parts[Split.TRAIN]
    assert again is not None
    same = again.same_images(first) and all(
        torch.equal(again.labels[name].nan_to_num(), label.nan_to_num()) for name, label in first.labels.items()
    )
    if not same:
        raise _BrokenError(
            "two calls give different training samples, so validation images would leak into training from run to run; draw "
            "random data from a generator with a fixed seed"
        )
    return "two calls give the same training samples"


def _labels(of: _Subject) -> str:
    assert of.task is not None
    parts = checked_splits(of.task.dataset, of.parts, [of.task], Portion(0.2))
    (of.task,) = fit_heads([of.task], {of.task.dataset: parts[Split.TRAIN]})
    of.samples = parts
    labelled = ", ".join(f"{split} {part.labelled_share[of.name]:.0%}" for split, part in parts.items())
    return f"in range in every split; labelled: {labelled}"


def _builds(of: _Subject) -> str:
    assert of.task is not None
    shape = of.samples[Split.TRAIN].shape
    name = of.backbone or ("small_cnn" if len(shape) == 3 and min(shape[1:]) >= 4 else "mlp")
    chosen = name if of.backbone else {"name": name, "dropout": 0.0}  # what is learned by heart should not be hidden
    model = make_model([of.task], shape, choose(BACKBONES, chosen), Unshared(), "channel", 0, "cpu", pretrained=False)
    for standardize in model.inputs.values():
        assert isinstance(standardize, Standardize)
        standardize.fit(of.samples[Split.TRAIN])
    try_tasks(model, {of.task.dataset: of.samples[Split.TRAIN]}, nullcontext)
    of.model, of.batch = model, _labelled_batch(of.samples[Split.TRAIN], of.name)
    output = model({of.task.dataset: of.batch.images}).outputs[of.name]
    return f"on {name}: output {tuple(output.shape[1:])} per sample, {model.parameter_count():,} parameters"


def _labelled_batch(part: Samples, task: str) -> Batch:
    mask = part.valid[task]
    some = torch.arange(len(part)) if mask is None else mask.reshape(len(part), -1).any(1).nonzero().flatten()
    index = some[permutation(len(some), 0, "conformance")[:BATCH]]  # folders come class by class
    return Batch(
        part.dataset, part.images[index], {task: part.targets[task][index]}, {task: None if mask is None else mask[index]}
    )


def _loss(of: _Subject) -> str:
    assert of.task is not None
    assert of.model is not None
    assert of.batch is not None
    output = _outputs(of).detach()
    target = of.batch.targets[of.name]
    loss = of.task.unreduced_loss(output, target)
    if not bool(loss.isfinite().all()):
        raise _BrokenError("the loss is not finite before anything is learned; check its logarithms and divisions")
    half = len(output) // 2
    alone = of.task.unreduced_loss(output[:half], target[:half])
    if not torch.allclose(alone, loss[:half], rtol=1e-4, atol=1e-6):
        raise _BrokenError(
            "a sample's loss depends on the other samples of its batch, so missing labels and micro-batches would change it; "
            "give one loss per sample that is its own"
        )
    return f"finite, one per {'sample' if loss.ndim == 1 else 'label'}, its own; mean {loss.mean():.4g}"


def _missing(of: _Subject) -> str:
    assert of.task is not None
    assert of.batch is not None
    target = of.batch.targets[of.name]
    mask = of.batch.valid[of.name]
    seen = torch.ones(len(target), dtype=torch.bool) if mask is None else mask
    half = seen & (torch.arange(len(target)) % 2 == 0).view(-1, *[1] * (seen.ndim - 1))
    output = _outputs(of).detach().requires_grad_()
    summed_loss(of.task, output, Batch(of.batch.dataset, of.batch.images, {of.name: target}, {of.name: half})).backward()
    assert output.grad is not None
    out = ~half if half.ndim == 1 else ~half.reshape(len(half), -1).any(1)
    if not bool((output.grad[out] == 0).all()):
        raise _BrokenError("samples without a label have a gradient; the loss must not couple samples, nor give nan")
    return "no gradient where there is no label"


def _gradient(of: _Subject) -> str:
    assert of.model is not None
    model = of.model.train()
    model.zero_grad()
    _batch_loss(of).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    if silent:
        raise _BrokenError(f"{len(silent)} parameters have no finite gradient: {', '.join(silent[:4])}; is a result detached?")
    still = [n for n, p in model.named_parameters() if n.startswith("towers.") and p.grad is not None and not p.grad.any()]
    total = sum(n.startswith("towers.") for n, _ in model.named_parameters())
    if total and len(still) == total:
        raise _BrokenError("the gradient of every backbone parameter is zero; does the head use its input?")
    return f"reaches {total - len(still)} of {total} backbone parameters, and every parameter of the head"


def _overfits(of: _Subject) -> str:
    assert of.task is not None
    assert of.model is not None
    assert of.batch is not None
    target = of.batch.targets[of.name]
    varies = bool((target != target[:1]).any())
    (before, score_before), (after, score_after), step = _batch_figures(of), (math.inf, None), 0

    def learned() -> bool:
        return after <= FALLS_TO * before or (varies and score_after is not None and score_after >= SCORES)

    optimizer = torch.optim.Adam(of.model.parameters(), lr=RATE)
    while step < STEPS and not learned():
        of.model.train()
        for _ in range(EVERY):
            step += 1
            optimizer.zero_grad()
            loss = _batch_loss(of)
            if not bool(loss.isfinite()):
                raise _BrokenError(f"the loss became {loss.item()} at step {step} of learning {len(target)} samples by heart")
            loss.backward()
            optimizer.step()
        after, score_after = _batch_figures(of)
    name = of.task.score_name
    found = f"loss {before:.4g} -> {after:.4g}, {name} {_brief(score_before)} -> {_brief(score_after)} in {step} steps"
    if not learned():
        raise _BrokenError(
            f"{len(target)} samples cannot be learned by heart: {found}; do labels belong to their images, and does the loss "
            "fall where predictions improve?"
        )
    if varies and score_after is not None and score_after > 1 + 1e-6:
        raise _BrokenError(f"the score must be at most 1; {found}")
    if varies and score_before is not None and score_after is not None and score_after <= score_before < SCORES:
        raise _BrokenError(f"the score did not rise with the loss falling: {found}; is its direction right?")
    return f"{len(target)} samples: {found}" + ("" if varies else "; all have one target, so the score says nothing")


def _brief(score: float | None) -> str:
    return "n/a" if score is None else f"{score:.4g}"


def _decodes(of: _Subject) -> str:
    assert of.task is not None
    assert of.batch is not None
    output = _outputs(of).detach()
    rows = of.task.head.decode(output)
    if len(rows) != len(output) or not all(isinstance(row, dict) for row in rows):
        raise _BrokenError(
            f"decode must give one mapping per sample, {len(output)}; found {len(rows)} of {type(rows).__name__}"
        )
    try:
        json.dumps(rows, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _BrokenError(f"decode must give what JSON can hold: {error}; use .tolist() or .item()") from error
    return f"target {_target(of)[0].tolist()}: {json.dumps(rows[0])}"


def _restores(of: _Subject) -> str:
    assert of.task is not None
    described = json.loads(json.dumps(of.task.head.describe(), allow_nan=False))
    again = make_task(of.name).head.restored(described)
    if json.loads(json.dumps(again.describe())) != described:
        raise _BrokenError(f"restored(describe()) is another head: {again.describe()} instead of {described}")
    loss, other = (head.loss(_outputs(of).detach(), _target(of)) for head in (of.task.head, again))
    if not torch.equal(loss, other):
        raise _BrokenError("restored(describe()) gives another loss; describe() must hold what fitted() took from the data")
    return "from its description, as a run does that is scored again"


def _pickles(of: _Subject) -> str:
    some = of.parts[Split.TRAIN].subset(torch.arange(min(BATCH, len(of.parts[Split.TRAIN]))))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        worker = subprocess.run(
            [sys.executable, "-c", WORKER],
            input=pickle.dumps(some),
            env=environment,
            capture_output=True,
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _BrokenError(f"a worker process did not start or answer: {error}") from error
    if worker.returncode:
        raise _BrokenError(
            f"samples cannot be unpickled in a fresh process: {worker.stderr.decode(errors='replace').strip().splitlines()[-1]}"
        )
    if float(worker.stdout) != float(some.images[:].double().sum()):
        raise _BrokenError("samples arrive changed in a fresh process")
    pickle.loads(pickle.dumps(of.task))
    return "samples reach a fresh process; the task pickles"


WORKER = "import pickle, sys; print(repr(float(pickle.load(sys.stdin.buffer).images[:].double().sum())))"
"""A program of its own: a worker of `multiprocessing` would run the caller's main module again."""


def _outputs(of: _Subject) -> Tensor:
    assert of.model is not None
    assert of.batch is not None
    with torch.no_grad():
        outputs: dict[str, Tensor] = of.model.eval()({of.batch.dataset: of.batch.images}).outputs
        return outputs[of.name]


def _target(of: _Subject) -> Tensor:
    assert of.batch is not None
    return of.batch.targets[of.name]


def _batch_loss(of: _Subject) -> Tensor:
    assert of.model is not None
    assert of.task is not None
    assert of.batch is not None
    return summed_loss(of.task, of.model({of.batch.dataset: of.batch.images}).outputs[of.name], of.batch) / len(of.batch)


def _batch_figures(of: _Subject) -> tuple[float, float | None]:
    """Loss and score on the batch, as evaluation computes them."""
    assert of.model is not None
    assert of.task is not None
    assert of.batch is not None
    mask = of.batch.valid[of.name]
    labelled = len(of.batch) if mask is None else int(mask.sum())
    share = 1.0 if mask is None else labelled / mask.numel()
    part = Samples(of.batch.dataset, of.batch.images, of.batch.targets, of.batch.valid, {of.name: labelled}, {of.name: share})
    figures = evaluate(of.model, {of.batch.dataset: part}, BATCH, nullcontext)[of.name]
    if undefined := [name for name, value in figures.items() if value is None and name != of.task.score_name]:
        raise _BrokenError(f"metrics that are not a number on {len(of.batch)} samples: {', '.join(undefined)}")
    return figures["loss"], figures[of.task.score_name]


CHECKS: tuple[tuple[str, tuple[str, ...], Callable[[_Subject], str]], ...] = (
    ("loads", (), _loads),
    ("dataset", ("task",), _dataset),
    ("same twice", ("parts",), _same_twice),
    ("labels", ("parts",), _labels),
    ("builds", ("samples",), _builds),
    ("loss", ("batch",), _loss),
    ("missing labels", ("batch",), _missing),
    ("gradient", ("batch",), _gradient),
    ("restores", ("batch",), _restores),
    ("overfits a batch", ("batch",), _overfits),
    ("decodes", ("batch",), _decodes),
    ("pickles", ("parts",), _pickles),
)
"""Title, what of the subject it needs, and the check: it returns what it found, or raises."""
