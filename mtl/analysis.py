"""What finished runs say beside their test figures: how they learned, what an ensemble of them predicts, what their exchange
does. Figures that take a pass over data are kept on disk, by the run's directory, and not computed twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl.ablation import ablate
from mtl.auto import autocast
from mtl.build import input_shape, load_data, model_with_weights, reopened
from mtl.config import RunConfig, load
from mtl.data import Samples, Split
from mtl.errors import RunError
from mtl.evaluation import evaluate
from mtl.hardware import memory_kept
from mtl.model import MultiTaskModel, Outputs
from mtl.progress import Progress, Silent
from mtl.resizing import in_shape
from mtl.sharing import Exchange
from mtl.task import Task
from mtl.writing import write_whole

EXCHANGE = ("split", "falls", "channels")
"""Keys of what is kept of a run's exchange."""
OF = "trainings"
"""The key that says of which trainings something is kept: a run that was removed and trained anew has other weights."""
QUANTILES = 65
"""Points of the curve of a unit's values per channel, in order of size."""


class Averaged(nn.Module):
    """Several models of the same tasks as one, whose outputs are the average of theirs, as each head averages."""

    def __init__(self, models: Sequence[MultiTaskModel]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.tasks = models[0].tasks

    def present(self, datasets: Sequence[str]) -> list[Task]:
        """The tasks of these datasets."""
        return [task for task in self.tasks if task.dataset in datasets]

    def forward(self, images: Mapping[str, Tensor]) -> Outputs:
        """As a model's; features are those of the first."""
        said = [model(images) for model in self.models]
        averages = {
            task.name: task.head.averaged([one.outputs[task.name] for one in said]) for task in self.present(list(images))
        }
        return Outputs(said[0].features, averages)


class Analyst:
    """Reads runs of one comparison.

    Args:
        folder: where figures are kept.
        device: to compute on.
        root: folder of the datasets; None: where the runs found them.
        progress: told of what takes long.
    """

    def __init__(self, folder: Path, device: str, root: Path | None = None, progress: Progress | None = None) -> None:
        self.folder, self.device, self.root, self.progress = folder, device, root, progress or Silent()
        self.unreadable: dict[str, str] = {}
        """Run -> why what it exchanges cannot be said."""
        self._loaded: tuple[str, dict[Split, dict[str, Samples]]] | None = None

    def ensemble(self, runs: Sequence[Path]) -> dict[str, Any]:
        """{task: figures} on the test split of runs of the same tasks, averaged.

        Raises:
            RunError: weights of one cannot be read.
        """
        members = " ".join(run.name for run in runs)
        name = f"ensemble-{sha256(members.encode()).hexdigest()[:12]}"
        tasks = [task.name for task in load(runs[0] / "config.yaml").tasks]
        return self._kept(name, runs, tasks, lambda: self._ensemble(runs))

    def has_exchange(self, run: Path) -> bool:
        """Whether what a run exchanges is on disk."""
        return self._read(run.name, [run], EXCHANGE) is not None

    def exchange(self, run: Path, label: str = "") -> dict[str, Any] | None:
        """Of a run's exchange units, by layer point: `coupling` over epochs and `channels` in order of size, of units that have
        them, and `falls`, the ablation on validation data (test data where there are none); None where there are no units, or
        where the run's weights cannot be read, which `unreadable` then says. `label` is what to call the run meanwhile.
        """
        if not isinstance(load(run / "config.yaml").sharing, Exchange):
            return None
        try:
            kept = self._kept(run.name, [run], EXCHANGE, lambda: self._exchange(run, label or run.name))
        except RunError as error:  # its scores stand in its result.json
            self.unreadable[run.name] = str(error)
            return None
        return {"coupling": trajectory(run), **kept}

    def _kept(
        self, name: str, runs: Sequence[Path], keys: Sequence[str], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        if (kept := self._read(name, runs, keys)) is not None:
            return kept
        found = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / f"{name}.json", json.dumps({OF: trainings(runs), **found}) + "\n")
        return found

    def _read(self, name: str, runs: Sequence[Path], keys: Sequence[str]) -> dict[str, Any] | None:
        """What is kept under a name of these very trainings; None where nothing is, or something else."""
        with suppress(OSError, ValueError):
            kept = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            if isinstance(kept, dict) and set(keys) <= kept.keys() and kept.get(OF) == trainings(runs):
                return {key: kept[key] for key in keys}
        return None

    def _samples(self, config: RunConfig, tasks: Sequence[Task]) -> dict[Split, dict[str, Samples]]:
        """Validation and test samples, as a run sees them; those of the last call are at hand."""
        key = json.dumps([config.model_dump(mode="json")["data"], [task.name for task in tasks]], sort_keys=True)
        if self._loaded is None or self._loaded[0] != key:
            loaded = load_data(config, list(tasks), (Split.VAL, Split.TEST))
            self._loaded = (key, {split: in_shape(parts, config.data.input_shape) for split, parts in loaded.items()})
        return self._loaded[1]

    def _ensemble(self, runs: Sequence[Path]) -> dict[str, Any]:
        models = []
        for run in runs:
            config, tasks = reopened(run, self.device, self.root)
            samples = self._samples(config, tasks)[Split.TEST]
            models.append(model_with_weights(run, config, tasks, input_shape(samples)))
        with memory_kept():
            return evaluate(Averaged(models), samples, 2 * config.batch_size, autocast(config))

    def _exchange(self, run: Path, label: str) -> dict[str, Any]:
        config, tasks = reopened(run, self.device, self.root)
        samples = self._samples(config, tasks)
        split = Split.VAL if samples[Split.VAL] else Split.TEST
        model = model_with_weights(run, config, tasks, input_shape(samples[split]))
        with memory_kept():
            falls = ablate(model, samples[split], 2 * config.batch_size, autocast(config), self.progress, label)
        channels = {}
        for point, unit in model.exchange().items():
            if (values := unit.channels()) is not None:
                at = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
                curve = values.detach().cpu().double().quantile(at, dim=2)  # (Q, T, T)
                channels[point] = curve.permute(1, 2, 0).tolist()
        return {"split": split, "falls": falls, "channels": channels}


def trainings(runs: Sequence[Path]) -> str:
    """Twelve digits of what finished runs came to, and when."""
    return sha256(b"".join((run / "result.json").read_bytes() for run in runs)).hexdigest()[:12]


def trajectory(run: Path) -> dict[str, dict[str, list[Any]]]:
    """Layer point -> `epochs` and `coupling` (T, T) at each, as the run noted them; empty where it exchanged nothing."""
    found: dict[str, dict[str, list[Any]]] = {}
    for row in whole_rows(run / "exchange.jsonl"):
        of_point = found.setdefault(row["point"], {"epochs": [], "coupling": []})
        of_point["epochs"].append(row["epoch"])
        of_point["coupling"].append(row["coupling"])
    return found


def whole_rows(log: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log; of a line that was cut off, and what follows it, nothing, and nothing of one that is not there."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def curves(run: Path) -> dict[str, dict[str, list[float]]]:
    """Task -> metric -> values on validation data after each epoch."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in whole_rows(run / "metrics.jsonl"):
        if row.pop("split") == "val":
            of_task = found.setdefault(row.pop("task"), {})
            for metric, value in row.items():
                if metric not in ("epoch", "step", "n"):
                    of_task.setdefault(metric, []).append(value)
    return found
