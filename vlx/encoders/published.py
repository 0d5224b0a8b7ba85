"""What timm knows of its published weights. Imports timm and so torch."""

from __future__ import annotations

import timm

from vlx.core.errors import ConfigError, nearest
from vlx.encoders.names import timm_names


def published_statistics(name: str) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of RGB in 0..1 that a model of timm was trained with.

    None where timm knows of none. Raises `ConfigError` for a tag that the model does not have.
    """
    model = name.split(".", 1)[0]
    if model not in timm_names():
        return None
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{model}.*")
        raise ConfigError(f"no weights '{name}' in timm. {nearest(name, tags)}".rstrip()) from error
    if found is None:
        return None
    return [float(value) for value in found.mean], [float(value) for value in found.std]
