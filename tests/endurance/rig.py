"""The run that is cut, killed and resumed: 2,048 real images as files, two tasks that exchange, batch norm, dropout,
augmentation, two processes that decode, 60 steps, a checkpoint every 5.

The images are Fashion-MNIST's first, or drawn shapes where it is not at hand. `digest` says in 64 digits where a run stands.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torchvision.io import write_png

import mtl
from mtl.checkpoints import STATE, newest

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
            write_png(images[i], str(root / "photos" / f"{i:04d}.png"))
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
