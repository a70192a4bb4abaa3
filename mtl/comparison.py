"""A comparison: every arm with every seed under one budget, kept on disk, and continued where it was cut.

Its directory holds `comparison.json` (the config as it was asked for, and with every `auto` resolved, which all arms and seeds,
also those added later, use), `runs/` with one run directory per training, `analysis/` with what was computed from weights,
`results.json`, and the report. A run's directory is named by what is trained in it, so it is found again whichever arm asks.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mtl import report
from mtl.analysis import Analyst, curves
from mtl.arms import SINGLE_TASK, Arm, Piece, Setting, arms_of, default_arms
from mtl.auto import resolved
from mtl.build import parameters_and_flops, survey
from mtl.config import InitFrom, RunConfig, from_tree
from mtl.data import Split
from mtl.errors import ConfigError, MTLError, RunError, unknown
from mtl.findings import mean_score, task_score, tell
from mtl.jobs import Job, Tally, finished, train_all
from mtl.metrics import relative_of
from mtl.progress import Progress, Silent
from mtl.rundir import DISTRIBUTION, environment, write_whole
from mtl.tracking import log_hparams
from mtl.warm_start import located

NOTE = "comparison.json"
"""In a comparison's directory: the config as it was asked for, and as all runs are made from."""

LOCK = ".lock"

FORMAT = 1
"""Of `results.json`."""


@dataclass(frozen=True)
class Cell:
    """An arm at a share of the data with a seed, and the runs that it consists of."""

    arm: Arm
    fraction: float
    seed: int
    pieces: tuple[Piece, ...]


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
        arms: names such as `cross_stitch`, `NAME:key=value ...`, or mappings {name: overrides}; see `mtl.arms`. None:
            `single_task`, `hard_shared`, `unshared` and the config's own sharing, or `cross_stitch`.
        seeds: how many, counted from the config's own, or which.
        fractions: shares of the training data; None: the config's own.
        reference: the arm that others are compared with; None: `unshared` where it is among them, else `single_task`, else
            the first.
        out: directory; what it holds of this comparison is used again. None: see `default_directory`.
        jobs: trainings at a time. More than one run in processes of their own, which import the calling script again: there
            the call must stand under `if __name__ == "__main__":`.
        plugins: files that register what `config` names, for those processes.
        progress: what to show meanwhile, such as `mtl.for_terminal()`; None: nothing.

    Raises:
        MTLError: anything a user can mend. Finished runs are kept.
    """
    progress = progress or Silent()
    check_call(config, arms)
    seeds, fractions = wanted(config, seeds, fractions, jobs)
    directory = Path(out) if out is not None else default_directory(config)
    with locked(directory):
        base, note = begun(directory, config)
        facts = Facts(base)
        made = arms_of(default_arms(config) if arms is None else arms, base, facts.setting.points)
        chosen = reference_of(reference, [arm.name for arm in made])
        cells = cells_of(made, fractions, seeds, facts)
        write_whole(directory / NOTE, note)
        failed = train_pieces(cells, directory / "runs", jobs, [Path(one) for one in plugins], progress)
        results = collect(cells, facts, directory, chosen, failed, progress)
        write_whole(directory / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        report.write(results, directory)
        log_arms(results, directory / "tb")
    return Comparison(str(directory), results)


def plan(
    config: RunConfig,
    arms: Sequence[str | Mapping[str, Any]] | None = None,
    seeds: int | Sequence[int] = 3,
    fractions: Sequence[float] | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """What `compare` would train: how many runs, how many of them are there already, and of each arm its runs and its cost."""
    check_call(config, arms)
    seeds, fractions = wanted(config, seeds, fractions, 1)
    directory = Path(out) if out is not None else default_directory(config)
    facts = Facts(begun(directory, config)[0] if directory.is_dir() else resolved(config))
    made = arms_of(default_arms(config) if arms is None else arms, facts.base, facts.setting.points)
    cells = cells_of(made, fractions, seeds, facts)
    pieces = {piece.name: piece for cell in cells for of in cell.pieces for piece in (of, *of.starts.values())}
    there = sum(finished(directory / "runs" / name) is not None for name in pieces)
    described = {}
    for arm in made:
        mine = [cell for cell in cells if cell.arm is arm]
        costs = [facts.cost(piece.config) for piece in mine[0].pieces]
        described[arm.name] = {
            "about": arm.about,
            "runs": len({piece.name for cell in mine for piece in cell.pieces}),
            "parameters": sum(parameters for parameters, _ in costs),
            "flops_forward_per_image": sum(flops for _, flops in costs),
        }
    return {
        "directory": str(directory),
        "runs": len(pieces),
        "finished": there,
        "steps_per_epoch": {f"{fraction:g}": facts.survey(fraction).epoch_steps for fraction in fractions},
        "epochs": config.epochs,
        "arms": described,
    }


def wanted(
    config: RunConfig, seeds: int | Sequence[int], fractions: Sequence[float] | None, jobs: int
) -> tuple[list[int], list[float]]:
    """Which seeds and shares, checked."""
    which = list(range(config.seed, config.seed + seeds)) if isinstance(seeds, int) else list(seeds)
    shares = [config.data.fraction] if fractions is None else sorted(fractions)
    check_plan(which, shares, jobs)
    return which, shares


def cells_of(arms: Sequence[Arm], fractions: Sequence[float], seeds: Sequence[int], facts: Facts) -> list[Cell]:
    """Every arm at every share with every seed. Each network is built once: what cannot be is known before the first run.

    Raises:
        ConfigError: an arm that does not fit the comparison, by its name.
    """
    cells = []
    for fraction in fractions:
        for seed in seeds:
            for arm in arms:
                try:
                    cell = Cell(arm, fraction, seed, tuple(arm.pieces(facts.setting, fraction, seed)))
                    for piece in cell.pieces:
                        facts.cost(piece.config)
                except ConfigError as error:
                    raise ConfigError([f"arm {arm.name!r}: {problem}" for problem in error.problems], source="arms") from None
                cells.append(cell)
    return cells


def default_directory(config: RunConfig, stem: str = "") -> Path:
    """Under `runs/`, named by the config's digest (which tells the weights that towers start from, too) and a `stem`."""
    return Path("runs") / f"compare-{f'{stem}-' * bool(stem)}{asked(config).digest()}"


