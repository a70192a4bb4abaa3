"""How the scores of several tasks become one number: in training, and in what is said of finished runs."""

from __future__ import annotations

from collections.abc import Iterable

FLOOR = -1.0
"""Below which a score counts less and less."""


def bounded(score: float) -> float:
    """A score as it counts in the mean: itself from -1 on, below that -2 - 1/score, which is between -2 and -1.

    R^2 has no lower bound: one task's -50 would outweigh every other task, and decide which weights are kept. What this gives
    rises with the score everywhere, and smoothly, so that of two bad scores the better one still wins.

    >>> bounded(0.5), bounded(-1.0), bounded(-2.0), bounded(-100.0)
    (0.5, -1.0, -1.5, -1.99)
    """
    return score if score >= FLOOR else -2.0 - 1.0 / score


def mean_of_scores(scores: Iterable[float]) -> float:
    """Mean over tasks of their `bounded` scores."""
    counted = [bounded(score) for score in scores]
    return sum(counted) / len(counted)
