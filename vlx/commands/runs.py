"""`vlx runs`, `vlx rerun`, `vlx resume`: what was run, again and further. Lists without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlx.commands.tables import REDUCED_GMACS, figure
from vlx.core.errors import VlxError
from vlx.core.names import check_folder_name
from vlx.core.plain import plain
from vlx.core.results import FILE_NAME, Metric, Results, read_results
from vlx.engine import rundir


@dataclass(frozen=True, kw_only=True)
class PastRun:
    """One row of `vlx runs`."""

    id: str
    command: str
    method: str
    preset: str
    seed: int
    state: str
    """As in run.json, or killed: it says running and no process holds the directory."""
    step: int
    total_steps: int
    metric: str | None
    value: float | None
    gmacs: float | None
    """Of one image with reduced tokens, where that was measured."""
    on_training_data: str
    """As in results.json: what was scored that was trained on."""
    when: str
    directory: str


def list_runs(directory: Path, *, as_json: bool, console: Console, errors: Console) -> int:
    """Print the runs under a directory; files that are no run's are named on stderr."""
    rows, problems = find_runs(directory)
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    else:
        console.print(runs_table(directory, rows) if rows else f"no runs in {directory}")
    for problem in problems:
        errors.print(f"skipped: {problem}", highlight=False, soft_wrap=True)
    return 0


def find_runs(directory: Path) -> tuple[list[PastRun], list[str]]:
    """Runs of a directory and of its sweeps, oldest first, and a line for each unreadable one."""
    if not directory.is_dir():
        raise VlxError(f"no directory {directory}; a run makes it (or give another: vlx runs DIR)")
    folders = [*directory.glob("*/"), *directory.glob("sweeps/*/*/")]
    rows, problems = [], []
    for folder in sorted(folders):
        if not (folder / rundir.RUN_FILE).exists() and not (folder / FILE_NAME).exists():
            continue
        try:
            rows.append(past_run(folder))
        except VlxError as error:
            problems.append(str(error))
    return sorted(rows, key=lambda row: (row.when, row.directory)), problems


def past_run(folder: Path) -> PastRun:
    """One run's row; a half-written or foreign file raises `VlxError`."""
    record = rundir.read_record(folder)
    results = read_results(folder) if (folder / FILE_NAME).exists() else None
    best = headline(results) if results else None
    return PastRun(
        id=record.id,
        command=record.command,
        method=record.method,
        preset=record.preset,
        seed=record.seed,
        state=state_of(folder, record),
        step=results.steps if results else record.step,
        total_steps=record.total_steps,
        metric=best.name if best else None,
        value=best.value if best else None,
        gmacs=results.value(REDUCED_GMACS, best.weights) if results and best else None,
        on_training_data=results.on_training_data if results else "",
        when=results.finished if results else record.created,
        directory=str(folder),
    )


def state_of(folder: Path, record: rundir.RunRecord) -> str:
    """The run's state; `killed` for one whose process is gone."""
    if record.state == "running" and not rundir.is_locked(folder):
        return "killed"
    return record.state


def headline(results: Results) -> Metric | None:
    """The first metric of the trained weights; of models with reduced tokens, the reduced one's."""
    found = [m for m in results.metrics if m.weights != "untrained"]
    reduced = [m for m in found if not m.name.endswith("/plain")]
    return next(iter(reduced or found), None)


def runs_table(directory: Path, rows: Sequence[PastRun]) -> Table:
    """A row a run, named by its place in `directory`."""
    table = Table()
    table.add_column("run", overflow="fold")
    for name in ("method", "seed", "state", "steps", "result", "when"):
        table.add_column(name, overflow="fold", no_wrap=name in ("state", "steps", "when"))
    colours = {"finished": "green", "failed": "red", "killed": "red", "running": "cyan"}
    for row in rows:
        colour = colours.get(row.state, "yellow")
        table.add_row(
            Path(row.directory).relative_to(directory).as_posix(),
            f"eval {row.method}" if row.command == "eval" else f"{row.method} {row.preset}",
            str(row.seed),
            Text(plain(row.state), style=colour),
            f"{row.step}/{row.total_steps}",
            _result(row),
            datetime.fromisoformat(row.when).astimezone().strftime("%Y-%m-%d %H:%M"),
        )
    return table


def _result(row: PastRun) -> str:
    mark = f" ({row.on_training_data})" if row.on_training_data else ""
    return _figures(row) + mark


def _figures(row: PastRun) -> str:
    if row.value is None:
        return ""
    if row.gmacs is None:
        return f"{row.metric} {figure(row.value)}"
    gmacs = f"{figure(row.gmacs, 'GMACs')} GMACs"
    if row.metric == REDUCED_GMACS:  # data without labels
        return f"reduced {gmacs}"
    what = str(row.metric).split("/")[1]
    return f"reduced {what} {figure(row.value)}, {gmacs}"


def rerun(run_dir: Path, name: str | None, console: Console) -> int:
    """Repeat a run from its frozen config in a new run directory."""
    from vlx.commands.start import prepare, run

    record, config = rundir.read_record(run_dir), read_config(run_dir)
    if name is not None:
        check_folder_name(name, "--name")
    config["name"] = name
    return run(prepare(config, record.overrides), console)


def read_config(run_dir: Path) -> dict[str, Any]:
    """A run's frozen configuration; raises `VlxError` when the directory holds none."""
    from vlx.engine.load import read_config as read

    config = read(run_dir)
    if not isinstance(config, dict) or not {"slug", "command", "launcher"} <= config.keys():
        raise VlxError(f"{run_dir / rundir.CONFIG_FILE} is not a configuration of vlx")
    return config


def resume(run_dir: Path, overrides: Sequence[str], console: Console) -> int:
    """Go on with a run; a finished one says so and shows its results.

    overrides: keys that change no number (`rundir.HARMLESS_KEYS`), written into its config.
    """
    from vlx.commands.start import print_results, run

    record = rundir.read_record(run_dir)
    if overrides:
        change_config(run_dir, overrides)
    if record.state == "finished":
        console.print(f"{run_dir} is finished; nothing to resume", highlight=False)
        print_results(run_dir, console)
        return 0
    return run(run_dir, console)


def change_config(run_dir: Path, overrides: Sequence[str]) -> None:
    """Write harmless overrides into `config.yaml`; refuse while another process runs it."""
    from vlx.config.compose import to_yaml
    from vlx.config.frozen import apply_harmless
    from vlx.core.files import write_atomic

    changed = apply_harmless(read_config(run_dir), overrides)
    with rundir.locked(run_dir):
        write_atomic(run_dir / rundir.CONFIG_FILE, to_yaml(changed))
