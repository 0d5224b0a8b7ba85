"""What every vision encoder offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from torch import Tensor, nn

from vlx.blocks.vit_block import BlockHook, TokenReducer, UnsupportedBlock
from vlx.core.capability import ImageFeatures
from vlx.core.errors import ConfigError
from vlx.encoders.config import EncoderConfig
from vlx.ops.token_state import TokenState


@dataclass(frozen=True)
class EncoderSpec:
    """Sizes that a method builds on."""

    dim: int
    depth: int
    heads: int
    patch_size: int
    image_size: int
    num_prefix: int
    class_token: bool
    """Whether the first prefix token is a class token."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int | None = None
    """Rows and columns of the final tokens, where the patch size does not give them."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        side = self.side or self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass
class EncoderOut:
    """Output tokens after the final norm, and the layers that were asked for."""

    tokens: Tensor
    """(B, N or K, D) patch tokens."""
    prefix: Tensor
    """(B, P, D) class and register tokens."""
    layers: dict[int, Tensor] = field(default_factory=dict)
    """Block number (1 = first) to its output (B, P + N, D), before the final norm; of models that
    are no ViT, stage number to its map as tokens (B, n, d)."""
    state: TokenState | None = None
    """The final tokens with their bookkeeping, after the final norm; only where a hook ran."""
    features: Tensor | None = None
    """What timm's `forward_features` returned, for `classify`; only of models that are no ViT."""


class VisionEncoder(nn.Module):
    """Images in 0..1 to tokens; normalises with its own statistics."""

    spec: EncoderSpec

    @property
    def backbone(self) -> nn.Module:
        """The module whose parameter names are those of the published weights."""
        raise NotImplementedError

    @property
    def patch_conv(self) -> nn.Conv2d:
        """The convolution that makes the patch tokens; papers initialise it in their own way."""
        raise NotImplementedError

    @property
    def prefix_tokens(self) -> tuple[nn.Parameter, ...]:
        """Learned class and register tokens."""
        raise NotImplementedError

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Make mean and std buffers that are not saved: they are configuration, not weights."""
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 to the encoder's input scale."""
        # In place: a second tensor of this size costs as much as the arithmetic.
        return (images - self.mean).div_(self.std)  # type: ignore[operator]

    def denormalise(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return images * self.std + self.mean  # type: ignore[operator]

    def published(self, cfg: EncoderConfig) -> nn.Module:
        """The same backbone with timm's published weights of `cfg.name`, from the network at first.

        Raises `ConfigError` for a model that is not timm's.
        """
        raise ConfigError(f"encoder.pretrained: timm publishes no weights of {cfg.name}")

    def layer_depths(self) -> dict[str, int]:
        """Parameter-name prefix to depth for layer-wise lr decay (`core.method.Layered`)."""
        return {}

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        layers: Sequence[int] = (),
        normalised: bool = False,
        hook: BlockHook | None = None,
    ) -> EncoderOut:
        """images: (B, 3, H, W), 0..1 unless `normalised`. keep: (B, K) indices of visible patches.

        layers: block numbers (1 = first) whose outputs to return. hook: acts inside the blocks; a
        reducer leaves fewer tokens in the result.
        """
        raise NotImplementedError

    def layer_dims(self) -> list[int]:
        """Widths of what `forward(layers=...)` can return, layer 1 first."""
        return [self.spec.dim] * self.spec.depth

    def check_hooks(self) -> None:
        """Raise `UnsupportedBlock` unless hooks can act inside this model."""
        raise UnsupportedBlock(
            f"{type(self.backbone).__name__} is not a plain ViT, in whose blocks tokens can be "
            "reduced: use e.g. encoder=deit_small_patch16_224"
        )

    def drop_head_bias(self) -> None:
        """Make the head a projection without bias.

        CLIP's ResNets keep theirs: the published projection is that of the attention which pools.
        Raises `ConfigError` for a model whose head is no linear layer.
        """
        classifier = self.backbone.get_classifier()  # type: ignore[operator]
        parts = classifier if isinstance(classifier, tuple) else (classifier,)
        if isinstance(getattr(self.backbone, "head", None), AttentionPool2d | RotAttentionPool2d):
            return
        for part in parts:
            if not isinstance(part, nn.Linear | nn.Conv2d):
                raise ConfigError(
                    f"{type(self.backbone).__name__} ends in a {type(part).__name__}, which cannot "
                    "be a projection without bias: use a ViT or another model with a linear head"
                )
            part.register_parameter("bias", None)

    def classify(self, out: EncoderOut) -> Tensor:
        """Class logits (B, C) of an output, by the model's own pooling and head."""
        raise NotImplementedError


class EncoderFeatures(ImageFeatures):
    """Features of an encoder: the mean of its final patch tokens (class token excluded)."""

    def __init__(self, encoder: VisionEncoder, reducer: TokenReducer | None = None) -> None:
        self.encoder, self.reducer = encoder, reducer

    def image_features(self, images: Tensor) -> Tensor:
        return self.encoder(images, hook=self.reducer).tokens.mean(dim=1)

    def patch_features(self, images: Tensor) -> Tensor:
        out = self.encoder(images, hook=self.reducer)
        tokens = out.tokens  # (B, N, D)
        if self.reducer is not None:
            assert out.state is not None
            tokens = self.reducer.expand(out.state, out.state.x)
        return tokens.transpose(1, 2).unflatten(2, self.encoder.spec.grid)
