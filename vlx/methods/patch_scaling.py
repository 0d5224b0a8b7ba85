"""Patch scaling: Scaling Laws in Patchification (Wang et al., ICML 2025), and its Adventurer.

Nothing new in the network: the side of a patch is what varies. An image of a fixed size is cut into
patches of 16, 8, 4, 2 and 1 pixels, the same model is trained from scratch on each, and the loss on
the test set falls all the way down to a token for every pixel.

Two arms. A plain ViT (`encoder=deit_base`), whose attention grows with p^-4. And Adventurer (Wang
et al., 2024), a causal model of linear cost: each block scans the sequence [mean of all tokens,
patches, class token] with a Mamba-2 mixer, the patches reversed in half of the blocks, then a
SwiGLU.

B batch, N patches, D width, H heads, p side of a patch.
`vlx finetune patch-scaling --sweep` trains each patch size. Models: `adventurer_tiny_patch16`,
`_small_`, `_base_`, `_large_`, and `..._patch1`; others by `encoder.patch_size`.
Departures: the scan is written in torch, in chunks of 64, where the release calls a kernel with
chunks of 256. Blocks that reverse: every other pair, as the text says; the release's code reverses
in the third and fourth block alone, which is `flips=once`, also for its weights. Between blocks the
class token lies first, in the position table too, so that a table is resampled without its row; the
release keeps it last and resamples as if it were first. The release's moving average is never
evaluated and is left out. Colours are jittered in a fixed order, where torchvision shuffles it.
Segmentation and detection are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import SwiGLU
from timm.layers.weight_init import lecun_normal_
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.core.errors import ConfigError
from vlx.core.fields import LABEL, Needs, ViewSpec
from vlx.core.method import Builder
from vlx.core.paper import Paper
from vlx.core.released import renamed
from vlx.families.backbone import BackboneClassifier
from vlx.families.classifier import training_view
from vlx.families.configs.classifier import ClassifierConfig
from vlx.ops.augment import ColorJitter, GaussianBlur, Grayscale, OneOf, Solarize
from vlx.ops.precision import without_autocast
from vlx.ops.selective_scan import scan_all, scan_chunks, scan_tokens

PAPER = Paper(
    number=45,
    slug="patch-scaling",
    title="Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More",
    year=2025,
    venue="ICML",
    url="https://arxiv.org/abs/2502.03738",
    family="backbone",
    commands=("finetune",),
    modalities=("image",),
    trainable_params=110_502_472,
    backbones=(
        "adventurer_tiny_patch16",
        "adventurer_small_patch16",
        "adventurer_base_patch16",
        "adventurer_large_patch16",
        "adventurer_tiny_patch1",
        "adventurer_small_patch1",
        "adventurer_base_patch1",
        "adventurer_large_patch1",
    ),
    sweep=("encoder.patch_size=16,8,4,2,1",),
)

EPS = 1e-5
HEAD_DIM = 64
STATE_DIM = 64
KERNEL = 4


class Flips(Enum):
    """Which of Adventurer's blocks scan the patches in reversed order."""

    alternate = "alternate"
    once = "once"
    none = "none"


class Scan(Enum):
    """How Adventurer's scan is computed; the result is the same."""

    chunks = "chunks"
    all = "all"
    tokens = "tokens"


