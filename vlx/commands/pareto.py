"""What fewer tokens cost and buy over a sweep: the table, a plot for the terminal. No torch here.

Read from the metrics of protocol tokens@1, `tokens/WHAT/plain` and `tokens/WHAT/reduced`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_letters

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlx.commands.measured import Measured, Spread, setting_of, spread
from vlx.commands.tables import figure

PLOT_FILE = "pareto.png"
PLAIN_MARK = "*"
_WIDTH, _HEIGHT = 60, 14
_PAIRED = re.compile(r"tokens/(.+)/(plain|reduced)")
_SPEED = re.compile(r"tokens/images-per-s-batch(\d+)/reduced")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of a sweep, or a plain model beside it."""

    mark: str
    """The letter that stands for it in plots; `*` for a plain model."""
    setting: dict[str, str]
    """The keys that vary with this point's values; empty for a plain model."""
    gmacs: Spread
    """Of one image."""
    top1: Spread | None
    images_per_s: Spread | None
    speedup: Spread | None
    """Over the plain model that was measured in the same runs."""
    peak_memory: Spread | None
    """MiB."""
    batch: int
    """Images at a time of `images_per_s` and `peak_memory`."""
    optimal: tuple[str, ...] = ()
    """Of gmacs and images_per_s: those for which no other point is as good in top-1 and better."""

    @property
    def label(self) -> str:
        """`keep_rate 0.7`; `plain` for a plain model."""
        parts = (f"{key.rsplit('.', 1)[-1]} {value}" for key, value in self.setting.items())
        return ", ".join(parts) or ("plain" if self.mark == PLAIN_MARK else "reduced")


def is_paired(name: str) -> bool:
    """Whether a metric is one of a plain and a reduced model's pair."""
    return _PAIRED.fullmatch(name) is not None


def tradeoffs(groups: Sequence[Sequence[Measured]]) -> list[Point]:
    """A point for every setting and for every plain model, by GMACs; none where no run has
    measured tokens.

    groups: jobs that differ in the seed alone. A plain model's numbers are those of the setting
    that reduces least, whose weights were trained most like a plain model's.
    """
    found = [group for group in groups if "tokens/gmacs/reduced" in group[0].metrics]
    speeds = [_batches(group[0].metrics) for group in found]
    batch = max(set.intersection(*speeds), default=0) if speeds else 0
    reduced = sorted((_point(group, "reduced", batch) for group in found), key=_gmacs)
    marks = (ascii_letters[number % len(ascii_letters)] for number in range(len(reduced)))
    points = [replace(point, mark=mark) for point, mark in zip(reduced, marks)]
    plain: dict[str, Point] = {}
    for group in sorted(found, key=lambda group: group[0].metrics["tokens/gmacs/reduced"]):
        point = _point(group, "plain", batch)
        plain[figure(point.gmacs.mean)] = point
    points = sorted([*points, *plain.values()], key=_gmacs)
    return [replace(point, optimal=_optimal(point, points)) for point in points]


def _gmacs(point: Point) -> float:
    return point.gmacs.mean


def _batches(metrics: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in metrics if (match := _SPEED.fullmatch(name))}


def _point(group: Sequence[Measured], kind: str, batch: int) -> Point:
    def over_seeds(what: str) -> Spread | None:
        name = f"tokens/{what}/{kind}"
        values = [job.metrics[name] for job in group if name in job.metrics]
        return spread(values) if values else None

    speed = f"images-per-s-batch{batch}"
    ratios = [
        job.metrics[f"tokens/{speed}/{kind}"] / job.metrics[f"tokens/{speed}/plain"]
        for job in group
        if f"tokens/{speed}/plain" in job.metrics
    ]
    gmacs = over_seeds("gmacs")
    assert gmacs is not None
    return Point(
        mark=PLAIN_MARK,
        setting=setting_of(group) if kind == "reduced" else {},
        gmacs=gmacs,
        top1=over_seeds("top1"),
        images_per_s=over_seeds(speed),
        speedup=spread(ratios) if ratios else None,
        peak_memory=over_seeds("peak-memory"),
        batch=batch,
    )


