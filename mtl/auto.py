"""What `auto` becomes, by fixed rules: device, precision, workers, execution, compiling. Never by a race (see the README)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtl.batchable import reason_against
from mtl.batched import Batched
from mtl.batches import first
from mtl.config import RunConfig
from mtl.data import Samples, data_root
from mtl.errors import ConfigError, MTLError, said
from mtl.hardware import computes_in_bf16, processes_here, usable_cores
from mtl.model import MultiTaskModel
from mtl.seeding import seeded
from mtl.warm_start import located

WORTH_COMPILING = 2e10
"""Multiply-adds of all exchange in a run from which compiling it pays: it takes 4 to 20 s and saves 1 ns on each or more."""


MOST_WORKERS = 16
"""Processes that decode, where `auto` decides: more photos a second than one device takes."""


def resolved(config: RunConfig) -> RunConfig:
    """The config with every `auto` replaced by what it became here, by fixed rules, and the data folder made absolute.

    device: CUDA where there is one, else the CPU. precision: bf16 on a CUDA device of compute capability 8 or more and on CPUs
    with bf16 instructions (AVX512-BF16, AMX), else fp32. data.workers: as many as the cores that this process may use, at most
    16; several processes of one training share them.
    """
    each = processes_here() > 1 and config.device.startswith("cuda")  # has its own, whichever the config was written on
    name, precision = usable("cuda" if each else config.device, config.precision)
    workers = (
        min(max(usable_cores() // processes_here(), 1), MOST_WORKERS) if config.data.workers == "auto" else config.data.workers
    )
    data = config.data.model_copy(update={"root": data_root(config.data.root).absolute(), "workers": workers})
    starts = {task: located(task, given) for task, given in config.init_from.items()}
    return config.replaced(device=name, precision=precision, data=data, init_from=starts)


def usable(device: str, precision: str) -> tuple[str, str]:
    """Device and precision, `auto` replaced by the rules of `resolved`.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError([f"device: {device!r} cannot be used here: {said(error)}; use auto or cpu"]) from None
    if precision == "auto":
        precision = "bf16" if computes_in_bf16(torch.device(device)) else "fp32"
    return device, precision


def autocast(config: RunConfig) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the context in which forward passes run."""
    return autocast_for(torch.device(config.device).type, config.precision)


def autocast_for(device_type: str, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the context in which forward passes run in this precision."""
    return partial(torch.autocast, device_type, dtype=torch.bfloat16, enabled=precision == "bf16")


def choose_execution(config: RunConfig, model: MultiTaskModel, training: Mapping[str, Samples]) -> tuple[str, list[str]]:
    """Set how the model's towers are run. `auto`, a rule: batched on CUDA where the network allows it, else one by one.

    Returns:
        What `execution` became, and what to say about it.

    Raises:
        ConfigError: `batched` was asked for, and the towers cannot be run as one network.
    """
    wanted = config.execution == "batched" or (config.execution == "auto" and torch.device(config.device).type == "cuda")
    if not wanted:
        return "towers", []
    if len(model.towers) < 2:
        return "towers", ["execution: there is a single tower, and nothing to batch"] if config.execution == "batched" else []
    with autocast(config)():
        images = {name: first(part, 2).images for name, part in training.items()}
        reason = reason_against(*model.towers_and_inputs(images))
    if reason is None:
        model.execution = Batched()
        slower = torch.device(config.device).type == "cpu"
        return "batched", ["towers run as one network, which a CPU does more slowly than one after the other"] if slower else []
    if config.execution == "batched":
        raise ConfigError([f"execution: towers cannot be batched: {reason}; execution=towers runs them one by one"])
    return "towers", [f"towers run one by one: {reason}"]


def compile_units(
    config: RunConfig, model: MultiTaskModel, training: Mapping[str, Samples], steps: int
) -> tuple[str, list[str], float]:
    """Compile the exchange units' arithmetic where the config says so, by one pass forth and back that changes nothing.

    `auto`, a rule: on a CPU, where all exchange of a run comes to `WORTH_COMPILING` multiply-adds or more, if compiling works.

    Returns:
        What `compile` became, what to say about it, and the seconds that it took.

    Raises:
        ConfigError: `units` was asked for, and they cannot be compiled here.
    """
    samples = sum(min(len(part), config.batch_size) for part in training.values()) * config.optim.accumulate
    worth = config.device == "cpu" and steps * samples * model.exchanged_products() >= WORTH_COMPILING
    if config.compile == "none" or (config.compile == "auto" and not worth):
        return "none", [], 0.0
    units = [unit for unit in model.exchange().values() if unit.compilable]
    if not units or config.execution == "batched":
        why = "towers run as one network, whose exchange is one product" if units else "no exchange unit has a compiled form"
        return "none", [f"compile: nothing is compiled: {why}"] if config.compile == "units" else [], 0.0
    images = {name: first(part, config.batch_size).images for name, part in training.items()}
    started = time.monotonic()
    for unit in units:
        unit.compiled = True
    try:
        with _quiet("torch.utils.cpp_extension"):  # it warns that there is no CUDA
            _pass_without_trace(config, model, images, [p for unit in units for p in unit.parameters()])
    except (MTLError, MemoryError, torch.OutOfMemoryError):  # would come without compiling as well
        raise
    except Exception as error:  # a compiler may be missing or broken in any way, and training needs none
        for unit in units:
            unit.compiled = False
        reason = f"exchange units cannot be compiled here: {said(error)}"
        if config.compile == "units":
            raise ConfigError([f"compile: {reason}; compile=none trains without"]) from error
        return "none", [reason], time.monotonic() - started
    seconds = time.monotonic() - started
    return "units", [f"compiled the exchange units in {seconds:.1f} s"], seconds


def _pass_without_trace(
    config: RunConfig, model: MultiTaskModel, images: Mapping[str, Tensor], exchange: Sequence[nn.Parameter]
) -> None:
    """Forth and back, as in training; parameters, buffers and random numbers are afterwards as before.

    Backward to the exchange alone where that is trained, which takes less memory than to all parameters.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with seeded(config.seed, "warm-up"), autocast(config)():
        model.train()
        outputs = functional_call(model, buffers, (images,)).outputs
    total = torch.stack([y.float().mean() for y in outputs.values()]).sum()
    trained = [p for p in exchange if p.requires_grad] or [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(total, trained, allow_unused=True)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Let a library's logger report errors only."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