@dataclass(kw_only=True)
class PatchScalingConfig(ClassifierConfig):
    rand_augment: float | None = None
    """Magnitude of RandAugment (two operations, deviation 0.5, increasing); null for none. Readme:
    9 in the last stage alone."""
    erasing: float = 0.0
    """Probability that a random box is erased. Readme: 0."""
    smoothing: float = 0.0
    """Label smoothing, 0..1. Readme: 0; 0.1 in the last stage."""
    three_augment: bool = True
    """3-Augment: one of grey, solarised and blurred for every image, then a colour jitter of 0.3.
    Readme: all stages but the last."""
    flips: Flips = Flips.alternate
    """Adventurer: alternate (blocks 3, 4, 7, 8, ...: the paper's text), once (blocks 3 and 4: the
    release's code), or none."""
    heading_average: bool = True
    """Adventurer: the mean of all tokens in front of the sequence, so that the first patches see
    the image too. Paper: true."""
    scan: Scan = Scan.chunks
    """Adventurer: chunks; all (every token at every other, N^2); tokens (one after the other)."""
    chunk_size: int = 64
    """chunks: tokens of a chunk. Release: 256; without its kernel 64 takes 0.6 of the time (2,500
    tokens of 8 heads on one CPU thread) and rounds less."""
    recompute: bool = False
    """Keep of each block its input alone and compute the rest again for the gradient: less memory,
    a second forward pass."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if self.chunk_size < 1:
            raise ConfigError(f"method.chunk_size={self.chunk_size} must be at least 1")


class Mamba2(nn.Module):
    """The mixer of Mamba-2 (Dao and Gu, 2024) with one group, under its official names."""

    def __init__(self, dim: int, scan: Callable[..., Tensor]) -> None:
        super().__init__()
        inner = 2 * dim
        if inner % HEAD_DIM:
            raise ConfigError(f"encoder.dim={dim} must be a multiple of {HEAD_DIM // 2}")
        heads, mixed = inner // HEAD_DIM, inner + 2 * STATE_DIM
        self.scan, self.sizes = scan, (inner, mixed, heads)
        self.in_proj = nn.Linear(dim, inner + mixed + heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, KERNEL, padding=KERNEL - 1, groups=mixed)
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus gives `step`
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, EPS)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D); a token sees itself and those before it."""
        gate, mixed, dt = self.in_proj(tokens).split(self.sizes, dim=-1)
        mixed = self.conv1d(mixed.transpose(1, 2))[..., : tokens.shape[1]].transpose(1, 2)
        with without_autocast(tokens):
            y = self.advance(gate, silu(mixed), dt)
        return self.out_proj(y.to(tokens.dtype))

    def advance(self, gate: Tensor, mixed: Tensor, dt: Tensor) -> Tensor:
        """The scan, the skip and the gated norm, in float32 at least. Returns (B, N, 2 D)."""
        exact = torch.promote_types(gate.dtype, torch.float32)
        gate, mixed, dt = (part.to(exact) for part in (gate, mixed, dt))
        x, write, read = mixed.split((self.sizes[0], STATE_DIM, STATE_DIM), dim=-1)
        x = x.unflatten(2, (-1, HEAD_DIM))  # (B, N, H, 64)
        y = self.scan(x, softplus(dt + self.dt_bias), -self.A_log.exp(), write, read)
        y = y + self.D[:, None] * x
        return self.norm(y.flatten(2) * silu(gate))


