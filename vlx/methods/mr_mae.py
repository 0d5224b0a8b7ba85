"""MR-MAE: mimic before reconstruct (Gao et al., ICLR submission 2023; IJCV 2023).

MAE with a second task on the other tokens: the visible tokens, as they leave the encoder, match
the features of a frozen teacher at the same places; the hidden ones are repainted as in MAE. The
two targets never meet on one token. `encoder=convmae_base` gives the masked-convolution variant.

B batch, N patches, K kept, D student width, T teacher width, P = patch_size**2 * 3.
No official code of the mimic part exists; these are from memory of the paper or ours: one Linear
as mimic head, no target for the class token, squared error, both weights 1, teacher features after
the final norm without projection and, ours, with a LayerNorm so that teachers are comparable.
Left out: focused mimicking (visible tokens chosen by the teacher's attention), mimicking several
layers, joint teachers; the paper's text on them could not be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlx.blocks.frozen import Frozen
from vlx.blocks.init import xavier_init
from vlx.blocks.mim_decoder import MAEDecoder
from vlx.core.capability import Capability
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch, Needs
from vlx.core.method import Builder, Trainable
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures, EncoderOut, VisionEncoder
from vlx.encoders.init import mae_init
from vlx.families.configs.masked import MaskedConfig
from vlx.families.masked import PatchReconstruction, decoder_sizes, random_crop_needs
from vlx.ops.masking import RandomMask, random_masking
from vlx.ops.patches import patchify
from vlx.ops.resample import resize
from vlx.ops.targets import masked_patch_mse, norm_pix, undo_norm_pix
from vlx.ops.tokens import gather_tokens

PAPER = Paper(
    number=43,
    slug="mr-mae",
    title="Mimic before Reconstruct: Enhancing Masked Autoencoders with Feature Mimicking",
    year=2023,
    venue="IJCV",
    url="https://arxiv.org/abs/2303.05475",
    family="masked",
    commands=("pretrain-mim",),
    modalities=("image",),
    trainable_params=112_246_272,
    gmacs=27.37,
)


@dataclass(kw_only=True)
class MrMaeConfig(MaskedConfig):
    mimic_weight: float = 1.0
    """Weight of the mimic loss beside the pixel loss. From memory of the paper: 1."""
    normalise_teacher: bool = True
    """LayerNorm without weights on the teacher's features. Ours: makes teachers comparable."""


class MrMae(Trainable):
    Config = MrMaeConfig

    def __init__(self, cfg: MrMaeConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.encoder = build.vision(init=mae_init, pos_embed="sincos")
        spec = self.encoder.spec
        self.decoder = MAEDecoder(
            **decoder_sizes(spec, cfg),
            num_prefix=spec.num_prefix,
        )
        teacher: VisionEncoder = build.vision("teacher")
        if teacher.spec.grid != spec.grid:
            rows, side = spec.grid[0], spec.grid[0] * teacher.spec.patch_size
            raise ConfigError(
                f"the teacher sees {teacher.spec.grid[0]}x{teacher.spec.grid[1]} patches and the "
                f"encoder {rows}x{rows}: set teacher.image_size={side}"
            )
        self.teacher = Frozen(teacher)
        self.mimic_head = nn.Linear(spec.dim, teacher.spec.dim)
        xavier_init(self.mimic_head)
        norm = nn.LayerNorm(teacher.spec.dim, eps=1e-6, elementwise_affine=False)
        self.target_norm = norm if cfg.normalise_teacher else nn.Identity()

    @classmethod
    def needs(cls, cfg: MrMaeConfig) -> Needs:
        return random_crop_needs(cfg)

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        images = self.encoder.normalise(batch["image"])
        visible, masked = self.encode(images, ctx)
        pred = self.decoder(visible.prefix, visible.tokens, masked.restore)  # (B, N, P)
        target = norm_pix(patchify(images, self.encoder.spec.patch_size))
        features = gather_tokens(self.teach(batch["image"]), masked.keep)  # (B, K, T)
        mimic = (self.mimic_head(visible.tokens) - features).square().mean()
        return StepOutput(
            {
                "recon": masked_patch_mse(pred, target, masked.mask),
                "mimic": self.cfg.mimic_weight * mimic,
            }
        )

    def encode(self, images: Tensor, ctx: StepContext) -> tuple[EncoderOut, RandomMask]:
        """Visible tokens (B, K, D) of normalised images, in shuffled order, and the split."""
        noise = ctx.uniform(images, self.encoder.spec.num_patches, "mask")
        masked = random_masking(noise, self.cfg.mask_ratio)
        return self.encoder(images, keep=masked.keep, normalised=True), masked

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """The teacher's patch features (B, N, T) of whole images in 0..1, in its own scale."""
        teacher = self.teacher.module
        return self.target_norm(teacher(resize(images, teacher.spec.image_size)).tokens)

    def paint(self, images: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Normalised images to their patches as pixels (B, N, P) and the mask (B, N)."""
        visible, masked = self.encode(images, ctx)
        pred = self.decoder(visible.prefix, visible.tokens, masked.restore)
        return undo_norm_pix(pred, patchify(images, self.encoder.spec.patch_size)), masked.mask

    def exports(self) -> tuple[Capability, ...]:
        return EncoderFeatures(self.encoder), PatchReconstruction(self.encoder, self.paint)


METHOD = MrMae
