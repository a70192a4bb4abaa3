"""The comparisons on record: what shares, where labels are many, few or uneven, where tasks agree and where they conflict.

    python -m benchmarks.comparisons                    # lists them
    python -m benchmarks.comparisons shapes --jobs 2    # trains what is missing in runs/shapes, writes results/shapes.json
    python -m benchmarks.comparisons shapes --only 8,9  # some of the seeds: joined with those on record
    python -m benchmarks.render                         # rewrites README.md from the JSON

Each is one call of `mtl.compare`, and goes on where it was cut. What takes longer than a machine is at hand for goes by seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mtl
from mtl.config import from_tree
from mtl.findings import tell

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "examples" / "configs"
RESULTS = HERE / "results"

PAIR: tuple[str, ...] = (
    "single_task",
    "hard_shared",
    "unshared",
    "cross_stitch",
    "cross_stitch_0.9:sharing.kind=cross_stitch 'sharing.init={same: 0.9, cross: 0.1}'",
)
"""The arms of every comparison of two tasks. Units start at the identity, and at Misra et al.'s best."""

FOUR = (*PAIR[:-1], "cross_stitch_0.91:sharing.kind=cross_stitch 'sharing.init={same: 0.91, cross: 0.03}'")
"""The same for four tasks: the second start again sums to one."""


@dataclass(frozen=True)
class Experiment:
    """One comparison.

    Args:
        config: a file in examples/configs.
        overrides: of it.
        about: what is asked, in a sentence.
        short: the same in a few words.
        cut: what the machine had no time for, in a sentence; empty: nothing.
        note: what else a reader should know, in sentences.
        trials: settings that every arm is tried with on validation data first, each for `TRIAL_EPOCHS` with `TRIAL_SEED`; the
            arm is then compared with those of its best trial.
    """

    config: str
    overrides: tuple[str, ...]
    seeds: int
    about: str
    short: str
    arms: tuple[str, ...] = PAIR
    fractions: tuple[float, ...] | None = None
    cut: str = ""
    note: str = ""
    trials: tuple[str, ...] = ()


TRIAL_EPOCHS, TRIAL_SEED = 5, 1000

HALF = "backbone.width=0.5"
SHORT = "a tower of half the reference's width"

EXPERIMENTS = {
    "reference": Experiment("fashion_two_task", (), 3, "The reference protocol in full.", "reference protocol"),
    "fractions": Experiment(
        "fashion_two_task",
        (HALF, "epoch_steps=50", "epochs=10"),
        10,
        "Few labels, for both tasks alike.",
        "Fashion-MNIST",
        fractions=(0.005, 0.02, 0.1),
        cut=f"500 steps, {SHORT}",
    ),
    "uneven_300": Experiment(
        "fashion_two_task",
        (HALF, "data.labelled.fashion_category=300", "epochs=6"),
        10,
        "Uneven labels: the category of 300 images, the group of all.",
        "300 labels of one task",
        cut=f"6 epochs, {SHORT}",
    ),
    "uneven_1200": Experiment(
        "fashion_two_task",
        (HALF, "data.labelled.fashion_category=1200", "epochs=6"),
        10,
        "Uneven labels: the category of 1,200 images, the group of all.",
        "1,200 labels of one task",
        cut=f"6 epochs, {SHORT}",
    ),
    "conflict": Experiment(
        "multi_fashion",
        (HALF, "epochs=6"),
        8,
        "Tasks that conflict: the left and the right of two overlaid garments.",
        "two garments in an image",
        cut=f"6 epochs, {SHORT}",
        note="Every garment is left in one picture and right in another: most of those in validation pictures are seen in "
        "training, in the other place, by single-task runs without a label and by joint ones with theirs. By these pictures "
        "the epoch is chosen that is tested; the garments of test pictures are in none of these.",
    ),
    "shapes": Experiment(
        "shapes_four_task",
        ("sharing.init=identity",),
        10,
        "Four tasks of four kinds on drawn shapes.",
        "four tasks of drawn shapes",
        arms=FOUR,
    ),
    "tuned": Experiment(
        "fashion_two_task",
        ("data.augment.flip=true", "data.augment.crop=2", "data.standardize=channel", "optim.schedule=one_cycle"),
        3,
        "A tuned recipe: what 30 epochs can reach.",
        "tuned recipe",
        arms=("cross_stitch", "unshared", "hard_shared"),  # the longest first, so that two at a time end together
        cut="other arms, and more trials than four of each",
        note="Tuned are the learning rate and dropout; where the largest of those tried won, a larger one may do better. "
        "Augmentation, schedule and standardization are the same for all arms and were not tried with each: standardization "
        "was chosen by two epochs of hard_shared on validation data, the others are usual ones.",
        trials=tuple(f"optim.lr={lr} backbone.dropout={dropout}" for lr in ("1e-3", "3e-3") for dropout in (0.2, 0.5)),
    ),
}
"""By the name of the record."""


