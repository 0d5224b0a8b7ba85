"""ViR: Vision Retention Networks (Hatamizadeh et al., arXiv 2023; later "Towards Efficient Vision
Retention Backbones").

A plain ViT whose attention is retention: every patch, in raster order, looks back at those before
it, with a weight that falls by a fixed factor of its head at every step and without a softmax. The
same weights run in parallel, in chunks, or token by token with a state of constant size. The class
token stands last, where it sees all patches.

B batch, N tokens, H heads, d width of a head, D = H * d, L tokens of a chunk.
Sources: the paper's text could not be read; the authors' anonymous release was. Decisions: the
release multiplies its logits by the decay and then takes a softmax, so that what is to come keeps a
weight and its parallel form is not its recurrent one: here there is no softmax, `form=softmax` is
that of the release. Its heads are not normalised; without a softmax they grow with N, so that a
LayerNorm over all heads of a token stands before the output projection (`norm`), as in an
unofficial re-implementation, whose GELU after it is `gelu`, off. Decayed products are taken in
float32. All three modes go through the same head, where the release's recurrent ones stop before.
Left out: the release's bidirectional mode, which is unfinished, and the later version's hybrid.
Crops are bicubic; the release draws bilinear or bicubic. Models: `vir_small_patch16_224`,
`vir_base_patch16_224`, `vir_large_patch16_224`, `vir_large_patch14_224`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models import register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.core.errors import ConfigError
from vlx.core.paper import Paper
from vlx.families.backbone import BackboneClassifier
from vlx.families.configs.classifier import ClassifierConfig
from vlx.ops.distance import line_distances
from vlx.ops.precision import without_autocast

PAPER = Paper(
    number=23,
    slug="vir",
    title="ViR: Vision Retention Networks",
    year=2023,
    venue="arXiv",
    url="https://arxiv.org/abs/2310.19731",
    family="backbone",
    commands=("finetune",),
    modalities=("image",),
    trainable_params=22_068_712,
    gmacs=4.599,
    backbones=(
        "vir_small_patch16_224",
        "vir_base_patch16_224",
        "vir_large_patch16_224",
        "vir_large_patch14_224",
    ),
)


class Form(Enum):
    """What becomes of the decayed logits."""

    retention = "retention"
    softmax = "softmax"


class Mode(Enum):
    """How a retention is computed; the result is the same."""

    parallel = "parallel"
    chunkwise = "chunkwise"
    recurrent = "recurrent"


class ClassPlace(Enum):
    """Where the class token stands."""

    last = "last"
    first = "first"


@dataclass(kw_only=True)
class VirConfig(ClassifierConfig):
    form: Form = Form.retention
    """retention: (q k^T times the decay) v. softmax: a softmax of the decayed logits, as the
    release trains; it is not causal, and has the parallel mode alone."""
    mode: Mode = Mode.parallel
    """parallel, chunkwise or recurrent (a token at a time). Training: parallel."""
    chunk_size: int = 16
    """chunkwise: tokens of a chunk. Release: 16."""
    norm: bool = True
    """LayerNorm over the heads of a token before the output projection. Ours, from an unofficial
    re-implementation; the release has none."""
    gelu: bool = False
    """GELU after that norm. The same re-implementation has it, the release does not."""
    class_place: ClassPlace = ClassPlace.last
    """last, as the release; first sees no patch at all, for comparison."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if self.chunk_size < 1:
            raise ConfigError(f"method.chunk_size={self.chunk_size} must be at least 1")
        if self.form is Form.softmax and self.mode is not Mode.parallel:
            raise ConfigError("method.form=softmax has no state to carry: use method.mode=parallel")


def head_decays(heads: int) -> Tensor:
    """(H,): 1 - exp of evenly spaced logarithms from 1/32 to 1/512."""
    return 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), heads))


def decay_mask(gamma: Tensor, count: int) -> Tensor:
    """(H, N, N): gamma^(n - m) where m <= n, else 0."""
    return (gamma[:, None, None] ** line_distances(count, gamma.device)).tril()


