"""`-m hydra/launcher=... hydra/sweeper=...`: Hydra's plugins start the jobs; vlx files them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from vlx.commands.multirun import make_sweep_dir, name_of
from vlx.commands.start import Line
from vlx.commands.summary import summarise
from vlx.commands.sweep_file import (
    DONE,
    SWEEP_FILE,
    code_of,
    read_jobs,
    standing,
    worst,
    write_jobs,
)
from vlx.config import hydra_app
from vlx.config.compose import Root, check, hydra_conf, plain_words, resolve
from vlx.config.grid import expand
from vlx.config.overrides import Override, is_hydra_key, parse
from vlx.core.errors import ConfigError


def plugin_sweep(line: Line, root: Root, console: Console) -> int:
    """Check what can be checked, then let Hydra run it. Returns the worst exit code."""
    if line.cfg or line.dry_run:
        raise ConfigError("--cfg and --dry-run go without hydra/launcher and hydra/sweeper")
    with hydra_conf():
        parsed = parse(plain_words(root, line.overrides))
        hydra_app.check_plugins(parsed)
    own = [o for o in parsed if not is_hydra_key(o.key_or_group)]
    runs_dir = _check_jobs(root, own)
    words = [o.input_line or "" for o in parsed if o.key_or_group != "name"]
    directory = make_sweep_dir(runs_dir, name_of(line), root.slug)
    plan = hydra_app.Plan(
        command=line.command,
        name=line.name,
        preset=line.preset,
        fixed=[hydra_app.key_of(word) for word in root.fixed],
        static=[o.get_key_element() for o in own if not o.is_sweep_override()],
        objective=line.objective,
        fail_fast=line.fail_fast,
    )
    hydra_app.write_plan(directory, plan)
    console.print(f"sweep: {directory}", highlight=False, soft_wrap=True)
    ended = hydra_app.sweep(root, directory, words)
    jobs = read_jobs(directory) if (directory / SWEEP_FILE).is_file() else []
    for job in jobs:
        job.state = standing(directory, job)
        if job.state == DONE or job.exit_code is None:
            job.exit_code = code_of(job.state)
    if jobs:
        jobs.sort(key=lambda job: job.id)
        write_jobs(directory, jobs)
        summarise(directory, jobs, console)
    else:
        console.print(f"no job began; see {directory / hydra_app.HYDRA_DIR}", highlight=False)
    return worst([ended, *(job.exit_code or 0 for job in jobs)]) if jobs else ended or 1


def _check_jobs(root: Root, own: Sequence[Override]) -> str:
    """Check keys, and the values of every job that is known now; returns `runs_dir`."""
    fixed = [o.input_line or "" for o in own if not o.is_sweep_override()]
    grid = [o.input_line or "" for o in own if not o.is_interval_sweep()]
    with hydra_conf():
        check(root, own)
        config = resolve(root, fixed, own)
    if len(grid) > len(fixed):
        expand(root, grid)
    return str(config["runs_dir"])
