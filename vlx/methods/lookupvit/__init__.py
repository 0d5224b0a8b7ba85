"""LookupViT: Compressing visual information to a limited number of tokens.

Koner et al., ECCV 2024.

Few compressed tokens gather from many lookup tokens by cross-attention, do the expensive part
among themselves, and write back through the same attention map transposed; the lookup tokens get
a thin MLP and never attend to each other. The classifier reads the compressed tokens.

B batch, N lookup tokens (the patches), M compressed tokens, D width, H heads, d = D / H.
Departures: the paper's body was not at hand, so these are ours: positions are added before the
one resizing (equal by linearity, and exact where the grids are equal); antialiasing; the mean of
the compressed tokens, normalised, under a linear head; the last block does not write back, since
nothing reads it; DeiT's initialisation and recipe. Patch features are the lookup tokens as the
last block finds them, normalised without parameters. Not here: video, captions, a class token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from vlx.core.capability import Budgets, Capability, ImageFeatures
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.families.classifier import Logits
from vlx.families.configs.classifier import ClassifierConfig
from vlx.families.few_tokens import FewTokenClassifier, Gathering
from vlx.methods.lookupvit._network import LookupVisionTransformer
from vlx.ops.mixing import soft_target_cross_entropy

PAPER = Paper(
    number=63,
    slug="lookupvit",
    title="LookupViT: Compressing visual information to a limited number of tokens",
    year=2024,
    venue="ECCV",
    url="https://arxiv.org/abs/2407.12753",
    family="token reduction",
    commands=("prune-tokens", "finetune"),
    modalities=("image",),
    backbones=("lookupvit_tiny", "lookupvit_small", "lookupvit_base", "lookupvit_large"),
    sweep=("method.grids=[3],[5],[7],[10]",),
)


@dataclass(kw_only=True)
class LookupVitConfig(ClassifierConfig):
    grids: list[int] = field(default_factory=lambda: [5])
    """Sides of the square of compressed tokens. With several, each step draws one, and `budgets`
    evaluates each; all else uses the largest. Ours, after the paper's 3, 5, 7 and 10."""
    thin_ratio: float = 0.5
    """Width of the lookup tokens' MLP, as a share of theirs. From the paper's cost formula: 1/2."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if not self.grids or min(self.grids) < 1 or len(set(self.grids)) < len(self.grids):
            raise ConfigError(f"method.grids={self.grids} must be different sides of 1 or more")
        if self.thin_ratio <= 0:
            raise ConfigError(f"method.thin_ratio={self.thin_ratio} must be more than 0")


class LookupVit(FewTokenClassifier):
    Config = LookupVitConfig
    example = "lookupvit_small"

    def backbone_kinds(self) -> tuple[type, ...]:
        return (LookupVisionTransformer,)

    @classmethod
    def encoder_arguments(cls, cfg: LookupVitConfig) -> Mapping[str, Any]:
        return {"compressed_grid": max(cfg.grids), "thin_ratio": cfg.thin_ratio}

    @property
    def backbone(self) -> LookupVisionTransformer:
        backbone = self.encoder.backbone
        assert isinstance(backbone, LookupVisionTransformer)
        return backbone

    def logits_at(self, images: Tensor, side: int) -> Tensor:
        """Class logits (B, C) with side x side compressed tokens; images in 0..1."""
        features = self.backbone.forward_features(self.encoder.normalise(images), side)
        return self.backbone.forward_head(features)

    def draw_grid(self, ctx: StepContext) -> int:
        """One of the grids for the whole step: the tokens of a batch must stack."""
        return self.cfg.grids[ctx.shared_generator("grid").integers(len(self.cfg.grids))]

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        images, targets = self.mix(batch["image"], batch["label"], ctx)
        logits = self.logits_at(images, self.draw_grid(ctx))
        return StepOutput({"class": soft_target_cross_entropy(logits, targets)})

    def exports(self) -> tuple[Capability, ...]:
        beside = Gathering(self.encoder, self.plain_encoder, self.few.token_counts())
        found = (Logits(self), LookupFeatures(self), beside)
        return found if len(self.cfg.grids) == 1 else (*found, GridBudgets(self))


class LookupFeatures(ImageFeatures):
    """One vector of the compressed stream, the grid of the lookup stream."""

    def __init__(self, method: LookupVit) -> None:
        self.method = method

    def image_features(self, images: Tensor) -> Tensor:
        return self.method.encoder(images).tokens.mean(dim=1)

    def patch_features(self, images: Tensor) -> Tensor:
        backbone = self.method.backbone
        lookup = backbone.forward_streams(self.method.encoder.normalise(images))[1]
        return backbone.as_maps(lookup)


class GridBudgets(Budgets):
    """The model at each grid that it was trained at."""

    def __init__(self, method: LookupVit) -> None:
        self.method = method
        self.image_size = method.encoder.spec.image_size

    def budgets(self) -> dict[str, Callable[[Tensor], Tensor]]:
        sides: Sequence[int] = sorted(self.method.cfg.grids)
        return {f"{s}x{s}": partial(self.method.logits_at, side=s) for s in sides}


METHOD = LookupVit
