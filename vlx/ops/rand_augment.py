"""RandAugment (Cubuk 2020) in the variant of DeiT, timm's `rand-m9-mstd0.5-inc1`.

Every sample draws its own operations and strengths from given uniforms. The operations are PIL's
on uint8: a chosen image is rounded to whole levels 0..255 and stays whole after each operation.
Three kinds, each done at once for all samples that drew one of it:

- point operations are a table of 256 values per channel, then one look-up;
- filters (colour, sharpness) see a pixel's other channels or its neighbours;
- affine operations are one `grid_sample`.

Departures: the bicubic kernel is torch's (a = -0.75, PIL's transforms use -1); posterising to
0 bits gives black, as Pillow did when DeiT was trained (Pillow 13 refuses it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlx.ops.augment import IMAGENET_MEAN
from vlx.ops.resample import Interpolation

LARGEST = 10.0  # upper end of the strength scale; a drawn strength is cut there
DRAWS_PER_OP = 4


@dataclass(frozen=True)
class Ranges:
    """What a level means where repositories differ. DeiT's, timm's inc1, by default."""

    increasing: bool = True
    """A higher level always changes more; False is timm's and ALBEF's older ranges, in which a
    level of 5.5 leaves colours, contrast, brightness and sharpness as they are."""
    translate: float = 0.45
    """Shift at level 10, as a share of the side."""
    translate_pixels: float | None = None
    """Shift at level 10 in pixels, instead of `translate`."""
    least_bits: int = 0
    """Bits left by posterising at level 10: 0 (timm, from 4 on) or 4 (AutoAugment, from 8 on)."""


class Strength(NamedTuple):
    """How strongly each of n samples is changed."""

    level: Tensor
    """(n,) 0..10."""
    sign: Tensor
    """(n,) -1 or 1, for operations with two directions."""
    ranges: Ranges

    def part(self, rows: Tensor) -> Strength:
        return Strength(self.level[rows], self.sign[rows], self.ranges)

    def split(self, counts: Sequence[int]) -> list[Strength]:
        pairs = zip(self.level.split(counts), self.sign.split(counts))
        return [Strength(level, sign, self.ranges) for level, sign in pairs]

    def whole(self, top: int) -> Tensor:
        """(n,) whole numbers from 0 at level 0 to `top` at level 10."""
        return torch.floor(self.level * top / LARGEST)

    def factor(self) -> Tensor:
        """(n,) 0.1..1.9; 1 leaves the image as it is."""
        if self.ranges.increasing:
            return 1.0 + self.sign * self.level * 0.9 / LARGEST
        return self.level * 1.8 / LARGEST + 0.1

    def signed(self, top: float) -> Tensor:
        """(n,) -top..top."""
        return self.sign * self.level * top / LARGEST

    def shift(self, side: int) -> Tensor:
        """(n,) pixels, of an image of `side`."""
        pixels = self.ranges.translate_pixels
        return self.signed(self.ranges.translate) * side if pixels is None else self.signed(pixels)

    def bits(self) -> Tensor:
        """(n,) the highest bits that posterising keeps."""
        if self.ranges.least_bits:
            return 8.0 - (self.level * (8 - self.ranges.least_bits) / LARGEST).round()
        return 4.0 - self.whole(4) if self.ranges.increasing else self.whole(4)


def _grey(levels: Tensor) -> Tensor:
    """(n, 1, H, W) luma in whole levels: PIL's 16-bit fixed point, exact in float32."""
    weights = levels.new_tensor([19595.0, 38470.0, 7471.0])[None, :, None, None]
    return torch.floor(((levels * weights).sum(1, keepdim=True) + 32768.0) / 65536.0)