def asked(config: RunConfig) -> RunConfig:
    """The config with the digests of the weights that towers start from."""
    return config.replaced(init_from={task: located(task, start) for task, start in config.init_from.items()})


def check_call(config: Any, arms: Any) -> None:
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


def log_arms(results: Mapping[str, Any], folder: Path) -> None:
    """Every cell as a row of TensorBoard's HParams tab."""
    shutil.rmtree(folder, ignore_errors=True)
    for cell in results["cells"]:
        settings = {"arm": cell["arm"], "seed": cell["seed"], "fraction": cell["fraction"]}
        figures = {f"test/{task}": task_score(cell, task, results["tasks"]) for task in results["tasks"]}
        figures["test/mean"] = mean_score(cell, results["tasks"])
        name = f"{cell['arm'].replace(':', '-')}-{100 * cell['fraction']:g}-seed{cell['seed']}"
        log_hparams(folder / name, settings, figures)


def check_plan(seeds: Sequence[int], fractions: Sequence[float], jobs: int) -> None:
    """Refuse what cannot be done.

    Raises:
        ConfigError: all of it.
    """
    wrong = []
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        wrong.append(f"seeds: how many, from 1 on, or different ones from 0 on; found {list(seeds) or 'none'}")
    if not fractions or len(set(fractions)) < len(fractions) or not all(0 < fraction <= 1 for fraction in fractions):
        wrong.append(f"fractions: different shares above 0, at most 1; found {list(fractions)}")
    if jobs < 1:
        wrong.append(f"jobs: at least 1; found {jobs}")
    if wrong:
        raise ConfigError(wrong, source="compare")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time works in a comparison's directory.

    Raises:
        RunError: another does, or it cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{str(directory)!r} is a file; give a folder")
    new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another process compares in {str(directory)!r}; wait for it, or give another directory") from None
    except OSError as error:
        raise RunError(f"cannot write to {str(directory)!r}: {error.strerror or error}") from None
    try:
        yield
    except MTLError:
        if new and not (directory / "runs").exists():  # nothing was trained
            shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        lock.release()


