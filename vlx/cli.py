"""The `vlx` command. Imports no torch: everything heavy is imported by the command that runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from vlx import __version__
from vlx.core.errors import EXIT_USER_ERROR, VlxError
from vlx.core.plain import PlainConsole, plain

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Run, compare and extend published vision and vision-language methods.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data: what there is, what it holds.")
app.add_typer(data_app, name="data")
console = PlainConsole()
errors = PlainConsole(stderr=True)


def _complete(what: str) -> Callable[[typer.Context, str], list[Any]]:
    """A shell completion of `commands.complete`, imported when the shell asks."""

    def complete(ctx: typer.Context, incomplete: str) -> list[Any]:
        from vlx.commands import complete as completions

        return getattr(completions, what)(ctx, incomplete)

    return complete


Method = Annotated[
    str,
    typer.Argument(
        help="The method's slug (`vlx list`); for `eval`, an evaluator.",
        autocompletion=_complete("methods"),
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value overrides, e.g. train.steps=200 data=cifar10; see `vlx show METHOD`.",
        autocompletion=_complete("overrides"),
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        help="smoke, tiny (default), paper, or a file.",
        autocompletion=_complete("preset_names"),
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print sizes, costs and the config; run nothing.")
]
Cfg = Annotated[
    str | None, typer.Option("--cfg", "-c", help="job: print the resolved config; run nothing.")
]
Multirun = Annotated[
    bool,
    typer.Option(
        "--multirun",
        "-m",
        help="Run every combination of keys with several values, e.g. seed=0,1,2. "
        "hydra/launcher=NAME and hydra/sweeper=NAME use Hydra's plugins.",
    ),
]
Sweep = Annotated[
    bool,
    typer.Option(
        "--sweep",
        help="A multirun over the rates of the method's paper, ending in a Pareto table and plot; "
        "a key with values of your own takes the place of the paper's.",
    ),
]
Jobs = Annotated[int, typer.Option("--jobs", help="Jobs of a sweep at work at once.")]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Stop a sweep at its first failure.")]
Objective = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="Metric that a hydra/sweeper optimises, e.g. knn/top1; else the first of the results.",
    ),
]
InSweep = Annotated[Path | None, typer.Option("--in-sweep", hidden=True)]
RunDir = Annotated[
    Path, typer.Argument(help="A run's directory.", autocompletion=_complete("run_dirs"))
]

# What runs a method, with the line of help; `eval` also takes evaluators.
_COMMANDS = {
    "pretrain-mim": "Pre-train a masked-image method.",
    "pretrain": "Alias of pretrain-mim.",
    "align": "Align images and text.",
    "finetune": "Adapt an encoder to a task.",
    "prune-tokens": "Reduce the tokens of a ViT.",
    "eval": "Evaluate an encoder: knn, linear-probe, reconstruction; a classifier: classification, "
    "tokens.",
}
_ALIASES = {"pretrain": "pretrain-mim"}


def run_method(
    ctx: typer.Context,
    method: Method,
    rest: Overrides = None,
    preset: Preset = None,
    dry_run: DryRun = False,
    cfg: Cfg = None,
    multirun: Multirun = False,
    sweep: Sweep = False,
    jobs: Jobs = 1,
    fail_fast: FailFast = False,
    objective: Objective = None,
    in_sweep: InSweep = None,
    debug: Debug = False,
) -> None:
    """Every command that runs something; its name says which."""
    from vlx.commands.start import Line, start

    name = ctx.info_name or ""
    line = Line(
        command=_ALIASES.get(name, name),
        name=method,
        preset=preset,
        overrides=rest or [],
        cfg=cfg,
        dry_run=dry_run,
        multirun=multirun,
        sweep=sweep,
        jobs=jobs,
        fail_fast=fail_fast,
        objective=objective,
        in_sweep=in_sweep,
    )
    raise typer.Exit(start(line, console))


for _name, _help in _COMMANDS.items():
    app.command(_name, help=_help)(run_method)


@app.command("sweep", help="Go on with a sweep: run its missing and failed jobs.")
def sweep(
    directory: Annotated[
        Path,
        typer.Argument(
            help="runs/sweeps/NAME, made by --multirun.", autocompletion=_complete("sweep_dirs")
        ),
    ],
    jobs: Jobs = 1,
    fail_fast: FailFast = False,
    debug: Debug = False,
) -> None:
    from vlx.commands.sweep import go_on

    raise typer.Exit(go_on(directory, console, parallel=jobs, fail_fast=fail_fast))


@app.command("runs", help="Past runs, their state and headline numbers.")
def runs(
    directory: Annotated[Path, typer.Argument(help="Where the runs are.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    debug: Debug = False,
) -> None:
    from vlx.commands.runs import list_runs

    list_runs(directory, as_json=as_json, console=console, errors=errors)


@app.command("resume", help="Go on with an interrupted run.")
def resume(run: RunDir, rest: Overrides = None, debug: Debug = False) -> None:
    from vlx.commands.runs import resume as resume_run

    raise typer.Exit(resume_run(run, rest or [], console))


@app.command("rerun", help="Repeat a run from its frozen configuration.")
def rerun(
    run: RunDir,
    name: Annotated[str | None, typer.Option("--name", help="Of the new run directory.")] = None,
    debug: Debug = False,
) -> None:
    from vlx.commands.runs import rerun as rerun_run

    raise typer.Exit(rerun_run(run, name, console))


@app.command("export", help="Write a run's encoder for timm or transformers.")
def export(
    run: Annotated[Path, typer.Argument(help="The run's directory.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    layout: Annotated[str, typer.Option("--format", help="timm, or hf: transformers.")] = "timm",
    debug: Debug = False,
) -> None:
    from vlx.commands.export import export as export_run

    raise typer.Exit(export_run(run, out, layout, console))


@app.command("replay", help="Compute the step again at which a run's loss was not finite.")
def replay(run: Annotated[Path, typer.Argument()], debug: Debug = False) -> None:
    from vlx.commands.replay import replay_run

    replay_run(run, console)


@app.command("list", help="List the methods.")
def list_methods(
    command: Annotated[str | None, typer.Option(help="Only those of a command.")] = None,
    family: Annotated[str | None, typer.Option(help="Only those of a family.")] = None,
    modality: Annotated[str | None, typer.Option(help="Only those that use it.")] = None,
    search: Annotated[str | None, typer.Option(help="Only those with this text.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The README's table.")] = False,
    debug: Debug = False,
) -> None:
    from vlx.commands.listing import list_methods as list_all

    list_all(
        command=command,
        family=family,
        modality=modality,
        search=search,
        form="json" if as_json else "markdown" if as_markdown else "table",
        console=console,
        errors=errors,
    )


@app.command("show", help="A method: its paper, every config key, its presets, its data.")
def show(method: Method, debug: Debug = False) -> None:
    from vlx.commands.listing import show as show_method

    show_method(method, console)


@app.command("doctor", help="What works here, and what to type to mend the rest.")
def doctor(debug: Debug = False) -> None:
    from vlx.commands.doctor import doctor as examine

    raise typer.Exit(examine(console))


@app.callback(invoke_without_command=True)
def vlx(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@data_app.command("list", help="Kinds of data sources and what they read.")
def data_list() -> None:
    from vlx.commands.data import list_sources

    list_sources(console)


@data_app.command("show", help="Samples, fields, classes, damaged files.")
def data_show(
    name: Annotated[str, typer.Argument(help="A kind of source, or a name of conf/data.")],
    rest: Overrides = None,
    check: Annotated[int, typer.Option(help="Samples of each split to decode.")] = 64,
    debug: Debug = False,
) -> None:
    from vlx.commands.data import show

    show(name, rest or [], check, console)


@data_app.command("preview", help="A picture of what a method will see.")
def data_preview(
    method: Method,
    rest: Overrides = None,
    preset: Preset = None,
    out: Annotated[Path | None, typer.Option(help="File to write; preview-METHOD.png.")] = None,
    samples: Annotated[int, typer.Option(help="Rows of the grid.")] = 8,
    debug: Debug = False,
) -> None:
    from vlx.commands.data import preview

    file = preview(method, preset, rest or [], out or Path(f"preview-{method}.png"), samples)
    console.print(f"picture: {file}", soft_wrap=True)


def main() -> None:
    """Entry point: a mistake is one line on stderr and exit code 2; `--debug` shows more."""
    logging.getLogger("vlx").addHandler(_StderrHandler())
    try:
        code = app(prog_name="vlx", standalone_mode=False)
    except VlxError as error:
        if "--debug" in sys.argv:
            raise
        _say_error(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own: an unknown option, a missing word
            raise
        _say_error(error.format_message())  # type: ignore[attr-defined]
        sys.exit(EXIT_USER_ERROR)
    sys.exit(code if isinstance(code, int) else 0)


def _say_error(text: str) -> None:
    line = plain(" ".join(text.split()))
    errors.print(Text.assemble(("error:", "bold red"), " ", line), soft_wrap=True)


class _StderrHandler(logging.Handler):
    """Warnings of a run, above its progress bar."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        errors.print(record.getMessage(), style="yellow", soft_wrap=True)
