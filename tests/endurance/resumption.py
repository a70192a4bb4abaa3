"""Rows 11, 12, 14 and 15: the wall clock, a config that was changed, the same run again, and every sample once per epoch."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mtl.batches import Batch, Feed
from mtl.checkpoints import folder_of, newest
from mtl.commit import committed
from mtl.data import Samples
from mtl.sampling import Mixing
from tests.endurance import rig
from tests.endurance.forked import Call, Ended, forked, program
from tests.endurance.rows import Cases, row

DAY, YEAR = 86_400.0, 365.25 * 86_400


def config(folder: Path, short: bool, **changes: Any) -> Path:
    """The rig's images and its config, in a file; in short 320 images and 15 steps."""
    if not (folder / rig.TABLE).exists():
        rig.write_images(folder, 320 if short else rig.IMAGES)
    less = {"max_steps": 15, "batch_size": 32} if short else {}
    written = rig.tree(folder, **{**less, **changes})
    file = folder / f"config{len(list(folder.glob('*.yaml')))}.yaml"
    file.write_text(yaml.safe_dump(written), encoding="utf-8")
    return file


def alone(folder: Path, file: Path) -> Path:
    """The run that nothing was done to."""
    expect(forked([Call(["train", str(file), "--run-dir", str(folder / "ref"), "data.workers=0"])])[0], 0)
    return folder / "ref"


def expect(ended: Ended, status: int) -> None:
    """What a row rests on."""
    assert ended.status == status, ended.err[-2000:]


