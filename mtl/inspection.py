"""What a config's data are, before anything is trained: counts, classes, missing labels, duplicates, and what is set aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mtl.aside import Aside
from mtl.auto import resolved
from mtl.build import load_data, make_decoders, make_tasks
from mtl.config import RunConfig
from mtl.data import Samples, Split, named
from mtl.duplicates import find
from mtl.files import FileImages
from mtl.heads import Head
from mtl.multilabel import MultiLabel
from mtl.outliers import warnings_of_labels
from mtl.progress import Progress


def inspect(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Read all data of a config once.

    Returns:
        {dataset: {shape, splits, tasks, duplicates, shared, conflicting, set_aside}} and `warnings`, what should not be
        overlooked; plain enough for JSON.

    Raises:
        MTLError: as training does before its first step.
    """
    allowed = config.data.bad_files
    config = resolved(config.replaced(data=config.data.model_copy(update={"bad_files": 1.0})))  # all are counted
    tasks = make_tasks(config)
    with make_decoders(config) as decoders:
        samples = load_data(config, tasks, decoders=decoders)
        found: dict[str, Any] = {}
        aside = Aside(Path(), samples)
        warnings: list[str] = []
        for name in samples[Split.TRAIN]:
            splits = {split: parts[name] for split, parts in samples.items() if name in parts}
            progress.line(f"{name}: reading {sum(map(len, splits.values())):,} images")
            same = find(splits)
            warnings += same.warnings(name)
            of_task = {
                task.name: _about(task.name, named(task, splits[Split.TRAIN].classes), splits)
                for task in tasks
                if task.dataset == name
            }
            for task, about in of_task.items():
                warnings += _alike(task, about["classes"].get("train", ()))
                warnings += [
                    f"task {task}: no {split} sample of {', '.join(absent)}"
                    for split, absent in about["absent"].items()
                    if absent
                ]
                if count := same.conflicting[task]:
                    warnings.append(f"task {task}: {count:,} images are there twice with different labels")
            for split, part in splits.items():
                if (bad := _counts(part)["unreadable"]) > max(allowed and 1, allowed * len(part)):
                    warnings.append(
                        f"dataset {name}: {bad:,} of {len(part):,} {split} images cannot be read: more than data.bad_files"
                    )
            warnings += warnings_of_labels([task for task in tasks if task.dataset == name], samples[Split.TRAIN])
            found[name] = {
                "shape": list(splits[Split.TRAIN].shape),
                "splits": {split.value: _counts(part) for split, part in splits.items()},
                "tasks": of_task,
                "duplicates": same.within,
                "shared": {f"{one}, {other}": count for (one, other), count in same.shared.items()},
                "conflicting": same.conflicting,
                "set_aside": aside.counts().get(name, {}),
            }
    return {**found, "warnings": warnings}


def _alike(task: str, classes: Sequence[str]) -> list[str]:
    """Classes whose names differ by less than a name should."""
    plain: dict[str, str] = {}
    found = []
    for name in classes:
        other = plain.setdefault(" ".join(name.casefold().split()), name)
        if other != name:
            found.append(f"task {task}: classes {other!r} and {name!r} differ in case or spaces only; are they one?")
    return found


def _counts(part: Samples) -> dict[str, int]:
    unreadable = len(part.images.unreadable.why) if isinstance(part.images, FileImages) else 0
    return {"images": len(part), "unreadable": unreadable}


def _about(task: str, head: Head, splits: Mapping[Split, Samples]) -> dict[str, Any]:
    """Labels of a task in each split: how many, of which classes, and which classes there are none of."""
    names = head.class_names()
    about: dict[str, Any] = {"labelled": {}, "classes": {}, "absent": {}}
    for split, part in splits.items():
        about["labelled"][split.value] = part.labelled[task]
        target, mask = part.targets[task], part.valid[task]
        if target.ndim == 2 and isinstance(head, MultiLabel):
            seen = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.expand_as(target)
            labels = dict(zip(head.classes, seen.sum(0).tolist(), strict=True))
            about.setdefault("labels", {})[split.value] = labels
            counts, names = ((target == 1) & seen).sum(0).tolist(), tuple(head.classes)
        elif names is None or target.ndim != 1 or target.is_floating_point():
            continue
        else:
            counts = torch.bincount(target if mask is None else target[mask], minlength=len(names)).tolist()
        about["classes"][split.value] = dict(zip(names, counts, strict=True))
        about["absent"][split.value] = [name for name, count in zip(names, counts, strict=True) if not count]
    return about
