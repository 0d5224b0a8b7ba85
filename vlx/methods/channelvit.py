"""ChannelViT: An Image Is Worth C x 16 x 16 Words (Bao et al., ICLR 2024).

One token for every patch of every channel. The patch projection and the position table are shared
by the channels, a learned embedding tells them apart. Hierarchical channel sampling leaves out, for
a batch, the tokens of all but m channels: first m is drawn, uniformly, then which. Any subset of
the channels can be used at test time.

B batch, C channels, m of them used, N patches of a channel, D width.
`encoder=...` of a plain ViT is the paper's baseline: there the channels left out are set to 0 after
normalisation and the others are multiplied by C / m, in training and at test time.
Departures: the frame's images are RGB, so that the paper's sets of 8 and 18 channels need a source
of their own; the model takes any number (`in_chans`). A dry run counts all channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.layers.weight_init import trunc_normal_
from timm.models import register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.core.capability import Capability, ChannelSubsets
from vlx.core.errors import ConfigError
from vlx.core.fields import LABEL, Batch, Needs, ViewSpec
from vlx.core.method import Builder, ParamGroup
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures, VisionEncoder
from vlx.families.classifier import Classifier, Logits, training_view
from vlx.families.configs.classifier import ClassifierConfig
from vlx.ops.augment import ColorJitter
from vlx.ops.mixing import soft_target_cross_entropy

PAPER = Paper(
    number=75,
    slug="channelvit",
    title="Channel Vision Transformers: An Image Is Worth C x 16 x 16 Words",
    year=2024,
    venue="ICLR",
    url="https://arxiv.org/abs/2309.16108",
    family="backbone",
    commands=("finetune",),
    modalities=("image",),
    trainable_params=21_855_208,
    backbones=(
        "channelvit_tiny_patch16_224",
        "channelvit_small_patch16_224",
        "channelvit_base_patch16_224",
        "channelvit_small_patch8_224",
    ),
)


@dataclass(kw_only=True)
class ChannelVitConfig(ClassifierConfig):
    hierarchical_sampling: bool = True
    """Draw in training how many channels a batch keeps, then which. Off is the paper's ablation."""
    jitter: float = 0.8
    """Probability of colour jitter (0.4, 0.4, 0.4, 0.1). Released config for ImageNet: 0.8."""
    rand_augment: float | None = None
    """Magnitude of RandAugment; null for none, as in the paper."""
    erasing: float = 0.0
    """Probability that a random box is erased. Paper: 0."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none, as in the paper."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 for none, as in the paper."""
    smoothing: float = 0.0
    """Label smoothing, 0..1. Released config: 0."""
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Area of the random resized crop, low and high, 0..1. Released config: 0.08, 1."""


class ChannelPatchEmbed(PatchEmbed):
    """One projection for the patches of all channels, and an embedding of each channel."""

    def __init__(self, *, in_chans: int, embed_dim: int, **arguments: Any) -> None:
        super().__init__(in_chans=1, embed_dim=embed_dim, **arguments)
        self.channel_embed = nn.Embedding(in_chans, embed_dim)
        trunc_normal_(self.channel_embed.weight, std=0.02)

    def forward(self, x: Tensor, channels: Tensor) -> Tensor:
        """x: (B, m, H, W); channels: (m,) or (B, m) numbers of its channels. Returns
        (B, m, N, D)."""
        patches = super().forward(x.flatten(0, 1).unsqueeze(1))  # (B*m, N, D)
        return patches.unflatten(0, x.shape[:2]) + self.channel_embed(channels).unsqueeze(-2)


class ChannelVit(VisionTransformer):
    """timm's ViT on 1 + m*N tokens; the position table has 1 + N rows, as that of a plain one.

    `forward` and `forward_features` take `channels`, the numbers of the images' channels, (m,) or
    (B, m); without them the images must have all C.
    """

    def __init__(self, *, in_chans: int = 3, **arguments: Any) -> None:
        super().__init__(in_chans=in_chans, embed_layer=ChannelPatchEmbed, **arguments)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official names are timm's; their projection is a convolution in three dimensions."""
        key = "patch_embed.proj.weight"
        return {
            name: value.squeeze(2) if name.endswith(key) and value.ndim == 5 else value
            for name, value in state.items()
        }

    def embed(self, x: Tensor, channels: Tensor | None = None) -> Tensor:
        """x: (B, m, H, W), normalised. Returns (B, 1 + m*N, D)."""
        if channels is None:
            if x.shape[1] != self.in_chans:
                raise ConfigError(
                    f"images of {x.shape[1]} channels for a model of {self.in_chans}: say which "
                    "they are with channels=[...]"
                )
            channels = torch.arange(self.in_chans, device=x.device)
        assert self.pos_embed is not None
        assert self.cls_token is not None
        tokens = self.patch_embed(x, channels) + self.pos_embed[:, None, 1:]  # (B, m, N, D)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.pos_drop(torch.cat([first, tokens.flatten(1, 2)], dim=1))

    def forward_features(  # type: ignore[override]
        self, x: Tensor, channels: Tensor | None = None
    ) -> Tensor:
        x = self.embed(x, channels)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor, channels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.forward_head(self.forward_features(x, channels))

    def forward_intermediates(  # type: ignore[override]
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's; a map (B, D, h, w) is the mean over channels, NLC gives all m*N tokens."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        x, found = self.embed(x), []
        for number, block in enumerate(self.blocks):
            if stop_early and number > last:
                break
            x = block(x)
            if number in taken:
                found.append((self.norm(x) if norm else x)[:, 1:])
        if output_fmt == "NCHW":
            found = [channel_mean(tokens, self.patch_embed.grid_size) for tokens in found]
        return found if intermediates_only else (self.norm(x), found)


def channel_mean(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens (B, m*N, D) of `grid` (h, w) as a map (B, D, h, w), the mean over channels."""
    return tokens.unflatten(1, (-1, *grid)).mean(1).permute(0, 3, 1, 2)


default_cfgs = cfgs_of(PAPER.backbones, first_conv="patch_embed.proj")


def _create(name: str, pretrained: bool, **arguments: Any) -> ChannelVit:
    return build_model(ChannelVit, name, pretrained, features=3, **arguments)


@register_model
def channelvit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ChannelVit:
    """ChannelViT-Ti/16."""
    sizes = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("channelvit_tiny_patch16_224", pretrained, **{**sizes, **kwargs})


@register_model
def channelvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ChannelVit:
    """ChannelViT-S/16: 21.9 M parameters."""
    sizes = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("channelvit_small_patch16_224", pretrained, **{**sizes, **kwargs})


@register_model
def channelvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ChannelVit:
    """ChannelViT-B/16."""
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("channelvit_base_patch16_224", pretrained, **{**sizes, **kwargs})


@register_model
def channelvit_small_patch8_224(pretrained: bool = False, **kwargs: Any) -> ChannelVit:
    """ChannelViT-S/8, the paper's for microscopy and satellite images."""
    sizes = {"patch_size": 8, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("channelvit_small_patch8_224", pretrained, **{**sizes, **kwargs})


def draw_channels(total: int, generator: np.random.Generator) -> list[int]:
    """How many, uniformly from 1..total, then which, without replacement."""
    count = generator.integers(1, total, endpoint=True)
    return generator.permutation(total)[:count].tolist()


def drop_tokens(encoder: VisionEncoder, x: Tensor, channels: Tensor) -> Tensor:
    """Logits of the tokens of `channels (m,)` alone. x: (B, C, H, W), normalised."""
    model = encoder.backbone
    features = model.forward_features(x[:, channels], channels)  # type: ignore[operator]
    return model.forward_head(features)  # type: ignore[operator]


def zero_and_rescale(encoder: VisionEncoder, x: Tensor, channels: Tensor) -> Tensor:
    """Logits of a model that takes all channels: those missing 0, the others times C / m."""
    factor = torch.zeros(x.shape[1], device=x.device, dtype=x.dtype)
    factor[channels] = x.shape[1] / len(channels)
    return encoder.classify(encoder(x * factor[:, None, None], normalised=True))


class ChannelVitClassifier(Classifier):
    Config = ChannelVitConfig
    num_channels = 3

    def __init__(self, cfg: ChannelVitConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.encoder: VisionEncoder = build.vision(num_classes=self.num_classes)
        self.select = drop_tokens
        if not isinstance(self.encoder.backbone, ChannelVit):
            self.select = zero_and_rescale

    def param_groups(self) -> list[ParamGroup]:
        """Released code: biases and 1-D tensors of the backbone are not decayed; the classifier's
        bias, tables and class tokens are, the baseline's too."""
        head = self.encoder.backbone.get_classifier()  # type: ignore[operator]
        classifier = {id(param) for param in head.parameters()}
        groups = [ParamGroup("decay", []), ParamGroup("no_decay", [], weight_decay=0.0)]
        for name, param in self.named_parameters():
            if param.requires_grad:
                exempt = param.ndim < 2 and id(param) not in classifier
                groups[exempt].params.append((name, param))
        return groups

    @classmethod
    def needs(cls, cfg: ChannelVitConfig) -> Needs:
        jitter = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=cfg.jitter)
        crop, flip, *others = training_view(cfg)
        view = ViewSpec("image", ops=(crop, flip, jitter, *others))
        return Needs(views=(view,), fields=(LABEL,))

    def subset_logits(self, images: Tensor, channels: Sequence[int]) -> Tensor:
        """images: (B, C, H, W), RGB in 0..1; channels: numbers of the m that are used."""
        x = self.encoder.normalise(images)
        return self.select(self.encoder, x, torch.tensor(channels, device=x.device))

    def class_logits(self, images: Tensor) -> Tensor:
        return self.encoder.classify(self.encoder(images))

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        images, targets = self.mix(batch["image"], batch["label"], ctx)
        channels = self.channels_of(images, ctx)
        loss = soft_target_cross_entropy(self.subset_logits(images, channels), targets)
        count = torch.full((), float(len(channels)), device=images.device)
        return StepOutput({"class": loss}, {"channels": count})

    def channels_of(self, images: Tensor, ctx: StepContext) -> list[int]:
        """Numbers of the channels that this batch keeps: one draw for all its images."""
        if not (self.training and self.cfg.hierarchical_sampling) or images.is_meta:
            return list(range(self.num_channels))
        return draw_channels(self.num_channels, ctx.host_generator("channels"))

    def exports(self) -> tuple[Capability, ...]:
        features = EncoderFeatures(self.encoder)
        if isinstance(self.encoder.backbone, ChannelVit):
            features = ChannelFeatures(self.encoder)
        return Logits(self), features, Subsets(self)


class ChannelFeatures(EncoderFeatures):
    """Patch tokens, averaged over channels where there is a place for each patch."""

    def patch_features(self, images: Tensor) -> Tensor:
        grid = self.encoder.backbone.patch_embed.grid_size  # type: ignore[union-attr]
        return channel_mean(self.encoder(images).tokens, grid)  # type: ignore[arg-type]


class Subsets(ChannelSubsets):
    """The classifier with some of its channels."""

    def __init__(self, method: ChannelVitClassifier) -> None:
        self.method, self.num_channels = method, method.num_channels

    def subset_logits(self, images: Tensor, channels: Sequence[int]) -> Tensor:
        return self.method.subset_logits(images, channels)


METHOD = ChannelVitClassifier
