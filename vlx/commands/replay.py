"""`vlx replay RUN`: the step at which a run stopped being finite, computed again."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlx.core.errors import VlxError
from vlx.engine.load import read_config, run_config
from vlx.engine.nonfinite import Replay, evidence_folders, replay
from vlx.engine.rundir import read_record

_SHOWN_IDS = 6


def replay_run(run_dir: Path, console: Console) -> Replay:
    """Recompute the newest non-finite step of a run and print losses by micro-batch."""
    read_record(run_dir)
    folders = evidence_folders(run_dir)
    if not folders:
        raise VlxError(f"{run_dir} has no step whose loss or gradient was not finite")
    found = replay(run_config(read_config(run_dir)), folders[-1])
    console.print(_table(found))
    evidence = found.evidence
    for line in (
        f"gradient norm: {found.grad_norm:g} now, {evidence.grad_norm:g} in the run",
        f"mean losses in the run: {_losses(evidence.losses)}",
        f"weights: {folders[-1]}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    return found


def _table(found: Replay) -> Table:
    table = Table(title=f"step {found.evidence.step + 1}, computed again")
    for column in ("process", "micro-batch", "losses", "finite", "samples"):
        table.add_column(column)
    for row in found.micro_batches:
        finite = all(math.isfinite(value) for value in row.losses.values())
        ids = ", ".join(map(str, row.sample_ids[:_SHOWN_IDS]))
        more = len(row.sample_ids) - _SHOWN_IDS
        table.add_row(
            str(row.rank),
            str(row.micro),
            _losses(row.losses),
            "yes" if finite else "no",
            ids + (f" and {more} more" if more > 0 else ""),
        )
    return table


def _losses(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in losses.items())
