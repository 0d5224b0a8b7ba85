"""LightCLIP: multi-level interaction for lightweight vision-language models (Nie et al., 2023).

CLIP with small towers and three additions in training alone: the target of the contrastive loss
moves mass onto near negatives as training goes on; patches and words are matched to each other;
and the text tower also learns masked words, with the image fused into it at several depths.

B batch, N patches, L text tokens, E joint width, W text width.
No code was published and the paper's text was out of reach for the card: the forms below follow
the abstract and the card's choices (its "(choice)"), which are ours: mass of negatives by the
softmax of their own logits; weight beta rising linearly to 0.2; relaxed matching as the mean of
best partners (FILIP's form) with hard targets and a temperature of its own; BERT's masking; gated
cross-attention, gates zero at first, after the last `fusion_layers` text blocks, from as many last
stages of the image tower; weights 1. The text tower has no causal mask, since masked words need
both sides, and its mask is a vector of its own: the vocabulary stays the tokenizer's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from vlx.blocks.logit_scale import LogitScale
from vlx.blocks.vit_block import BlockHook
from vlx.blocks.word_head import WordHead
from vlx.core.capability import Capability
from vlx.core.config import MethodConfig
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch, Needs
from vlx.core.method import Builder, ParamGroup, Trainable
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures
from vlx.families.dual_encoder import (
    PAIR_FIELDS,
    JointSpace,
    PairTowers,
    caption_view,
    exempt_class_tokens,
)
from vlx.ops.contrastive import distilled_contrast, late_interaction
from vlx.ops.dist import gather_rows, global_mean, rank, world_size
from vlx.ops.masked_words import MaskedWords, choose_words
from vlx.ops.text import real_tokens
from vlx.ops.token_state import TokenState

PAPER = Paper(
    number=93,
    slug="lightclip",
    title="LightCLIP: Learning Multi-Level Interaction for Lightweight Vision-Language Models",
    year=2023,
    venue="arXiv",
    url="https://arxiv.org/abs/2312.00674",
    family="alignment",
    commands=("align",),
    modalities=("image", "text"),
)


@dataclass(kw_only=True)
class LightclipConfig(MethodConfig):
    embed_dim: int = 512
    """Width of the joint space. Ours, as CLIP's."""
    temperature: float = 0.07
    """Divides cosines at the start, of pairs and of patches and words; learned. CLIP's."""
    soft_ratio: float = 0.2
    """Mass that the target gives to negatives at the end, rising linearly from 0. Ours."""
    token_weight: float = 1.0
    """Weight of the matching of patches and words. Ours."""
    word_weight: float = 1.0
    """Weight of masked words. Ours."""
    mask_ratio: float = 0.15
    """Share of words hidden, 0..1. BERT's; ours."""
    fusion_layers: int = 3
    """Text blocks, the last ones, after which the image is fused in. Ours."""
    crop_scale: list[float] = field(default_factory=lambda: [0.5, 1.0])
    """Area of the random resized crop, low and high, 0..1. Ours."""
    flip: float = 0.5
    """Probability of a horizontal flip. Ours."""


