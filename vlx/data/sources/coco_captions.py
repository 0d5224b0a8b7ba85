"""COCO's captions, in the files that COCO publishes and in Karpathy's splits of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlx.core.errors import DataError, nearest
from vlx.data.captioned_files import CaptionedFiles, Listing, folders_in, listing_index
from vlx.data.captions import Text, as_texts
from vlx.data.config import DataConfig
from vlx.data.split_hint import split_hint

_KARPATHY = ("dataset_coco.json", "dataset_flickr30k.json", "dataset_flickr8k.json")


class CocoCaptions(CaptionedFiles):
    """`path` is a folder of annotations/captions_{split}2017.json and {split}2017/, or a JSON file.

    A folder may hold another year; of several, the last is taken. Without such files, it may hold
    one of Karpathy's: dataset_coco.json, dataset_flickr30k.json. Their splits are train, val, test
    and, for COCO, restval; `train+restval` is both, on which most papers train. `{split}` in the
    path becomes the split's name. `data.caption_column` is the key of an annotation's caption, or
    of one of Karpathy's sentences, where it is not `caption` or `raw`. Where an id comes twice, the
    first holds.
    """

    def __init__(self, cfg: DataConfig, split: str) -> None:
        file = _find(cfg, split)
        column = cfg.caption_column
        index = listing_index([file], [column, split], lambda: _read(file, split, cfg))
        super().__init__(index, file, _image_folders(file), split, cfg.mirror_safe)


def _find(cfg: DataConfig, split: str) -> Path:
    if cfg.path is None:
        raise DataError("data.path is missing: the folder that holds annotations/, or a JSON file")
    root = Path(cfg.path.replace("{split}", split)).expanduser()
    if root.is_file():
        return root
    if not root.is_dir():
        raise DataError(f"data.path: {root} does not exist")
    places = (root / "annotations", root)
    published = sorted(file for place in places for file in place.glob("captions_*.json"))
    chosen = [f for f in published if f.stem.rstrip("0123456789") == f"captions_{split}"]
    karpathy = [place / name for place in places for name in _KARPATHY if (place / name).is_file()]
    if chosen:
        return chosen[-1]
    if karpathy and not published:
        return karpathy[0]
    # Not both at once: Karpathy's test images are among the published training images.
    found = ", ".join(f.name for f in [*published, *karpathy]) or "neither"
    raise DataError(
        f"{root}: no captions of split '{split}'. Looked for [annotations/]captions_{split}*.json, "
        f"then {', '.join(_KARPATHY)}; found {found}. data.path=FILE.json names one"
    )


def _image_folders(file: Path) -> Iterator[Path]:
    base = file.parent.parent if file.parent.name == "annotations" else file.parent
    part = file.stem.removeprefix("captions_")
    yield from (base / part, base / "images" / part, base / "images")
    yield from folders_in(base)


def _read(file: Path, split: str, cfg: DataConfig) -> Listing:
    column = cfg.caption_column
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig", "surrogateescape"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(f"{file} has no list 'images': it is neither COCO's nor Karpathy's file")
    if any(isinstance(image, dict) and "sentences" in image for image in images[:1]):
        return _read_karpathy(images, file, split, cfg)
    annotations = content.get("annotations")
    return _read_published(images, annotations if isinstance(annotations, list) else [], column)


def _read_published(images: list[Any], annotations: list[Any], key: str) -> Listing:
    listing, rows, seen = Listing(), dict[int | str, int](), set[int | str]()
    for image in images:
        number, name = _id(image, "id"), image.get("file_name") if isinstance(image, dict) else None
        if number is None or not isinstance(name, str):
            listing.fault("images without id or file_name", image)
        elif number in rows:
            listing.fault("repeated image ids", number)
        else:
            rows[number] = len(listing.names)
            listing.names.append(name)
            listing.texts.append([])
    for annotation in annotations:
        number, image = _id(annotation, "id"), _id(annotation, "image_id")
        if image is None or image not in rows:
            listing.fault("annotations of images that are not listed", image)
        elif number is not None and number in seen:
            listing.fault("repeated annotation ids", number)
        else:
            listing.texts[rows[image]] += as_texts(annotation.get(key))
        if number is not None:
            seen.add(number)
    _check_key(annotations, key)
    return listing


def _id(entry: object, key: str) -> int | str | None:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) else None


def _read_karpathy(images: list[Any], file: Path, split: str, cfg: DataConfig) -> Listing:
    key = "raw" if cfg.caption_column == DataConfig.caption_column else cfg.caption_column
    listing, seen = Listing(), set[str]()
    parts = {str(image.get("split")) for image in images if isinstance(image, dict)}
    wanted = split.split("+")
    for word in wanted:
        if word not in parts:
            raise DataError(
                f"{file} has no split '{word}', but {', '.join(sorted(parts))}. "
                f"{split_hint(cfg, word, sorted(parts))}"
            )
    sentences: list[Any] = []
    for image in images:
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            listing.fault("images without filename", image)
            continue
        if image.get("split") not in wanted:
            continue
        folder = image.get("filepath")
        name = f"{folder}/{image['filename']}" if folder else image["filename"]
        if name in seen:
            listing.fault("repeated images", name)
            continue
        seen.add(name)
        own = image.get("sentences")
        texts: list[Text] = []
        for sentence in own if isinstance(own, list) else []:
            sentences.append(sentence)
            texts += as_texts(sentence.get(key) if isinstance(sentence, dict) else None)
        listing.names.append(name)
        listing.texts.append(texts)
    _check_key(sentences, key)
    return listing


def _check_key(entries: list[Any], key: str) -> None:
    """Raise `DataError` where no entry has `key`: another kind of file, or another key."""
    if entries and not any(isinstance(entry, dict) and key in entry for entry in entries):
        keys = entries[0] if isinstance(entries[0], dict) else ()
        raise DataError(f"data.caption_column: no annotation has '{key}'. {nearest(key, keys)}")
