"""Rows 24 and 25: what is not finite never enters a run, and a task that explodes does not sink the others."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from torch import Tensor

import mtl
from mtl import step as step_module
from mtl.batches import Batch
from tests.endurance.parallel import environment, errors, torchrun
from tests.endurance.rows import Cases, row
from tests.endurance.spoiling import TASKS, attempts, config


@row(24, "NaN never enters the weights")
def not_a_number(folder: Path, short: bool) -> Cases:
    cases = Cases()
    for name, held, found in attempts(folder, 2 if short else 20):
        cases.check(name, held, found)
    world, out = 2, folder / "several.json"
    command = torchrun(world, "-m", "tests.endurance.spoiling", out, 1 if short else 20)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200, check=False)
    cases.check(f"{world} processes end", done.returncode == 0, errors(done.stderr) or done.stderr[-500:])
    for name, held, found in json.loads(out.read_text()) if out.exists() else []:
        cases.check(f"{world} processes, {name}", held, found)
    cases.notes.append("a pixel, a loss or a gradient is NaN or infinite at a random step; half of them read late, as on a GPU")
    cases.notes.append(f"then again in one of {world} processes: all leave the step out, and have the same weights")
    return cases


@row(25, "an exploding task does not sink the others")
def exploding(folder: Path, short: bool) -> Cases:
    cases = Cases()
    for seed in range(1 if short else 3):
        for task in TASKS:
            for begins in (0, 1, 15) if short else (0, 1, 5, 15, 20):
                real, calls = step_module.summed_loss, iter(range(10**6))

                def grown(of: mtl.Task, output: Tensor, batch: Batch) -> Tensor:
                    factor = 1e12 if of.name == task and next(calls) >= begins else 1.0  # noqa: B023
                    return real(of, output, batch) * factor  # noqa: B023

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(step_module, "summed_loss", grown)
                    try:
                        mtl.train(config(seed, epochs=4), folder / f"{task}-{seed}-{begins}")
                    except mtl.MTLError as error:
                        said = str(error)
                        named = f"the loss of {task} has been over" in said and f"up to step {begins + 10}," in said
                        cases.check(f"{task} from step {begins}, seed {seed}", named, said)
                    else:
                        cases.check(f"{task} from step {begins}, seed {seed}", False, "it went on")
    cases.notes.append("stopped after ten steps, naming it; what was saved before stays")
    return cases
