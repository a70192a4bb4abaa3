"""When a run is saved, what is saved of it, and how it is put back.

Between two steps a run is its network, balancer, optimizer, schedule, `State` and the random generators, and nothing else:
order and augmentation are functions of the seed, the epoch and the position. What `save` writes, `restore` puts
back to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtl.checkpoints import BEST, MODEL, STATE, STATE_FORMAT, TRAINING, folder_of, state_of
from mtl.commit import Content, commit, committed, number
from mtl.data import Split
from mtl.errors import RunError
from mtl.fingerprint import fingerprint
from mtl.interruption import Interruption
from mtl.memory import packed, unpacked
from mtl.run import Best, Partial, Run, State
from mtl.state import (
    group_values,
    load_group_values,
    load_optimizer_tensors,
    optimizer_tensors,
    random_tensors,
    random_values,
)
from mtl.strict_json import write_strict
from mtl.weights import load_weights, read_tensors, read_weights, weights_of, write_weights

SHARE = 0.01
"""Of the time that training may spend on saving itself, but for what is asked for by `checkpoints.every_steps`."""
Randomness = tuple[dict[str, Any], dict[str, Tensor]]
"""Where a process's random generators stand."""
NEW, KEPT = "checkpoint", "epoch"
"""How the folders' names begin: of those that make room for newer ones, and of those that stay."""