def retain(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """All tokens at once. q, k, v: (B, H, N, d); gamma: (H,). Returns (B, H, N, d)."""
    return (q @ k.transpose(-2, -1) * decay_mask(gamma, q.shape[2])) @ v


def softmax_of_decayed(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """The release's: a token that is to come has logit 0, which has a weight. Shapes as above."""
    return (q @ k.transpose(-2, -1) * decay_mask(gamma, q.shape[2])).softmax(-1) @ v


def retain_chunk(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk after those that `state (B, H, d, d)` has seen, and the state after it."""
    count = q.shape[2]
    place = torch.arange(1, count + 1, device=q.device, dtype=gamma.dtype)
    rate = gamma[:, None]
    past = (q @ state) * (rate**place)[..., None]
    weighed = k * (rate ** (count - place))[..., None]
    state = state * (gamma**count)[:, None, None] + weighed.transpose(-2, -1) @ v
    return retain(q, k, v, gamma) + past, state


def retain_token(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence S = gamma S + k^T v, o = q S, for N = 1. Shapes as above."""
    state = state * gamma[:, None, None] + k.transpose(-2, -1) * v
    return q @ state, state


Advance = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Retention(Attention):
    """Multi-head retention under the names of timm's attention."""

    gamma: Tensor

    def __init__(
        self, dim: int, heads: int, *, form: Form, norm: bool, gelu: bool, class_last: bool
    ) -> None:
        super().__init__(dim, heads, qkv_bias=True)
        self.class_last = class_last
        self.look_back = softmax_of_decayed if form is Form.softmax else retain
        self.out_norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        self.out_act = nn.GELU() if gelu else nn.Identity()
        self.register_buffer("gamma", head_decays(heads), persistent=False)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x: (B, N, D), all tokens, the class token first; the other arguments are timm's and must
        be left alone."""
        assert attn_mask is None
        assert not is_causal
        if self.class_last:
            x = x.roll(-1, dims=1)
        with without_autocast(x):
            out = self.look_back(*self.project(x), self.gamma)
        out = self.merge(out, x)
        return out.roll(1, dims=1) if self.class_last else out

    def advance(self, x: Tensor, state: Tensor, how: Advance) -> tuple[Tensor, Tensor]:
        """The next tokens (B, L, D) and the state (B, H, d, d) after them."""
        with without_autocast(x):
            out, state = how(*self.project(x), self.gamma, state)
        return self.merge(out, x), state

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, scaled, k and v, (B, H, N, d), in float32 at least: sums grow with N."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        exact = torch.promote_types(qkv.dtype, torch.float32)
        q, k, v = qkv.to(exact).permute(2, 0, 3, 1, 4)
        return q * self.scale, k, v

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        """(B, H, N, d) to (B, N, D)."""
        joined = self.out_norm(out.transpose(1, 2).flatten(2))
        return self.proj(self.out_act(joined).to(x.dtype))


class RetentionBlock(Block):
    """timm's block, whose attention is a `Retention`."""

    attn: Retention

    def advance(self, x: Tensor, state: Tensor, how: Advance) -> tuple[Tensor, Tensor]:
        """The next tokens (B, L, D) through the block, and its state."""
        out, state = self.attn.advance(self.norm1(x), state, how)
        x = x + self.drop_path1(self.ls1(out))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), state


class VisionRetention(VisionTransformer):
    """The backbone. Between blocks the class token is the first, as timm's functions expect; where
    it is to stand last it is moved inside of the retention."""

    def __init__(
        self,
        *,
        form: Form = Form.retention,
        mode: Mode = Mode.parallel,
        chunk_size: int = 16,
        norm: bool = True,
        gelu: bool = False,
        class_place: ClassPlace = ClassPlace.last,
        **arguments: Any,
    ) -> None:
        super().__init__(
            no_embed_class=True, init_values=1e-5, block_fn=RetentionBlock, **arguments
        )
        self.class_last = class_place is ClassPlace.last
        self.chunk = {Mode.parallel: None, Mode.chunkwise: chunk_size, Mode.recurrent: 1}[mode]
        self.how: Advance = retain_token if mode is Mode.recurrent else retain_chunk
        heads = int(arguments["num_heads"])
        for block in self.blocks:
            block.attn = Retention(
                self.embed_dim, heads, form=form, norm=norm, gelu=gelu, class_last=self.class_last
            )
            for part in (block.attn.qkv, block.attn.proj):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        assert self.pos_embed is not None
        nn.init.normal_(self.pos_embed, std=0.02)

    def states(self, x: Tensor) -> list[Tensor]:
        """What every block starts from: zeros (B, H, d, d)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        return [
            x.new_zeros(len(x), a.num_heads, a.head_dim, a.head_dim, dtype=exact)
            for a in self.modules()
            if isinstance(a, Retention)
        ]

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x: normalised images (B, 3, H, W). Returns (B, 1 + N, D), the class token first."""
        if self.chunk is None:
            return super().forward_features(x, attn_mask, is_causal)
        x = self._pos_embed(self.patch_embed(x))
        turn = 1 if self.class_last else 0
        return self.norm(self.in_chunks(x.roll(-turn, dims=1), self.chunk)).roll(turn, dims=1)

    def in_chunks(self, x: Tensor, size: int) -> Tensor:
        """x: (B, 1 + N, D) in the order in which it is seen. Each chunk goes through all blocks
        before the next: states are all that is kept of it."""
        states, done = self.states(x), []
        for part in x.split(size, dim=1):
            for number, block in enumerate(self.blocks):
                assert isinstance(block, RetentionBlock)
                part, states[number] = block.advance(part, states[number], self.how)
            done.append(part)
        return torch.cat(done, dim=1)


default_cfgs = cfgs_of(
    PAPER.backbones, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), first_conv="patch_embed.proj"
)


def _create(
    name: str, pretrained: bool, given: dict[str, Any], sizes: tuple[int, int, int, int]
) -> VisionRetention:
    names = ("patch_size", "embed_dim", "depth", "num_heads")
    arguments = {**dict(zip(names, sizes)), **given}
    return build_model(VisionRetention, name, pretrained, features=3, **arguments)


@register_model
def vir_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-S/16: 22.1 M parameters."""
    return _create("vir_small_patch16_224", pretrained, kwargs, (16, 384, 12, 6))


@register_model
def vir_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-B/16: 86.6 M parameters."""
    return _create("vir_base_patch16_224", pretrained, kwargs, (16, 768, 12, 12))


@register_model
def vir_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-L/16."""
    return _create("vir_large_patch16_224", pretrained, kwargs, (16, 1024, 24, 16))


@register_model
def vir_large_patch14_224(pretrained: bool = False, **kwargs: Any) -> VisionRetention:
    """ViR-L/14."""
    return _create("vir_large_patch14_224", pretrained, kwargs, (14, 1024, 24, 16))


class Vir(BackboneClassifier):
    Config = VirConfig
    Backbone = VisionRetention
    models = PAPER.backbones

    @classmethod
    def encoder_arguments(cls, cfg: VirConfig) -> Mapping[str, Any]:
        names = ("form", "mode", "chunk_size", "norm", "gelu", "class_place")
        return {name: getattr(cfg, name) for name in names}


METHOD = Vir
