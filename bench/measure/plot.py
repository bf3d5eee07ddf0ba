"""The plots, as SVG that can be read on a light and on a dark page: no background, and colours between the two."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

INK = "#808890"
"""Text, axes and grid: as far from white as from black."""

COLOURS = ("#2f81f7", "#d9822b", "#3fa45b", "#c2599e", "#8a6fd8", "#c9433f", "#2a9d9d", "#a08a2e")
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "pgtask",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}

DISTRIBUTIONS = (
    ("pickup", "latency", "latency.svg", "ms from COMMIT to start"),
    ("peers", "latency", "peers.svg", "ms from COMMIT to the job's statement"),
    ("plans", "lateness", "lateness.svg", "ms from the planned time to start"),
)
"""Subject, curves, file, and what the axis says."""


def draw(told: Mapping[str, Any], directory: Path) -> None:
    """What there are figures for."""
    subjects = told["subjects"]
    directory.mkdir(exist_ok=True)
    for subject, curve, file, label in DISTRIBUTIONS:
        if curves := subjects.get(subject, {}).get("curves", {}).get(curve):
            _save(directory / file, partial(_distribution, curves=curves, label=label))
    if take := subjects.get("flat", {}).get("curves", {}).get("take"):
        _save(directory / "take.svg", partial(_sizes, curves=take))


def _save(file: Path, fill: Any) -> None:
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
        axes.set_prop_cycle(color=COLOURS)
        fill(axes)
        # The same figures make the same file.
        figure.savefig(file, transparent=True, metadata={"Date": None})
        pyplot.close(figure)


def _distribution(axes: Axes, curves: Mapping[str, Sequence[float]], label: str) -> None:
    """The part of all tasks that had started by then."""
    colours: dict[str, str] = {}
    for name, values in curves.items():
        # Ours and its reference, "pgtask, CASE" and "bare, CASE", have one colour.
        case = name.partition(", ")[2] or name
        colour = colours.setdefault(case, COLOURS[len(colours) % len(COLOURS)])
        ordered = sorted(values)
        parts = [(number + 1) / len(ordered) for number in range(len(ordered))]
        line = "--" if name.startswith("bare") else "-"
        axes.step(ordered, parts, where="post", label=name, linestyle=line, color=colour)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("part of the tasks")
    axes.set_ylim(0, 1.01)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _sizes(axes: Axes, curves: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Milliseconds of a take over the rows of the table; the empty table stands at the left."""
    axes.set_xscale("symlog", linthresh=10_000)
    for name, points in curves.items():
        axes.plot([size for size, _ in points], [cost for _, cost in points], marker="o", markersize=4, label=name)
    axes.set_xlabel("rows in the table")
    axes.set_ylabel("ms of a take, in the server")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(title="rows that are", loc="upper left", bbox_to_anchor=(1.0, 1.0))
