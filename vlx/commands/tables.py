"""A run's numbers as tables for the terminal. Needs no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.table import Table

from vlx.core.results import Metric, Results

PAIRED = "tokens@"
"""Protocols whose metrics come in pairs, `tokens/WHAT/plain` and `tokens/WHAT/reduced`."""

REDUCED_GMACS = "tokens/gmacs/reduced"
_COUNTS_SHOWN = 100


def figure(value: float, unit: str = "share") -> str:
    """A number with three significant digits, or all before the point; a share of 0.01 and more
    with four decimals."""
    size = abs(value)
    if size == 0 or size >= 999.5:
        return f"{value:,.0f}"
    if unit == "share" and 0.01 <= size <= 1:
        return f"{value:.4f}"
    return f"{value:#.3g}".rstrip(".")


def shorten(counts: Sequence[int]) -> str:
    """Counts by layer, runs of equal ones shortened: `50 x 12`."""
    parts = [(value, len(list(same))) for value, same in itertools.groupby(counts)]
    return ", ".join(f"{value} x {times}" if times > 1 else str(value) for value, times in parts)


def results_tables(results: Results) -> list[Table]:
    """What is measured once in one table, what is measured in pairs in another; none is empty
    unless nothing was measured."""
    paired = [metric for metric in results.metrics if metric.protocol.startswith(PAIRED)]
    single = [metric for metric in results.metrics if not metric.protocol.startswith(PAIRED)]
    tables = [] if paired and not single else [_single_table(results, single)]
    return [*tables, _paired_table(results, paired)] if paired else tables


def counts_lines(results: Results) -> list[str]:
    """One line for each list of counts by layer: `tokens in mlp: 65 x 2, 47, 34 x 2, 25`."""
    return [
        f"{name.rsplit('/', 1)[-1].replace('-', ' ')}: {shorten(counts[:_COUNTS_SHOWN])}"
        + (f", ... {len(counts)} of them" if len(counts) > _COUNTS_SHOWN else "")
        for name, counts in results.counts.items()
        if len(counts) > 1 and not name.endswith("-by-class")
    ]


def _single_table(results: Results, metrics: Sequence[Metric]) -> Table:
    """Metrics by row; a column each for untrained and trained weights."""
    kinds = list(dict.fromkeys(metric.weights for metric in metrics))
    table = Table(title=_title(results, metrics))
    table.add_column("metric")
    for kind in kinds:
        table.add_column(kind, justify="right")
    table.add_column("samples", justify="right")
    table.add_column("protocol")
    for name in dict.fromkeys(metric.name for metric in metrics):
        same = {m.weights: m for m in metrics if m.name == name}
        any_metric = next(iter(same.values()))
        numbers = [figure(same[kind].value) if kind in same else "" for kind in kinds]
        table.add_row(name, *numbers, str(any_metric.num_samples), any_metric.protocol)
    return table


def _paired_table(results: Results, metrics: Sequence[Metric]) -> Table:
    """A row for each quantity (and kind of weights, where there are several): the plain model, the
    reduced one, reduced over plain."""
    kinds = list(dict.fromkeys(metric.weights for metric in metrics))
    protocol = metrics[0].protocol
    table = Table(title=f"{_title(results, metrics)}, {protocol}")
    table.add_column("metric")
    if len(kinds) > 1:
        table.add_column("weights")
    for name in ("plain", "reduced", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("unit")
    for name, kind in dict.fromkeys((m.name.rpartition("/")[0], m.weights) for m in metrics):
        found = {m.name: m for m in metrics if m.weights == kind}
        pair = [found.get(f"{name}/{which}") for which in ("plain", "reduced")]
        plain, reduced = (metric.value if metric else None for metric in pair)
        unit = next((metric.unit for metric in pair if metric), "")
        table.add_row(
            name,
            *([kind] if len(kinds) > 1 else []),
            *("" if value is None else figure(value, unit) for value in (plain, reduced)),
            figure(reduced / plain, "ratio") if plain and reduced is not None else "",
            unit,
        )
    return table


def _title(results: Results, metrics: Sequence[Metric]) -> str:
    split = metrics[0].split if metrics else "no evaluation"
    length = f", {results.steps} steps" if results.steps else ""
    mark = f", {results.on_training_data}" if results.on_training_data else ""
    return f"{results.method} on {split}{length}{mark}"