def _blend(plain: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    """From `plain` at factor 0 over `levels` at 1 and beyond, cut off as PIL does."""
    return (plain + factor * (levels - plain)).clamp(0.0, 255.0).floor()


# --- point operations: (levels (n, 3, H, W), strength) to tables (n, 3 or 1, 256)


def _all_levels(levels: Tensor) -> Tensor:
    return torch.arange(256, device=levels.device, dtype=torch.float32).expand(1, 1, 256)


def _auto_contrast(levels: Tensor, strength: Strength) -> Tensor:
    """The darkest level of a channel to 0, the lightest to 255."""
    low = levels.amin((2, 3)).to(torch.int32)[..., None]  # (n, 3, 1)
    high = levels.amax((2, 3)).to(torch.int32)[..., None]
    i = torch.arange(256, device=levels.device, dtype=torch.int32)
    # In whole numbers: float32 would fall below some of the values that come out whole.
    stretched = ((i - low) * 255 // (high - low).clamp(min=1)).clamp(0, 255)
    return torch.where(high > low, stretched, i).to(torch.float32)


def _equalize(levels: Tensor, strength: Strength) -> Tensor:
    """Every level of a channel equally often, by its cumulative histogram."""
    flat = levels.flatten(2).to(torch.int64)
    histogram = torch.zeros(*flat.shape[:2], 256, device=flat.device, dtype=torch.int64)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    below = histogram.cumsum(2) - histogram
    lightest = flat.amax(2, keepdim=True)
    step = below.gather(2, lightest) // 255  # pixels a level gets; (n, 3, 1)
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table, torch.arange(256, device=flat.device)).to(torch.float32)


def _invert(levels: Tensor, strength: Strength) -> Tensor:
    return (255.0 - _all_levels(levels)).expand(len(levels), 1, 256)


def _posterize(levels: Tensor, strength: Strength) -> Tensor:
    """The highest bits of a level alone."""
    step = torch.exp2(8.0 - strength.bits()).round()[:, None, None]
    return torch.floor(_all_levels(levels) / step) * step


def _solarize(levels: Tensor, strength: Strength) -> Tensor:
    """Levels from a threshold on, inverted."""
    whole = strength.whole(256)
    threshold = (256.0 - whole if strength.ranges.increasing else whole)[:, None, None]
    i = _all_levels(levels)
    return torch.where(i < threshold, i, 255.0 - i)


def _solarize_add(levels: Tensor, strength: Strength) -> Tensor:
    """Levels of the darker half, lightened by up to 110."""
    i = _all_levels(levels)
    lightened = (i + strength.whole(110)[:, None, None]).clamp(max=255.0)
    return torch.where(i < 128.0, lightened, i)


def _contrast(levels: Tensor, strength: Strength) -> Tensor:
    grey = _grey(levels).flatten(1)
    # float32 cannot hold the sum of a large image.
    mean = torch.floor(grey.to(torch.int64).sum(1).to(torch.float32) / grey.shape[1] + 0.5)
    return _blend(mean[:, None, None], _all_levels(levels), strength.factor()[:, None, None])


def _brightness(levels: Tensor, strength: Strength) -> Tensor:
    i = _all_levels(levels)
    return _blend(torch.zeros_like(i), i, strength.factor()[:, None, None])


def look_up(levels: Tensor, tables: Tensor) -> Tensor:
    """Levels (n, C, H, W) put through `tables (n, C, 256)`, of each sample and channel its own."""
    n, c = levels.shape[:2]
    starts = torch.arange(n * c, device=levels.device, dtype=torch.int32) * 256
    # One flat index over all tables: several times faster than `gather` on a CPU.
    places = levels.to(torch.int32).view(n * c, -1) + starts[:, None]
    return tables.reshape(-1).index_select(0, places.view(-1)).view(levels.shape)


# --- filters: (levels (n, 3, H, W), strength) to levels


def _color(levels: Tensor, strength: Strength) -> Tensor:
    return _blend(_grey(levels), levels, strength.factor()[:, None, None, None])


def _sharpness(levels: Tensor, strength: Strength) -> Tensor:
    """Away from or towards a 3x3 smoothing with the weight 5 of 13 in the centre."""
    rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    centre = levels[:, :, 1:-1, 1:-1]
    smooth = levels.clone()  # the rim stays: PIL smooths where all neighbours are
    smooth[:, :, 1:-1, 1:-1] = torch.floor((total + 4.0 * centre) / 13.0 + 0.5)
    return _blend(smooth, levels, strength.factor()[:, None, None, None])


# --- affine operations: (strength, height, width) to matrices (n, 2, 3)
# A matrix takes a pixel (x, y, 1) of the result to its place in the image, in pixels from the
# top left corner; pixel centres lie at halves.


def _matrices(n: int, *entries: Tensor | float) -> Tensor:
    """(n, 2, 3) from six entries row by row, each (n,) or one number."""
    like = next(entry for entry in entries if isinstance(entry, Tensor))
    columns = [e if isinstance(e, Tensor) else torch.full_like(like, e) for e in entries]
    return torch.stack(columns, 1).view(n, 2, 3)


def _rotate(strength: Strength, height: int, width: int) -> Tensor:
    angle = -torch.deg2rad(strength.signed(30.0))
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y = width / 2, height / 2
    moved_x, moved_y = x - cos * x - sin * y, y + sin * x - cos * y
    return _matrices(len(angle), cos, sin, moved_x, -sin, cos, moved_y)


def _shear_x(strength: Strength, height: int, width: int) -> Tensor:
    return _matrices(len(strength.level), 1.0, strength.signed(0.3), 0.0, 0.0, 1.0, 0.0)


def _shear_y(strength: Strength, height: int, width: int) -> Tensor:
    return _matrices(len(strength.level), 1.0, 0.0, 0.0, strength.signed(0.3), 1.0, 0.0)


def _translate_x(strength: Strength, height: int, width: int) -> Tensor:
    shift = strength.shift(width)
    return _matrices(len(shift), 1.0, 0.0, shift, 0.0, 1.0, 0.0)


def _translate_y(strength: Strength, height: int, width: int) -> Tensor:
    shift = strength.shift(height)
    return _matrices(len(shift), 1.0, 0.0, 0.0, 0.0, 1.0, shift)


def affine_sample(
    levels: Tensor, matrices: Tensor, fill: Tensor, interpolation: Interpolation
) -> Tensor:
    """Levels (n, C, H, W) seen through `matrices (n, 2, 3)`; `fill (C,)` where they miss it."""
    height, width = levels.shape[-2:]
    across = torch.arange(width, device=levels.device) + 0.5
    down = torch.arange(height, device=levels.device) + 0.5
    by_x, by_y, shift = matrices.permute(2, 1, 0)[..., None, None]  # each (2, n, 1, 1)
    x, y = by_x * across + by_y * down[:, None] + shift  # each (n, H, W)
    grid = torch.stack([2.0 * x / width - 1.0, 2.0 * y / height - 1.0], dim=-1)
    # PIL asks whether the point lies on the image, then repeats the rim for the kernel's sake.
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    seen = torch.nn.functional.grid_sample(
        levels, grid, interpolation.name, padding_mode="border", align_corners=False
    )
    # PIL cuts fractions off; the weights of an even area may sum to a little less than 1.
    seen = (seen + 1e-3).clamp(0.0, 255.0).floor()
    return torch.where(inside[:, None], seen, fill[None, :, None, None])


POINT: dict[str, Callable[[Tensor, Strength], Tensor]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "contrast": _contrast,
    "brightness": _brightness,
}
FILTERS: dict[str, Callable[[Tensor, Strength], Tensor]] = {
    "color": _color,
    "sharpness": _sharpness,
}
AFFINE: dict[str, Callable[[Strength, int, int], Tensor]] = {
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
OPERATIONS = (*POINT, *FILTERS, *AFFINE)
"""Kinds lie together, so that sorting samples by operation makes each kind one run of them."""
IDENTITY = "identity"
WITHOUT_COLOUR = (
    IDENTITY, "auto_contrast", "brightness", "sharpness", "equalize",
    "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
)  # fmt: skip
"""ALBEF's ten (Li et al. 2021, section 3.5): none that changes the colours that captions name."""


@dataclass(frozen=True)
class RandAugment:
    """`num_ops` of fifteen operations in turn, each done with probability `p`.

    For views that fill their tensor: put it after the crop.
    """

    magnitude: float = 9.0
    """Mean strength, 0..10. DeiT: 9."""
    num_ops: int = 2
    """Operations drawn per image, with replacement."""
    magnitude_std: float = 0.5
    """Standard deviation of the strength, on the same scale. DeiT: 0.5."""
    ranges: Ranges = Ranges()
    """What a strength means."""
    p: float = 0.5
    """Probability of each drawn operation. timm: 0.5."""
    interpolation: Interpolation = Interpolation.bicubic
    """DeiT: bicubic."""
    fill: tuple[float, float, float] = IMAGENET_MEAN
    """RGB 0..1 of what an affine operation uncovers."""
    operations: tuple[str, ...] = OPERATIONS
    """Those that are drawn from, by the names of `OPERATIONS`; "identity" is none."""

    @property
    def draws(self) -> int:
        return DRAWS_PER_OP * self.num_ops

    def parameters(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Operation, level and sign, each `(B, num_ops)`, for u (B, draws).

        Operations are int64 positions in `OPERATIONS`, its length where none is done.
        """
        which, done, strength, side = u.view(len(u), self.num_ops, DRAWS_PER_OP).unbind(2)
        count = len(OPERATIONS)
        places = [count if o == IDENTITY else OPERATIONS.index(o) for o in self.operations]
        drawn = (which * len(places)).to(torch.int64)
        if self.operations != OPERATIONS:
            drawn = torch.tensor(places, device=u.device)[drawn]
        operation = torch.where(done < self.p, drawn, count)
        normal = torch.special.ndtri(strength.clamp(min=2**-25))  # finite at 0
        level = (self.magnitude + self.magnitude_std * normal).clamp(0.0, LARGEST)
        return operation, level, torch.where(side < 0.5, 1.0, -1.0)

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        operation, level, sign = self.parameters(u)
        by_operation = operation.argsort(dim=0)
        numbers = torch.arange(len(OPERATIONS), device=u.device)
        drawn = (operation[..., None] == numbers).sum(0)  # (num_ops, 15)
        images = images.clone()
        # The sizes of the groups: the only thing that the host waits for.
        for step, counts in enumerate(drawn.tolist()):
            rows = by_operation[: sum(counts), step]
            strength = Strength(level[:, step], sign[:, step], self.ranges).part(rows)
            self._step(images, rows, strength, counts)
        return images

    def _step(
        self, images: Tensor, rows: Tensor, strength: Strength, counts: Sequence[int]
    ) -> None:
        """One operation on the samples `rows`, sorted by operation, of `images` in place."""
        ends = (len(POINT), len(POINT) + len(FILTERS), len(OPERATIONS))
        start = 0
        for change, first, end in zip((self._point, self._filter, self._affine), (0, *ends), ends):
            kind = counts[first:end]
            stop = start + sum(kind)
            if stop > start:
                mine = rows[start:stop]
                levels = (images.index_select(0, mine) * 255.0).round_().clamp_(0.0, 255.0)
                part = Strength(strength.level[start:stop], strength.sign[start:stop], self.ranges)
                changed = change(levels, part, kind)
                images.index_copy_(0, mine, changed.mul_(1.0 / 255.0))
            start = stop

    def _point(self, levels: Tensor, strength: Strength, counts: Sequence[int]) -> Tensor:
        groups = zip(POINT.values(), levels.split(counts), strength.split(counts))
        tables = [
            build(part, how).expand(-1, levels.shape[1], -1)
            for build, part, how in groups
            if len(part)
        ]
        return look_up(levels, torch.cat(tables))

    def _filter(self, levels: Tensor, strength: Strength, counts: Sequence[int]) -> Tensor:
        groups = zip(FILTERS.values(), levels.split(counts), strength.split(counts))
        return torch.cat([change(part, how) for change, part, how in groups if len(part)])

    def _affine(self, levels: Tensor, strength: Strength, counts: Sequence[int]) -> Tensor:
        height, width = levels.shape[-2:]
        groups = zip(AFFINE.values(), strength.split(counts))
        matrices = torch.cat([place(how, height, width) for place, how in groups if len(how.level)])
        fill = (levels.new_tensor(self.fill) * 255.0).round()
        return affine_sample(levels, matrices, fill, self.interpolation)


ALBEF_RANDOM = RandAugment(
    magnitude=7.0,
    magnitude_std=0.0,
    ranges=Ranges(increasing=False, translate_pixels=10.0),
    interpolation=Interpolation.bilinear,
    fill=(128 / 255, 128 / 255, 128 / 255),
    operations=WITHOUT_COLOUR,
)
"""ALBEF's two operations at a fixed strength of 7: shifts of 7 pixels, brightness and sharpness
times 1.36 (official code, whose auto-contrast overflows: here it does not)."""
