"""The command line: `mtl train`, `compare`, `inspect`, `pack`, `evaluate`, `predict`, `check-plugin`, `tasks`, `datasets`,
`backbones`, `config schema`, `checkpoint verify`.

A user error ends with exit status 2 and one message, never a traceback. With `--json` standard output holds exactly one JSON
object and everything else goes to standard error. Heavy imports happen inside the commands, so that `mtl --help` is quick.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from mtl.command import AsJson, Plugins, json_only, load_plugins
from mtl.errors import MTLError
from mtl.interruption import end
from mtl.listing import app as listing_app
from mtl.printing import brief, print_comparison, print_csv, print_figures, print_result, readable, show

N = TypeVar("N", int, float)

app = typer.Typer(
    name="mtl",
    help="Train N vision tasks together, and find out whether sharing between them helps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="About configs.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")
checkpoint_app = typer.Typer(help="About a run's checkpoints.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(listing_app)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, e.g. optim.lr=1e-3 epochs=3")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"mtl {version('crosstitch')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train N vision tasks together, and find out whether sharing between them helps."""


@app.command()
def train(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG.yaml", help="What to train; see examples/configs/. Not with --resume.")
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run's files go; new or empty. Default: under runs/.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with the run in this directory, where it was cut.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build, take one step, print shapes and costs; leave no run.")
    ] = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Train one run, or go on with one."""
    with json_only(as_json):
        load_plugins(plugin)
        from mtl import build, resuming, survey
        from mtl.config import load
        from mtl.errors import ConfigError
        from mtl.progress import for_terminal

        if resume is not None:
            if run_dir is not None or dry_run:
                raise ConfigError(["--resume RUN goes on in RUN; it goes with neither --run-dir nor --dry-run"])
            changes = [*([config] if config is not None else []), *(overrides or [])]
            result = vars(resuming.resume(resume, changes, for_terminal()))
        elif config is None:
            raise ConfigError(["give a CONFIG.yaml to train, or --resume RUN"])
        elif dry_run:
            result = survey.dry_run(load(config, overrides or []))
        elif "TORCHELASTIC_RESTART_COUNT" in os.environ:  # torchrun started this
            result = vars(resuming.train_or_resume(load(config, overrides or []), run_dir, for_terminal()))
        else:
            result = vars(build.train(load(config, overrides or []), run_dir, for_terminal()))
    if os.environ.get("RANK", "0") != "0":
        return
    if dry_run and not as_json:
        names = result.pop("parameter_names")
        result["parameter_names"] = f"{len(names)}, such as {names[0]}; --json lists them"
    if as_json or dry_run:
        show(result, as_json)
    else:
        print_result(result)


@app.command()
def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="What all arms have in common; see examples/configs/.")],
    overrides: Overrides = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            help="Names, separated by commas, or a YAML file with a list of them and of mappings {name: overrides}. Default: "
            "single_task,hard_shared,unshared and the config's own sharing, or cross_stitch."
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KEY=VALUE",
            help="An arm of your own, beside those of --arms: the config with overrides, as in 'wide:backbone.width=2'. For "
            "your own alone add --arms ''.",
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N or S,S,...", help="How many, counted from the config's seed; or which, as in 0,3,7 or 5,")
    ] = "3",
    fractions: Annotated[
        str | None,
        typer.Option(metavar="F,F,...", help="Shares of the training data, as in 0.01,0.1,1. Default: the config's."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="ARM", help="The arm that others are compared with. Default: unshared, else single_task, else the first."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where everything goes, and what is there is used again. Default: under runs/."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Trainings at a time.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be trained and its cost; train nothing.")] = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Train every arm with every seed, and report what sharing does. The same command again goes on where it was cut."""
    chosen = numbers("--seeds", seeds, int)
    shares = numbers("--fractions", fractions, float) if fractions is not None else None
    with json_only(as_json):
        load_plugins(plugin)
        from mtl import comparison
        from mtl.arm_specs import default_arms, listed
        from mtl.comparison_dir import default_directory
        from mtl.config import load
        from mtl.progress import for_terminal

        loaded = load(config, overrides or [])
        wanted: list[str | dict[str, Any]] = [] if arms else [*default_arms(loaded)]
        for text in arms or []:
            named = [name for part in text.split(",") if (name := part.strip())]
            wanted += listed(Path(text)) if text.endswith((".yaml", ".yml")) else named
        wanted += arm or []
        directory = out if out is not None else default_directory(loaded, Path(config).stem)
        count = chosen[0] if "," not in seeds else chosen
        if dry_run:
            planned = comparison.plan(loaded, wanted, count, shares, reference, directory, jobs)
        else:
            found = comparison.compare(
                loaded,
                wanted,
                count,
                fractions=shares,
                reference=reference,
                out=directory,
                jobs=jobs,
                plugins=plugin or [],
                progress=for_terminal(),
            )
    if dry_run:
        show(planned if as_json else readable(planned), as_json)
        return
    if as_json:
        show({"directory": found.directory, **found.results}, as_json)
    else:
        print_comparison(found.results)
        print(f"{found.directory}: report.html, report.md, results.json")
    if not found.results["cells"]:
        raise typer.Exit(1)