def _optimal(point: Point, points: Sequence[Point]) -> tuple[str, ...]:
    return tuple(
        name
        for name in ("gmacs", "images_per_s")
        if (own := _merits(point, name)) is not None
        and not any(
            other != own and all(b >= a for a, b in zip(own, other))
            for rival in points
            if (other := _merits(rival, name)) is not None
        )
    )


def _merits(point: Point, name: str) -> tuple[float, float] | None:
    """(top-1, the other axis), both the better the larger; None where one was not measured."""
    cost = point.gmacs if name == "gmacs" else point.images_per_s
    if point.top1 is None or cost is None:
        return None
    return point.top1.mean, -cost.mean if name == "gmacs" else cost.mean


def show_tradeoffs(directory: Path, points: Sequence[Point], console: Console) -> None:
    """Print the table and a plot; draw `pareto.png` in the sweep's directory."""
    console.print(tradeoff_table(points))
    if sum(point.top1 is not None for point in points) < 2:
        console.print("no Pareto plot: it needs two points with an accuracy", highlight=False)
        return
    console.print(scatter(points))
    from vlx.commands.pareto_plot import draw  # imports matplotlib

    path = directory / PLOT_FILE
    draw(points, path)
    console.print(f"picture: {path}", highlight=False, soft_wrap=True)


def tradeoff_table(points: Sequence[Point]) -> Table:
    """A row a point, by GMACs; mean ± standard deviation where seeds differ.

    Bold rows are Pareto-optimal: no point is better for their GMACs, their images/s, or both.
    """
    batch = points[0].batch
    table = Table(title="accuracy against cost, by GMACs")
    table.add_column("")
    table.add_column("setting", overflow="fold")
    speed = f"images/s, batch {batch}" if batch else "images/s"
    for name in ("top-1", "GMACs", speed, "speed-up", "peak MiB"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("Pareto", no_wrap=True)
    words = {(): "", ("gmacs",): "GMACs", ("images_per_s",): "images/s"}
    for point in points:
        costs = (point.gmacs, point.images_per_s, point.speedup, point.peak_memory)
        table.add_row(
            point.mark,
            point.label,
            _cell(point.top1, "share"),
            *(_cell(cost, "cost") for cost in costs),
            words.get(point.optimal, "both"),
            style="bold" if point.optimal else None,
        )
    return table


def _cell(number: Spread | None, unit: str) -> str:
    if number is None:
        return ""
    deviation = f" ± {figure(number.std, unit)}" if number.std else ""
    return f"{figure(number.mean, unit)}{deviation}"


def axis(point: Point, name: str) -> Spread | None:
    """The cost of a point on the axis `images_per_s` or `gmacs`."""
    return point.images_per_s if name == "images_per_s" else point.gmacs


def scatter(points: Sequence[Point]) -> Text:
    """Top-1 upwards, images/s (or GMACs, where no speed was measured) to the right.

    Marks are those of the table; Pareto-optimal points stand above others in the same cell.
    """
    name = "images_per_s" if points[0].batch else "gmacs"
    placed = [
        (cost.mean, point.top1.mean, point)
        for point in points
        if point.top1 is not None and (cost := axis(point, name)) is not None
    ]
    (left, right), (low, high) = ((min(v), max(v)) for v in list(zip(*placed))[:2])
    cells = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for x, y, point in sorted(placed, key=lambda item: name in item[2].optimal):
        column = round((x - left) / (right - left or 1) * (_WIDTH - 1))
        row = round((high - y) / (high - low or 1) * (_HEIGHT - 1))
        cells[row][column] = point.mark
    edge = {0: figure(high), _HEIGHT - 1: figure(low)}
    wide = max(len(text) for text in edge.values())
    lines = [f"{edge.get(n, ''):>{wide}} ┤{''.join(row)}" for n, row in enumerate(cells)]
    unit = f"images/s, batch {points[0].batch}" if points[0].batch else "GMACs of one image"
    first, last = figure(left, "cost"), figure(right, "cost")
    indent = " " * wide
    under = [
        f"{indent} └{'─' * _WIDTH}",
        f"{indent}  {first}{last:>{_WIDTH - len(first)}}",
        f"{indent}  {unit:>{_WIDTH}}",
    ]
    return Text("\n".join(["top-1", *lines, *under]))
