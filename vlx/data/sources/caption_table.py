"""Tables of image path and caption, and the caption files of Flickr8k and Flickr30k."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from vlx.core.errors import DataError, nearest
from vlx.data.captioned_files import CaptionedFiles, Listing, folders_in, listing_index
from vlx.data.config import DataConfig

_TOKENS = ("Flickr8k.token.txt", "results_20130124.token")
_TABLES = ("results.csv", "captions.txt", "captions.csv", "captions.tsv")
_DELIMITERS = ("\t", "|", ",")
_FLICKR30K = {"image": "image_name", "caption": "comment"}  # what results.csv calls them
_SYNONYMS = {"val": "dev", "valid": "dev", "validation": "dev", "dev": "val"}


class CaptionTable(CaptionedFiles):
    """`path` is a table, or a folder that holds one; rows of one image are captions of it.

    A table has a header that names `data.image_column` and `data.caption_column`, and tabs, `|` or
    commas between columns. Paths are relative to the table's folder, or to the folder beside it
    that holds the images. A folder holds `{split}.csv` or `{split}.tsv`, or a file for all splits:
    Flickr8k.token.txt or results_20130124.token (`FILE#NUMBER<tab>CAPTION`), results.csv,
    captions.txt, captions.csv or captions.tsv. Then a list of images makes a split:
    Flickr_8k.trainImages.txt or train.txt, a file name a line; the split `all` needs no list.
    `{split}` in the path becomes the split's name.
    """

    def __init__(self, cfg: DataConfig, split: str) -> None:
        file, images = _find(cfg, split)
        columns = (cfg.image_column, cfg.caption_column)
        words = [*columns, split if images else ""]

        def read() -> Listing:
            listing = _read_tokens(file) if file.name in _TOKENS else _read_table(file, columns)
            return _only(listing, images) if images else listing

        index = listing_index([file, *([images] if images else [])], words, read)
        # Flickr8k's archives unpack to two folders side by side: the texts and the images.
        above = file.parent.parent if file.name in _TOKENS else file.parent
        super().__init__(index, file, _image_folders(file.parent, above), split, cfg.mirror_safe)


def _image_folders(folder: Path, above: Path) -> Iterator[Path]:
    yield from folders_in(folder)
    if above != folder:
        yield from folders_in(above)


def _find(cfg: DataConfig, split: str) -> tuple[Path, Path | None]:
    """The file of captions, and the list of a split's images where one file holds all splits."""
    if cfg.path is None:
        raise DataError("data.path is missing: a CSV or TSV file, or the folder of Flickr8k or 30k")
    root = Path(cfg.path.replace("{split}", split)).expanduser()
    if root.is_file():
        return root, _find_list([root.parent], split) if root.name in _TOKENS else None
    if not root.is_dir():
        raise DataError(f"data.path: {root} does not exist")
    folders = list(folders_in(root, 1))
    own = _first(folders, [f"{split}.csv", f"{split}.tsv"])
    if own is not None:
        return own, None
    whole = _first(folders, [*_TOKENS, *_TABLES])
    if whole is None:
        names = ", ".join([f"{split}.csv", f"{split}.tsv", *_TOKENS, *_TABLES])
        found = ", ".join(sorted(f.name for f in root.iterdir() if f.is_file())[:5]) or "no file"
        raise DataError(
            f"{root} holds no captions of split '{split}'. Looked for {names}; found {found}"
        )
    return whole, _find_list(folders, split)


def _first(folders: list[Path], names: list[str]) -> Path | None:
    places = (folder / name for name in names for folder in folders)
    return next((place for place in places if place.is_file()), None)


def _find_list(folders: list[Path], split: str) -> Path | None:
    """The list of a split's images; None for `all`.

    Raises:
        DataError: there is none.
    """
    if split == "all":
        return None
    words = [split, *([_SYNONYMS[split]] if split in _SYNONYMS else [])]
    patterns = [f(word) for word in words for f in ("*.{}Images.txt".format, "{}.txt".format)]
    for pattern in patterns:
        for folder in folders:
            for file in sorted(folder.glob(pattern)):
                return file
    raise DataError(
        f"{folders[0]} has no list of the images of split '{split}' (looked for "
        f"{', '.join(patterns)}). Without lists: data.train_split=all:train "
        "data.test_split=all:test"
    )