class Keeper:
    """Saves a run: from time to time, at the end of epochs, and when training is told to stop.

    Args:
        run: to save.
        state: where it stands, now and later.
        interruption: that may ask it to stop.
    """

    def __init__(self, run: Run, state: State, interruption: Interruption) -> None:
        self.run, self.state, self.interruption = run, state, interruption
        self.folder = folder_of(run.directory)
        self._last, self._cost = time.monotonic(), 0.0
        there = committed(self.folder)
        self._number = max(map(number, (folder.name for folder in there)), default=0)
        last = self._number if state.restored is None else number(state.restored.name)
        self._whole = sorted(n for n in map(number, (folder.name for folder in there)) if n <= last)
        self._began = time.monotonic()
        self._saved = None if state.restored is None else (state.steps, state.epoch)

    @property
    def newest(self) -> str:
        """What to say of the last one saved."""
        return "nothing is saved yet" if self._saved is None else f"step {self._saved[0]} is saved in {self.run.directory}"

    def between_steps(self) -> None:
        """Save if it is time to, and stop if that was asked for."""
        asked = self.run.config.checkpoints.every_steps
        due = self._waited(self.run.config.checkpoints.every_seconds) if asked is None else self.state.steps % asked == 0
        if self._agreed(due):
            self.save()

    def after_epoch(self) -> None:
        """Save an epoch that is over, validated and logged, if that is not too often; stop if that was asked for."""
        options = self.run.config.checkpoints
        stays = options.keep_every_epochs is not None and self.state.epoch % options.keep_every_epochs == 0
        kind = KEPT if stays else NEW
        if self._agreed(stays or (options.every_steps is None and self._waited(0.0)), kind):
            self.save(kind)

    def stop_if_asked(self, kind: str = NEW) -> None:
        """Save and stop, if that was asked for; where nothing that is saved is half done.

        Raises:
            KeyboardInterrupt, SystemExit: it was.
        """
        if self.interruption.signal is not None:
            self.save(kind)
            self.interruption.check()

    def save(self, kind: str = NEW) -> None:
        """Save the run as it is, unless that is done.

        Raises:
            RunError: it cannot be written; what was saved before is as it was.
        """
        now = (self.state.steps, self.state.epoch)
        if self._saved == now:
            return
        started = time.monotonic()
        self.run.guard.settle()
        ranks = self.run.processes.gather((random_values(), random_tensors()))
        self.run.processes.first(lambda: self._write(f"{kind}-{self._number + 1:06d}", ranks))
        self._number += 1
        self._whole.append(self._number)
        self._saved = now
        self._last = time.monotonic()
        self._cost = self._last - started

    def save_if_sound(self) -> None:
        """Save a run that cannot go on, unless its weights are spoiled: what it has learned, and its best weights, stay."""
        if all(bool(p.isfinite().all()) for p in self.run.model.parameters()):
            self.save()

    def _write(self, name: str, ranks: Sequence[Randomness]) -> None:
        """Write the checkpoint of this name."""
        with self.writing(f"save step {self.state.steps}", self.folder):
            self.run.rows.synchronise()
            self.run.exchange_rows.synchronise()
            self.run.tracker.flush()
            commit(self.folder, name, self._files(ranks), self._wanted)

    def _agreed(self, due: bool, kind: str = NEW) -> bool:
        """Whether all processes save now: if the first finds that it is time to. All stop if one of them was told to.

        Raises:
            KeyboardInterrupt, SystemExit: it was.
        """
        asked = self.interruption.signal
        agreed, number = self.run.processes.all_reduce_max([int(due and self.run.processes.writes), asked or 0])
        if number:
            self.interruption.agree(number)
        self.stop_if_asked(kind)
        return bool(agreed)

    @contextmanager
    def writing(self, what: str, folder: Path) -> Iterator[None]:
        """Say, of what cannot be written to a folder, what is saved.

        Raises:
            RunError: it cannot be written.
        """
        try:
            yield
        except (OSError, RunError) as error:
            raise RunError(
                f"cannot {what} in {str(folder)!r}: {getattr(error, 'strerror', None) or error}; "
                f"{self.newest}; mtl train --resume {self.run.directory} goes on from there"
            ) from error

    def _waited(self, seconds: float) -> bool:
        return time.monotonic() - self._last >= max(seconds, self._cost / SHARE)

    def _wanted(self, name: str) -> bool:
        """Whether a checkpoint stays, once the next is written. One that was found damaged does not count among those kept."""
        kept = [*self._whole, self._number + 1][-self.run.config.checkpoints.keep :]
        return name.startswith(KEPT) or number(name) >= kept[0]

    def _files(self, ranks: Sequence[Randomness]) -> dict[str, Content]:
        run, state = self.run, self.state
        model = weights_of(run.model, run.balancer)
        description = {**run.description, "epoch": state.epoch}
        files: dict[str, Content] = {MODEL: partial(write_weights, weights=model, description=description)}
        if (best := state.best) is not None:
            files[BEST] = partial(write_weights, weights=best.weights, description={**run.description, "epoch": best.epoch})
        values, tensors = taken(run, state, state.seconds + time.monotonic() - self._began, ranks)
        files[TRAINING] = partial(_write_tensors, tensors=tensors)
        files[STATE] = write_strict(values)
        return files


