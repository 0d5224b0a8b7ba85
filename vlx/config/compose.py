"""From a command line's overrides to a plain, checked configuration. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlx.config.paths import conf_dir, presets
from vlx.core import registry
from vlx.core.errors import ConfigError, VlxError, nearest
from vlx.engine.config import RunConfig
from vlx.engine.load import from_dict
from vlx.engine.rundir import flatten

DEFAULT_PRESET = "tiny"
GROUPS = ("encoder", "data", "optim", "schedule", "launcher", "track")


def compose(
    slug: str, command: str, preset: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The resolved configuration of one run as plain values.

    Raises:
        VlxError: an unknown method, preset, key or group option (with the nearest names), or a
            value of the wrong type (with the key, the type expected and the value given).
    """
    register(slug)
    name = preset or DEFAULT_PRESET
    fixed = [f"method={slug}", f"recipe={slug}", f"+preset={register_preset(slug, name)}"]
    parsed = parse(overrides)
    with _hydra():
        _check_keys(parsed, fixed)
        try:
            config = hydra_compose("run", overrides=[*fixed, *overrides])
            config.slug, config.command = slug, command
            config.preset = name if preset is None or not _is_file(preset) else Path(preset).stem
            plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(error, fixed) from error
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items()}
    from_dict(RunConfig, values)  # runs the cross-field checks of the dataclasses
    return values


def register(slug: str) -> None:
    """Put the schema and the method's Config into Hydra's store."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    store.store(group="method", name=slug, node=registry.config_class(slug))


def register_preset(slug: str, preset: str) -> str:
    """Put a preset, a name of experiments/SLUG/ or a file, into Hydra's store; returns its name."""
    known = presets(slug)
    path = Path(preset).expanduser() if _is_file(preset) else known.get(preset)
    if path is None:
        where = f"experiments/{slug}/"
        raise ConfigError(f"no preset '{preset}' in {where}. {nearest(preset, known)}")
    if not path.is_file():
        raise ConfigError(f"no preset file {path}")
    try:
        node = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"{path} is not a preset: {str(error).splitlines()[0]}") from error
    name = f"{slug}-{path.stem}"
    ConfigStore.instance().store(group="preset", name=name, node=node, package="_global_")
    return name


def _is_file(preset: str) -> bool:
    return preset.endswith((".yaml", ".yml"))


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's own parse of `key=value` words; raises `ConfigError` for what it cannot read."""
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        bad = re.search(r"Error parsing override '(.*?)'\n(.*)", str(error), re.DOTALL)
        text = bad[1] if bad else str(error).splitlines()[0]
        raise ConfigError(f"cannot read '{text}': write key=value, e.g. train.steps=200") from error


def keys(slug: str, preset: str = DEFAULT_PRESET) -> dict[str, Any]:
    """Every dotted key of a method's configuration with its value under a preset."""
    register(slug)
    fixed = [f"method={slug}", f"recipe={slug}", f"+preset={register_preset(slug, preset)}"]
    with _hydra():
        return _schema(fixed)


def group_options(group: str) -> list[str]:
    """Names that `group=NAME` accepts."""
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))


@contextmanager
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="vlx"):
        yield


def _schema(fixed: list[str]) -> dict[str, Any]:
    config = hydra_compose("run", overrides=fixed)
    plain = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(plain, dict)
    return flatten({str(k): v for k, v in plain.items()})


def _check_keys(parsed: list[Override], fixed: list[str]) -> None:
    """Refuse keys outside the schema, `+` included: Hydra would add them silently."""
    if not parsed:
        return
    known = _schema(fixed)
    sections = {key.rsplit(".", n)[0] for key in known for n in range(1, key.count(".") + 1)}
    for override in parsed:
        key = override.key_or_group
        if key in GROUPS or key in known or key.startswith("hydra"):
            continue
        if key.startswith("teacher.") and "teacher" in known:  # null: nothing to set a key of
            raise ConfigError(f"unknown key '{key}': this method has no teacher")
        if key in sections:
            example = next(name for name in known if name.startswith(f"{key}."))
            raise ConfigError(f"'{key}' is a section; set one of its keys, e.g. {example}")
        raise ConfigError(f"unknown key '{key}'. {nearest(key, [*known, *GROUPS])}")


def _explain(error: Exception, fixed: list[str]) -> VlxError:
    """One line in the user's words for what Hydra or OmegaConf raised."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    key = getattr(root, "full_key", None) or getattr(error, "full_key", None)
    text = str(root)
    value = re.search(r"Value '(.*?)' of type '(.*?)' could not be converted to (\w+)", text)
    if value:
        return ConfigError(f"{key}={value[1]} is not a valid {_plain_type(value[3])}")
    enum = re.search(r"Invalid value '(.*?)', expected one of \[(.*?)\]", text)
    if enum:
        return ConfigError(
            f"{key}={enum[1]} must be one of {enum[2]}. {nearest(enum[1], enum[2].split(', '))}"
        )
    option = re.search(r"Could not find '(\w+)/(.*?)'", text)
    if option:
        group, name = option[1], option[2]
        return ConfigError(f"no {group} '{name}'. {nearest(name, group_options(group))}")
    first = text.splitlines()[0] if text else type(root).__name__
    return ConfigError(f"{key}: {first}" if key else first)


def _plain_type(name: str) -> str:
    return {"Integer": "integer", "Float": "number", "Boolean": "true or false"}.get(name, name)


def to_yaml(config: dict[str, Any]) -> str:
    """The plain configuration as YAML, keys in schema order."""
    return OmegaConf.to_yaml(DictConfig(config))
