"""Grids of images and texts with column titles; images are enlarged without smoothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP = 6
_TITLE = 22
_TARGET_SIDE = 96
_FRAME = 3
_LETTERS = 12
_LINE = 16

Colour = tuple[int, int, int]
BLACK: Colour = (30, 30, 30)
GREY: Colour = (200, 200, 200)
GREEN: Colour = (0, 150, 60)
RED: Colour = (200, 60, 40)
WHITE: Colour = (255, 255, 255)


def to_picture(image: Tensor, side: int = _TARGET_SIDE) -> Image.Image:
    """(3, H, W) in 0..1 to a PIL image of about `side` pixels, by whole nearest-neighbour steps."""
    array = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(np.ascontiguousarray(array))
    factor = max(1, round(side / max(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def grid(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[tuple[int, str]], gap_before: int = -1
) -> Image.Image:
    """Rows of pictures, columns as wide as their widest; titles are (column, text); extra space
    before one column."""
    columns = max(len(row) for row in rows)
    widths = [max(row[c].width for row in rows if len(row) > c) for c in range(columns)]
    height = max(p.height for row in rows for p in row)

    def left(column: int) -> int:
        wide = 3 * _GAP if 0 <= gap_before <= column else 0
        return _GAP + sum(widths[:column]) + column * _GAP + wide

    canvas = Image.new("RGB", (left(columns), _TITLE + len(rows) * (height + _GAP) + _GAP), WHITE)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13)
    for column, text in titles:
        draw.text((left(column), 4), text, fill=BLACK, font=font)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            canvas.paste(picture, (left(c), _TITLE + r * (height + _GAP)))
    return canvas


def framed(picture: Image.Image, colour: Colour) -> Image.Image:
    """The picture with a frame drawn around it."""
    canvas = Image.new("RGB", (picture.width + 2 * _FRAME, picture.height + 2 * _FRAME), colour)
    canvas.paste(picture, (_FRAME, _FRAME))
    return canvas


def text_panel(
    texts: Sequence[tuple[str, Colour]], *, width: int, height: int, frames: bool = False
) -> Image.Image:
    """Texts below each other, each broken over the lines that its share of the height has, in
    frames of their colours or in letters of it."""
    canvas = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(canvas)
    share = height // len(texts)
    for row, (text, colour) in enumerate(texts):
        top = row * share
        if frames:
            draw.rectangle((0, top, width - 1, top + share - 3), outline=colour, width=2)
        lines = _wrap(text, width - 2 * _GAP, max(1, (share - 2) // _LINE))
        for number, line in enumerate(lines):
            place = (_GAP, top + 1 + number * _LINE)
            draw.text(place, line, fill=BLACK if frames else colour, font=_font())
    return canvas


def bar_panel(
    title: str, bars: Sequence[tuple[str, float, Colour]], *, width: int, height: int
) -> Image.Image:
    """A line of text above horizontal bars (name, value, colour), the largest as wide as fits."""
    canvas = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(canvas)
    share = height // (len(bars) + 1)
    draw.text((0, 0), _wrap(title, width, 1)[0], fill=BLACK, font=_font())
    half = width // 2
    largest = max(max(value for _, value, _ in bars), 1e-6)
    for row, (name, value, colour) in enumerate(bars, start=1):
        top = row * share
        draw.text((0, top), _wrap(name, half - _GAP, 1)[0], fill=BLACK, font=_font())
        long = round(max(0.0, value / largest) * (half - 48))
        draw.rectangle((half, top + 3, half + max(1, long), top + share - 3), fill=colour)
        draw.text((half + long + 6, top), f"{value:.3f}", fill=BLACK, font=_font())
    return canvas


@lru_cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans as matplotlib carries it (Pillow's own has no letters beyond ASCII)."""
    spec = importlib.util.find_spec("matplotlib")  # finds the package without running it
    for place in (spec.submodule_search_locations if spec else None) or ():
        file = Path(place) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), _LETTERS)
    return ImageFont.load_default(size=_LETTERS)


def _wrap(text: str, width: int, most: int) -> list[str]:
    """At most `most` lines of `width` pixels; what does not fit ends in three dots."""
    lines, rest = [], text.split()
    while rest and len(lines) < most:
        count = len(rest)
        while count > 1 and _font().getlength(" ".join(rest[:count])) > width:
            count -= 1
        lines.append(" ".join(rest[:count]))
        rest = rest[count:]
    if not lines:
        return [""]
    if rest or _font().getlength(lines[-1]) > width:
        last = " ".join([lines[-1], *rest[:1]])
        while last and _font().getlength(f"{last}...") > width:
            last = last[:-1]
        lines[-1] = f"{last.rstrip()}..."
    return lines
