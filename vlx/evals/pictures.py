"""Grids of images with column titles, enlarged without smoothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP = 6
_TITLE = 22
_TARGET_SIDE = 96


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
    """Rows of equal pictures; titles are (column, text); extra space before one column."""
    width = max(p.width for row in rows for p in row)
    height = max(p.height for row in rows for p in row)
    columns = max(len(row) for row in rows)

    def left(column: int) -> int:
        wide = 3 * _GAP if 0 <= gap_before <= column else 0
        return _GAP + column * (width + _GAP) + wide

    canvas = Image.new(
        "RGB", (left(columns), _TITLE + len(rows) * (height + _GAP) + _GAP), (255, 255, 255)
    )
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13)
    for column, text in titles:
        draw.text((left(column), 4), text, fill=(30, 30, 30), font=font)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            canvas.paste(picture, (left(c), _TITLE + r * (height + _GAP)))
    return canvas
