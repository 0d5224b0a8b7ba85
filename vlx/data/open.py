"""From a config to a source. Each kind's module is imported when it is used."""

from __future__ import annotations

import importlib

from vlx.core.errors import DataError, nearest
from vlx.data.config import DataConfig
from vlx.data.source import Source

# kind -> (module, class, what it reads)
SOURCES: dict[str, tuple[str, str, str]] = {
    "digits": ("digits", "Digits", "embedded: 1797 handwritten digits, 8x8, 10 classes"),
    "parquet": ("parquet", "Parquet", "Parquet or Arrow files with an image column"),
}


def open_source(cfg: DataConfig, split: str) -> Source:
    """The source that `cfg` names, opened on one of its splits."""
    if cfg.source not in SOURCES:
        raise DataError(f"data.source: no source '{cfg.source}'. {nearest(cfg.source, SOURCES)}")
    module, name, _ = SOURCES[cfg.source]
    source = getattr(importlib.import_module(f"vlx.data.sources.{module}"), name)(cfg, split)
    if len(source) == 0:
        raise DataError(f"data: split '{split}' of {cfg.source} at {cfg.path} is empty")
    return source
