"""The end of a sweep: a table of its jobs, and mean and deviation over seeds. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from vlx.commands.sweep_file import DONE, Job
from vlx.core.errors import VlxError
from vlx.core.files import write_json
from vlx.core.results import read_results
from vlx.engine import rundir

SUMMARY_FILE = "sweep.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One job with what it measured."""

    id: str
    state: str
    exit_code: int | None
    seed: int
    swept: dict[str, str]
    overrides: list[str]
    run_dir: str
    metrics: dict[str, float]
    """Of the trained weights; empty for a job that did not finish."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A metric over seeds."""

    mean: float
    std: float | None
    """Sample standard deviation (n - 1); None for one seed."""
    n: int

    def __str__(self) -> str:
        spread = f" ± {self.std:.4f}" if self.std is not None else ""
        return f"{self.mean:.4f}{spread} ({self.n})"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Jobs that differ in the seed alone."""

    swept: dict[str, str]
    seeds: list[int]
    metrics: dict[str, Spread]


def summarise(directory: Path, jobs: Sequence[Job], console: Console) -> None:
    """Write `sweep.json` and print its tables."""
    measured = [measure(directory, job) for job in jobs]
    groups = over_seeds(jobs, measured)
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
    }
    path = directory / SUMMARY_FILE
    write_json(path, json.loads(json.dumps(summary)))
    console.print(jobs_table(directory.name, measured))
    if any(len(group.seeds) > 1 for group in groups):
        console.print(groups_table(groups))
    console.print(f"sweep: {path}", highlight=False, soft_wrap=True)


def measure(directory: Path, job: Job) -> Measured:
    """What a job's `results.json` says of its trained weights."""
    metrics: dict[str, float] = {}
    if job.state == DONE:
        try:
            results = read_results(directory / job.run_dir)
            metrics = {m.name: m.value for m in results.metrics if m.weights != "untrained"}
        except VlxError:  # finished, and its results were damaged since: shown without numbers
            pass
    return Measured(
        id=job.id,
        state=job.state,
        exit_code=job.exit_code,
        seed=job.config["seed"],
        swept=job.swept,
        overrides=job.overrides,
        run_dir=str(directory / job.run_dir),
        metrics=metrics,
    )


def over_seeds(jobs: Sequence[Job], measured: Sequence[Measured]) -> list[Group]:
    """Finished jobs grouped by everything but the seed, in the order of the sweep."""
    members: dict[str, list[Measured]] = {}
    for job, result in zip(jobs, measured):
        if result.metrics:
            members.setdefault(_without_seed(job.config), []).append(result)
    groups = []
    for group in members.values():
        names = dict.fromkeys(name for job in group for name in job.metrics)
        values = {name: [j.metrics[name] for j in group if name in j.metrics] for name in names}
        groups.append(
            Group(
                swept={k: v for k, v in group[0].swept.items() if k != "seed"},
                seeds=[job.seed for job in group],
                metrics={name: spread(found) for name, found in values.items()},
            )
        )
    return groups


def _without_seed(config: dict[str, Any]) -> str:
    flat = rundir.flatten(config)
    kept = {k: v for k, v in flat.items() if k != "seed" and not rundir.is_harmless(k)}
    return json.dumps(kept, sort_keys=True)


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    deviation = stdev(values) if len(values) > 1 else None
    return Spread(mean=fmean(values), std=deviation, n=len(values))


def jobs_table(title: str, measured: Sequence[Measured]) -> Table:
    """A row a job: what it varies, how it ended, what it measured."""
    keys = list(dict.fromkeys(key for job in measured for key in job.swept))
    names = list(dict.fromkeys(name for job in measured for name in job.metrics))
    table = Table("job", *keys, "state", title=f"sweep {title}")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for job in measured:
        values = [job.swept.get(key, "") for key in keys]
        numbers = [f"{job.metrics[name]:.4f}" if name in job.metrics else "" for name in names]
        table.add_row(job.id.split("-")[0], *values, job.state, *numbers)
    return table


def groups_table(groups: Sequence[Group]) -> Table:
    """A row for each setting, mean ± standard deviation (number of seeds) of each metric."""
    keys = list(dict.fromkeys(key for group in groups for key in group.swept))
    names = list(dict.fromkeys(name for group in groups for name in group.metrics))
    table = Table(*keys, title="over seeds: mean ± standard deviation (n)")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for group in groups:
        values = [group.swept.get(key, "") for key in keys]
        numbers = [str(group.metrics[name]) if name in group.metrics else "" for name in names]
        table.add_row(*values, *numbers)
    return table
