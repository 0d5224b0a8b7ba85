"""timm's published weights and what it knows of them. Imports timm and so torch."""

from __future__ import annotations

import logging

import timm
from timm.layers.activations import QuickGELU

from vlx.core.errors import CheckpointError, ConfigError, nearest
from vlx.encoders.base import VisionEncoder
from vlx.encoders.config import EncoderConfig
from vlx.encoders.names import timm_names

log = logging.getLogger("vlx")


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


def load_published(encoder: VisionEncoder, cfg: EncoderConfig) -> None:
    """Load timm's published weights of `cfg.name`, downloading them on first use.

    Raises `ConfigError` when the encoder would see pixels at another scale than they were
    trained with, or compute another activation: silent faults otherwise. Raises
    `CheckpointError` where they cannot be fetched.
    """
    check_statistics(cfg)
    check_activation(encoder, cfg)
    name = _named_by_tag(cfg.name)
    log.info(f"weights of {name}: timm's, fetched where they are not in the cache")
    # Its ten retries without a network would stand as ten warnings before the one error.
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        loaded = encoder.published(cfg)
    except OSError as error:
        raise CheckpointError(
            f"encoder.pretrained: the weights of {cfg.name} are not in the cache and cannot be "
            "fetched: connect to the network, or set encoder.pretrained=false "
            "encoder.checkpoint=FILE"
        ) from error
    finally:
        hub.setLevel(level)
    state, own = loaded.state_dict(), encoder.backbone.state_dict()
    # A projection (`drop_head_bias`) has fewer names than timm's head, and no more.
    encoder.backbone.load_state_dict({key: state[key] for key in own})


def check_statistics(cfg: EncoderConfig) -> None:
    """Raise `ConfigError` unless mean and std are those of the published weights, or are given
    on purpose (`foreign_statistics`)."""
    published = timm.get_pretrained_cfg(cfg.name) if timm.is_model(cfg.name) else None
    if published is None or not published.has_weights:
        raise ConfigError(f"encoder.pretrained: timm publishes no weights of {cfg.name}")
    if cfg.foreign_statistics:
        return
    for key, own in (("mean", cfg.mean), ("std", cfg.std)):
        wanted = [float(value) for value in getattr(published, key)]
        if any(abs(a - b) > 1e-4 for a, b in zip(own, wanted, strict=True)):
            raise ConfigError(
                f"{key}={own} is not that of the weights {cfg.name}: set {key}={wanted} beside name"
            )


def check_activation(encoder: VisionEncoder, cfg: EncoderConfig) -> None:
    """Raise `ConfigError` where weights of QuickGELU, as timm's notes say, are for a GELU model.

    CLIP's were trained with `x * sigmoid(1.702 x)`; timm's model without "quickgelu" in its name
    takes them and computes other features.
    """
    published = timm.get_pretrained_cfg(cfg.name)
    notes = " ".join((published and published.notes) or ())
    quick = any(isinstance(part, QuickGELU) for part in encoder.backbone.modules())
    if "QuickGELU" in notes and not quick:
        model, _, tag = cfg.name.partition(".")
        twin = model.replace("_clip_", "_clip_quickgelu_")
        hint = f": set name={twin}{'.' if tag else ''}{tag}" if timm.is_model(twin) else ""
        raise ConfigError(
            f"the weights {cfg.name} were trained with QuickGELU and this model computes GELU{hint}"
        )


def _named_by_tag(name: str) -> str:
    """The name with the tag that timm takes; where it chose among several, a warning says so."""
    published = timm.get_pretrained_cfg(name)
    assert published is not None
    if "." in name or not published.tag:
        return name
    tags = [other.split(".", 1)[1] for other in timm.list_pretrained(f"{name}.*")]
    if len(tags) > 1:
        log.warning(
            f"{name} was trained in {len(tags)} ways, and this timm takes {published.tag}: name "
            f"the one that is meant, encoder.name={name}.{published.tag} or another of "
            f"{', '.join(tag for tag in tags if tag != published.tag)}"
        )
    return f"{name}.{published.tag}"