def _lines(file: Path) -> Iterator[str]:
    """Lines that may not be UTF-8: a caption keeps its bytes, and is named when it is read."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        yield from stream


class _Rows:
    """Collects captions by image, in order of appearance."""

    def __init__(self) -> None:
        self.listing = Listing()
        self._rows: dict[str, int] = {}

    def add(self, image: str, caption: str | None) -> None:
        row = self._rows.setdefault(image, len(self._rows))
        if row == len(self.listing.names):
            self.listing.names.append(image)
            self.listing.texts.append([])
        self.listing.texts[row].append(caption)


def _read_tokens(file: Path) -> Listing:
    """Lines of `FILE#NUMBER<tab>CAPTION`."""
    rows, seen = _Rows(), set[str]()
    for number, line in enumerate(_lines(file), 1):
        key, tab, caption = line.rstrip("\r\n").partition("\t")
        image = key.rpartition("#")[0]
        if not line.strip():
            continue
        if not image:
            rows.listing.fault("lines without FILE#NUMBER", f"line {number}")
        elif key in seen:
            rows.listing.fault("repeated ids", key)
        else:
            seen.add(key)
            rows.add(image, caption if tab else None)
    return rows.listing


def _read_table(file: Path, columns: tuple[str, str]) -> Listing:
    lines = _lines(file)
    header = next(lines, "")
    delimiter = _delimiter(header, columns[0])
    image, caption, width = _columns(file, header, delimiter, columns)
    rows = _Rows()
    # Flickr30k's results.csv writes quotation marks as they are; the others follow the CSV rules.
    quoting = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return rows.listing
        except csv.Error as error:
            rows.listing.fault("unreadable rows", f"line {reader.line_num + 1}: {error}")
            continue
        if not values:
            continue
        if image >= len(values) or not values[image].strip():
            rows.listing.fault("rows without an image", f"line {reader.line_num + 1}")
            continue
        if caption == width - 1:  # the last column: what is behind it is its own
            values[caption:] = [delimiter.join(values[caption:])] if len(values) > caption else []
        rows.add(values[image].strip(), values[caption] if caption < len(values) else None)


def _delimiter(header: str, image_column: str) -> str:
    """What stands between columns: what the image column's name is found between."""
    for delimiter in _DELIMITERS:
        names = _names(header, delimiter)
        if len(names) > 1 and (image_column in names or _FLICKR30K["image"] in names):
            return delimiter
    return max(_DELIMITERS, key=header.count)


def _names(header: str, delimiter: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]


def _columns(
    file: Path, header: str, delimiter: str, columns: tuple[str, str]
) -> tuple[int, int, int]:
    """Places of the image and of the caption, and the number of columns."""
    names = _names(header, delimiter)
    places = []
    for key, wanted in zip(("image", "caption"), columns):
        default = wanted == getattr(DataConfig, f"{key}_column")
        name = _FLICKR30K[key] if default and wanted not in names else wanted
        if name not in names:
            raise DataError(
                f"data.{key}_column: {file} has no column '{wanted}' in its header. "
                f"{nearest(wanted, names)}"
            )
        places.append(names.index(name))
    return places[0], places[1], len(names)


def _only(listing: Listing, images: Path) -> Listing:
    """The images that a list names, with or without their suffixes, in the listing's order."""
    named = dict.fromkeys(line.strip() for line in _lines(images) if line.strip())
    result = Listing(faults=listing.faults)
    found: set[str] = set()
    for name, texts in zip(listing.names, listing.texts):
        for written in (name, name.rpartition(".")[0]):
            if written in named:
                found.add(written)
                result.names.append(name)
                result.texts.append(texts)
                break
    for name in named:
        if name not in found:  # counted as unreadable, as an image whose captions are empty is
            result.names.append(name)
            result.texts.append([])
    return result
