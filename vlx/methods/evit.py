"""EViT: Not All Patches are What You Need (Liang et al., ICLR 2022).

In three layers the patch tokens are ranked by the attention that the class token pays them; the
best share stays, and the rest is fused into one token, their sum weighted by that attention.

B batch, N tokens with the class token, H heads, L tokens kept.
Departures: evaluation during training uses the final keep rate, not the schedule's; with more
prefix tokens than the class token, all are kept and only the class token ranks (the reference's
code for a distillation token is unfinished).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from vlx.blocks.vit_block import LayerTokens, Signal, Signals, TokenReducer
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderSpec
from vlx.families.configs.classifier import ClassifierConfig
from vlx.families.token_reduction import ReducedClassifier
from vlx.ops.token_state import TokenState, random_tokens

PAPER = Paper(
    number=89,
    slug="evit",
    title="Not All Patches are What You Need: Expediting Vision Transformers via Token "
    "Reorganizations",
    year=2022,
    venue="ICLR",
    url="https://arxiv.org/abs/2202.07800",
    family="token reduction",
    commands=("prune-tokens", "finetune"),
    modalities=("image",),
    trainable_params=22_050_664,
    gmacs=3.029,
    sweep=("method.keep_rate=0.9,0.8,0.7,0.6,0.5",),
)


class Ranking(Enum):
    """What decides which tokens stay."""

    attention = "attention"
    random = "random"


@dataclass(kw_only=True)
class EvitConfig(ClassifierConfig):
    keep_rate: float = 0.7
    """Share of the patch tokens that each reduction keeps, (0, 1]. Paper tables: 0.5 to 0.9."""
    reduction_layers: list[int] | None = None
    """Layers that reduce, 0 = first; null: a quarter, half and three quarters of the depth, which
    are the official code's 3, 6 and 9 of 12."""
    fuse: bool = True
    """Sum the tokens left out into one more, weighted by attention; otherwise drop them."""
    ranking: Ranking = Ranking.attention
    """attention of the class token, or the baseline random: the rest is then dropped, not fused."""
    shrink_start_epoch: float = 10.0
    """Epochs at a keep rate of 1, before it falls. From scratch: 10; fine-tuning: 0."""
    shrink_epochs: float = 100.0
    """Epochs over which the rate falls to keep_rate along a half cosine. Fine-tuning: 0."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if not 0.0 < self.keep_rate <= 1.0:
            raise ConfigError(f"method.keep_rate={self.keep_rate} must lie in (0, 1]")


class Reorganization(TokenReducer):
    """Keeps what the class token attends to, and fuses the rest."""

    def __init__(self, keep_rate: float, layers: list[int], fuse: bool) -> None:
        super().__init__()
        self.keep_rate, self.layers, self.fuse = keep_rate, frozenset(layers), fuse

    def num_kept(self, tokens: int) -> int:
        """Of `tokens` that are not prefix, earlier fused ones among them."""
        return math.ceil(self.keep_rate * tokens)

    def signals(self, layer: int) -> Signal:
        reduces = layer in self.layers and self.keep_rate < 1.0
        return Signal.CLS_ATTN if reduces else Signal.NONE

    def after_attention(self, state: TokenState, layer: int, signals: Signals) -> TokenState:
        count, prefix = self.num_kept(state.num_patches), state.num_prefix
        if signals.cls_attn is None or count == state.num_patches:
            return state
        attention = signals.cls_attn.mean(1)[:, prefix:]  # (B, N - prefix)
        keep = attention.topk(count, dim=1).indices + prefix  # by attention, descending
        left = state.select(state.after_prefix(keep))
        if not self.fuse:
            return left
        # Not renormalised: little attention left out makes a small token. Gradient flows through.
        weights = attention.scatter(1, keep - prefix, 0.0)  # 0 for the kept
        extra = (weights.unsqueeze(1) @ state.x[:, prefix:]).to(left.x.dtype)  # (B, 1, D)
        return _append_fused(left, extra)

    def plan(self, num_patches: int, num_prefix: int, depth: int) -> list[LayerTokens]:
        if not all(0 <= layer < depth for layer in self.layers):
            raise ConfigError(
                f"method.reduction_layers={sorted(self.layers)}: the encoder has {depth} layers, "
                f"0 to {depth - 1}"
            )
        counts, tokens = [], num_patches
        for layer in range(depth):
            left, kept = tokens, self.num_kept(tokens)
            if layer in self.layers and kept < tokens:
                left = kept + self.fuse
            counts.append(LayerTokens(tokens + num_prefix, left + num_prefix))
            tokens = left
        return counts


def _append_fused(state: TokenState, extra: Tensor) -> TokenState:
    """`extra (B, 1, D)` as a last token, to which every patch without a token now belongs."""
    batch, tokens, _ = state.x.shape
    fused = state.fused
    if fused is None:
        fused = torch.zeros(batch, tokens, dtype=torch.bool, device=state.x.device)
    return replace(
        state,
        x=torch.cat([state.x, extra], 1),
        fused=torch.cat([fused, torch.ones_like(fused[:, :1])], 1),
        owner=state.owner.masked_fill(state.owner < 0, tokens),
    )


class RandomDropping(Reorganization):
    """The baseline: as many tokens as without fusion, at random."""

    def __init__(self, keep_rate: float, layers: list[int], fuse: bool) -> None:
        super().__init__(keep_rate, layers, fuse=False)

    def signals(self, layer: int) -> Signal:
        return Signal.NONE

    def after_attention(self, state: TokenState, layer: int, signals: Signals) -> TokenState:
        count = self.num_kept(state.num_patches)
        if layer not in self.layers or count == state.num_patches:
            return state
        return state.select(random_tokens(state, count))


REDUCERS = {Ranking.attention: Reorganization, Ranking.random: RandomDropping}


class Evit(ReducedClassifier):
    Config = EvitConfig
    reducer: Reorganization

    def build_reducer(self, spec: EncoderSpec) -> Reorganization:
        cfg, layers = self.cfg, self.cfg.reduction_layers
        ranks = cfg.ranking is Ranking.attention and cfg.keep_rate < 1.0
        if ranks and not spec.class_token:
            raise ConfigError("evit ranks by the class token's attention; this encoder has none")
        if layers is None:
            layers = [spec.depth * quarter // 4 for quarter in (1, 2, 3)]
        return REDUCERS[cfg.ranking](cfg.keep_rate, layers, cfg.fuse)

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        self.reducer.keep_rate = self.keep_rate_at(ctx.epoch)
        try:
            return super().step(batch, ctx)
        finally:  # evaluation is of the rate that was asked for
            self.reducer.keep_rate = self.cfg.keep_rate

    def keep_rate_at(self, epoch: float) -> float:
        """1 until the start, then down a half cosine to `keep_rate` (official code)."""
        cfg = self.cfg
        done = epoch - cfg.shrink_start_epoch
        if done < 0:
            return 1.0
        if done >= cfg.shrink_epochs:
            return cfg.keep_rate
        cosine = (1 + math.cos(math.pi * done / cfg.shrink_epochs)) / 2
        return cfg.keep_rate + (1 - cfg.keep_rate) * cosine


METHOD = Evit
