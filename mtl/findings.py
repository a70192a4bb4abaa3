"""From the figures of a comparison's cells to what can be said: estimates, paired differences, and words for them.

A cell is an arm, a share of the data and a seed. Differences are paired by seed: arms of one seed have the same initial towers,
data and order. Takes and gives plain values, as they stand in `results.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from statistics import median
from typing import Any

from mtl.scores import mean_of_scores
from mtl.stats import ALPHA, delta_m, estimate, holm, permutation_p, smallest_p

BETTER, WORSE, OPEN, FEW = "better", "worse", "not shown", "too few seeds"
"""Verdicts: a corrected p of at most 0.05 in either direction; a larger one; a larger one that so few seeds made sure of."""

Cells = Mapping[int, Mapping[str, Any]]
"""Of one arm at one share of the data: seed -> cell."""


def tell(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What can be said at each share of the data, in their order."""
    shares = [_cells_at(results, fraction) for fraction in results["fractions"]]
    tasks, reference, baseline = results["tasks"], results["reference"], results["baseline"]
    found = {"difference": compared(shares, reference, tasks)}
    if baseline == reference:
        found["transfer"] = [
            {name: of for name, of in differences.items() if trains_jointly(cells[name])}
            for cells, differences in zip(shares, found["difference"], strict=True)
        ]
    elif baseline is not None:  # the two against each other are one comparison, and judged once
        without = [
            {name: of for name, of in cells.items() if name == baseline or (name != reference and trains_jointly(of))}
            for cells in shares
        ]
        found["transfer"] = compared(without, baseline, tasks)
        for cells, transfer, difference in zip(shares, found["transfer"], found["difference"], strict=True):
            if baseline in difference and trains_jointly(cells[reference]):
                transfer[reference] = {what: mirrored(d) for what, d in difference[baseline].items()}
    return [
        _at(results, fraction, cells, {key: of[i] for key, of in found.items()})
        for i, (fraction, cells) in enumerate(zip(results["fractions"], shares, strict=True))
    ]


def _cells_at(results: Mapping[str, Any], fraction: float) -> dict[str, Cells]:
    """Arm -> its cells at a share of the data; of those that have some."""
    cells: dict[str, Cells] = {}
    for arm in results["arms"]:
        seeds = {c["seed"]: c for c in results["cells"] if c["arm"] == arm["name"] and c["fraction"] == fraction}
        if seeds:
            cells[arm["name"]] = seeds
    return cells


