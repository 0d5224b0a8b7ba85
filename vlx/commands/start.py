"""From a command line to a run directory, and from a run directory to a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vlx.commands.tables import counts_lines, results_tables
from vlx.commands.typed_command import run_typed_command
from vlx.config.compose import (
    Root,
    compose_root,
    evaluation_root,
    method_root,
    plain_words,
    to_yaml,
)
from vlx.core import registry
from vlx.core.errors import ConfigError, VlxError, nearest
from vlx.core.files import write_atomic
from vlx.core.results import read_results
from vlx.data.config import DataConfig
from vlx.engine import rundir
from vlx.engine.environment import git_commit, versions
from vlx.engine.launch import launch, read_launcher
from vlx.engine.load import from_dict
from vlx.evals.registry import EVALUATORS


@dataclass(frozen=True, kw_only=True)
class Line:
    """The words of a command that runs something."""

    command: str
    name: str
    """A method's slug, or for `eval` an evaluator."""
    preset: str | None = None
    overrides: Sequence[str] = ()
    cfg: str | None = None
    dry_run: bool = False
    multirun: bool = False
    sweep: bool = False
    """A multirun over the rates that the method's paper names."""
    jobs: int = 1
    fail_fast: bool = False
    objective: str | None = None
    in_sweep: Path | None = None
    """Run directory within a plugin's sweep; set by vlx itself."""


def start(line: Line, console: Console) -> int:
    """Do what a line says and print what came out. Returns an exit code."""
    root = root_of(line)
    if line.sweep:
        line = over_rates(line, root)
    if line.cfg not in (None, "job"):
        raise ConfigError(f"--cfg {line.cfg}: only --cfg job, the resolved configuration")
    if line.multirun:
        from vlx.commands.multirun import multirun

        return multirun(line, root, console)
    config = compose_root(root, line.overrides)
    if line.cfg:
        sys.stdout.write(to_yaml(config))
        return 0
    if line.dry_run:
        from vlx.commands.dry_run import print_dry_run

        print_dry_run(config, console)
        return 0
    run_typed_command(from_dict(DataConfig, config["data"], "data."), line.overrides)
    if line.in_sweep is not None:
        from vlx.commands.multirun import run_in_sweep

        return run_in_sweep(line, line.in_sweep, config, console)
    check_model(config)
    return run(prepare(config, line.overrides), console)


def over_rates(line: Line, root: Root) -> Line:
    """The line as a multirun over the rates of the method's paper.

    A key of the paper's that the line sets itself keeps the line's values.
    """
    rates = registry.find(root.slug).paper.sweep if root.file == "run" else ()
    if not rates:
        raise ConfigError(
            f"--sweep: {line.name} names no rates; sweep keys of your own with -m, e.g. -m seed=0,1"
        )
    given = {word.split("=", 1)[0].lstrip("+") for word in plain_words(root, line.overrides)}
    added = [word for word in rates if word.split("=", 1)[0] not in given]
    return replace(line, multirun=True, overrides=[*added, *line.overrides])


def check_model(config: dict[str, Any]) -> None:
    """Refuse what the method refuses when it is built, before anything is written.

    Builds it from shapes alone, without weights or data; imports torch.
    """
    if config["method"] is None:  # an evaluation: what it builds is in a checkpoint
        return
    from vlx.engine.build import check_build
    from vlx.engine.load import run_config

    check_build(run_config(config))


def root_of(line: Line) -> Root:
    """What the line's overrides apply to; checks the command, the name and the preset."""
    if line.command == "eval" and line.name in EVALUATORS:
        if line.preset is not None:
            raise ConfigError(f"--preset {line.preset}: vlx eval {line.name} has no presets")
        return evaluation_root(line.name, line.overrides)
    check_command(line.command, line.name)
    return method_root(line.name, line.command, line.preset)


def check_command(command: str, slug: str) -> None:
    """Raise `VlxError` when the method belongs to another command, naming it."""
    papers = registry.papers()
    if command == "eval" and slug not in papers:
        own = [name for name, paper in papers.items() if "eval" in paper.commands]
        raise VlxError(f"no evaluation '{slug}'. {nearest(slug, [*EVALUATORS, *own])}".rstrip())
    commands = registry.find(slug).paper.commands
    if command not in commands:
        raise VlxError(f"{slug} belongs to another command: vlx {commands[0]} {slug}")


def prepare(
    config: dict[str, Any],
    overrides: Sequence[str],
    *,
    sweep: str | None = None,
    run_dir: Path | None = None,
) -> Path:
    """Make the run directory with its frozen `config.yaml` and its `run.json`.

    run_dir: where a sweep wants it; None names it after time, method and seed. One that is there
    without a `run.json` (somebody was killed here) is used.
    """
    if run_dir is None:
        run_dir = rundir.make_run_dir(
            config["runs_dir"], config["name"], config["slug"], config["seed"]
        )
    else:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VlxError(f"cannot make {run_dir}: {error.strerror}") from error
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
    console.print(f"run directory: {run_dir}", highlight=False, soft_wrap=True)
    code = launch(run_dir, read_launcher(run_dir))
    if code == 0:
        print_results(run_dir, console)
    return code


def print_results(run_dir: Path, console: Console) -> None:
    """The trained encoder's numbers beside the untrained one's, and where everything is."""
    results = read_results(run_dir)
    for table in results_tables(results):
        console.print(table)
    for line in counts_lines(results):
        console.print(line, highlight=False, soft_wrap=True)
    for picture in results.pictures:
        if "untrained" not in picture:
            console.print(f"picture: {run_dir / picture}", highlight=False, soft_wrap=True)
    console.print(f"results: {run_dir / 'results.json'}", highlight=False, soft_wrap=True)
