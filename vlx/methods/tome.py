"""ToMe: Token Merging: Your ViT But Faster (Bolya et al., ICLR 2023).

In every block, between attention and MLP, the r pairs of most similar tokens are merged into
their size-weighted means; a merged token counts in later attention as many times as the patches
it stands for. No parameters and, off the shelf, no training: `train.steps=0`.

B batch, N tokens, H heads, d width of a head.
Departures: the keys compared are those after timm's key norm, where a model has one, since
attention uses these; ranking ties go to the earlier token. Unmerged tokens stay in their order
without a class token too, where the official code leaves them in that of similarity. All prefix
tokens are protected, registers too, where it merges these. A model that pools its patches counts a
token as many times as it has patches, as the official patch of MAE does and that of timm does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from vlx.blocks.vit_block import LayerTokens, Signal, Signals, TokenReducer
from vlx.core.errors import ConfigError
from vlx.core.paper import Paper
from vlx.encoders.base import EncoderSpec
from vlx.families.configs.classifier import ClassifierConfig
from vlx.families.token_reduction import ReducedClassifier
from vlx.ops.token_merging import bipartite_matching, merge_pairs, num_merged
from vlx.ops.token_state import TokenState, random_tokens

PAPER = Paper(
    number=0,
    slug="tome",
    title="Token Merging: Your ViT But Faster",
    year=2023,
    venue="ICLR",
    url="https://arxiv.org/abs/2210.09461",
    family="token reduction",
    commands=("prune-tokens", "finetune"),
    modalities=("image",),
    trainable_params=22_050_664,
    gmacs=2.703,
    sweep=("method.r=16,13,8,4,0",),
)


class MergeSchedule(Enum):
    """How r goes over the layers."""

    constant = "constant"
    decreasing = "decreasing"


class Pairing(Enum):
    """What becomes of r tokens."""

    similar = "similar"
    random = "random"
    drop = "drop"


@dataclass(kw_only=True)
class TomeConfig(ClassifierConfig):
    r: int = 13
    """Tokens merged away in each layer, at most half of those there. Official readme: 13 for
    ViT-S and B at 224, 8 for MAE's L, 7 for ViT-L; 0 is the plain ViT."""
    schedule: MergeSchedule = MergeSchedule.constant
    """constant, or decreasing: from 2r in the first layer to 0 in the last, the same in all."""
    proportional_attention: bool = True
    """Add the log of a token's size to the logits of its key. Off for MAE models off the shelf."""
    pairing: Pairing = Pairing.similar
    """similar: the r best pairs are merged. Baselines: random, r random tokens are each merged into
    a random partner; drop, r random tokens are dropped."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if self.r < 0:
            raise ConfigError(f"method.r={self.r} must be 0 (no merging) or more")


class Merging(TokenReducer):
    """The r best pairs of every layer, by the similarity of their keys."""

    def __init__(self, r: list[int], proportional_attention: bool) -> None:
        super().__init__()
        self.r, self.proportional_attention = r, proportional_attention

    def signals(self, layer: int) -> Signal:
        return Signal.KEYS if self.r[layer] else Signal.NONE

    def attention_bias(self, state: TokenState, layer: int) -> Tensor | None:
        if state.size is None or not self.proportional_attention:
            return None
        return state.size.log().to(state.x.dtype)[:, None, None]  # (B, 1, 1, N)

    def after_attention(self, state: TokenState, layer: int, signals: Signals) -> TokenState:
        r = num_merged(self.r[layer], state.x.shape[1], state.num_prefix)
        return self.reduce(state, signals, r) if r else state

    def reduce(self, state: TokenState, signals: Signals, r: int) -> TokenState:
        """r tokens fewer."""
        assert signals.keys is not None
        with torch.no_grad():
            metric = signals.keys.mean(1)  # (B, N, d)
            best, partner = bipartite_matching(metric, state.num_prefix)
        return merge_pairs(state, best, partner, r)

    def plan(self, num_patches: int, num_prefix: int, depth: int) -> list[LayerTokens]:
        counts, tokens = [], num_patches + num_prefix
        for r in self.r:
            left = tokens - num_merged(r, tokens, num_prefix)
            counts.append(LayerTokens(tokens, left))
            tokens = left
        return counts


class RandomMerging(Merging):
    """A baseline: random tokens, each merged into a random partner."""

    def signals(self, layer: int) -> Signal:
        return Signal.NONE

    def reduce(self, state: TokenState, signals: Signals, r: int) -> TokenState:
        # Random keys: their similarities are a random ranking with random partners.
        metric = torch.randn(*state.x.shape[:2], 8, device=state.x.device)
        return merge_pairs(state, *bipartite_matching(metric, state.num_prefix), r)


class RandomDropping(RandomMerging):
    """A baseline: random tokens dropped; what is left keeps its order."""

    def reduce(self, state: TokenState, signals: Signals, r: int) -> TokenState:
        return state.select(random_tokens(state, state.num_patches - r))


REDUCERS = {
    Pairing.similar: Merging,
    Pairing.random: RandomMerging,
    Pairing.drop: RandomDropping,
}


class Tome(ReducedClassifier):
    Config = TomeConfig

    def build_reducer(self, spec: EncoderSpec) -> Merging:
        r = merges_by_layer(self.cfg.r, self.cfg.schedule, spec.depth)
        return REDUCERS[self.cfg.pairing](r, self.cfg.proportional_attention)


def merges_by_layer(r: int, schedule: MergeSchedule, depth: int) -> list[int]:
    """r of every layer; the decreasing schedule falls linearly from 2r to 0."""
    if schedule is MergeSchedule.constant:
        return [r] * depth
    step = 2 * r / max(1, depth - 1)
    return [int(2 * r - step * layer) for layer in range(depth)]


METHOD = Tome
