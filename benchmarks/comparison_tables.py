"""What the recorded comparisons say: for each the answer, a table for each share of the data, and pictures beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.comparisons import EXPERIMENTS, RESULTS, TRIAL_EPOCHS, TRIAL_SEED, Experiment
from mtl import figures
from mtl.figures import Look
from mtl.report import answers, facts, notes, table_lines
from mtl.sections import Table, summary


def recorded() -> Iterator[tuple[str, Experiment, dict[str, Any]]]:
    """Every comparison on record with its results, in the order in which they are listed."""
    for name, experiment in EXPERIMENTS.items():
        record = RESULTS / f"{name}.json"
        if record.exists():
            yield name, experiment, json.loads(record.read_text())


def render() -> str:
    """All of them."""
    return "\n".join(line for one in recorded() for line in described(*one))


def described(name: str, experiment: Experiment, results: dict[str, Any]) -> Iterator[str]:
    """The lines about one comparison."""
    yield from (f"### {experiment.about}", "", f"`python -m benchmarks.comparisons {name}`, which is", "")
    yield from ("```bash", *command(experiment, results["given"]), "```", "")
    if results["tuning"]:
        yield from (*table_lines(tried(results["tuning"])), "")
    for said in results["findings"]:
        yield from (*table_lines(summary(results, said)), "")
    yield from (f"- {sentence}" for sentence in [*answers(results), *notes(results), facts(results)])
    if experiment.cut:
        yield f"- Cut for lack of machine time: {experiment.cut}."
    yield ""
    for picture, what, _ in pictures(results):
        yield from (f"![{what}](results/{name}-{picture}.svg)", "")


def command(experiment: Experiment, arms: Sequence[str]) -> list[str]:
    """The same on the command line, in lines that fit."""
    named = [arm for arm in arms if "=" not in arm]
    words = [f"mtl compare examples/configs/{experiment.config}.yaml", *map(shlex.quote, experiment.overrides)]
    words += [f"--arms {','.join(named)}"] * bool(named) + [f'--arm "{arm}"' for arm in arms if "=" in arm]
    words += [f"--seeds {experiment.seeds}"]
    if experiment.fractions:
        words.append(f"--fractions {','.join(f'{one:g}' for one in experiment.fractions)}")
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 110:
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def tried(tuning: dict[str, dict[str, float]]) -> Table:
    """Validation scores of the trials; the best of each arm is bold."""
    best = {arm: max(scores.values()) for arm, scores in tuning.items()}
    shown = {
        arm: {trial: f"**{score:.4f}**" if score == best[arm] else f"{score:.4f}" for trial, score in scores.items()}
        for arm, scores in tuning.items()
    }
    trials = next(iter(shown.values()))
    rows = [[f"`{trial}`", *[scores[trial] for scores in shown.values()]] for trial in trials]
    return Table([f"validation, {TRIAL_EPOCHS} epochs, seed {TRIAL_SEED}", *shown], rows)


def pictures(results: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of a record: name, what it shows, and the findings that it is drawn from, at each share of the data."""
    title = f"Difference to {results['reference']}, points, paired by seed, with 95 % intervals"
    for said in results["findings"]:
        yield f"difference-{100 * said['fraction']:g}" if len(results["findings"]) > 1 else "difference", title, said


def draw() -> None:
    """Write the pictures of every record."""
    for name, _, results in recorded():
        look = Look([arm["name"] for arm in results["arms"]])
        for picture, title, said in pictures(results):
            svg = figures.differences(said, results["tasks"], "difference", title, look)
            (RESULTS / f"{name}-{picture}.svg").write_text(svg)
