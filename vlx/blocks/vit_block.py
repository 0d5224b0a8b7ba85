"""One place through which everything that acts inside a ViT acts: a hook into timm's blocks.

timm's own submodules are called, so weights, norms, layer scale and stochastic depth stay timm's;
a block with a part that is not known here raises `UnsupportedBlock`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import NamedTuple

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from vlx.core.errors import ConfigError, VlxError
from vlx.ops.token_state import TokenState, scatter_back

_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION_PARTS = {
    "qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop",
}  # fmt: skip


class UnsupportedBlock(ConfigError):  # noqa: N818 - it is the block that is unsupported
    """A model whose blocks the hook does not know."""


class Signal(Flag):
    """What a hook wants to see of a layer's attention; computed on the layers that ask."""

    NONE = 0
    CLS_ATTN = auto()
    """The class token's row of the attention map: one query's cost, the fused kernel stays."""
    KEYS = auto()
    """The keys, as attention uses them."""
    ATTN = auto()
    """The whole map: this layer then runs without the fused kernel."""


@dataclass(frozen=True)
class Signals:
    """What was asked for; H heads, d width of a head."""

    cls_attn: Tensor | None = None
    """(B, H, N), after the softmax."""
    keys: Tensor | None = None
    """(B, H, N, d)."""
    attn: Tensor | None = None
    """(B, H, N, N), after the softmax."""


class LayerTokens(NamedTuple):
    """Tokens, prefix included, that one block runs on."""

    attention: int
    mlp: int


class BlockHook:
    """What may act inside a run of ViT blocks; each site does nothing unless overridden."""

    def signals(self, layer: int) -> Signal:
        """What `after_attention` of this layer (0 = first) needs to see."""
        return Signal.NONE

    def before_block(self, state: TokenState, layer: int) -> TokenState:
        return state

    def attention_bias(self, state: TokenState, layer: int) -> Tensor | None:
        """Added to the logits before the softmax; broadcasts to (B, H, N, N)."""
        return None

    def after_attention(self, state: TokenState, layer: int, signals: Signals) -> TokenState:
        """After the attention's residual, before the MLP."""
        return state

    def after_block(self, state: TokenState, layer: int) -> TokenState:
        return state


class TokenReducer(nn.Module, BlockHook):
    """A hook that leaves fewer tokens. Its parameters, where it has any, are trained."""

    def plan(self, num_patches: int, num_prefix: int, depth: int) -> list[LayerTokens]:
        """Tokens each layer runs on, as the paper says; the runner checks them."""
        raise NotImplementedError

    def expand(self, state: TokenState, values: Tensor) -> Tensor:
        """Values of the final tokens on the grid of patches.

        values: (B, N, E), one row per token of `state` (logits, features); returns (B, P, E).
        A patch that no token stands for comes out as zeros.
        """
        return scatter_back(values, state.owner)


def check_blocks(blocks: Iterable[nn.Module], model: str) -> None:
    """Raise `UnsupportedBlock` unless every block is one that `run_block` knows whole."""
    for block in blocks:
        kind = type(block).__name__
        if type(block) is not Block:
            raise UnsupportedBlock(
                f"{model} has blocks of kind {kind}, not a plain ViT's. Use a plain ViT, e.g. "
                "encoder.name=deit_small_patch16_224"
            )
        attn = block.attn
        unknown = {name for name, _ in block.named_children()} - _BLOCK_PARTS
        if type(attn) is Attention:
            unknown |= {name for name, _ in attn.named_children()} - _ATTENTION_PARTS
        else:
            unknown.add(f"attention of kind {type(attn).__name__}")
        if unknown:
            raise UnsupportedBlock(f"{model}: this timm's blocks have {', '.join(sorted(unknown))}")


