"""Where a run's figures go: TensorBoard, and rows of JSON. Another sink is a subclass of `Tracker` with three methods."""

from __future__ import annotations

import json
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl.writing import synchronise


class Tracker(ABC):
    """A sink for figures. Values are plain numbers: whoever calls has already paid for bringing them to the host."""

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Tag -> value, at an optimizer step."""

    @abstractmethod
    def image(self, tag: str, picture: NDArray[np.uint8], step: int) -> None:
        """A picture (H, W, 3), at an optimizer step."""

    @abstractmethod
    def close(self) -> None:
        """Write what is pending."""

    def flush(self) -> None:  # noqa: B027 (a sink that holds nothing back has nothing to do)
        """Write what is pending, and go on."""


class TensorBoard(Tracker):
    """An event file for `tensorboard --logdir`, on disk as soon as a figure is there: no thread of its own writes it, whose
    failure nobody would hear of.

    Args:
        folder: where it goes.
        purge_step: what earlier files there say of later steps is not shown; None: all of it is.

    Raises:
        OSError: it cannot be written; so do the other methods.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # a second, and only training needs it

        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._write([Event(wall_time=time.time(), file_version="brain.Event:2")])
        if purge_step is not None:
            begins = SessionLog(status=SessionLog.START)
            self._write([Event(wall_time=time.time(), step=purge_step, session_log=begins)])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        now = time.time()
        self._write([self._event(wall_time=now, step=step, summary=scalar(tag, value)) for tag, value in values.items()])

    def image(self, tag: str, picture: NDArray[np.uint8], step: int) -> None:
        from torch.utils.tensorboard.summary import image

        self._write([self._event(wall_time=time.time(), step=step, summary=image(tag, picture, dataformats="HWC"))])

    def close(self) -> None:
        return  # nothing is pending

    def _write(self, events: Sequence[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(self._path, "ab") as file:
            records = RecordWriter(file)
            for event in events:
                records.write(event.SerializeToString())


def log_hparams(folder: Path, settings: Mapping[str, str | float], figures: Mapping[str, float]) -> None:
    """A row of TensorBoard's HParams tab, in an event file of its own: what was set, and what came of it."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    with SummaryWriter(str(folder)) as writer:
        for summary in hparams(dict(settings), dict(figures)):
            writer.file_writer.add_summary(summary)
        for name, value in figures.items():
            writer.add_scalar(name, value)


class Nowhere(Tracker):
    """For a process whose figures another one writes."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def image(self, tag: str, picture: NDArray[np.uint8], step: int) -> None: ...
    def close(self) -> None: ...


class Rows:
    """`metrics.jsonl`: one row per epoch, split and task, on disk as soon as it is written; where another process `writes`,
    nothing.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self._path, self._writes = path, writes

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows."""
        if not self._writes:
            return
        with open(self._path, "a", encoding="utf-8", opener=_opened) as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)

    def size(self) -> int:
        """Bytes that are written."""
        return self._path.stat().st_size if self._path.exists() else 0

    def synchronise(self) -> None:
        """Wait until they are on the disk."""
        if self._path.exists():
            synchronise(self._path)

    def cut(self, size: int) -> str:
        """Forget what was written after the first `size` bytes.

        Returns:
            What to say where there are not as many, as when somebody removed the file; empty: nothing.

        Raises:
            ValueError: a size below zero.
            OSError: it cannot be written, or is a link.
        """
        if size < 0:
            raise ValueError(f"{self._path.name} of {size} bytes")
        whole = size
        if (missing := size - self.size()) > 0 and self._path.exists():
            whole = self._path.read_bytes().rfind(b"\n") + 1  # what is left of the last row would spoil the next
        if self._writes and self.size() > whole:
            with open(self._path, "ab", opener=_opened) as file:
                file.truncate(whole)
        return f"{self._path.name} lacks {missing:,} bytes of its rows; the run does not need them" if missing > 0 else ""


def _opened(path: str, flags: int) -> int:
    """Of a file to be written; not through a link, which may lead anywhere."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def draw_coupling(matrix: NDArray[np.float64], tasks: Sequence[str], title: str) -> NDArray[np.uint8]:
    """A labelled heat map of a (T, T) coupling matrix as a picture (H, W, 3): purple positive, orange negative, white zero."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only drawing needs it
    from matplotlib.figure import Figure

    side = 2.2 + 0.9 * len(tasks)
    figure = Figure(figsize=(side + 0.9, side), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    extent = max(1.0, float(np.abs(matrix).max()))
    picture = axes.imshow(matrix, cmap="PuOr", vmin=-extent, vmax=extent)
    ticks = range(len(tasks))
    axes.set_xticks(ticks, tasks, rotation=30, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(ticks, tasks, fontsize=9)
    axes.set_xlabel("from task")
    axes.set_ylabel("to task")
    axes.set_title(title, fontsize=10)
    for (row, column), value in np.ndenumerate(matrix):
        colour = "white" if abs(value) > 0.6 * extent else "black"
        axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(picture, ax=axes, shrink=0.8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
