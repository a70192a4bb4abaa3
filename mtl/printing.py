"""What commands print on standard output: JSON for programs, tables and lines for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def show(value: dict[str, Any], as_json: bool) -> None:
    """Print a mapping: as one JSON object, or as YAML for people."""
    if as_json:
        print(json.dumps(value, indent=2, allow_nan=False))
        return
    import yaml

    print(yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, allow_unicode=True), end="")


def list_names(origins: dict[str, str], what: str, as_json: bool) -> None:
    """Names with where they come from."""
    if as_json:
        show({what: [{"name": name, "origin": origin} for name, origin in origins.items()]}, as_json)
        return
    width = max(map(len, origins), default=0)
    for name, origin in origins.items():
        print(f"{name:{width}}  {origin}")


def print_dataset(about: dict[str, Any]) -> None:
    """What a dataset is, and its options, each with what it is where nothing is given."""
    import textwrap

    print(f"{about['name']} ({about['origin']}): {about['about']}\n\nsplits: {', '.join(about['splits'])}")
    print(f"options, under data.datasets.{about['name']}:" if about["options"] else "takes no options")
    for name, option in about["options"].items():
        print(f"  {name}, required" if "required" in option else f"  {name}: {json.dumps(option['default'])}")
        print(textwrap.fill(option["about"], 100, initial_indent="      ", subsequent_indent="      "))


def print_backbone(about: dict[str, Any], input_shape: str) -> None:
    """A table of the layer points that a backbone has for an input of this shape."""
    from rich.console import Console
    from rich.table import Table

    resized = "" if about["resized_to"] is None else f" resized to {'x'.join(map(str, about['resized_to']))}"
    table = Table(
        title=f"{about['name']}, input {input_shape}{resized}, features {about['features']}, {about['parameters']:,} parameters"
    )
    for heading in ("layer point", "default", "channels", "stride", "shape"):
        table.add_column(heading)
    for point in about["points"]:
        stride = "" if point["stride"] is None else f"{point['stride']:g}"
        shape_text = "x".join(str(extent) for extent in point["shape"])
        table.add_row(point["name"], "yes" if point["default"] else "", str(point["channels"]), stride, shape_text)
    if about["points"]:
        Console().print(table)


def print_csv(rows: list[dict[str, Any]]) -> None:
    """Rows with a header; a key that a row lacks is left empty."""
    import csv

    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def brief(said: dict[str, Any]) -> str:
    """What a head decoded, in a few words: the first value, the others by name, nested ones left out."""
    shown = {key: value for key, value in said.items() if not isinstance(value, dict)}
    texts = [
        (", ".join(map(str, v)) or "none") if isinstance(v, list) else f"{v:.4g}" if isinstance(v, float) else str(v)
        for v in shown.values()
    ]
    unit = shown.pop("unit", None)
    texts = [f"{texts[0]} {unit}", *texts[2:]] if unit else texts
    others = ", ".join(f"{key} {text}" for key, text in zip([*shown][1:], texts[1:], strict=True))
    return f"{texts[0]} ({others})" if others else texts[0] if texts else json.dumps(said)


def readable(planned: dict[str, Any]) -> dict[str, Any]:
    """A plan of a comparison for people: sizes in their units, and no shares of the data where there is one."""
    shares = planned["fractions"]
    arms = {
        name: {
            "about": of["about"],
            "runs": of["runs"],
            "steps of a run": next(iter(of["steps"].values()))
            if len(shares) == 1
            else {f"{100 * share:g} %": of["steps"][f"{share:g}"] for share in shares},
            "parameters": f"{of['parameters']:,}",
            "forward pass of an image": f"{of['flops_forward_per_image'] / 1e6:,.2f} MFLOPs",
        }
        for name, of in planned["arms"].items()
    }
    return {
        "directory": planned["directory"],
        "runs": planned["runs"],
        "finished": planned["finished"],
        "seeds": planned["seeds"],
        **({"shares of the data": [f"{100 * share:g} %" for share in shares]} if len(shares) > 1 else {}),
        "reference": planned["reference"],
        "on disk at most": size(planned["bytes_at_most"]),
        **({"notes": planned["notes"]} if planned["notes"] else {}),
        "arms": arms,
    }


def size(count: int) -> str:
    """A number of bytes in words.

    >>> size(950_000), size(1_319_535_744)
    ('1 MB', '1.3 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def print_comparison(results: dict[str, Any]) -> None:
    """A table of scores and differences for each share of the data, and the answer. A row per arm, or where that is wider than
    the terminal a column, if that is narrower.
    """
    import shutil

    from mtl.report import answers, notes
    from mtl.sections import summary

    wide = shutil.get_terminal_size().columns
    for said in results["findings"]:
        table = summary(results, said)
        lines = aligned([table.head, *table.rows])
        if len(lines[0]) > wide:
            lines = min(lines, aligned(list(zip(table.head, *table.rows, strict=True))), key=lambda some: len(some[0]))
        print("\n".join(line.rstrip() for line in lines), end="\n\n")
    for sentence in [*answers(results), *notes(results)]:
        print(sentence)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of equal length: the first column to the left, the others to the right.

    >>> aligned([["arm", "score"], ["unshared", "0.9"]])
    ['arm       score', 'unshared    0.9']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def print_result(result: dict[str, Any]) -> None:
    """A finished run for people: a table of figures, and where everything is."""
    print_figures({split: result[split] for split in ("val", "test") if result[split] is not None})
    frozen = f" and {result['parameters_frozen']:,} frozen" if result["parameters_frozen"] else ""
    compiling = f" after {result['warm_up_seconds']:.0f} s of compiling" if result["warm_up_seconds"] else ""
    print(
        f"{result['sharing']}, seed {result['seed']}: best epoch {result['best_epoch']} of {result['epochs']}, "
        f"{result['parameters']:,} parameters{frozen}, {result['seconds']:.0f} s{compiling}, "
        f"{result['images_per_second']:,.0f} images/s "
        f"({result['device']}, {result['precision']}, config {result['config_digest']})\n{result['run_dir']}"
    )


def print_figures(splits: dict[str, dict[str, Any]]) -> None:
    """Task by metric, for each split."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("split", "task", "n", "metric", "value"):
        table.add_column(heading, justify="right" if heading in ("n", "value") else "left")
    for split, figures in splits.items():
        for task, of_task in figures.items():
            if task == "score":
                continue
            for metric, value in of_task.items():
                if metric != "n":
                    table.add_row(split, task, f"{of_task['n']:,}", metric, "n/a" if value is None else f"{value:.4f}")
        table.add_row(split, "mean of tasks", "", "score", "n/a" if figures["score"] is None else f"{figures['score']:.4f}")
        table.add_section()
    Console().print(table)
