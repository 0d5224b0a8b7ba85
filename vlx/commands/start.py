"""From a command line to a run directory, and from a run directory to a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlx.config.compose import compose, to_yaml
from vlx.core import registry
from vlx.core.errors import VlxError
from vlx.core.files import write_atomic
from vlx.core.results import Results, read_results
from vlx.engine import rundir
from vlx.engine.environment import git_commit, versions
from vlx.engine.launch import launch, read_launcher


def check_command(command: str, slug: str) -> None:
    """Raise `VlxError` when the method belongs to another command, naming it."""
    commands = registry.find(slug).paper.commands
    if command not in commands:
        raise VlxError(f"{slug} belongs to another command: vlx {commands[0]} {slug}")


def start(
    command: str, slug: str, preset: str | None, overrides: Sequence[str], console: Console
) -> int:
    """Compose, make the run directory, run, and print the results. Returns an exit code."""
    check_command(command, slug)
    config = compose(slug, command, preset, overrides)
    run_dir = prepare(config, overrides)
    return run(run_dir, console)


def prepare(config: dict[str, Any], overrides: Sequence[str], *, sweep: str | None = None) -> Path:
    """Make the run directory with its frozen `config.yaml` and its `run.json`."""
    run_dir = rundir.make_run_dir(
        config["runs_dir"], config["name"], config["slug"], config["seed"]
    )
    record = rundir.RunRecord(
        id=run_dir.name,
        command=config["command"],
        method=config["slug"],
        preset=config["preset"],
        seed=config["seed"],
        argv=sys.argv[1:],
        overrides=list(overrides),
        config_hash=rundir.config_hash(config),
        commit=git_commit(),
        versions=versions(),
        created=rundir.now(),
        sweep=sweep,
    )
    write_atomic(run_dir / rundir.CONFIG_FILE, to_yaml(config))
    record.write(run_dir)
    return run_dir


def run(run_dir: Path, console: Console) -> int:
    """Execute a prepared or interrupted run and print what came out."""
    console.print(f"run directory: {run_dir}", highlight=False)
    code = launch(run_dir, read_launcher(run_dir))
    if code == 0:
        print_results(run_dir, console)
    return code


def print_results(run_dir: Path, console: Console) -> None:
    """The trained encoder's numbers beside the untrained one's, and where everything is."""
    results = read_results(run_dir)
    console.print(results_table(results))
    for picture in results.pictures:
        if "untrained" not in picture:
            console.print(f"picture: {run_dir / picture}", highlight=False, soft_wrap=True)
    console.print(f"results: {run_dir / 'results.json'}", highlight=False, soft_wrap=True)


def results_table(results: Results) -> Table:
    """Metrics by row; a column each for untrained and trained weights."""
    kinds = list(dict.fromkeys(metric.weights for metric in results.metrics))
    table = Table(title=f"{results.method} on {_split(results)}, {results.steps} steps")
    table.add_column("metric")
    for kind in kinds:
        table.add_column(kind, justify="right")
    table.add_column("samples", justify="right")
    table.add_column("protocol")
    for name in dict.fromkeys(metric.name for metric in results.metrics):
        same = {m.weights: m for m in results.metrics if m.name == name}
        any_metric = next(iter(same.values()))
        numbers = [f"{same[kind].value:.4f}" if kind in same else "" for kind in kinds]
        table.add_row(name, *numbers, str(any_metric.num_samples), any_metric.protocol)
    return table


def _split(results: Results) -> str:
    return results.metrics[0].split if results.metrics else "no evaluation"


def resume(run_dir: Path, console: Console) -> int:
    """Go on with an interrupted run; a finished one says so and shows its results."""
    record = rundir.read_record(run_dir)
    if record.state == "finished":
        console.print(f"{run_dir} is finished; nothing to resume", highlight=False)
        print_results(run_dir, console)
        return 0
    return run(run_dir, console)
