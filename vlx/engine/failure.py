"""How a process of a distributed run tells the one that started it why it failed.

A pipe, not a file: the reason may be a full disk. Importable without torch.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field

REPORT_ENV = "VLX_REPORT_FD"


@dataclass(frozen=True)
class Failure:
    """One line for the user, the exit code, and what it takes to find the first of several."""

    message: str
    exit_code: int
    time: float = field(default_factory=time.time)
    lost_peer: bool = False
    """Failed because another process was gone."""


def report(failure: Failure) -> bool:
    """Tell the starting process; False where none listens."""
    descriptor = os.environ.get(REPORT_ENV)
    if descriptor is None:
        return False
    try:
        os.write(int(descriptor), json.dumps(asdict(failure)).encode())
    except OSError:
        return False
    return True
