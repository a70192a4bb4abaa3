"""What the recorded comparisons say: for each the answer, a table for each share of the data, and pictures beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks.comparisons import EXPERIMENTS, RESULTS, TRIAL_EPOCHS, TRIAL_SEED, Experiment, Tuning, best
from mtl import figures
from mtl.comparison import reference_of
from mtl.figures import Look
from mtl.findings import BETTER, WORSE, tell
from mtl.report import answers, facts, notes, plain, table_lines
from mtl.sections import Table, differences_title, summary


def recorded() -> Iterator[tuple[str, Experiment, dict[str, Any]]]:
    """Every comparison on record with its results, in the order in which they are listed."""
    for name, experiment in EXPERIMENTS.items():
        record = RESULTS / f"{name}.json"
        if record.exists():
            results = json.loads(record.read_text())
            yield name, experiment, {**results, "findings": tell(results)}  # what is said of the cells, as it is said now


def render() -> str:
    """All of them, and which are not trained yet."""
    lines = [line for one in recorded() for line in described(*one)]
    there = [name for name, _, _ in recorded()]
    if missing := [f"`{name}` ({one.about[:-1]})" for name, one in EXPERIMENTS.items() if name not in there]:
        lines += [f"Not on record yet, for lack of machine time: {'; '.join(missing)}.", ""]
    return "\n".join(lines)


def described(name: str, experiment: Experiment, results: dict[str, Any]) -> Iterator[str]:
    """The lines about one comparison."""
    trials = "tries some settings with every arm, takes each arm's best on validation data, and then " * bool(results["tuning"])
    yield from (f"### {experiment.about}", "", f"`python -m benchmarks.comparisons {name}`, which {trials}is", "")
    yield from ("```bash", *command(experiment, results), "```", "")
    if results["tuning"]:
        yield from (*table_lines(tried(results["tuning"])), "")
    for said in results["findings"]:
        yield from (*table_lines(summary(results, said)), "")
    yield from (f"- {plain(sentence)}" for sentence in [*answers(results), *notes(results), facts(results)])
    if experiment.note:
        yield f"- {experiment.note}"
    seeds = len(results["seeds"])
    cut = [
        *[f"{seeds} of {experiment.seeds} seeds so far"] * (seeds < experiment.seeds),
        *[experiment.cut] * bool(experiment.cut),
        *["times of a step and of training, since runs shared the machine"] * (results["at_once"] > 1),
    ]
    if cut:
        yield f"- Cut for lack of machine time: {'; '.join(cut)}."
    yield ""
    for picture, what, _ in pictures(results):
        yield from (f"![{what}](results/{name}-{picture}.svg)", "")


def command(experiment: Experiment, results: Mapping[str, Any]) -> list[str]:
    """The same on the command line, in lines that fit."""
    arms, reference = results["given"], results["reference"]
    named = [arm for arm in arms if "=" not in arm]
    words = [f"mtl compare examples/configs/{experiment.config}.yaml", *map(shlex.quote, experiment.overrides)]
    words += [f"--arms {','.join(named) or repr('')}", *[f'--arm "{arm}"' for arm in arms if "=" in arm]]
    words += [f"--seeds {experiment.seeds}"]
    if experiment.fractions:
        words.append(f"--fractions {','.join(f'{one:g}' for one in experiment.fractions)}")
    if reference != reference_of(None, [arm["name"] for arm in results["arms"]]):
        words.append(f"--reference {reference}")
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 110:
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def tried(tuning: Tuning) -> Table:
    """Validation scores of the trials; the best of each arm is marked."""
    chosen = {arm: best(arm, scores) for arm, scores in tuning.items()}
    shown = {
        arm: {
            trial: "failed" if score is None else f"{score:.4f}{' (best)' * (trial == chosen[arm])}"
            for trial, score in scores.items()
        }
        for arm, scores in tuning.items()
    }
    trials = next(iter(shown.values()))
    rows = [[trial, *[scores[trial] for scores in shown.values()]] for trial in trials]
    return Table([f"validation, {TRIAL_EPOCHS} epochs, seed {TRIAL_SEED}", *shown], rows)


def pictures(results: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of a record: name, what it shows, and the findings that it is drawn from, at each share of the data."""
    for said in results["findings"]:
        compared = [of["difference"] for of in said["arms"].values() if of.get("difference")]
        title = differences_title(results["reference"], compared)
        yield f"difference-{100 * said['fraction']:g}" if len(results["findings"]) > 1 else "difference", title, said


ARMS = {
    "single_task": "each task alone",
    "hard_shared": "one backbone for all",
    "cross_stitch": "cross-stitch, from the identity",
    "cross_stitch_0.9": "cross-stitch, from 0.9 (0.91 of four)",
}
"""Of the overview, as it calls them."""


def overview() -> str:
    """All comparisons in one picture: differences of the mean test score to towers without exchange. A full marker is a
    difference that is shown, a hollow one is not.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    for _, experiment, results in recorded():
        for said in results["findings"]:
            share = f"{100 * said['fraction']:g} % of " if len(results["findings"]) > 1 else ""
            label = f"{share}{experiment.short} (n = {len(results['seeds'])})"
            found = {
                _plain(arm, results["reference"]): of["difference"] for arm, of in said["arms"].items() if "difference" in of
            }
            rows.append((label, {arm: of["mean"] for arm, of in found.items()}))
    look = Look(list(ARMS))
    title = (
        "Points of the mean test score above towers without exchange, paired by seed, 95 % intervals; "
        "hollow: the corrected test shows nothing"
    )

    def fill(figure: Figure) -> None:
        axis = figure.subplots()
        axis.axvline(0, color="black", linewidth=0.8)
        for row, (_, arms) in enumerate(rows):
            for i, arm in enumerate(ARMS):
                if arm not in arms:
                    continue
                value, colour = arms[arm], look.colour(arm)
                height = row + 0.19 * (i - (len(ARMS) - 1) / 2)
                if value["low"] is not None:
                    axis.plot([100 * value["low"], 100 * value["high"]], [height, height], color=colour, linewidth=1.8)
                inside = colour if value["verdict"] in (BETTER, WORSE) else "white"
                axis.plot(100 * value["mean"], height, look.marker(arm), color=colour, markerfacecolor=inside, markersize=5.5)
        for arm, said in ARMS.items():
            axis.plot([], [], look.marker(arm), color=look.colour(arm), markersize=5.5, label=said)
        axis.set_yticks(range(len(rows)), [label for label, _ in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        for row in range(1, len(rows)):
            axis.axhline(row - 0.5, color="#e5e5e5", linewidth=0.8, zorder=0)
        axis.grid(axis="x", color="#e5e5e5")
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
        figure.supxlabel(title, fontsize=9)
        figure.legend(loc="outside upper center", ncols=len(ARMS))

    return figures.drawn(0.9 + 0.62 * len(rows), title, fill)


def _plain(arm: str, reference: str) -> str:
    """An arm as the overview calls it."""
    name = arm.removesuffix("_tuned") if reference.endswith("_tuned") else arm
    return "cross_stitch_0.9" if name == "cross_stitch_0.91" else name


def draw() -> None:
    """Write the pictures of every record, and the one of all."""
    (RESULTS / "sharing.svg").write_text(overview())
    for name, _, results in recorded():
        look = Look([arm["name"] for arm in results["arms"]])
        for picture, title, said in pictures(results):
            svg = figures.differences(said, results["tasks"], "difference", title, look)
            (RESULTS / f"{name}-{picture}.svg").write_text(svg)
