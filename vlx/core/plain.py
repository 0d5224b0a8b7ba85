"""Text that a terminal shows and never obeys: names, values and captions are anybody's."""

from __future__ import annotations

import logging
import re
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.text import Text

# Controls (escape sequences begin with one), what turns the direction of the letters around it,
# separators that end a line, and halves of characters (file names that are no UTF-8).
_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_ACROSS_LINES = re.compile(f"(?!\n){_OBEYED.pattern}")

_Exception = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


def plain(text: str) -> str:
    """The text as one line, each character that a terminal would obey as its escape: `\\x1b`."""
    return _OBEYED.sub(_escape, text)


def plain_lines(text: str) -> str:
    """`plain` of a text whose line breaks are ours."""
    return _ACROSS_LINES.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


class PlainConsole(Console):
    """A console on which strings are data: each is one line of plain characters, never markup.

    Colours and line breaks of our own are `rich.text.Text`, or `style=`.
    """

    def __init__(
        self,
        *,
        stderr: bool = False,
        quiet: bool = False,
        file: IO[str] | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__(
            stderr=stderr,
            quiet=quiet,
            file=file,
            width=width,
            markup=False,
            emoji=False,  # rich would print the split of "google:train: 8" as a train
            highlight=False,
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich makes of every string: those printed, and those of a table's cells."""
        return super().render_str(plain(text), **options)


class PlainFormatter(logging.Formatter):
    """Lines of a log: a message is one line of plain characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        return plain(super().formatMessage(record))

    def formatException(self, ei: _Exception) -> str:  # noqa: N802
        return plain_lines(super().formatException(ei))
