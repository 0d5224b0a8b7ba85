"""The end of a sweep: a table of its jobs, and mean and deviation over seeds. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlx.commands.measured import Measured, Spread, by_setting, measure, setting_of, spread
from vlx.commands.pareto import is_paired, show_tradeoffs, tradeoffs
from vlx.commands.sweep_file import Job
from vlx.commands.tables import figure
from vlx.core.files import write_json
from vlx.engine import rundir

SUMMARY_FILE = "sweep.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Group:
    """Jobs that differ in the seed alone."""

    swept: dict[str, str]
    seeds: list[int]
    metrics: dict[str, Spread]


def summarise(directory: Path, jobs: Sequence[Job], console: Console) -> None:
    """Write `sweep.json` and print its tables."""
    measured = [measure(directory, job) for job in jobs]
    settings = by_setting(jobs, measured)
    groups, points = over_seeds(settings), tradeoffs(settings)
    first = jobs[0].config if jobs else {}
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": directory.name,
        "command": first.get("command", ""),
        "method": first.get("slug", ""),
        "preset": first.get("preset", ""),
        "finished": rundir.now(),
        "jobs": [asdict(job) for job in measured],
        "over_seeds": [asdict(group) for group in groups],
        "pareto": [asdict(point) for point in points],
    }
    path = directory / SUMMARY_FILE
    write_json(path, json.loads(json.dumps(summary)))
    console.print(jobs_table(directory.name, measured))
    marked = [job.id.split("-")[0] for job in measured if job.on_training_data]
    if marked:
        console.print(f"scored on training data: {', '.join(marked)}", highlight=False)
    if any(len(group.seeds) > 1 for group in groups) and _unpaired(groups):
        console.print(groups_table(groups))
    if points:
        show_tradeoffs(directory, points, console)
    console.print(f"sweep: {path}", highlight=False, soft_wrap=True)


def over_seeds(groups: Sequence[Sequence[Measured]]) -> list[Group]:
    """Every metric of each setting over its seeds."""
    found = []
    for group in groups:
        names = dict.fromkeys(name for job in group for name in job.metrics)
        values = {name: [j.metrics[name] for j in group if name in j.metrics] for name in names}
        found.append(
            Group(
                swept=setting_of(group),
                seeds=[job.seed for job in group],
                metrics={name: spread(numbers) for name, numbers in values.items()},
            )
        )
    return found


def jobs_table(title: str, measured: Sequence[Measured]) -> Table:
    """A row a job: what it varies, how it ended, what it measured."""
    keys = list(dict.fromkeys(key for job in measured for key in job.swept))
    names = _unpaired(measured)
    table = Table("job", *keys, "state", title=f"sweep {title}")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for job in measured:
        values = [job.swept.get(key, "") for key in keys]
        numbers = [figure(job.metrics[name]) if name in job.metrics else "" for name in names]
        table.add_row(job.id.split("-")[0], *values, job.state, *numbers)
    return table


def groups_table(groups: Sequence[Group]) -> Table:
    """A row for each setting, mean ± standard deviation (number of seeds) of each metric."""
    keys = list(dict.fromkeys(key for group in groups for key in group.swept))
    names = _unpaired(groups)
    table = Table(*keys, title="over seeds: mean ± standard deviation (n)")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for group in groups:
        values = [group.swept.get(key, "") for key in keys]
        numbers = [str(group.metrics[name]) if name in group.metrics else "" for name in names]
        table.add_row(*values, *numbers)
    return table


def _unpaired(rows: Sequence[Measured] | Sequence[Group]) -> list[str]:
    """Names of the metrics but those that a table of trade-offs shows."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    return [name for name in names if not is_paired(name)]
