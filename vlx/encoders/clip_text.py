"""CLIP's text transformer (Radford et al., ICML 2021, section 2.4) on timm's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.layers.create_act import get_act_layer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vlx.blocks.vit_block import BlockHook, run_blocks
from vlx.core.errors import ConfigError
from vlx.encoders.config import TextConfig
from vlx.encoders.text import TextEncoder, TextOut, TextSpec
from vlx.ops.text import real_tokens
from vlx.ops.token_state import start
from vlx.ops.tokens import gather_tokens

_DIM, _DEPTH = 512, 12
_HEAD_DIM = 64


class ClipText(TextEncoder):
    """Token and position tables, pre-norm blocks, a final norm; pooled is the end token, the last
    that is no padding.

    causal: every token sees those before it, as published; False lets it see all that are no
    padding. activation: timm's name of that in the blocks; OpenAI's weights are of quick_gelu,
    models of open_clip mostly of gelu.
    """

    def __init__(
        self,
        cfg: TextConfig,
        vocab_size: int,
        *,
        causal: bool = True,
        activation: str = "quick_gelu",
    ) -> None:
        super().__init__()
        dim, depth = cfg.dim or _DIM, cfg.depth or _DEPTH
        heads = cfg.heads or max(1, dim // _HEAD_DIM)
        if dim % heads:
            raise ConfigError(f"text.dim={dim} does not divide into text.heads={heads}")
        self.spec = TextSpec(dim, depth, heads, vocab_size, cfg.context_length)
        self.causal = causal
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.empty(cfg.context_length, dim))
        norm = partial(nn.LayerNorm, eps=1e-5)
        act = get_act_layer(activation)
        assert act is not None
        self.blocks = nn.Sequential(
            *(
                Block(dim, heads, qkv_bias=True, act_layer=act, norm_layer=norm)  # type: ignore[arg-type]
                for _ in range(depth)
            )
        )
        self.norm = norm(dim)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal, with deviations by width and depth, as OpenAI's code has them."""
        dim, depth = self.spec.dim, self.spec.depth
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        for block in self.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=dim**-0.5)  # type: ignore[arg-type]
            nn.init.normal_(block.attn.proj.weight, std=dim**-0.5 * (2 * depth) ** -0.5)  # type: ignore[arg-type]
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * dim) ** -0.5)  # type: ignore[arg-type]
            nn.init.normal_(block.mlp.fc2.weight, std=dim**-0.5 * (2 * depth) ** -0.5)  # type: ignore[arg-type]
            for layer in (block.attn.qkv, block.attn.proj):  # type: ignore[union-attr]
                nn.init.zeros_(layer.bias)  # type: ignore[union-attr]

    @property
    def token_table(self) -> nn.Embedding:
        return self.tokens

    def layer_depths(self) -> dict[str, int]:
        depths = {"tokens": 0, "positions": 0}
        return depths | {f"blocks.{i}": i + 1 for i in range(self.spec.depth)}

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor,
        *,
        embeddings: Tensor | None = None,
        layers: Sequence[int] = (),
        hook: BlockHook | None = None,
    ) -> TextOut:
        x = self.tokens(ids) if embeddings is None else embeddings  # (B, L, D)
        x = x + self.positions[: x.shape[1]]
        bias = self._bias(x, lengths)
        if hook is not None:
            acting = _Masked(hook, bias)
            state, taps = run_blocks(self.blocks, start(x, 0), acting, layers=layers)
            x = state.x
        else:
            taps: dict[int, Tensor] = {}
            for number, block in enumerate(self.blocks, start=1):
                x = block(x, attn_mask=bias)
                if number in layers:
                    taps[number] = x
        x = self.norm(x)
        last = (lengths - 1).clamp(max=x.shape[1] - 1)
        return TextOut(tokens=x, pooled=gather_tokens(x, last[:, None])[:, 0], layers=taps)

    def _bias(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Added to attention logits: -inf at what a token must not see."""
        count = x.shape[1]
        if self.causal:  # padding is behind every real token, which so never sees it
            hidden = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        else:
            hidden = ~real_tokens(lengths, count)[:, None, None, :]
        return torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill(
            hidden, float("-inf")
        )


class _Masked(BlockHook):
    """A hook with the text's own attention mask under it."""

    def __init__(self, hook: BlockHook, bias: Tensor) -> None:
        self.hook, self.bias = hook, bias
        self.signals, self.before_block = hook.signals, hook.before_block  # type: ignore[method-assign]
        self.after_attention, self.after_block = hook.after_attention, hook.after_block  # type: ignore[method-assign]

    def attention_bias(self, state, layer: int) -> Tensor:
        own = self.hook.attention_bias(state, layer)
        return self.bias if own is None else self.bias + own