def taken(run: Run, state: State, seconds: float, ranks: Sequence[Randomness]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Everything beside the weights: values for `state.json`, and tensors by name. `ranks` says where the generators of every
    process stand.
    """
    part, best = state.partial, state.best
    values = {
        "format": STATE_FORMAT,
        "epoch": state.epoch,
        "steps": state.steps,
        "images": state.images,
        "training_seconds": state.training_seconds,
        "seconds": seconds,
        "best": None if best is None else {"epoch": best.epoch, "figures": best.figures},
        "partial": None
        if part is None
        else {
            "steps": part.steps,
            "images": part.images,
            "seconds": part.seconds,
            "left_out": int(part.left_out),
            "labels": [int(n) for n in part.labels],
            "rates": part.rates,
            "skipped_before": part.skipped_before,
            "over": part.over,
        },
        "guard": run.guard.memory(),
        "schedule": run.schedule.state_dict(),
        "groups": group_values(run.optimizer),
        "random": ranks[0][0],
        "ranks": [values for values, _ in ranks[1:]],
        "logs": {"metrics": run.rows.size(), "exchange": run.exchange_rows.size()},
        "order": run.feed.digest(state.epoch + 1),
        "data": fingerprints(run),
        "threads": torch.get_num_threads(),
    }
    tensors = {f"optimizer.{name}": value for name, value in optimizer_tensors(run.optimizer, names_of(run)).items()}
    for rank, (_, of_rank) in enumerate(ranks):
        tensors |= {f"{_random_of(rank)}.{name}": value for name, value in of_rank.items()}
    values["balancer"] = packed(run.balancer.memory(), tensors, "balancer")
    if part is not None:
        tensors["partial.losses"] = part.losses
    return values, {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def restore(run: Run, folder: Path) -> State:
    """Put back what was saved in a checkpoint that is whole. The random generators are put back when training begins.

    Raises:
        RunError: it is of another network, of other data, of a later version, or not what was written.
    """
    values, tensors = state_of(folder), read_tensors(folder / TRAINING)
    try:
        return _restored(run, folder, values, tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RuntimeError, OSError) as error:
        raise RunError(f"{str(folder)!r} is not what this version wrote: {type(error).__name__}: {error}") from error


def _restored(run: Run, folder: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> State:
    if others := sorted(values.keys() - taken(run, State(), 0.0, [(random_values(), random_tensors())])[0].keys()):
        raise ValueError(f"a state has no {others[0]!r}")
    found = fingerprints(run)
    if changed := [name for name, digest in values["data"].items() if found.get(name) != digest]:
        raise RunError(f"the data are not those that the run began with: {', '.join(changed)}; start a new run")
    if run.feed.digest(values["epoch"] + 1) != values["order"]:
        raise RunError("the samples of an epoch would come in another order than before; start a new run")
    load_weights(folder / MODEL, run.model, run.balancer)
    of = {kind: _under(kind, tensors) for kind in ("optimizer", "partial")}
    load_optimizer_tensors(run.optimizer, names_of(run), of["optimizer"])
    load_group_values(run.optimizer, values["groups"])
    run.balancer.recall(unpacked(values["balancer"], tensors), run.weights.device)
    if values["schedule"].keys() != run.schedule.state_dict().keys():  # it would take any for its attributes
        raise ValueError(f"a schedule of {', '.join(values['schedule'])}")
    run.schedule.load_state_dict(values["schedule"])
    run.guard.recall(values["guard"])
    logs = values["logs"]
    run.notes += filter(None, (run.rows.cut(logs["metrics"]), run.exchange_rows.cut(logs["exchange"])))
    part = values["partial"]
    return State(
        epoch=values["epoch"],
        steps=values["steps"],
        images=values["images"],
        training_seconds=values["training_seconds"],
        seconds=values["seconds"],
        best=None if values["best"] is None else Best(**values["best"], weights=read_weights(folder / BEST)[0]),
        partial=None if part is None else Partial(of["partial"]["losses"].to(run.weights.device), **part),
        random=_randomness(run.processes.rank, values, tensors),
        restored=folder,
    )


def names_of(run: Run) -> dict[nn.Parameter, str]:
    """Of every parameter of the network and the balancer."""
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    return names | {parameter: f"balancer.{name}" for name, parameter in run.balancer.named_parameters()}


def fingerprints(run: Run) -> dict[str, str]:
    """Of each split of each dataset."""
    if not run.fingerprints:
        for split in Split:
            run.fingerprints |= {f"{name}, {split}": fingerprint(part) for name, part in run.samples.get(split, {}).items()}
    return run.fingerprints


def _random_of(rank: int) -> str:
    """How the names begin of the tensors of a process's generators."""
    return f"random{rank}" if rank else "random"


def _randomness(rank: int, values: dict[str, Any], tensors: dict[str, Tensor]) -> Randomness | None:
    """Of the process of this rank; None where there was none: it begins as in a new run."""
    everybody = [values["random"], *values["ranks"]]
    return (everybody[rank], _under(_random_of(rank), tensors)) if rank < len(everybody) else None


def _under(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): value for name, value in tensors.items() if name.startswith(f"{kind}.")}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except Exception as error:  # safetensors has an error type of its own for a failed write
        raise RunError(str(error)) from error
