"""`key=value` words: read by Hydra's own parser, checked against the schema. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from vlx.config.paths import GROUPS, group_options
from vlx.config.texts import as_typed, text_keys
from vlx.core.errors import ConfigError, nearest
from vlx.engine.config import RunConfig

# Key -> what to type instead: set by words of the command line, never by an override.
FIXED = {
    "preset": "use --preset {value}",
    "recipe": "the recipe goes with the method",
    "method": "the method is the first word: vlx COMMAND {value}",
    "slug": "the method is the first word: vlx COMMAND {value}",
    "command": "the command is the first word: vlx {value} METHOD",
}


_OF_THE_RUN = text_keys(RunConfig)


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's own parse of `key=value` words; raises `ConfigError` for what it cannot read.

    Inside `hydra_conf`, `glob()` over the options of a group can be expanded too.
    """
    hydra = GlobalHydra.instance()
    loader = hydra.config_loader() if hydra.is_initialized() else None
    parser = OverridesParser.create(config_loader=loader)
    parsed = []
    for text in overrides:
        if "${" in text and not is_hydra_key(text):
            raise ConfigError(f"'{text}': nothing is looked up in ${{...}}; type the value itself")
        try:
            parsed += parser.parse_overrides([as_typed(text, _OF_THE_RUN)])
        except HydraException as error:
            raise ConfigError(
                f"cannot read '{text}': write key=value, e.g. train.steps=200 (quote a value "
                """with , = : or brackets for the shell and for Hydra: 'name="a=b"')"""
            ) from error
    for override in parsed:
        if override.input_line is not None and override.input_line.endswith("="):
            key = override.key_or_group
            raise ConfigError(f"'{key}=' has no value: write {key}=VALUE or {key}=null")
    return parsed


def check_override(override: Override, known: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless the override sets a known key or chooses a group's option."""
    key, text = override.key_or_group, override.input_line or ""
    if override.is_delete():
        raise ConfigError(f"'{text}': no key can be removed; set {key}=null where null is allowed")
    groups = [name for name in GROUPS if any(k.startswith(f"{name}.") for k in known)]
    if key in groups:
        _check_group(override, text, known)
        return
    if is_hydra_key(key):
        raise ConfigError(f"'{text}': Hydra's own keys (hydra/launcher, ...) go with -m")
    if key in FIXED:
        value = text.split("=", 1)[1]
        raise ConfigError(f"'{text}' cannot be set: {FIXED[key].format(value=value)}")
    if key.startswith("teacher.") and key not in known:
        _check_teacher(key, known)
    if key == "teacher" and key in known and not text.endswith("=null"):
        raise ConfigError(f"'{text}': write +encoder@teacher=NAME, then teacher.KEY=VALUE")
    if key not in known:
        _refuse(key, known, groups)
    if override.package is not None or (override.is_add() and not override.is_force_add()):
        plain = re.sub(r"^\++|@[^=]*", "", text)
        raise ConfigError(f"'{text}' cannot be read: no key is ever added. Write {plain}")


def is_hydra_key(key: str) -> bool:
    """Whether a key configures Hydra itself: a launcher or sweeper of its plugins."""
    return key.startswith(("hydra.", "hydra/"))


def _check_group(override: Override, text: str, known: Mapping[str, Any]) -> None:
    group, package = override.key_or_group, override.package
    absent = package == "teacher" and known.get("teacher", "") is None
    if package not in (None, "teacher") or (absent and not override.is_add()):
        raise ConfigError(f"'{text}': write {group}=NAME, or +encoder@teacher=NAME for a teacher")
    value = None if override.is_sweep_override() else override.value()
    if not override.is_sweep_override() and not isinstance(value, str):
        models = ", or a model of timm" if group == "encoder" else ""
        raise ConfigError(f"'{text}' must be one of {', '.join(group_options(group))}{models}")


def _check_teacher(key: str, known: Mapping[str, Any]) -> None:
    if known.get("teacher", "") is not None:
        return
    encoder = [name for name in known if name.startswith("encoder.")]
    options = [name.replace("encoder", "teacher", 1) for name in encoder]
    if key in options:
        raise ConfigError(f"'{key}': teacher is null here; add +encoder@teacher=vit_base first")
    raise ConfigError(f"unknown key '{key}'. {nearest(key, options)}")


def _refuse(key: str, known: Mapping[str, Any], groups: Sequence[str]) -> None:
    below = [name for name in known if name.startswith(f"{key}.")]
    if below:
        raise ConfigError(f"'{key}' is a section; set one of its keys, e.g. {below[0]}")
    names = [name for name in known if name not in FIXED]
    raise ConfigError(f"unknown key '{key}'. {nearest(key, [*names, *groups])}".rstrip())
