"""One process of a distributed run: `python -m vlx.engine.worker RUN_DIR`."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from vlx.core.errors import VlxError
from vlx.core.plain import PlainFormatter, plain
from vlx.engine import rundir
from vlx.engine.failure import Failure, report
from vlx.engine.run import execute

log = logging.getLogger("vlx")
_SET_PARENT_DEATH_SIGNAL = 1  # Linux's PR_SET_PDEATHSIG


def main() -> int:
    run_dir = Path(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))
    _stop_with_parent()
    if rank == 0:
        shown = logging.StreamHandler()
        shown.setLevel(logging.WARNING)
        shown.setFormatter(PlainFormatter())
        log.addHandler(shown)
    try:
        return execute(run_dir)
    except VlxError as error:
        failure = Failure(str(error), error.exit_code)
    except Exception as error:
        log.info("this process failed", exc_info=True)  # to its own log: the line is enough here
        reason = str(error).strip().splitlines() or [""]
        failure = Failure(
            f"process {rank} failed: {type(error).__name__}: {reason[0]}; the traceback is in "
            f"{run_dir / rundir.log_file(rank)}",
            1,
            lost_peer=is_lost_peer(error),
        )
    if not report(failure):
        print(f"error: {plain(failure.message)}", file=sys.stderr)
    return failure.exit_code


def is_lost_peer(error: Exception) -> bool:
    """Whether an exchange failed because another process was gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _stop_with_parent() -> None:
    """Have the kernel send SIGTERM (save and stop) when the starting process dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
