"""`pareto.png` of a sweep. Imports matplotlib, so it is imported when a sweep ends."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlx.commands.pareto import PLAIN_MARK, Point, axis
from vlx.core.files import write_atomic
from vlx.core.plain import plain

_COLOURS = {True: "#b3462e", False: "#2a6f97"}  # plain, reduced


def draw(points: Sequence[Point], path: Path) -> None:
    """Top-1 against images/s and against GMACs; bars are standard deviations over seeds."""
    batch = points[0].batch
    labels = {"images_per_s": f"images/s, batch {batch}", "gmacs": "GMACs of one image"}
    names = [name for name in labels if batch or name == "gmacs"]
    figure = Figure(figsize=(5.5 * len(names), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        _panel(axes, points, name)
        axes.set_xlabel(labels[name])
        axes.set_ylabel("top-1")
        axes.grid(alpha=0.25)
        axes.margins(0.15)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=130)
    write_atomic(path, encoded.getvalue())


def _panel(axes: Axes, points: Sequence[Point], name: str) -> None:
    front = []
    for point in points:
        x, y = axis(point, name), point.top1
        if x is None:
            continue
        reference = point.mark == PLAIN_MARK
        colour = _COLOURS[reference]
        if y is None:  # a reference whose weights were not trained: a cost without an accuracy
            axes.axvline(x.mean, color=colour, linestyle=":", label=point.label)
            continue
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=x.std,
            yerr=y.std,
            color=colour,
            marker="*" if reference else "o",
            markersize=12 if reference else 6,
            markerfacecolor=colour if reference or name in point.optimal else "white",
            capsize=2,
        )
        axes.annotate(
            plain(point.label),
            (x.mean, y.mean),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=8,
            parse_math=False,  # a value with two dollars is no formula
        )
        if name in point.optimal:
            front.append((x.mean, y.mean))
    if front:
        xs, ys = zip(*sorted(front))
        axes.plot(xs, ys, color="grey", linewidth=1, zorder=0)
