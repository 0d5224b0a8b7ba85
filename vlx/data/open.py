"""From a config to a source. Each kind's module is imported when it is used."""

from __future__ import annotations

import importlib
from pathlib import Path

from vlx.core.errors import DataError, nearest
from vlx.data.class_names import renamed
from vlx.data.config import DataConfig
from vlx.data.few_shot import select
from vlx.data.held_out import HeldOut, split_name, whole_splits
from vlx.data.labels import check_labels
from vlx.data.source import Source

# kind -> (module, class or function, what it reads)
SOURCES: dict[str, tuple[str, str, str]] = {
    "captions": (
        "caption_table",
        "CaptionTable",
        "CSV or TSV of image path and caption, folders of Flickr8k and Flickr30k",
    ),
    "coco": ("coco_captions", "CocoCaptions", "COCO captions, and Karpathy's dataset_coco.json"),
    "digits": ("digits", "Digits", "embedded: 1797 handwritten digits, 8x8, 10 classes"),
    "folder": (
        "folder",
        "open_folder",
        "trees of image files: PATH/SPLIT/CLASS/*.jpg or PATH/*.jpg",
    ),
    "glyphs": ("glyphs", "Glyphs", "embedded: characters of the DejaVu faces, with their names"),
    "parquet": ("parquet", "Parquet", "Parquet or Arrow files, folders of datasets.save_to_disk"),
    "scenes": (
        "scenes.source",
        "Scenes",
        "embedded: drawn scenes of solids, with captions, masks, depth, views, clips, questions",
    ),
    "torchvision": ("torchvision", "Torchvision", "torchvision's data sets, data.variant=CIFAR10"),
    "webdataset": (
        "webdataset",
        "WebDataset",
        "tar shards, local or at URLs: train-{00..99}.tar",
    ),
}


def open_source(cfg: DataConfig, split: str) -> Source:
    """The source that `cfg` names, opened on one of its splits, or on `SPLIT:train`, `SPLIT:test`.

    The two sides are what `held_out.HeldOut` says.
    """
    if cfg.source not in SOURCES:
        raise DataError(f"data.source: no source '{cfg.source}'. {nearest(cfg.source, SOURCES)}")
    word, side = split_name(cfg, split)
    module, name, _ = SOURCES[cfg.source]
    kind = getattr(importlib.import_module(f"vlx.data.sources.{module}"), name)
    source: Source = kind(whole_splits(cfg), word)
    if side:
        source = HeldOut(source, side, cfg.split_column)
    if len(source) == 0:
        raise DataError(f"data: split '{split}' of {cfg.source} at {cfg.path} is empty")
    check_labels(source)
    if cfg.class_names is not None:
        source = renamed(source, Path(cfg.class_names).expanduser())
    return select(source, cfg, split)
