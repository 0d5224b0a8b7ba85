"""ConvMAE's encoder: two masked-convolution stages before the Transformer (Gao et al., 2022).

Parameter names are those of the published weights (Alpha-VL/ConvMAE). There is no class token.
The layer norms of the convolutional half keep torch's eps of 1e-5, as the published code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vlx.core.errors import ConfigError
from vlx.encoders.base import EncoderOut, EncoderSpec, VisionEncoder
from vlx.encoders.config import EncoderConfig, PosEmbed
from vlx.ops.patches import upsample_mask
from vlx.ops.posembed import sincos_2d
from vlx.ops.tokens import gather_tokens


class _Size(NamedTuple):
    widths: tuple[int, int, int]
    depth: int
    heads: int


# Two convolution blocks in each of the first two stages, whatever the size.
_SIZES = {
    "convmae_small": _Size((128, 256, 384), 11, 6),
    "convmae_base": _Size((256, 384, 768), 11, 12),
}
_CONV_BLOCKS = 2


def is_conv_mae(name: str) -> bool:
    """Whether `encoder.name` is one of ConvMAE's."""
    return name.startswith("convmae_")


class ConvEmbed(nn.Module):
    """Convolution of kernel = stride, LayerNorm over channels, GELU."""

    def __init__(self, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, stride, stride)
        self.norm = nn.LayerNorm(dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, dim, H / stride, W / stride)."""
        return self.act(_channel_norm(self.norm, self.proj(x)))


class ConvMlp(nn.Module):
    """Two 1x1 convolutions with a GELU between, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MaskedConvBlock(nn.Module):
    """5x5 depthwise convolution over visible places only, then the MLP; both residual."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x: (B, C, h, w); visible: (B, 1, h, w), 1 = visible. What is hidden never leaks."""
        inner = self.conv1(_channel_norm(self.norm1, x))
        x = x + self.drop_path(self.conv2(self.attn(visible * inner)))
        return x + self.drop_path(self.mlp(_channel_norm(self.norm2, x)))


class ConvMae(VisionEncoder):
    """Stages of stride patch_size / 4, 2 and 2; the tokens get both earlier stages added."""

    def __init__(self, cfg: EncoderConfig) -> None:
        super().__init__()
        size = _size(cfg)
        first, second, dim = size.widths
        patch = cfg.patch_size or 16
        self.spec = EncoderSpec(
            dim=dim,
            depth=size.depth,
            heads=size.heads,
            patch_size=patch,
            image_size=cfg.image_size,
            num_prefix=0,
            class_token=False,
            mean=tuple(cfg.mean),
            std=tuple(cfg.std),
        )
        self.set_statistics(cfg.mean, cfg.std)
        rates = torch.linspace(0, cfg.drop_path, 2 * _CONV_BLOCKS + size.depth, device="cpu")
        drop = rates.tolist()
        self.patch_embed1 = ConvEmbed(3, first, patch // 4)
        self.patch_embed2 = ConvEmbed(first, second, 2)
        self.patch_embed3 = ConvEmbed(second, dim, 2)
        self.patch_embed4 = nn.Linear(dim, dim)
        self.stage1_output_decode = nn.Conv2d(first, dim, 4, 4)
        self.stage2_output_decode = nn.Conv2d(second, dim, 2, 2)
        table = sincos_2d(self.spec.grid, dim)[None]
        self.pos_embed = nn.Parameter(table, requires_grad=cfg.pos_embed is PosEmbed.learned)
        self.blocks1 = nn.ModuleList(MaskedConvBlock(first, drop[i]) for i in range(_CONV_BLOCKS))
        self.blocks2 = nn.ModuleList(
            MaskedConvBlock(second, drop[_CONV_BLOCKS + i]) for i in range(_CONV_BLOCKS)
        )
        self.blocks3 = nn.ModuleList(
            Block(dim, size.heads, qkv_bias=True, drop_path=drop[2 * _CONV_BLOCKS + i])
            for i in range(size.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    @property
    def backbone(self) -> nn.Module:
        return self

    @property
    def patch_conv(self) -> nn.Conv2d:
        """Only the third embedding is initialised as a matrix; the others keep torch's default."""
        return self.patch_embed3.proj

    @property
    def prefix_tokens(self) -> tuple[nn.Parameter, ...]:
        return ()

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        layers: Sequence[int] = (),
        normalised: bool = False,
    ) -> EncoderOut:
        """As `VisionEncoder.forward`; `layers` counts the Transformer blocks."""
        x = images if normalised else self.normalise(images)
        if keep is None:
            keep = torch.arange(self.spec.num_patches, device=x.device).expand(len(x), -1)
        visible = torch.zeros(len(x), self.spec.num_patches, device=x.device, dtype=x.dtype)
        visible = visible.scatter(1, keep, 1.0)
        x = self.patch_embed1(x)
        for block in self.blocks1:
            x = block(x, upsample_mask(visible, 4, self.spec.grid))
        fine = self.stage1_output_decode(x)
        x = self.patch_embed2(x)
        for block in self.blocks2:
            x = block(x, upsample_mask(visible, 2, self.spec.grid))
        middle = self.stage2_output_decode(x)
        x = self.patch_embed4(self.patch_embed3(x).flatten(2).transpose(1, 2)) + self.pos_embed
        x = gather_tokens(x, keep)  # (B, K, D)
        taps: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks3, start=1):
            x = block(x)
            if number in layers:
                taps[number] = x
        for stage in (fine, middle):
            x = x + gather_tokens(stage.flatten(2).transpose(1, 2), keep)
        x = self.norm(x)
        return EncoderOut(tokens=x, prefix=x[:, :0], layers=taps)


def _size(cfg: EncoderConfig) -> _Size:
    if cfg.name not in _SIZES:
        raise ConfigError(f"no encoder '{cfg.name}'; ConvMAE has {', '.join(_SIZES)}")
    patch = cfg.patch_size or 16
    if patch % 4 or cfg.image_size % patch:
        raise ConfigError(
            f"{cfg.name} needs a patch size divisible by 4 that divides the image: patch_size="
            f"{patch}, image_size={cfg.image_size}"
        )
    size = _SIZES[cfg.name]
    dim = cfg.dim or size.widths[2]
    widths = tuple(dim * width // size.widths[2] for width in size.widths)
    return _Size(widths, cfg.depth or size.depth, cfg.heads or size.heads)  # type: ignore[arg-type]


def _channel_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm over the channels of (B, C, h, w)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