@app.command()
def inspect(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Whose data.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Read a config's data, all of them, and say what they are: counts, classes, missing labels, duplicates, leaks."""
    with json_only(as_json):
        load_plugins(plugin)
        from mtl import inspection
        from mtl.config import load
        from mtl.progress import for_terminal

        about = inspection.inspect(load(config, overrides or []), for_terminal())
    show(about, as_json)


@app.command()
def pack(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A registered one, such as vggface2.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Options of the dataset, as in 'size=[112,112]'.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to pack into. Default: packed/DATASET under the data root.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the datasets. Default: MTL_DATA_ROOT, or ./data.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode. Default: one a core, at most 16.")] = None,
    bad_files: Annotated[float, typer.Option(min=0, max=1, help="Share of a split's files that may be unreadable.")] = 0.01,
    verify: Annotated[bool, typer.Option("--verify", help="Only read back what is packed, and compare digests.")] = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Decode and resize a dataset's images once, into files that are read at memory's speed; goes on where it was cut."""
    with json_only(as_json):
        load_plugins(plugin)
        from mtl import packing
        from mtl.progress import for_terminal

        about = packing.from_command(dataset, options or [], out, data, workers, bad_files, verify, for_terminal())
    show(about, as_json)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    weights: Annotated[str, typer.Option(help="best or last")] = "best",
    device: Annotated[str, typer.Option(help="As torch names it, or auto.")] = "auto",
    data_root: Annotated[Path | None, typer.Option(help="Folder of the datasets. Default: where the run found them.")] = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Metrics of a run's weights on a split."""
    with json_only(as_json):
        load_plugins(plugin)
        from mtl import build

        figures = build.evaluate_run(run, split, weights, device, data_root)
    if as_json:
        show({"run_dir": str(run), "split": split, "weights": weights, **figures}, as_json)
    else:
        print_figures({split: figures})


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Image files, folders of them, or .npy, .npz, .safetensors files."),
    ],
    weights: Annotated[str, typer.Option(help="best or last")] = "best",
    device: Annotated[str, typer.Option(help="As torch names it, or auto.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 128,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a table of comma-separated values on standard output.")] = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Labels and scores for images, per task. Files that cannot be read are listed and do not stop the others."""
    from mtl.errors import ConfigError, DataError

    if as_json and as_csv:
        raise ConfigError(["--json and --csv exclude each other"], source="mtl predict")
    with json_only(as_json or as_csv):
        load_plugins(plugin)
        from mtl.prediction import flat
        from mtl.prediction import predict as run_on
        from mtl.progress import for_terminal

        found = run_on(run, paths, weights, device, batch_size, for_terminal())
        for one in found.failed:
            print(f"not read: {one['path']}: {one['reason']}", file=sys.stderr)
        if not found.predictions:
            raise DataError(f"none of {len(found.failed)} files could be read")
    if as_json:
        show(vars(found), as_json)
    elif as_csv:
        print_csv([flat(row) for row in found.predictions])
    else:
        for row in found.predictions:
            named = " ".join(str(row[key]) for key in ("path", "index") if key in row)
            print(named, *(f"{task}: {brief(said)}" for task, said in row["tasks"].items()), sep="  ")


@checkpoint_app.command("verify")
def checkpoint_verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    as_json: AsJson = False,
) -> None:
    """Compare every byte of a run's checkpoints with what was written. Exit status 1 where one is damaged."""
    from mtl.checkpoints import verify

    found = verify(run)
    if as_json:
        show({"ok": not any(one["faults"] for one in found), "checkpoints": found}, as_json)
    else:
        for one in found:
            print(f"{one['name']}: {one['about'] or 'damaged'}")
            for fault in one["faults"]:
                print(f"  {fault}")
    if any(one["faults"] for one in found):
        raise typer.Exit(1)


@app.command()
def check_plugin(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Registered tasks.")],
    backbone: Annotated[
        str | None, typer.Option(help="To try them on. Default: small_cnn for images, mlp for feature vectors.")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder of the datasets. Default: MTL_DATA_ROOT, else ./data.")] = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Try out what tasks promise, and say what to mend. Exit status 1 where something does not hold."""
    with json_only(as_json):
        load_plugins(plugin)
        from mtl.conformance import check_task

        found = {name: check_task(name, data_root, backbone) for name in names}
    sound = {name: all(check.ok for check in checks) for name, checks in found.items()}
    if as_json:
        tasks = {name: {"ok": sound[name], "checks": [vars(check) for check in checks]} for name, checks in found.items()}
        show({"ok": all(sound.values()), "tasks": tasks}, as_json)
    else:
        marks = {True: "ok", False: "FAILED"}
        for name, checks in found.items():
            print(f"{name}: {'conforms' if sound[name] else 'does not conform'}")
            for check in checks:
                if check.ok is not None:
                    print(f"  {marks[check.ok]:6}  {check.name:16}  {check.detail}")
            if untried := [check.name for check in checks if check.ok is None]:
                print(f"  not tried, since an earlier check failed: {', '.join(untried)}")
    if not all(sound.values()):
        raise typer.Exit(1)


@config_app.command("schema")
def config_schema(plugin: Plugins = None) -> None:
    """The JSON schema of every key, for editors."""
    with json_only(True):
        load_plugins(plugin)
        from mtl.config import json_schema

        schema = json_schema()
    show(schema, as_json=True)


def numbers(option: str, text: str, kind: type[N]) -> list[N]:
    """What an option with numbers between commas holds.

    Raises:
        ConfigError: something else.
    """
    from mtl.errors import ConfigError

    try:
        return [kind(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        example = "3, or a list of seeds such as 0,3,7" if kind is int else "a list of numbers such as 0.01,0.1,1"
        raise ConfigError([f"{option} {text!r}: give {example}"], source="mtl compare") from None


def main() -> None:
    """Run the command line; turn a user's mistake into one message and exit status 2, Ctrl-C into 130."""
    signal.signal(signal.SIGTERM, end)
    try:
        app()
    except MTLError as error:
        rank = os.environ.get("RANK", "0")  # of several processes that torchrun started
        print(f"error: {f'process {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
