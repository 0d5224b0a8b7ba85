"""The masks, and the attention whose logits they multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.functional import pad

from vlx.core.errors import ConfigError
from vlx.ops.distance import squared_distances

MakeMask = Callable[[int, tuple[int, int]], nn.Module]
"""A new mask for the heads and grid of a layer."""


class GaussianMixture(nn.Module):
    """The mask of one layer: sum over k of alpha_k exp(-d^2 / (2 (sigma_k^2 + 1e-5)))."""

    squared: Tensor

    def __init__(self, heads: int, grid: tuple[int, int], *, num_kernels: int) -> None:
        super().__init__()
        shape = (num_kernels, heads, 1, 1)
        self.sigma = nn.Parameter(10 * torch.randn(shape) + 10)  # in patches; enters squared
        self.alpha = nn.Parameter(2 * torch.randn(shape))  # of either sign
        self.register_buffer("squared", squared_distances(grid), persistent=False)

    def forward(self) -> Tensor:
        """(H, N, N)."""
        width = 2 * (self.sigma.square() + 1e-5)
        return (self.alpha * torch.exp(-self.squared / width)).sum(0)


class ElementwiseMask(nn.Module):
    """The paper's baseline mask: one entry for every pair of patches, the same for all heads."""

    def __init__(self, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        patches = grid[0] * grid[1]
        self.entries = nn.Parameter(torch.zeros(patches, patches))  # uniform attention at first

    def forward(self) -> Tensor:
        """(N, N)."""
        return self.entries


def masked(logits: Tensor, mask: nn.Module | None, num_prefix: int = 0) -> Tensor:
    """Logits (B, H, N, N) times a mask, None for none. The first `num_prefix` tokens are no
    patches: what they attend to and what attends to them stays as it is.

    A small entry is no mask in the other sense: it brings the logit to 0, which is attended as
    much as any other 0.
    """
    if mask is None:
        return logits
    return pad(mask(), (num_prefix, 0, num_prefix, 0), value=1.0) * logits


class MaskedAttention(Attention):
    """timm's attention without biases of q, k and v, its logits multiplied by a mask."""

    def __init__(
        self, dim: int, heads: int, mask: nn.Module | None, *, num_prefix: int = 0
    ) -> None:
        super().__init__(dim, heads, qkv_bias=False)
        self.mask, self.num_prefix = mask, num_prefix

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x: (B, N, D); the other arguments are timm's and must be left alone."""
        assert attn_mask is None
        assert not is_causal
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, d)
        logits = masked(q * self.scale @ k.transpose(-2, -1), self.mask, self.num_prefix)
        out = logits.softmax(-1).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Host:
    """What all hosts share: a model is made for one size of images, and all of it is decayed."""

    def set_input_size(self, *_: Any, **__: Any) -> None:
        raise ConfigError("masks are made for one grid: give img_size to create_model")

    def no_weight_decay(self) -> set[str]:
        """Nothing: the released code decays all parameters."""
        return set()


def drop_alike(blocks: Iterable[nn.Module], rate: float) -> None:
    """Give the residual branches of timm's blocks the same stochastic depth, as the released code
    does but in Swin and T2T, where it rises with depth as timm has it."""
    for block in blocks:
        for name in ("drop_path", "drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(rate))
