"""Which models `encoder.name` may have, found without importing timm or torch."""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache
from pathlib import Path

from vlx.core import registry

_REGISTERED = re.compile(r"^@register_model\s+def (\w+)\(", re.MULTILINE)


def model_names() -> frozenset[str]:
    """Models of timm, read from its source, and those that papers register with timm."""
    papers = registry.papers().values()
    return timm_names() | {name for paper in papers for name in paper.backbones}


@lru_cache
def timm_names() -> frozenset[str]:
    """Every model that timm's own modules register; without deprecated names and tags."""
    spec = importlib.util.find_spec("timm")  # finds the package without running it
    places = (spec.submodule_search_locations if spec else None) or []
    files = [file for place in places for file in (Path(place) / "models").glob("*.py")]
    texts = (file.read_text(encoding="utf-8") for file in files)
    return frozenset(name for text in texts for name in _REGISTERED.findall(text))


def is_model(name: str) -> bool:
    """Whether a model has this name; a tag of published weights (`NAME.dino`) may follow it."""
    return name.split(".", 1)[0] in model_names()
