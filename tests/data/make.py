"""Real image files, good and damaged, and folders of them, made when a test runs."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlx.core.fields import LABEL, Needs, ViewSpec
from vlx.data.config import DataConfig
from vlx.ops.augment import HorizontalFlip, RandomResizedCrop

CROP_AND_FLIP = Needs(
    views=(ViewSpec("image", ops=(RandomResizedCrop(), HorizontalFlip()), size=16),),
    fields=(LABEL,),
)


def picture(number: int, side: int = 20) -> np.ndarray:
    """(side, side, 3) uint8: smooth, and different for every number."""
    y, x = np.mgrid[0:side, 0:side] / side
    wave = np.sin(6 * (x + 0.13 * number) + 4 * y * (1 + number % 3))
    planes = [wave * 100 + 128, 255 * x, 255 * ((y + number / 7) % 1)]
    return np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)


def encode(array: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format, **options)
    return stream.getvalue()


def jpeg(number: int, side: int = 20) -> bytes:
    return encode(picture(number, side), "JPEG", quality=95)


def truncated_jpeg(number: int = 0) -> bytes:
    whole = jpeg(number, 64)
    return whole[: len(whole) // 2]


HTML = b"<!DOCTYPE html><html><body>404 not found</body></html>"


def image_tree(
    root: Path, per_class: int = 8, classes: tuple[str, ...] = ("ant", "bee", "cat")
) -> Path:
    """root/{train,test}/CLASS/NUMBER.png; the test split is half as large."""
    for split, count in (("train", per_class), ("test", per_class // 2)):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                number = c * 100 + i + (50 if split == "test" else 0)
                (folder / f"{i:03d}.png").write_bytes(encode(picture(number)))
    return root


def domain_tree(root: Path, sizes: dict[str, int]) -> Path:
    """root/DOMAIN/{ant,bee}/NUMBER.png; so many of each class in each domain."""
    for d, (domain, count) in enumerate(sizes.items()):
        for c, name in enumerate(("ant", "bee")):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i:03d}.png").write_bytes(encode(picture(d * 1000 + c * 100 + i)))
    return root


def add_to_tar(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def shard(file: Path, numbers: range, labels: str = "cls") -> Path:
    """A WebDataset shard of `numbers`; a label is the number modulo 3."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number in numbers:
            add_to_tar(tar, f"{number:05d}.png", encode(picture(number)))
            if labels == "cls":
                add_to_tar(tar, f"{number:05d}.cls", str(number % 3).encode())
            elif labels == "json":
                add_to_tar(tar, f"{number:05d}.json", b'{"label": %d}' % (number % 3))
    return file


def config(**keys: Any) -> DataConfig:
    """A data config that reads in the test's own process."""
    return DataConfig(**{"workers": 0, **keys})
