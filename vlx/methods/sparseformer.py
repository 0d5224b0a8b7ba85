"""SparseFormer bootstrapping: from Vision Foundation Models (Gao et al., CVPR 2024).

An image is a few latent tokens, each with a box that it moves. A light transformer, run four times
with the same weights, reads a shallow map at points inside each box, mixes them into the token and
moves the box; the rest is an ordinary transformer over the few tokens, taken from a trained ViT:
its first third left out, the middle third trained, the last third, the final norm and the head
frozen. The only loss is that the class token ends where the ViT's does, on images without labels.

B batch, T latent tokens, P points of a box, C channels of the map, d width of the focusing
transformer, D width of the ViT.
`encoder` is the ViT that is bootstrapped, with its weights: `encoder.checkpoint=RUN`, or
`encoder.pretrained=true`. It is the teacher too, and both see the same crop.
The bootstrapping loop was not released. Choices where nothing was found: the loss is on the class
token after the final norm, so that the ViT's own head serves both; length and rates. As
in the released models the norms' epsilon is 1e-5, also in blocks of a ViT with another.
Sparseformers of the first paper, trained from scratch, are left out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, gelu, layer_norm

from vlx.blocks.frozen import Frozen
from vlx.blocks.init import trunc_normal_init
from vlx.core.capability import Capability, ImageFeatures, ReducedTokens
from vlx.core.config import MethodConfig
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch, Needs, ViewSpec
from vlx.core.method import Builder, ParamGroup, Trainable
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import VisionEncoder
from vlx.families.classifier import Logits
from vlx.ops.augment import HorizontalFlip, RandomResizedCrop
from vlx.ops.precision import without_autocast
from vlx.ops.regions import (
    encode_boxes,
    grid_boxes,
    moved_boxes,
    points_in_boxes,
    sample_points,
)
from vlx.ops.resample import resize

PAPER = Paper(
    number=32,
    slug="sparseformer",
    title="Bootstrapping SparseFormers from Vision Foundation Models",
    year=2024,
    venue="CVPR",
    url="https://arxiv.org/abs/2312.01987",
    family="token reduction",
    commands=("prune-tokens", "align"),
    modalities=("image",),
    trainable_params=35_063_424,
    sweep=("method.num_tokens=16,25,36,49",),
)

EPS = 1e-5


@dataclass(kw_only=True)
class SparseformerConfig(MethodConfig):
    num_tokens: int = 49
    """Tokens of the transformer, the class token included. Paper: 49; 64 for CLIP-L."""
    focus_dim: int | None = None
    """d: width of the focusing transformer; null takes half of the ViT's. Paper: half."""
    focus_heads: int | None = None
    """Its attention heads; null takes one for every 64 channels. Released code: that."""
    focus_repeats: int = 4
    """Times that it runs with the same weights. Paper: 4."""
    points: int = 16
    """P: points of a box, a square number. Released configs: 16."""
    map_channels: int = 64
    """C: channels of the shallow map. Released configs: 64."""
    mixing_points: int = 32
    """Points that the mixing of P points gives. Released code: 32."""
    mixing_dim: int = 128
    """Width of the layer that makes the mixing matrices. Released configs: 128."""
    student_size: int | None = None
    """Side of the images that the tokens are read from; null takes the ViT's. Paper: 224, also
    beside a ViT at 384."""
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Area of the random resized crop, low and high, 0..1. Ours: 0.2, 1."""
    flip: float = 0.5
    """Probability of a horizontal flip. Ours: 0.5."""

    def __post_init__(self) -> None:
        if self.num_tokens < 2:
            raise ConfigError(f"method.num_tokens={self.num_tokens} must be 2 or more")
        if self.points < 4 or round(self.points**0.5) ** 2 != self.points:
            raise ConfigError(f"method.points={self.points} must be a square number: 4, 9, 16, ...")
        for name in ("focus_repeats", "map_channels", "mixing_points", "mixing_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name}={getattr(self, name)} must be 1 or more")
        if not 0.0 <= self.flip <= 1.0:
            raise ConfigError(f"method.flip={self.flip} must lie in 0..1")


def _quiet_norm(dim: int) -> nn.LayerNorm:
    """A norm whose output starts with the length of one."""
    norm = nn.LayerNorm(dim, EPS)
    nn.init.constant_(norm.weight, dim**-0.5)
    return norm


class EarlyConvolution(nn.Module):
    """Images (B, 3, H, W) to a map (B, C, H/4, W/4), each place normed over its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 7, stride=2, padding=3)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.conv(images).relu()).permute(0, 2, 3, 1)
        return layer_norm(x.float(), x.shape[-1:], eps=EPS).permute(0, 3, 1, 2)


