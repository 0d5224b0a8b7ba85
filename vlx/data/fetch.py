"""Shards at URLs, fetched once into the cache because the user named them."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO, cast

from vlx.core.errors import DataError
from vlx.data.cache import cache_dir, digest, locked

log = logging.getLogger("vlx")
_TRIES = 3
_TIMEOUT_S = 60
COMMAND = "pipe:"
_OF_A_SHELL = frozenset(("|", "||", "&", "&&", ";", "<", "<<", ">", ">>"))


def is_remote(place: str) -> bool:
    """Whether `place` is fetched: http, https or the output of a command (`pipe:COMMAND`)."""
    return place.startswith(("http://", "https://", COMMAND))


def fetch_shards(urls: list[str], *, run_commands: bool = False) -> list[Path]:
    """Files in the cache, one for each URL, in order; only those not there are fetched.

    run_commands: whether a `pipe:COMMAND` may be run. Only what the user typed on this command
    line may: a path may also come from a stranger's run directory or preset.

    Raises:
        DataError: a URL that cannot be read to its end, or a command that may not be run.
    """
    files = [_place(url) for url in urls]
    missing = [(url, file) for url, file in zip(urls, files) if not file.exists()]
    commands = [url for url, _ in missing if url.startswith(COMMAND)]
    if commands and not run_commands:
        raise DataError(
            f"data.path={commands[0]} is a command, and is run only where it is typed: look at it, "
            "then type `vlx data show webdataset data.path=...` with it, which keeps its output"
        )
    if missing:
        log.warning(f"fetching {len(missing)} shards into {files[0].parent.parent}, once")
    for url, file in missing:
        with locked(file.with_suffix(".lock"), f"fetching {url}"):
            if not file.exists():
                _fetch(url, file)
    return files


def to_fetch(urls: list[str]) -> list[str]:
    """Those that are not in the cache."""
    return [url for url in urls if not _place(url).exists()]


def _place(url: str) -> Path:
    name = url.split("?")[0].rsplit("/", 1)[-1]
    name = name if name.endswith(".tar") else "shard.tar"
    return cache_dir() / "fetched" / digest(url) / name


def _fetch(url: str, file: Path) -> None:
    tmp = file.with_suffix(".part")
    for attempt in range(_TRIES):
        try:
            with tmp.open("wb") as out:
                if url.startswith(COMMAND):
                    _pipe(url.removeprefix(COMMAND), out)
                else:
                    _http(url, out)
                out.flush()
                os.fsync(out.fileno())
            tmp.rename(file)
            return
        except (OSError, EOFError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or attempt == _TRIES - 1:
                raise DataError(f"cannot fetch {url}: {error}") from error
        finally:
            tmp.unlink(missing_ok=True)


def _http(url: str, out: BinaryIO) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
        shutil.copyfileobj(cast(BinaryIO, response), out, 1 << 20)
        expected = response.headers.get("Content-Length")
    if expected is not None and out.tell() != int(expected):
        raise EOFError(f"{out.tell()} of {expected} bytes came")


def _pipe(command: str, out: BinaryIO) -> None:
    """The command's output, as `exec` runs it: no shell reads it."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise DataError(f"cannot read the command '{command}': {str(error).lower()}") from None
    shell = next((word for word in words if word in _OF_A_SHELL), None)
    if shell or not words:
        raise DataError(
            f"{COMMAND}{command}: no shell reads it, so that '{shell}' means nothing: put it in a "
            f"script, {COMMAND}./SCRIPT"
            if shell
            else f"{COMMAND} has no command behind it: {COMMAND}cat FILE.tar"
        )
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise OSError(f"exit code {done.returncode}: {reason[-1] if reason else 'no message'}")
