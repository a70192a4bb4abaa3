"""The report of a comparison, as one HTML file that needs nothing else and as Markdown, both from `results.json` alone.

What is in tables and pictures is decided in `mtl.sections`, once for both; how it looks on a page, in `report.html`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from mtl.findings import FEW, kind_of, labels_are_missing
from mtl.scores import FLOOR
from mtl.sections import Section, Table, sections_of
from mtl.stats import seeds_needed
from mtl.writing import write_whole


def write(results: Mapping[str, Any], directory: Path) -> tuple[Path, Path]:
    """Write `report.html`, and `report.md` with its pictures beside it under `figures/`."""
    page, text = directory / "report.html", directory / "report.md"
    sections = list(sections_of(results))
    write_whole(page, html(results, sections))
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.svg"):
        stale.unlink()
    write_whole(text, markdown(results, sections, folder))
    return page, text


def html(results: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """One page with everything in it; names are escaped."""
    source = (files("mtl") / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        title=title(results),
        answers=answers(results),
        facts=facts(results),
        notes=notes(results),
        sections=sections,
        method=method(results),
        config=yaml.safe_dump(results["config"], sort_keys=False),
    )


def markdown(results: Mapping[str, Any], sections: Sequence[Section], folder: Path) -> str:
    """The same as text; pictures are written to `folder`."""
    lines = [f"# {title(results)}", "", *[f"**{plain(one)}**\n" for one in answers(results)], plain(facts(results)), ""]
    lines += [f"{plain(note)}\n" for note in notes(results)]
    number = 0
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if part.heading:
                lines += [f"### {plain(part.heading)}", ""]
            if part.text:
                lines += [plain(part.text), ""]
            if part.table is not None:
                lines += [*table_lines(part.table), ""]
            if part.picture:
                number += 1
                name = f"{number:02}.svg"
                write_whole(folder / name, part.picture)
                caption = plain(part.caption)
                lines += [f"![{caption or section.title}]({folder.name}/{name})", ""]
                lines += [caption, ""] if caption else []
    lines += ["## How it was done", "", *[f"- {plain(line)}" for line in method(results)], ""]
    return "\n".join(lines)


def table_lines(table: Table) -> list[str]:
    """A table in Markdown."""
    rows = [[plain(cell).replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)]
    head = "| " + " | ".join(rows[0]) + " |"
    return [head, "|---|" + "---:|" * (len(rows[0]) - 1), *["| " + " | ".join(row) + " |" for row in rows[1:]]]


def plain(text: str) -> str:
    r"""Text that Markdown shows as it is.

    >>> print(plain("optim.freeze=[towers.a.*, <b>]"))
    optim.freeze=[towers.a.\*, &lt;b>]
    """
    return re.sub(r"([*`$])", r"\\\1", text).replace("<", "&lt;")


def title(results: Mapping[str, Any]) -> str:
    """Of the report."""
    tasks = list(results["tasks"])
    return "Does sharing help? " + (", ".join(tasks) if len(tasks) <= 4 else f"{len(tasks)} tasks")


def answers(results: Mapping[str, Any]) -> list[str]:
    """The answer; one per share of the data where there are several."""
    said = results["findings"]
    if len(said) == 1:
        return [said[0]["answer"]]
    return [
        f"With {100 * one['fraction']:g} % of the training data: {one['answer'][0].lower()}{one['answer'][1:]}" for one in said
    ]


def facts(results: Mapping[str, Any]) -> str:
    """What every figure needs beside it, in a line."""
    seeds = results["seeds"]
    of_each = [results["samples"][f"{fraction:g}"] for fraction in results["fractions"]]
    splits = "; ".join(
        f"{split} {', '.join(f'{alternatives([one[split][name] for one in of_each])} {name}' for name in parts)}"
        for split, parts in of_each[-1].items()
        if parts
    )
    places = "; ".join(
        f"{one['device']}, {counted(one['threads'], 'thread')}, torch {one['torch']}, mtl {one['mtl']}"
        + (f" ({counted(one['runs'], 'run')})" if len(results["machines"]) > 1 else "")
        for one in results["machines"]
    )
    where = "; ".join([*[places] * bool(places), results["config"]["precision"]])
    return (
        f"Seed{'s' * (len(seeds) > 1)} {ranges(seeds)}. Samples{_at(results)}: {splits}. {where}. "
        f"Digest of the config: {results['environment']['config_digest']}."
    )


def _at(results: Mapping[str, Any]) -> str:
    """At which shares of the data; empty where there is one."""
    fractions = results["fractions"]
    return "" if len(fractions) == 1 else f" at {' / '.join(f'{100 * one:g}' for one in fractions)} % of the training data"


def alternatives(numbers: Sequence[int]) -> str:
    """A number for each share of the data, or the one that they all are.

    >>> alternatives([275, 1100]), alternatives([5000, 5000])
    ('275 / 1,100', '5,000')
    """
    return " / ".join(f"{n:,}" for n in (numbers if len(set(numbers)) > 1 else numbers[:1]))


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in words.

    >>> ranges([0, 1, 2, 3, 7, 9])
    '0 to 3, 7, 9'
    """
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)


