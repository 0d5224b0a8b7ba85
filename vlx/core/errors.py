"""What the user can do something about. The command line prints these in one line, exit code 2."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

# Exit codes of `vlx`, documented in the README. 1 is left to Python: an unexpected crash.
EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: the run was saved and can be resumed


class VlxError(Exception):
    """A mistake in the input: what was wrong, the value, and what to type instead."""

    exit_code = EXIT_USER_ERROR


class ConfigError(VlxError):
    """A config key or value that does not fit; names the full key."""


class DataError(VlxError):
    """Data that is missing, damaged beyond the limit, or lacks a needed field."""


class CheckpointError(VlxError):
    """A checkpoint that is missing, damaged, or of another architecture."""


class StorageError(VlxError):
    """A file that cannot be written: full disk, read-only place, file-size limit."""


class DivergedError(VlxError):
    """The loss stayed non-finite for more steps than `train.max_skipped_steps` allows."""

    exit_code = EXIT_DIVERGED


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop
    """A signal asked the run to stop; its state was saved."""


def one_line(error: BaseException) -> str:
    """What an error of a library says, its line breaks as spaces; its kind where it says nothing.

    Escape codes of terminals are left out.
    """
    words = " ".join(_ESCAPE_CODE.sub("", str(error)).split())
    return words or type(error).__name__


_ESCAPE_CODE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """`"Did you mean a, b?"`, or every known name when none is near and they are few."""
    known = sorted(known)
    matches = get_close_matches(name, known, n=count, cutoff=0.5)
    if not matches:
        by_last = {key.rsplit(".", 1)[-1]: key for key in known}
        last = get_close_matches(name.rsplit(".", 1)[-1], by_last, n=count, cutoff=0.7)
        matches = [by_last[key] for key in last]
    if matches:
        return f"Did you mean {', '.join(matches)}?"
    return f"Known: {', '.join(known)}." if 0 < len(known) <= 12 else ""
