"""The pictures of a report, each from plain values to SVG text. Colours are those of Okabe and Ito that show on white, which
colour-blind people can tell apart, and no picture depends on colour alone: arms have markers and dashes too, matrices carry
their numbers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1, 1, 1)), (0, (3, 1)), (0, (8, 2)))
WIDTH = 9.2
"""Of every picture, inches."""
STYLE: Any = {
    "font.size": 9,
    "text.parse_math": False,  # names are shown as they are
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.fonttype": "path",
    "svg.hashsalt": "mtl",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


class Look:
    """The colour, marker and dashes of each arm, the same in every picture."""

    def __init__(self, arms: Sequence[str]) -> None:
        self.of = {name: i for i, name in enumerate(arms)}

    def colour(self, arm: str) -> str:
        """Repeats after seven arms, which then have other markers."""
        return COLOURS[self.of[arm] % len(COLOURS)]

    def marker(self, arm: str) -> str:
        """Of single values."""
        return MARKERS[self.of[arm] % len(MARKERS)]  # eleven, and seven colours: no pair twice in 77

    def dashes(self, arm: str) -> Any:
        """Of lines."""
        return DASHES[self.of[arm] % len(DASHES)]  # six, and seven colours: no pair twice in 42


def wrapped(name: str, width: int) -> str:
    """A name in lines of at most `width` letters where it has underlines or hyphens to part at.

    >>> print(wrapped("multi_fashion_left", 14))
    multi_fashion_
    left
    """
    lines = [""]
    for part in re.findall(r"[^_\-: ]*[_\-: ]?", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def drawn(height: float, label: str, draw: Callable[[Figure], None]) -> str:
    """An SVG element of the house's width: `draw(figure)` fills it; `label` says what it shows to who cannot see it."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        with io.StringIO() as text:
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            found = text.getvalue()
    element = found[found.index("<svg") :]
    return re.sub("<svg ", f'<svg role="img" aria-label="{escape(label, quote=True)}" ', element, count=1)


