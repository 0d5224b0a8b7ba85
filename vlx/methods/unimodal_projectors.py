"""From unimodal to multimodal: scaling up projectors (Maniparambil et al., CVPR 2025).

A self-supervised image encoder and a sentence encoder stay frozen; small projectors on their
tokens, trained by CLIP's loss, put both into one space. Which encoders fit is told beforehand by
the linear CKA of their features (`ops.cka.linear_cka`).

B batch, P patches, T tokens, D joint width.
Departures: images of 252 pixels, 18 x 18 patches of 14, where the official code shows 256 and
drops the last four; the schedule moves every step after its warm-up, the code's once an epoch.
Kept from the official code: negatives are those of one process (8 processes of 1,800 in the
paper), the temperature is decayed, and the text encoder's own dropout stays on in training. The
code's local loss, which has weight 0 there, is left out; so is the curation of LAION-400M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlx.blocks.frozen import Frozen
from vlx.blocks.logit_scale import Temperature
from vlx.blocks.projectors import ResidualHead, TokenProjector
from vlx.core.capability import Capability
from vlx.core.fields import Batch, Needs
from vlx.core.method import Builder, ParamGroup, Trainable, decay_all_but_vectors
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures
from vlx.families.configs.pairs import AlbefViewConfig
from vlx.families.dual_encoder import PAIR_FIELDS, JointSpace, PairTowers, caption_view
from vlx.ops.contrastive import paired_cross_entropy
from vlx.ops.text import mean_tokens, real_tokens

PAPER = Paper(
    number=41,
    slug="unimodal-projectors",
    title="From Unimodal to Multimodal: Scaling up Projectors to Align Modalities",
    year=2025,
    venue="CVPR",
    url="https://arxiv.org/abs/2409.19425",
    family="alignment",
    commands=("align",),
    modalities=("image", "text"),
    trainable_params=11_553_793,
)


@dataclass(kw_only=True)
class UnimodalProjectorsConfig(AlbefViewConfig):
    embed_dim: int = 1024
    """Width of the joint space. Official config: 1024."""
    dropout: float = 0.1
    """Dropout inside the projectors, 0..1. Official code: 0.1."""
    temperature: float = 0.07
    """Divides cosines at the start; learned, kept within 0.001 and 0.5. Official config: 0.07."""


class ProjectedTowers(PairTowers):
    """Two frozen encoders under their projectors."""

    def __init__(self, build: Builder, cfg: UnimodalProjectorsConfig) -> None:
        super().__init__(build)
        self.image = Frozen(build.vision())
        self.text = build.text(frozen=True).requires_grad_(False)  # in train mode its dropout is on
        image_dim, text_dim = self.image.module.spec.dim, self.text.spec.dim
        self.patch_projector = TokenProjector(image_dim, cfg.embed_dim, cfg.dropout)
        self.has_class_token = self.image.module.spec.num_prefix > 0
        if self.has_class_token:
            self.class_projector = TokenProjector(image_dim, cfg.embed_dim, cfg.dropout)
        self.text_projector = TokenProjector(text_dim, cfg.embed_dim, cfg.dropout)
        self.text_head = ResidualHead(cfg.embed_dim, cfg.embed_dim, cfg.dropout)

    def embed_images(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            out = self.image.module(images)
        joint = self.patch_projector(out.tokens).mean(1)  # (B, D)
        if self.has_class_token:
            joint = joint + self.class_projector(out.prefix[:, 0])
        return normalize(joint, dim=-1)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = self.text(ids, lengths).tokens  # (B, T, W)
        real = real_tokens(lengths, tokens.shape[1])
        pooled = mean_tokens(self.text_projector(tokens), real)
        return normalize(self.text_head(pooled), dim=-1)


class UnimodalProjectors(Trainable):
    Config = UnimodalProjectorsConfig
    couples_batch = True
    frozen_base = True

    def __init__(self, cfg: UnimodalProjectorsConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.towers = ProjectedTowers(build, cfg)
        self.temperature = Temperature(cfg.temperature)

    @classmethod
    def needs(cls, cfg: UnimodalProjectorsConfig) -> Needs:
        view = caption_view(cfg.crop_scale, cfg.flip, cfg.rand_augment)
        return Needs(views=(view,), fields=PAIR_FIELDS)

    def frozen_parts(self) -> tuple[str, ...]:
        return ("towers.text",)

    def inserted(self) -> list[str]:
        return [name for name, param in self.named_parameters() if param.requires_grad]

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        images = self.towers.embed_images(batch["image"]).float()
        texts = self.towers.embed_text(batch["text"], batch["text_length"]).float()
        scale = self.temperature()
        both = paired_cross_entropy(images, texts, scale) + paired_cross_entropy(
            texts, images, scale
        )
        return StepOutput({"contrastive": both / 2}, {"temperature": 1 / scale.detach()})

    def after_step(self, ctx: StepContext) -> None:
        self.temperature.clamp()

    def param_groups(self) -> list[ParamGroup]:
        """All but vectors is decayed, the temperature too (official code)."""
        return decay_all_but_vectors(self)

    def exports(self) -> tuple[Capability, ...]:
        joint = JointSpace(self.towers, self.temperature)
        return joint, EncoderFeatures(self.towers.image.module)


METHOD = UnimodalProjectors
