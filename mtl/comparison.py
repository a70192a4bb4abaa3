"""A comparison: every arm with every seed under one budget, kept on disk, and continued where it was cut.

Its directory holds `comparison.json` (the config as it was asked for, and with every `auto` resolved, which all arms and seeds,
also those added later, use), `runs/` with one run directory per training, `analysis/` with what was computed from weights,
`results.json`, and the report. A run's directory is named by what is trained in it, so it is found again whichever arm asks.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

from mtl import report
from mtl.arm_specs import arms_of, default_arms, known
from mtl.arms import SINGLE_TASK, Arm, Piece
from mtl.auto import resolved
from mtl.build import make_tasks
from mtl.collecting import Cell, Facts, collect
from mtl.comparison_dir import (
    NOTE,
    begun,
    default_directory,
    locked,
    refuse_file,
    with_data,
    with_plugins,
    with_tasks,
    writing,
)
from mtl.config import InitFrom, RunConfig
from mtl.data import Split
from mtl.errors import ConfigError, RunError, listing, unknown
from mtl.findings import mean_score, task_score
from mtl.jobs import Job, Tally, finished, train_all
from mtl.locking import refuse_unwritable
from mtl.progress import Progress, Silent
from mtl.stats import seeds_needed
from mtl.task import Task
from mtl.tracking import log_hparams
from mtl.writing import write_whole


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to: where its files are, and what `results.json` holds."""

    directory: str
    results: dict[str, Any]


