"""From a command line's overrides to a plain, checked configuration. No torch here."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlx.config.explain import explain
from vlx.config.overrides import FIXED, check_override, parse
from vlx.config.paths import GROUPS, conf_dir, presets
from vlx.config.shorthand import long_words, model_words, store_models
from vlx.config.texts import as_typed, text_keys
from vlx.core import registry
from vlx.core.errors import ConfigError, nearest
from vlx.core.yaml_file import read_yaml
from vlx.engine.config import RunConfig
from vlx.engine.load import from_dict, read_config
from vlx.engine.rundir import CONFIG_FILE, flatten

DEFAULT_PRESET = "tiny"
_CHOICE = re.compile(rf"(override )?/({'|'.join(GROUPS)})(@teacher)?")
_OPTION = re.compile(r"[\w.-]+")
EVALUATION_PRESET = "none"
# What `vlx eval EVALUATOR` reads of the configuration; the rest concerns training.
_EVALUATION_KEYS = (
    "encoder",
    "data",
    "eval.batch_size",
    "eval.crop_ratio",
    "eval.squeeze",
    "eval.interpolation",
    "eval.speed_batches",
    "eval.templates",
    "eval.template_list",
    "eval.rerank",
    "eval.caption_samples",
    "eval.cache_features",
    "launcher",
    "train.device",
    "train.threads",
    "train.deterministic",
    "seed",
    "runs_dir",
    "name",
)
# Keys that lead to other data, and those that say something of one data set alone.
_WHICH_DATA = ("data.source", "data.path", "data.variant")
_OF_ITS_DATA = ("class_names", "split_file")


@dataclass(frozen=True, kw_only=True)
class Root:
    """What overrides apply to: a file of conf/ and what the command line fixes under it."""

    file: str
    fixed: tuple[str, ...]
    command: str
    slug: str
    preset: str
    settable: tuple[str, ...] = ()
    """Keys and sections that overrides may set; empty allows all."""


def compose(
    slug: str, command: str, preset: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The resolved configuration of one run of a method as plain values.

    Raises:
        VlxError: an unknown method, preset, key or group option (with the nearest names), or a
            value of the wrong type (with the key, the type expected and the value given).
    """
    return compose_root(method_root(slug, command, preset), overrides)


def compose_root(root: Root, overrides: Sequence[str]) -> dict[str, Any]:
    """`compose`, for any root."""
    words = plain_words(root, overrides)
    parsed = parse(words)
    with hydra_conf():
        check(root, parsed)
        return resolve(root, words, parsed)


def plain_words(root: Root, overrides: Sequence[str]) -> list[str]:
    """The overrides as Hydra wants them: every key in full, texts quoted that it would convert."""
    keys = text_keys(RunConfig)
    if root.file == "run":
        overrides = long_words(root.slug, overrides)
        keys |= text_keys(registry.config_class(root.slug), "method.")
    return [as_typed(word, keys) for word in overrides]


def check(root: Root, parsed: Sequence[Override]) -> None:
    """Refuse keys outside the schema, `+` included: Hydra would add them silently.

    Also makes options of the models that are named as encoders.
    """
    if not parsed:
        return
    known = _schema(root)
    allowed = {key: value for key, value in known.items() if _settable(root, key)}
    if any(o.key_or_group == "encoder" and o.package == "teacher" for o in parsed):
        allowed.pop("teacher", None)
        encoder = {key: value for key, value in known.items() if key.startswith("encoder.")}
        allowed |= {key.replace("encoder", "teacher", 1): v for key, v in encoder.items()}
    for override in parsed:
        check_override(override, allowed)
    store_models(parsed)


def _settable(root: Root, key: str) -> bool:
    return not root.settable or any(
        key == name or key.startswith(f"{name}.") for name in root.settable
    )


def resolve(
    root: Root, overrides: Sequence[str], parsed: Sequence[Override] = ()
) -> dict[str, Any]:
    """Compose checked overrides; call inside `hydra_conf`."""
    try:
        words = [*root.fixed, *model_words(parsed), *overrides]
        config = hydra_compose(root.file, overrides=words)
        config.slug, config.command, config.preset = root.slug, root.command, root.preset
        plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, parsed, lambda: _names(root)) from error
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items()}
    for key, value in flatten(values).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} must be a finite number")
    from_dict(RunConfig, values)  # runs the cross-field checks of the dataclasses
    if root.file == "run":
        from_dict(registry.config_class(root.slug), values["method"] or {}, "method.")
    return values


def method_root(slug: str, command: str, preset: str | None = None) -> Root:
    """The recipe of a method under a preset: a name of experiments/SLUG/, or a file."""
    _store_schema()
    ConfigStore.instance().store(group="method", name=slug, node=registry.config_class(slug))
    name = preset or DEFAULT_PRESET
    stored = _store_preset(slug, name)
    return Root(
        file="run",
        fixed=(f"method={slug}", f"recipe={slug}", f"+preset={stored}"),
        command=command,
        slug=slug,
        preset=Path(name).stem if _is_file(name) else name,
    )