def scores(
    findings: Mapping[str, Any], tasks: Mapping[str, Any], points: Mapping[str, Mapping[str, list[float]]], look: Look
) -> str:
    """Each arm's score per task and their mean: mean over seeds with its interval, and each seed as a small dot."""
    arms = [arm for arm in look.of if arm in findings["arms"]]
    panels = [*tasks, "mean"]

    def draw(figure: Figure) -> None:
        for axis, panel in _panels(figure, panels, arms):
            for row, arm in enumerate(arms):
                said = findings["arms"][arm]
                value = said["mean"] if panel == "mean" else said["tasks"][panel][tasks[panel]["score"]]
                seeds = points[arm][panel]
                axis.plot(seeds, [row + 0.22] * len(seeds), ".", color=look.colour(arm), alpha=0.45, markersize=4)
                _interval(axis, value, row, look, arm)
            axis.set_title("mean of tasks" if panel == "mean" else wrapped(f"{panel}: {tasks[panel]['score']}", 36))

    height = 0.6 + (0.5 + 0.34 * len(arms)) * -(-len(panels) // 3)
    return drawn(height, "Test scores of every arm, per task and on average, over seeds", draw)


def _panels(figure: Figure, panels: Sequence[str], arms: Sequence[str]) -> Iterator[tuple[Axes, str]]:
    """A panel each, three in a row, in which every arm has a row."""
    axes = figure.subplots(-(-len(panels) // 3), min(3, len(panels)), sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        yield axis, panel
        axis.set_yticks(range(len(arms)), [wrapped(arm, 24) for arm in arms])
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.grid(axis="x", color="#e5e5e5")
        axis.set_axisbelow(True)
        axis.locator_params(axis="x", nbins=5)


COLUMNS, LISTED = 4, 42
"""Of a legend; and how many it lists at most, from which on looks repeat."""


def legend(figure: Figure, axis: Axes) -> None:
    """Below all panels, what is drawn in one of them."""
    handles, labels = axis.get_legend_handles_labels()
    if 0 < len(labels) <= LISTED:
        columns = min(COLUMNS if max(map(len, labels)) < 30 else COLUMNS - 1, len(labels))
        shown = [wrapped(label, 34 if columns > 2 else 55) for label in labels]
        figure.legend(handles, shown, loc="outside lower center", ncols=columns, fontsize=8)


def legend_height(entries: int) -> float:
    """Inches."""
    return 0.24 * -(-entries // (COLUMNS - 1)) if entries <= LISTED else 0.0


def _interval(axis: Axes, value: Mapping[str, Any], row: float, look: Look, arm: str) -> None:
    if value["low"] is not None:
        axis.plot([value["low"], value["high"]], [row, row], color=look.colour(arm), linewidth=2, solid_capstyle="butt")
    axis.plot(
        value["mean"], row, look.marker(arm), color=look.colour(arm), markersize=7, markeredgecolor="white", markeredgewidth=0.5
    )


def differences(findings: Mapping[str, Any], tasks: Mapping[str, Any], key: str, title: str, look: Look) -> str:
    """Paired differences to another arm in points, per task and on average, with their intervals."""
    arms = [arm for arm in look.of if findings["arms"].get(arm, {}).get(key)]
    panels = [*tasks, "mean"]

    def draw(figure: Figure) -> None:
        for axis, panel in _panels(figure, panels, arms):
            axis.axvline(0, color="black", linewidth=0.8)
            for row, arm in enumerate(arms):
                d = findings["arms"][arm][key][panel]
                hundred = {name: None if d[name] is None else 100 * d[name] for name in ("mean", "low", "high")}
                _interval(axis, hundred, row, look, arm)
            axis.set_title("mean of tasks" if panel == "mean" else wrapped(panel, 36))
        figure.supxlabel(title, fontsize=9)

    height = 0.9 + (0.5 + 0.32 * len(arms)) * -(-len(panels) // 3)
    return drawn(height, title, draw)


def has_bands(arms: int) -> bool:
    """Whether learning curves are drawn with a band over seeds; of many arms they would hide each other."""
    return arms <= 3


def learning_curves(curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], tasks: Mapping[str, Any], look: Look) -> str:
    """Validation score after each epoch: task -> arm -> a list per seed. The line is the mean, the band from least to most."""

    def draw(figure: Figure) -> None:
        rows = -(-len(tasks) // 2)
        axes = figure.subplots(rows, min(2, len(tasks)), squeeze=False)
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
        for axis, task in zip(axes.flat, tasks, strict=False):
            for arm in look.of:
                if not (seeds := curves[task].get(arm)):
                    continue
                length = min(map(len, seeds))
                values = np.array([one[:length] for one in seeds], float)
                epochs = np.arange(1, length + 1)
                axis.plot(
                    epochs,
                    values.mean(0),
                    color=look.colour(arm),
                    linestyle=look.dashes(arm),
                    label=arm,
                    linewidth=1.6,
                    marker=look.marker(arm),
                    markevery=max(1, length // 8),
                    markersize=4,
                )
                if len(seeds) > 1 and has_bands(len(curves[task])):
                    axis.fill_between(epochs, values.min(0), values.max(0), color=look.colour(arm), alpha=0.12, linewidth=0)
            axis.set_title(wrapped(f"{task}: {tasks[task]['score']} on validation data", 56))
            axis.set_xlabel("epoch")
            axis.locator_params(axis="x", integer=True)
            axis.grid(color="#ededed")
        legend(figure, axes.flat[0])

    return drawn(
        0.7 + 2.7 * -(-len(tasks) // 2) + legend_height(len(look.of)), "Validation score over epochs, per task and arm", draw
    )


def against_fraction(findings: Sequence[Mapping[str, Any]], tasks: Mapping[str, Any], look: Look) -> str:
    """Test score against the share of the training data, logarithmic, per task and on average, with intervals."""
    panels = [*tasks, "mean"]

    def draw(figure: Figure) -> None:
        rows = -(-len(panels) // 3)
        axes = figure.subplots(rows, min(3, len(panels)), squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        fractions = [one["fraction"] for one in findings]
        for axis, panel in zip(axes.flat, panels, strict=False):
            for i, arm in enumerate(look.of):
                there = [one for one in findings if arm in one["arms"]]
                values = [
                    one["arms"][arm]["mean"] if panel == "mean" else one["arms"][arm]["tasks"][panel][tasks[panel]["score"]]
                    for one in there
                ]
                if not values:
                    continue
                x = np.array([one["fraction"] for one in there]) * 1.03 ** (i - len(look.of) / 2)  # beside each other
                mean = np.array([value["mean"] for value in values])
                ends = [[value["mean"] if value[end] is None else value[end] for value in values] for end in ("low", "high")]
                axis.errorbar(
                    x,
                    mean,
                    yerr=np.abs(np.array(ends) - mean),
                    color=look.colour(arm),
                    linestyle=look.dashes(arm),
                    marker=look.marker(arm),
                    markersize=5,
                    linewidth=1.4,
                    capsize=2,
                    label=arm,
                )
            axis.set_xscale("log")
            axis.set_xticks(fractions, [f"{100 * f:g} %" for f in fractions])
            axis.minorticks_off()
            axis.set_title("mean of tasks" if panel == "mean" else wrapped(f"{panel}: {tasks[panel]['score']}", 36))
            axis.set_xlabel("share of the training data")
            axis.grid(color="#ededed")
        legend(figure, axes.flat[0])

    return drawn(
        0.7 + 2.7 * -(-len(panels) // 3) + legend_height(len(look.of)),
        "Test score against the share of the training data",
        draw,
    )


COST_AXES = (
    ("parameters", "parameters, millions", 1e-6),
    ("flops_per_image", "forward pass, MFLOPs per image", 1e-6),
    ("training_seconds", "training, seconds", 1.0),
)


def against_cost(findings: Mapping[str, Any], look: Look) -> str:
    """Mean test score against parameters, work per image and training time."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(COST_AXES), sharey=True)
        for axis, (cost, label, unit) in zip(axes, COST_AXES, strict=True):
            for arm in look.of:
                said = findings["arms"].get(arm)
                if said is None or said["cost"][cost] is None:
                    continue
                x, y = unit * said["cost"][cost], said["mean"]
                if y["low"] is not None:
                    axis.plot([x, x], [y["low"], y["high"]], color=look.colour(arm), linewidth=1.6)
                axis.plot(
                    x,
                    y["mean"],
                    look.marker(arm),
                    color=look.colour(arm),
                    markersize=7,
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                    label=arm,
                )
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
            axis.grid(color="#ededed")
        axes[0].set_ylabel("mean test score")
        legend(figure, axes[0])

    return drawn(
        3.2 + legend_height(len(look.of)), "Mean test score against parameters, work per image and training time", draw
    )
