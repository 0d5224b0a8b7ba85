"""Characters drawn in the DejaVu faces that matplotlib installs, captioned with their names."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from vlx.core.errors import DataError, nearest
from vlx.data.cache import Index, cached_index, digest
from vlx.data.config import DataConfig
from vlx.data.content import code_digest, files_fingerprint
from vlx.data.noise import swapped
from vlx.data.overlap import image_digests
from vlx.data.source import Sample, SourceInfo
from vlx.data.variant import check_range, parse_variant

# A character belongs to the first class whose name stands in its own: "latin small letter e with
# acute" shows a latin small letter. Unicode categories keep out what only sounds like one
# ("square root", a Sm, is no square). Ours: kinds that a picture of 32 pixels shows.
CLASSES: dict[str, tuple[str, ...]] = {
    "latin capital letter": ("Lu",),
    "latin small letter": ("Ll",),
    "greek capital letter": ("Lu", "Lt"),
    "greek small letter": ("Ll",),
    "cyrillic capital letter": ("Lu",),
    "cyrillic small letter": ("Ll",),
    "armenian capital letter": ("Lu",),
    "armenian small letter": ("Ll",),
    "georgian letter": ("Ll", "Lo"),
    "arabic letter": ("Lo",),
    "canadian syllabics": ("Lo",),
    "braille pattern": ("So",),
    "box drawings": ("So",),
    "arrow": ("So", "Sm"),
    "triangle": ("So", "Sm"),
    "square": ("So",),
    "circle": ("So",),
    "star": ("So",),
    "equal to": ("Sm",),
    "digit": ("Nd", "No"),
}
_SIDE = 32
_EM = 25  # pixels: capitals with accents and descenders of nearly all characters fit
_BASELINE = 24
_MARGIN = 1
_TEST_SHARE = 5  # one character of five is in the test split
_REFERENCE = "DejaVuSans"  # the face with the most characters


@dataclass(frozen=True)
class Variant:
    """`data.variant`: e.g. `faces=DejaVuSans+DejaVuSerif,noise=0.2`."""

    faces: tuple[str, ...] = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif")
    """Faces of every split that names none itself."""
    noise: float = 0.0
    """Share of the training samples whose captions are swapped among them, 0..1."""


class Glyphs:
    """Splits `train`, `test` (a fifth of the characters, by hash of the character) and `all`.

    `train:DejaVuSans+DejaVuSerif` takes the faces from the split's name: training on some faces and
    testing on others is a shift of domain; no character is in both splits whatever the faces. A
    sample is a character that the face has; its caption is the character's Unicode name in lower
    case, its label the kind of character (`CLASSES`), its domain the face. Characters that
    DejaVuSans draws alike (Latin, Greek and Cyrillic A) are in the set once, under the first.
    """

    def __init__(self, cfg: DataConfig, split: str) -> None:
        options = parse_variant(cfg.variant, Variant())
        check_range("noise", options.noise, 0, 1)
        part, _, named = split.partition(":")
        files = face_files()
        faces = tuple(dict.fromkeys(named.split("+") if named else options.faces))
        for face in faces:
            if face not in files:
                raise DataError(f"glyphs has no face '{face}'. {nearest(face, files)}")
        index = cached_index(
            "glyphs", _stamp(files), lambda: _scan(files), lambda index: bool(index.meta["faces"])
        )
        codes = index.arrays["codes"]
        test = np.array([_is_test(int(code)) for code in codes])
        chosen = {"train": ~test, "test": test, "all": np.ones_like(test)}.get(part)
        if chosen is None:
            raise DataError(
                f"glyphs has no split '{part}': use train, test or all, with faces after a colon "
                "where you like: train:DejaVuSans+DejaVuSerif"
            )
        rows = [index.meta["faces"].index(face) for face in faces]
        # Ordered by character, then face.
        character, self._domains = np.nonzero((index.arrays["has"][rows] & chosen).T)
        self._codes = codes[character]
        self._labels = index.arrays["labels"][character].astype(np.int64)
        self._files = [str(files[face]) for face in faces]
        noise = options.noise if part == "train" else 0.0
        self._caption_of = swapped(len(self._codes), noise)
        self.info = SourceInfo(
            name="glyphs",
            split=split,
            num_samples=len(self._codes),
            fields=("image", "label", "caption"),
            class_names=tuple(CLASSES),
            fingerprint=digest(_stamp(files), part, *faces, str(noise)),
            mirror_safe=False,
            domain_names=faces,
        )

    def __len__(self) -> int:
        return len(self._codes)

    def read(self, index: int) -> Sample:
        file = self._files[int(self._domains[index])]
        return {
            "image": draw(file, chr(int(self._codes[index]))),
            "label": int(self._labels[index]),
            "caption": self.captions(index),
        }

    def captions(self, index: int) -> list[str]:
        return [_name(int(self._codes[self._caption_of[index]]))]

    def describe(self, index: int) -> str:
        return f"U+{int(self._codes[index]):04X} in {self.info.domain_names[self._domains[index]]}"

    def labels(self) -> np.ndarray:
        return self._labels

    def contents(self) -> np.ndarray:
        """(N, 32) uint8: a digest for each character of each face, which is what is drawn."""
        faces = [self.info.domain_names[face] for face in self._domains]
        return image_digests(f"{c} {face}".encode() for c, face in zip(self._codes.tolist(), faces))

    def domains(self) -> np.ndarray:
        """(N,) int64: every sample's face, a place in `info.domain_names`."""
        return self._domains


