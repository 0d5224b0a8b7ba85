"""`vlx data list|show|preview`: what there is, what it holds, what a method will see of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from vlx.commands.typed_command import run_typed_command
from vlx.config.compose import compose
from vlx.config.overrides import parse
from vlx.config.paths import conf_dir, group_options
from vlx.core import registry
from vlx.core.errors import ConfigError, DataError, nearest
from vlx.data.captions import caption_stats, captioned
from vlx.data.config import DataConfig, Resident
from vlx.data.decode import decode_image
from vlx.data.open import SOURCES, open_source
from vlx.data.source import Source
from vlx.data.subset import evenly
from vlx.engine.load import from_dict, run_config

_REQUIRED = {
    "digits": "sklearn",
    "glyphs": "matplotlib",
    "parquet": "datasets",
    "torchvision": "torchvision",
}
_SHOWN_CLASSES = 12
_SHOWN_SIZES = 3
_SHOWN_BAD = 10
_SHOWN_CAPTIONS = 3
_LINE, _PANEL = 18, 240  # pixels of a line, and of the panel that captions are drawn in
_COUNTED = 100_000  # samples whose captions are counted


def list_sources(console: Console) -> None:
    """A table of the kinds of sources, and the names of conf/data."""
    table = Table("source", "reads", "here")
    for kind, (_, _, meaning) in SOURCES.items():
        package = _REQUIRED.get(kind)
        missing = package is not None and importlib.util.find_spec(package) is None
        table.add_row(kind, meaning, f"no: pip install {package}" if missing else "yes")
    console.print(table)
    console.print(f"data=NAME chooses one of: {', '.join(group_options('data'))}", highlight=False)


def data_config(name: str, overrides: Sequence[str]) -> DataConfig:
    """The config of `name`, a file of conf/data or a kind of source, with `data.key=value`s.

    Raises:
        VlxError: an unknown name or key, with the nearest, or a value of the wrong type.
    """
    file = conf_dir() / "data" / f"{name}.yaml"
    values: dict[str, Any] = {}
    if file.is_file():
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    elif name in SOURCES:
        values = {"source": name}
    else:
        known = {*SOURCES, *group_options("data")}
        raise DataError(f"no data source '{name}'. {nearest(name, known)}")
    keys = [f"data.{field.name}" for field in fields(DataConfig)]
    for override in parse(overrides):
        key = override.key_or_group
        if key not in keys:
            raise ConfigError(f"unknown key '{key}'. {nearest(key, keys)}")
        values[key.removeprefix("data.")] = override.value()
    return from_dict(DataConfig, values, "data.")


def show(name: str, overrides: Sequence[str], check: int, console: Console) -> None:
    """What each split of a source holds, and which of `check` samples cannot be read."""
    cfg = data_config(name, overrides)
    run_typed_command(cfg, overrides)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("split", no_wrap=True)
    for title in ("samples", "fields", "classes", "image sizes", "unreadable"):
        table.add_column(title, min_width=max(map(len, title.split())))
    table.add_column("digest", overflow="fold")
    bad: list[str] = []
    lines: list[str] = []
    names: tuple[str, ...] = ()
    splits = (cfg.train_split, cfg.val_split, cfg.test_split)
    for split in dict.fromkeys(name for name in splits if name is not None):
        try:
            source = open_source(cfg, split)
        except DataError as error:
            if split == cfg.train_split:
                raise
            console.print(f"{split}: {error}", highlight=False, soft_wrap=True)
            continue
        names = names or source.info.class_names
        sizes, found, checked = check_samples(source, cfg, check)
        bad += found
        lines += caption_lines(source)
        table.add_row(
            split,
            str(source.info.num_samples),
            ", ".join(source.info.fields),
            str(source.info.num_classes or "none"),
            ", ".join(sizes[:_SHOWN_SIZES]) + (", ..." if len(sizes) > _SHOWN_SIZES else ""),
            f"{len(found)} of {checked}",
            source.info.fingerprint,
        )
    console.print(table)
    if names:
        more = f" and {len(names) - _SHOWN_CLASSES} more" if len(names) > _SHOWN_CLASSES else ""
        shown = ", ".join(names[:_SHOWN_CLASSES])
        console.print(f"classes: {shown}{more}", highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    for line in bad[:_SHOWN_BAD]:
        console.print(f"unreadable: {line}", highlight=False, soft_wrap=True)


def caption_lines(source: Source) -> list[str]:
    """What the captions of a source look like: counts, some examples, and unusable ones."""
    if captioned(source) is None:
        return []
    stats = caption_stats(source, _COUNTED)
    lines = [f"captions of {source.info.split}: {stats}"]
    few = evenly(source, _SHOWN_CAPTIONS)
    for row in range(len(few)):
        with suppress(Exception):  # an unusable one is named below
            lines.append(f"  {few.describe(row)}: {' | '.join(_in_line(few.captions(row)))}")
    return lines + [f"unusable caption: {line}" for line in stats.unusable[:_SHOWN_BAD]]


def _in_line(captions: Sequence[str]) -> list[str]:
    return [" ".join(caption.split()) for caption in captions]


def check_samples(source: Source, cfg: DataConfig, count: int) -> tuple[list[str], list[str], int]:
    """Sizes seen (height x width), unreadable samples with reasons, and how many were decoded."""
    sizes: dict[str, None] = {}
    bad: list[str] = []
    rows = np.unique(np.linspace(0, len(source) - 1, max(1, count)).astype(int))
    for row in rows.tolist():
        try:
            image = decode_image(source.read(row)["image"], cfg.max_pixels, None)
        except Exception as error:  # as in training: any failure is that sample's
            bad.append(f"{source.describe(row)}: {error}")
            continue
        sizes[f"{image.shape[0]}x{image.shape[1]}"] = None
    return list(sizes), bad, len(rows)


def preview(
    slug: str, preset: str | None, overrides: Sequence[str], out: Path, samples: int
) -> Path:
    """Write a grid, a row a sample: the image as stored, every view of the first step, captions."""
    import torch
    from PIL import Image

    from vlx.data.pipeline import Share, TrainPipeline, check_fields
    from vlx.evals.pictures import grid, to_picture

    command = registry.find(slug).paper.commands[0]
    cfg = run_config(compose(slug, command, preset, overrides))
    run_typed_command(cfg.data, overrides)
    source = open_source(cfg.data, cfg.data.train_split)
    needs = registry.load(slug).needs(cfg.method)
    check_fields(source, needs)
    pipeline = TrainPipeline(
        source,
        replace(needs, fields=()),  # what is drawn; token ids would need a tokenizer
        # The same samples and draws as in the run's first step, without decoding all the data.
        cfg=replace(cfg.data, resident=Resident.never, workers=0),
        image_size=cfg.encoder.image_size,
        seed=cfg.seed,
        share=Share(min(samples, len(source))),
        device=torch.device("cpu"),
    )
    batch = next(pipeline.batches(0, 1))
    views = [view.name for view in needs.views if view.keep]
    rows = []
    for row, index in enumerate(batch["sample_id"].tolist()):
        stored = decode_image(source.read(index)["image"], cfg.data.max_pixels, cfg.data.max_side)
        pictures = [_fitted(to_picture(torch.from_numpy(stored.copy()).permute(2, 0, 1) / 255))]
        pictures += [_fitted(to_picture(batch[name][row])) for name in views]
        rows.append(pictures + _captions_of(source, index, pictures[0].height))
    titles = list(enumerate(["stored", *views, *(["captions"] if captioned(source) else [])]))
    out.parent.mkdir(parents=True, exist_ok=True)
    picture: Image.Image = grid(rows, titles, gap_before=1)
    picture.save(out)
    return out


def _captions_of(source: Source, index: int, height: int) -> list[Any]:
    """A picture of a sample's captions, as many as have a line; none where there are none."""
    from vlx.evals.pictures import BLACK, text_panel

    found = captioned(source)
    if found is None:
        return []
    texts = found.captions(index)[: max(1, height // _LINE)]
    return [text_panel([(text, BLACK) for text in texts], width=_PANEL, height=height)]


def _fitted(picture: Any, side: int = 160) -> Any:
    """A picture no longer than `side`."""
    picture.thumbnail((side, side))
    return picture