def compare(
    config: RunConfig,
    arms: Sequence[str | Mapping[str, Any]] | None = None,
    seeds: int | Sequence[int] = 3,
    *,
    fractions: Sequence[float] | None = None,
    reference: str | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    plugins: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Train every arm with every seed at every share of the training data, and say what can be said of their differences.

    Args:
        config: what all arms have in common, as `mtl.load_config` gives it.
        arms: names such as `cross_stitch`, `NAME:key=value ...`, or mappings {name: overrides}; see `mtl.arm_specs`. None:
            `single_task`, `hard_shared`, `unshared` and the config's own sharing, or `cross_stitch`.
        seeds: how many, counted from the config's own, or which.
        fractions: shares of the training data; None: the config's own.
        reference: the arm that others are compared with; None: `unshared` where it is among them, else `single_task`, else
            the first.
        out: directory; what it holds of this comparison is used again. None: `runs/compare-` and the config's digest, which
            other arms, seeds and shares of the same config have in common.
        jobs: trainings at a time. More than one run in processes of their own, which import the calling script again: there
            the call must stand under `if __name__ == "__main__":`.
        plugins: files that register what `config` names, for those processes.
        progress: what to show meanwhile, such as `mtl.for_terminal()`; None: nothing.

    Returns:
        Where everything is, and what `results.json` holds: cells with their figures, and findings with the answer in words.

    Raises:
        MTLError: anything a user can mend. Finished runs are kept.
    """
    progress = progress or Silent()
    check_call(config, arms, out)
    seeds, fractions = wanted(config, seeds, fractions, jobs)
    directory = Path(out) if out is not None else default_directory(config)
    with locked(directory):
        base, note = begun(directory, config)
        facts = Facts(base)
        made = arms_of(default_arms(config) if arms is None else arms, base, facts.setting.points)
        chosen = reference_of(reference, [arm.name for arm in made])
        cells = cells_of(made, fractions, seeds, facts)
        check_test_split(facts)
        note = with_data(note, facts.survey(base.data.fraction).fingerprints, directory)
        note = with_tasks(note, facts.described(), directory)
        note, edited = with_plugins(note, [Path(one) for one in plugins])
        refuse_other_networks(cells, facts, directory / "runs")
        with writing(directory):
            write_whole(directory / NOTE, note)
        for warning in forewarned(made, facts, seeds, fractions):
            progress.line(warning)
        failed = train_pieces(cells, directory / "runs", jobs, [Path(one) for one in plugins], progress)
        try:
            results = collect(cells, facts, directory, chosen, failed, progress, edited)
        except (KeyboardInterrupt, SystemExit):
            progress.line(f"interrupted: all is trained, in {directory / 'runs'}; the same command reads the rest and reports")
            raise
        with writing(directory):
            write_whole(directory / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
            report.write(results, directory)
            log_arms(results, directory / "tb")
    return Comparison(str(directory), results)


def plan(
    config: RunConfig,
    arms: Sequence[str | Mapping[str, Any]] | None = None,
    seeds: int | Sequence[int] = 3,
    fractions: Sequence[float] | None = None,
    reference: str | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """What `compare` would train: how many runs, how many of them are there already, what they take on disk at most, what they
    cannot tell, and of each arm its runs, the steps of each at each share of the data, and its cost.
    """
    check_call(config, arms, out)
    seeds, fractions = wanted(config, seeds, fractions, jobs)
    directory = Path(out) if out is not None else default_directory(config)
    refuse_file(directory)
    refuse_unwritable(directory)
    facts = Facts(begun(directory, config)[0] if directory.is_dir() else resolved(config))
    made = arms_of(default_arms(config) if arms is None else arms, facts.base, facts.setting.points)
    chosen = reference_of(reference, [arm.name for arm in made])
    cells = cells_of(made, fractions, seeds, facts)
    check_test_split(facts)
    pieces = {piece.name: piece for cell in cells for of in cell.pieces for piece in (of, *of.starts.values())}
    there = sum(finished(directory / "runs" / name) is not None for name in pieces)
    described = {}
    for arm in made:
        mine = [cell for cell in cells if cell.arm is arm]
        costs = [facts.cost(piece.config) for piece in mine[0].pieces]
        described[arm.name] = {
            "about": arm.about,
            "runs": len({piece.name for cell in mine for piece in cell.pieces}),
            "steps": {f"{cell.fraction:g}": facts.steps(cell.pieces[0].config) for cell in mine if cell.seed == seeds[0]},
            "parameters": sum(parameters for parameters, _ in costs),
            "flops_forward_per_image": sum(flops for _, flops in costs),
        }
    return {
        "directory": str(directory),
        "runs": len(pieces),
        "finished": there,
        "seeds": seeds,
        "fractions": fractions,
        "reference": chosen,
        "bytes_at_most": sum(checkpoint_bytes(piece.config, facts) for piece in pieces.values()),
        "notes": forewarned(made, facts, seeds, fractions),
        "arms": described,
    }


def forewarned(arms: Sequence[Arm], facts: Facts, seeds: Sequence[int], fractions: Sequence[float]) -> list[str]:
    """What such a comparison cannot tell, whatever comes of it."""
    notes = []
    if len(facts.tasks) == 1:
        notes.append("there is one task: it has nothing to share, and kinds of sharing are alike")
    if len(arms) == 1:
        notes.append(f"there is one arm, {arms[0].name}: nothing to compare it with")
    elif len(seeds) < (needed := seeds_needed((len(arms) - 1) * len(fractions))):
        shares = f" at {len(fractions)} shares of the data" * (len(fractions) > 1)
        notes.append(
            f"{report.counted(len(seeds), 'seed')}: whether arms differ cannot be shown, which with {len(arms)} arms{shares} "
            f"takes {needed} or more; runs are kept, so that more can be added"
        )
    return notes


def checkpoint_bytes(config: RunConfig, facts: Facts) -> int:
    """What a finished run keeps: of every parameter its value, the best one, and an optimizer's two averages, in float32."""
    return 16 * facts.cost(config)[0] * config.checkpoints.keep


def wanted(
    config: RunConfig, seeds: int | Sequence[int], fractions: Sequence[float] | None, jobs: int
) -> tuple[list[int], list[float]]:
    """Which seeds and shares, checked.

    Raises:
        ConfigError: what cannot be done, all of it.
    """
    wrong = []
    which = [*range(config.seed, config.seed + seeds)] if _whole(seeds) and seeds <= MOST else _all_of(seeds, _whole)
    if _whole(seeds) and which and not 0 <= config.seed <= 2**31 - int(seeds):
        wrong.append(f"seed: the first of {seeds}, from 0 to {2**31 - int(seeds):,}; found {config.seed:,}")
    elif not which or len(set(which)) < len(which) or min(which) < 0 or max(which) > 2**31:
        wrong.append(f"seeds: how many, from 1 to {MOST:,}, or different ones from 0 to 2**31; found {seeds!r}")
    shares = [config.data.fraction] if fractions is None else sorted(_all_of(fractions, lambda one: isinstance(one, Real)))
    if not shares or len({f"{one:g}" for one in shares}) < len(shares) or not all(0 < share <= 1 for share in shares):
        wrong.append(f"fractions: shares above 0, at most 1, different in six digits; found {fractions!r}")
    if not _whole(jobs) or jobs < 1:
        wrong.append(f"jobs: at least 1; found {jobs!r}")
    if wrong:
        raise ConfigError(wrong, source="compare")
    return [int(seed) for seed in which], [float(share) for share in shares]


MOST = 10_000
"""Seeds of one comparison."""


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _all_of(values: Any, right: Callable[[Any], bool]) -> list[Any]:
    """The values of a list; none if one of them is not right, or it is no list."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        return []
    found = [*values]
    return found if all(map(right, found)) else []


def cells_of(arms: Sequence[Arm], fractions: Sequence[float], seeds: Sequence[int], facts: Facts) -> list[Cell]:
    """Every arm at every share with every seed. Each network is built once, and given the weights that it starts from: what
    cannot be is known before the first run.

    Raises:
        ConfigError: an arm that does not fit the comparison, by its name.
    """
    cells: list[Cell] = []
    wrong: dict[str, None] = {}  # all of it, each once
    for fraction in fractions:
        for seed in seeds:
            for arm in arms:
                try:
                    cell = Cell(arm, fraction, seed, tuple(arm.pieces(facts.setting, fraction, seed)))
                    for piece in cell.pieces:
                        facts.cost(piece.config)
                        facts.check_start(piece)
                        refuse_other_tasks(piece.config, facts.tasks)
                except ConfigError as error:
                    wrong |= dict.fromkeys(f"arm {arm.name!r}: {problem}" for problem in error.problems)
                else:
                    cells.append(cell)
    if wrong:
        raise ConfigError([*wrong], source="arms")
    return cells


def check_test_split(facts: Facts) -> None:
    """Arms are compared on test data.

    Raises:
        ConfigError: a dataset has none.
    """
    tested = facts.survey(facts.base.data.fraction).samples[Split.TEST]
    if without := sorted({task.dataset for task in facts.tasks} - {name for name, n in tested.items() if n}):
        raise ConfigError(
            [f"dataset {name!r} has no test split, on which arms are compared; register it with one" for name in without],
            source="compare",
        )


def refuse_other_networks(cells: Sequence[Cell], facts: Facts, runs: Path) -> None:
    """Finished runs must be of the networks that their configs give now.

    Raises:
        RunError: one is of another, for a plugin was edited.
    """
    for cell in cells:
        for piece in cell.pieces:
            there = finished(runs / piece.name)
            if there is not None and there.get("parameters") not in (None, now := facts.parameters(piece.config)):
                raise RunError(
                    f"{str(runs / piece.name)!r} is finished, and of another network: it trained {there['parameters']:,} "
                    f"parameters, and its config now gives {now:,}; a plugin was edited, then: give another directory"
                )


def refuse_other_tasks(config: RunConfig, tasks: Sequence[Task]) -> None:
    """An arm may train a task with other losses, but it must be the same task.

    Raises:
        ConfigError: one of that name has other labels or is measured by something else.
    """
    those = {task.name: _what_is_measured(task) for task in tasks}
    wrong = []
    for task in make_tasks(config):
        if (found := _what_is_measured(task)) != those[task.name]:
            what = ", ".join(
                f"{key} {value!r} instead of {those[task.name][key]!r}"
                for key, value in found.items()
                if value != those[task.name][key]
            )
            wrong.append(f"task {task.name!r} is another one there, with {what}: scores cannot be compared")
    if wrong:
        raise ConfigError(wrong)


def _what_is_measured(task: Task) -> dict[str, Any]:
    metrics = [f"{metric.name} ({metric.better} is better)" for metric in task.all_metrics]
    return {"dataset": task.dataset, "target": task.target, "score": task.score_name, "metrics": metrics}


def check_call(config: Any, arms: Any, out: Any = None) -> None:
    """Refuse what is no config or no list of arms, and a call from a process that only imports the script it stands in.

    Raises:
        ConfigError, RunError: with what would work.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RunError(
            "mtl.compare with jobs > 1 starts processes that import the calling script again; put the call there under "
            "if __name__ == '__main__':"
        )
    if not isinstance(config, RunConfig):
        raise ConfigError([f"mtl.compare takes an mtl.RunConfig, as mtl.load_config gives; found {type(config).__name__}"])
    if arms is not None and (isinstance(arms, str | Mapping) or not isinstance(arms, Sequence)):
        raise ConfigError([f"arms is a sequence, as in ['unshared', 'cross_stitch']; found {arms!r}"], source="compare")
    if out is not None and not isinstance(out, str | Path):
        raise ConfigError([f"out: a directory; found {out!r}"], source="compare")


def log_arms(results: Mapping[str, Any], folder: Path) -> None:
    """Every cell as a row of TensorBoard's HParams tab."""
    shutil.rmtree(folder, ignore_errors=True)
    for cell in results["cells"]:
        settings = {"arm": cell["arm"], "seed": cell["seed"], "fraction": cell["fraction"]}
        figures = {f"test/{task}": task_score(cell, task, results["tasks"]) for task in results["tasks"]}
        figures["test/mean"] = mean_score(cell, results["tasks"])
        name = f"{cell['arm'].replace(':', '-')}-{100 * cell['fraction']:g}-seed{cell['seed']}"
        log_hparams(folder / name, settings, figures)


def reference_of(wanted: str | None, arms: Sequence[str]) -> str:
    """The arm that others are compared with.

    Raises:
        ConfigError: there is no such arm.
    """
    if wanted is None:
        return next((name for name in ("unshared", SINGLE_TASK) if name in arms), arms[0])
    if wanted not in arms and wanted in known() and not wanted.startswith("split"):
        raise ConfigError(
            [f"reference: {wanted!r} is not among the arms that are compared, {listing(arms)}; add it to them"],
            source="compare",
        )
    if wanted not in arms:
        raise ConfigError([f"reference: {unknown('arm', wanted, arms)}"], source="compare")
    return wanted


def train_pieces(
    cells: Sequence[Cell], runs: Path, at_once: int, plugins: Sequence[Path], progress: Progress
) -> dict[str, str]:
    """Train what is not trained yet; runs from whose weights others start come before them.

    Returns:
        Name of a run -> why, of those that failed.
    """
    shares = len({cell.fraction for cell in cells}) > 1
    pieces: dict[str, Piece] = {}
    labels: dict[str, str] = {}
    for cell in cells:
        for piece in (*cell.pieces, *(source for of in cell.pieces for source in of.starts.values())):
            pieces.setdefault(piece.name, piece)
            task = f" {piece.tasks[0]}" if len(cell.pieces) > 1 else ""
            labels.setdefault(piece.name, f"{cell.arm.name}{task}{cell.where(shares)}")
    first = {name: piece for name, piece in pieces.items() if not piece.starts}
    then = {name: piece for name, piece in pieces.items() if piece.starts}
    tally = Tally(len(pieces), progress)
    failed: dict[str, str] = {}

    def go(some: Mapping[str, Piece]) -> None:
        jobs = [Job(placed(piece, runs), runs / name, labels[name]) for name, piece in some.items()]
        failed.update({directory.name: why for directory, why in train_all(jobs, at_once, plugins, tally).items()})

    try:
        go(first)
        for name, piece in then.items():
            if lost := [source.name for source in piece.starts.values() if source.name in failed]:
                failed[name] = f"{lost[0]}, from which it starts, failed"
        go({name: piece for name, piece in then.items() if name not in failed})
    except (KeyboardInterrupt, SystemExit):
        done = sum(finished(runs / name) is not None for name in pieces)
        progress.line(
            f"interrupted: {done} of {len(pieces)} runs are finished, in {runs}; the same command goes on with the others, and "
            "with what was under way, where it was saved"
        )
        raise
    return failed


def placed(piece: Piece, runs: Path) -> RunConfig:
    """The config of a run, its starting points filled in."""
    if not piece.starts:
        return piece.config
    starts = {task: InitFrom(path=(runs / source.name).absolute()) for task, source in piece.starts.items()}
    return piece.config.replaced(init_from={**piece.config.init_from, **starts})
