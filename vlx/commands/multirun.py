"""`-m`: a static grid becomes a frozen job list; a plugin's sweep goes through Hydra."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from vlx.commands.start import Line, check_model, prepare, root_of, run
from vlx.commands.sweep import Driver
from vlx.commands.sweep_file import Job, append_job, standing, write_jobs
from vlx.commands.typed_command import run_typed_command
from vlx.config.compose import Root, to_yaml
from vlx.config.grid import Cell, expand, job_name, uses_plugin
from vlx.config.hydra_app import read_plan, varying
from vlx.config.overrides import parse
from vlx.core.errors import ConfigError, VlxError
from vlx.core.names import folder_names
from vlx.data.config import DataConfig
from vlx.engine import rundir
from vlx.engine.load import from_dict


def multirun(line: Line, root: Root, console: Console) -> int:
    """Expand, check every job, freeze, run. Returns the worst exit code."""
    if line.jobs < 1:
        raise ConfigError(f"--jobs {line.jobs} must be at least 1")
    if uses_plugin(line.overrides):
        from vlx.commands.plugin_sweep import plugin_sweep

        return plugin_sweep(line, root, console)
    # Each job of an evaluation starts from the encoder of its own encoder.checkpoint.
    cells = expand(root, line.overrides, lambda words: root_of(replace(line, overrides=words)))
    if line.cfg:
        sys.stdout.write("---\n".join(to_yaml(cell.config) for cell in cells))
        return 0
    if line.dry_run:
        for number, cell in enumerate(cells):
            text = f"{job_name(number, cell.swept)}: {' '.join(cell.overrides)}"
            console.print(text, highlight=False, soft_wrap=True)
        return 0
    check_models(cells)
    for cell in cells:
        run_typed_command(from_dict(DataConfig, cell.config["data"], "data."), cell.overrides)
    first = cells[0].config
    directory = make_sweep_dir(first["runs_dir"], name_of(line), root.slug)
    write_jobs(directory, [freeze(number, cell, directory) for number, cell in enumerate(cells)])
    console.print(f"sweep of {len(cells)} jobs: {directory}", highlight=False, soft_wrap=True)
    return Driver(directory, console, parallel=line.jobs, fail_fast=line.fail_fast).run()


def check_models(cells: Sequence[Cell]) -> None:
    """`check_model` for every job; jobs that build the same model are checked once."""
    seen = set()
    for cell in cells:
        parts = [cell.config[key] for key in ("slug", "method", "encoder", "teacher")]
        text = json.dumps([*parts, cell.config["train"]["accumulate"]])
        if text in seen:
            continue
        seen.add(text)
        try:
            check_model(cell.config)
        except VlxError as error:
            varying = " ".join(f"{key}={value}" for key, value in cell.swept.items())
            raise ConfigError(f"job {varying}: {error}") from error


def name_of(line: Line) -> str | None:
    """The sweep's name: `name=` among the overrides."""
    named = [o.value() for o in parse(line.overrides) if o.key_or_group == "name"]
    return str(named[-1]) if named and named[-1] is not None else None


def make_sweep_dir(runs_dir: str, name: str | None, slug: str) -> Path:
    """A new directory for a sweep, RUNS_DIR/sweeps/NAME."""
    root = Path(runs_dir).expanduser() / "sweeps"
    names = folder_names(name, f"{datetime.now():%Y%m%d-%H%M%S}-{slug}")
    for candidate in names:
        try:
            (root / candidate).mkdir(parents=True)
            return root / candidate
        except FileExistsError:
            continue
        except OSError as error:
            raise VlxError(
                f"cannot make {root / candidate}: {error.strerror}. Set runs_dir=DIR"
            ) from error
    place = root / names[0]
    raise VlxError(f"{place} exists. `vlx sweep {place}` goes on with it; or choose name=OTHER")


def freeze(number: int, cell: Cell, directory: Path) -> Job:
    """A job with its configuration as it is now."""
    name = job_name(number, cell.swept)
    config = grouped(cell.config, directory.name)
    return Job(
        id=name,
        overrides=cell.overrides,
        swept=cell.swept,
        config=config,
        hash=rundir.config_hash(config),
        run_dir=name,
    )


def grouped(config: dict[str, Any], sweep: str) -> dict[str, Any]:
    """The configuration of a job: no name of its own, and the sweep as its W&B group."""
    track = config["track"]
    return dict(config, name=None, track=dict(track, group=track["group"] or sweep))


def run_in_sweep(line: Line, run_dir: Path, config: dict[str, Any], console: Console) -> int:
    """One job of a plugin's sweep, whose launcher chose `run_dir`."""
    directory = run_dir.parent
    config = grouped(config, directory.name)
    job = Job(
        id=run_dir.name,
        overrides=list(line.overrides),
        swept=varying(line.overrides, read_plan(directory)),
        config=config,
        hash=rundir.config_hash(config),
        state="running",
        run_dir=run_dir.name,
    )
    append_job(directory, job)
    job.exit_code = 1
    try:
        prepare(config, line.overrides, sweep=directory.name, run_dir=run_dir)
        job.exit_code = run(run_dir, console)
        return job.exit_code
    except VlxError as error:
        job.exit_code = error.exit_code
        raise
    finally:
        job.state = standing(directory, job)
        append_job(directory, job)