def _at(
    results: Mapping[str, Any], fraction: float, cells: Mapping[str, Cells], found: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    tasks, baseline = results["tasks"], results["baseline"]
    about = {arm["name"]: arm for arm in results["arms"]}
    arms: dict[str, dict[str, Any]] = {}
    for name, of_arm in cells.items():
        said = arms[name] = {
            "seeds": sorted(of_arm),
            "mean": _estimated([mean_score(cell, tasks) for cell in of_arm.values()]),
            "tasks": {task: _metrics(of_arm, task, about["metrics"]) for task, about in tasks.items()},
            "cost": _cost(of_arm),
            "shares_nothing": trains_jointly(of_arm) and shares_nothing(of_arm, about[name]),
        }
        if baseline in cells and name != baseline:
            said["delta_m"] = _relative(of_arm, cells[baseline], tasks)
    for key, of_arms in found.items():
        for name, of in of_arms.items():
            arms[name][key] = of
    return {"fraction": fraction, "arms": arms, "answer": answer(arms, results, fraction)}


def trains_jointly(cells: Cells) -> bool:
    """Whether an arm's tasks are trained in one run, between which alone there is transfer."""
    return all(len(cell["steps"]) == 1 for cell in cells.values())


def kind_of(cell: Mapping[str, Any]) -> str:
    """The kind of sharing of an arm that trains its tasks jointly; a run's name begins with it."""
    return str(cell["runs"][0].rpartition("-seed")[0])


def shares_nothing(cells: Cells, about: Mapping[str, Any]) -> bool:
    """Whether nothing but the sum of their losses is between the tasks of an arm that trains them jointly: towers apart, or
    units that stay the identity.
    """
    return about.get("apart", False) or {kind_of(cell) for cell in cells.values()} == {"unshared"}


def task_score(cell: Mapping[str, Any], task: str, tasks: Mapping[str, Any]) -> float:
    """A task's score on the test split."""
    return float(cell["test"][task][tasks[task]["score"]])


def mean_score(cell: Mapping[str, Any], tasks: Mapping[str, Any]) -> float:
    """Over the tasks, as runs take it."""
    return mean_of_scores(task_score(cell, task, tasks) for task in tasks)


def _estimated(values: Sequence[float | None]) -> dict[str, Any] | None:
    there = [value for value in values if value is not None]
    return asdict(estimate(there)) if there else None


def _metrics(cells: Cells, task: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {metric: _estimated([cell["test"][task][metric] for cell in cells.values()]) for metric in metrics}


COSTS = ("parameters", "flops_per_image", "seconds_per_step", "peak_memory_bytes", "training_seconds")


def _cost(cells: Cells) -> dict[str, Any]:
    """Medians over seeds, and under "spread" the least and the most seconds of a step."""
    found: dict[str, Any] = {}
    for cost in COSTS:
        values = [cell["cost"][cost] for cell in cells.values() if cell["cost"][cost] is not None]
        found[cost] = median(values) if values else None
    times = [cell["cost"]["seconds_per_step"] for cell in cells.values()]
    return {**found, "spread": [min(times), max(times)]}


def compared(
    shares: Sequence[Mapping[str, Cells]], other: str, tasks: Mapping[str, Any]
) -> list[dict[str, dict[str, dict[str, Any]]]]:
    """At each share of the data: arm -> each task's difference to the arm `other`, and under "mean" that of their mean, over
    the seeds that both have; see `judged`. There are two families: the means of all arms at all shares, and the single tasks.
    """
    pairs = {
        (i, name): [(of_arm[seed], cells[other][seed]) for seed in sorted(of_arm.keys() & cells.get(other, {}).keys())]
        for i, cells in enumerate(shares)
        for name, of_arm in cells.items()
        if name != other
    }
    pairs = {key: both for key, both in pairs.items() if both}
    means = judged([[mean_score(a, tasks) - mean_score(b, tasks) for a, b in both] for both in pairs.values()])
    singles = judged(
        [
            [task_score(a, task, tasks) - task_score(b, task, tasks) for a, b in both]
            for both in pairs.values()
            for task in tasks
        ]
    )
    found: list[dict[str, dict[str, dict[str, Any]]]] = [{} for _ in shares]
    of_task = iter(singles)
    for (i, name), mean in zip(pairs, means, strict=True):
        found[i][name] = {**{task: next(of_task) for task in tasks}, "mean": mean}
    return found


def judged(family: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Of paired differences that are read side by side, each one's estimate and
    raw_p: of this difference alone.
    p: corrected (Holm) over the family.
    comparisons: how many those are.
    verdict: what p allows to say.
    seeds_needed: where there are too few, from how many on it could be shown, the others being as they are.
    """
    raw = [permutation_p(d) for d in family]
    found = []
    for i, (d, p) in enumerate(zip(family, holm(raw), strict=True)):
        about = estimate(d)
        shown = BETTER if about.mean > 0 else WORSE
        verdict = shown if p <= ALPHA else OPEN if _enough(about.n, i, raw) else FEW
        said = {**asdict(about), "raw_p": raw[i], "p": p, "comparisons": len(family), "verdict": verdict}
        if verdict == FEW:
            said["seeds_needed"] = next(n for n in count(about.n + 1) if _enough(n, i, raw))
        found.append(said)
    return found


def _enough(n: int, i: int, raw: Sequence[float]) -> bool:
    """Whether the smallest p that n pairs can give for comparison `i` would be small enough, beside those of the others."""
    return holm([*raw[:i], smallest_p(n), *raw[i + 1 :]])[i] <= ALPHA


def mirrored(d: Mapping[str, Any]) -> dict[str, Any]:
    """A difference seen from the other arm."""
    turned = {BETTER: WORSE, WORSE: BETTER}.get(d["verdict"], d["verdict"])
    low, high = (None if d[end] is None else -d[end] for end in ("high", "low"))
    return {**d, "mean": -d["mean"], "low": low, "high": high, "verdict": turned}


def _relative(cells: Cells, baselines: Cells, tasks: Mapping[str, Any]) -> dict[str, Any] | None:
    """delta_m per seed, against the single-task runs of that seed; None where it is not defined with one of them."""
    chosen = {task: about["relative"] for task, about in tasks.items()}
    found: list[float] = []
    for seed in sorted(cells.keys() & baselines.keys()):
        values, others = ([of[seed]["test"][task][metric] for task, metric in chosen.items()] for of in (cells, baselines))
        if None in values or None in others:
            return None
        change = delta_m(values, others, [tasks[task]["metrics"][metric] == "higher" for task, metric in chosen.items()])
        if change is None:
            return None
        found.append(change)
    return _estimated(found)


def answer(arms: Mapping[str, Any], results: Mapping[str, Any], fraction: float) -> str:
    """Which arms do better or worse than the reference on average and on which tasks, of which that is not shown, and whether
    it could be; where there is negative transfer; which arms trained for longer, and which failed. Differences are in points:
    hundredths of a score.
    """
    reference, baseline = results["reference"], results["baseline"]
    names = [arm["name"] for arm in results["arms"]]
    said, transfer = ({name: of[key] for name, of in arms.items() if of.get(key)} for key in ("difference", "transfer"))
    parts = []
    if names == [reference] and arms:
        parts.append(f"There is one arm, {reference}: nothing to compare it with.")
    elif reference not in arms:
        parts.append(f"Nothing can be compared: no run of {reference}, the reference, is finished.")
    elif not said:
        parts.append(f"Nothing can be compared with {reference}: no seed has both it and another arm.")
    else:
        parts.append(_on_average(said, reference, len(results["fractions"])))
        if len(results["tasks"]) > 1:
            elsewhere = [baseline, *(transfer if baseline == reference else [])]  # said of these below
            parts += _task_by_task({name: of for name, of in said.items() if name not in elsewhere})
        parts += _untold(said)
    parts += _transfer(transfer, baseline, [name for name in transfer if arms[name]["shares_nothing"]])
    if said or transfer:
        parts += _unequal_training(results, arms, fraction)
    for name in names:
        lost = [one for one in results["failed"] if one["arm"] == name and one["fraction"] == fraction]
        if lost and name not in arms:
            parts.append(f"{name} failed with every seed.")
        elif lost:
            parts.append(f"{name} failed with {len(lost)} of {len(lost) + len(arms[name]['seeds'])} seeds, which are left out.")
    return " ".join(parts)


AT_LENGTH = 4
"""Arms of one verdict up to which each is named with its interval."""


def _on_average(said: Mapping[str, Any], reference: str, shares: int) -> str:
    by_verdict: dict[str, list[str]] = {}
    for name, of in said.items():
        by_verdict.setdefault(of["mean"]["verdict"], []).append(name)
    parts = []
    for verdict, names in by_verdict.items():
        listed, n = _listed(names, said), min(said[name]["mean"]["n"] for name in names)
        if verdict == OPEN:
            parts.append(f"no difference is shown for {listed}")
        elif verdict == FEW:
            family, needed = said[names[0]]["mean"]["comparisons"], max(said[name]["mean"]["seeds_needed"] for name in names)
            others = f"{family} comparisons" if shares > 1 else f"{family} arm{'s' * (family > 1)} to compare"
            parts.append(
                f"whether {listed} differ{'s' * (len(names) == 1)} cannot be told from {n} seed{'s' * (n > 1)}, since with "
                f"{others} it takes {needed} or more"
            )
        else:
            parts.append(f"{listed} {'does' if len(names) == 1 else 'do'} {verdict}")
    return f"Compared with {reference}, in points of the mean test score: {'; '.join(parts)}."


def _listed(names: Sequence[str], said: Mapping[str, Any]) -> str:
    if len(names) <= AT_LENGTH:
        return ", ".join(f"{name} ({points(said[name]['mean'])})" for name in names)
    order = sorted(names, key=lambda name: said[name]["mean"]["mean"])
    least, most = (f"{name} {signed(said[name]['mean']['mean'])}" for name in (order[0], order[-1]))
    return f"{len(names)} arms (from {least} to {most})"


def _task_by_task(said: Mapping[str, Any]) -> Iterator[str]:
    """The differences of single tasks that are shown."""
    parts = [
        f"{name} is {verdict} on {some}"
        for name, of in said.items()
        for verdict in (BETTER, WORSE)
        if (some := _tasks_with(verdict, of))
    ]
    if parts:
        yield f"Task by task: {_shortened(parts, '; ')}."


def _untold(said: Mapping[str, Any]) -> Iterator[str]:
    """Of arms whose mean is shown to differ, the tasks of which that takes more seeds: the mean may hide one that loses."""
    parts, needed = [], 0
    for name, of in said.items():
        few = {task: d for task, d in of.items() if task != "mean" and d["verdict"] == FEW}
        if len(of) > 2 and few and of["mean"]["verdict"] in (BETTER, WORSE):
            each = ", ".join(f"{task} ({signed(d['mean'])})" for task, d in few.items())
            parts.append(f"{name} on {each}")
            needed = max(needed, *[d["seeds_needed"] for d in few.values()])
    if parts:
        yield f"What single tasks gain or lose cannot be told from so few seeds, it takes {needed}: {_shortened(parts, '; ')}."


def _transfer(transfer: Mapping[str, Any], baseline: str | None, apart: Sequence[str]) -> Iterator[str]:
    """Which tasks are worse, and which better, than when trained alone; of the arms `apart`, which share nothing, without
    calling it transfer.
    """
    verdicts = [of[task]["verdict"] for of in transfer.values() for task in of if task != "mean"]
    if not verdicts or all(verdict == FEW for verdict in verdicts):
        return
    found = {
        (verdict, without): [
            f"{name} on {some}"
            for name, of in transfer.items()
            if (name in apart) == without and (some := _tasks_with(verdict, of))
        ]
        for without in (False, True)
        for verdict in (WORSE, BETTER)
    }
    for verdict, what in ((WORSE, "Negative"), (BETTER, "Positive")):
        if parts := found[verdict, False]:
            yield f"{what} transfer, against {baseline}: {_shortened(parts, '; ')}."
    sharing = {name: of for name, of in transfer.items() if name not in apart}
    few = [name for name, of in sharing.items() if any(of[task]["verdict"] == FEW for task in of if task != "mean")]
    untold = f"of {', '.join(few)} it cannot be told, from so few seeds."
    if sharing and not found[WORSE, False]:
        yield f"Negative transfer, against {baseline}, is not shown" + (f"; {untold}" if few else ".")
    elif few:
        yield untold.capitalize()
    for verdict in (WORSE, BETTER):
        if parts := found[verdict, True]:
            than = f"{verdict.capitalize()} than {baseline} without sharing anything, which is no transfer"
            yield f"{than}: {_shortened(parts, '; ')}."


def _tasks_with(verdict: str, of_arm: Mapping[str, Any]) -> str:
    there = {task: d for task, d in of_arm.items() if task != "mean" and d["verdict"] == verdict}
    return ", ".join(f"{task} ({signed(d['mean'])})" for task, d in there.items())


def _shortened(parts: Sequence[str], comma: str) -> str:
    if len(parts) > 2 * AT_LENGTH:
        parts = [*parts[: 2 * AT_LENGTH], f"and {len(parts) - 2 * AT_LENGTH} more below"]
    return comma.join(parts)


def _unequal_training(results: Mapping[str, Any], arms: Mapping[str, Any], fraction: float) -> Iterator[str]:
    """What differences are also of: labels that some arms see more often, numbers of optimizer steps and of images, where they
    are not the same for all, and trained weights to start from.
    """
    cells = [cell for cell in results["cells"] if cell["fraction"] == fraction]
    joint = {cell["arm"] for cell in cells if len(cell["steps"]) == 1}
    if labels_are_missing(results, fraction) and 0 < len(joint) < len(arms):
        yield (
            "Not every sample has every label, and a run of one task alone, which trains on those with its own, sees them more "
            "often than a joint run does: differences between the two are also of that."
        )
    taken: dict[str, set[int]] = {}
    for cell in cells:
        taken.setdefault(cell["arm"], set()).update(cell["steps"].values())
    if len(set().union(*taken.values())) > 1:
        each = ", ".join(f"{arm} {' to '.join(f'{n:,}' for n in sorted({min(of), max(of)}))}" for arm, of in taken.items())
        yield f"Not all trained for equally many optimizer steps ({each}), and differences are also of that."
    images = results["config"]["batch_size"] * results["config"]["optim"]["accumulate"]
    for arm in results["arms"]:
        unlike = arm.get("unlike", {})
        if other := unlike.get("images"):
            seen = _times_as_many(arm["name"], results["reference"], cells)
            yield (f"{arm['name']} takes {other:,} images in a step instead of {images:,}{seen}; differences are also of that.")
        if draws := unlike.get("draws"):
            yield f"{arm['name']} draws its samples otherwise ({', '.join(draws)}), and differences are also of that."
        if starts := unlike.get("init_from"):
            yield (
                f"{arm['name']} starts {', '.join(starts)} from given weights, whose training is not counted and may have seen "
                "other data, and differences are also of that."
            )
    if warm := list(dict.fromkeys(cell["arm"] for cell in cells if cell["starts"])):
        yield (
            f"{', '.join(warm)} start{'s' * (len(warm) == 1)} from towers already trained on each task alone, and differences "
            "are also of that."
        )


def _times_as_many(arm: str, reference: str, cells: Sequence[Mapping[str, Any]]) -> str:
    """How many images an arm's runs saw in all, over those of the reference's; empty where that trains tasks alone, or where
    it is not known.
    """
    seen: dict[str, set[int]] = {arm: set(), reference: set()}
    for cell in cells:
        if cell["arm"] in seen and len(cell["steps"]) == 1:
            seen[cell["arm"]].update(cell.get("images", {}).values())
    mine, theirs = (max(seen[one], default=0) for one in (arm, reference))
    if not mine or not theirs or arm == reference:
        return ""
    ratio = f"{mine / theirs:.3g}"
    return f", and in all {'as many' if ratio == '1' else f'{ratio} times as many'} as {reference}"


def labels_are_missing(results: Mapping[str, Any], fraction: float) -> bool:
    """Whether some task has no label on some of its dataset's training samples."""
    samples, labelled = results["samples"][f"{fraction:g}"]["train"], results["labelled"][f"{fraction:g}"]
    return any(labelled[task] < samples[about["dataset"]] for task, about in results["tasks"].items())


def points(d: Mapping[str, Any]) -> str:
    """A difference in points, with its 95 % interval from three seeds on, below which it says nothing."""
    if d["low"] is None or d["n"] < 3:
        return signed(d["mean"])
    return f"{signed(d['mean'])}, 95 % interval {signed(d['low'])} to {signed(d['high'])}"


def signed(score: float) -> str:
    """A difference of scores in points, with its sign.

    >>> signed(0.0123), signed(-0.000001)
    ('+1.23', '+0.00')
    """
    return f"{round(100 * score, 2) + 0.0:+.2f}"
