"""Changes to a run's frozen configuration that change none of its numbers. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlx.config.explain import explain
from vlx.config.overrides import check_override, parse
from vlx.config.paths import GROUPS, conf_dir, group_options
from vlx.core.errors import ConfigError, nearest
from vlx.engine.config import RunConfig
from vlx.engine.load import from_dict
from vlx.engine.rundir import HARMLESS_KEYS, flatten, is_harmless

_OF_THE_DIRECTORY = ("runs_dir", "name")


def apply_harmless(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `config` with the overrides applied and checked as on a first run.

    Raises:
        ConfigError: an unknown key, a wrong value, or a key that would change the run's numbers.
    """
    known = flatten(config)
    parsed = parse(overrides)
    try:
        node = OmegaConf.merge(OmegaConf.structured(RunConfig), {**config, "method": None})
    except OmegaConfBaseException as error:
        raise explain(error, parsed, lambda: list(known)) from error
    for override in parsed:
        key, text = override.key_or_group, override.input_line or ""
        check_override(override, known)
        if key in _OF_THE_DIRECTORY or not is_harmless(key):
            free = ", ".join(k for k in HARMLESS_KEYS if k not in _OF_THE_DIRECTORY)
            raise ConfigError(
                f"'{text}' would change a run that has begun; resume takes only {free}. "
                "Start a new run for another value"
            )
        if override.is_sweep_override():
            raise ConfigError(f"'{text}': resume takes one value")
        try:
            _set(node, override)
        except OmegaConfBaseException as error:
            raise explain(error, parsed, lambda: list(known)) from error
    plain = OmegaConf.to_container(node, resolve=False, enum_to_str=True)
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items()} | {"method": config["method"]}
    from_dict(RunConfig, values)
    return {key: values[key] for key in config}


def _set(node: Any, override: Override) -> None:
    key = override.key_or_group
    if key not in GROUPS:
        OmegaConf.update(node, key, override.value())
        return
    name = str(override.value())
    if name not in group_options(key):
        raise ConfigError(f"no {key} '{name}'. {nearest(name, group_options(key))}".rstrip())
    node[key] = OmegaConf.merge(node[key], OmegaConf.load(conf_dir() / key / f"{name}.yaml"))
