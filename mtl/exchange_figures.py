"""The pictures of what is exchanged: units as heat maps, over training, and channel by channel; and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mtl.figures import COLOURS, DASHES, WIDTH, drawn, legend, legend_height, wrapped


def matrices(
    of: Mapping[str, Sequence[Sequence[float | None]]],
    tasks: Sequence[str],
    label: str,
    unit: str,
    least: float,
    identity: bool = False,
) -> str:
    """A heat map per layer point of (T, T) numbers, rows receiving from columns; purple positive, orange negative.

    `identity`: colours show the difference to it, so that it is white. Numbers below `least` have light colours.
    """
    columns = min(len(of), 4, max(1, int((WIDTH - 1.2) / (0.3 + 0.5 * len(tasks)))))
    names = [wrapped(task, 20) for task in tasks]

    def draw(figure: Figure) -> None:
        shown = {
            point: np.array([[np.nan if v is None else v for v in row] for row in rows], float) for point, rows in of.items()
        }
        shade = {point: m - identity * np.eye(len(tasks)) for point, m in shown.items()}
        extent = max(max((np.nanmax(np.abs(m)) for m in shade.values()), default=0.0), least)
        axes = figure.subplots(-(-len(of) // columns), columns, squeeze=False)
        for axis in axes.flat[len(of) :]:
            axis.set_visible(False)
        for i, (axis, (point, m)) in enumerate(zip(axes.flat, shown.items(), strict=False)):
            axis.imshow(shade[point], cmap="PuOr", vmin=-extent, vmax=extent)
            axis.set_title(point)
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
            axis.set_xticks(range(len(tasks)), names, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
            axis.set_yticks(range(len(tasks)), names if i % columns == 0 else [""] * len(tasks), fontsize=8)
            for (row, column), value in np.ndenumerate(m):
                if np.isfinite(value):
                    dark = abs(shade[point][row, column]) > 0.6 * extent
                    axis.text(
                        column, row, f"{value:{unit}}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
                    )
        figure.supxlabel("from task", fontsize=9)
        figure.supylabel("to task", fontsize=9)

    return drawn(-(-len(of) // columns) * (1.4 + 0.5 * len(tasks)) + 0.5, label, draw)


def trajectories(seeds: Sequence[Mapping[str, Any]], tasks: Sequence[str], label: str) -> str:
    """Coupling from each other task over training, a panel per layer point, a line per pair (mean over seeds), thin ones per
    seed. `seeds`: point -> {"epochs": [...], "coupling": [(T, T), ...]}.
    """

    def draw(figure: Figure) -> None:
        points = list(seeds[0])
        columns = min(len(points), 3)
        axes = figure.subplots(-(-len(points) // columns), columns, squeeze=False, sharey=True)
        for axis in axes.flat[len(points) :]:
            axis.set_visible(False)
        pairs = [(t, s) for t in range(len(tasks)) for s in range(len(tasks)) if t != s]
        for axis, point in zip(axes.flat, points, strict=False):
            length = min(len(one[point]["epochs"]) for one in seeds)
            values = np.array([one[point]["coupling"][:length] for one in seeds], float)
            epochs = seeds[0][point]["epochs"][:length]
            for i, (t, s) in enumerate(pairs):
                colour = COLOURS[i % len(COLOURS)]
                axis.plot(epochs, values[:, :, t, s].T, color=colour, alpha=0.25, linewidth=0.7)
                axis.plot(
                    epochs,
                    values[:, :, t, s].mean(0),
                    color=colour,
                    linestyle=DASHES[i % len(DASHES)],
                    linewidth=1.8,
                    label=f"{tasks[t]} from {tasks[s]}",
                )
            axis.axhline(0, color="black", linewidth=0.6)
            axis.set_title(point)
            axis.set_xlabel("epoch")
            axis.locator_params(axis="x", integer=True)
            axis.grid(color="#ededed")
        legend(figure, axes.flat[0])

    rows = -(-len(seeds[0]) // min(len(seeds[0]), 3))
    return drawn(0.7 + 2.3 * rows + legend_height(len(tasks) * (len(tasks) - 1)), label, draw)


def channels(of: Mapping[str, Sequence[Sequence[Sequence[float]]]], tasks: Sequence[str], label: str) -> str:
    """Values of each channel in order of size, a panel per layer point, a curve per pair of tasks: how uneven the exchange is
    between channels. `of`: point -> (T, T, Q) quantiles.
    """

    def draw(figure: Figure) -> None:
        columns = min(len(of), 3)
        axes = figure.subplots(-(-len(of) // columns), columns, squeeze=False, sharey=True)
        for axis in axes.flat[len(of) :]:
            axis.set_visible(False)
        for axis, (point, values) in zip(axes.flat, of.items(), strict=False):
            array = np.array(values, float)
            share = np.linspace(0, 100, array.shape[2])
            pairs = [(t, s) for t in range(len(tasks)) for s in range(len(tasks)) if t != s]
            for i, (t, s) in enumerate(pairs):
                axis.plot(
                    share,
                    array[t, s],
                    color=COLOURS[i % len(COLOURS)],
                    linestyle=DASHES[i % len(DASHES)],
                    label=f"{tasks[t]} from {tasks[s]}",
                )
            axis.axhline(0, color="black", linewidth=0.6)
            axis.set_title(point)
            axis.set_xlabel("channels, per cent, in order of size")
            axis.grid(color="#ededed")
        legend(figure, axes.flat[0])

    rows = -(-len(of) // min(len(of), 3))
    return drawn(0.7 + 2.3 * rows + legend_height(len(tasks) * (len(tasks) - 1)), label, draw)
