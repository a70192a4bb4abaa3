"""Makes the golden runs of the format of today: python -m tests.golden.make tests/golden/format-N

`finished` is a run to its end, `cut` the same one killed in the middle of an epoch, and `expected.json` what the run came to.
A format gets its folder when it is released, and the folder is never made again: later versions must read earlier ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import mtl
from mtl.checkpoints import BEST, MODEL, newest
from mtl.keeping import Keeper
from mtl.prediction import predict
from tests.golden import plugin

CUT_AFTER = 7
"""Steps: four are an epoch."""


def config() -> mtl.RunConfig:
    """Two towers that exchange, batch norm, dropout, augmentation, momentum and a schedule, in little."""
    return mtl.RunConfig(
        tasks=["golden_level", "golden_side"],
        backbone={"name": "small_cnn", "width": 0.05, "dropout": 0.2},
        sharing={"kind": "cross_stitch", "init": {"same": 0.9, "cross": 0.1}},
        data={"root": "/golden", "validation": 12, "augment": {"crop": 1, "flip": True}},
        optim={"schedule": "cosine", "warmup_epochs": 1},
        epochs=3,
        batch_size=12,
        checkpoints={"every_steps": 3},
        device="cpu",
        precision="fp32",
        compile="none",
    )


def weights_digest(run: Path) -> str:
    """SHA-256 of the weights of a run's newest checkpoint, the last and the best."""
    folder, _ = newest(run)
    found = hashlib.sha256()
    for file in (MODEL, BEST):
        for name, tensor in sorted(load_file(folder / file).items()):
            found.update(repr((file, name, str(tensor.dtype), tuple(tensor.shape))).encode())
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def predicted(run: Path, weights: str = "best") -> list[dict[str, Any]]:
    """What a run says of the test pictures."""
    images = plugin.golden(mtl.Split.TEST, Path()).images
    return predict(run, np.asarray(images), weights, device="cpu").predictions


def main(folder: Path) -> None:
    """Make a format's folder."""
    folder.mkdir()
    os.chdir(folder)  # no other folder is named in what is written
    torch.set_num_threads(1)
    result = mtl.train(config(), "finished")
    if not (child := os.fork()):
        between = Keeper.between_steps

        def killing(keeper: Keeper) -> None:
            between(keeper)
            if keeper.state.steps == CUT_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)

        Keeper.between_steps = killing  # type: ignore[method-assign]
        mtl.train(config(), "cut")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    said = {
        "weights": weights_digest(Path("finished")),
        "steps": result.steps,
        "val": result.val,
        "test": result.test,
        "predictions": [row["tasks"] for row in predicted(Path("finished"))],
    }
    Path("expected.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    for run in (Path("finished"), Path("cut")):
        shutil.rmtree(run / "tb")
        for name in (".lock", ".lock.json"):
            (run / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
