"""How the scores of several tasks become one number: in training, and in what is said of finished runs."""

from __future__ import annotations

from collections.abc import Iterable

LEAST = -1.0
"""As which a lower score counts."""


def mean_of_scores(scores: Iterable[float]) -> float:
    """Mean over tasks of their scores, each taken as `LEAST` at the least.

    R^2 has no lower bound: early in training one task's -50 would outweigh every other task, and decide which weights are kept.

    >>> mean_of_scores([0.5, -50.0])
    -0.25
    """
    bounded = [max(score, LEAST) for score in scores]
    return sum(bounded) / len(bounded)
