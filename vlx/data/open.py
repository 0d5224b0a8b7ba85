"""From a config to a source. Each kind's module is imported when it is used."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

from vlx.core.errors import DataError, nearest
from vlx.data.config import DataConfig
from vlx.data.few_shot import select
from vlx.data.source import Source

log = logging.getLogger("vlx")

# kind -> (module, class, what it reads)
SOURCES: dict[str, tuple[str, str, str]] = {
    "digits": ("digits", "Digits", "embedded: 1797 handwritten digits, 8x8, 10 classes"),
    "folder": ("folder", "Folder", "trees of image files: PATH/SPLIT/CLASS/*.jpg or PATH/*.jpg"),
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
    """The source that `cfg` names, opened on one of its splits."""
    if cfg.source not in SOURCES:
        raise DataError(f"data.source: no source '{cfg.source}'. {nearest(cfg.source, SOURCES)}")
    if split == cfg.test_split and split != cfg.train_split and _one_file(cfg):
        log.warning(f"{cfg.path} serves {cfg.train_split} and {split}: scores are on training data")
    module, name, _ = SOURCES[cfg.source]
    source = getattr(importlib.import_module(f"vlx.data.sources.{module}"), name)(cfg, split)
    if len(source) == 0:
        raise DataError(f"data: split '{split}' of {cfg.source} at {cfg.path} is empty")
    return select(source, cfg, split)


def _one_file(cfg: DataConfig) -> bool:
    """Whether the path cannot tell splits apart."""
    if cfg.path is None:
        return False
    pattern = cfg.source == "webdataset" and "{split}" not in cfg.path
    return Path(cfg.path).expanduser().is_file() or (pattern and not Path(cfg.path).is_dir())
