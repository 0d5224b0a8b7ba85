"""A light head that paints pixels from patch tokens (GMML, SiT)."""

from __future__ import annotations

from torch import Tensor, nn

from vlx.blocks.init import trunc_normal_init


class ReconstructionHead(nn.Module):
    """Three Linear layers with GELU, then a transposed convolution of one patch a token.

    The convolution equals a Linear layer and an unpatchify whose patches are channel first.
    """

    def __init__(self, dim: int, patch_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.mlp = nn.Sequential(
            *(part for _ in range(3) for part in (nn.Linear(dim, dim), nn.GELU()))
        )
        trunc_normal_init(self.mlp)
        self.to_pixels = nn.ConvTranspose2d(dim, 3, kernel_size=patch_size, stride=patch_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, D). Returns (B, 3, H, W)."""
        x = self.mlp(tokens).transpose(1, 2).unflatten(2, self.grid)
        return self.to_pixels(x)
