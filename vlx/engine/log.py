"""The `vlx` log of a process in its run directory."""

from __future__ import annotations

import logging
from pathlib import Path

from vlx.core.plain import PlainFormatter
from vlx.engine import rundir

log = logging.getLogger("vlx")


class _RunLog(logging.FileHandler):
    """The run's log.txt; a full disk must not fill the terminal with tracebacks of logging."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        pass


def log_to(run_dir: Path, rank: int) -> None:
    """Send the `vlx` log to the run's log.txt (log-rankN.txt on other processes)."""
    handler = _RunLog(run_dir / rundir.log_file(rank))
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    for old in [h for h in log.handlers if isinstance(h, _RunLog)]:
        log.removeHandler(old)
        old.close()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
