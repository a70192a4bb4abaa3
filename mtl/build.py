"""From a config to a ready run: the only place where everything is composed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mtl.auto import autocast, choose_execution, compile_units, resolved
from mtl.balancing import Balancer
from mtl.batched import Batched
from mtl.batches import Feed
from mtl.checkpoints import read_weights_file, weights_file
from mtl.choices import Choice
from mtl.config import RunConfig, load
from mtl.data import Samples, Split, checked_splits, data_root, fit_heads, read_splits
from mtl.decoding import Decoders
from mtl.duplicates import warnings_of
from mtl.errors import ConfigError, DataError, PluginError, RunError, listing, unknown
from mtl.evaluation import evaluate, has_unused, mean_score, try_tasks
from mtl.factory import backbone_maker
from mtl.files import Reading
from mtl.hardware import memory_kept
from mtl.locking import Lock
from mtl.model import MultiTaskModel
from mtl.optim import L2, make_optimizer, make_schedule
from mtl.outliers import warnings_of_labels
from mtl.portions import Portion
from mtl.processes import ALONE, Processes, joined
from mtl.progress import Progress, Silent
from mtl.registry import BACKBONES, BALANCERS, DATASETS
from mtl.resizing import brought_to, common_shape, in_shape
from mtl.run import Run, RunResult
from mtl.rundir import make_directory, refuse_unusable
from mtl.sharing import Sharing
from mtl.standardize import Standardize
from mtl.task import Task, check_name, make_task
from mtl.tracking import Nowhere, Rows, TensorBoard
from mtl.trainer import fit
from mtl.warm_start import source, start_from
from mtl.weights import load_weights, read_description


def train(config: RunConfig, run_dir: str | Path | None = None, progress: Progress | None = None) -> RunResult:
    """Train one run: checks everything, then trains, then reads the test split once. Processes that `torchrun` started train it
    together, the first of them writes, and all return what it came to.

    Args:
        config: what to train.
        run_dir: where its files go; must not hold a run. None: a fresh folder under `runs/`.
        progress: what to show meanwhile; None: nothing.

    Raises:
        MTLError: anything a user can mend. Nothing already written is overwritten.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError([f"mtl.train takes an mtl.RunConfig, as mtl.load_config gives; found {type(config).__name__}"])
    with joined(config.device) as processes:
        return fit(run(config, run_dir, progress, processes))


