"""A fingerprint is of content: edits that names, sizes and times hide are seen, moves are not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.data.make import config, encode, image_tree, picture, shard
from vlx.core.errors import DataError
from vlx.data import content
from vlx.data.content import code_digest, content_digests
from vlx.data.open import open_source
from vlx.data.training_data import FILE, keep_training_data


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def write_parquet(file: Path, first: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": bmp(first + n), "path": None} for n in range(4)]
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]})
    table.cast_column("image", datasets.Image()).to_parquet(str(file))


def bmp(number: int) -> bytes:
    return encode(picture(number), "BMP")  # of one size, whatever it shows


def folder(root: Path) -> dict[str, Any]:
    for number in range(4):
        file = root / "train" / "ant" / f"{number}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bmp(number))
    return {"source": "folder", "path": str(root)}


def shards(root: Path) -> dict[str, Any]:
    shard(root / "train-0.tar", range(4))
    return {"source": "webdataset", "path": str(root)}


def parquet(root: Path) -> dict[str, Any]:
    write_parquet(root / "train.parquet")
    return {"source": "parquet", "path": str(root)}


def saved(root: Path) -> dict[str, Any]:
    images = [picture(n) for n in range(4)]
    made = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]})
    datasets.DatasetDict({"train": made}).save_to_disk(str(root))
    return {"source": "parquet", "path": str(root)}


def captioned(root: Path) -> dict[str, Any]:
    folder(root)
    rows = "".join(f"train/ant/{n}.bmp,caption {n}\n" for n in range(4))
    (root / "train.csv").write_text(f"image,caption\n{rows}")
    return {"source": "captions", "path": str(root / "train.csv")}


def coco(root: Path) -> dict[str, Any]:
    folder(root)
    images = [{"id": n, "file_name": f"ant/{n}.bmp"} for n in range(4)]
    notes = [{"id": n, "image_id": n, "caption": f"caption {n}"} for n in range(4)]
    (root / "captions_train.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return {"source": "coco", "path": str(root)}


def eurosat(root: Path) -> dict[str, Any]:
    for kind in ("crop", "forest"):
        place = root / "eurosat" / "2750" / kind
        place.mkdir(parents=True)
        (place / "0.png").write_bytes(bmp(0))
    return {"source": "torchvision", "variant": "EuroSAT", "path": str(root), "train_split": "all"}


def caltech101(root: Path) -> dict[str, Any]:
    for kind in ("ant", "bee"):
        place = root / "caltech101" / "101_ObjectCategories" / kind
        place.mkdir(parents=True)
        (place / "image_0001.jpg").write_bytes(bmp(1))
    (place.parent / "BACKGROUND_Google").mkdir()  # torchvision leaves it out
    return {"source": "torchvision", "variant": "Caltech101", "path": str(root)} | {
        "train_split": "all"
    }


def dtd(root: Path) -> dict[str, Any]:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    (base / "images" / "banded").mkdir(parents=True)
    (base / "images" / "banded" / "0.jpg").write_bytes(bmp(0))
    (base / "labels" / "train1.txt").write_text("banded/0.jpg\n")
    return {"source": "torchvision", "variant": "DTD", "path": str(root)}


KINDS = [folder, shards, parquet, saved, captioned, coco, eurosat, caltech101, dtd]


def fingerprint(keys: dict[str, Any]) -> str:
    cfg = config(**keys)
    return open_source(cfg, cfg.train_split).info.fingerprint


def largest(root: Path) -> Path:
    """A file that holds images."""
    files = [file for file in root.rglob("*") if file.is_file()]
    return max(files, key=lambda file: (file.stat().st_size, str(file)))


def change_a_byte(file: Path) -> None:
    """In place, of equal size, with the time of change put back: in the middle of an image."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    with file.open("r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert after.st_ino == before.st_ino


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("racy", [content.RACY_NS, 0])
def test_one_byte_changed_in_place_is_another_fingerprint(
    make: Callable[[Path], dict[str, Any]], racy: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(content, "RACY_NS", racy)  # 0: digests are remembered at once
    keys = make(tmp_path / "data")
    first = fingerprint(keys)
    assert fingerprint(keys) == first
    change_a_byte(largest(tmp_path / "data"))
    assert fingerprint(keys) != first


@pytest.mark.parametrize("make", KINDS)
def test_a_moved_but_equal_folder_has_an_equal_fingerprint(
    make: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    keys = make(tmp_path / "data")
    first = fingerprint(keys)
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere" / "copy")
    moved = str(keys["path"]).replace(str(tmp_path / "data"), str(tmp_path / "elsewhere" / "copy"))
    assert fingerprint(keys | {"path": moved}) == first


def test_a_rewritten_shard_of_equal_name_and_size_gives_other_labels(tmp_path: Path) -> None:
    """The index is of the content, too: labels and places are never those of the old shard."""
    keys = shards(tmp_path)
    file = tmp_path / "train-0.tar"
    first, before = open_source(config(**keys), "train"), file.stat()
    shard(file, range(1, 5))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = open_source(config(**keys), "train")
    assert file.stat().st_size == before.st_size
    assert np.asarray(first.labels()).tolist() == [0, 1, 2, 0]
    assert np.asarray(again.labels()).tolist() == [1, 2, 0, 1]
    assert again.info.fingerprint != first.info.fingerprint


def test_a_rewritten_parquet_file_with_its_time_put_back_is_read_anew(tmp_path: Path) -> None:
    """`datasets` keeps what it made of a file by its path and time."""
    keys = parquet(tmp_path)
    file = tmp_path / "train.parquet"
    before = file.stat()
    assert open_source(config(**keys), "train").read(0)["image"] == bmp(0)
    write_parquet(file, first=10)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_source(config(**keys), "train").read(0)["image"] == bmp(10)


def test_an_image_that_a_table_only_names_counts(tmp_path: Path) -> None:
    root = tmp_path / "data"
    folder(root)
    names = sorted(str(file) for file in root.rglob("*.bmp"))
    rows = [{"bytes": None, "path": name} for name in names]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    file = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pa.table({"image": pa.array(rows, kind), "label": [0] * 4}), file)
    keys = {"source": "parquet", "path": str(file)}
    first = fingerprint(keys)
    change_a_byte(Path(names[2]))
    assert fingerprint(keys) != first


def test_known_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "RACY_NS", 0)
    image_tree(tmp_path / "data")
    files = [str(file) for file in sorted((tmp_path / "data").rglob("*.png"))]
    read: list[str] = []
    original = content._read
    monkeypatch.setattr(content, "_read", lambda file: read.append(file) or original(file))
    found = content_digests(tmp_path / "data", files)
    assert len(read) == len(files)
    for digest, file in zip(found, files):
        assert digest.tobytes() == hashlib.sha256(Path(file).read_bytes()).digest()
    np.testing.assert_array_equal(content_digests(tmp_path / "data", files), found)
    assert len(read) == len(files)
    change_a_byte(Path(files[3]))
    changed = content_digests(tmp_path / "data", files)
    assert read[len(files) :] == [files[3]]
    assert np.flatnonzero((changed != found).any(1)).tolist() == [3]


