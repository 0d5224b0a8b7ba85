"""SIGINT, SIGTERM and SIGUSR2 ask a run to save and stop; a second SIGINT leaves at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Set by a signal; the loop looks at it after every step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def signal_name(self) -> str:
        return self.signal.name if self.signal is not None else "another process"

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        self.signal = signal.Signals(number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Install the handlers for the length of a run; a no-op outside the main thread."""
    request = StopRequest()
    previous = {}
    try:
        for number in _STOPPING:
            previous[number] = signal.signal(number, request.handle)
    except ValueError:  # not the main thread: nothing to install
        pass
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
