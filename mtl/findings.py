"""From the figures of a comparison's cells to what can be said: estimates, paired differences, and words for them.

A cell is an arm, a share of the data and a seed. Differences are paired by seed: arms of one seed have the same initial towers,
data and order. Takes and gives plain values, as they stand in `results.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mtl.stats import ALPHA, delta_m, estimate, holm, permutation_p, seeds_needed

BETTER, WORSE, OPEN, FEW = "better", "worse", "no difference shown", "too few seeds"
"""Verdicts: a corrected p of at most 0.05 in either direction; a larger one; fewer seeds than any claim needs."""

Cells = Mapping[int, Mapping[str, Any]]
"""Of one arm at one share of the data: seed -> cell."""


def tell(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What can be said at each share of the data, in their order."""
    return [_at(results, fraction) for fraction in results["fractions"]]


def _at(results: Mapping[str, Any], fraction: float) -> dict[str, Any]:
    tasks, baseline, reference = results["tasks"], results["baseline"], results["reference"]
    cells: dict[str, Cells] = {}
    for arm in results["arms"]:
        seeds = {c["seed"]: c for c in results["cells"] if c["arm"] == arm["name"] and c["fraction"] == fraction}
        if seeds:
            cells[arm["name"]] = seeds
    arms: dict[str, dict[str, Any]] = {}
    for name, of_arm in cells.items():
        said = arms[name] = {
            "seeds": sorted(of_arm),
            "mean": _estimated([mean_score(cell, tasks) for cell in of_arm.values()]),
            "tasks": {task: _metrics(of_arm, task, about["metrics"]) for task, about in tasks.items()},
            "cost": _cost(of_arm),
        }
        if reference in cells and name != reference:
            said["difference"] = differences(of_arm, cells[reference], tasks)
        if baseline in cells and name != baseline:
            said["transfer"] = differences(of_arm, cells[baseline], tasks)
            said["delta_m"] = _relative(of_arm, cells[baseline], tasks)
    return {"fraction": fraction, "arms": arms, "answer": answer(arms, reference, len(tasks))}


def task_score(cell: Mapping[str, Any], task: str, tasks: Mapping[str, Any]) -> float:
    """A task's score on the test split."""
    return float(cell["test"][task][tasks[task]["score"]])


def mean_score(cell: Mapping[str, Any], tasks: Mapping[str, Any]) -> float:
    """The mean over tasks of their scores."""
    return sum(task_score(cell, task, tasks) for task in tasks) / len(tasks)


def _estimated(values: Sequence[float | None]) -> dict[str, Any] | None:
    there = [value for value in values if value is not None]
    return asdict(estimate(there)) if there else None


def _metrics(cells: Cells, task: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {metric: _estimated([cell["test"][task][metric] for cell in cells.values()]) for metric in metrics}


COSTS = ("parameters", "flops_per_image", "seconds_per_step", "peak_memory_bytes", "training_seconds")


def _cost(cells: Cells) -> dict[str, float | None]:
    """Means over seeds."""
    found: dict[str, float | None] = {}
    for cost in COSTS:
        values = [cell["cost"][cost] for cell in cells.values() if cell["cost"][cost] is not None]
        found[cost] = sum(values) / len(values) if values else None
    return found


def differences(cells: Cells, others: Cells, tasks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each task's score, and under "mean" of their mean, over the seeds that both arms have.

    p-values of the tasks are corrected for their number; that of the mean is a single one.
    """
    seeds = sorted(cells.keys() & others.keys())
    if not seeds:
        return {}
    pairs = {task: [task_score(cells[s], task, tasks) - task_score(others[s], task, tasks) for s in seeds] for task in tasks}
    corrected = holm([permutation_p(of_task) for of_task in pairs.values()])
    found = {task: _difference(d, p, len(tasks)) for (task, d), p in zip(pairs.items(), corrected, strict=True)}
    means = [mean_score(cells[s], tasks) - mean_score(others[s], tasks) for s in seeds]
    return {**found, "mean": _difference(means, permutation_p(means), len(tasks))}


def _difference(d: Sequence[float], p: float, comparisons: int) -> dict[str, Any]:
    found = estimate(d)
    if found.n < seeds_needed(comparisons):
        verdict = FEW
    elif p > ALPHA:
        verdict = OPEN
    else:
        verdict = BETTER if found.mean > 0 else WORSE
    return {**asdict(found), "p": p, "verdict": verdict}


def _relative(cells: Cells, baselines: Cells, tasks: Mapping[str, Any]) -> dict[str, Any] | None:
    """delta_m per seed, against the single-task runs of that seed, over the scores."""
    seeds = sorted(cells.keys() & baselines.keys())
    return _estimated(
        [
            delta_m(
                [task_score(cells[seed], task, tasks) for task in tasks],
                [task_score(baselines[seed], task, tasks) for task in tasks],
                [True] * len(tasks),
            )
            for seed in seeds
        ]
    )


def answer(arms: Mapping[str, Any], reference: str, tasks: int) -> str:
    """One sentence: which arms do better or worse than the reference, of which that is not shown, and whether it could be.

    Differences are of the mean over tasks, in points: hundredths of a score.
    """
    compared = {name: said["difference"]["mean"] for name, said in arms.items() if said.get("difference")}
    if not compared:
        return f"Only {reference} was trained: there is nothing to compare it with."
    by_verdict: dict[str, list[str]] = {}
    for name, d in compared.items():
        by_verdict.setdefault(d["verdict"], []).append(f"{name} ({points(d)})")
    parts = [
        f"{', '.join(by_verdict[v])} {'does' if len(by_verdict[v]) == 1 else 'do'} {v}"
        for v in (BETTER, WORSE)
        if v in by_verdict
    ]
    if OPEN in by_verdict:
        parts.append(f"no difference is shown for {', '.join(by_verdict[OPEN])}")
    if few := by_verdict.get(FEW):
        n, needed = min(d["n"] for d in compared.values()), seeds_needed(tasks)
        measured = f"; measured: {', '.join(few)}" if len(few) <= 3 else ""
        parts.append(
            f"{n} seed{'s' * (n > 1)} cannot show a difference, which takes {needed} or more with {tasks} "
            f"task{'s' * (tasks > 1)}{measured}"
        )
    return f"Compared with {reference}, in points of the mean test score: {'; '.join(parts)}."


def points(d: Mapping[str, Any]) -> str:
    """A difference in points, with its 95 % interval."""
    if d["low"] is None:
        return f"{100 * d['mean']:+.2f}"
    return f"{100 * d['mean']:+.2f}, 95 % interval {100 * d['low']:+.2f} to {100 * d['high']:+.2f}"
