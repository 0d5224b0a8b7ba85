"""Expedit: Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning
(Liang et al., NeurIPS 2022).

After the first alpha layers of a trained ViT its grid of patch tokens is clustered into a coarser
grid of centroids, by rounds of soft k-means in which a patch may join only the clusters around its
own cell. The other layers run on the centroids. For dense tasks each patch then takes a weighted
mean of what became of its nearest clusters. No parameters and no training: `train.steps=0`.

B batch, P patches on a grid of H rows and W columns, M clusters on h rows and w columns, D width.
Departures: the reconstruction's weights are divided by their sum; the reference divides by their
L2 norm, which makes features up to sqrt(neighbours) times larger (`recovery: l2`; the reference's
exponentials underflow at an inverse temperature of 1, and an epsilon then shrinks the rows of far
patches: there it is not reproduced). A class token
passes by and decides, as in Expedit-SWAG, whose models all have one; a model that pools patches
counts each centroid as many times as it has patches. alpha is the number of layers at full size,
which the paper's figures fit; the example commands of two of its repositories run one more.
Training, where there is any, is that of the plain model: the centroids come at evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vlx.blocks.vit_block import LayerTokens, TokenReducer
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderSpec
from vlx.families.configs.classifier import ClassifierConfig
from vlx.families.token_reduction import ReducedClassifier
from vlx.ops.mixing import soft_target_cross_entropy
from vlx.ops.precision import without_autocast
from vlx.ops.soft_clusters import (
    ClusteredState,
    enlarge,
    hard_copy,
    minus_distances,
    soft_copy,
    windows,
)
from vlx.ops.token_state import TokenState

PAPER = Paper(
    number=82,
    slug="expedite",
    title="Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
    year=2022,
    venue="NeurIPS",
    url="https://arxiv.org/abs/2210.01035",
    family="token reduction",
    commands=("prune-tokens", "finetune"),
    modalities=("image",),
    trainable_params=305_174_504,
    gmacs=274.43,
    sweep=("method.alpha=2,4,6",),
)

_MEDIAN_SHARE = 16.0
"""With `inverse_temperature: null`, a cluster at the median distance weighs exp(-16) times the
weight of one at distance 0. Ours."""


class Recovery(Enum):
    """How dense features come back from the clusters."""

    soft = "soft"
    l2 = "l2"
    hard = "hard"
    bilinear = "bilinear"
    none = "none"


@dataclass(kw_only=True)
class ExpediteConfig(ClassifierConfig):
    alpha: int = 10
    """Layers at full size, before the clustering. Official config for ADE20K: 10 of 24."""
    clusters: list[int] = field(default_factory=lambda: [28, 28])
    """Rows and columns of the grid of clusters. Official config for ADE20K, 40x40 patches: 28, 28.
    """
    iterations: int = 5
    """Rounds of soft k-means; 0 is average pooling. Official code: 5."""
    window: int = 5
    """Side, odd, of the square of clusters that a patch may join, its own in the middle. Official
    code: 5."""
    inverse_temperature: float | None = 0.02
    """Multiplies squared distances, so it depends on the scale of features. Segmenter's ViT-L:
    0.02; SWAG's and DPT's command lines: 1.0. null: 16 over the image's own median distance between
    a patch and the clusters of its window, ours."""
    neighbours: int = 20
    """Clusters that a patch is rebuilt from. Official code: 20."""
    recovery: Recovery = Recovery.soft
    """soft: mean over the neighbours; l2: their sum with weights of unit L2 norm, the official
    code's; hard: copy of the nearest; bilinear: enlarged; none: no dense features, as SWAG."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if len(self.clusters) != 2 or min(self.clusters) < 1:
            raise ConfigError(
                f"method.clusters={self.clusters} must be two counts of 1 or more, [rows,columns]"
            )
        if self.window < 1 or self.window % 2 == 0:
            raise ConfigError(f"method.window={self.window} must be odd: 1, 3, 5, ...")
        for name, least in (("alpha", 1), ("iterations", 0), ("neighbours", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"method.{name}={getattr(self, name)} must be {least} or more")
        if self.inverse_temperature is not None and not self.inverse_temperature > 0:
            raise ConfigError(
                f"method.inverse_temperature={self.inverse_temperature} must be above 0, or null"
            )


class Clustering(TokenReducer):
    """Soft k-means after `alpha` of `depth` layers; all of them is the plain model."""

    outside: Tensor

    def __init__(self, grid: tuple[int, int], depth: int, cfg: ExpediteConfig) -> None:
        super().__init__()
        self.grid, self.depth, self.alpha = grid, depth, cfg.alpha
        self.clusters = cfg.clusters[0], cfg.clusters[1]
        self.iterations, self.inverse_temperature = cfg.iterations, cfg.inverse_temperature
        self.recover = _recoveries(grid, self.clusters, cfg.neighbours)[cfg.recovery]
        outside = ~windows(grid, self.clusters, cfg.window)
        self.register_buffer("outside", outside, persistent=False)

    def after_block(self, state: TokenState, layer: int) -> TokenState:
        if layer + 1 != self.alpha or self.alpha == self.depth:
            return state
        prefix, x = state.num_prefix, state.x
        with without_autocast(x):
            centroids, affinity, size = self.cluster(x[:, prefix:].float())
        ones = size.new_ones(len(size), prefix)
        return ClusteredState(
            x=torch.cat([x[:, :prefix], centroids.to(x.dtype)], 1),
            num_prefix=prefix,
            owner=affinity.argmax(-1) + prefix,  # the nearest, whatever the window
            size=torch.cat([ones, size], 1),
            affinity=affinity,
        )

    def cluster(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """patches: (B, P, D) float32. Returns centroids (B, M, D), the affinity (B, P, M) with
        them, and how many patches each stands for (B, M), which sum to P."""
        batch, count, _ = patches.shape
        on_grid = patches.transpose(1, 2).unflatten(2, self.grid)  # (B, D, H, W)
        centroids = adaptive_avg_pool2d(on_grid, self.clusters).flatten(2).transpose(1, 2)
        size = patches.new_full((batch, centroids.shape[1]), count / centroids.shape[1])
        closeness = minus_distances(patches, centroids)
        scale = self._scale(patches, closeness)
        for _ in range(self.iterations):
            logits = (scale * closeness).masked_fill(self.outside, -torch.inf)
            shares = logits.softmax(-1).detach()  # (B, P, M), each patch's sum to 1
            size = shares.sum(1)
            centroids = shares.transpose(1, 2) @ patches / size.clamp(min=1e-16).unsqueeze(-1)
            closeness = minus_distances(patches, centroids)
        return centroids, scale * closeness, size

    def _scale(self, patches: Tensor, closeness: Tensor) -> Tensor | float:
        """The inverse temperature, of each image (B, 1, 1) where it follows the distances."""
        if self.inverse_temperature is not None:
            return self.inverse_temperature
        squares = patches.square().sum(-1, keepdim=True)
        distances = (squares - closeness).clamp(min=0)
        inside = distances.masked_fill(self.outside, torch.nan)
        median = inside.flatten(1).nanmedian(1).values.view(-1, 1, 1)
        return _MEDIAN_SHARE / median.clamp(min=1e-12)

    def plan(self, num_patches: int, num_prefix: int, depth: int) -> list[LayerTokens]:
        if self.alpha > depth:
            raise ConfigError(
                f"method.alpha={self.alpha}: the encoder has {depth} layers, and {depth} is the "
                "plain model"
            )
        rows, columns = self.grid
        if num_patches != rows * columns:
            raise ConfigError(
                f"expedite clusters a whole grid of {rows}x{columns} patches; {num_patches} came"
            )
        full = num_patches + num_prefix
        few = self.clusters[0] * self.clusters[1] + num_prefix
        return [LayerTokens(full, full)] * self.alpha + [LayerTokens(few, few)] * (
            depth - self.alpha
        )

    def expand(self, state: TokenState, values: Tensor) -> Tensor:
        if not isinstance(state, ClusteredState):  # alpha = depth: every patch is there
            return super().expand(state, values)
        with without_autocast(values):
            dense = self.recover(state, values[:, state.num_prefix :].float())
        return dense.to(values.dtype)


class Expedite(ReducedClassifier):
    Config = ExpediteConfig

    def build_reducer(self, spec: EncoderSpec) -> Clustering:
        return Clustering(spec.grid, spec.depth, self.cfg)

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        images, targets = self.mix(batch["image"], batch["label"], ctx)
        logits = self.encoder.classify(self.encoder(images))  # the plain model's
        return StepOutput({"class": soft_target_cross_entropy(logits, targets)})


def _refuse(state: ClusteredState, values: Tensor) -> Tensor:
    raise ConfigError(
        "method.recovery=none leaves no grid of patches, which a dense task needs: set "
        "method.recovery=soft"
    )


def _recoveries(
    grid: tuple[int, int], clusters: tuple[int, int], neighbours: int
) -> dict[Recovery, Callable[[ClusteredState, Tensor], Tensor]]:
    """What rebuilds a grid from the state and the clusters' values (B, M, E)."""
    return {
        Recovery.soft: partial(soft_copy, neighbours=neighbours, norm=1),
        Recovery.l2: partial(soft_copy, neighbours=neighbours, norm=2),
        Recovery.hard: hard_copy,
        Recovery.bilinear: lambda _, values: enlarge(values, clusters, grid),
        Recovery.none: _refuse,
    }


METHOD = Expedite