def run(
    config: RunConfig,
    run_dir: str | Path | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Run:
    """Everything a run needs, built and checked; only then is its directory made, after a trial whether it can be."""
    processes.first(lambda: refuse_unusable(run_dir))
    return composed(resolved(config), progress, lambda config: make_directory(run_dir, config), processes=processes)


def composed(
    config: RunConfig,
    progress: Progress | None,
    place: Callable[[RunConfig], tuple[Path, Lock]],
    begins_after: int | None = None,
    processes: Processes = ALONE,
) -> Run:
    """A run of a resolved config.

    Args:
        config: whose `auto`s about execution and compiling are still to be resolved.
        progress: what to show meanwhile; None: nothing.
        place: gives the run's directory, once everything else is there; called by the first process.
        begins_after: how many steps are done; weights are then to be restored, and not begun with. None: it is a new run.
        processes: that train it together, with this one.
    """
    with ExitStack() as on_failure:
        decoders = make_decoders(config)
        on_failure.callback(decoders.close)
        shown = progress if processes.writes else None
        made = _composed(config, shown, place, begins_after, decoders, processes, on_failure)
        on_failure.pop_all()
    return made


def _composed(
    config: RunConfig,
    progress: Progress | None,
    place: Callable[[RunConfig], tuple[Path, Lock]],
    begins_after: int | None,
    decoders: Decoders,
    processes: Processes,
    on_failure: ExitStack,
) -> Run:
    tasks = make_tasks(config)
    samples = processes.in_turn(lambda: load_data(config, tasks, decoders=decoders))
    tasks = fitted(config, tasks, samples[Split.TRAIN])
    config, samples, brought = in_one_shape(config, samples)
    model = model_of(config, tasks, input_shape(samples[Split.TRAIN]), pretrained=begins_after is None)
    for name, standardize in model.inputs.items():
        assert isinstance(standardize, Standardize)
        standardize.fit(samples[Split.TRAIN][name])
    if begins_after is None:
        start_from(model, {task: source(task, given) for task, given in config.init_from.items()})
    model.freeze(config.optim.freeze)
    feed = make_feed(config, samples[Split.TRAIN], processes)
    balancer = make_balancer(config.balancer, tasks).to(config.device)
    if processes.count > 1 and not balancer.in_parallel:
        raise ConfigError([f"balancer {config.balancer.name!r} works in one process only; found {processes.count}; use fixed"])
    exchange = [p for unit in model.exchange().values() for p in unit.parameters()]
    optimizer = make_optimizer(config.optim, model, exchange, balancer.optimised(), config.sharing.unit_lr_factor)
    total = min(feed.steps_per_epoch * config.epochs, config.max_steps or sys.maxsize)
    if config.optim.accumulate > 1 and not balancer.additive:
        raise ConfigError(
            [
                f"optim.accumulate={config.optim.accumulate}: balancer {config.balancer.name!r} is not additive over "
                "micro-batches; use accumulate=1, or balancer=fixed"
            ]
        )
    execution, why_not = choose_execution(config, model, samples[Split.TRAIN])
    config = config.replaced(execution=execution)
    try_tasks(model, samples[Split.TRAIN], autocast(config))
    compiled, notes, seconds = compile_units(config, model, samples[Split.TRAIN], total)
    config = config.replaced(compile=compiled)
    schedule = make_schedule(config.optim, optimizer, total, feed.steps_per_epoch)
    forward = processes.parallel(model, lambda: has_unused(model, samples[Split.TRAIN], autocast(config)))
    held: list[Lock] = []

    def placed() -> Path:
        directory, lock = place(config)
        on_failure.callback(lock.close)
        held.append(lock)
        return directory

    directory = processes.first(placed)
    begins = None if begins_after is None else begins_after + 1
    try:
        tracker = TensorBoard(directory / "tb", begins) if processes.writes else Nowhere()
    except OSError as error:
        raise RunError(f"cannot write {str(directory / 'tb')!r}: {error.strerror or error}") from None
    on_failure.callback(tracker.close)
    return Run(
        config=config,
        directory=directory,
        model=model,
        samples=samples,
        feed=feed,
        balancer=balancer,
        optimizer=optimizer,
        schedule=schedule,
        l2=L2(optimizer, config.optim.l2),
        autocast=autocast(config),
        tracker=tracker,
        rows=Rows(directory / "metrics.jsonl", processes.writes),
        exchange_rows=Rows(directory / "exchange.jsonl", processes.writes),
        progress=progress or Silent(),
        decoders=decoders,
        lock=held[0] if held else None,
        forward=forward,
        processes=processes,
        notes=[*brought, *warnings_of(samples), *warnings_of_labels(tasks, samples[Split.TRAIN]), *why_not, *notes],
        warm_up_seconds=seconds,
    )


def make_tasks(config: RunConfig) -> list[Task]:
    """The tasks of a config.

    Raises:
        ConfigError: options for a dataset that no task uses, or a task whose dataset is not registered; all of them.
    """
    tasks = [make_task(one.name, one.options, one.weight, one.plugin) for one in config.tasks]  # type: ignore[arg-type]
    known = sorted({*DATASETS.names(), *config.data.datasets})
    used = sorted({task.dataset for task in tasks})
    wrong = [f"task {t.name!r}: {unknown('dataset', t.dataset, known)}" for t in tasks if t.dataset not in known]
    wrong += [f"data.datasets: {unknown('dataset', n, used)} by these tasks" for n in config.data.datasets if n not in used]
    if wrong:
        raise ConfigError(wrong)
    return tasks


def make_decoders(config: RunConfig) -> Decoders:
    """Who decodes the image files of a resolved config; no process is started before it is needed."""
    assert isinstance(config.data.workers, int)
    return Decoders(config.data.workers)


def load_data(
    config: RunConfig, tasks: list[Task], splits: Sequence[Split] = tuple(Split), decoders: Decoders | None = None
) -> dict[Split, dict[str, Samples]]:
    """Split -> dataset name -> samples, on the device, in the order of dataset names."""
    samples: dict[Split, dict[str, Samples]] = {split: {} for split in Split}
    data = config.data
    portion = Portion(data.validation, data.fraction, data.labelled, data.split_seed)
    reading = Reading(decoders, data.bad_files)
    for name in sorted({task.dataset for task in tasks}):
        check_name("dataset", name)
        chosen = data.datasets.get(name, Choice(name))
        plugin = DATASETS.get(chosen.plugin or name)
        parts = read_splits(plugin, data_root(data.root), chosen.options, splits, bool(data.validation))
        mine = [task for task in tasks if task.dataset == name]
        for split, part in checked_splits(name, parts, mine, portion, config.device, splits, reading).items():
            samples[split][name] = part
    return samples


def fitted(config: RunConfig, tasks: Sequence[Task], training: Mapping[str, Samples]) -> list[Task]:
    """The tasks, their heads with what they take from the training samples.

    Raises:
        DataError: a head that cannot be learned from them.
    """
    try:
        return fit_heads(tasks, training)
    except DataError as error:
        data = config.data
        shares = [f"data.fraction={data.fraction:g}"] * (data.fraction < 1)
        shares += [f"data.labelled.{task.name}={data.labelled[task.name]:g}" for task in tasks if task.name in data.labelled]
        if not shares:
            raise
        raise DataError(f"with {' and '.join(shares)} (a larger share may do): {error}") from error


def in_one_shape(
    config: RunConfig, samples: Mapping[Split, Mapping[str, Samples]]
) -> tuple[RunConfig, dict[Split, dict[str, Samples]], list[str]]:
    """The samples with images of one shape, the config that says which if some were changed, and a line about those."""
    training = samples[Split.TRAIN]
    shape = common_shape(training, config.data.input_shape)
    changed = [f"{name} from {part.shape}" for name, part in training.items() if part.shape != shape]
    if changed:
        config = config.replaced(data=config.data.model_copy(update={"input_shape": shape}))
    found = {split: {name: brought_to(part, shape) for name, part in parts.items()} for split, parts in samples.items()}
    return config, found, [f"images are brought to {shape}: {', '.join(changed)}"] if changed else []


def make_feed(config: RunConfig, training: Mapping[str, Samples], processes: Processes = ALONE) -> Feed:
    """The batches of a config's epochs, or this process's share of them."""
    data = config.data
    return Feed(
        training,
        config.batch_size,
        config.optim.accumulate,
        config.seed,
        data.augment,
        config.epoch_steps,
        data.mixing,
        data.class_balanced,
        (processes.rank, processes.count),
    )


def input_shape(training: Mapping[str, Samples]) -> tuple[int, ...]:
    """The one shape of all samples, (C, H, W) or (D,).

    Raises:
        DataError: datasets whose samples differ in shape and cannot be brought to one.
    """
    return common_shape(training)


def model_of(config: RunConfig, tasks: list[Task], shape: tuple[int, ...], pretrained: bool = True) -> MultiTaskModel:
    """The network of a config, for samples of `shape`."""
    data = config.data.standardize
    return make_model(tasks, shape, config.backbone, config.sharing, data, config.seed, config.device, pretrained)


def make_model(
    tasks: Sequence[Task],
    shape: tuple[int, ...],
    backbone: Choice,
    sharing: Sharing,
    standardize: str,
    seed: int,
    device: str,
    pretrained: bool,
) -> MultiTaskModel:
    """The network on its device, for samples of `shape`; standardisation is not fitted yet."""
    make = backbone_maker(BACKBONES.get(backbone.name), shape, backbone.options)
    inputs = {name: Standardize(shape, standardize) for name in sorted({task.dataset for task in tasks})}
    model = MultiTaskModel(tasks, make, sharing, inputs, shape, seed, pretrained)
    model.to(device)
    for one in (*model.parameters(), *model.buffers()):
        if one.ndim == 4:  # of others there is no such layout
            one.data = one.data.to(memory_format=torch.channels_last)  # strides too where there is one channel
    return model


def make_balancer(choice: Choice, tasks: list[Task]) -> Balancer:
    """The balancer of a config, checked."""
    plugin = BALANCERS.get(choice.name)
    made = plugin.create([task.name for task in tasks], options=choice.options)
    if not isinstance(made, Balancer):
        raise PluginError(f"{plugin} must give an mtl.Balancer; found {type(made).__name__}")
    return made


def evaluate_run(
    run_dir: str | Path, split: str = Split.TEST, weights: str = "best", device: str = "auto", data: str | Path | None = None
) -> dict[str, Any]:
    """{task: {metric: value}} and `score` of a finished or interrupted run's weights on a split.

    Args:
        run_dir: of the run.
        split: train, val or test.
        weights: "best" or "last".
        device: to evaluate on.
        data: folder of the datasets; None: where the run found them.

    Raises:
        MTLError: not a run, no such split, or data that changed their shape.
    """
    directory = Path(run_dir)
    weights_file(directory, weights)
    if split not in tuple(Split):
        raise ConfigError([unknown("split", split, tuple(Split))])
    config, tasks = reopened(directory, device, data, weights)
    with make_decoders(config) as decoders, memory_kept():
        samples = load_data(config, tasks, [Split(split)], decoders)[Split(split)]
        if not samples:
            raise DataError(f"this run has no {split} split")
        samples = in_shape(samples, config.data.input_shape)
        model = model_with_weights(directory, config, tasks, input_shape(samples), weights)
        figures = evaluate(model, samples, 2 * config.batch_size, autocast(config))
    return {**figures, "score": mean_score(model.tasks, figures)}


def reopened(
    directory: Path, device: str, data: str | Path | None = None, weights: str = "best"
) -> tuple[RunConfig, list[Task]]:
    """A run's config for this machine, and its tasks with what their heads took from the training data.

    Args:
        directory: of the run.
        device: to compute on.
        data: folder of the datasets; None: where the run found them.
        weights: "best" or "last".
    """
    config = load(directory / "config.yaml")
    placed = config.data.model_copy(update={"root": data}) if data is not None else config.data
    config = resolved(config.replaced(device=device, data=placed, init_from={}))
    return config, restore_heads(make_tasks(config), read_weights_file(directory, weights, read_description))


def model_with_weights(
    directory: Path, config: RunConfig, tasks: list[Task], shape: tuple[int, ...], weights: str = "best"
) -> MultiTaskModel:
    """The network of a run that was `reopened`, for samples of `shape`, with its weights."""
    model = model_of(config, tasks, shape, pretrained=False)
    read_weights_file(directory, weights, lambda file: load_weights(file, model))
    if config.execution == "batched" and torch.device(config.device).type == "cuda":
        model.execution = Batched()
    return model


def restore_heads(tasks: Sequence[Task], description: Mapping[str, Any]) -> list[Task]:
    """The tasks, their heads as they were when weights with this description were written.

    Raises:
        RunError: it is of other tasks, or of heads that are none.
    """
    written = {task["name"]: task for task in description["tasks"]}
    if missing := [task.name for task in tasks if task.name not in written]:
        raise RunError(f"the weights are of other tasks, {listing(written)}, and not of {listing(missing)}")
    try:
        return [replace(task, head=task.head.restored(written[task.name])) for task in tasks]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"the heads that the weights are of cannot be made: {type(error).__name__}: {error}") from error
