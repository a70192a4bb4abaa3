"""The run that is cut, killed and resumed: 2,048 real images as files, two tasks that exchange, batch norm, dropout,
augmentation, two processes that decode, 60 steps, a checkpoint every 5.

The images are Fashion-MNIST's first, or drawn shapes where it is not at hand. `digest` says in 64 digits where a run stands;
`rig` makes all of it once, with the digest and the pace of an uncut run.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import mtl
from mtl.checkpoints import STATE, newest
from tests.endurance.nursery import Ended, command, each, temporary
from tests.endurance.victims import BEGUN, OVER, SAVED, SAVING, TESTING, VALIDATING

IMAGES, STEPS, EVERY = 2048, 60, 5
TABLE = "rig.csv"
TIMES = ("seconds", "training_seconds")
"""What of a state, and of the part of an epoch in it, differs between two runs without meaning anything."""


def write_images(root: Path, count: int = IMAGES) -> None:
    """The files, and their table with two columns of labels: `kind`, and `group`, which goes with it."""
    from mtl_tasks.fashion import fashion_mnist
    from mtl_tasks.shapes import ShapesOptions, shapes

    found = Path(os.environ.get("MTL_DATA_ROOT", "data"))
    try:
        data = fashion_mnist(mtl.Split.TRAIN, found)
        images, labels = data.images, {"kind": data.labels["category"], "group": data.labels["group"]}
    except mtl.DataError:
        data = shapes(mtl.Split.TRAIN, found, ShapesOptions())
        grey = data.images.float().mean(1, keepdim=True).to(torch.uint8)
        images, labels = grey, {"kind": data.labels["kind"], "group": data.labels["count"]}
    (root / "photos").mkdir(parents=True)
    with open(root / TABLE, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", *labels])
        for i in range(count):
            Image.fromarray(images[i, 0].numpy()).save(root / "photos" / f"{i:04d}.png")
            table.writerow([f"photos/{i:04d}.png", *(f"{name}{int(of[i])}" for name, of in labels.items())])


def tree(root: Path, **changes: Any) -> dict[str, Any]:
    """The config of the run, as plain values. `root` holds what `write_images` wrote."""
    table = {"file": TABLE, "size": [28, 28], "channels": 1, "classes": {"kind": None, "group": None}, "test": 0.1}
    tasks = [{"name": name, "task": "column_class"} for name in ("kind", "group")]
    return {
        "tasks": tasks,
        "backbone": {"name": "small_cnn", "width": 0.1, "dropout": 0.2},
        "sharing": {"kind": "cross_stitch", "init": {"same": 0.9, "cross": 0.1}},
        "data": {
            "root": str(root),
            "validation": 0.1,
            "workers": 2,
            "augment": {"crop": 2, "flip": True},
            "datasets": {"csv_images": table},
        },
        "optim": {"schedule": "cosine", "warmup_epochs": 0.5},
        "epochs": 3,
        "max_steps": STEPS,
        "batch_size": 64,
        "checkpoints": {"every_steps": EVERY},
        "device": "cpu",
        "precision": "fp32",
        "compile": "none",
        **changes,
    }


def digest(run_dir: Path) -> str:
    """SHA-256 of where a run stands: of its newest checkpoint every tensor, by name, dtype, shape and bytes, and the state but
    for times; and the rows of its logs.
    """
    folder, _ = newest(run_dir)
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            found.update(repr((file.name, name, str(tensor.dtype), tuple(tensor.shape))).encode())
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    for part in (state, state["partial"] or {}):
        for time in TIMES:
            part.pop(time, None)
    found.update(json.dumps(state, sort_keys=True).encode())
    for log in ("metrics.jsonl", "exchange.jsonl"):
        found.update((run_dir / log).read_bytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Rig:
    """The data, a run's config, and what is known of the run that nobody disturbs."""

    folder: Path
    config: Path
    steps: int
    at_once: int
    """Runs that are tried at a time."""
    reference: str
    """Its digest."""
    pace: dict[str, float]
    """Seconds of that one: `start`, to the first save; `save`; `between`, from save to save; `validation`, `test`."""

    def begin(self, run_dir: Path, workers: int = 0) -> list[str]:
        """The arguments that start the run."""
        return ["train", str(self.config), "--run-dir", str(run_dir), f"data.workers={workers}"]

    def resume(self, run_dir: Path, workers: int = 0) -> list[str]:
        """The arguments that go on with it."""
        return ["train", "--resume", str(run_dir), f"data.workers={workers}"]

    def wrong(self, run_dir: Path, ended: Ended) -> str:
        """What is wrong with a run that should have ended as if nothing had been; "" if nothing is."""
        if ended.status:
            return f"exit status {ended.status}: {ended.said[-300:]}"
        return "" if digest(run_dir) == self.reference else "another digest"


@cache
def rig(short: bool) -> Rig:
    """Made once for all rows: in full, or a smaller one of 20 steps. One line of its table is set aside."""
    root = temporary()
    write_images(root, 640 if short else IMAGES)
    with open(root / TABLE, "a", encoding="utf-8") as file:
        file.write("photos/none.png\n")
    config, steps = root / "rig.yaml", 20 if short else STEPS
    config.write_text(yaml.safe_dump(tree(root, max_steps=steps)), encoding="utf-8")
    made = Rig(root, config, steps, 1 if short else 2, "", {})
    [ended] = each(lambda nursery, run_dir: nursery.run(run_dir, made.begin(run_dir)), [root / "uncut"], made.at_once)
    assert not ended.status, ended.said
    reference = digest(root / "uncut")
    if not short:  # and as a user starts it
        again = command(root / "again", made.begin(root / "again", 2))
        assert not again.status, again.said
        assert digest(root / "again") == reference, "workers change what is trained"
    begun, saving, saved = (ended.when(news) for news in (BEGUN, SAVING, SAVED))
    pace = {
        "start": saving[0] - begun[0],
        "save": median(b - a for a, b in zip(saving, saved, strict=True)),
        "between": median(b - a for a, b in zip(saved, saving[1:], strict=False)),
        "validation": saved[-1] - ended.when(VALIDATING)[-1],
        "test": ended.when(OVER)[0] - ended.when(TESTING)[0],
    }
    return replace(made, reference=reference, pace=pace)
