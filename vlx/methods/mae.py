"""MAE: masked autoencoders are scalable vision learners (He et al., CVPR 2022).

A ViT encodes a random quarter of an image's patches; a light decoder, which sees them and a
learned token at every hidden place, repaints the hidden pixels.

B batch, N patches, K kept, D width, P = patch_size**2 * 3 values of a patch.
Departures: mask ratios that keep no patch, or all, are refused (the official code returns NaN).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlx.blocks.mim_decoder import MAEDecoder
from vlx.core.capability import Capability
from vlx.core.fields import Batch, Needs
from vlx.core.method import Builder, Trainable
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures
from vlx.encoders.init import mae_init
from vlx.families.configs.masked import MaskedConfig
from vlx.families.masked import PatchReconstruction, decoder_sizes, random_crop_needs
from vlx.ops.masking import random_masking
from vlx.ops.patches import patchify
from vlx.ops.targets import masked_patch_mse, norm_pix, undo_norm_pix

PAPER = Paper(
    number=0,
    slug="mae",
    title="Masked Autoencoders Are Scalable Vision Learners",
    year=2022,
    venue="CVPR",
    url="https://arxiv.org/abs/2111.06377",
    family="masked",
    commands=("pretrain-mim",),
    modalities=("image",),
    trainable_params=111_655_680,
    gmacs=9.78,
)


@dataclass(kw_only=True)
class MaeConfig(MaskedConfig):
    norm_pix_loss: bool = True
    """Predict each patch with its own mean and deviation removed. On in the published weights."""


class Mae(Trainable):
    Config = MaeConfig

    def __init__(self, cfg: MaeConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.encoder = build.vision(init=mae_init, pos_embed="sincos")
        spec = self.encoder.spec
        self.decoder = MAEDecoder(
            **decoder_sizes(spec, cfg),
        )

    @classmethod
    def needs(cls, cfg: MaeConfig) -> Needs:
        return random_crop_needs(cfg)

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        images = self.encoder.normalise(batch["image"])
        pred, mask = self.predict(images, ctx)
        target = patchify(images, self.encoder.spec.patch_size)  # (B, N, P)
        if self.cfg.norm_pix_loss:
            target = norm_pix(target)
        return StepOutput({"recon": masked_patch_mse(pred, target, mask)})

    def predict(self, images: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Normalised images to predicted patches (B, N, P) and the mask (B, N), True = hidden."""
        noise = ctx.uniform(images, self.encoder.spec.num_patches, "mask")
        keep, restore, mask = random_masking(noise, self.cfg.mask_ratio)
        visible = self.encoder(images, keep=keep, normalised=True)  # tokens (B, K, D)
        return self.decoder(visible.prefix, visible.tokens, restore), mask

    def paint(self, images: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """As `predict`, with every patch at its own mean and deviation."""
        pred, mask = self.predict(images, ctx)
        if self.cfg.norm_pix_loss:
            pred = undo_norm_pix(pred, patchify(images, self.encoder.spec.patch_size))
        return pred, mask

    def exports(self) -> tuple[Capability, ...]:
        return EncoderFeatures(self.encoder), PatchReconstruction(self.encoder, self.paint)


METHOD = Mae
