"""The arms of `benchmarks.throughput`: this framework, a plain PyTorch loop, and LibMTL.

Every arm runs in a process of its own and takes its turn when told to, so that none runs under another's allocator, threads
or autocast, and each has a peak of memory of its own. All train the same towers (`Workload`) on the same random images, whose
values do not matter to the time a step takes.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, islice, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import mtl
from benchmarks.machine import Machine, environment, peak_memory
from benchmarks.workloads import CLASSES, WORKLOADS, Workload, loader, on_gpu, tower
from mtl.batches import in_order
from mtl.build import run
from mtl.config import RunConfig
from mtl.execution import OneByOne
from mtl.hardware import memory_kept, usable_cores
from mtl.run import Run
from mtl.step import train_step

SETTLE = 4
"""Steps at the begin of every turn that are not timed: caches warm up, and what a loader fetched ahead is used up."""


class Arm(ABC):
    """Something that trains and infers, step by step, on demand."""

    precision = "fp32"

    @abstractmethod
    def __init__(self, workload: Workload, tasks: int, **keys: Any) -> None: ...

    @abstractmethod
    def train(self, steps: int) -> None:
        """Take this many optimizer steps, and wait until they are done."""

    @abstractmethod
    def infer(self, steps: int) -> None:
        """Predict this many batches, and wait until they are done."""

    def describe(self) -> dict[str, Any]:
        """What a reader of its figures should know."""
        return {"precision": self.precision}


class Ours(Arm):
    """The framework as `mtl train` runs it: the same feed, the same `train_step`."""

    def __init__(self, workload: Workload, tasks: int, **keys: Any) -> None:
        sharing = keys.pop("sharing", "cross_stitch")
        exchange = {"points": list(workload.points)} if sharing == "cross_stitch" else {}
        config = RunConfig(
            **{
                "tasks": [f"noise{t}" for t in range(tasks)],
                "backbone": workload.backbone,
                "sharing": {"kind": sharing, **exchange},
                "batch_size": workload.batch,
                "epochs": 10_000,  # rules take it for a long run
                "data": {
                    "validation": 0,
                    "datasets": {"noise": {"shape": workload.shape, "samples": workload.samples, "tasks": tasks}},
                },
                **keys,
            }
        )
        self._exit = ExitStack()
        folder = self._exit.enter_context(tempfile.TemporaryDirectory())
        self.run: Run = run(config, Path(folder) / "run")
        self._exit.enter_context(memory_kept())
        self.precision = self.run.config.precision
        self._steps = chain.from_iterable(self.run.feed.epoch(epoch) for epoch in range(1, sys.maxsize))

    def train(self, steps: int) -> None:
        """`train_step` over the feed."""
        self.run.model.train()
        sums = torch.zeros(())
        for step in islice(self._steps, steps):
            sums = train_step(self.run, step)
        sums.tolist()

    @torch.no_grad()
    def infer(self, steps: int) -> None:
        """Forward and decisions, as in evaluation."""
        self.run.model.eval()
        (part,) = self.run.samples[mtl.Split.TRAIN].values()
        batches = chain.from_iterable(in_order(part, self.run.config.batch_size) for _ in repeat(None))
        for batch in islice(batches, steps):
            with self.run.autocast():
                outputs = self.run.model({part.dataset: batch.images}).outputs
            decisions = [task.head.predictions(outputs[task.name]) for task in self.run.model.tasks]
        decisions[0].tolist()

    def describe(self) -> dict[str, Any]:
        """With the work of a step: FLOPs (2 per multiply-add), and the bytes that must move whatever the program.

        Bytes: every trained number is read with its gradient and Adam's two moments, and written with the moments and its
        gradient (32 B); every output of a convolution or fully connected layer is written once and read once each way.
        """
        outputs = 0

        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal outputs
            outputs += output.numel() * output.element_size()

        model = self.run.model
        hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        as_it_runs, model.execution = model.execution, OneByOne()  # of towers as one, torch counts other FLOPs, and hooks one
        model.train()
        with FlopCounterMode(display=False) as counter:
            train_step(self.run, next(self._steps))
        model.execution = as_it_runs
        for hook in hooks:
            hook.remove()
        parameters = self.run.model.parameter_count()
        config = self.run.config
        keys = {key: getattr(config, key) for key in ("device", "execution", "compile") if hasattr(config, key)}
        return {
            "precision": self.precision,
            **keys,
            "parameters": parameters,
            "flops_per_step": counter.get_total_flops(),
            "bytes_per_step": 32 * parameters + 4 * outputs,
        }


class PlainLoop(Arm):
    """The loop that a good engineer writes in an afternoon: a list of towers, one alpha per channel, a Python sum."""

    def __init__(self, workload: Workload, tasks: int, workers: int, exchange: bool = True) -> None:
        self.device = torch.device("cuda" if on_gpu() else "cpu")
        self.names = [f"task{t}" for t in range(tasks)]
        self.model = PlainStitched(workload, tasks, exchange).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.loss = nn.CrossEntropyLoss()
        self.training = epochs(loader(workload, tasks, self.names, True, workers))
        self.testing = epochs(loader(workload, tasks, self.names, False, workers))
        self.running = 0.0

    def train(self, steps: int) -> None:
        """Forward, sum of losses, backward, Adam."""
        self.model.train()
        for x, y in islice(self.training, steps):
            x = x.to(self.device, non_blocking=True)
            outputs = self.model(x)
            losses = [self.loss(o, y[n].to(self.device)) for o, n in zip(outputs, self.names, strict=True)]
            loss = sum(losses[1:], losses[0])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.running += loss.item()

    @torch.no_grad()
    def infer(self, steps: int) -> None:
        """Forward and argmax."""
        self.model.eval()
        decisions = torch.zeros(0)
        for x, _ in islice(self.testing, steps):
            for output in self.model(x.to(self.device, non_blocking=True)):
                decisions = output.argmax(1)
        decisions.tolist()


class PlainStitched(nn.Module):
    """T towers in blocks; after each block but the last x~_t = sum_s alpha[t, s] x_s per channel."""

    def __init__(self, workload: Workload, tasks: int, exchange: bool) -> None:
        super().__init__()
        towers = [tower(workload) for _ in range(tasks)]
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Sequential(*(getattr(one, name) for name in block)) for one in towers) for block in workload.blocks
        )
        channels, x = [], torch.zeros(2, *workload.shape)
        with torch.no_grad():
            for block in self.blocks:
                x = block[0](x)  # type: ignore[index]
                channels.append(x.shape[1])
        start = torch.eye(tasks)[:, :, None]
        stitches = channels[:-1] if exchange else []
        self.alphas = nn.ParameterList(nn.Parameter(start.repeat(1, 1, c)) for c in stitches)
        self.heads = nn.ModuleList(nn.Linear(channels[-1], CLASSES) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> T logits (B, classes)."""
        features = [x] * len(self.heads)
        for i, block in enumerate(self.blocks):
            features = [block[t](f) for t, f in enumerate(features)]  # type: ignore[index]
            if i < len(self.alphas):
                alpha = self.alphas[i].view(*self.alphas[i].shape, *[1] * (features[0].ndim - 2))
                features = [sum(a * f for a, f in zip(row, features, strict=True)) for row in alpha]
        return [head(f.flatten(1)) for head, f in zip(self.heads, features, strict=True)]


