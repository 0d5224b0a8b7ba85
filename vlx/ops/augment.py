"""View operations: batched on the device, every parameter drawn per sample from given uniforms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlx.core import random
from vlx.core.fields import ViewOp
from vlx.ops.resample import Interpolation, crop_resize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_TRIES = 10  # boxes drawn for an image, as torchvision's crop and timm's erasing


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area and aspect ratio, resized to the view's size.

    As torchvision's: of ten drawn boxes the first that fits the image counts; where none does, the
    largest central box whose ratio is in range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area, 0..1."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height."""
    interpolation: Interpolation = Interpolation.bicubic
    draws: int = 2 + 2 * _TRIES

    def boxes(self, sizes: Tensor, u: Tensor) -> Tensor:
        """`(B, 4)` top, left, height, width in whole pixels, for sizes (B, 2) and u (B, draws)."""
        extent = sizes.to(torch.float32)  # (B, 2)
        tall, wide = _drawn_sides(extent, u[:, 2:], self.scale, self.ratio).unbind(2)
        sides = torch.stack([wide, tall], dim=2)  # here a ratio is width over height
        fits = ((sides >= 1) & (sides <= extent[:, None])).all(2)
        side = _first(sides, fits)
        corner = torch.floor(u[:, :2] * (extent - side + 1.0))
        whole = self._central_side(extent)
        found = fits.any(1, keepdim=True)
        corner = torch.where(found, corner, torch.floor((extent - whole) / 2))
        return torch.cat([corner, torch.where(found, side, whole)], dim=1)

    def _central_side(self, extent: Tensor) -> Tensor:
        """`(B, 2)` height and width of the largest box of a ratio in range, for extent (B, 2)."""
        height, width = extent.unbind(1)
        tall = torch.minimum(height, (width / self.ratio[0]).round())
        return torch.stack([tall, torch.minimum(width, (height * self.ratio[1]).round())], dim=1)

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        return crop_resize(images, self.boxes(sizes, u), (size, size), self.interpolation)


