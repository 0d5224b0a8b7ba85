"""`vlx list` and `vlx show`: what there is. Without torch, but for what the data must contain."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vlx.config.paths import presets
from vlx.core import registry
from vlx.core.errors import VlxError, nearest
from vlx.core.paper import COMMANDS, Paper

ALIASES = {"pretrain": "pretrain-mim"}


def list_methods(
    *,
    command: str | None,
    family: str | None,
    modality: str | None,
    search: str | None,
    form: str,
    console: Console,
    errors: Console,
) -> None:
    """Print the methods that pass every filter, as a `table`, `json` or `markdown`.

    Plugins that could not be read are named below the table; on stderr for the other forms.
    """
    entries, problems = registry.scan()
    every = [entry.paper for entry in entries.values()]
    papers = select(every, command=command, family=family, modality=modality, search=search)
    if form == "json":
        sys.stdout.write(json.dumps([as_row(paper) for paper in papers], indent=2) + "\n")
    elif form == "markdown":
        sys.stdout.write(markdown(papers))
    else:
        console.print(methods_table(papers) if papers else "no method passes these filters")
    notes = errors if form != "table" else console
    for problem in problems:
        notes.print(f"not listed: {problem}", highlight=False, soft_wrap=True)


def select(
    papers: Sequence[Paper],
    *,
    command: str | None = None,
    family: str | None = None,
    modality: str | None = None,
    search: str | None = None,
) -> list[Paper]:
    """The papers that pass every filter; an unknown value raises `VlxError` with the nearest."""
    if command is not None:
        command = ALIASES.get(command, command)
        _check("--command", command, [*COMMANDS, *ALIASES])
        papers = [paper for paper in papers if command in paper.commands]
    if family is not None:
        _check("--family", family, {paper.family for paper in papers})
        papers = [paper for paper in papers if paper.family == family]
    if modality is not None:
        _check("--modality", modality, {name for paper in papers for name in paper.modalities})
        papers = [paper for paper in papers if modality in paper.modalities]
    if search is not None:
        wanted = search.lower()
        papers = [paper for paper in papers if wanted in _searched(paper)]
    return list(papers)


def _searched(paper: Paper) -> str:
    return f"{paper.slug} {paper.title} {paper.family} {paper.venue} {paper.year}".lower()


def _check(option: str, value: str, known: Any) -> None:
    if known and value not in known:
        raise VlxError(f"{option} {value} is unknown. {nearest(value, known)}".rstrip())


def as_row(paper: Paper) -> dict[str, Any]:
    """A paper as `vlx list --json` gives it."""
    return {
        "slug": paper.slug,
        "number": paper.number,
        "title": paper.title,
        "commands": list(paper.commands),
        "family": paper.family,
        "modalities": list(paper.modalities),
        "year": paper.year,
        "venue": paper.venue,
        "url": paper.url,
        "presets": list(presets(paper.slug)),
    }


def methods_table(papers: Sequence[Paper]) -> Table:
    """A row a method."""
    table = Table()
    table.add_column("slug", no_wrap=True)
    for name in ("title", "command", "family", "modalities"):
        table.add_column(name)
    for paper in papers:
        table.add_row(
            paper.slug,
            f"{paper.title} ({paper.venue} {paper.year})",
            ", ".join(paper.commands),
            paper.family,
            ", ".join(paper.modalities),
        )
    return table


def markdown(papers: Sequence[Paper]) -> str:
    """The table of methods in the README, between its `methods` markers."""
    lines = ["| method | paper | command | family | modalities |", "|---|---|---|---|---|"]
    for paper in papers:
        title = paper.title.replace("|", "\\|")
        lines.append(
            f"| `{paper.slug}` | [{title}]({paper.url}) ({paper.venue} {paper.year}) "
            f"| {', '.join(f'`{command}`' for command in paper.commands)} "
            f"| {paper.family} | {', '.join(paper.modalities)} |"
        )
    return "\n".join(lines) + "\n"


def show(slug: str, console: Console) -> None:
    """A method's paper, presets, every config key, and what its data must contain."""
    from vlx.config.compose import keys
    from vlx.config.meanings import describe, head_comment, module_text

    paper = registry.find(slug).paper
    _print(console, f"{paper.slug}: {paper.title}")
    _print(console, f"{paper.venue} {paper.year}, {paper.url}")
    place = f"number {paper.number} of the list, " if paper.number else ""
    commands = ", ".join(f"vlx {command} {slug}" for command in paper.commands)
    _print(console, f"{place}family {paper.family}, {', '.join(paper.modalities)}; {commands}")
    if paper.trainable_params is not None:
        figures = f"{paper.trainable_params:,} trainable parameters"
        figures += f", {paper.gmacs:g} GMACs a sample" if paper.gmacs is not None else ""
        _print(console, f"published, and checked on the paper preset: {figures}")
    _print(console, "", *module_text(slug).splitlines(), "")
    for name, file in presets(slug).items():
        _print(console, f"--preset {name}: {head_comment(file) or file}")
    columns = {name: keys(slug, name) for name in ("tiny", "paper") if name in presets(slug)}
    console.print(keys_table(describe(slug), columns))
    _print(console, *_data_lines(slug))


def keys_table(described: Mapping[str, Any], columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row a key: its type, its value under each preset, its meaning.

    described: `meanings.Key` by dotted name. columns: values by dotted name, for each preset.
    """
    table = Table(title="config keys, set as key=value")
    table.add_column("key", no_wrap=True)
    table.add_column("type")
    for preset in columns:
        table.add_column(preset)
    table.add_column("meaning")
    for name, key in described.items():
        if name in ("command", "slug", "preset"):  # words of the command line, not overrides
            continue
        values = [_value(column, name) for column in columns.values()]
        if all(value is None for value in values):  # below a section that is null in every preset
            continue
        table.add_row(name, key.type, *(value or "" for value in values), key.meaning)
    return table


def _value(column: Mapping[str, Any], name: str) -> str | None:
    if name not in column:
        below = any(key.startswith(f"{name}.") for key in column)
        return "see below" if below else None
    value = column[name]
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _data_lines(slug: str) -> list[str]:
    """What the data must contain. Imports the method, and so torch."""
    from vlx.core import fields
    from vlx.engine.load import run_config

    config = _tiny(slug)
    needs = registry.load(slug).needs(run_config(config).method)
    known = {f.name: f for f in vars(fields).values() if isinstance(f, fields.Field)}
    known |= {field.name: field for field in needs.fields}
    lines = ["the data must contain:"]
    for name in needs.source_fields:
        field = known.get(name)
        text = f"{field.layout}, {field.meaning}" if field else "a field of the source"
        lines.append(f"  {name}: {text}")
    lines.append("and the method sees these views of it:")
    for view in needs.views:
        ops = ", ".join(type(op).__name__ for op in view.ops) or "as it is"
        size = f"{view.size} pixels" if view.size else "the encoder's image size"
        unseen = "" if view.keep else ", for other views only"
        lines.append(f"  {view.name}: {ops} of {view.of}, at {size}{unseen}")
    return lines


def _tiny(slug: str) -> dict[str, Any]:
    from vlx.config.compose import compose

    return compose(slug, registry.find(slug).paper.commands[0])


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
