"""The commands that list what is registered, or show one of it: `mtl tasks`, `datasets`, `backbones`."""

from __future__ import annotations

from inspect import getdoc
from typing import Annotated, Any

import typer

from mtl.command import AsJson, Plugins, json_only, load_plugins
from mtl.printing import list_names, print_backbone, print_dataset, show

app = typer.Typer()


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A task, to load it and show what it predicts.")] = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """List registered tasks (imports none of them), or show one."""
    with json_only(as_json):
        load_plugins(plugin)
    from mtl.registry import TASKS

    if name is None:
        list_names(TASKS.origins(), "tasks", as_json)
        return
    from mtl.choices import options_of
    from mtl.task import make_task

    with json_only(as_json):
        found = TASKS.get(name)
        options = options_of(found)
        complete = not any("required" in option for option in options.values())
        task = make_task(name) if complete else None
    if task is None:
        origin = TASKS.origins()[name]
        show({"name": name, "about": getdoc(found.factory) or "", "options": options, "origin": origin}, as_json)
        return
    metrics = {m.name: {"better": m.better, "score": m.score} for m in task.all_metrics}
    about = {"name": name, "dataset": task.dataset, "target": task.target, "weight": task.weight, **task.head.describe()}
    show({**about, "metrics": metrics, "options": options, "origin": TASKS.origins()[name]}, as_json)


@app.command()
def datasets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A dataset, to load it and show its options.")] = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """List registered datasets (imports none of them), or show what one is and which options it takes."""
    with json_only(as_json):
        load_plugins(plugin)
    from mtl.registry import DATASETS

    if name is None:
        list_names(DATASETS.origins(), "datasets", as_json)
        return
    from mtl.choices import options_of

    with json_only(as_json):
        found = DATASETS.get(name)
    about: dict[str, Any] = {"name": name, "origin": DATASETS.origins()[name], "about": getdoc(found.factory) or ""}
    about |= {"splits": list(found.details["splits"]), "options": options_of(found)}
    if as_json:
        show(about, as_json)
    else:
        print_dataset(about)


@app.command()
def backbones(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A backbone, to list its legal layer points.")] = None,
    points: Annotated[
        list[str] | None, typer.Argument(metavar="[POINT]...", help="Modules of it, to say of each whether and why not.")
    ] = None,
    input_shape: Annotated[str, typer.Option(help="Of one sample: CxHxW, or D for feature vectors.")] = "3x64x64",
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """List registered backbones (imports none of them), or the layer points of one with channels and stride."""
    with json_only(as_json):
        load_plugins(plugin)
    from mtl.registry import BACKBONES

    if name is None:
        list_names(BACKBONES.origins(), "backbones", as_json)
        return
    from mtl.errors import ConfigError
    from mtl.factory import describe_backbone

    try:
        shape = tuple(int(extent) for extent in input_shape.split("x"))
        if len(shape) not in (1, 3) or min(shape) < 1:
            raise ValueError
    except ValueError:
        raise ConfigError([f"--input-shape {input_shape!r} is not of the form CxHxW (3x64x64) or D (128)"]) from None
    with json_only(as_json):
        about = describe_backbone(BACKBONES.get(name), shape)
    if points:
        about = only_points(about, points)
    if as_json:
        show(about, as_json)
        return
    print_backbone(about, input_shape)
    if points:
        for point, reason in about["illegal"].items():
            print(f"{point} is not legal: {reason}")
        if about["illegal"]:
            raise typer.Exit(1)
    elif about["illegal"]:
        print(f"{len(about['illegal'])} other modules are not legal; `mtl backbones {name} MODULE` says why")


def only_points(about: dict[str, Any], points: list[str]) -> dict[str, Any]:
    """The description of a backbone, of these modules alone.

    Raises:
        ConfigError: one that the backbone does not have.
    """
    from mtl.errors import ConfigError, unknown

    known = [point["name"] for point in about["points"]] + list(about["illegal"])
    if wrong := [point for point in points if point not in known]:
        raise ConfigError(
            [f"{about['name']}: {unknown('layer point', point, known)}" for point in wrong], source="layer points"
        )
    legal = [point for point in about["points"] if point["name"] in points]
    return {**about, "points": legal, "illegal": {name: why for name, why in about["illegal"].items() if name in points}}