def face_files() -> dict[str, Path]:
    """Face name -> file; the two display faces, which have some fifty characters, left out."""
    # Found and not imported: matplotlib costs most of a second of start-up.
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the glyphs' faces come with matplotlib: pip install matplotlib")
    folder = Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
    files = {file.stem: file for file in sorted(folder.glob("DejaVu*.ttf"))}
    if _REFERENCE not in files:
        raise DataError(f"matplotlib's fonts are not in {folder}: reinstall matplotlib")
    return {face: file for face, file in files.items() if not face.endswith("Display")}


def draw(file: str, character: str) -> np.ndarray:
    """(32, 32, 3) uint8, black on white, antialiased: one size and baseline for all characters.

    So a small o is smaller than a capital O, and a superscript higher than a subscript. What would
    not fit is drawn smaller, then moved inside.
    """
    room = _SIDE - 2 * _MARGIN
    em = _EM
    while True:
        font = _font(file, em)
        left, top, right, bottom = font.getbbox(character, anchor="ms")
        if (right - left <= room and bottom - top <= room) or em <= 4:
            break
        em -= 1
    # Pillow's box spans advance and ink: of a braille cell with one dot, the dot keeps its place.
    x = round((_SIDE - left - right) / 2)
    y = max(_MARGIN - top, min(_BASELINE, _SIDE - _MARGIN - bottom))
    image = Image.new("L", (_SIDE, _SIDE), 255)
    ImageDraw.Draw(image).text((x, y), character, fill=0, font=font, anchor="ms")
    return np.repeat(np.asarray(image)[..., None], 3, axis=2)


@lru_cache(maxsize=512)
def _font(file: str, em: int) -> ImageFont.FreeTypeFont:
    # The basic layout: Raqm, where it is installed, would shape Arabic letters otherwise.
    return ImageFont.truetype(file, em, layout_engine=ImageFont.Layout.BASIC)


def _name(code: int) -> str:
    return unicodedata.name(chr(code)).lower()


def _is_test(code: int) -> bool:
    value = hashlib.sha256(chr(code).encode()).digest()
    return int.from_bytes(value[:8], "big") % _TEST_SHARE == 0


def _stamp(files: dict[str, Path]) -> str:
    """Changes with the faces, what draws them, the table of names, and this module's code."""
    folder = next(iter(files.values())).parent
    faces = files_fingerprint(folder, list(files.values()), *files)
    drawn = [Image.__version__, str(features.version("freetype2"))]
    code = code_digest(Path(__file__))
    return digest(unicodedata.unidata_version, *drawn, faces, code)


def _scan(files: dict[str, Path]) -> Index:
    """`codes (N,)`, `labels (N,)` and `has (F, N)`: which of the F faces has which character."""
    from fontTools.ttLib import TTFont

    maps = {face: set(TTFont(file, lazy=True).getBestCmap() or ()) for face, file in files.items()}
    found: dict[bytes, tuple[int, int]] = {}
    for code in sorted(maps[_REFERENCE]):
        label = _class_of(chr(code))
        if label is not None:
            picture = draw(str(files[_REFERENCE]), chr(code))
            if picture.min() < 128:  # U+2800, the braille pattern without dots, is blank
                found.setdefault(picture.tobytes(), (code, label))
    codes = np.array([code for code, _ in found.values()], dtype=np.int32)
    labels = np.array([label for _, label in found.values()], dtype=np.int32)
    has = np.array([[code in maps[face] for code in codes.tolist()] for face in files])
    return Index({"codes": codes, "labels": labels, "has": has}, {"faces": list(files)})


def _class_of(character: str) -> int | None:
    name, category = unicodedata.name(character, "").lower(), unicodedata.category(character)
    for label, (words, categories) in enumerate(CLASSES.items()):
        if category in categories and re.search(rf"\b{words}s?\b", name):
            return label
    return None
