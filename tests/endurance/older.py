"""Row 13: runs that earlier versions wrote, and what a later version might write."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import mtl
from mtl.build import evaluate_run
from mtl.checkpoints import MODEL, STATE, newest, verify
from mtl.commit import MANIFEST, digest
from mtl.config import load
from mtl.rundir import environment
from tests.endurance.rows import Cases, row
from tests.golden.make import predicted, weights_digest

GOLDEN = Path(__file__).parents[1] / "golden"
CLOSE = 1e-6
"""As far apart as figures may be on another machine than the one that made them, which rounds otherwise."""


def far(one: Any, other: Any) -> float:
    """The largest difference between numbers of two trees that are otherwise alike; infinite where they are not."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max((far(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max(map(far, one, other), default=0.0)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other)
    return 0.0 if one == other else math.inf


def same_machine(run: Path) -> bool:
    """Whether a run was made where results are promised to the last bit: the versions, the processor, the threads of today."""
    made, now = json.loads((run / "env.json").read_text(encoding="utf-8")), environment(load(run / "config.yaml"))
    keys = ("versions", "device_name", "threads")
    return all(made[key] == now[key] for key in keys)


@row(13, "older checkpoints load")
def older_checkpoints(folder: Path, short: bool) -> Cases:
    cases, threads = Cases(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        formats = sorted(GOLDEN.glob("format-*"))
        cases.check("every format has its golden runs", [one.name for one in formats] == ["format-1"], formats)
        bitwise = [golden(cases, one, folder / one.name) for one in formats]
        later_versions(cases, formats[-1], folder)
    finally:
        torch.set_num_threads(threads)
    how = "bitwise: same machine and versions" if all(bitwise) else f"to {CLOSE:g}: another machine or version"
    cases.notes.append(f"{len(formats)} format: a run cut within an epoch and a finished one; compared {how}")
    return cases


def golden(cases: Cases, of: Path, folder: Path) -> bool:
    """Verify, resume, evaluate and predict with the golden runs of a format. Returns whether they were compared bitwise."""
    shutil.copytree(of, folder)
    expected = json.loads((of / "expected.json").read_text(encoding="utf-8"))
    cut, finished = folder / "cut", folder / "finished"
    exact, close = same_machine(finished), CLOSE
    for run in (cut, finished):
        faults = [one["faults"] for one in verify(run)]
        cases.check(f"{of.name}, {run.name}: every byte as written", faults == [[], []], faults)
    begun = json.loads((newest(cut)[0] / STATE).read_text(encoding="utf-8"))
    cases.check(f"{of.name}, cut: within an epoch", begun["partial"] and begun["steps"] < expected["steps"], begun["steps"])
    result = vars(mtl.resume(cut))
    for name in ("steps", "val", "test"):
        cases.check(f"{of.name}, cut: goes on to the same {name}", far(result[name], expected[name]) <= close, result[name])
    if exact:
        cases.check(f"{of.name}, cut: goes on to the last bit", weights_digest(cut) == expected["weights"])
        cases.check(f"{of.name}, finished: the weights of then", weights_digest(finished) == expected["weights"])
    again = mtl.resume(finished)
    cases.check(f"{of.name}, finished: left as it is", far(again.test, expected["test"]) == 0.0, again.test)
    figures = evaluate_run(finished, device="cpu")
    cases.check(f"{of.name}, finished: evaluates the same", far(figures, expected["test"]) <= close, figures)
    for run in (cut, finished):
        said = [one["tasks"] for one in predicted(run)]
        cases.check(f"{of.name}, {run.name}: predicts the same", far(said, expected["predictions"]) <= close)
    return exact


def later_versions(cases: Cases, of: Path, folder: Path) -> None:
    """A manifest, a state and weights of the next format are refused by name, and nothing is removed."""

    def manifest(checkpoint: Path) -> None:
        said = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        (checkpoint / MANIFEST).write_text(json.dumps({**said, "format": said["format"] + 1, "signed": True}), encoding="utf-8")

    def state(checkpoint: Path) -> None:
        said = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        (checkpoint / STATE).write_text(json.dumps({"format": said["format"] + 1, "at": said["steps"]}), encoding="utf-8")

    def weights(checkpoint: Path) -> None:
        with open(checkpoint / MODEL, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        metadata = {**header["__metadata__"], "format": str(int(header["__metadata__"]["format"]) + 1)}
        save_file(load_file(checkpoint / MODEL), checkpoint / MODEL, metadata=metadata)

    changes: dict[str, Callable[[Path], None]] = {"manifest": manifest, "state": state, "weights": weights}
    for name, change in changes.items():
        run = folder / f"later-{name}"
        shutil.copytree(of / "cut", run)
        checkpoint = newest(run)[0]
        change(checkpoint)
        if name != "manifest":
            reseal(checkpoint)
        before = {path: path.read_bytes() for path in sorted(checkpoint.rglob("*"))}
        for what, read in {
            "resume": lambda run=run: mtl.resume(run),
            "evaluate": lambda run=run: evaluate_run(run, weights="last", device="cpu"),
            "predict": lambda run=run: predicted(run, "last"),
        }.items():
            try:
                read()
            except mtl.RunError as error:
                cases.check(f"later {name}, {what}: says which to use", "use the version that wrote it" in str(error), error)
            except Exception as error:
                cases.check(f"later {name}, {what}", False, f"{type(error).__name__}: {error}"[:200])
            else:
                cases.check(f"later {name}, {what}", False, "it was read")
        after = {path: path.read_bytes() for path in sorted(checkpoint.rglob("*"))}
        cases.check(f"later {name}: is as it was", after == before)


def reseal(checkpoint: Path) -> None:
    """Make the manifest that of what the files hold now."""
    said = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    for name, about in said["files"].items():
        about |= {"bytes": (checkpoint / name).stat().st_size, "sha256": digest(checkpoint / name)}
    (checkpoint / MANIFEST).write_text(json.dumps(said), encoding="utf-8")
