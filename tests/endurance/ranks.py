"""A program for `torchrun`, or alone: trains and evaluates tiny datasets of every size, and writes what came of each.

python tests/endurance/ranks.py OUT.json N,N,...
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import mtl


class Size(mtl.Options):
    """How many samples each split has."""

    n: int = 1


@mtl.register_dataset("ranks", options=Size)
def ranks(split: mtl.Split, root: Path, options: Size) -> mtl.ArrayDataset:
    """Numbers and two labels, one more in training; only the first two have the label `rare`, which most processes lack."""
    n = options.n + (split == mtl.Split.TRAIN)
    images = np.random.default_rng([n, list(mtl.Split).index(split)]).normal(size=(n, 6)).astype(np.float32)
    order = np.arange(n)
    return mtl.ArrayDataset(images, {"kind": order % 2, "rare": order % 2}, {"rare": order < 2})


mtl.register_task("ranks_kind")(lambda: mtl.Task("ranks", "kind", mtl.Classification(("a", "b"))))
mtl.register_task("ranks_rare")(lambda: mtl.Task("ranks", "rare", mtl.Classification(("no", "yes"))))


@mtl.register_backbone("ranks_norm")
def norm(input_shape: tuple[int, ...]) -> nn.Module:
    """With batch norm, whose statistics are each process's own while it trains."""
    return nn.Sequential(nn.Linear(input_shape[0], 8), nn.BatchNorm1d(8), nn.Tanh())


@mtl.register_backbone("ranks_plain")
def plain(input_shape: tuple[int, ...]) -> nn.Module:
    """No batch norm, which sees a batch, and no dropout, which draws."""
    return nn.Sequential(nn.Linear(input_shape[0], 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())


def config(n: int, backbone: str = "ranks_plain") -> mtl.RunConfig:
    """Of a run over n samples, in batches of 5."""
    tree: dict[str, Any] = {
        "tasks": ["ranks_kind", "ranks_rare"],
        "backbone": backbone,
        "sharing": {"kind": "cross_stitch", "points": ["0"], "init": {"same": 0.9, "cross": 0.1}},
        "data": {"validation": 0, "workers": 0, "datasets": {"ranks": {"n": n}}},
        "epochs": 2,
        "batch_size": 5,
        "device": "cpu",
        "precision": "fp32",
        "compile": "none",
    }
    return mtl.RunConfig(**tree)


def main() -> None:
    """Train each, and write what came of it."""
    out, sizes = Path(sys.argv[1]), [int(n) for n in sys.argv[2].split(",")]
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            try:
                result = mtl.train(config(n), Path(folder) / str(n))
            except mtl.MTLError as error:
                found[n] = {"error": str(error)}
                continue
            log = Path(result.run_dir) / "metrics.jsonl"
            rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
            found[n] = {"test": result.test, "train": rows}
        tested = [mtl.train(config(n, "ranks_norm"), Path(folder) / f"norm{n}") for n in sizes]
        if os.environ.get("RANK", "0") == "0":
            for n, result in zip(sizes, tested, strict=True):
                found[n] |= {"norm": result.test, "norm, read back": mtl.evaluate_run(result.run_dir)}
            out.write_text(json.dumps(found))
        if dist.is_initialized():
            dist.barrier()  # the folder is gone with the first


if __name__ == "__main__":
    main()
