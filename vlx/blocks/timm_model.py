"""Models of papers under timm's conventions, and their entries in its registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from timm.layers.weight_init import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vlx.core.errors import ConfigError


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


class TimmNetwork(nn.Module):
    """What timm asks of every model: a head that can be replaced, layers that can be dropped.

    Subclasses fill the list that `layers_name` names and `head` (the last linear layer), and give
    `forward_features` and `forward_head`.
    """

    layers_name: ClassVar[str] = "blocks"
    pools: ClassVar[tuple[str, ...]] = ("avg",)
    """Values that `global_pool` may have."""
    head: nn.Module
    head_hidden_size: int
    """Width that the last linear layer takes."""

    def make_head(self, num_classes: int) -> nn.Module:
        """The last linear layer, truncated normal 0.02; none for 0 classes."""
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.head_hidden_size, num_classes)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def forward_features(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W), normalised."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class logits of `forward_features`' output, or what the last linear layer would take."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers after the last of `indices`, and the head. Returns the indices, not
        negative."""
        layers = getattr(self, self.layers_name)
        taken, last = feature_take_indices(len(layers), indices)
        setattr(self, self.layers_name, layers[: last + 1])
        if prune_norm and hasattr(self, "norm"):
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer beside the other weights; raises `ConfigError` for a pooling that the
        model has not."""
        if global_pool is not None:
            if global_pool not in self.pools:
                raise ConfigError(
                    f"global_pool={global_pool}: {type(self).__name__} has {', '.join(self.pools)}"
                )
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = self.make_head(num_classes).to(like.device, like.dtype)

    def no_weight_decay(self) -> set[str]:
        """Names that the paper does not decay, beside biases and norms."""
        return set()
