"""Shards at URLs, fetched once into the cache because the user named them."""

from __future__ import annotations

import logging
import os
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


def is_remote(place: str) -> bool:
    """Whether `place` is fetched: http, https or the output of a command (`pipe:COMMAND`)."""
    return place.startswith(("http://", "https://", "pipe:"))


def fetch_shards(urls: list[str]) -> list[Path]:
    """Files in the cache, one for each URL, in order; only those not there are fetched.

    Raises:
        DataError: a URL that cannot be read to its end.
    """
    files = [_place(url) for url in urls]
    missing = [(url, file) for url, file in zip(urls, files) if not file.exists()]
    if missing:
        log.warning(f"fetching {len(missing)} shards into {files[0].parent.parent}, once")
    for url, file in missing:
        with locked(file.with_suffix(".lock"), f"fetching {url}"):
            if not file.exists():
                _fetch(url, file)
    return files


def _place(url: str) -> Path:
    name = url.split("?")[0].rsplit("/", 1)[-1]
    name = name if name.endswith(".tar") else "shard.tar"
    return cache_dir() / "fetched" / digest(url) / name


def _fetch(url: str, file: Path) -> None:
    tmp = file.with_suffix(".part")
    for attempt in range(_TRIES):
        try:
            with tmp.open("wb") as out:
                _pipe(url[5:], out) if url.startswith("pipe:") else _http(url, out)
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
    done = subprocess.run(command, shell=True, stdout=out, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        raise OSError(f"exit code {done.returncode}: {reason[-1] if reason else 'no message'}")