def begun(directory: Path, config: RunConfig) -> tuple[RunConfig, str]:
    """The config that all runs of a comparison are made from, and what to note of it: of a new one `config` with every `auto`
    that arms have in common resolved; of one that was begun, what it noted. Where to compute and where data are is as now.

    Raises:
        ConfigError: the directory holds a comparison of another config; with what differs.
        RunError: it holds something else.
    """
    note, base, config = directory / NOTE, resolved(config), asked(config)
    if not note.is_file():
        if others := sorted(one.name for one in directory.iterdir() if one.name != LOCK):
            raise RunError(
                f"{str(directory)!r} holds {others[0]!r} and no {NOTE}, so it is not a comparison's; nothing was written; give "
                "another directory"
            )
        return base, json.dumps(
            {"asked": config.model_dump(mode="json"), "base": base.model_dump(mode="json")}, indent=1
        ) + "\n"
    try:
        text = note.read_text(encoding="utf-8")
        trees = json.loads(text)
        then, noted = (from_tree(trees[key], source=str(note)) for key in ("asked", "base"))
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{str(note)!r} is damaged ({error}); give another directory") from None
    if then.digest() != config.digest():
        changes = differing(then.model_dump(mode="json"), config.model_dump(mode="json"))
        raise ConfigError(
            [f"{key}: {was!r} there, {now!r} now" for key, (was, now) in changes.items()],
            source=f"{str(directory)!r} holds a comparison of another config (give another directory)",
        )
    data = noted.data.model_copy(update={"root": base.data.root, "workers": base.data.workers})
    starts = {task: start.model_copy(update={"path": base.init_from[task].path}) for task, start in noted.init_from.items()}
    return noted.replaced(device=base.device, data=data, init_from=starts), text