class AdventurerBlock(nn.Module):
    """A scan over [mean, patches, class token] and a SwiGLU, each on normed tokens and added."""

    def __init__(
        self, dim: int, mixer: nn.Module, *, flip: bool, average: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.flip, self.average = flip, average
        self.norm = nn.RMSNorm(dim, EPS)
        self.mixer = mixer
        self.norm_mlp = nn.RMSNorm(dim, EPS)
        self.mlp = SwiGLU(dim, int(2.5 * dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 1 + N, D), the class token first."""
        x = x + self.drop_path(self.scanned(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm_mlp(x)))

    def scanned(self, x: Tensor) -> Tensor:
        """The mixer's output (B, 1 + N, D), in the order of its input."""
        patches = x[:, 1:].flip(1) if self.flip else x[:, 1:]
        heading = [x.mean(dim=1, keepdim=True)] if self.average else []
        out = self.mixer(torch.cat([*heading, patches, x[:, :1]], dim=1))[:, len(heading) :]
        patches = out[:, :-1].flip(1) if self.flip else out[:, :-1]
        return torch.cat([out[:, -1:], patches], dim=1)


def flips_at(flips: Flips, number: int) -> bool:
    """Whether block `number`, from 0, reverses the patches."""
    pair = number // 2
    return {Flips.alternate: pair % 2 == 1, Flips.once: pair == 1, Flips.none: False}[flips]


_OFFICIAL_NAMES = (
    (r"^layers\.", "blocks."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^norm_f\.", "norm."),
)


class Adventurer(VisionTransformer):
    """The backbone: timm's ViT with other blocks and norms."""

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        depth: int = 12,
        drop_path_rate: float = 0.0,
        flips: Flips = Flips.alternate,
        heading_average: bool = True,
        scan: Scan = Scan.chunks,
        chunk_size: int = 64,
        **arguments: Any,
    ) -> None:
        if img_size % patch_size:
            raise ConfigError(
                f"encoder.image_size={img_size} is no multiple of encoder.patch_size={patch_size}"
            )
        how = {
            Scan.chunks: partial(scan_chunks, size=chunk_size),
            Scan.all: scan_all,
            Scan.tokens: scan_tokens,
        }[scan]
        # The release shifts the rates by a block: the first two have none.
        rates = [0.0, *torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()]

        def block(*, dim: int, depth: int, **_: Any) -> AdventurerBlock:
            return AdventurerBlock(
                dim,
                Mamba2(dim, how),
                flip=flips_at(flips, depth),
                average=heading_average,
                drop_path=rates[depth],
            )

        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            depth=depth,
            norm_layer=partial(nn.RMSNorm, eps=EPS),
            block_fn=block,  # type: ignore[arg-type]
            weight_init="skip",
            **arguments,
        )
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """The release's initialisation; what is not named here starts as PyTorch's layers do."""
        for part in self.modules():
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
            elif isinstance(part, Mamba2):
                part.out_proj.weight /= math.sqrt(len(self.blocks))
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        assert self.cls_token is not None
        assert self.pos_embed is not None
        heads = [self.head.weight] if isinstance(self.head, nn.Linear) else []
        for weight in (self.cls_token, self.pos_embed, *heads):
            nn.init.trunc_normal_(weight, std=0.02)

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The release's tensors; its position table ends with the class token's row."""
        released = any("layers.0." in name for name in state)
        found = renamed(state, _OFFICIAL_NAMES)
        if released and "pos_embed" in found:
            found["pos_embed"] = found["pos_embed"].roll(1, dims=1)
        return found


default_cfgs = cfgs_of(PAPER.backbones, first_conv="patch_embed.proj")


def _create(name: str, pretrained: bool, given: dict[str, Any], dim: int, depth: int) -> Adventurer:
    patch = int(name.rsplit("patch", 1)[1])
    arguments = {"patch_size": patch, "embed_dim": dim, "depth": depth, **given}
    return build_model(Adventurer, name, pretrained, features=3, **arguments)


@register_model
def adventurer_tiny_patch16(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-T/16: 11.6 M parameters."""
    return _create("adventurer_tiny_patch16", pretrained, kwargs, 256, 12)


@register_model
def adventurer_small_patch16(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-S/16: 44.5 M parameters."""
    return _create("adventurer_small_patch16", pretrained, kwargs, 512, 12)


@register_model
def adventurer_base_patch16(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-B/16: 98.7 M parameters."""
    return _create("adventurer_base_patch16", pretrained, kwargs, 768, 12)


@register_model
def adventurer_large_patch16(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-L/16: 346.2 M parameters."""
    return _create("adventurer_large_patch16", pretrained, kwargs, 1024, 24)


@register_model
def adventurer_tiny_patch1(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-T/1: 24.2 M parameters at 224 pixels."""
    return _create("adventurer_tiny_patch1", pretrained, kwargs, 256, 12)


@register_model
def adventurer_small_patch1(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-S/1: 69.7 M parameters at 224 pixels."""
    return _create("adventurer_small_patch1", pretrained, kwargs, 512, 12)


@register_model
def adventurer_base_patch1(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-B/1: 136.5 M parameters at 224 pixels."""
    return _create("adventurer_base_patch1", pretrained, kwargs, 768, 12)


@register_model
def adventurer_large_patch1(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-L/1: 396.6 M parameters at 224 pixels."""
    return _create("adventurer_large_patch1", pretrained, kwargs, 1024, 24)


_OF_ADVENTURER = ("flips", "heading_average", "scan", "chunk_size")


class PatchScaling(BackboneClassifier):
    Config = PatchScalingConfig
    Backbone = VisionTransformer
    models = ("plain ViTs", *PAPER.backbones)

    def __init__(self, cfg: PatchScalingConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        backbone = self.encoder.backbone
        assert isinstance(backbone, VisionTransformer)
        backbone.set_grad_checkpointing(cfg.recompute)
        if isinstance(backbone, Adventurer):
            return
        default = PatchScalingConfig()
        for name in _OF_ADVENTURER:
            if getattr(cfg, name) != getattr(default, name):
                raise ConfigError(f"method.{name} is of Adventurer's; encoder.name is a plain ViT")

    @classmethod
    def encoder_arguments(cls, cfg: PatchScalingConfig) -> Mapping[str, Any]:
        return {name: getattr(cfg, name) for name in _OF_ADVENTURER}

    @classmethod
    def needs(cls, cfg: PatchScalingConfig) -> Needs:
        ops = training_view(cfg)
        if cfg.three_augment:
            # After crop and flip. Erasing would come last; no stage of the paper has it.
            choice = OneOf((Grayscale(1.0), Solarize(1.0), GaussianBlur(p=1.0)))
            ops = (*ops[:2], choice, ColorJitter(0.3, 0.3, 0.3), *ops[2:])
        return Needs(views=(ViewSpec("image", ops=ops),), fields=(LABEL,))


METHOD = PatchScaling