def counted(n: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "seed"), counted(1200, "seed")
    ('1 seed', '1,200 seeds')
    """
    return f"{n:,} {what}{'s' * (n != 1)}"


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader should not overlook."""
    found = []
    shares = len(results["fractions"])
    compared = [
        (what, d)
        for said in results["findings"]
        for of in said["arms"].values()
        for key in ("difference", "transfer")
        for what, d in of.get(key, {}).items()
    ]
    if few := [d for _, d in compared if d["verdict"] == FEW]:
        of_means, of_tasks = (
            max(d["comparisons"] for what, d in compared if (what == "mean") == mean) for mean in (True, False)
        )
        needed = f"{counted(seeds_needed(of_means), 'seed')} for {counted(of_means, 'difference')} of the mean of tasks"
        if len(results["tasks"]) > 1:
            needed += f", and {seeds_needed(of_tasks)} for {counted(of_tasks, 'difference')} of a single task"
        found.append(
            f"{counted(min(d['n'] for d in few), 'seed')}: for an exact paired test to give a corrected p of 0.05 or less it "
            f"takes, where all arms have as many, {needed}."
        )
    if any(labels_are_missing(results, fraction) for fraction in results["fractions"]):
        of_each = [results["labelled"][f"{fraction:g}"] for fraction in results["fractions"]]
        each = ", ".join(f"{task} {alternatives([labels[task] for labels in of_each])}" for task in results["tasks"])
        found.append(
            f"Training samples with a label{_at(results)}: {each}. Validation data, on which weights are chosen, are labelled "
            "as the dataset has them."
        )
    if results["at_once"] > 1:
        found.append(
            f"Up to {results['at_once']} runs trained at once and shared the machine: their times and step times are not those "
            "of a run alone, and not to be compared."
        )
    if skipped := steps_left_out(results):
        found.append(
            f"Steps whose loss or gradient was not finite were left out: of {'; '.join(skipped)}. Differences are also of that."
        )
    if results["failed"]:
        lost: dict[tuple[str, float], list[int]] = {}
        for one in results["failed"]:
            lost.setdefault((one["arm"], one["fraction"]), []).append(one["seed"])
        each = "; ".join(
            f"{arm}{f' at {100 * fraction:g} %' * (shares > 1)}, seed{'s' * (len(seeds) > 1)} {ranges(seeds)}"
            for (arm, fraction), seeds in lost.items()
        )
        found.append(f"{counted(len(results['failed']), 'cell')} missing, for a run failed ({each}); the report says why.")
    for run, why in results.get("unreadable", {}).items():
        found.append(f"What {run} exchanges is not shown: {why}; move its folder away, and the same again trains it anew.")
    found += [
        f"{', '.join(arms[:-1])} and {arms[-1]} are the very same runs; each is counted among the arms over which p is "
        "corrected, which makes it larger than need be."
        for arms in alike(results)
    ]
    if others := results.get("not_shown"):
        each = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        found.append(
            f"{counted(len(others), 'finished run')} of this directory {'is' if len(others) == 1 else 'are'} not in these "
            f"figures, being of arms, seeds or shares of the data that were not named: {each}. Who leaves some out after "
            "seeing them chooses the result."
        )
    if edited := results.get("edited"):
        found.append(
            f"{', '.join(edited)} {'was' if len(edited) == 1 else 'were'} edited while this comparison came about: runs of "
            "before and after stand side by side. If what they train changed, give another directory."
        )
    for dataset, counts in results.get("set_aside", {}).items():  # which results of an earlier version do not hold
        each = "; ".join(f"{count:,} {why}" for why, count in counts.items())
        found.append(f"Of dataset {dataset} were set aside: {each} (the most in one run); a run's set_aside.csv lists them.")
    scores = [cell["test"][task][about["score"]] for cell in results["cells"] for task, about in results["tasks"].items()]
    if min(scores, default=0.0) < FLOOR:
        found.append("Some scores are below -1: in means of tasks such a score s counts as -2 - 1/s, not to outweigh others.")
    if results["config"]["data"]["validation"] == 0:
        found.append("Without validation data: the last epoch's weights are tested.")
    return found