def epochs(batches: DataLoader[Any]) -> Iterator[Any]:
    """A loader's batches, epoch after epoch."""
    while True:
        yield from batches


class LibMTL(Arm):
    """LibMTL's trainer with its cross-stitch architecture on the same towers; the loop body is that of its `train_singlelevel`.

    Its cross-stitch knows ResNets by their attribute names, so a tower shows its blocks under these. Its trainer names a CUDA
    device, which is replaced by the one there is.
    """

    def __init__(self, workload: Workload, tasks: int, workers: int, checkout: str) -> None:
        sys.path.insert(0, checkout)
        for name in (
            "torch_geometric",
            "qpsolvers",
            "cvxpy",
        ):  # imported for graphs and for other weightings, never called here
            if find_spec(name) is None:
                sys.modules[name] = MagicMock()
        from LibMTL import Trainer  # type: ignore[import-not-found]
        from LibMTL.loss import CELoss  # type: ignore[import-not-found]
        from LibMTL.metrics import AccMetric  # type: ignore[import-not-found]

        device = torch.device("cuda" if on_gpu() else "cpu")
        names = [f"task{t}" for t in range(tasks)]
        task = {name: {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]} for name in names}

        class Here(Trainer):  # type: ignore[misc]
            device = property(lambda self: device, lambda self, value: None)

        width = {"small_cnn": 1024, "resnet18": 512, "resnet50": 2048}[workload.backbone]
        self.trainer = Here(
            task_dict=task,
            weighting="EW",
            architecture="Cross_stitch",
            encoder_class=lambda: AsResNet(workload),
            decoders=nn.ModuleDict({name: nn.Sequential(nn.Flatten(), nn.Linear(width, CLASSES)) for name in names}),
            rep_grad=False,
            multi_input=False,
            optim_param={"optim": "adam", "lr": 1e-3},
            scheduler_param=None,
            weight_args={},
            arch_args={},
        )
        self.training = self.trainer._prepare_dataloaders(loader(workload, tasks, names, True, workers))[0]
        self.testing = self.trainer._prepare_dataloaders(loader(workload, tasks, names, False, workers))[0]
        model = self.trainer.model
        model.train_loss_buffer, model.epoch, model.epochs = np.zeros([tasks, 1]), 0, 1

    def train(self, steps: int) -> None:
        """Its own methods in its own order."""
        trainer = self.trainer
        trainer.model.train()
        for _ in range(steps):
            x, y = trainer._process_data(self.training)
            losses, outputs = trainer.forward4loss(trainer.model, x, y, return_preds=True)
            trainer.meter.update(outputs, y)
            trainer.optimizer.zero_grad(set_to_none=False)
            trainer.model.backward(torch.stack([losses]).squeeze(0))
            trainer.optimizer.step()

    @torch.no_grad()
    def infer(self, steps: int) -> None:
        """As its `test` does, loss and metrics left out, as they are elsewhere."""
        trainer = self.trainer
        trainer.model.eval()
        decisions = torch.zeros(0)
        for _ in range(steps):
            x, _y = trainer._process_data(self.testing)
            for output in trainer.process_preds(trainer.model(x)).values():
                decisions = output.argmax(1)
        decisions.tolist()


