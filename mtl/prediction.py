"""Prediction: what a run says about images, folders of images and arrays.

A run directory is all that is needed: the weights file holds the class names, the standardisation and the shape of the input,
`config.yaml` the network. Plugins are asked only for what is their own code: a backbone, an exchange unit, a custom head.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtl.auto import autocast_for, usable
from mtl.build import make_model
from mtl.checkpoints import read_weights_file
from mtl.choices import choose, choose_sharing
from mtl.classification import Classification
from mtl.config import DataConfig, read_tree
from mtl.datasets import ArrayDataset
from mtl.errors import ConfigError, DataError, MTLError, PluginError, RunError
from mtl.heads import DataclassHead, Head
from mtl.images import SUFFIXES, read_image
from mtl.model import MultiTaskModel
from mtl.multilabel import MultiLabel
from mtl.ordinal import Ordinal
from mtl.progress import Progress, Silent
from mtl.registry import BACKBONES, TASKS
from mtl.regression import Regression
from mtl.task import Task, make_task
from mtl.weights import load_weights, read_description

BUNDLED: dict[str, type[DataclassHead]] = {kind.__name__: kind for kind in (Classification, MultiLabel, Ordinal, Regression)}
"""Heads that a description alone brings back."""
ARRAYS = (".npy", ".npz", ".safetensors")
NAMES = ("images", "features")
"""Of the array that is meant where a file holds several."""
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    OverflowError,
    MemoryError,
    TypeError,
    KeyError,
    BadZipFile,
    zlib.error,
    SafetensorError,
)
"""What a damaged file of arrays makes its reader raise."""


Source = str | Path | np.ndarray[Any, Any] | Tensor


@dataclass(frozen=True)
class Predictions:
    """What a run says.

    `predictions` holds one mapping per sample, in the order given: `path` (of a file), `index` (of a sample within an array)
    and `tasks`, task name -> what its head decodes. `failed` holds the files that could not be read: `path` and `reason`.
    """

    run_dir: str
    weights: str
    predictions: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Restored:
    """A run's network on its device, in evaluation mode, and what it takes.

    Call it with raw samples, as the dataset gave them to training: (N, *shape) of `dtype`. Standardisation is part of the
    model.

    `model` is the `torch.nn.Module`: {dataset name: samples} -> features and outputs by task; `shape` is of one sample,
    (C, H, W) or (D,); `dtype` that of the training data.
    """

    model: MultiTaskModel
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    precision: str
    arrays: frozenset[str] = frozenset()
    """Words in the options of the run's datasets, which arrays of a file may be called by."""

    @torch.no_grad()
    def __call__(self, samples: Any) -> dict[str, Tensor]:
        """Samples (N, *shape) -> task name -> output (N, ...), what the head's `decode` takes.

        Raises:
            DataError: another shape or dtype.
        """
        x = _checked(samples, "the array", self).to(self.device)
        outputs: dict[str, Tensor] = {}
        for dataset in self.model.inputs:  # every dataset's tasks see the samples as if they were its own
            with autocast_for(self.device.type, self.precision)():
                outputs |= self.model({dataset: x}).outputs
        return {task.name: outputs[task.name] for task in self.model.tasks}


