"""Names and values on a terminal: shown as they are, obeyed never."""

from __future__ import annotations

import ast
import io
import logging
import sys

import pytest
from rich.table import Table

from tests.conftest import ROOT
from vlx.core.plain import PlainConsole, PlainFormatter, plain, plain_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mk[/b] [knn] :train:", "mk[/b] [knn] :train:"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("cat\u202egpj.exe", r"cat\u202egpj.exe"),
        ("\u2067x\u2069\u200f\u061c", r"\u2067x\u2069\u200f\u061c"),
        ("one\rtwo\nthree\u2028four", r"one\rtwo\nthree\u2028four"),
        ("caf\udce9", r"caf\udce9"),  # a file name in Latin-1
        ("été 猫 👩\u200d🚀 שלום", "été 猫 👩\u200d🚀 שלום"),
    ],
)
def test_what_a_terminal_would_obey_is_its_escape(text: str, shown: str) -> None:
    assert plain(text) == plain(shown) == shown
    console = PlainConsole(file=io.StringIO(), width=80)
    console.print(text)
    table = Table(text, title=text)
    table.add_row(text)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == shown
    assert len([line for line in lines if shown in line]) == 4  # printed, title, head, cell


def test_line_breaks_of_our_own_stay() -> None:
    assert plain_lines("a: 1\nb: \x1b[1m\n") == "a: 1\nb: \\x1b[1m\n"


def test_a_message_of_a_log_is_one_line_and_a_traceback_has_several() -> None:
    formatter = PlainFormatter("%(levelname)s %(message)s")
    name = "\x1b[2J\nINFO forged"
    record = logging.LogRecord("vlx", logging.INFO, "f", 1, "class %s", (name,), None)
    assert formatter.format(record) == r"INFO class \x1b[2J\nINFO forged"
    try:
        raise ValueError(name)
    except ValueError:
        record.exc_info = sys.exc_info()
    text = formatter.format(record)
    assert "\x1b" not in text
    assert "\nTraceback" in text


def test_no_other_console_and_no_markup_in_vlx() -> None:
    for file in sorted((ROOT / "vlx").rglob("*.py")):
        if file.name == "plain.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rsplit(".", 1)[-1]
                assert name not in ("Console", "from_markup", "StreamHandler") or (
                    name == "StreamHandler" and file.name == "worker.py"
                ), f"{file}:{node.lineno}: {name}: use vlx.core.plain and rich.text.Text"
                if name == "TextColumn":
                    assert "markup=False" in ast.unparse(node), f"{file}:{node.lineno}"
            if isinstance(node, ast.ImportFrom):
                assert node.module != "rich.markup", f"{file}:{node.lineno}"
