"""What the jobs of a sweep measured, one by one and over seeds. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vlx.commands.sweep_file import DONE, Job
from vlx.commands.tables import figure
from vlx.core.errors import VlxError
from vlx.core.results import read_results
from vlx.engine import rundir


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
    on_training_data: str = ""
    """As in `results.json`: what was scored that was trained on."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number over seeds."""

    mean: float
    std: float | None
    """Sample standard deviation (n - 1); None for one seed."""
    n: int

    def __str__(self) -> str:
        spread = f" ± {figure(self.std)}" if self.std is not None else ""
        return f"{figure(self.mean)}{spread} ({self.n})"


def measure(directory: Path, job: Job) -> Measured:
    """What a job's `results.json` says of its trained weights."""
    metrics: dict[str, float] = {}
    on_training_data = ""
    if job.state == DONE:
        try:
            results = read_results(directory / job.run_dir)
            metrics = {m.name: m.value for m in results.metrics if m.weights != "untrained"}
            on_training_data = results.on_training_data
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
        on_training_data=on_training_data,
    )


def by_setting(jobs: Sequence[Job], measured: Sequence[Measured]) -> list[list[Measured]]:
    """Finished jobs, those together that differ in the seed alone, in the order of the sweep."""
    members: dict[str, list[Measured]] = {}
    for job, result in zip(jobs, measured):
        if result.metrics:
            members.setdefault(_without_seed(job.config), []).append(result)
    return list(members.values())


def _without_seed(config: dict[str, Any]) -> str:
    flat = rundir.flatten(config)
    kept = {k: v for k, v in flat.items() if k != "seed" and not rundir.is_harmless(k)}
    return json.dumps(kept, sort_keys=True)


def setting_of(group: Sequence[Measured]) -> dict[str, str]:
    """The keys that vary over the sweep, without the seed, with a group's values."""
    return {key: value for key, value in group[0].swept.items() if key != "seed"}


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    deviation = stdev(values) if len(values) > 1 else None
    return Spread(mean=fmean(values), std=deviation, n=len(values))
