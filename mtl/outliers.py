"""Training labels so far from the others that they set the scale of their task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mtl.data import Samples
from mtl.task import Task

FAR = 10.0
"""Deviations of the middle 80 %: a standard deviation beyond it is that of a few labels, and so are labels beyond it."""
FEW = 0.01
"""Share of the labels. More than that are no mistake but another kind of sample."""
NORMAL = 2.563
"""How many standard deviations the middle 80 % of a normal distribution span."""


def warnings_of_labels(tasks: Sequence[Task], training: Mapping[str, Samples]) -> list[str]:
    """One line for each task of numbers, (N,) or (N, K), a few of which make up the standard deviation.

    Losses are in units of that deviation: beside a single 1e30 all other labels look alike, and nothing is learned of them.

    Args:
        training: dataset name -> its training samples.
    """
    lines = []
    for task in tasks:
        target, mask = training[task.dataset].targets[task.name], training[task.dataset].valid[task.name]
        if not target.is_floating_point() or target.ndim > 2:
            continue
        columns = target.cpu().double().numpy().reshape(len(target), -1)
        seen = np.broadcast_to(True if mask is None else mask.cpu().numpy().reshape(len(target), -1), columns.shape)
        for column, valid in zip(columns.T, seen.T, strict=True):
            values = column[valid]
            low, middle, high = np.quantile(values, (0.1, 0.5, 0.9)) if values.size else (0.0, 0.0, 0.0)
            spread = (high - low) / NORMAL
            distance = np.abs(values - middle)
            far = distance > FAR * spread
            if spread and values.std() > FAR * spread and far.sum() <= max(1, FEW * len(values)):
                farthest = values[distance.argmax()]
                lines.append(
                    f"task {task.name}: {far.sum():,} of {values.size:,} training labels lie far from the others (the farthest "
                    f"is {farthest:.6g}; 80 % are {low:.6g} to {high:.6g}) and make their standard deviation "
                    f"{values.std():.3g}, the unit of the loss unless the head is given mean and std; if they are wrong, mend "
                    "them or mark them as missing"
                )
    return lines