def measure(name: str, jobs: int, only: Sequence[int] | None, out: Path) -> None:
    """Train what is missing, and write the record: of all seeds, or of those given and those on record."""
    experiment = EXPERIMENTS[name]
    config = mtl.load_config(CONFIGS / f"{experiment.config}.yaml", experiment.overrides)
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if only and path.exists() else None
    arms = experiment.arms
    tried: Tuning = {}
    if experiment.trials:
        tried = before["tuning"] if before else tuning(config, experiment, jobs, out / "trials")
        arms = tuple(f"{arm}_tuned:sharing.kind={arm} {best(arm, scores)}" for arm, scores in tried.items())
    found = mtl.compare(
        config,
        arms,
        only or experiment.seeds,
        fractions=experiment.fractions,
        reference="unshared_tuned" if tried else None,
        out=out / "final" if tried else out,
        jobs=jobs,
        progress=mtl.for_terminal(),
    )
    record = {**kept(found.results), "given": list(arms), "tuning": tried}
    path.write_text(json.dumps(joined(before, record) if before else record, separators=(",", ":")) + "\n")


def joined(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """One record of two, whose seeds differ; a seed that is in both is taken from the second, where one machine trained both.

    Machines may differ, and with them the precision that `auto` stands for: arms are compared within a seed, and each seed is
    of one machine.

    Raises:
        ValueError: they are not of the same comparison, or it is not known which machine trained the seeds that stay.
    """
    same = (
        "format",
        "tasks",
        "arms",
        "reference",
        "baseline",
        "fractions",
        "samples",
        "labelled",
        "set_aside",
        "given",
        "tuning",
    )
    differ = [key for key in same if before.get(key) != after.get(key)]
    digests = [from_tree({**one["config"], "precision": "auto"}, source="record").digest() for one in (before, after)]
    if differ or digests[0] != digests[1]:
        what = ", ".join(differ) or f"digest of the config ({' and '.join(digests)})"
        raise ValueError(f"the record is of another comparison, for these differ: {what}; train all seeds anew")
    precisions = dict.fromkeys(word for one in (before, after) for word in one["config"]["precision"].split(" and "))
    kept_seeds = [seed for seed in before["seeds"] if seed not in after["seeds"]]
    old = [cell for cell in before["cells"] if cell["seed"] in kept_seeds]
    places: dict[str, dict[str, Any]] = {}
    for one in (*before["machines"], *after["machines"]):
        place = {key: value for key, value in one.items() if key != "runs"}
        runs = places.get(json.dumps(place), {"runs": 0})["runs"]
        places[json.dumps(place)] = {**place, "runs": runs + one["runs"]}
    if twice := set(before["seeds"]) & set(after["seeds"]):
        if len(places) > 1:
            raise ValueError(f"seeds {sorted(twice)} are in both records, and not of one machine; train others")
        for place in places.values():
            place["runs"] = len({run for cell in (*old, *after["cells"]) for run in (*cell["runs"], *cell["starts"])})
    results = {
        **after,
        "config": {**after["config"], "precision": " and ".join(precisions)},
        "machines": list(places.values()),
        "at_once": max(before["at_once"], after["at_once"]),
        "seeds": sorted([*kept_seeds, *after["seeds"]]),
        "cells": sorted([*old, *after["cells"]], key=lambda cell: (cell["fraction"], cell["seed"])),
        "unreadable": {**before.get("unreadable", {}), **after.get("unreadable", {})},
        "failed": [*(one for one in before["failed"] if one["seed"] in kept_seeds), *after["failed"]],
    }
    return {**results, "findings": tell(results)}


Tuning = dict[str, dict[str, float | None]]
"""Arm -> trial -> the best validation score of its epochs, the mean over tasks; None where the trial failed."""


def best(arm: str, scores: Mapping[str, float | None]) -> str:
    """The trial with the highest score, the first of them.

    Raises:
        ValueError: all failed.
    """
    there = {trial: score for trial, score in scores.items() if score is not None}
    if not there:
        raise ValueError(f"every trial of {arm} failed; try it with other settings")
    return max(there, key=there.__getitem__)


def tuning(config: mtl.RunConfig, experiment: Experiment, jobs: int, out: Path) -> Tuning:
    """Train the trials that are missing."""
    named = {f"{arm}.{i}": (arm, trial) for arm in experiment.arms for i, trial in enumerate(experiment.trials)}
    found = mtl.compare(
        config.replaced(epochs=TRIAL_EPOCHS),
        [f"{name}:sharing.kind={arm} {trial}" for name, (arm, trial) in named.items()],
        [TRIAL_SEED],
        out=out,
        jobs=jobs,
        progress=mtl.for_terminal(),
    )
    scores: Tuning = {arm: dict.fromkeys(experiment.trials) for arm in experiment.arms}
    for cell in found.results["cells"]:
        arm, trial = named[cell["arm"]]
        scores[arm][trial] = max(sum(epoch) / len(epoch) for epoch in zip(*cell["curves"].values(), strict=True))
    return scores


def kept(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a record holds: all but what is long and can be looked at only in the report, and what is of the directory."""
    cells = [{key: value for key, value in cell.items() if key not in ("curves", "exchange")} for cell in results["cells"]]
    return {**{key: value for key, value in results.items() if key != "not_shown"}, "cells": cells}


def seeds_of(text: str) -> list[int]:
    """Of an argument such as 0,1."""
    return [int(seed) for seed in text.split(",")]


def main() -> None:
    """Measure, or list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: %(default)s)")
    parser.add_argument(
        "--only", type=seeds_of, help="these seeds, as in 0,1; others stay as they are on record (default: all)"
    )
    parser.add_argument("--out", type=Path, help="(default: runs/NAME)")
    args = parser.parse_args()
    if args.name is None:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:12} {experiment.about}")
        return
    measure(args.name, args.jobs, args.only, args.out or Path("runs") / args.name)


if __name__ == "__main__":
    main()
