"""CropMAE: siamese cropped masked autoencoders (Eymaël et al., ECCV 2024).

A shared ViT encodes one whole view of an image and two patches of a crop of that view; a decoder
whose queries are the crop's tokens and whose memory is the whole view repaints the crop.

B batch, N patches, K kept, D width, P = patch_size**2 * 3 values of a patch.
Departures: the learning rate is warmed up before the first step (the source sets it after);
its colour and blur options, off by default, are left out. SiamMAE
(Gupta et al., NeurIPS 2023) is this method on two frames of a video under one crop and flip: until
a source gives frames, `siammae.yaml` feeds it the same picture twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from vlx.blocks.cross_decoder import CrossDecoder
from vlx.core.capability import Capability
from vlx.core.fields import Batch, Needs, ViewSpec
from vlx.core.method import Builder, Trainable
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures
from vlx.encoders.init import mae_init
from vlx.families.configs.masked import PatchDecoderConfig
from vlx.families.masked import PatchReconstruction, decoder_sizes
from vlx.ops.augment import HorizontalFlip, RandomResizedCrop
from vlx.ops.masking import random_masking
from vlx.ops.patches import patchify
from vlx.ops.resample import Interpolation
from vlx.ops.targets import masked_patch_mse, norm_pix, undo_norm_pix

PAPER = Paper(
    number=33,
    slug="cropmae",
    title="Efficient Image Pre-Training with Siamese Cropped Masked Autoencoders",
    year=2024,
    venue="ECCV",
    url="https://arxiv.org/abs/2403.17823",
    family="masked",
    commands=("pretrain-mim",),
    modalities=("image",),
    trainable_params=28_201_728,
    gmacs=6.18,
)


class Strategy(Enum):
    """Which view is remembered whole and which is repainted."""

    GlobalToLocal = "GlobalToLocal"
    LocalToGlobal = "LocalToGlobal"
    RandomViews = "RandomViews"
    SameViews = "SameViews"


@dataclass(kw_only=True)
class CropmaeConfig(PatchDecoderConfig):
    strategy: Strategy = Strategy.GlobalToLocal
    """Repaint a crop of the global view (GlobalToLocal), the reverse, one of two independent
    global crops, or the very same view. Launch scripts: GlobalToLocal."""
    mask_ratio: float = 0.985
    """Share of the repainted view's patches hidden, 0..1. Launch scripts: 0.985, 2 of 196 kept."""
    decoder_dim: int = 256
    """Width of the decoder. Launch scripts: 256 for every encoder size."""
    decoder_depth: int = 4
    """Blocks of the decoder. Launch scripts: 4."""
    decoder_heads: int = 8
    """Attention heads of the decoder. Launch scripts: 8."""
    decoder_mlp_dim: int = 2048
    """Hidden width of the decoder's MLP. Official code: 2048 whatever decoder_dim is."""
    dropout: float = 0.1
    """Dropout in the decoder, attention weights included. Official code: 0.1."""
    global_scale: list[float] = field(default_factory=lambda: [0.1, 1.0])
    """Area of the global crop, low and high, 0..1. Launch script for ImageNet: 0.1, 1."""
    local_scale: list[float] = field(default_factory=lambda: [0.3, 0.6])
    """Area of the local crop within the global one, low and high, 0..1. Launch scripts."""
    flip: float = 0.5
    """Probability of a horizontal flip, drawn for each view on its own. Official code: 0.5."""


class Cropmae(Trainable):
    Config = CropmaeConfig

    def __init__(self, cfg: CropmaeConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.encoder = build.vision(init=mae_init, pos_embed="sincos")
        spec = self.encoder.spec
        self.decoder = CrossDecoder(
            **decoder_sizes(spec, cfg),
            mlp_dim=cfg.decoder_mlp_dim,
            dropout=cfg.dropout,
        )

    @classmethod
    def needs(cls, cfg: CropmaeConfig) -> Needs:
        wide, narrow, flip = (
            _crop(cfg.global_scale),
            _crop(cfg.local_scale),
            HorizontalFlip(cfg.flip),
        )
        crop = ViewSpec("crop", ops=(wide,), keep=False)
        views = {
            Strategy.GlobalToLocal: (
                crop,
                ViewSpec("memory", of="crop", ops=(flip,)),
                ViewSpec("masked", of="crop", ops=(narrow, flip)),
            ),
            Strategy.LocalToGlobal: (
                crop,
                ViewSpec("memory", of="crop", ops=(narrow, flip)),
                ViewSpec("masked", of="crop", ops=(flip,)),
            ),
            Strategy.RandomViews: (
                ViewSpec("memory", ops=(wide, flip)),
                ViewSpec("masked", ops=(wide, flip)),
            ),
            Strategy.SameViews: (
                ViewSpec("memory", ops=(wide, flip)),
                ViewSpec("masked", of="memory", ops=()),
            ),
        }
        return Needs(views=views[cfg.strategy])

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        masked = self.encoder.normalise(batch["masked"])
        memory = self.remember(self.encoder.normalise(batch["memory"]))
        pred, mask = self.predict(memory, masked, ctx)
        target = norm_pix(patchify(masked, self.encoder.spec.patch_size))  # (B, N, P)
        return StepOutput({"recon": masked_patch_mse(pred, target, mask)})

    def remember(self, images: Tensor) -> Tensor:
        """Tokens (B, 1 + N, D) of a whole normalised view, class token first."""
        out = self.encoder(images, normalised=True)
        return torch.cat([out.prefix, out.tokens], dim=1)

    def predict(self, memory: Tensor, masked: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Patches (B, N, P) of the masked view and its mask (B, N), True = hidden."""
        noise = ctx.uniform(masked, self.encoder.spec.num_patches, "mask")
        keep, restore, mask = random_masking(noise, self.cfg.mask_ratio)
        visible = self.encoder(masked, keep=keep, normalised=True)  # tokens (B, K, D)
        return self.decoder(memory, visible.prefix, visible.tokens, restore), mask

    def paint(self, images: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """A view repainted from its few patches and itself as memory, as pixels, and the mask."""
        pred, mask = self.predict(self.remember(images), images, ctx)
        return undo_norm_pix(pred, patchify(images, self.encoder.spec.patch_size)), mask

    def exports(self) -> tuple[Capability, ...]:
        return EncoderFeatures(self.encoder), PatchReconstruction(self.encoder, self.paint)


def _crop(scale: list[float]) -> RandomResizedCrop:
    return RandomResizedCrop(scale=(scale[0], scale[1]), interpolation=Interpolation.bilinear)


METHOD = Cropmae