def evaluation_root(evaluator: str, overrides: Sequence[str]) -> Root:
    """What `vlx eval EVALUATOR` starts from.

    Where encoder.checkpoint is a run directory, that run's encoder, data and evaluation view are
    the defaults; `encoder=NAME` or `data=NAME` among the overrides drop the run's section, and
    another source, path or variant drops what says something of the run's own files alone.
    """
    _store_schema()
    parsed = parse(overrides)
    given = {o.key_or_group: o.value() for o in parsed if not o.is_sweep_override()}
    checkpoint = given.get("encoder.checkpoint")
    if checkpoint is None and not any(o.key_or_group == "encoder.checkpoint" for o in parsed):
        raise ConfigError(
            "encoder.checkpoint is missing: a run directory, a .safetensors or a .pth file, "
            f"e.g. vlx eval {evaluator} encoder.checkpoint=runs/NAME"
        )
    defaults: dict[str, Any] = {}
    run = Path(str(checkpoint)).expanduser()
    if checkpoint is not None and not run.exists():
        raise ConfigError(f"encoder.checkpoint={checkpoint} does not exist")
    if checkpoint is not None and (run / CONFIG_FILE).is_file():
        values = read_config(run)
        defaults = {key: values[key] for key in ("encoder", "data") if key not in given}
        if "data" in defaults and _is_other_data(parsed, values["data"]):
            defaults["data"] = {k: v for k, v in values["data"].items() if k not in _OF_ITS_DATA}
        if defaults.get("data", {}).get("split_seed", 0) is None:  # shots are those of the run
            defaults["data"] = {**defaults["data"], "split_seed": values["seed"]}
        defaults["eval"] = {
            key: value for key, value in values["eval"].items() if f"eval.{key}" in _EVALUATION_KEYS
        }
    ConfigStore.instance().store(
        group="preset", name="of-run", node=OmegaConf.create(defaults), package="_global_"
    )
    return Root(
        file="eval",
        fixed=("+preset=of-run", f"eval.at_end=[{evaluator}]", "eval.compare_untrained=false"),
        command="eval",
        slug=evaluator,
        preset=EVALUATION_PRESET,
        settable=_EVALUATION_KEYS,
    )


def _is_other_data(overrides: Sequence[Override], own: Mapping[str, Any]) -> bool:
    """Whether an override leads from the data of a run to some other."""
    for override in overrides:
        key = override.key_or_group.removeprefix("data.")
        if override.key_or_group not in _WHICH_DATA:
            continue
        if override.is_sweep_override():
            return True
        value, before = override.value(), own.get(key)
        if key == "path" and value is not None and before is not None:
            value, before = (os.path.realpath(os.path.expanduser(p)) for p in (value, before))
        if value != before:
            return True
    return False


def _store_schema() -> None:
    ConfigStore.instance().store(name="schema", node=RunConfig)


def _store_preset(slug: str, preset: str) -> str:
    known = presets(slug)
    path = Path(preset).expanduser() if _is_file(preset) else known.get(preset)
    if path is None:
        where = f"experiments/{slug}/"
        raise ConfigError(f"no preset '{preset}' in {where}. {nearest(preset, known)}")
    if not path.is_file():
        raise ConfigError(f"no preset file {path}")
    node = OmegaConf.create(_preset_values(path, slug))
    name = f"{slug}-{path.stem}"
    ConfigStore.instance().store(group="preset", name=name, node=node, package="_global_")
    return name


def _preset_values(path: Path, slug: str) -> dict[str, Any]:
    """What a preset sets: sections of a run, and options of their groups.

    Anything else would be Hydra's own (`hydra: callbacks`), which acts.
    """
    own = text_keys(registry.config_class(slug), "method.")
    values = read_yaml(path, text_keys(RunConfig) | own)
    sections = [f.name for f in fields(RunConfig) if f.name not in FIXED or f.name == "method"]
    for key in values:
        if key not in (*sections, "defaults"):
            raise ConfigError(f"{path}: unknown key '{key}'. {nearest(key, sections)}".rstrip())
    for line in values.get("defaults") or []:
        pairs = list(line.items()) if isinstance(line, dict) else []
        choice = _CHOICE.fullmatch(str(pairs[0][0])) if len(pairs) == 1 else None
        named = choice and (pairs[0][1] is None or _OPTION.fullmatch(str(pairs[0][1])))
        if line != "_self_" and not named:
            groups = ", ".join(GROUPS)
            raise ConfigError(
                f"{path}: defaults: {line} is not read: write `- override /GROUP: NAME`, with a "
                f"GROUP of {groups}"
            )
    return values


def _is_file(preset: str) -> bool:
    return preset.endswith((".yaml", ".yml"))


def keys(slug: str, preset: str = DEFAULT_PRESET) -> dict[str, Any]:
    """Every dotted key of a method's configuration with its value under a preset."""
    with hydra_conf():
        return _schema(method_root(slug, "", preset))


@contextmanager
def hydra_conf() -> Iterator[None]:
    """Hydra's global state for the length of a composition, on conf/."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="vlx"):
        yield


def _schema(root: Root) -> dict[str, Any]:
    try:
        config = hydra_compose(root.file, overrides=[*root.fixed])
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, (), lambda: _names(root)) from error
    plain = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(plain, dict)
    return flatten({str(k): v for k, v in plain.items()})


def _names(root: Root) -> list[str]:
    """Every key by the dataclasses alone, for when a file of conf/ does not compose."""
    plain = OmegaConf.to_container(OmegaConf.structured(RunConfig))
    names = list(flatten(plain))
    if root.file == "run":
        names += [f"method.{f.name}" for f in fields(registry.config_class(root.slug))]
    return names


def to_yaml(config: dict[str, Any]) -> str:
    """The plain configuration as YAML, keys in schema order."""
    return OmegaConf.to_yaml(DictConfig(config))
