"""From `config.yaml` to a typed `RunConfig`, without Hydra: what every process does."""

from __future__ import annotations

import dataclasses
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from vlx.core import registry
from vlx.core.errors import ConfigError, nearest
from vlx.core.hints import without_none
from vlx.core.yaml_file import read_yaml
from vlx.engine.config import RunConfig
from vlx.engine.rundir import CONFIG_FILE


def from_dict(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """A dataclass from plain values, nested and checked; raises `ConfigError` with the full key."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown key '{prefix}{key}'. {nearest(key, names)}")
    converted = {k: _convert(hints[k], v, f"{prefix}{k}") for k, v in values.items()}
    return cls(**converted)


def _convert(hint: Any, value: Any, key: str) -> Any:
    hint, optional = without_none(hint)
    if optional and value is None:
        return None
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value or {}, f"{key}.")
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint[value]
        except KeyError:
            allowed = ", ".join(member.name for member in hint)
            raise ConfigError(f"{key}={value!r} must be one of {allowed}") from None
    if typing.get_origin(hint) is list and isinstance(value, list):
        (item,) = typing.get_args(hint)
        return [_convert(item, v, key) for v in value]
    if hint is float and isinstance(value, int):
        return float(value)
    expected = typing.get_origin(hint) or hint
    if hint is not Any and isinstance(expected, type) and not isinstance(value, expected):
        raise ConfigError(f"{key}={value!r} must be a {expected.__name__}")
    return value


def run_config(values: dict[str, Any]) -> RunConfig:
    """The typed config of plain values; imports the method's module (and so torch)."""
    cfg = from_dict(RunConfig, values)
    cfg.method = from_dict(registry.load(cfg.slug).Config, values.get("method") or {}, "method.")
    return cfg


def read_config(run_dir: Path) -> dict[str, Any]:
    """Plain values of a run's `config.yaml`, all of them keys of the schema.

    Raises `ConfigError` for what cannot be read, holds more than a configuration, or has keys that
    no configuration has: a run directory may be a stranger's.
    """
    file = run_dir / CONFIG_FILE
    values = read_yaml(file)
    if not {"slug", "command", "method", "launcher"} <= values.keys():
        raise ConfigError(f"{file} is not a configuration of vlx")
    from_dict(RunConfig, values)
    if values["method"] is not None:
        from_dict(registry.config_class(values["slug"]), values["method"], "method.")
    return values
