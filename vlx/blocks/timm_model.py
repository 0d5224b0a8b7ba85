"""Entries of timm's registry for the models of papers, which have no published weights there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import nn


def default_cfgs(names: Sequence[str], size: int = 224, **more: Any) -> Any:
    """timm's metadata of untrained models; mean and std are ImageNet's."""
    cfg = {
        "input_size": (3, size, size),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "classifier": "head",
        **more,
    }
    return generate_default_cfgs({f"{name}.untrained": dict(cfg) for name in names})


def build_model(
    cls: type[nn.Module], name: str, pretrained: bool, *, features: Any, **arguments: Any
) -> Any:
    """What an entry returns: the model, or its maps for `features_only=True`.

    features: the maps' indices unless `out_indices` chooses, as timm takes them.
    """
    how = {"out_indices": features, "feature_cls": "getter"}
    return build_model_with_cfg(cls, name, pretrained, feature_cfg=how, **arguments)