@row(11, "the wall clock is irrelevant")
def the_wall_clock(folder: Path, short: bool) -> Cases:
    cases, file, last = Cases(), config(folder, short), 15 if short else rig.STEPS
    ref = rig.digest(alone(folder, file))
    cut, jump = last // 2 + 3, last // 3
    clocks: dict[str, tuple[list[tuple[int, float]], list[tuple[int, float]]]] = {
        "ten years ahead, then a day back": ([(0, 10 * YEAR)], [(0, -DAY)]),
        "a day back": ([(0, -DAY)], [(0, -DAY)]),
        "ten years ahead": ([(0, 10 * YEAR)], [(0, 10 * YEAR)]),
        "1970": ([(0, -55 * YEAR)], []),
        "a day back in mid-run": ([(jump, -DAY)], [(last - jump // 2, -DAY)]),
        "ten years ahead in mid-run": ([(jump, 10 * YEAR)], [(0, 10 * YEAR), (last - jump // 2, 0.0)]),
        "there and back in mid-run": ([(2, 10 * YEAR), (4, -DAY), (6, YEAR)], []),
    }
    for i, (name, (first, then)) in enumerate(list(clocks.items())[: 0 if short else None]):
        run = folder / f"run{i}"
        train = Call(["train", str(file), "--run-dir", str(run), "data.workers=0"], kill_after=cut, clock=first)
        killed, resumed = forked([train, Call(["train", "--resume", str(run)], clock=then)])
        cases.check(f"{name}: killed", killed.status == -9, killed.err[-300:])
        cases.check(f"{name}: goes on", resumed.status == 0, resumed.err[-300:])
        cases.check(
            f"{name}: goes on from the newest", goes_on_after(resumed) == cut // rig.EVERY * rig.EVERY, resumed.err[-300:]
        )
        cases.check(f"{name}: == REF", resumed.status == 0 and rig.digest(run) == ref)
    run, (first, then) = folder / "times", next(iter(clocks.values()))
    call = Call(["train", str(file), "--run-dir", str(run), "data.workers=0"], kill_after=cut, clock=first)
    expect(forked([call])[0], -9)
    names = [one.name for one in committed(folder_of(run))]
    for age, one in enumerate(committed(folder_of(run))):
        for path in (*one.iterdir(), one):
            os.utime(path, (age * 10 * YEAR, age * 10 * YEAR))  # the newest from 1970, the one before from 1980
    cases.check("newest by number, not by time", newest(run)[0].name == names[0], newest(run))
    resumed = forked([Call(["train", "--resume", str(run)], clock=then)])[0]
    cases.check("odd times of files: goes on from the newest", f"from {names[0]}" in resumed.err, resumed.err[-300:])
    cases.check("odd times of files: == REF", resumed.status == 0 and rig.digest(run) == ref)
    cases.notes.append(f"killed after step {cut} and resumed, forked, no decoders; time.time and datetime are wrong")
    return cases


def goes_on_after(ended: Ended) -> int | None:
    """The step after which a process said that it goes on."""
    said = re.search(r"goes on after step (\d+)", ended.err)
    return None if said is None else int(said[1])


HARMLESS = {
    "data.bad_files=0.5": "data.bad_files: 0.01 -> 0.5",
    "data.workers=1": "data.workers: 0 -> 1",
    "data.root={folder}/moved": "/moved'",
    "patience=50": "patience: None -> 50",
    "checkpoints.every_steps=4": "checkpoints.every_steps: 5 -> 4",
    "checkpoints.every_seconds=5": "checkpoints.every_seconds: 60.0 -> 5.0",
    "checkpoints.keep=3": "checkpoints.keep: 2 -> 3",
    "checkpoints.keep_every_epochs=1": "checkpoints.keep_every_epochs: None -> 1",
}
"""An edit that no step depends on -> what is said of it."""
OTHERS = {
    "seed=1": "seed: 0 -> 1",
    "epochs=4": "epochs: 3 -> 4",
    "batch_size=16": "batch_size: {batch} -> 16",
    "max_steps=80": "max_steps: {steps} -> 80",
    "epoch_steps=5": "epoch_steps: None -> 5",
    "optim.lr=0.01": "optim.lr: 0.001 -> 0.01",
    "optim.name=sgd": "optim.name: 'adam' -> 'sgd'",
    "optim.schedule=constant": "optim.schedule: 'cosine' -> 'constant'",
    "optim.clip_norm=1": "optim.clip_norm: None -> 1.0",
    "balancer=uncertainty": "balancer: 'fixed' -> 'uncertainty'",
    "sharing.init.same=0.8": "sharing.init.same: 0.9 -> 0.8",
    "backbone.width=0.2": "backbone.width: 0.1 -> 0.2",
    "backbone.dropout=0.1": "backbone.dropout: 0.2 -> 0.1",
    "data.validation=0.2": "data.validation: 0.1 -> 0.2",
    "data.fraction=0.5": "data.fraction: 1.0 -> 0.5",
    "data.augment.flip=false": "data.augment.flip: True -> False",
    "precision=bf16": "precision: 'fp32' -> 'bf16'",
}
"""An edit that would make another run of it -> the line that refuses it."""


@row(12, "a changed config on resume is explicit")
def a_changed_config(folder: Path, short: bool) -> Cases:
    cases, file, last = Cases(), config(folder, short), 15 if short else rig.STEPS
    ref = rig.digest(alone(folder, file))
    (folder / "moved").symlink_to(folder, target_is_directory=True)
    cut = folder / "cut"
    expect(forked([Call(["train", str(file), "--run-dir", str(cut), "data.workers=0"], kill_after=last - 4)])[0], -9)
    before = {path.relative_to(cut): path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    some = {edit: line for edit, line in HARMLESS.items() if not short or edit in ("data.bad_files=0.5", "patience=50")}
    edits = {**some, **(dict(list(OTHERS.items())[:3]) if short else OTHERS)}
    places = {edit: folder / f"edit{i}" for i, edit in enumerate(edits)}
    for place in places.values():
        shutil.copytree(cut, place)
    made = forked([Call(["train", "--resume", str(places[edit]), edit.format(folder=folder)]) for edit in edits])
    batch = 32 if short else 64
    for (edit, line), ended in zip(edits.items(), made, strict=True):
        line = line.format(batch=batch, steps=last)
        if edit in HARMLESS:
            same = ended.status == 0 and rig.digest(places[edit]) == ref
            cases.check(f"{edit} goes on, bitwise", same and line in ended.err, (ended.status, ended.err[-300:]))
            continue
        after = {path.relative_to(places[edit]): path.read_bytes() for path in places[edit].rglob("*") if path.is_file()}
        held = ended.status == 2 and line in ended.err and "Traceback" not in ended.err
        held &= {k: v for k, v in after.items() if k.name != ".lock.json"} == {
            k: v for k, v in before.items() if k.name != ".lock.json"
        }
        cases.check(f"{edit} is refused", held, (ended.status, ended.err[-300:]))
    cases.notes.append(f"killed after step {last - 4}; {len(some)} harmless, {len(edits) - len(some)} not; forked")
    return cases


@row(14, "repeatable")
def repeatable(folder: Path, short: bool) -> Cases:
    cases, file, found = Cases(), config(folder, short), {}
    times = {0: 2, 1: 1} if short else {0: 5, 1: 5, 4: 5}
    for workers, count in times.items():
        runs = [folder / f"workers{workers}-{i}" for i in range(count)]
        asked = [["train", str(file), "--run-dir", str(run), f"data.workers={workers}"] for run in runs]
        commands = 0 if short else 1
        ended = forked([Call(one) for one in asked[commands:]]) + [program(*one) for one in asked[:commands]]
        for run, one in zip(runs[commands:] + runs[:commands], ended, strict=True):
            assert one.status == 0, one.err[-2000:]
            found[run.name] = rig.digest(run)
            said = json.loads((run / "result.json").read_text(encoding="utf-8"))
            first = found[runs[0].name] if workers == 0 and commands == 0 else next(iter(found.values()))
            cases.check(run.name, found[run.name] == first and said["steps"] == (15 if short else rig.STEPS), found[run.name])
    cases.check("one digest", len(set(found.values())) == 1, found)
    each = ", ".join(f"{count} with {workers} decoders" for workers, count in times.items())
    cases.notes.append(f"{each}{'' if short else '; one of each as the command, the others'} forked")
    return cases


PLUGIN = '''
"""Pictures whose first two pixels say which they are."""
import torch
import mtl

class Options(mtl.Options):
    count: int = 33

def numbered(split, root, options):
    index = torch.arange(options.count)
    images = torch.zeros(options.count, 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = index // 256, index % 256
    return mtl.ArrayDataset(images, {"odd": index % 2})

for name in ("numbered", "counted"):
    mtl.register_dataset(name, options=Options, splits=("train",))(numbered)
    mtl.register_task(f"{name}_odd")(lambda name=name: mtl.Task(name, "odd", mtl.Classification(("even", "odd"))))
'''


def samples(name: str, count: int) -> Samples:
    """Images that are their own numbers, all with a label."""
    images, labels = torch.arange(count).view(-1, 1, 1, 1), torch.zeros(count, dtype=torch.int64)
    return Samples(name, images, {"odd": labels}, {"odd": None}, {"odd": count}, {"odd": 1.0})


def missing_and_twice(drawn: Sequence[int], count: int) -> tuple[int, int]:
    """How many of `count` samples were not drawn, and how many more than once."""
    return count - len(set(drawn)), len(drawn) - len(set(drawn))


def wrong_with(drawn: Mapping[str, Sequence[int]], counts: Mapping[str, int]) -> list[str]:
    """What is wrong with an epoch: of one dataset every sample is drawn once; of another pass after pass."""
    wrong = []
    for name, numbers in drawn.items():
        passes = [numbers[i : i + counts[name]] for i in range(0, len(numbers), counts[name])]
        for i, one in enumerate(passes):
            missing, twice = missing_and_twice(one, counts[name])
            if twice or (missing and i < len(passes) - 1):
                wrong.append(f"{name}, pass {i + 1}: {missing} missing, {twice} twice")
    if not any(len(numbers) == counts[name] for name, numbers in drawn.items()):
        wrong.append(f"none is passed over once: { ({name: len(numbers) for name, numbers in drawn.items()}) }")
    return wrong


Drawn = list[tuple[str, list[int]]]
"""What a step draws: of each batch its dataset, and the numbers of its samples."""


def drawn_by(feed: Feed, epoch: int, done: int = 0) -> list[Drawn]:
    """Step by step: the numbers of its samples that count."""
    return [[(batch.dataset, counted(batch)) for batches in step for batch in batches] for step in feed.epoch(epoch, done)]


def counted(batch: Batch) -> list[int]:
    """The numbers of the samples that count: not of those that only fill up a share."""
    numbers, mask = batch.images.flatten(), batch.valid["odd"]
    return (numbers if mask is None else numbers[mask]).tolist()  # type: ignore[no-any-return]


def together(shares: Sequence[list[Drawn]]) -> list[Drawn]:
    """What several processes draw, put together as it was dealt out: the first of each, the second of each, and so on."""
    return [
        [(of_ranks[0][0], dealt([numbers for _, numbers in of_ranks])) for of_ranks in zip(*step, strict=True)]
        for step in zip(*shares, strict=True)
    ]


def dealt(hands: Sequence[Sequence[int]]) -> list[int]:
    """The pack that was dealt."""
    return [one for turn in itertools.zip_longest(*hands) for one in turn if one is not None]


@row(15, "each sample once per epoch")
def each_sample_once(folder: Path, short: bool) -> Cases:
    cases, steps, draw = Cases(), 0, random.Random(0)

    def attempt(name: str, counts: dict[str, int], batch_size: int, accumulate: int, mixing: Mixing) -> int:
        def made(rank: int = 0, world: int = 1) -> Feed:
            parts = {one: samples(one, n) for one, n in counts.items()}
            return Feed(parts, batch_size, accumulate, 0, mixing=mixing, shard=(rank, world))

        for epoch in (1, 2):
            whole = drawn_by(made(), epoch)
            drawn: dict[str, list[int]] = {one: [] for one in counts}
            for step in whole:
                for dataset, numbers in step:
                    drawn[dataset] += numbers
            wrong = wrong_with(drawn, counts)
            wrong += [
                f"other samples from step {k} on" for k in range(len(whole) + 1) if drawn_by(made(), epoch, k) != whole[k:]
            ]
            cases.check(f"{name}, epoch {epoch}", not wrong, wrong[:3])
            for world in (2, 3, 4):
                for k in (0, draw.randrange(len(whole))):
                    shares = [drawn_by(made(rank, world), epoch, k) for rank in range(world)]
                    cases.check(
                        f"{name}, epoch {epoch} after step {k}, {world} processes", together(shares) == whole[k:], shares
                    )
        return len(whole)

    for n in range(1, 34):
        for batch_size in (4, 5) if short else (2, 3, 4, 5, 8, 16, 32, 33, 64):
            steps += attempt(f"{n} samples by {batch_size}", {"a": n}, batch_size, 1 + n % 2, Mixing())
        for other in (7,) if short else (1, 2, 7, 16, 33):
            for policy in ("temperature",) if short else ("equal", "proportional", "temperature"):
                for until in ("longest", "shortest"):
                    mixing = Mixing(policy=policy, epoch=until)  # type: ignore[arg-type]
                    steps += attempt(f"{n} and {other}, {policy}, {until}", {"a": n, "b": other}, 4, 1 + n % 2, mixing)
    cases.notes.append(
        f"a cut at each of {steps} steps of epochs; the shares of 2, 3 and 4 processes are those of one, dealt out"
    )
    trained = whole_runs(folder, cases, short)
    cases.notes.append(f"{trained} runs killed and resumed, forked")
    return cases


def whole_runs(folder: Path, cases: Cases, short: bool) -> int:
    """Runs of 33 samples, alone and beside 12 others, killed after each of their steps and resumed: what they consumed."""
    plugin = folder / "numbered.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    count = 0
    for names in (["numbered"], ["numbered", "counted"]):
        tree = {
            "tasks": [f"{name}_odd" for name in names],
            "backbone": {"name": "mlp", "widths": [8]},
            "data": {"validation": 0, "datasets": {"counted": {"count": 12}} if len(names) > 1 else {}},
            "epochs": 2,
            "batch_size": 4,
            "checkpoints": {"every_steps": 3},
            "device": "cpu",
            "precision": "fp32",
        }
        file = folder / f"{len(names)}.yaml"
        file.write_text(yaml.safe_dump(tree), encoding="utf-8")

        def calls(name: str, kill_after: int | None, file: Path = file) -> list[Call]:
            run, log = str(folder / name), str(folder / f"{name}.log")
            more = ["--plugin", str(plugin)]
            first = Call(["train", str(file), "--run-dir", run, *more], kill_after, samples=log)
            return [first] if kill_after is None else [first, Call(["train", "--resume", run, *more], samples=log)]

        ref = f"whole{len(names)}"
        expect(forked(calls(ref, None))[0], 0)
        expected = logged(folder / f"{ref}.log")
        for half in (expected[: len(expected) // 2], expected[len(expected) // 2 :]):
            drawn = {name: [number for step in half for number in step[name]] for name in names}
            wrong = wrong_with(drawn, {"numbered": 33, "counted": 12})
            cases.check(f"{ref}: every sample once", not wrong, wrong)
        cuts = (4,) if short else range(1, len(expected))
        ended = iter(forked([call for cut in cuts for call in calls(f"cut{len(names)}-{cut}", cut)]))
        for cut in cuts:
            killed, resumed = next(ended), next(ended)
            since = goes_on_after(resumed)
            found = logged(folder / f"cut{len(names)}-{cut}.log")
            held = killed.status == -9 and resumed.status == 0 and since == cut // 3 * 3
            held = held and found == expected[:cut] + expected[since:]
            cases.check(f"{ref}, cut after step {cut}", held, (killed.status, resumed.status, since, resumed.err[-300:]))
            count += 1
    return count


def logged(file: Path) -> list[dict[str, list[int]]]:
    """Step by step: dataset -> the numbers of its samples."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