def differing(one: Any, other: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> the two values, where two trees differ.

    >>> differing({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    {'b.c': (2, 3)}
    """
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return {} if one == other else {prefix: (one, other)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*one, *(key for key in other if key not in one)]:
        found |= differing(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else key)
    return found


def reference_of(wanted: str | None, arms: Sequence[str]) -> str:
    """The arm that others are compared with.

    Raises:
        ConfigError: there is no such arm.
    """
    if wanted is None:
        return next((name for name in ("unshared", SINGLE_TASK) if name in arms), arms[0])
    if wanted not in arms:
        raise ConfigError([f"reference: {unknown('arm', wanted, arms)}"], source="compare")
    return wanted


class Facts:
    """What has to be known of a comparison's data and networks; found out once.

    Args:
        base: the config that all arms have in common.
    """

    def __init__(self, base: RunConfig) -> None:
        self.base = base
        self.survey = cache(lambda fraction: survey(base.replaced(data=base.data.model_copy(update={"fraction": fraction}))))
        self._costs: dict[str, tuple[int, int]] = {}
        about = self.survey(base.data.fraction)
        self.tasks, self.shape = about.tasks, about.shape
        self.setting = Setting(
            base=base,
            points=about.points,
            datasets={task.name: task.dataset for task in about.tasks},
            epoch_steps=self._epoch_steps,
            parameters=lambda config: self.cost(config)[0],
        )

    def _epoch_steps(self, task: str, fraction: float) -> int | None:
        about, dataset = self.survey(fraction), self.setting.datasets[task]
        training = about.samples[Split.TRAIN]
        if about.labelled[task] == training[dataset] == max(training.values()):
            return None
        return about.epoch_steps

    def cost(self, config: RunConfig) -> tuple[int, int]:
        """Parameters that a config trains, and FLOPs of a forward pass."""
        data = config.data.model_copy(update={"fraction": 1.0})
        key = config.replaced(seed=0, data=data).digest()
        if key not in self._costs:
            wanted = [task.name for task in config.tasks]
            tasks = [task for task in self.tasks if task.name in wanted]
            self._costs[key] = parameters_and_flops(config, tasks, self.shape)
        return self._costs[key]


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
        where = f", {100 * cell.fraction:g} %" * shares + f", seed {cell.seed}"
        for piece in (*cell.pieces, *(source for of in cell.pieces for source in of.starts.values())):
            pieces.setdefault(piece.name, piece)
            task = f" {piece.tasks[0]}" if len(cell.pieces) > 1 else ""
            labels.setdefault(piece.name, f"{cell.arm.name}{task}{where}")
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
            "starts anew what was under way"
        )
        raise
    return failed


def placed(piece: Piece, runs: Path) -> RunConfig:
    """The config of a run, its starting points filled in."""
    if not piece.starts:
        return piece.config
    starts = {task: InitFrom(path=(runs / source.name).absolute()) for task, source in piece.starts.items()}
    return piece.config.replaced(init_from={**piece.config.init_from, **starts})


def collect(
    cells: Sequence[Cell],
    facts: Facts,
    directory: Path,
    reference: str,
    failed: Mapping[str, str],
    progress: Progress,
) -> dict[str, Any]:
    """What `results.json` holds."""
    analyst = Analyst(directory / "analysis", facts.base.device, facts.base.data.root, progress)
    runs = directory / "runs"
    rows, lost = [], []
    for i, cell in enumerate(cells, start=1):
        why = next((failed[piece.name] for piece in cell.pieces if piece.name in failed), None)
        where = {"arm": cell.arm.name, "fraction": cell.fraction, "seed": cell.seed}
        if why is not None:
            lost.append({**where, "why": why})
            continue
        rows.append({**where, **figures_of(cell, facts, runs, analyst)})
        if progress.due():
            progress.line(f"read {i} of {len(cells)} results")
            progress.shown()
    tasks = {
        task.name: {
            "score": task.score_name,
            "metrics": {metric.name: metric.better for metric in task.all_metrics},
            "relative": relative_of(task.all_metrics).name,
            "dataset": task.dataset,
        }
        for task in facts.tasks
    }
    arms = list({cell.arm.name: cell.arm for cell in cells}.values())
    fractions = list(dict.fromkeys(cell.fraction for cell in cells))
    results = {
        "format": FORMAT,
        "config": facts.base.model_dump(mode="json"),
        **circumstances(rows, runs, facts.base),
        "tasks": tasks,
        "arms": [{"name": arm.name, "about": arm.about} for arm in arms],
        "reference": reference,
        "baseline": SINGLE_TASK if SINGLE_TASK in [arm.name for arm in arms] else None,
        "fractions": fractions,
        "seeds": list(dict.fromkeys(cell.seed for cell in cells)),
        "samples": {f"{fraction:g}": facts.survey(fraction).samples for fraction in fractions},
        "labelled": {f"{fraction:g}": facts.survey(fraction).labelled for fraction in fractions},
        "cells": rows,
        "failed": lost,
    }
    return {**results, "findings": tell(results)}


def circumstances(rows: Sequence[Mapping[str, Any]], runs: Path, base: RunConfig) -> dict[str, Any]:
    """Where and how the runs were trained: `environment` as it is now, `machines`, each kind of place that runs noted with how
    many there were, and `at_once`, the largest number that trained at a time.
    """
    names = sorted({name for row in rows for name in (*row["runs"], *row["starts"])})
    noted = [json.loads((runs / name / "env.json").read_text(encoding="utf-8")) for name in names]
    kinds = [
        {
            "device": one["device_name"],
            "threads": one["threads"],
            "torch": one["versions"]["torch"],
            "mtl": one["versions"][DISTRIBUTION],
        }
        for one in noted
    ]
    machines = [{**kind, "runs": kinds.count(kind)} for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    at_once = max((one.get("at_once", 1) for one in noted), default=1)
    return {"environment": environment(base), "machines": machines, "at_once": at_once}


def figures_of(cell: Cell, facts: Facts, runs: Path, analyst: Analyst) -> dict[str, Any]:
    """A cell's test figures, cost, learning curves, and what its exchange did."""
    test: dict[str, Any] = {}
    learned: dict[str, Any] = {}
    for task in facts.tasks:
        having = [piece for piece in cell.pieces if task.name in piece.tasks]
        said = [finished(runs / piece.name) for piece in having]
        assert all(said)
        if len(having) == 1:
            test[task.name] = said[0]["test"][task.name]  # type: ignore[index]
            learned[task.name] = curves(runs / having[0].name).get(task.name, {}).get(task.score_name, [])
        else:
            test[task.name] = analyst.ensemble([runs / piece.name for piece in having])[task.name]
    exchange = analyst.exchange(runs / cell.pieces[0].name) if len(cell.pieces) == 1 else None
    return {
        "runs": [piece.name for piece in cell.pieces],
        "starts": sorted({source.name for piece in cell.pieces for source in piece.starts.values()}),
        "steps": {piece.tasks[0]: (finished(runs / piece.name) or {})["steps"] for piece in cell.pieces},
        "test": test,
        "curves": learned,
        "cost": cost_of(cell, facts, runs),
        "exchange": exchange,
    }


def cost_of(cell: Cell, facts: Facts, runs: Path) -> dict[str, float | None]:
    """Of all runs that a cell consists of, and of those from which they start; the peak of memory is that of the largest."""
    sources = {source.name: source for piece in cell.pieces for source in piece.starts.values()}
    said = {piece.name: finished(runs / piece.name) or {} for piece in cell.pieces}
    before = [finished(runs / name) or {} for name in sources]
    networks = [facts.cost(piece.config) for piece in cell.pieces]
    peaks = [one["peak_memory_bytes"] for one in said.values() if one["peak_memory_bytes"] is not None]
    return {
        "parameters": sum(parameters for parameters, _ in networks),
        "flops_per_image": sum(flops for _, flops in networks),
        "seconds_per_step": sum(one["training_seconds"] / one["steps"] for one in said.values()),
        "peak_memory_bytes": max(peaks) if len(peaks) == len(said) else None,
        "training_seconds": sum(one["training_seconds"] for one in [*said.values(), *before]),
    }