def load_model(run_dir: str | Path, weights: str = "best", device: str = "auto") -> Restored:
    """The network of a run, restored from its directory alone.

    Args:
        run_dir: of a finished or interrupted run.
        weights: "best" or "last".
        device: as torch names it, or "auto".

    Raises:
        MTLError: not a run, no weights yet, or a plugin that the network needs is not there.
    """
    directory = Path(run_dir)
    description = read_weights_file(directory, weights, read_description)
    tree = read_tree(directory / "config.yaml")
    try:
        standardize = DataConfig(standardize=tree["data"]["standardize"]).standardize
        seed, written_precision = tree["seed"], tree["precision"]
        given_backbone, given_sharing = tree["backbone"], tree["sharing"]
        given_tasks = {one if isinstance(one, str) else one["name"]: one for one in tree["tasks"]}
        said = [options for options in tree["data"].get("datasets", {}).values() if isinstance(options, dict)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(
            f"{str(directory)!r} is incomplete, or of another version: {type(error).__name__}: {error}; was a file edited?"
        ) from error
    shape, dtype = tuple(description["input"]["shape"]), getattr(torch, description["input"]["dtype"])
    tasks = [restored_task(one, given_tasks) for one in description["tasks"]]
    name, precision = usable(device, written_precision)
    try:
        backbone, sharing = choose(BACKBONES, given_backbone), choose_sharing(given_sharing)
    except ValueError as error:
        raise RunError(
            f"the network of {str(directory)!r} cannot be built here: {error}; one that a plugin brings needs that plugin, "
            "installed or by --plugin FILE.py"
        ) from error
    model = make_model(tasks, shape, backbone, sharing, standardize, seed, name, pretrained=False)
    read_weights_file(directory, weights, lambda file: load_weights(file, model))
    arrays = frozenset(value for options in said for value in options.values() if isinstance(value, str))
    return Restored(model.eval(), shape, dtype, torch.device(name), precision, arrays)


def restored_task(described: Mapping[str, Any], given: Mapping[str, Any]) -> Task:
    """A task as a weights file describes it. A head of its own comes from its plugin, with the options `given` by task name.

    Raises:
        PluginError: the plugin with that head is not there; RunError: there is no such head.
    """
    name, kind = described["name"], described["head"]
    if kind in BUNDLED:
        try:
            head: Head = BUNDLED[kind].restored_from(described)
        except (TypeError, ValueError) as error:
            raise RunError(f"the head of task {name!r} cannot be made as it is described: {error}") from error
    else:
        try:
            choice = choose(TASKS, given.get(name, name))
            head = make_task(name, choice.options, of=choice.plugin).head.restored(dict(described))  # type: ignore[arg-type]
        except (MTLError, ValueError) as error:
            raise PluginError(
                f"task {name!r} has a head of its own, {kind}, and so needs its plugin, installed or by --plugin FILE.py: "
                f"{error}"
            ) from error
    return Task(described["dataset"], described["target"], head, name=name)


def predict(
    run_dir: str | Path,
    inputs: Sequence[Source] | Source,
    weights: str = "best",
    device: str = "auto",
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Predictions:
    """What a run says about these inputs, batch after batch.

    Args:
        run_dir: of the run.
        inputs: image files (JPEG, PNG), folders of them (searched whole), .npy, .npz or .safetensors files, or arrays
            (N, *shape), one or several. Of a file with several arrays that one is taken whose samples have the run's shape;
            of several of these the one that the run's config names, or `images` or `features`. Images of files are resized to
            the run's input; arrays must have its shape and dtype.
        weights: "best" or "last".
        device: as torch names it, or "auto".
        batch_size: images at a time.
        progress: what to show meanwhile; None: nothing.

    Raises:
        MTLError: not a run, an input that does not exist, an array of another shape. A single file that cannot be read is no
            error: it is listed in `failed`.
    """
    if batch_size < 1:
        raise ConfigError([f"batch_size={batch_size} must be at least 1"])
    if isinstance(inputs, str | Path | np.ndarray | Tensor):
        inputs = [inputs]
    run = load_model(run_dir, weights, device)
    result = Predictions(str(run_dir), weights)
    wanted = [source for given in inputs for source in _sources(given, run)]
    with progress or Silent() as shown:
        total = sum(len(source) for source in wanted)
        shown.begin("predicting", total)
        for rows, x in _batches(wanted, batch_size, run, result.failed):
            decoded = _decoded(run, x)
            result.predictions.extend({**row, "tasks": said} for row, said in zip(rows, decoded, strict=True))
            shown.step(len(result.predictions) + len(result.failed), None)
    return result


@dataclass(frozen=True)
class _Source:
    """One image file, or an array of samples."""

    path: str | None
    samples: np.ndarray[Any, Any] | Tensor | None = None

    def __len__(self) -> int:
        return 1 if self.samples is None else len(self.samples)


def _sources(given: Any, run: Restored) -> Iterator[_Source]:
    if not isinstance(given, str | Path):
        yield _Source(None, _as_samples(given, "the array", run))
        return
    path = Path(given)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"no images in folder {str(path)!r}; their names end in {', '.join(SUFFIXES)}")
        _need_images(run)
        yield from (_Source(str(file)) for file in files)
    elif not path.exists():
        raise DataError(f"no such file or folder: {str(path)!r}")
    elif path.suffix.lower() in ARRAYS:
        yield _Source(str(path), _as_samples(_array(path, run), str(path), run))
    else:
        _need_images(run)
        yield _Source(str(path))


def _need_images(run: Restored) -> None:
    if len(run.shape) != 3 or run.shape[0] not in (1, 3) or run.dtype != torch.uint8:
        raise DataError(
            f"this run takes {str(run.dtype).removeprefix('torch.')} samples of shape {run.shape}, which image files do not "
            "give; prepare arrays as for training and give them as .npy"
        )


def _array(path: Path, run: Restored) -> np.ndarray[Any, Any] | Tensor:
    """The samples in a file.

    Raises:
        DataError: it cannot be read, or which of its arrays is meant cannot be told.
    """
    try:
        if path.suffix.lower() == ".npy":
            mapped: np.ndarray[Any, Any] = np.load(path, allow_pickle=False, mmap_mode="r")
            return mapped
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as stored:
                name = _meant(path, list(stored.keys()), lambda name: stored.get_slice(name).get_shape(), run)
                tensor: Tensor = stored.get_tensor(name)
                return tensor
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
            array: np.ndarray[Any, Any] = found[_meant(path, found.files, lambda name: _shape(found, name), run)]
            return array
    except UNREADABLE as error:
        raise DataError(f"{str(path)!r} is no readable array: {error}") from error


def _meant(path: Path, names: Sequence[str], shape_of: Callable[[str], Sequence[int]], run: Restored) -> str:
    """Which of a file's arrays holds the samples: of those with the run's shape the one that the run's config names, or
    `images` or `features`, or the only one.
    """
    if len(names) == 1:
        return names[0]
    found = [name for name in names if run.shape in (tuple(shape_of(name)), tuple(shape_of(name))[1:])]
    for known in (run.arrays, NAMES):
        if len(found) > 1 and (called := [name for name in found if name in known]):
            found = called
    if len(found) != 1:
        raise DataError(
            f"{str(path)!r} holds {len(names)} arrays, {', '.join(sorted(names)[:8])}, and which has the samples cannot "
            f"be told: {len(found) or 'none'} of shape (N, {', '.join(map(str, run.shape))}); call one of them 'images'"
        )
    return found[0]


def _shape(found: Any, name: str) -> tuple[int, ...]:
    """Of an array of a .npz file; of one that cannot be read, none that anything has."""
    try:
        return tuple(found[name].shape)
    except ValueError:
        return (-1,)


def _as_samples(given: Any, where: str, run: Restored) -> np.ndarray[Any, Any] | Tensor:
    """An array with a sample axis; one sample gets one. Its first is checked at once, the others when their turn comes."""
    array = given if isinstance(given, Tensor | np.ndarray) else np.asarray(given)
    if array.ndim == 0:
        raise DataError(f"{where}: this run takes samples of shape {run.shape}; found no array")
    if tuple(array.shape) == run.shape:
        array = array[None]
    _checked(array[:1], where, run)
    return array


def _checked(array: Any, where: str, run: Restored) -> Tensor:
    """Samples as a tensor of the run's shape and dtype."""
    if len(run.shape) == 1 and isinstance(array, Tensor | np.ndarray):  # as vectors are read for training
        array = torch.as_tensor(np.array(array) if isinstance(array, np.ndarray) else array).to(run.dtype)
    try:
        x = ArrayDataset(array, labels={}).images
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if tuple(x.shape[1:]) != run.shape or x.dtype != run.dtype:
        wanted, found = ((str(t).removeprefix("torch."), tuple(s)) for t, s in ((run.dtype, run.shape), (x.dtype, x.shape[1:])))
        raise DataError(f"{where}: this run takes {wanted[0]} samples of shape {wanted[1]}; found {found[0]} {found[1]}")
    return x


def _batches(
    sources: Sequence[_Source], batch_size: int, run: Restored, failed: list[dict[str, str]]
) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
    """Rows without their predictions, and a batch (B, *shape), B at most `batch_size`."""
    rows: list[dict[str, Any]] = []
    parts: list[Tensor] = []
    for source in sources:
        if source.samples is not None:
            if parts:
                yield rows, torch.stack(parts)
                rows, parts = [], []
            named = {} if source.path is None else {"path": source.path}
            for i in range(0, len(source), batch_size):  # a file is mapped, so that one batch at a time is in memory
                piece = _checked(source.samples[i : i + batch_size], source.path or "the array", run)
                yield [{**named, "index": i + j} for j in range(len(piece))], piece
            continue
        assert source.path is not None
        try:
            image = read_image(source.path, run.shape[0], (run.shape[1], run.shape[2]))
        except DataError as error:
            failed.append({"path": source.path, "reason": str(error)})
            continue
        rows.append({"path": source.path})
        parts.append(image)
        if len(parts) == batch_size:
            yield rows, torch.stack(parts)
            rows, parts = [], []
    if parts:
        yield rows, torch.stack(parts)


def _decoded(run: Restored, x: Tensor) -> list[dict[str, Any]]:
    """Task name -> what its head decodes, for each sample."""
    outputs = run(x)
    of_task = {task.name: task.head.decode(outputs[task.name]) for task in run.model.tasks}
    return [{name: _finite(rows[i]) for name, rows in of_task.items()} for i in range(len(x))]


def _finite(value: Any) -> Any:
    """`value` with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction as one level of columns: `path`, `index`, `<task>.<key>`, `<task>.<key>.<class>`; lists joined by `;`."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            yield prefix, ";".join(map(str, value)) if isinstance(value, list) else value

    named = {key: row[key] for key in ("path", "index") if key in row}
    return {key: _inert(value) for key, value in {**named, **dict(walk("", row["tasks"]))}.items()}


def _inert(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula, made plain text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
