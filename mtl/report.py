"""The report of a comparison, as one HTML file that needs nothing else and as Markdown, both from `results.json` alone.

What is in tables and pictures is decided in `mtl.sections`, once for both; how it looks on a page, in `report.html`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from mtl.sections import Section, Table, sections_of
from mtl.stats import seeds_needed


def write(results: Mapping[str, Any], directory: Path) -> tuple[Path, Path]:
    """Write `report.html`, and `report.md` with its pictures beside it under `figures/`."""
    page, text = directory / "report.html", directory / "report.md"
    sections = list(sections_of(results))
    page.write_text(html(results, sections), encoding="utf-8")
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.svg"):
        stale.unlink()
    text.write_text(markdown(results, sections, folder), encoding="utf-8")
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
    lines = [f"# {title(results)}", "", *[f"**{one}**\n" for one in answers(results)], facts(results), ""]
    lines += [f"{note}\n" for note in notes(results)]
    number = 0
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if part.heading:
                lines += [f"### {part.heading}", ""]
            if part.text:
                lines += [part.text, ""]
            if part.table is not None:
                lines += [*table_lines(part.table), ""]
            if part.picture:
                number += 1
                name = f"{number:02}.svg"
                (folder / name).write_text(part.picture, encoding="utf-8")
                lines += [f"![{part.caption or section.title}]({folder.name}/{name})", ""]
                lines += [part.caption, ""] if part.caption else []
    lines += ["## How it was done", "", *[f"- {line}" for line in method(results)], ""]
    return "\n".join(lines)


def table_lines(table: Table) -> list[str]:
    """A table in Markdown."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (table.head, *table.rows)]
    head = "| " + " | ".join(rows[0]) + " |"
    return [head, "|---|" + "---:|" * (len(rows[0]) - 1), *["| " + " | ".join(row) + " |" for row in rows[1:]]]


def title(results: Mapping[str, Any]) -> str:
    """Of the report."""
    return "Does sharing help? " + ", ".join(results["tasks"])


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
    environment, config = results["environment"], results["config"]
    sizes = results["samples"][f"{results['fractions'][-1]:g}"]
    splits = "; ".join(
        f"{split} {', '.join(f'{n:,} {name}' for name, n in parts.items())}" for split, parts in sizes.items() if parts
    )
    versions = environment["versions"]
    return (
        f"Seeds {', '.join(map(str, results['seeds']))}. Samples: {splits}. {environment['device_name']}, "
        f"{environment['threads']} threads, {config['precision']}; torch {versions['torch']}, mtl {versions['crosstitch']}; "
        f"config {environment['config_digest']}."
    )


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader should not overlook."""
    found = []
    n, tasks = len(results["seeds"]), len(results["tasks"])
    if n < seeds_needed(tasks):
        found.append(
            f"{n} seed{'s' * (n > 1)}: too few for any claim. An exact paired test cannot give a corrected p of 0.05 or less "
            f"with fewer than {seeds_needed(tasks)} seeds and {tasks} task{'s' * (tasks > 1)}."
        )
    if results["jobs"] > 1:
        found.append(
            f"{results['jobs']} runs trained at once and shared the cores, each with fewer threads than stand above: their "
            "times and step times are not those of a run alone, and not to be compared."
        )
    if results["failed"]:
        each = "; ".join(f"{one['arm']}, seed {one['seed']}: {one['why']}" for one in results["failed"][:5])
        found.append(f"{len(results['failed'])} cells are missing, for a run of theirs failed: {each}.")
    if results["config"]["data"]["validation"] == 0:
        found.append("Without validation data: the last epoch's weights are tested.")
    return found


def method(results: Mapping[str, Any]) -> list[str]:
    """How the figures came about."""
    baseline = results["baseline"]
    lines = [
        "All arms had the same splits, the same order of samples, the same number of optimizer steps and the same settings; "
        "those of one seed also the same initial weights of each task's tower. Weights were chosen on validation data by the "
        "mean score of the tasks that a run trains; the test split was read once, at the end.",
        "Intervals are 95 %: Student's t below 20 seeds, BCa bootstrap from 20 on. They say how results vary with the seed, on "
        "this split of this data.",
        "Differences are paired by seed; p is that of an exact two-sided permutation test of their signs, corrected over tasks "
        "(Holm). With several arms, one in twenty comparisons without any difference still falls below 0.05.",
        "A point is a hundredth of a score. Where no difference is shown, there may be one as large as the interval says.",
    ]
    lines[:0] = [f"{arm['name']}: {arm['about']}." for arm in results["arms"]]
    if baseline is not None:
        lines.append(
            "delta_m is the mean over tasks of the relative change of the score against the single-task runs of the same seed. "
            "Negative transfer: a task is worse than its single-task runs."
        )
    return lines