class LightTowers(PairTowers):
    """Small towers; pooled vectors and parts go through one projection each, without bias."""

    def __init__(self, build: Builder, embed_dim: int) -> None:
        super().__init__(build)
        self.image = build.vision()
        self.text = build.text(causal=False)
        self.image_projection = nn.Linear(self.image.spec.dim, embed_dim, bias=False)
        self.projection = nn.Linear(self.text.spec.dim, embed_dim, bias=False)
        for layer in (self.image_projection, self.projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def embed_images(self, images: Tensor) -> Tensor:
        return self.image_vector(self.image(images).tokens)

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return normalize(self.projection(self.text(ids, lengths).pooled), dim=-1)

    def image_vector(self, tokens: Tensor) -> Tensor:
        """(B, N, D) of the image tower to (B, E) of unit length."""
        return normalize(self.image_projection(tokens.mean(1)), dim=-1)


class Fusion(nn.Module):
    """Gated cross-attention from a text to the stages of an image, one for each fused block."""

    def __init__(self, text_dim: int, heads: int, stage_dims: list[int]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(dim, text_dim) for dim in stage_dims)
        self.image_norm = nn.ModuleList(nn.LayerNorm(text_dim) for _ in stage_dims)
        self.text_norm = nn.ModuleList(nn.LayerNorm(text_dim) for _ in stage_dims)
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(text_dim, heads, batch_first=True) for _ in stage_dims
        )
        self.gates = nn.Parameter(torch.zeros(len(stage_dims)))

    def forward(self, text: Tensor, stage: Tensor, i: int) -> Tensor:
        """text: (B, L, W); stage: (B, n, d) of the i-th fused stage. Returns (B, L, W)."""
        image = self.image_norm[i](self.maps[i](stage))
        seen, _ = self.attention[i](self.text_norm[i](text), image, image, need_weights=False)
        return text + self.gates[i] * seen


class Fusing(BlockHook):
    """The fusion at work on one batch: after the last text blocks, one stage each."""

    def __init__(self, fusion: Fusion, stages: list[Tensor], first_block: int) -> None:
        self.fusion, self.stages, self.first_block = fusion, stages, first_block

    def after_block(self, state: TokenState, layer: int) -> TokenState:
        i = layer - self.first_block
        return replace(state, x=self.fusion(state.x, self.stages[i], i)) if i >= 0 else state