class AsResNet(nn.Module):
    """A tower's blocks under the names that LibMTL's cross-stitch looks for."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        network = tower(workload)
        first, *rest = ([getattr(network, name) for name in block] for block in workload.blocks)
        stem = first[:-1] if len(first) > 1 else []
        for name, module in zip(("conv1", "bn1", "relu", "maxpool"), [*stem, *[nn.Identity()] * 4], strict=False):
            setattr(self, name, module)
        self.layer1 = first[-1]
        self.layer2, self.layer3, self.layer4 = (nn.Sequential(*block) for block in rest)


def serve(pipe: Connection, kind: str, workload: str, tasks: int, keys: dict[str, Any]) -> None:
    """The life of an arm's process: build, then do what the pipe says. Answers are ("ok", value) or ("error", text)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides when to stop
    sys.stdout = sys.stderr  # LibMTL prints; standard output is for the table
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    import_module("torch._inductor.compile_fx")  # the compiler's code counts for no arm, as that of other libraries does not

    before = peak_memory()
    try:
        tasks = keys.pop("tasks", tasks)
        arm: Any = Machine() if kind == "machine" else KINDS[kind](WORKLOADS[workload], tasks, **keys)
        pipe.send(("ok", None))
        while True:
            word, *arguments = pipe.recv()
            if word == "end":
                break
            if word in ("train", "infer"):
                steps = arguments[0]
                work = getattr(arm, word)
                work(min(SETTLE, steps))
                started = time.perf_counter()
                work(steps)
                pipe.send(("ok", (time.perf_counter() - started) / steps))
            elif word == "memory":
                pipe.send(("ok", peak_memory() - before))
            elif word == "environment":
                pipe.send(("ok", environment()))
            else:
                pipe.send(("ok", getattr(arm, word)()))
    except EOFError:
        pass  # the parent is gone
    except Exception as error:  # whatever it is, the parent has to know
        pipe.send(("error", f"{type(error).__name__}: {error}"))


KINDS: dict[str, type[Arm]] = {"ours": Ours, "plain": PlainLoop, "libmtl": LibMTL}