class SampleMix(nn.Module):
    """Points of every token's box, mixed by matrices that the token makes, added to the token."""

    def __init__(self, dim: int, cfg: SparseformerConfig) -> None:
        super().__init__()
        self.channels, self.points, self.out_points = (
            cfg.map_channels,
            cfg.points,
            cfg.mixing_points,
        )
        self.offsets = nn.Sequential(_quiet_norm(dim), nn.Linear(dim, 2 * cfg.points, bias=False))
        self.grid = nn.Parameter(torch.empty(2 * cfg.points))
        sizes = self.channels**2 + self.points * self.out_points
        self.matrices = nn.Sequential(
            _quiet_norm(dim), nn.Linear(dim, cfg.mixing_dim), nn.Linear(cfg.mixing_dim, sizes)
        )
        self.out = nn.Linear(self.channels * self.out_points, dim)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """All tokens alike at first: a square grid of points, mixed by one pair of matrices."""
        for linear in (*self.matrices[1:], self.out):
            nn.init.trunc_normal_(linear.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
        last = self.matrices[2]
        assert isinstance(last, nn.Linear)
        for weights in (self.offsets[1].weight, last.weight):
            nn.init.zeros_(weights)  # type: ignore[arg-type]
        by_channel, by_point = last.bias.split([self.channels**2, self.points * self.out_points])
        nn.init.xavier_uniform_(by_channel.view(self.channels, self.channels))
        nn.init.xavier_uniform_(by_point.view(self.points, self.out_points))
        root = round(self.points**0.5)
        step = (torch.arange(root) + 0.5) / root - 0.5
        rows, columns = torch.meshgrid(step, step, indexing="ij")
        self.grid.copy_(torch.stack([columns, rows], dim=-1).flatten())

    def forward(self, tokens: Tensor, boxes: Tensor, features: Tensor) -> Tensor:
        """tokens: (B, T, d); boxes: (B, T, 4) float32; features: (B, C, h, w) float32."""
        with without_autocast(tokens):
            offsets = (self.offsets(tokens.float()) + self.grid).unflatten(-1, (self.points, 2))
            samples = sample_points(features, points_in_boxes(boxes, offsets))  # (B, T, P, C)
        matrices = self.matrices(tokens)
        by_channel, by_point = matrices.split(
            [self.channels**2, self.points * self.out_points], dim=-1
        )
        by_channel = by_channel.unflatten(-1, (self.channels, self.channels))
        by_point = by_point.unflatten(-1, (self.out_points, self.points))
        mixed = gelu(samples.to(by_channel.dtype) @ by_channel)  # (B, T, P, C)
        mixed = gelu(by_point @ mixed)  # (B, T, out_points, C)
        return tokens + self.out(mixed.flatten(2))


class BoxPosition(nn.Module):
    """Where a token's box is, added to the token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(dim, EPS), nn.Linear(dim, dim)
        trunc_normal_init(self)

    def forward(self, tokens: Tensor, boxes: Tensor) -> Tensor:
        places = encode_boxes(boxes, tokens.shape[-1])
        return tokens + self.linear(self.norm(places))


class Focus(nn.Module):
    """The focusing transformer: sample and mix, position, attention and MLP, move the box."""

    def __init__(self, dim: int, heads: int, cfg: SparseformerConfig) -> None:
        super().__init__()
        self.repeats = cfg.focus_repeats
        self.stages = nn.Parameter(torch.randn(cfg.focus_repeats, dim))
        self.mix, self.position = SampleMix(dim, cfg), BoxPosition(dim)
        norm = partial(nn.LayerNorm, eps=EPS)
        self.block = Block(dim, heads, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]
        trunc_normal_init(self.block)
        self.adjust_norm = _quiet_norm(dim)
        self.adjust = Mlp(dim, dim, 4, bias=(True, False))
        trunc_normal_init(self.adjust)
        nn.init.zeros_(self.adjust.fc2.weight)

    def forward(self, tokens: Tensor, boxes: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """As `SampleMix`; returns the tokens and their boxes."""
        for stage in self.stages:
            tokens = self.mix(tokens + stage, boxes, features)
            tokens = self.block(self.position(tokens, boxes))
            with without_autocast(tokens):
                change = self.adjust(self.adjust_norm(tokens.float()))
                boxes = moved_boxes(boxes, change)
        return tokens, boxes


class SparseFormer(nn.Module):
    """T latent tokens of an image; `blocks` is what was taken from a ViT."""

    def __init__(self, vit: nn.Module, dim: int, cfg: SparseformerConfig) -> None:
        super().__init__()
        width = cfg.focus_dim or dim // 2
        heads = cfg.focus_heads or max(1, width // 64)
        self.early = EarlyConvolution(cfg.map_channels)
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, width)))
        self.boxes = nn.Parameter(grid_boxes(cfg.num_tokens - 1))
        self.focus = Focus(width, heads, cfg)
        self.widen = nn.Linear(width, dim)
        trunc_normal_init(self.widen)
        self.mix, self.position = SampleMix(dim, cfg), BoxPosition(dim)
        self.class_token = nn.Parameter(torch.randn(1, dim))
        taken = list(vit.blocks)[len(vit.blocks) // 3 :]  # type: ignore[arg-type, call-overload]
        self.blocks = nn.ModuleList(copy.deepcopy(taken))
        self.norm = copy.deepcopy(vit.norm)
        for part in (*self.blocks.modules(), self.norm):
            if isinstance(part, nn.LayerNorm):
                part.eps = EPS
        frozen = len(vit.blocks) // 3  # type: ignore[arg-type]
        self.tuned = len(self.blocks) - frozen
        for part in (*self.blocks[self.tuned :], self.norm):
            part.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), normalised. Returns (B, T, D) after the final norm, the class token
        first."""
        features = self.early(images)
        # Copies, not views of parameters: torch's flop counter takes none as a module's input.
        boxes = self.boxes.repeat(len(images), 1, 1)
        tokens = self.token.repeat(len(images), len(self.boxes), 1)
        tokens, boxes = self.focus(tokens, boxes, features)
        tokens = self.mix(self.widen(tokens), boxes, features)
        tokens = self.position(tokens, boxes)
        first = self.class_token.expand(len(images), 1, -1)
        tokens = torch.cat([first.to(tokens.dtype), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)  # type: ignore[operator]


class Sparseformer(Trainable):
    Config = SparseformerConfig

    def __init__(self, cfg: SparseformerConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        classes = build.num_classes if build.num_classes > 1 else 0
        vit: VisionEncoder = build.vision(num_classes=classes, frozen=True)
        vit.check_hooks()  # a plain ViT: its blocks run on any number of tokens
        if vit.spec.num_prefix == 0:
            raise ConfigError(
                "sparseformer ends where the ViT's class token does, and this one has none: use "
                "e.g. encoder=vit_base"
            )
        if vit.spec.depth < 3:
            raise ConfigError(
                f"sparseformer takes the last two of a ViT's three thirds: {vit.spec.depth} blocks "
                "are too few"
            )
        self.has_head = classes > 0
        self.student = SparseFormer(vit.backbone, vit.spec.dim, cfg)
        self.teacher = Frozen(vit)
        self.size = cfg.student_size or vit.spec.image_size

    @classmethod
    def needs(cls, cfg: SparseformerConfig) -> Needs:
        crop = RandomResizedCrop(scale=(cfg.crop_scale[0], cfg.crop_scale[1]))
        return Needs(views=(ViewSpec("image", ops=(crop, HorizontalFlip(cfg.flip))),))

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, T, D), the class token first."""
        return self.student(resize(self.teacher.module.normalise(images), self.size))

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """The ViT's class token after its final norm, (B, D)."""
        return self.teacher.module(images).prefix[:, 0]

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        images = batch["image"]
        student, teacher = self.encode(images)[:, 0], self.teach(images)
        likeness = cosine_similarity(student.float(), teacher.float()).mean()
        return StepOutput({"align": 1 - likeness})

    def frozen_parts(self) -> tuple[str, ...]:
        return ("student",)  # the last third of its blocks, and the norm

    def class_logits(self, images: Tensor) -> Tensor:
        """(B, C), by the ViT's own head."""
        return self.teacher.module.backbone.head(self.encode(images)[:, 0])  # type: ignore[operator]

    def param_groups(self) -> list[ParamGroup]:
        """The boxes are not decayed, as in the released code."""
        decay, no_decay = super().param_groups()
        boxes = "student.boxes"
        no_decay.params += [(name, param) for name, param in decay.params if name == boxes]
        decay.params = [(name, param) for name, param in decay.params if name != boxes]
        return [decay, no_decay]

    def exports(self) -> tuple[Capability, ...]:
        features = TokenFeatures(self)
        return (Logits(self), features, BesideTeacher(self)) if self.has_head else (features,)


class TokenFeatures(ImageFeatures):
    """The class token; the other tokens in one row, since they lie on no grid."""

    def __init__(self, method: Sparseformer) -> None:
        self.method = method

    def image_features(self, images: Tensor) -> Tensor:
        return self.method.encode(images)[:, 0]

    def patch_features(self, images: Tensor) -> Tensor:
        return self.method.encode(images)[:, 1:].transpose(1, 2).unsqueeze(2)  # (B, D, 1, T - 1)


class BesideTeacher(ReducedTokens):
    """The few tokens beside the ViT that they come from, under one head."""

    trained_plain = True

    def __init__(self, method: Sparseformer) -> None:
        self.method = method
        self.image_size = method.teacher.module.spec.image_size

    def reduced(self, images: Tensor) -> Tensor:
        return self.method.class_logits(images)

    def plain(self, images: Tensor) -> Tensor:
        teacher = self.method.teacher.module
        return teacher.backbone.head(self.method.teach(images))  # type: ignore[operator]

    def token_counts(self) -> dict[str, list[int]]:
        cfg, depth = self.method.cfg, len(self.method.student.blocks)
        counts = [cfg.num_tokens - 1] * cfg.focus_repeats + [cfg.num_tokens] * depth
        return {"attention": counts, "mlp": counts}

    def groups(self, images: Tensor) -> list[tuple[str, Tensor]]:
        return []


METHOD = Sparseformer
