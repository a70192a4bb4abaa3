"""A run: everything that training needs, where it stands, and what it came to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from mtl.aside import Aside
from mtl.balancing import Balancer
from mtl.batches import Feed
from mtl.config import RunConfig
from mtl.data import Samples, Split
from mtl.decoding import Decoders
from mtl.guard import Guard
from mtl.locking import Lock
from mtl.model import MultiTaskModel, Outputs
from mtl.optim import L2
from mtl.processes import ALONE, Processes
from mtl.progress import Progress
from mtl.tracking import Rows, Tracker


@dataclass
class Run:
    """Everything a run needs, composed by `mtl.build`."""

    config: RunConfig
    directory: Path
    model: MultiTaskModel
    samples: Mapping[Split, Mapping[str, Samples]]
    feed: Feed
    balancer: Balancer
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    l2: L2
    autocast: Callable[[], AbstractContextManager[Any]]
    tracker: Tracker
    rows: Rows
    exchange_rows: Rows
    progress: Progress
    decoders: Decoders
    lock: Lock | None
    forward: Callable[[dict[str, Tensor]], Outputs]
    """The model, or what adds up its gradients over several processes."""
    processes: Processes = ALONE
    notes: list[str] = field(default_factory=list)
    """What is said when the run begins: which rule decided what, and why."""
    warm_up_seconds: float = 0.0
    """Spent on compiling before the first step."""
    shared_parameters: list[nn.Parameter] = field(init=False)
    parameters: list[nn.Parameter] = field(init=False)
    weights: Tensor = field(init=False)
    guard: Guard = field(init=False)
    aside: Aside = field(init=False)
    description: dict[str, Any] = field(init=False)
    """What a reader of weights needs beside them: tasks in order, with dataset, target and head, and what the network takes."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of the data, when they were first asked for: {"dataset, split": digits}."""

    def __post_init__(self) -> None:
        self.aside = Aside(self.directory, self.samples, self.processes.writes)
        self.shared_parameters = self.model.shared_parameters()
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.weights = torch.tensor([task.weight for task in self.model.tasks], device=device)
        self.guard = Guard(self.model, self.balancer, self.optimizer, self.schedule, self.weights)
        tasks = [{"name": t.name, "dataset": t.dataset, "target": t.target, **t.head.describe()} for t in self.model.tasks]
        images = next(iter(self.samples[Split.TRAIN].values())).images
        taken = {"shape": list(images.shape[1:]), "dtype": str(images.dtype).removeprefix("torch.")}
        self.description = {"tasks": tasks, "input": taken}

    def close(self) -> None:
        """End what runs beside the training: the processes that decode, and the writer of logs; let go of the directory.
        Whatever of it fails, or is interrupted, the rest is done.
        """
        with ExitStack() as last:
            if self.lock is not None:
                last.callback(self.lock.close)
            last.callback(self.tracker.close)
            self.decoders.close()


@dataclass
class Partial:
    """What has been trained of an epoch: steps, images, seconds, the losses of each task and of the objective, (T + 1,), summed
    over the images, labels by task, and the learning rates of the last step. `left_out` are the images of steps that were left
    out, which are in no loss and no label; `skipped_before` are the steps that were left out before the epoch.
    """

    losses: Tensor
    labels: list[int | Tensor]
    steps: int = 0
    images: int = 0
    left_out: int | Tensor = 0
    seconds: float = 0.0
    rates: dict[str, float] = field(default_factory=dict)
    skipped_before: int = 0
    over: bool = False
    """All of it is trained, and the balancer knows; it may not be validated yet."""

    @property
    def means(self) -> list[float]:
        """Of the losses so far, over the images of the steps that were taken; not numbers where none was."""
        means: list[float] = (self.losses / (self.images - self.left_out)).tolist()
        return means


@dataclass
class Best:
    """The weights that are best on validation data so far, as `weights_of` gives them; of which epoch, with which figures."""

    epoch: int
    figures: dict[str, Any] | None
    weights: dict[str, Tensor]

    @property
    def score(self) -> float:
        """On validation data; lower than any where there are none."""
        return -math.inf if self.figures is None else float(self.figures["score"])


@dataclass
class State:
    """Where a run stands: what training changes beside the model, the optimizer, the schedule and the balancer.

    `epoch` and `steps` are those that are over, the steps of `partial`, an epoch under way, included; `images` and
    `training_seconds` are those of whole epochs; `seconds` are those of earlier processes. `random` is where the random
    generators stood, to be put back when training goes on, and `restored` the checkpoint that all this is from.
    """

    epoch: int = 0
    steps: int = 0
    images: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0
    best: Best | None = None
    partial: Partial | None = None
    random: tuple[dict[str, Any], dict[str, Tensor]] | None = None
    restored: Path | None = None


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `val` and `test` are {task: {metric: value}} and `score`; None where there is no such split.

    `seconds` are those of training, validation and test; `warm_up_seconds`, of compiling, came before them, and
    `training_seconds` are those of optimizer steps alone. `peak_memory_bytes` is the most that the run held: of the GPU's
    memory, or of this process's (resident, libraries included); None where the system does not tell. `set_aside` is
    {dataset: {why: how many}} of what was not used; `steps_left_out`, of `steps`, had a loss or a gradient that is not finite;
    `processes` shared every batch. `images` are those of all epochs, each counted as often as it was seen; 0 in a run of an
    earlier version.
    """

    run_dir: str
    epochs: int
    best_epoch: int
    seconds: float
    images_per_second: float
    warm_up_seconds: float
    training_seconds: float
    peak_memory_bytes: int | None
    parameters: int
    parameters_frozen: int
    val: dict[str, Any] | None
    test: dict[str, Any] | None
    sharing: str
    seed: int
    steps: int
    device: str
    precision: str
    execution: str
    compile: str
    config_digest: str
    set_aside: dict[str, dict[str, int]]
    steps_left_out: int = 0
    processes: int = 1
    images: int = 0