@dataclass(frozen=True)
class RandomCrop:
    """A square of the view's size at a random whole-pixel offset, after zero padding.

    Where the padded image is smaller than the view, the rest is zero too.
    """

    padding: int = 4
    """Pixels added on every side."""
    draws: int = 2

    def offsets(self, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        """`(B, 2)` int64 top and left in the padded image, for sizes (B, 2) and u (B, 2)."""
        places = (sizes + (2 * self.padding + 1 - size)).clamp(min=1)
        return (u * places).to(torch.int64)

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        b, c, h, w = images.shape
        p = self.padding
        # One row more than needed, so that no window runs over the end of the buffer.
        tall, wide = max(h + 2 * p, size) + 1, max(w + 2 * p, size)
        padded = images.new_zeros(b, c, tall, wide)
        padded[:, :, p : p + h, p : p + w] = images
        # Rows of one crop lie `wide` apart, so a crop is one run of size * wide values: copying
        # runs is many times faster than gathering pixels.
        run = size * wide
        windows = padded.as_strided((padded.numel() - run + 1, run), (1, 1))
        top, left = self.offsets(sizes, u, size).unbind(1)
        planes = torch.arange(b * c, device=images.device) * (tall * wide)
        starts = planes.view(b, c) + (top * wide + left)[:, None]
        crops = windows.index_select(0, starts.flatten())
        return crops.view(b, c, size, wide)[..., :size]


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right with probability `p`."""

    p: float = 0.5
    draws: int = 1

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        if self.p == 0.0:
            return images
        # Choosing whole rows copies blocks of memory; `torch.where` would test every pixel.
        rows = torch.arange(len(images), device=images.device)
        both = torch.cat([images, images.flip(-1)])
        return both.index_select(0, rows + len(images) * (u[:, 0] < self.p))


@dataclass(frozen=True)
class CenterCrop:
    """The evaluation view: the central square of side `ratio` x short side, resized."""

    ratio: float = 0.875
    interpolation: Interpolation = Interpolation.bicubic
    draws: int = 0

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        heights, widths = sizes[:, 0].float(), sizes[:, 1].float()
        side = torch.minimum(heights, widths) * self.ratio
        top, left = (heights - side) / 2, (widths - side) / 2
        boxes = torch.stack([top, left, side, side], dim=1)
        return crop_resize(images, boxes, (size, size), self.interpolation)


@dataclass(frozen=True)
class Squeeze:
    """The whole image, resized to a square: nothing is cut, and its sides' ratio is lost."""

    interpolation: Interpolation = Interpolation.bicubic
    draws: int = 0

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        boxes = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
        return crop_resize(images, boxes, (size, size), self.interpolation)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue, in this order, with probability `p` per sample.

    Factors are drawn from [1 - x, 1 + x], the hue shift from [-hue, hue] turns, as torchvision's;
    the order is fixed where torchvision shuffles it.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0
    draws: int = 5

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        def factor(column: int, spread: float) -> Tensor:
            return (1.0 + (2.0 * u[:, column] - 1.0) * spread)[:, None, None, None]

        x = (images * factor(0, self.brightness)).clamp(0, 1)
        mean = _grey(x).mean(dim=(2, 3), keepdim=True)
        x = (mean + (x - mean) * factor(1, self.contrast)).clamp(0, 1)
        grey = _grey(x)
        x = (grey + (x - grey) * factor(2, self.saturation)).clamp(0, 1)
        if self.hue:
            x = _rotate_hue(x, (2.0 * u[:, 3] - 1.0) * self.hue).clamp(0, 1)
        return torch.where((u[:, 4] < self.p)[:, None, None, None], x, images)


@dataclass(frozen=True)
class Grayscale:
    """Luma in all three channels, with probability `p` per sample."""

    p: float = 0.1
    draws: int = 1

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        return torch.where((u[:, 0] < self.p)[:, None, None, None], _grey(images), images)


@dataclass(frozen=True)
class Solarize:
    """Values from the upper half of the range inverted, with probability `p` per sample (PIL's
    threshold of 128 of 255)."""

    p: float = 0.2
    draws: int = 1

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        inverted = torch.where(images * 255.0 >= 127.5, 1.0 - images, images)
        return torch.where((u[:, 0] < self.p)[:, None, None, None], inverted, images)


@dataclass(frozen=True)
class GaussianBlur:
    """Blur with a radius (standard deviation) in pixels drawn from `sigma`, probability `p`."""

    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5
    draws: int = 2

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        radius = min(math.ceil(3 * self.sigma[1]), images.shape[-1] - 1)
        sigma = self.sigma[0] + u[:, 0] * (self.sigma[1] - self.sigma[0])
        offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (offsets[None] / sigma[:, None]) ** 2)
        kernel = (kernel / kernel.sum(1, keepdim=True)).to(images.dtype)
        b, c, h, w = images.shape
        padded = torch.nn.functional.pad(images, (radius,) * 4, mode="reflect")
        flat = padded.reshape(1, b * c, h + 2 * radius, w + 2 * radius)
        taps = kernel.repeat_interleave(c, 0)  # (B*C, 2r+1)
        flat = torch.nn.functional.conv2d(flat, taps[:, None, :, None], groups=b * c)
        flat = torch.nn.functional.conv2d(flat, taps[:, None, None, :], groups=b * c)
        blurred = flat.reshape(b, c, h, w)
        return torch.where((u[:, 1] < self.p)[:, None, None, None], blurred, images)


@dataclass(frozen=True)
class OneOf:
    """One of several operations that keep the shape, drawn for every sample with equal chances."""

    ops: tuple[ViewOp, ...]

    @property
    def draws(self) -> int:
        return 1 + sum(op.draws for op in self.ops)

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        chosen = (u[:, 0] * len(self.ops)).to(torch.int64)[:, None, None, None]
        own = u[:, 1:].split([op.draws for op in self.ops], dim=1)
        out = images
        for number, (op, draws) in enumerate(zip(self.ops, own)):
            out = torch.where(chosen == number, op(images, sizes, draws, size), out)
        return out