class Lightclip(Trainable):
    Config = LightclipConfig
    couples_batch = True
    shards = False  # a text read with its image is fused inside the text tower's blocks

    def __init__(self, cfg: LightclipConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.towers = LightTowers(build, cfg.embed_dim)
        text, stages = self.towers.text.spec, self.towers.image.layer_dims()
        count = cfg.fusion_layers
        if not 1 <= count <= min(text.depth, len(stages)):
            raise ConfigError(
                f"method.fusion_layers={count}: the text tower has {text.depth} blocks and the "
                f"image tower {len(stages)} stages"
            )
        self.stages = list(range(len(stages) - count + 1, len(stages) + 1))
        self.first_fused = text.depth - count
        self.logit_scale = LogitScale(cfg.temperature)
        self.token_scale = LogitScale(cfg.temperature)
        self.fusion = Fusion(text.dim, text.heads, stages[-count:])
        self.mask_token = nn.Parameter(0.02 * torch.randn(text.dim))
        self.word_head = WordHead(text.dim, text.vocab_size)

    @classmethod
    def needs(cls, cfg: LightclipConfig) -> Needs:
        return Needs(views=(caption_view(cfg.crop_scale, cfg.flip),), fields=PAIR_FIELDS)

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        ids, lengths = batch["text"], batch["text_length"]
        if len(ids) * world_size() < 2:
            raise ConfigError("lightclip compares pairs: train.batch_size must be at least 2")
        towers = self.towers
        image = towers.image(batch["image"], layers=self.stages)
        text = towers.text(ids, lengths)
        pictures = towers.image_vector(image.tokens)  # (B, E)
        captions = normalize(towers.projection(text.pooled), dim=-1)  # (B, E)
        soft = self.cfg.soft_ratio * ctx.step / max(1, ctx.total_steps)
        instance, hard = progressive_loss(pictures, captions, self.logit_scale(), soft)
        patches = normalize(towers.image_projection(image.tokens), dim=-1)  # (B, N, E)
        words = normalize(towers.projection(text.tokens), dim=-1)  # (B, L, E)
        token = token_loss(patches, words, spoken(lengths, ids.shape[1]), self.token_scale())
        losses = {
            "instance": instance,
            "token": self.cfg.token_weight * token,
            "mlm": self.cfg.word_weight * self.word_loss(ids, lengths, image.layers, ctx),
        }
        metrics = {"hard_instance": hard, "soft_ratio": torch.full_like(hard, soft)}
        return StepOutput(losses, metrics)

    def word_loss(
        self, ids: Tensor, lengths: Tensor, stages: dict[int, Tensor], ctx: StepContext
    ) -> Tensor:
        """Cross-entropy of the hidden words, the image at hand; mean over all processes' words."""
        count = ids.shape[1]
        hidden = choose_words(
            ids,
            spoken(lengths, count),
            ctx.uniform(ids, 3 * count, "words"),
            mask_ratio=self.cfg.mask_ratio,
            vocab_size=self.towers.text.spec.vocab_size,
        )
        logits = self.word_logits(hidden, lengths, stages)
        per_word = cross_entropy(logits.transpose(1, 2).float(), ids, reduction="none")
        chosen = hidden.chosen.float()
        return global_mean((per_word * chosen).sum(), chosen.sum())

    def word_logits(
        self, hidden: MaskedWords, lengths: Tensor, stages: dict[int, Tensor]
    ) -> Tensor:
        """(B, L, V) of a text whose words are partly hidden."""
        table = self.towers.text.token_table
        shown = torch.where(hidden.masked[..., None], self.mask_token, table(hidden.ids))
        fusing = Fusing(self.fusion, [stages[s] for s in self.stages], self.first_fused)
        out = self.towers.text(hidden.ids, lengths, embeddings=shown, hook=fusing)
        return self.word_head(out.tokens, table.weight)

    def after_step(self, ctx: StepContext) -> None:
        self.logit_scale.clamp()
        self.token_scale.clamp()

    def param_groups(self) -> list[ParamGroup]:
        return exempt_class_tokens(super().param_groups())

    def exports(self) -> tuple[Capability, ...]:
        return JointSpace(self.towers, self.logit_scale), EncoderFeatures(self.towers.image)


def spoken(lengths: Tensor, count: int) -> Tensor:
    """(B, count) bool: real tokens that are neither the start nor the end of a text."""
    inside = real_tokens(lengths - 1, count)
    inside[:, 0] = False
    return inside


def progressive_loss(
    images: Tensor, texts: Tensor, scale: Tensor, soft: float
) -> tuple[Tensor, Tensor]:
    """CLIP's loss with `soft` of the target's mass on negatives, by the softmax of their logits.

    images, texts: (B, E) of unit length. Returns (loss, the same with hard targets, detached).
    """
    images, texts, scale = images.float(), texts.float(), scale.float()
    both = [
        _soft_cross_entropy(scale * images @ gather_rows(texts).T, soft),
        _soft_cross_entropy(scale * texts @ gather_rows(images).T, soft),
    ]
    loss, hard = (torch.stack(values).mean() for values in zip(*both))
    return loss, hard.detach()


def _soft_cross_entropy(logits: Tensor, soft: float) -> tuple[Tensor, Tensor]:
    """logits: (B, M), the pair of row i in column rank * B + i."""
    own = torch.arange(len(logits), device=logits.device) + rank() * len(logits)
    pairs = one_hot(own, logits.shape[1]).bool()
    others = logits.detach().masked_fill(pairs, float("-inf"))
    return distilled_contrast(logits, others, pairs, soft), cross_entropy(logits, own)


def token_loss(patches: Tensor, words: Tensor, real: Tensor, scale: Tensor) -> Tensor:
    """Contrast of images and texts by how well their parts match.

    patches: (B, N, E), words: (B, L, E), of unit length; real: (B, L).
    """
    patches, words, scale = patches.float(), words.float(), scale.float()
    own = torch.arange(len(patches), device=patches.device) + rank() * len(patches)
    all_words, all_real = gather_rows(words), gather_rows(real)
    by_patch, by_word = late_interaction(patches, all_words, all_real)  # (B, M) each
    if world_size() > 1:  # this process's texts among the images of all
        _, by_word = late_interaction(gather_rows(patches), words, real)  # (M, B)
    return (cross_entropy(scale * by_patch, own) + cross_entropy(scale * by_word.T, own)) / 2


METHOD = Lightclip