def method(results: Mapping[str, Any]) -> list[str]:
    """How the figures came about."""
    lines = [f"{arm['name']}: {arm['about']}{_shared_in(results, arm['name'])}." for arm in results["arms"]]
    lines.append(
        f"All arms had the same splits; {steps_taken(results)}. Joint runs had the same training samples, runs of one task "
        "those of them that have its label; joint runs of one seed had the same order of samples and the same initial weights "
        "of each task's tower, unless an arm's own overrides say otherwise. "
        f"Settings are the config's, but for what stands beside an arm's name. {_selection(results)}"
    )
    if warm := list(dict.fromkeys(cell["arm"] for cell in results["cells"] if cell["starts"])):
        lines.append(
            f"{', '.join(warm)}: towers start from the weights of the single-task runs of the same seed, not from those of the "
            "other arms; the training time counts these runs, the number of steps does not."
        )
    more = ", and two of differences to the single-task runs" * (results["baseline"] not in (None, results["reference"]))
    lines += [
        "Intervals are 95 %: Student's t below 20 seeds, BCa bootstrap from 20 on. They say how results vary with the seed, on "
        "this split of this data, and are not corrected for how many there are.",
        "Differences are paired by seed; p is that of a two-sided permutation test of their signs, exact up to 20 seeds, above "
        "from 100,000 random ones. It is corrected (Holm): of the mean of tasks over all arms and shares of the data "
        f"compared, of single tasks over all tasks, arms and shares. These are two families of differences to the "
        f"reference{more}: where nothing differs, each of the families says so wrongly in at most one of twenty comparisons. "
        "That holds for a number of seeds fixed beforehand: whoever adds seeds until a difference is shown finds one more "
        "often. Where an interval and p disagree, p decides: it supposes less.",
        "A point is a hundredth of a score. Where no difference is shown, there may be one as large as the interval says.",
    ]
    if results["baseline"] is not None:
        relative = ", ".join(f"{about['relative']} of {task}" for task, about in results["tasks"].items())
        lines.append(
            "delta_m is the mean over tasks of the relative change, signed so that more is better, against the single-task "
            f"runs of the same seed: of {relative}. Negative transfer: a task's score is worse than that of its single-task "
            "runs. A joint run that exchanges nothing still differs from them: it draws other dropout, and chooses its weights "
            "by the mean of all tasks."
        )
    return lines


def _shared_in(results: Mapping[str, Any], arm: str) -> str:
    """The kind of sharing of an arm whose name does not tell it."""
    cells = [cell for cell in results["cells"] if cell["arm"] == arm]
    if len(results["tasks"]) == 1 or not cells or len(cells[0]["steps"]) > 1 or (kind := kind_of(cells[0])) in arm:
        return ""
    return f"; its sharing is {kind}"


def alike(results: Mapping[str, Any]) -> list[list[str]]:
    """Arms that are the very same runs."""
    runs: dict[str, list[Any]] = {}
    for cell in results["cells"]:
        runs.setdefault(cell["arm"], []).append((cell["fraction"], cell["seed"], cell["runs"]))
    groups: dict[str, list[str]] = {}
    for arm, of in runs.items():
        groups.setdefault(repr(of), []).append(arm)
    return [arms for arms in groups.values() if len(arms) > 1]


def _selection(results: Mapping[str, Any]) -> str:
    """On which data weights were chosen, and how often the test split was read."""
    averaged = any(len(cell["runs"]) > len(results["tasks"]) for cell in results["cells"])
    members = ", and the members of an ensemble once more, for the average of what they predict" * averaged
    if results["config"]["data"]["validation"] != 0:
        return (
            "Weights were chosen on validation data by the mean score of the tasks that a run trains; each run read the test "
            f"split once, at the end{members}."
        )
    cut = any((cell.get("exchange") or {}).get("split") == "test" for cell in results["cells"])
    again = ", and again to see what its score loses where an exchange is cut" * cut
    return f"Weights are those of the last epoch; each run read the test split at the end{members}{again}."


def steps_left_out(results: Mapping[str, Any]) -> list[str]:
    """Of each arm whose runs left steps out: the most of one run."""
    most: dict[str, int] = {}
    for cell in results["cells"]:
        if skipped := max(cell.get("left_out", {}).values(), default=0):
            most[cell["arm"]] = max(most.get(cell["arm"], 0), skipped)
    return [f"{arm} up to {skipped:,} of a run" for arm, skipped in most.items()]


def steps_taken(results: Mapping[str, Any]) -> str:
    """Whether all runs took equally many optimizer steps, and else which arm took how many."""
    taken: dict[str, dict[float, set[int]]] = {}
    for cell in results["cells"]:
        taken.setdefault(cell["arm"], {}).setdefault(cell["fraction"], set()).update(cell["steps"].values())
    together = [set().union(*(of.get(fraction, ()) for of in taken.values())) for fraction in results["fractions"]]
    if all(len(numbers) <= 1 for numbers in together):
        each = ", ".join(f"{n:,}" for numbers in together for n in numbers)
        return f"every run took the same number of optimizer steps ({each})"
    each = "; ".join(f"{arm} {', '.join(f'{n:,}' for n in sorted(set().union(*of.values())))}" for arm, of in taken.items())
    return f"they did not all take the same number of optimizer steps ({each})"
