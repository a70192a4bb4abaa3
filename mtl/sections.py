"""What the report of a comparison shows between its answer and how it was done: tables and pictures, in sections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl import figures
from mtl.figures import Look
from mtl.findings import WORSE, mean_score, task_score


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
        picture = figures.against_fraction(results["findings"], tasks, look)
        yield Section("Against the share of the training data", [Part(picture=picture)])
    for said in results["findings"]:
        where = f" with {100 * said['fraction']:g} % of the training data" if several else ""
        yield Section(f"Scores{where}", list(score_parts(results, said, look)))
        if any("transfer" in of for of in said["arms"].values()):
            yield Section(f"Transfer{where}: against each task alone", list(transfer_parts(results, said, look)))
        if learned := learning(results, said["fraction"]):
            yield Section(f"Learning{where}", [Part(picture=figures.learning_curves(learned, tasks, look), caption=CURVES)])
        yield Section(f"Cost{where}", list(cost_parts(results, said, look)))
        if parts := list(exchange_parts(results, said["fraction"])):
            yield Section(f"What is exchanged{where}", parts)


CURVES = "Score on validation data after each epoch: the line is the mean over seeds, the band reaches from lowest to highest."


def plus_minus(value: Mapping[str, Any] | None, digits: int = 4) -> str:
    """A mean with half the width of its interval, or with its ends where they differ."""
    if value is None:
        return "-"
    if value["low"] is None:
        return f"{value['mean']:.{digits}f}"
    below, above = value["mean"] - value["low"], value["high"] - value["mean"]
    if value["method"] == "t":
        return f"{value['mean']:.{digits}f} ± {above:.{digits}f}"
    return f"{value['mean']:.{digits}f} (-{below:.{digits}f} +{above:.{digits}f})"


def in_points(d: Mapping[str, Any] | None) -> str:
    """A difference in points with half the width of its interval."""
    if d is None:
        return ""
    if d["low"] is None:
        return f"{100 * d['mean']:+.2f}"
    return f"{100 * d['mean']:+.2f} ± {50 * (d['high'] - d['low']):.2f}"


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
    yield Part(
        table=Table(head, rows), picture=picture, caption="On test data: mean over seeds, its 95 % interval, and each seed."
    )
    compared = {name: of["difference"] for name, of in said["arms"].items() if of.get("difference")}
    if compared:
        head = [
            "arm",
            "pairs",
            "mean of tasks, points",
            "p",
            *[cell for task in tasks for cell in (f"{task}, points", "p")],
            "mean of tasks is",
        ]
        rows = [
            [
                name,
                str(d["mean"]["n"]),
                in_points(d["mean"]),
                f"{d['mean']['p']:.2g}",
                *[cell for task in tasks for cell in (in_points(d[task]), f"{d[task]['p']:.2g}")],
                d["mean"]["verdict"],
            ]
            for name, d in compared.items()
        ]
        title = f"Difference to {reference}, points, paired by seed, with 95 % intervals"
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
        yield Part(heading="Other metrics", table=Table(head, rows))


def transfer_parts(results: Mapping[str, Any], said: Mapping[str, Any], look: Look) -> Iterator[Part]:
    """Differences to the single-task runs, delta_m, and who loses."""
    tasks = results["tasks"]
    head = ["arm", "delta_m, %", *[f"{task}, points" for task in tasks], "negative transfer"]
    rows = []
    for name, of in said["arms"].items():
        if not of.get("transfer"):
            continue
        losing = [task for task in tasks if of["transfer"][task]["verdict"] == WORSE]
        below = [task for task in tasks if of["transfer"][task]["mean"] < 0 and task not in losing]
        words = ", ".join(losing) or "none shown"
        if below:
            words += f" (below, not shown: {', '.join(below)})"
        delta = plus_minus(of["delta_m"], 2) if of["delta_m"] is not None else "-"
        rows.append([name, delta, *[in_points(of["transfer"][task]) for task in tasks], words])
    title = "Difference to the single-task runs, points, paired by seed, with 95 % intervals"
    yield Part(table=Table(head, rows), picture=figures.differences(said, tasks, "transfer", title, look))


def learning(results: Mapping[str, Any], fraction: float) -> dict[str, dict[str, list[list[float]]]]:
    """Task -> arm -> validation scores after each epoch, a list per seed; empty where there are none."""
    found: dict[str, dict[str, list[list[float]]]] = {task: {} for task in results["tasks"]}
    for cell in results["cells"]:
        if cell["fraction"] == fraction:
            for task, values in cell["curves"].items():
                if values and None not in values:
                    found[task].setdefault(cell["arm"], []).append(values)
    return found if any(found.values()) else {}


COSTS = (
    ("parameters", "parameters", lambda x: f"{x:,.0f}"),
    ("flops_per_image", "forward, MFLOPs per image", lambda x: f"{x / 1e6:,.1f}"),
    ("seconds_per_step", "step, ms", lambda x: f"{1000 * x:,.1f}"),
    ("peak_memory_bytes", "peak memory, MiB", lambda x: f"{x / 2**20:,.0f}"),
    ("training_seconds", "training, s", lambda x: f"{x:,.0f}"),
)


def cost_parts(results: Mapping[str, Any], said: Mapping[str, Any], look: Look) -> Iterator[Part]:
    """What each arm takes."""
    head = ["arm", *[label for _, label, _ in COSTS]]
    rows = [
        [name, *["-" if of["cost"][cost] is None else show(of["cost"][cost]) for cost, _, show in COSTS]]
        for name, of in said["arms"].items()
    ]
    text = (
        "Of all networks of an arm together; a step updates every task once. Training counts optimizer steps, and the runs "
        "from whose weights an arm starts; the peak of memory is that of its largest run, libraries included."
    )
    yield Part(text=text, table=Table(head, rows), picture=figures.against_cost(said, look))


def cells_of(results: Mapping[str, Any], arm: str, fraction: float) -> list[Mapping[str, Any]]:
    """Of one arm at one share of the data."""
    return [cell for cell in results["cells"] if cell["arm"] == arm and cell["fraction"] == fraction]


def exchange_parts(results: Mapping[str, Any], fraction: float) -> Iterator[Part]:
    """Per arm that exchanges: what is mixed in the end, how that came about, and what it is worth."""
    tasks = list(results["tasks"])
    for arm in results["arms"]:
        exchanging = [cell["exchange"] for cell in cells_of(results, arm["name"], fraction) if cell["exchange"]]
        if not exchanging:
            continue
        name, n = arm["name"], len(exchanging)
        last = {
            point: mean_matrix([one["coupling"][point]["coupling"][-1] for one in exchanging])
            for point in exchanging[0]["coupling"]
        }
        yield Part(
            heading=f"{name}: the units after training",
            picture=figures.matrices(
                last, tasks, f"{name}: what each task receives from each other", ".3f", 0.1, identity=True
            ),
            caption=f"Weight of one task's features (column) in another's (row) after the last epoch, mean over channels and "
            f"{n} seeds; white is the identity.",
        )
        seeds = [one["coupling"] for one in exchanging]
        if len(next(iter(seeds[0].values()))["epochs"]) > 2:
            yield Part(
                heading=f"{name}: over training",
                picture=figures.trajectories(seeds, tasks, f"{name}: what tasks receive from others over training"),
                caption="Weights between different tasks, mean over channels: thick lines for the mean over seeds.",
            )
        curves = {point: mean_matrix([one["channels"][point] for one in exchanging]) for point in exchanging[0]["channels"]}
        if curves:
            yield Part(
                heading=f"{name}: channel by channel",
                picture=figures.channels(curves, tasks, f"{name}: weights of single channels in order of size"),
                caption="Weights between different tasks for each channel, in order of size, mean over seeds: flat lines mean "
                "that all channels exchange alike.",
            )
        falls = {point: mean_matrix([one["falls"][point] for one in exchanging], 100.0) for point in exchanging[0]["falls"]}
        yield Part(
            heading=f"{name}: what the exchange is worth",
            text="By how many points a task's score on validation data falls when another task's contribution at one layer "
            "point is cut in the trained network. It is what this network relies on; one trained without learns to do without.",
            picture=figures.matrices(falls, tasks, f"{name}: fall of scores where a contribution is cut", ".2f", 1.0),
            caption=f"Rows lose the contribution of columns; points, mean over {n} seeds.",
        )


def mean_matrix(matrices: Sequence[Any], factor: float = 1.0) -> Any:
    """The mean over seeds, entry by entry, nested as they are; None stays None."""
    first = matrices[0]
    if isinstance(first, list):
        return [mean_matrix([one[i] for one in matrices], factor) for i in range(len(first))]
    return None if first is None else factor * sum(matrices) / len(matrices)
