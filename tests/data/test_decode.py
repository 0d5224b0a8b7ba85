"""What decoding means, pinned with real files: pixels, not only shapes."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.data.make import HTML, encode, jpeg, picture, truncated_jpeg
from vlx.data.decode import decode_image

# JPEG is lossy: the smooth pictures come back within a few levels on average.
_JPEG_MEAN_ERROR = 4.0


def mean_error(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_png_comes_back_exactly() -> None:
    np.testing.assert_array_equal(decode_image(encode(picture(1))), picture(1))


def test_an_array_is_returned_as_it_is() -> None:
    array = picture(2)
    assert decode_image(array) is array


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_a_wrong_array_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be"):
        decode_image(array)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (truncated_jpeg(), "truncated"),
        (b"", "empty file"),
        (HTML, "not an image.*DOCTYPE"),
        (b"\xff\xd8\xff" + bytes(200), "not an image"),
        (encode(picture(0))[:100], "."),
    ],
    ids=["truncated-jpeg", "zero-bytes", "html", "jpeg-header-only", "truncated-png"],
)
def test_damaged_data_raises_value_error_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_image(data)


def test_truncated_data_is_refused_even_where_a_library_allowed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="truncated"):
        decode_image(truncated_jpeg())


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    data = encode(np.zeros((300, 300, 3), np.uint8))
    with pytest.raises(ValueError, match="300x300 is over the limit of 80000"):
        decode_image(data, max_pixels=80_000)
    assert decode_image(data, max_pixels=90_000).shape == (300, 300, 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_max_side_reduces_a_large_image_and_keeps_its_shape(format: str) -> None:
    large = picture(3, 200)[:100]  # 100 x 200
    small = decode_image(encode(large, format), max_side=50)
    assert small.shape == (25, 50, 3)
    exact = np.asarray(Image.fromarray(large).resize((50, 25), Image.Resampling.BOX))
    assert mean_error(small, exact) < _JPEG_MEAN_ERROR
    assert decode_image(encode(large, format), max_side=200).shape == (100, 200, 3)


def test_cmyk_jpeg_becomes_the_rgb_that_was_stored() -> None:
    stream = io.BytesIO()
    Image.fromarray(picture(4, 48)).convert("CMYK").save(stream, "JPEG", quality=95)
    assert Image.open(io.BytesIO(stream.getvalue())).mode == "CMYK"
    assert mean_error(decode_image(stream.getvalue()), picture(4, 48)) < _JPEG_MEAN_ERROR


def test_16_bit_grey_png_is_scaled_to_8_bits() -> None:
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = decode_image(encode(values))
    expected = np.round(values / 257.0).astype(np.uint8)
    for channel in range(3):
        np.testing.assert_array_equal(decoded[..., channel], expected)
    assert decoded.min() == 0
    assert decoded.max() == 255


def test_16_bit_rgb_png_keeps_the_high_byte() -> None:
    # PIL writes no such file: a PNG by hand, from its specification.
    values = (picture(5, 16).astype(np.uint16) << 8) | 0x7F

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_image(data), picture(5, 16))


def test_greyscale_fills_three_channels() -> None:
    grey = picture(6)[..., 0]
    np.testing.assert_array_equal(decode_image(encode(grey)), np.stack([grey] * 3, -1))


def test_one_bit_images_are_black_and_white() -> None:
    bits = picture(6)[..., 0] > 128
    decoded = decode_image(encode(bits))
    np.testing.assert_array_equal(decoded[..., 0], np.where(bits, 255, 0))


def test_transparency_is_laid_over_white() -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., :3] = (200, 100, 50)
    rgba[:, 0, 3], rgba[:, 1, 3], rgba[:, 2, 3] = 0, 255, 51
    decoded = decode_image(encode(rgba))
    np.testing.assert_array_equal(decoded[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(decoded[0, 1], [200, 100, 50])
    # 51 / 255 = 0.2 of the colour, 0.8 of white.
    np.testing.assert_allclose(decoded[0, 2], [244, 224, 214], atol=1)


def test_palette_with_transparency_is_laid_over_white() -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=1)
    decoded = decode_image(stream.getvalue())
    expected = [[[255, 0, 0], [255, 255, 255]], [[0, 0, 255], [255, 255, 255]]]
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    colours = [(250, 20, 20), (20, 250, 20), (20, 20, 250)]
    frames = [Image.new("RGB", (12, 10), colour) for colour in colours]
    stream = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(stream, format, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(stream.getvalue())), "n_frames", 1) == 3
    decoded = decode_image(stream.getvalue())
    np.testing.assert_array_equal(decoded, np.full((10, 12, 3), colours[0]))


_STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[::-1],
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x.transpose(1, 0, 2)[:, ::-1],
}
"""How a camera stores an upright picture under each EXIF orientation (TIFF 6.0, tag 274)."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_rotated_photos_come_out_upright(orientation: int, format: str) -> None:
    upright = picture(7, 40)[:24]  # 24 x 40: not square, no symmetry
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(_STORED[orientation](upright))
    data = encode(stored, format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))
    decoded = decode_image(data)
    if format == "PNG":
        np.testing.assert_array_equal(decoded, upright)
    assert mean_error(decoded, upright) < _JPEG_MEAN_ERROR


def test_jpeg_is_near_what_was_stored() -> None:
    assert mean_error(decode_image(jpeg(7, 64)), picture(7, 64)) < _JPEG_MEAN_ERROR


def test_only_formats_that_are_named_are_decoded(tmp_path: Path) -> None:
    """An EPS, whatever its name, would start Ghostscript."""
    stream = io.BytesIO()
    Image.fromarray(picture(5)).save(stream, "EPS")
    file = tmp_path / "photo.jpg"
    file.write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match="not an image of a format that is read"):
        decode_image(stream.getvalue())
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(file)  # as torchvision's data sets do
    for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"):
        assert decode_image(encode(picture(5), name)).shape == picture(5).shape


def test_nothing_in_vlx_opens_an_image_but_decode() -> None:
    files = [file for file in (ROOT / "vlx").rglob("*.py") if "Image.open(" in file.read_text()]
    assert [file.name for file in files] == ["decode.py"]


def test_an_image_that_would_take_gigabytes_is_refused_before_it_is_unpacked() -> None:
    """13300x13300 pixels are under the limit of pixels, and 675 MiB; written by hand, row by row,
    as one deflate stream of zeros."""
    side = 13300
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + 3 * side)) for _ in range(side)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="13300x13300 takes 674 MiB to decode"):
        decode_image(png, max_side=1024)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
