"""Names of what vlx makes: each is one folder's name."""

from __future__ import annotations

from vlx.core.errors import ConfigError

_MAX_BYTES = 200  # of 255: temporary files add to it


def folder_names(name: str | None, stamp: str) -> list[str]:
    """The names to try for a new folder: the one that was given, or a stamp, then numbered."""
    if name is not None:
        return [check_folder_name(name, "name")]
    return [stamp, *(f"{stamp}-{number}" for number in range(2, 100))]


def check_folder_name(name: str, what: str) -> str:
    """The name, where it is one of a folder; `what` says whose it is: `name`, `--name`.

    Raises:
        ConfigError: it is empty, `.` or `..`, begins or ends with a space or begins with `-`, holds
            a slash or a character that is not printable, or is too long.
    """
    reason = None
    if name.strip() != name or not name:
        reason = "must not be empty, nor begin or end with a space"
    elif name in (".", "..") or "/" in name or "\\" in name or name.startswith("-"):
        reason = "must be a folder's name without '/', and not begin with '-'"
    elif not name.isprintable():
        reason = "holds characters that cannot be printed"
    elif len(name.encode("utf-8", "surrogateescape")) > _MAX_BYTES:
        reason = f"is longer than {_MAX_BYTES} bytes"
    if reason:
        raise ConfigError(f"{what}={name!r} {reason}")
    return name
