"""The `vlx` command. Imports no torch: everything heavy is imported by the command that runs."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vlx.core import registry
from vlx.core.errors import EXIT_USER_ERROR, VlxError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Run, compare and extend published vision and vision-language methods.",
)
console = Console()
errors = Console(stderr=True)

# Options may stand anywhere among the overrides; what typer does not know reaches `rest`.
_OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}
Method = Annotated[str, typer.Argument(help="The method's slug; `vlx list` shows all.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value overrides, e.g. train.steps=200 data=cifar10")
]
Preset = Annotated[
    str | None, typer.Option("--preset", "-p", help="smoke, tiny (default), paper, or a file.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def _run(command: str, method: str, rest: list[str] | None, preset: str | None) -> None:
    from vlx.commands.start import start

    raise typer.Exit(start(command, method, preset, rest or [], console))


@app.command("pretrain-mim", context_settings=_OPEN, help="Pre-train a masked-image method.")
@app.command("pretrain", context_settings=_OPEN, help="Alias of pretrain-mim.")
def pretrain(
    method: Method, rest: Overrides = None, preset: Preset = None, debug: Debug = False
) -> None:
    _run("pretrain-mim", method, rest, preset)


@app.command("align", context_settings=_OPEN, help="Align images and text.")
def align(
    method: Method, rest: Overrides = None, preset: Preset = None, debug: Debug = False
) -> None:
    _run("align", method, rest, preset)


@app.command("finetune", context_settings=_OPEN, help="Adapt an encoder to a task.")
def finetune(
    method: Method, rest: Overrides = None, preset: Preset = None, debug: Debug = False
) -> None:
    _run("finetune", method, rest, preset)


@app.command("prune-tokens", context_settings=_OPEN, help="Reduce the tokens of a ViT.")
def prune_tokens(
    method: Method, rest: Overrides = None, preset: Preset = None, debug: Debug = False
) -> None:
    _run("prune-tokens", method, rest, preset)


@app.command("resume", help="Go on with an interrupted run.")
def resume(run: Annotated[Path, typer.Argument()], debug: Debug = False) -> None:
    from vlx.commands.start import resume as resume_run

    raise typer.Exit(resume_run(run, console))


@app.command("replay", help="Compute the step again at which a run's loss was not finite.")
def replay(run: Annotated[Path, typer.Argument()], debug: Debug = False) -> None:
    from vlx.commands.replay import replay_run

    replay_run(run, console)


@app.command("list", help="List the methods.")
def list_methods(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    papers = registry.papers()
    if as_json:
        rows = [
            {
                "slug": p.slug,
                "number": p.number,
                "title": p.title,
                "commands": p.commands,
                "family": p.family,
                "modalities": p.modalities,
                "year": p.year,
                "url": p.url,
            }
            for p in papers.values()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("slug", "title", "command", "family", "modalities")
    for paper in papers.values():
        table.add_row(
            paper.slug,
            paper.title,
            ", ".join(paper.commands),
            paper.family,
            ", ".join(paper.modalities),
        )
    console.print(table)


def main() -> None:
    """Entry point: a `VlxError` is one line on stderr and its exit code; `--debug` shows more."""
    logging.getLogger("vlx").addHandler(_StderrHandler())
    try:
        app()
    except VlxError as error:
        if "--debug" in sys.argv:
            raise
        errors.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_USER_ERROR)


class _StderrHandler(logging.Handler):
    """Warnings of a run, above its progress bar."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        errors.print(f"[yellow]{_escape(record.getMessage())}[/]", highlight=False, soft_wrap=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
