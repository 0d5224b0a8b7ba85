"""Encoded images to uint8 RGB: one function, so that its semantics are pinned in one place."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFile, ImageOps

Image.MAX_IMAGE_PIXELS = None  # the limit is the caller's `max_pixels`, an error, not a warning
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of what is decoded. It knows some forty more by their content, whatever a file's
name, and one of them (EPS) starts a program. Those that a build of it lacks are left out."""
# torchvision's data sets open files themselves, by this list.
Image.init()
FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)
Image.ID[:] = [name for name in Image.ID if name in FORMATS]
_MAX_BYTES = 512 * 2**20  # of one decoded image; several workers hold one each


def decode_image(
    data: bytes | np.ndarray | Image.Image,
    max_pixels: int = 178_956_970,
    max_side: int | None = None,
) -> np.ndarray:
    """Encoded bytes, or an open PIL image, to (H, W, 3) uint8 RGB, EXIF orientation applied.

    The first frame of an animation; transparency is laid over white; CMYK and greyscale become
    RGB; 16-bit greyscale is scaled to 8 bits, 16-bit colour keeps its high byte (PIL reads no
    more). Sides over `max_side` are reduced, antialiased. An array is checked and returned.

    Raises:
        ValueError: damaged or truncated data, a format that is not in `FORMATS`, more than
            `max_pixels` pixels, or more than 512 MiB of them.
    """
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3:
            raise ValueError(f"image array must be (H, W, 3) uint8, got {data.shape} {data.dtype}")
        return data
    if isinstance(data, Image.Image):
        return _finish(data, max_pixels, max_side)
    if not data:
        raise ValueError("empty file")
    # Some libraries set this for the whole process; a grey lower half is not the image.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _finish(image, max_pixels, max_side)
    except Image.UnidentifiedImageError:
        raise ValueError(
            f"not an image of a format that is read; it begins with {data[:16]!r}"
        ) from None
    except ValueError:
        raise
    except Exception as error:  # PIL raises many kinds for damaged files
        raise ValueError(str(error) or type(error).__name__) from error


def _finish(image: Image.Image, max_pixels: int, max_side: int | None) -> np.ndarray:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width}x{height} is over the limit of {max_pixels} pixels")
    if max_side is not None and max(width, height) > max_side:
        image.draft("RGB", (max_side, max_side))  # a JPEG decoder halves while it reads
    size = image.width * image.height * _bytes_per_pixel(image.mode)
    if size > _MAX_BYTES:
        raise ValueError(
            f"{width}x{height} takes {size >> 20} MiB to decode, over the limit of "
            f"{_MAX_BYTES >> 20}: reduce it"
        )
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    upright = _to_rgb(image)
    if max_side is not None and max(upright.size) > max_side:
        upright.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return np.asarray(upright)


def _bytes_per_pixel(mode: str) -> int:
    """As Pillow keeps a picture, with the copies that `_to_rgb` makes of it beside."""
    if mode in ("1", "L", "P"):
        return 1 + 4  # the RGB that it becomes
    if mode in ("RGB", "RGBX"):
        return 4
    return 12 if mode in ("RGBA", "LA", "PA") else 8


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray((values / 257.0).round().clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
