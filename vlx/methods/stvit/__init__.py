"""STViT: Making Vision Transformers Efficient from A Token Sparsification View.

Chang et al., CVPR 2023. After the first layers a few semantic tokens start from a pooling of the
map and learned centres, gather from the patches in two cross-attention layers, and replace them.
STViT-R, on Swin, does so three times in its third stage and recovers the grid each time, by a
layer in which the patches query the semantic tokens.

B batch, N patches, M semantic tokens, D width.
Departures: the pooling is the released code's adaptive maximum, since how the paper's learned
masks and offsets combine was not seen; the residual of the second gathering layer is its query,
as in the code; maps of more than two windows
a side are cut without padding, the windows at the border reaching further inwards; "centres" alone
start the tokens from the centres, nothing is added later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from vlx.core.paper import Paper
from vlx.families.configs.classifier import ClassifierConfig
from vlx.families.few_tokens import FewTokenClassifier
from vlx.methods.stvit._deit import SemanticVisionTransformer
from vlx.methods.stvit._swin import SemanticSwin

PAPER = Paper(
    number=37,
    slug="stvit",
    title="Making Vision Transformers Efficient from A Token Sparsification View",
    year=2023,
    venue="CVPR",
    url="https://arxiv.org/abs/2303.08685",
    family="token reduction",
    commands=("prune-tokens", "finetune"),
    modalities=("image",),
    trainable_params=22_056_040,
    gmacs=1.907,
    backbones=(
        "stvit_deit_tiny",
        "stvit_deit_small",
        "stvit_deit_base",
        "stvit_r_swin_small",
        "stvit_r_swin_base",
    ),
    sweep=("method.token_side=2,3,4,5,6,7",),
)


class Start(Enum):
    """What semantic tokens start from."""

    both = "both"
    pooling = "pooling"
    centres = "centres"


@dataclass(kw_only=True)
class StvitConfig(ClassifierConfig):
    token_side: int | None = None
    """Side of the square of semantic tokens: of the whole image on DeiT (paper: 4), of each window
    on Swin (code: 3). null: these."""
    base_layers: int | None = None
    """Layers that run on all patches, on DeiT; null: the paper's 4. On Swin they are fixed."""
    gather_layers: int | None = None
    """Layers in which the semantic tokens gather, on DeiT; null: the paper's 2."""
    start: Start | None = None
    """The pooled map, learned centres, or both. null: both on DeiT (paper), pooling on Swin (code).
    """
    window_residual: bool | None = None
    """On Swin, whether the gathering in windows adds to the pooled tokens. null: it does, as in the
    paper and the detection code; the released classification runs (82.7, 83.2) have it off."""


class Stvit(FewTokenClassifier):
    Config = StvitConfig
    example = "stvit_deit_small"
    shards = False  # the gathering layers go around the forward of timm's blocks

    def backbone_kinds(self) -> tuple[type, ...]:
        return SemanticVisionTransformer, SemanticSwin

    @classmethod
    def encoder_arguments(cls, cfg: StvitConfig) -> Mapping[str, Any]:
        chosen = {
            "token_side": cfg.token_side,
            "base_layers": cfg.base_layers,
            "gather_layers": cfg.gather_layers,
            "start": cfg.start and cfg.start.value,
            "window_residual": cfg.window_residual,
        }
        return {key: value for key, value in chosen.items() if value is not None}

    def compiled_parts(self) -> list[nn.Module]:
        return [self.encoder]


METHOD = Stvit
