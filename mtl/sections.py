"""What the report of a comparison shows between its answer and how it was done: tables and pictures, in sections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl import exchange_figures, figures
from mtl.figures import Look
from mtl.findings import FEW, WORSE, mean_score, signed, task_score


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Part:
    """What there is of: a heading, a text, a table, a picture (SVG) with a caption."""

    heading: str = ""
    text: str = ""
    table: Table | None = None
    picture: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """Parts under a title."""

    title: str
    parts: Sequence[Part]


def sections_of(results: Mapping[str, Any]) -> Iterator[Section]:
    """Everything between the answer and how it was done."""
    tasks, look = results["tasks"], Look([arm["name"] for arm in results["arms"]])
    several = len(results["fractions"]) > 1
    if several:
        head = ["share", *[f"samples of {name}" for name in next(iter(results["samples"].values()))["train"]]]
        head += [f"labels of {task}" for task in tasks]
        rows = [
            [f"{100 * fraction:g} %", *map(str, results["samples"][key]["train"].values()), *map(str, labels.values())]
            for fraction, (key, labels) in zip(results["fractions"], results["labelled"].items(), strict=True)
        ]
        parts = [Part(heading="What is trained on", table=Table(head, rows))]
        if any(said["arms"] for said in results["findings"]):
            parts.insert(0, Part(picture=figures.against_fraction(results["findings"], tasks, look)))
        yield Section("Against the share of the training data", parts)
    for said in results["findings"]:
        if not said["arms"]:  # every run failed
            continue
        where = f" with {100 * said['fraction']:g} % of the training data" if several else ""
        yield Section(f"Scores{where}", list(score_parts(results, said, look)))
        if any("transfer" in of for of in said["arms"].values()):
            yield Section(f"Transfer{where}: against each task alone", list(transfer_parts(results, said, look)))
        if learned := learning(results, said["fraction"]):
            caption = curves_caption(learned, list(said["arms"]))
            yield Section(f"Learning{where}", [Part(picture=figures.learning_curves(learned, tasks, look), caption=caption)])
        yield Section(f"Cost{where}", list(cost_parts(results, said, look)))
        if parts := list(exchange_parts(results, said["fraction"])):
            yield Section(f"What is exchanged{where}", parts)
    if results["failed"]:
        yield Section("Runs that failed", [Part(table=failures(results))])


def failures(results: Mapping[str, Any]) -> Table:
    """Why cells are missing."""
    several = len(results["fractions"]) > 1
    rows = [
        [one["arm"], *[f"{100 * one['fraction']:g} %"] * several, str(one["seed"]), one["why"]] for one in results["failed"]
    ]
    return Table(["arm", *["share"] * several, "seed", "why"], rows)


CURVES = "Score on validation data after each epoch, mean over seeds"


def transposed_if_wide(table: Table) -> Table:
    """Rows for columns where there are more columns than a page holds, and than rows."""
    if len(table.head) <= WIDEST or len(table.head) <= len(table.rows) + 1:
        return table
    columns = list(zip(table.head, *table.rows, strict=True))
    return Table(columns[0], columns[1:])


WIDEST = 7
"""Columns that fit on a page."""


def plus_minus(value: Mapping[str, Any] | None, digits: int = 4, sign: str = "") -> str:
    """A mean with half the width of its interval, or with its ends where they differ; `sign` "+" for a difference."""
    if value is None:
        return "-"
    mean = f"{value['mean']:{sign}.{digits}f}"
    if value["low"] is None:
        return mean
    below, above = value["mean"] - value["low"], value["high"] - value["mean"]
    if value["method"] == "t":
        return f"{mean} ± {above:.{digits}f}"
    return f"{mean} (-{below:.{digits}f} +{above:.{digits}f})"


def in_points(d: Mapping[str, Any] | None) -> str:
    """A difference in points with half the width of its interval."""
    if d is None:
        return ""
    if d["low"] is None:
        return signed(d["mean"])
    below, above = 100 * (d["mean"] - d["low"]), 100 * (d["high"] - d["mean"])
    return f"{signed(d['mean'])} " + (f"± {above:.2f}" if d["method"] == "t" else f"(-{below:.2f} +{above:.2f})")


def p_value(d: Mapping[str, Any] | None) -> str:
    """A p-value; of one pair there is none."""
    return "" if d is None or d["n"] < 2 else f"{d['p']:.2g}"


def summary(results: Mapping[str, Any], said: Mapping[str, Any]) -> Table:
    """The scores at one share of the data in a table: with the difference to the reference, and to the single-task runs."""
    tasks, baseline = results["tasks"], results["baseline"]
    share = f", {100 * said['fraction']:g} % of the training data" if len(results["findings"]) > 1 else ""
    scores = {about["score"] for about in tasks.values()}
    named = list(tasks) if len(scores) == 1 else [f"{task}: {about['score']}" for task, about in tasks.items()]
    what = f"test {scores.pop()}" if len(scores) == 1 else "test score"
    head = [what + share, "seeds", "mean of tasks", *named, f"points over {results['reference']}", "p (Holm)"]
    rows = []
    for name, of in said["arms"].items():
        d = of.get("difference", {}).get("mean")
        each = [plus_minus(of["tasks"][task][about["score"]]) for task, about in tasks.items()]
        row = [name, str(len(of["seeds"])), plus_minus(of["mean"]), *each, in_points(d), p_value(d)]
        if baseline is not None:
            row.append(plus_minus(of["delta_m"], 2, "+") if of.get("delta_m") else "")
        rows.append([*row, f"{of['cost']['parameters']:,.0f}", f"{of['cost']['flops_per_image'] / 1e6:,.2f}"])
    return Table([*head, *["delta_m, %"] * (baseline is not None), "parameters", "MFLOPs"], rows)


def score_parts(results: Mapping[str, Any], said: Mapping[str, Any], look: Look) -> Iterator[Part]:
    """The scores, and differences to the reference."""
    tasks, reference = results["tasks"], results["reference"]
    head = ["arm", "seeds", "mean of tasks", *[f"{task}: {about['score']}" for task, about in tasks.items()]]
    rows = [
        [
            name,
            str(len(of["seeds"])),
            plus_minus(of["mean"]),
            *[plus_minus(of["tasks"][task][about["score"]]) for task, about in tasks.items()],
        ]
        for name, of in said["arms"].items()
    ]
    values = {
        name: {
            **{task: [task_score(cell, task, tasks) for cell in cells_of(results, name, said["fraction"])] for task in tasks},
            "mean": [mean_score(cell, tasks) for cell in cells_of(results, name, said["fraction"])],
        }
        for name in said["arms"]
    }
    picture = figures.scores(said, tasks, values, look)
    several = any(of["mean"]["low"] is not None for of in said["arms"].values())
    yield Part(
        table=transposed_if_wide(Table(head, rows)),
        picture=picture,
        caption="On test data: mean over seeds, its 95 % interval, and each seed." if several else "On test data, of one seed.",
    )
    compared = {name: of["difference"] for name, of in said["arms"].items() if of.get("difference")}
    if compared:
        head = ["arm", "pairs", "score", "points", "p (Holm)", "verdict"]
        rows = [
            [name * (what == "mean"), str(d[what]["n"]), label, in_points(d[what]), p_value(d[what]), d[what]["verdict"]]
            for name, d in compared.items()
            for what, label in (("mean", "mean of tasks"), *((task, task) for task in tasks))
        ]
        title = differences_title(reference, compared.values())
        yield Part(
            heading=f"Difference to {reference}",
            table=Table(head, rows),
            picture=figures.differences(said, tasks, "difference", title, look),
        )
    others = [
        (task, metric, better)
        for task, about in tasks.items()
        for metric, better in about["metrics"].items()
        if metric != about["score"]
    ]
    if others:
        head = ["arm", *[f"{task}: {metric}{' (lower is better)' * (better == 'lower')}" for task, metric, better in others]]
        rows = [
            [name, *[plus_minus(of["tasks"][task][metric]) for task, metric, _ in others]] for name, of in said["arms"].items()
        ]
        yield Part(heading="Other metrics", table=transposed_if_wide(Table(head, rows)))


def transfer_parts(results: Mapping[str, Any], said: Mapping[str, Any], look: Look) -> Iterator[Part]:
    """Differences to the single-task runs, delta_m, and who loses."""
    tasks = results["tasks"]
    head = ["arm", "negative transfer", "delta_m, %", *[f"{task}, points" for task in tasks]]
    rows = []
    for name, of in said["arms"].items():
        if not of.get("transfer"):
            continue
        losing = [task for task in tasks if of["transfer"][task]["verdict"] == WORSE]
        few = all(of["transfer"][task]["verdict"] == FEW for task in tasks)
        words = ", ".join(losing) or ("too few seeds" if few else "not shown")
        if of["shares_nothing"]:
            words = "nothing is shared" + f"; worse on {words}" * bool(losing)
        delta = plus_minus(of["delta_m"], 2, "+") if of["delta_m"] is not None else "-"
        rows.append([name, words, delta, *[in_points(of["transfer"][task]) for task in tasks]])
    compared = [of["transfer"] for of in said["arms"].values() if of.get("transfer")]
    title = differences_title("the single-task runs", compared)
    yield Part(table=Table(head, rows), picture=figures.differences(said, tasks, "transfer", title, look))


def differences_title(other: str, compared: Iterable[Mapping[str, Any]]) -> str:
    """What a picture of paired differences shows: intervals only where seeds are enough for one."""
    intervals = any(d["low"] is not None for differences in compared for d in differences.values())
    return f"Difference to {other}, points, paired by seed{', with 95 % intervals' * intervals}"


def curves_caption(curves: Mapping[str, Mapping[str, Any]], arms: Sequence[str]) -> str:
    """What the lines are, the bands where there are any, and which of the arms have no lines."""
    seeds = max(len(of_arm) for of_task in curves.values() for of_arm in of_task.values())
    banded = seeds > 1 and figures.has_bands(max(map(len, curves.values())))
    without = [arm for arm in arms if not any(arm in of_task for of_task in curves.values())]
    missing = f" There are none of {', '.join(without)}." if without else ""
    return f"{CURVES}{'; the bands reach from the lowest to the highest seed' * banded}.{missing}"


def learning(results: Mapping[str, Any], fraction: float) -> dict[str, dict[str, list[list[float]]]]:
    """Task -> arm -> validation scores after each epoch, a list per seed; empty where there are none, or of one epoch only."""
    found: dict[str, dict[str, list[list[float]]]] = {task: {} for task in results["tasks"]}
    for cell in results["cells"]:
        if cell["fraction"] == fraction:
            for task, values in cell["curves"].items():
                if len(values) > 1 and None not in values:
                    found[task].setdefault(cell["arm"], []).append(values)
    return found if any(found.values()) else {}


COSTS = (
    ("parameters", "parameters", lambda x: f"{x:,.0f}"),
    ("flops_per_image", "forward, MFLOPs per image", lambda x: f"{x / 1e6:,.2f}"),
    ("seconds_per_step", "step, ms", lambda x: f"{1000 * x:,.1f}"),
    ("peak_memory_bytes", "peak memory, MiB", lambda x: f"{x / 2**20:,.0f}"),
    ("training_seconds", "training, s", lambda x: f"{x:,.1f}" if x < 100 else f"{x:,.0f}"),
)


def cost_parts(results: Mapping[str, Any], said: Mapping[str, Any], look: Look) -> Iterator[Part]:
    """What each arm takes."""
    head = ["arm", *[label for _, label, _ in COSTS]]
    rows = [
        [name, *["-" if of["cost"][cost] is None else show(of["cost"][cost]) for cost, _, show in COSTS]]
        for name, of in said["arms"].items()
    ]
    text = (
        "Of all networks of an arm together; a step updates every task once, and its time is the median over seeds. FLOPs are "
        "those of convolutions and matrix products: the exchange of cross-stitch units, element by element, is not among them. "
        "Training counts optimizer steps, and the runs from whose weights an arm starts. The peak of memory is that of its "
        "largest run, libraries included and what earlier runs in the same process left behind."
    )
    slow = [name for name, of in said["arms"].items() if uneven(of["cost"]["spread"])]
    if slow:
        text += (
            f" The step of {', '.join(slow)} took more than 1.3 times as long with one seed as with another: the machine had "
            "other work, and times are not to be compared."
        )
    yield Part(text=text, table=Table(head, rows), picture=figures.against_cost(said, look))


def uneven(spread: Sequence[float]) -> bool:
    """Whether the least and the most of some times are so far apart that something else was going on."""
    return spread[1] > 1.3 * spread[0]


def cells_of(results: Mapping[str, Any], arm: str, fraction: float) -> list[Mapping[str, Any]]:
    """Of one arm at one share of the data."""
    return [cell for cell in results["cells"] if cell["arm"] == arm and cell["fraction"] == fraction]


def exchange_parts(results: Mapping[str, Any], fraction: float) -> Iterator[Part]:
    """Per arm that exchanges: what is mixed in the end, how that came about, and what it is worth."""
    tasks = list(results["tasks"])
    if len(tasks) == 1:  # nobody to exchange with
        return
    for arm in results["arms"]:
        exchanging = [cell["exchange"] for cell in cells_of(results, arm["name"], fraction) if cell["exchange"]]
        if not exchanging:
            continue
        name, n = arm["name"], len(exchanging)
        curves = {point: mean_matrix([one["channels"][point] for one in exchanging]) for point in exchanging[0]["channels"]}
        if curves and not any(weight for values in curves.values() for weight in between_tasks(values)):
            yield Part(heading=name, text="Nothing is exchanged: all weights between different tasks are zero.")
            continue
        seeds = [one["coupling"] for one in exchanging if one["coupling"]]
        last = {point: mean_matrix([one[point]["coupling"][-1] for one in seeds]) for point in (seeds or [{}])[0]}
        if last:
            yield Part(
                heading=f"{name}: the units after training",
                picture=exchange_figures.matrices(
                    last, tasks, f"{name}: what each task receives from each other", ".3f", 0.1, identity=True
                ),
                caption="Weight of one task's features (column) in another's (row) after the last epoch, mean over channels"
                f"{over(n)}; the paler, the nearer to the identity.",
            )
        if last and len(next(iter(seeds[0].values()))["epochs"]) > 2:
            yield Part(
                heading=f"{name}: over training",
                picture=exchange_figures.trajectories(seeds, tasks, f"{name}: what tasks receive from others over training"),
                caption="Weights between different tasks, mean over channels: thin lines are seeds, thick ones their mean.",
            )
        if curves:
            yield Part(
                heading=f"{name}: channel by channel",
                picture=exchange_figures.channels(curves, tasks, f"{name}: weights of single channels in order of size"),
                caption="Weights between different tasks for each channel of the tested weights, put in order of size for each "
                f"seed{', then averaged' if n > 1 else ''}. Chance alone makes such a curve rise a little; what counts is how "
                "far its ends are apart.",
            )
        falls = {point: mean_matrix([one["falls"][point] for one in exchanging], 100.0) for point in exchanging[0]["falls"]}
        yield Part(
            heading=f"{name}: what the exchange is worth",
            text="In the trained network (the tested weights) what one task receives from another at one layer point is cut: "
            f"by so many points the receiving task's score on {SPLITS[exchanging[0]['split']]} data falls; where it rises, the "
            "number is negative. "
            "This is what the network has come to rely on, and not what it would lose if it were trained without.",
            picture=exchange_figures.matrices(falls, tasks, f"{name}: fall of scores where a contribution is cut", ".2f", 1.0),
            caption=f"Points that the row's task loses without the column's features{over(n)}.",
        )


def between_tasks(values: Sequence[Sequence[Sequence[float]]]) -> Iterator[float]:
    """Of (T, T, Q) weights those between different tasks."""
    return (weight for t, row in enumerate(values) for s, of in enumerate(row) if s != t for weight in of)


SPLITS = {"val": "validation", "test": "test"}
"""Of the ablation, as the report calls them."""


def over(seeds: int) -> str:
    """Where a figure is an average."""
    return f", mean over {seeds} seeds" if seeds > 1 else ""


def mean_matrix(matrices: Sequence[Any], factor: float = 1.0) -> Any:
    """The mean over seeds, entry by entry, nested as they are; None stays None."""
    first = matrices[0]
    if isinstance(first, list):
        return [mean_matrix([one[i] for one in matrices], factor) for i in range(len(first))]
    return None if first is None else factor * sum(matrices) / len(matrices)