@dataclass(frozen=True)
class RandomErasing:
    """A box filled with normal noise, with probability `p` (Zhong 2020; timm's mode "pixel"), or
    with one colour.

    The noise is N(0, 1) once `mean` and `std` normalise the image, as in DeiT, so before that it
    leaves 0..1: the last operation of a view.
    """

    p: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    """Share of the image's area, 0..1."""
    ratio: tuple[float, float] = (0.3, 1 / 0.3)
    """Height over width."""
    log_ratio: bool = True
    """Whether the ratio is uniform in its logarithm (timm), or itself (Zhong's code)."""
    fill: tuple[float, float, float] | None = None
    """RGB of a box, 0..1; None is noise."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    draws: int = 5 + 2 * _TRIES

    def boxes(self, sizes: Tensor, u: Tensor) -> Tensor:
        """`(B, 4)` int64 top, left, height, width, for sizes (B, 2) and u (B, draws).

        All zero where nothing is erased. Of ten draws the first that is smaller than the image in
        both directions counts.
        """
        extent = sizes.to(torch.float32)  # (B, 2)
        sides = _drawn_sides(extent, u[:, 5:], self.area, self.ratio, log=self.log_ratio)
        fits = (sides < extent[:, None]).all(2)
        side = _first(sides, fits)
        corner = torch.floor(u[:, 1:3] * (extent - side + 1.0))
        erased = fits.any(1) & (u[:, 0] < self.p)
        return torch.cat([corner, side], dim=1).to(torch.int64) * erased[:, None]

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        height, width = images.shape[-2:]
        top, left, tall, wide = self.boxes(sizes, u)[..., None].unbind(1)  # each (B, 1)
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        in_rows = (rows >= top) & (rows < top + tall)
        in_columns = (columns >= left) & (columns < left + wide)
        if self.fill is not None:
            erased = (in_rows[:, :, None] & in_columns[:, None])[:, None]
            return torch.where(erased, images.new_tensor(self.fill)[:, None, None], images)
        # Noise for the boxes alone, a sixth of a few images; how many pixels, the host waits for.
        sample, row, column = (in_rows[:, :, None] & in_columns[:, None]).nonzero(as_tuple=True)
        bits = (u[:, 3:5] * (1 << 24)).to(torch.int64)  # a uniform has 24
        keys = random.key((bits[:, 0] << 24) + bits[:, 1], "erasing")
        noise = random.normal(random.mix(keys[sample] + (row << 32) + column), 3)  # (P, 3)
        fill = noise * noise.new_tensor(self.std) + noise.new_tensor(self.mean)
        out = images.clone()
        out.permute(0, 2, 3, 1)[sample, row, column] = fill.to(out.dtype)
        return out


def _drawn_sides(
    extent: Tensor,
    u: Tensor,
    area: tuple[float, float],
    ratio: tuple[float, float],
    *,
    log: bool = True,
) -> Tensor:
    """`(B, K, 2)` sides of K random boxes in whole pixels, the first over the second of uniform
    `ratio`, or of log-uniform. extent: (B, 2); u: (B, 2 K); area: a share of the image's."""
    share, shape = u.chunk(2, dim=1)  # (B, K)
    pixels = extent.prod(1, keepdim=True) * (area[0] + share * (area[1] - area[0]))
    low, high = (math.log(end) if log else end for end in ratio)
    drawn = low + shape * (high - low)
    drawn = drawn.exp() if log else drawn
    return torch.stack([(pixels * drawn).sqrt(), (pixels / drawn).sqrt()], dim=2).round()


def _first(sides: Tensor, fits: Tensor) -> Tensor:
    """`(B, 2)`: of sides (B, K, 2) the first that fits (B, K), or the first of all."""
    first = fits.to(torch.int64).argmax(1)  # argmax gives the first of equals
    return sides[torch.arange(len(sides), device=sides.device), first]


def _grey(images: Tensor) -> Tensor:
    """ITU-R 601 luma, (B, 1, H, W)."""
    weights = images.new_tensor([0.299, 0.587, 0.114])[None, :, None, None]
    return (images * weights).sum(1, keepdim=True)


def _rotate_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Hue of HSV shifted by `turns (B,)` of the circle; value and saturation stay."""
    value, low = images.amax(1), images.amin(1)  # (B, H, W)
    chroma = value - low
    red, green, blue = images.unbind(1)
    safe = chroma.clamp(min=1e-12)
    # Sixths of a turn from the largest channel; grey has no hue, and no chroma to show it.
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    hue = hue + 6.0 * turns[:, None, None]
    planes = []
    for offset in (5.0, 3.0, 1.0):
        k = torch.remainder(hue + offset, 6.0)
        planes.append(value - chroma * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.stack(planes, dim=1)
