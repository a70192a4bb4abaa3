"""Row 26: batch norm, with two datasets whose pixels are far apart.

What is promised of B's presence holds for towers that run one by one, of which every tensor has its own arithmetic. It does not
hold for dropout, whose masks all towers draw from one stream, nor for what ties tasks together by design: a norm that gradients
are clipped to, and an epoch that the larger dataset lays out (`epoch_steps` sets its length for both).
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mtl
from mtl.build import run
from mtl.checkpoints import weights_file
from mtl.config import RunConfig
from mtl.data import Split
from mtl.run import Run
from mtl.trainer import score_split, train_step
from mtl.weights import read_weights
from tests.endurance.rows import Cases, row

N = 64
MEANS = {"low": 0.0, "high": 10.0}


class Sized(mtl.Options):
    """How many training samples there are."""

    count: int = N


def register() -> None:
    """Two datasets of noise about their means, and a task of each."""
    for name, mean in MEANS.items():

        @mtl.register_dataset(f"row_{name}", options=Sized)
        def dataset(split: mtl.Split, root: Path, options: Sized, name: str = name, mean: float = mean) -> mtl.ArrayDataset:
            n = options.count if split == mtl.Split.TRAIN else N
            random = np.random.default_rng([split == mtl.Split.TRAIN, int(mean)])
            labels = np.arange(n) % 2
            images = random.normal(mean + labels[:, None, None, None], 1.0, (n, 1, 8, 8))
            return mtl.ArrayDataset(images.astype(np.float32), {"t": labels})

        mtl.register_task(f"row_{name}")(
            lambda name=name: mtl.Task(f"row_{name}", "t", mtl.Classification(("no", "yes")))  # type: ignore[misc]
        )


def config(*tasks: str, **more: Any) -> RunConfig:
    data = {"validation": 16, "standardize": "none", **more.pop("data", {})}
    backbone = {"name": "small_cnn", "width": 0.1, "dropout": 0}
    usual = {"batch_size": 16, "max_steps": 10, "epoch_steps": 5, "epochs": 2, "device": "cpu", "precision": "fp32"}
    tree = {"tasks": [f"row_{task}" for task in tasks], "backbone": backbone, "data": data, **usual, "compile": "none", **more}
    return RunConfig(**tree)


SHARINGS: dict[str, dict[str, Any]] = {
    "unshared": {"sharing": "unshared"},
    "hard_shared": {"sharing": "hard_shared"},
    "split": {"sharing": {"kind": "split", "at": "pool1"}},
    "cross_stitch": {"sharing": {"kind": "cross_stitch", "init": {"same": 0.8, "cross": 0.2}}},
    "cross_stitch, batched": {"sharing": {"kind": "cross_stitch", "init": {"same": 0.8, "cross": 0.2}}, "execution": "batched"},
    "unshared, batched": {"sharing": "unshared", "execution": "batched"},
    "frozen": {"sharing": "unshared", "optim": {"freeze": ["towers.row_low.pool1"]}},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "small_cnn": {},
    "small_cnn, standardised": {"data": {"standardize": "channel"}},
    "mlp": {"backbone": {"name": "mlp", "widths": [8, 8], "dropout": 0.2}},
}
ALONE: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd, l2, cosine": {"optim": {"name": "sgd", "lr": 0.05, "l2": 1e-3, "schedule": "cosine"}},
    "augmented": {"data": {"augment": {"crop": 1, "flip": True}}},
    "standardised": {"data": {"standardize": "channel"}},
    "micro-batches": {"optim": {"accumulate": 2}},
    "three times as many of B": {"data": {"datasets": {"row_high": {"count": 3 * N}}}},
    "mlp": {"backbone": {"name": "mlp", "widths": [8, 8], "dropout": 0}},
}


def state_of(of: Run) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in of.model.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same, bit for bit."""
    return [name for name in {**one, **other} if name not in one or name not in other or not same(one[name], other[name])]


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


def evaluation(cases: Cases, name: str, of: Run) -> None:
    """Train a little, evaluate, and look what that changed; then look at one sample among others."""
    of.model.train()
    before = state_of(of)
    for step in islice(of.feed.epoch(1), 3):
        train_step(of, step)
    trained = state_of(of)
    moved = [key for key in differing(before, trained) if key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    cases.check(f"{name}: training moves running statistics", bool(moved))
    modes = {key: module.training for key, module in of.model.named_modules()}
    for split in (Split.VAL, Split.TEST):
        score_split(of, split)
    changed = differing(trained, state_of(of))
    cases.check(f"{name}: evaluation changes no buffer and no weight", not changed, changed[:3])
    cases.check(f"{name}: evaluation gives training back", modes == {k: m.training for k, m in of.model.named_modules()})
    of.model.eval()
    images = {key: part.images[:16] for key, part in of.samples[Split.TEST].items()}  # type: ignore[index]
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        outputs = of.model(images).outputs
        for key in images:
            others = {k: 1000 * torch.randn(x.shape, generator=random) for k, x in images.items()}
            others[key][0] = images[key][0]
            among = of.model(others).outputs[key]
            cases.check(f"{name}: {key} is the same among others", same(outputs[key][0], among[0]))
            by_itself = of.model({key: images[key][:1]}).outputs[key]
            close = torch.allclose(by_itself[0], outputs[key][0], rtol=1e-4, atol=1e-5)
            cases.check(f"{name}: {key} by itself is the same, but for rounding", close, (by_itself[0], outputs[key][0]))


def trained(given: RunConfig, folder: Path) -> dict[str, Tensor]:
    """What becomes of task low: its tower, head and standardisation."""
    mtl.train(given, folder)
    tensors = read_weights(weights_file(folder, "last"))[0]
    return {name: value for name, value in tensors.items() if "row_high" not in name}


@row(26, "batch norm is honest")
def batch_norm_is_honest(folder: Path, short: bool) -> Cases:
    cases = Cases()
    register()
    for network, more in [*NETWORKS.items()][: 1 if short else None]:
        for kind, sharing in SHARINGS.items():
            if kind == "split" and network == "mlp":
                sharing = {"sharing": {"kind": "split", "at": "fc1"}}
            if kind == "frozen" and network == "mlp":
                sharing = {"optim": {"freeze": ["towers.row_low.fc1"]}}
            made = run(config("low", "high", **more, **sharing), folder / f"{network} {kind}")
            evaluation(cases, f"{network}, {kind}", made)
            made.close()
    for seed in range(1 if short else 3):
        for name, more in [*ALONE.items()][: 1 if short else None]:
            without = {**more, "data": {**more.get("data", {}), "datasets": {}}}
            alone = trained(config("low", seed=seed, **without), folder / f"{name}{seed} alone")
            orders = [("low", "high")] if short else [("low", "high"), ("high", "low")]
            for order in orders:
                beside = trained(config(*order, seed=seed, **more), folder / f"{name}{seed} {order[0]}")
                changed = differing(alone, beside)
                cases.check(f"unshared, {name}, seed {seed}, {order[0]} first: A is as without B", not changed, changed[:3])
    alone = trained(config("low", sharing="hard_shared"), folder / "shared alone")
    beside = trained(config("low", "high", sharing="hard_shared"), folder / "shared beside")
    cases.check("hard_shared: A is not as without B, and this is seen", bool(differing(alone, beside)))
    return cases