def attend(
    attn: Attention,
    x: Tensor,
    *,
    context: Tensor | None = None,
    bias: Tensor | None = None,
    want: Signal = Signal.NONE,
) -> tuple[Tensor, Signals]:
    """timm's attention over normed tokens, with what `want` asks for.

    x: (B, N, D) queries; context: (B, M, D) keys and values, None for `x` itself; bias: added to
    the logits, broadcasts to (B, H, N, M). Returns (B, N, D) and the signals.
    """
    q, k, v = _project(attn, x, context)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if want & Signal.ATTN:
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        weights = (logits if bias is None else logits + bias).softmax(-1)
        out = attn.attn_drop(weights) @ v
    else:
        weights = None
        dropout = attn.attn_drop.p if attn.training else 0.0
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    cls_attn = None
    if want & Signal.CLS_ATTN:
        row = (q[:, :, :1] * attn.scale) @ k.transpose(-2, -1)  # (B, H, 1, N)
        cls_attn = (row if bias is None else row + bias[:, :, :1]).softmax(-1)[:, :, 0]
    out = attn.norm(out.transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)  # not in older timm
    if gate is not None:
        out = out * gate(x).sigmoid()
    out = attn.proj_drop(attn.proj(out))
    return out, Signals(cls_attn, k if want & Signal.KEYS else None, weights)


class SplitAttention(Attention):
    """timm's attention by `attend`: cutting the joint projection into three, instead of moving an
    axis of three to the front, saves its backward pass a copy (benchmarks/RESULTS.md, MAE step)."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        assert not is_causal
        return attend(self, x, bias=attn_mask)[0]


def _project(attn: Attention, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, N, d), keys and values (B, H, M, d) from timm's joint projection."""
    width = attn.num_heads * attn.head_dim
    if context is None:
        parts = attn.qkv(x).split(width, dim=-1)
    else:  # queries of other tokens: the joint weights, cut
        weight, bias = attn.qkv.weight, attn.qkv.bias
        q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        keys_values = linear(context, weight[width:], kv_bias)
        parts = (linear(x, weight[:width], q_bias), *keys_values.split(width, dim=-1))
    q, k, v = (part.unflatten(-1, (attn.num_heads, attn.head_dim)) for part in parts)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def run_block(
    block: Block, state: TokenState, hook: BlockHook, layer: int
) -> tuple[TokenState, LayerTokens]:
    """One block of timm with a hook at its sites; also the tokens that it ran on."""
    state = hook.before_block(state, layer)
    before = state.x.shape[1]
    attended, signals = attend(
        block.attn,  # type: ignore[arg-type]
        block.norm1(state.x),
        bias=hook.attention_bias(state, layer),
        want=hook.signals(layer),
    )
    state = replace(state, x=state.x + block.drop_path1(block.ls1(attended)))
    state = hook.after_attention(state, layer, signals)
    mixed = block.drop_path2(block.ls2(block.mlp(block.norm2(state.x))))
    ran = LayerTokens(before, state.x.shape[1])
    return hook.after_block(replace(state, x=state.x + mixed), layer), ran


def cross_block(block: Block, query: Tensor, context: Tensor, *, residual: bool = True) -> Tensor:
    """A block whose queries are `query (B, N, D)` and whose keys and values are `context`
    (B, M, D), both unnormed; residuals and MLP on the queries. Returns (B, N, D).

    residual: whether what attention gives is added to the queries, or takes their place.
    """
    attended, _ = attend(block.attn, block.norm1(query), context=block.norm1(context))  # type: ignore[arg-type]
    x = block.drop_path1(block.ls1(attended))
    x = query + x if residual else x
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def run_blocks(
    blocks: Iterable[nn.Module],
    state: TokenState,
    hook: BlockHook,
    *,
    plan: list[LayerTokens] | None = None,
    layers: Iterable[int] = (),
) -> tuple[TokenState, dict[int, Tensor]]:
    """Every block in turn. Returns the last state and the outputs of `layers` (1 = first block).

    plan: the tokens that each layer must run on; another count is a bug of the hook and raises
    `VlxError`, so that a reducer that reduces nothing fails loudly.
    """
    taps: dict[int, Tensor] = {}
    for layer, block in enumerate(blocks):
        state, ran = run_block(block, state, hook, layer)  # type: ignore[arg-type]
        if plan is not None and ran != plan[layer]:
            raise VlxError(
                f"{type(hook).__name__}, layer {layer}: ran on {ran.attention} tokens in attention "
                f"and {ran.mlp} in the MLP; its plan says {tuple(plan[layer])}"
            )
        if layer + 1 in layers:
            taps[layer + 1] = state.x
    return state, taps