def test_a_file_that_has_just_changed_is_not_trusted(tmp_path: Path, monkeypatch) -> None:
    """Written twice within a tick of the clock, it would look the same."""
    (tmp_path / "a").write_bytes(b"a")
    state = content._state(os.stat(tmp_path / "a"))
    monkeypatch.setattr(content, "_state", lambda stat: state)  # a clock that stands still
    first = content_digests(tmp_path, [str(tmp_path / "a")])
    (tmp_path / "a").write_bytes(b"b")
    assert content_digests(tmp_path, [str(tmp_path / "a")]).tobytes() != first.tobytes()


def test_files_that_are_not_there_are_told_from_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    found = content_digests(tmp_path, [str(tmp_path / "none"), str(tmp_path / "empty")])
    assert found[0].tobytes() == bytes(32)
    assert found[1].tobytes() == hashlib.sha256(b"").digest()
    assert content_digests(tmp_path, []).shape == (0, 32)


def test_a_digest_of_code_looks_at_what_it_does(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    prints = []
    for text in ("x = 1", '"""Text."""\nx = 1  # why', "x = 2"):
        file.write_text(text)
        prints.append(code_digest(file))
    assert prints[0] == prints[1] != prints[2]


def test_a_run_keeps_what_it_was_trained_on_and_refuses_other_data(tmp_path: Path) -> None:
    keys = folder(tmp_path / "data")
    first = open_source(config(**keys), "train").info
    keep_training_data(tmp_path, first)
    keep_training_data(tmp_path, first)
    change_a_byte(tmp_path / "data" / "train" / "ant" / "0.bmp")
    now = open_source(config(**keys), "train").info
    with pytest.raises(DataError) as caught:
        keep_training_data(tmp_path, now)
    message = str(caught.value)
    assert first.fingerprint in message
    assert now.fingerprint in message
    assert "train/train" in message
    assert "\n" not in message
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DataError, match=r"data\.json does not say"):
        keep_training_data(tmp_path, first)
