"""Short words of a command line: a method's own key by itself, a model without a file in conf/.

`keep_rate=0.7` is `method.keep_rate=0.7`; `encoder=vit_small_patch16_224` is that model of timm.
No torch here, but for a model's published statistics when one is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override

from vlx.config.overrides import FIXED
from vlx.config.paths import GROUPS, group_options
from vlx.core import registry
from vlx.encoders.config import EncoderConfig
from vlx.encoders.names import is_model, model_names
from vlx.engine.config import RunConfig

_WORD = re.compile(r"([+~]*)(\w+)(=.*|$)", re.DOTALL)
# Of the encoder's keys, those that a model's name decides.
_OF_A_MODEL = ("name", "image_size", "patch_size", "dim", "depth", "heads", "mean", "std")


def long_words(slug: str, overrides: Sequence[str]) -> list[str]:
    """The words with `method.` before every bare key that the method has and a run has not."""
    of_the_run = {f.name for f in fields(RunConfig)} | {*GROUPS, *FIXED}
    own = {f.name for f in fields(registry.config_class(slug))} - of_the_run
    words = []
    for word in overrides:
        found = _WORD.fullmatch(word)
        if found and found[2] in own:
            word = f"{found[1]}method.{found[2]}{found[3]}"
        words.append(word)
    return words


def option_names(group: str) -> list[str]:
    """What `GROUP=NAME` accepts: the files of conf/, and for encoders every model."""
    models = model_names() if group == "encoder" else ()
    return [*group_options(group), *models]


def store_models(parsed: Sequence[Override]) -> None:
    """Make an option of the encoder group of every model that the overrides name."""
    for override in parsed:
        for name in _models(override):
            ConfigStore.instance().store(group="encoder", name=name, node=model_values(name))


def model_words(parsed: Sequence[Override]) -> list[str]:
    """Overrides that give the models named their own sizes, whatever a preset sets for its own."""
    words = []
    for override in parsed:
        place = override.package or override.key_or_group
        for name in () if override.is_sweep_override() else _models(override):
            values = model_values(name).items()
            words += [f"{place}.{key}={_as_word(value)}" for key, value in values]
    return words


def model_values(name: str) -> dict[str, Any]:
    """A model at its own size, for images of 224 pixels with the statistics of its weights."""
    from vlx.encoders.published import published_statistics  # imports timm and torch

    cfg = EncoderConfig(name=name)
    cfg.mean, cfg.std = published_statistics(name) or (cfg.mean, cfg.std)
    return {key: getattr(cfg, key) for key in _OF_A_MODEL}


def _models(override: Override) -> Iterator[str]:
    """Names among an override's values that no file of conf/encoder has, but a model."""
    if override.key_or_group != "encoder" or override.is_delete():
        return
    if override.is_choice_sweep():
        values = list(override.sweep_string_iterator())
    elif override.is_sweep_override():
        return
    else:
        values = [override.value()]
    for value in values:
        name = str(value).strip("'\"")
        if name not in group_options("encoder") and is_model(name):
            yield name


def _as_word(value: Any) -> str:
    if value is None:
        return "null"
    return f"'{value}'" if isinstance(value, str) else str(value).replace(" ", "")
