"""torchvision's classification data sets, by class name; downloaded only when asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlx.core.errors import DataError, nearest
from vlx.data.config import DataConfig
from vlx.data.content import combined, content_digests
from vlx.data.overlap import image_digests
from vlx.data.source import Sample, SourceInfo

# How each class takes its split: train=True/False, split=NAME, or not at all (split `all`).
_BY_FLAG = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS")
_BY_NAME = (
    *("SVHN", "STL10", "Flowers102", "Food101", "DTD", "FGVCAircraft", "GTSRB", "OxfordIIITPet"),
    *("PCAM", "RenderedSST2", "StanfordCars", "Country211", "Imagenette", "CLEVRClassification"),
)
_WHOLE = ("EuroSAT", "SUN397", "Caltech101", "Caltech256")
_NAMES = (*_BY_FLAG, *_BY_NAME, *_WHOLE)
# Left and right carry meaning in these: mirrored digits and letters are other signs, or none.
_NOT_MIRROR_SAFE = ("MNIST", "KMNIST", "QMNIST", "USPS", "SVHN", "GTSRB", "RenderedSST2")
_DEFAULT_ROOT = "data"


class Torchvision:
    """`variant` is the class (CIFAR10, Food101, ...), `path` its root folder, `data` by default."""

    def __init__(self, cfg: DataConfig, split: str) -> None:
        if cfg.variant not in _NAMES:
            given = cfg.variant or ""
            raise DataError(
                f"data.variant={given}: no such data set. "
                f"{nearest(given, _NAMES) or 'Known: ' + ', '.join(_NAMES)}"
            )
        self._data = _open(cfg, cfg.variant, split)
        self._variant, self._split = cfg.variant, split
        self._root = Path(cfg.path or _DEFAULT_ROOT)
        targets = _targets(self._data)
        self._labels = None if (targets < 0).all() else targets
        self.info = SourceInfo(
            name=cfg.variant,
            split=split,
            num_samples=len(self._data),
            fields=("image",) if self._labels is None else ("image", "label"),
            class_names=() if self._labels is None else _class_names(self._data, targets),
            fingerprint=_fingerprint(self._data, cfg.variant, self._root, targets),
            mirror_safe=cfg.variant not in _NOT_MIRROR_SAFE,
        )

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> Sample:
        image, _ = self._data[index]
        sample: Sample = {"image": image if isinstance(image, Image.Image) else np.asarray(image)}
        if self._labels is not None:
            sample["label"] = int(self._labels[index])
        return sample

    def describe(self, index: int) -> str:
        return f"{self._variant} {self._split} {index}"

    def column(self, name: str) -> Iterator[bytes | None]:
        """`file`: every image's path below the root, the same wherever that lies."""
        files = [] if _in_memory(self._data) else _files(self._data, self._variant)
        if name != "file" or len(files) != len(self):
            raise DataError(
                f"data.split_column: {self._variant} has no column '{name}'"
                + (": it has 'file' alone" if len(files) == len(self) else "")
            )
        return (os.path.relpath(file, self._root).encode() for file in files)

    def contents(self) -> np.ndarray:
        """(N, 32) uint8: digests of the pixels where all are in memory, or else of the files.

        One file that holds every image (PCAM) is told apart by the row.
        """
        if _in_memory(self._data):
            return image_digests(np.asarray(image).tobytes() for image in self._data.data)
        files = _files(self._data, self._variant)
        found = content_digests(self._root, files)
        if len(files) == len(self):
            return found
        return image_digests(found.tobytes() + str(row).encode() for row in range(len(self)))

    def labels(self) -> np.ndarray | None:
        return self._labels


def _open(cfg: DataConfig, variant: str, split: str) -> Any:
    from torchvision import datasets

    cls = getattr(datasets, variant)
    root = cfg.path or _DEFAULT_ROOT
    words: dict[str, Any] = {"download": cfg.download}
    if variant in _BY_FLAG:
        if split not in ("train", "test"):
            raise DataError(f"{variant} has no split '{split}': use train or test")
        words["train"] = split == "train"
    elif variant in _BY_NAME:
        words["split"] = split
    elif split != "all":
        raise DataError(
            f"{variant} has no split '{split}': torchvision has it whole. To hold a fifth out: "
            "data.train_split=all:train data.test_split=all:test data.split_column=file"
        )
    try:
        return cls(root, **words)
    except ValueError as error:  # torchvision names the splits that there are
        raise DataError(f"{variant}: {str(error).splitlines()[0]}") from error
    except (RuntimeError, OSError) as error:
        if cfg.download:
            raise DataError(f"{variant} cannot be downloaded into {root}: {error}") from error
        raise DataError(
            f"{variant} is not in {root}. Type data.download=true to download it, or "
            "data.path=FOLDER where it is"
        ) from error


def _targets(data: Any) -> np.ndarray:
    """(N,) int64, -1 where unlabelled. torchvision has no one name for them."""
    for name in ("targets", "labels", "_labels", "y"):
        if hasattr(data, name):
            return np.asarray(getattr(data, name)).astype(np.int64)
    if hasattr(data, "_samples"):
        return np.array([sample[-1] for sample in data._samples], dtype=np.int64)
    return np.array([int(data[index][1]) for index in range(len(data))], dtype=np.int64)


def _class_names(data: Any, targets: np.ndarray) -> tuple[str, ...]:
    count = int(targets.max()) + 1
    written = getattr(data, "classes", None) or ()
    if len(written) >= count:
        # Some classes have several names (a tuple).
        return tuple(n if isinstance(n, str) else ", ".join(map(str, n)) for n in written)
    return tuple(str(i) for i in range(count))


def _in_memory(data: Any) -> bool:
    """Whether all pixels are in an array."""
    return hasattr(getattr(data, "data", None), "shape")


def _fingerprint(data: Any, variant: str, root: Path, targets: np.ndarray) -> str:
    """Digest of labels and of pixels, where all are in memory, or else of the files."""
    if _in_memory(data):
        array = np.ascontiguousarray(np.asarray(data.data))
        return combined([variant, str(array.shape), targets.tobytes(), array.tobytes()])
    return combined([variant, targets.tobytes()], content_digests(root, _files(data, variant)))


def _files(data: Any, variant: str) -> list[str]:
    """The files that the samples are read from. torchvision has no one name for them either."""
    if variant == "PCAM":
        names = (kind[data._split][0] for kind in data._FILES.values())
        return [str(data._base_folder / name) for name in names]
    if variant == "Caltech101":
        folders = [Path(data.root, "101_ObjectCategories", data.categories[y]) for y in data.y]
        return [str(f / f"image_{n:04d}.jpg") for f, n in zip(folders, data.index)]
    if variant == "Caltech256":
        folders = [Path(data.root, "256_ObjectCategories", data.categories[y]) for y in data.y]
        names = (f"{y + 1:03d}_{n:04d}.jpg" for y, n in zip(data.y, data.index))
        return [str(folder / name) for folder, name in zip(folders, names)]
    for name in ("_image_files", "_images", "_samples", "samples"):
        if hasattr(data, name):
            rows = getattr(data, name)
            return [str(row[0] if isinstance(row, tuple) else row) for row in rows]
    raise DataError(f"{variant}: this torchvision keeps its files where vlx does not find them")
