"""Captions of every kind of file, good and damaged, made here; emoji of the shared folder."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SHARED_DATA
from tests.data.make import add_to_tar, config, encode, picture
from vlx.core.errors import DataError
from vlx.data.captioned_files import CaptionedFiles
from vlx.data.captions import as_bytes, caption_stats, captioned, clean
from vlx.data.held_out import HeldOut
from vlx.data.host import BadSamples, Draw, HostDataset, read_batches
from vlx.data.open import open_source
from vlx.data.overlap import INCIDENTAL, trained_on
from vlx.data.source import Captioned, Source
from vlx.data.subset import Subset, evenly

NOT_UTF8 = "caf\xe9".encode("latin-1")


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def opened(split: str = "train", **keys: Any) -> Source:
    return open_source(config(**keys), split)


def captions(source: Source, index: int) -> list[str]:
    """A sample's captions, which its sample holds too."""
    assert isinstance(source, Captioned)
    assert "caption" in source.info.fields
    found = source.captions(index)
    assert source.read(index)["caption"] == found
    return found


def reasons(source: Source, **keys: Any) -> dict[int, str]:
    """What a run counts as unreadable, at a limit that no number of them passes."""
    cfg = config(corrupt_limit=1.0, **keys)
    bad = BadSamples(len(source), cfg.corrupt_limit)
    for batch in read_batches(source, cfg, 0, [Draw(np.arange(len(source)), None)]):
        bad.add(batch.bad)
    return bad.reasons


# --- cleaning and counting


def test_captions_are_stripped_and_the_unusable_left_out() -> None:
    assert clean([" a cat \n", "", None, b"\xef\xbb\xbfa dog", NOT_UTF8]) == ["a cat", "a dog"]
    assert clean(["ﬁancé 👩‍🚀"]) == ["ﬁancé 👩‍🚀"]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ([], "no caption"),
        ([None], "no caption"),
        (["", "  \t"], "empty caption"),
        ([NOT_UTF8], "caption is not UTF-8: byte 0xe9 at 3"),
        ([NOT_UTF8.decode("utf-8", "surrogateescape")], "not UTF-8: byte 0xe9 at 3"),
        (["half \ud83d"], "not UTF-8: byte 0xed at 5"),
    ],
)
def test_a_sample_without_a_usable_caption_says_why(texts: list[Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        clean(texts)


def test_bytes_that_are_not_utf8_survive_reading_as_text() -> None:
    assert as_bytes(NOT_UTF8.decode("utf-8", "surrogateescape")) == NOT_UTF8


def test_stats_count_captions_duplicates_and_what_is_left_out(tmp_path: Path) -> None:
    texts = [["a cat", "a black cat"], ["a cat", ""], [" "], ["dog", "dog", "dog"]]
    stats = caption_stats(parquet(tmp_path, texts))
    assert (stats.samples, stats.captions, stats.fewest, stats.most) == (4, 6, 1, 3)
    assert (stats.longest, stats.duplicates, stats.left_out) == (3, 3, 1)
    assert len(stats.unusable) == 1
    assert "row 2: empty caption" in stats.unusable[0]
    assert str(stats) == (
        "6 for 4 samples, 1 to 3 a sample (mean 2.00), longest 3 words, duplicates 3, "
        "1 left out of samples that keep others, samples without a usable one 1"
    )
    some = caption_stats(parquet(tmp_path, texts), most=2)
    assert str(some).startswith("5 for 2 of 4 samples, 2 to 3 a sample")


# --- Parquet


def parquet(folder: Path, texts: list[Any], kind: pa.DataType | None = None, **keys: Any) -> Source:
    """Rows of images, and of `texts` in a column `caption`."""
    images = [{"bytes": encode(picture(n)), "path": None} for n in range(len(texts))]
    columns = {"image": pa.array(images), "caption": pa.array(texts, kind)}
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=2)
    return opened(source="parquet", path=str(folder / "train.parquet"), **keys)


def test_a_column_of_texts_and_one_of_lists(tmp_path: Path) -> None:
    single = parquet(tmp_path, ["a cat", " a dog "])
    assert captions(single, 1) == ["a dog"]
    lists = parquet(tmp_path, [["a cat"], ["a dog", "brown"], ["bird"]])
    assert captions(lists, 1) == ["a dog", "brown"]
    assert captions(pickle.loads(pickle.dumps(lists)), 2) == ["bird"]


def test_captions_are_read_without_the_image(tmp_path: Path) -> None:
    texts = ["a cat", "a dog"]
    columns = {"image": pa.array([{"bytes": b"", "path": "/no/such.png"}] * 2), "caption": texts}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    source = opened(source="parquet", path=str(tmp_path))
    assert captioned(source) is source
    assert isinstance(source, Captioned)
    assert source.captions(1) == ["a dog"]


def test_a_caption_column_is_asked_for_or_absent(tmp_path: Path) -> None:
    parquet(tmp_path, ["a cat"])
    keys: dict[str, Any] = {"source": "parquet", "path": str(tmp_path / "train.parquet")}
    with pytest.raises(DataError, match=r"data\.caption_column.*'captoin'. Did you mean caption"):
        opened(caption_column="captoin", **keys)
    with pytest.raises(DataError, match=r"data\.caption_column.*'image' holds struct"):
        opened(caption_column="image", **keys)
    columns = {"image": pa.array([{"bytes": b"x", "path": None}])}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    source = opened(**keys)
    assert source.info.fields == ("image",)
    assert captioned(source) is None
    assert captioned(Subset(source, np.arange(1))) is None


def test_a_default_column_that_holds_no_text_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert parquet(tmp_path, [1, 2]).info.fields == ("image",)
    assert "'caption' holds int64" in caplog.text


def test_damaged_rows_are_counted_named_and_the_others_kept(tmp_path: Path) -> None:
    raw = pa.array([b"a cat", NOT_UTF8, b" ", None], pa.binary()).view(pa.string())
    columns = {"image": pa.array([{"bytes": encode(picture(0)), "path": None}] * 4), "caption": raw}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    source = opened(source="parquet", path=str(tmp_path / "train.parquet"))
    assert captions(source, 0) == ["a cat"]
    found = reasons(source)
    assert sorted(found) == [1, 2, 3]
    assert "row 1: caption is not UTF-8: byte 0xe9 at 3" in found[1]
    assert "row 2: empty caption" in found[2]
    assert "row 3: no caption" in found[3]


def test_a_row_without_an_image_is_named(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for values, stored in (([None, image()], None), ([{"bytes": None, "path": None}], kind)):
        rows = {"image": pa.array(values, stored), "caption": ["a"] * len(values)}
        pq.write_table(pa.table(rows), tmp_path / "train.parquet")
        source = opened(source="parquet", path=str(tmp_path / "train.parquet"))
        assert list(reasons(source)) == [0]
        assert reasons(source)[0].endswith("row 0: no image")


def test_empty_ones_in_lists_are_counted_when_the_file_is_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = parquet(tmp_path, [["a"], ["b", "c"], ["d", ""], [None, "e"], None])
    assert "2 empty captions left out (first: row 2)" in caplog.text
    assert [captions(source, row) for row in (2, 3)] == [["d"], ["e"]]
    assert list(reasons(source)) == [4]


# --- WebDataset


def tar(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as stream:
        for name, data in members.items():
            add_to_tar(stream, name, data)
    return file


def image(number: int = 0) -> bytes:
    return encode(picture(number))


def shards(folder: Path, **keys: Any) -> Source:
    return opened(source="webdataset", path=str(folder), **keys)


def test_text_members_before_json_and_either_by_name(tmp_path: Path) -> None:
    long = "a cat " * 500  # longer than what is read while shards are indexed
    tar(
        tmp_path / "train-0.tar",
        {
            "a.png": image(),
            "a.txt": long.encode(),
            "a.json": json.dumps({"caption": "of json", "alt": ["x", "y"]}).encode(),
            "b.png": image(),
            "b.json": json.dumps({"caption": ["of json", ""], "alt": "z"}).encode(),
        },
    )
    source = shards(tmp_path)
    assert captions(source, 0) == [long.strip()]
    assert captions(source, 1) == ["of json"]
    assert captions(pickle.loads(pickle.dumps(source)), 1) == ["of json"]
    by_key = shards(tmp_path, caption_column="alt")
    assert [captions(by_key, row) for row in range(2)] == [["x", "y"], ["z"]]
    by_suffix = shards(tmp_path, caption_column="txt")
    assert captions(by_suffix, 0) == [long.strip()]
    with pytest.raises(DataError, match=r"data\.caption_column.*'al'. Did you mean alt"):
        shards(tmp_path, caption_column="al")


def test_the_index_holds_places_and_no_texts(tmp_path: Path) -> None:
    members = {
        f"{n}.{s}": image(n) if s == "png" else b"a text" for n in range(3) for s in ("png", "txt")
    }
    tar(tmp_path / "train-0.tar", members)
    source = shards(tmp_path)
    index = source._index  # pyright: ignore
    assert all(isinstance(array, np.memmap) for array in index.arrays.values())
    assert "a text" not in json.dumps(index.meta)
    assert captions(source, 2) == ["a text"]


def test_a_shard_without_texts_is_counted_image_by_image(tmp_path: Path) -> None:
    texts = {
        f"{n}.{s}": image(n) if s == "png" else b"a text" for n in range(3) for s in ("png", "txt")
    }
    tar(tmp_path / "train-0.tar", texts)
    tar(tmp_path / "train-1.tar", {f"{n}.png": image(n) for n in range(3, 5)})
    source = shards(tmp_path)
    found = reasons(source)
    assert sorted(found) == [3, 4]
    assert found[3].endswith("train-1.tar: 3: no caption, where other samples have one")
    limited = BadSamples(len(source), 0.3)
    with pytest.raises(DataError, match=r"2 of 5 samples are unreadable.*train-1\.tar: 3: no cap"):
        limited.add(HostDataset(source, config(), 0)[Draw(np.arange(5), None)].bad)


def test_damaged_texts_of_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar(
        tmp_path / "train-0.tar",
        {
            "a.png": image(),
            "a.txt": NOT_UTF8,
            "b.png": image(),
            "b.txt": b"\n",
            "c.png": image(),
            "c.json": b'{"caption": null}',
            "d.png": image(),
            "d.json": b'{"caption": ["fine", "", "\xe9"]}',
            "e.png": image(),
            "e.json": b"{broken",
            "f.txt": b"no image",
        },
    )
    source = shards(tmp_path)
    found = reasons(source)
    expected = ["not UTF-8", "empty caption", "no caption", "no caption, where", "no member jpg"]
    assert list(found) == [0, 1, 2, 4, 5]
    for line, reason in zip(found.values(), expected):
        assert reason in line
    assert captions(source, 3) == ["fine"]
    assert "2 captions left out of samples that keep others (first: d: empty cap" in caplog.text


def test_of_members_that_come_twice_in_a_shard_the_first_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "train-0.tar"
    with tarfile.open(file, "w") as archive:
        for name, data in (
            ("a.png", image(0)), ("a.txt", b"first"), ("a.png", image(1)), ("a.txt", b"second"),
            ("b.png", image(2)), ("b.txt", b"other"), ("a.png", image(3)), ("a.txt", b"third"),
        ):  # fmt: skip
            add_to_tar(archive, name, data)
    source = shards(tmp_path)
    assert len(source) == 2
    assert [captions(source, row) for row in range(2)] == [["first"], ["other"]]
    assert [source.read(row)["image"] for row in range(2)] == [image(0), image(2)]
    assert "4 repeated members (first: train-0.tar: a.png)" in caplog.text


def test_every_cut_keeps_the_samples_that_have_their_text(tmp_path: Path) -> None:
    members = {
        f"{n}.{s}": image(n) if s == "png" else b"text" for n in range(4) for s in ("png", "txt")
    }
    whole = tar(tmp_path / "whole" / "train-0.tar", members).read_bytes()
    file = tmp_path / "cut" / "train-0.tar"
    file.parent.mkdir()
    for cut in range(700, 10 * 512, 512):
        file.write_bytes(whole[:cut])
        source = shards(file.parent)
        for index in range(len(source) - 1):
            if "caption" in source.info.fields:  # not known while no text was read
                assert captions(source, index) == ["text"]
        with pytest.raises(ValueError, match="damaged shard"):
            source.read(len(source) - 1)


# --- COCO


def write_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(picture(number)))


def coco(root: Path, split: str = "train", year: str = "2017", **changes: Any) -> Path:
    """A folder as COCO publishes it: two images, of two and one captions."""
    write_images(root / f"{split}{year}", "1.jpg", "2.jpg")
    content: dict[str, Any] = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)],
        "annotations": [
            {"id": 10, "image_id": 2, "caption": "a dog "},
            {"id": 11, "image_id": 1, "caption": "a cat"},
            {"id": 12, "image_id": 2, "caption": "brown"},
        ],
    }
    for key, added in changes.items():
        content[key] += added
    file = root / "annotations" / f"captions_{split}{year}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def test_coco_as_it_is_published(tmp_path: Path) -> None:
    coco(tmp_path)
    file = coco(tmp_path, "val")
    source = opened(source="coco", path=str(tmp_path), test_split="val")
    assert len(source) == 2
    assert captions(source, 0) == ["a cat"]
    assert captions(source, 1) == ["a dog", "brown"]
    assert source.describe(1) == str(tmp_path / "train2017" / "2.jpg")
    by_file = opened("val", source="coco", path=str(file), test_split="val")
    assert by_file.describe(1) == str(tmp_path / "val2017" / "2.jpg")
    assert reasons(by_file) == {}
    again = pickle.loads(pickle.dumps(source))
    assert captions(again, 1) == ["a dog", "brown"]
    assert source.info.fingerprint == by_file.info.fingerprint  # the same images and captions


def test_the_index_of_captions_is_arrays_kept_between_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlx.data.sources import coco_captions

    coco(tmp_path)
    first = opened(source="coco", path=str(tmp_path))
    assert isinstance(first, CaptionedFiles)
    assert all(isinstance(a, np.memmap) for a in first._index.arrays.values())
    monkeypatch.setattr(coco_captions, "_read", None)  # not read again
    assert opened(source="coco", path=str(tmp_path)).info == first.info


def test_faults_of_a_coco_file_are_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coco(
        tmp_path,
        images=[{"id": 1, "file_name": "other.jpg"}, {"id": 3}, {"id": 4, "file_name": "4.jpg"}],
        annotations=[
            {"id": 20, "image_id": 99, "caption": "of no image"},
            {"id": 21, "image_id": 98, "caption": "of no image"},
            {"id": 10, "image_id": 1, "caption": "again"},
            {"id": 22, "image_id": 1, "caption": "  "},
            {"id": 23, "image_id": 4, "caption": ""},
            {"id": [24], "image_id": [4], "caption": ""},
        ],
    )
    source = opened(source="coco", path=str(tmp_path))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "captions_train2017.json: 1 repeated image ids (first: 1)" in lines[0]
    assert "3 annotations of images that are not listed (first: 99)" in lines[0]
    assert "1 repeated annotation ids (first: 10)" in lines[0]
    assert "1 images without id or file_name" in lines[0]
    assert "1 captions left out of samples that keep others (first: 1.jpg: empty" in lines[0]
    assert captions(source, 0) == ["a cat"]
    found = reasons(source)
    assert list(found) == [2]
    assert found[2].endswith("4.jpg: empty caption")


def test_missing_images_are_counted_and_all_of_them_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    coco(tmp_path)
    (tmp_path / "train2017" / "2.jpg").unlink()
    source = opened(source="coco", path=str(tmp_path))
    assert reasons(source) == {
        1: f"{tmp_path}/train2017/2.jpg: no such image; captions_train2017.json lists it"
    }
    assert isinstance(source, Captioned)
    assert source.captions(1) == ["a dog", "brown"]
    assert not caplog.records
    shutil.rmtree(tmp_path / "train2017")
    opened(source="coco", path=str(tmp_path))
    assert "images such as 1.jpg are not in" in caplog.text


def test_other_files_of_coco_say_what_they_are(tmp_path: Path) -> None:
    file = coco(tmp_path)
    with pytest.raises(DataError, match=r"no captions of split 'vla'.*found captions_train2017"):
        opened("vla", source="coco", path=str(tmp_path))
    file.write_text("{cut")
    with pytest.raises(DataError, match="is not JSON"):
        opened(source="coco", path=str(file))
    file.write_text("[1]")
    with pytest.raises(DataError, match="no list 'images'"):
        opened(source="coco", path=str(file))
    boxes = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"image_id": 1, "bbox": 0}],
    }
    file.write_text(json.dumps(boxes))
    with pytest.raises(DataError, match="no annotation has 'caption'"):
        opened(source="coco", path=str(file))
    file.write_text(json.dumps({"images": boxes["images"]}))  # a test split: captions are withheld
    assert opened(source="coco", path=str(file)).info.fields == ("image",)


def karpathy(file: Path) -> Path:
    parts = ("train", "restval", "test", "train")
    images = [
        {
            "filepath": "val2014",
            "filename": f"{n}.jpg",
            "split": part,
            "sentences": [{"raw": f"caption {n}"}, {"raw": "second"}],
        }
        for n, part in enumerate(parts)
    ]
    file.write_text(json.dumps({"images": [*images, images[0]], "dataset": "coco"}))
    return file


def test_karpathy_s_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = karpathy(tmp_path / "dataset_coco.json")
    write_images(tmp_path / "images" / "val2014", *(f"{n}.jpg" for n in range(4)))
    train = opened("train+restval", source="coco", path=str(tmp_path), train_split="train+restval")
    assert [captions(train, row)[0] for row in range(3)] == [f"caption {n}" for n in (0, 1, 3)]
    assert "1 repeated images (first: val2014/0.jpg)" in caplog.text
    caplog.clear()
    test = opened("test", source="coco", path=str(file))
    assert captions(test, 0) == ["caption 2", "second"]
    assert not trained_on(test, train).any()  # one file that tells its splits apart
    with pytest.raises(
        DataError, match=r"no split 'tets', but restval, test, train\. .*test_split=test"
    ):
        opened("tets", source="coco", path=str(file))


def test_karpathy_s_test_images_are_not_mixed_with_published_training_images(
    tmp_path: Path,
) -> None:
    coco(tmp_path)
    karpathy(tmp_path / "dataset_coco.json")
    assert len(opened(source="coco", path=str(tmp_path))) == 2
    with pytest.raises(DataError, match=r"found captions_train2017\.json, dataset_coco\.json"):
        opened("test", source="coco", path=str(tmp_path))


def test_text_of_json_that_is_not_utf8(tmp_path: Path) -> None:
    file = coco(tmp_path)
    file.write_bytes(file.read_bytes().replace(b"a cat", NOT_UTF8))
    source = opened(source="coco", path=str(tmp_path))
    assert list(reasons(source).values()) == [
        f"{tmp_path}/train2017/1.jpg: caption is not UTF-8: byte 0xe9 at 3"
    ]
    assert captions(source, 1) == ["a dog", "brown"]


# --- tables


TABLE = 'image,caption\n1.png,"a cat, black"\n2.png,a dog\n1.png, asleep \n'


@pytest.mark.parametrize(
    ("name", "text", "keys"),
    [
        ("train.csv", TABLE, {}),
        ("train.csv", "\ufeff" + TABLE.replace("\n", "\r\n"), {}),
        ("captions.txt", TABLE, {"train_split": "all"}),
        (
            "train.tsv",
            "id\timage\tcaption\n0\t1.png\ta cat, black\n1\t2.png\ta dog\n\n2\t1.png\tasleep\n",
            {},
        ),
        (
            "train.csv",
            "title\tfilepath\na cat, black\t1.png\na dog\t2.png\nasleep\t1.png\n",
            {"image_column": "filepath", "caption_column": "title"},
        ),
        (
            "results.csv",
            "image_name| comment_number| comment\n1.png| 0| a cat, black\n2.png| 0| a dog\n"
            "1.png| 1| asleep\n",
            {"train_split": "all"},
        ),
    ],
)
def test_rows_of_one_image_are_captions_of_it(
    tmp_path: Path, name: str, text: str, keys: dict[str, str]
) -> None:
    write_images(tmp_path, "1.png", "2.png")
    (tmp_path / name).write_bytes(text.encode())
    keys = {"train_split": "train", **keys}
    source = opened(keys["train_split"], source="captions", path=str(tmp_path), **keys)
    assert len(source) == 2
    assert captions(source, 0) == ["a cat, black", "asleep"]
    assert captions(source, 1) == ["a dog"]
    assert source.describe(1) == str(tmp_path / "2.png")
    assert captions(pickle.loads(pickle.dumps(source)), 0) == ["a cat, black", "asleep"]


def test_images_of_a_table_lie_beside_it_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text(TABLE)
    write_images(tmp_path / "Images", "1.png", "2.png")
    source = opened(source="captions", path=str(tmp_path / "captions.csv"))
    assert source.describe(0) == str(tmp_path / "Images" / "1.png")


def test_rows_that_are_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, *(f"{n}.png" for n in range(6)))
    rows = [b"0.png,a cat", b"1.png,caf\xe9", b"2.png,", b"3.png", b",of nothing", b"4.png,x, y"]
    rows += [b"5.png,kept", b"5.png,", b"6.png,of no file"]
    (tmp_path / "train.csv").write_bytes(b"image,caption\n" + b"\n".join(rows))
    source = opened(source="captions", path=str(tmp_path))
    note = caplog.records[0].getMessage()
    assert "1 rows without an image (first: line 6)" in note
    assert "1 captions left out of samples that keep others (first: 5.png: empty caption)" in note
    found = reasons(source)
    assert list(found) == [1, 2, 3, 6]
    assert "1.png: caption is not UTF-8: byte 0xe9 at 3" in found[1]
    assert "2.png: empty caption" in found[2]
    assert "3.png: empty caption" in found[3]
    assert "6.png: no such image; train.csv lists it" in found[6]
    assert captions(source, 4) == ["x, y"]
    assert captions(source, 5) == ["kept"]


def test_a_quotation_mark_that_never_closes_costs_rows_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, "0.png", "1.png")
    long = "x" * 200_000
    (tmp_path / "train.csv").write_text(f'image,caption\n0.png,a cat\n1.png,"{long}\n0.png,black\n')
    source = opened(source="captions", path=str(tmp_path))
    assert "1 unreadable rows (first: line 3" in caplog.text
    assert captions(source, 0)[0] == "a cat"


def test_tables_say_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("path,text\n1.png,a\n")
    with pytest.raises(DataError, match=r"data\.image_column: .*'image' in its header"):
        opened(source="captions", path=str(tmp_path))
    with pytest.raises(DataError, match=r"data\.caption_column: .*'caption'.* Known: path, text"):
        opened(source="captions", path=str(tmp_path), image_column="path")
    with pytest.raises(
        DataError, match=r"Looked for val\.csv, val\.tsv, Flickr8k.*found train\.csv"
    ):
        opened("val", source="captions", path=str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        opened(source="captions", path=str(tmp_path / "none"))


def test_a_fifth_of_one_table_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "".join(f"{n}.png,caption {n}\n{n}.png,another\n" for n in range(100))
    (tmp_path / "captions.csv").write_text(f"image,caption\n{rows}")
    keys = {"source": "captions", "path": str(tmp_path / "captions.csv")}
    keys |= {"train_split": "all:train", "test_split": "all:test"}
    train, test = (opened(f"all:{side}", **keys) for side in ("train", "test"))
    assert isinstance(train, HeldOut)
    assert isinstance(test, HeldOut)
    names = [{source.captions(i)[0] for i in range(len(source))} for source in (train, test)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 100
    assert 10 <= len(test) <= 30
    assert (train.info.split, test.info.split) == ("all:train", "all:test")
    assert train.info.fingerprint != test.info.fingerprint
    write_images(tmp_path, *(f"{n}.png" for n in range(100)))
    train, test, whole = (opened(split, **keys) for split in ("all:train", "all:test", "all"))
    assert not trained_on(test, train).any()
    assert trained_on(whole, train).sum() == len(train)
    with pytest.raises(DataError, match=r"split 'all:tset'.*'train' or 'test'"):
        opened("all:tset", **keys)
    with pytest.raises(DataError, match=r"data\.split_column=id: .* has no columns"):
        opened("all:test", split_column="id", **keys)


# --- Flickr


def flickr8k(root: Path) -> Path:
    """Flickr8k's two folders: texts with lists of splits, and images."""
    names = [f"{n}_ab.jpg" for n in range(4)]
    write_images(root / "Flicker8k_Dataset", *names)
    texts = root / "Flickr8k_text"
    texts.mkdir()
    lines = [f"{name}#{k}\tcaption {k} of {name} ." for name in names for k in range(2)]
    lines += ["gone.jpg.1#0\tits image is not there .", lines[0]]
    (texts / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    (texts / "Flickr_8k.trainImages.txt").write_text("\n".join(names[:2]) + "\n")
    (texts / "Flickr_8k.devImages.txt").write_text(f"{names[2]}\nnever.jpg\n")
    return root


@pytest.mark.parametrize("inside", ["", "Flickr8k_text", "Flickr8k_text/Flickr8k.token.txt"])
def test_flickr8k(tmp_path: Path, inside: str, caplog: pytest.LogCaptureFixture) -> None:
    keys = {"source": "captions", "path": str(flickr8k(tmp_path) / inside)}
    train = opened(**keys)
    assert "1 repeated ids (first: 0_ab.jpg#0)" in caplog.text
    assert len(train) == 2
    assert captions(train, 1) == ["caption 0 of 1_ab.jpg .", "caption 1 of 1_ab.jpg ."]
    assert train.describe(0) == str(tmp_path / "Flicker8k_Dataset" / "0_ab.jpg")
    val = opened("val", **keys)
    assert captions(val, 0)[0] == "caption 0 of 2_ab.jpg ."
    assert next(iter(reasons(val).values())).endswith("never.jpg: no caption")
    whole = opened("all", **{**keys, "test_split": "test"})
    assert len(whole) == 5
    with pytest.raises(DataError, match=r"\*\.testImages\.txt, test\.txt.*data\.test_split=all"):
        opened("test", **keys)


def test_flickr30k(tmp_path: Path) -> None:
    write_images(tmp_path / "flickr30k-images", "1.jpg", "2.jpg")
    (tmp_path / "results_20130124.token").write_text("1.jpg#0\tone .\n2.jpg#0\ttwo .\n")
    (tmp_path / "test.txt").write_text("2\n")
    source = opened("test", source="captions", path=str(tmp_path))
    assert captions(source, 0) == ["two ."]
    assert reasons(source) == {}


def test_flickr30k_s_row_without_a_caption(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = ['1.jpg| 0| a "dog" runs', "1.jpg| 4   A dog runs across the grass ."]
    text = "\n".join(["image_name| comment_number| comment", *rows])
    (tmp_path / "results.csv").write_text(text)
    write_images(tmp_path / "flickr30k_images" / "flickr30k_images", "1.jpg")
    source = opened("all", source="captions", path=str(tmp_path))
    assert captions(source, 0) == ['a "dog" runs']
    assert "1 captions left out of samples that keep others" in caplog.text


# --- parts of a source, and worker processes


def test_subsets_pass_captions_on(tmp_path: Path) -> None:
    source = parquet(tmp_path, [f"caption {n}" for n in range(9)])
    assert captions(Subset(source, np.array([4, 1])), 0) == ["caption 4"]
    few = evenly(evenly(source, 5), 3)
    assert [captions(few, row) for row in range(3)] == [["caption 0"], ["caption 4"], ["caption 8"]]
    assert captions(pickle.loads(pickle.dumps(few)), 1) == ["caption 4"]


def test_worker_processes_read_captions_alike(tmp_path: Path) -> None:
    coco(tmp_path, annotations=[{"id": 30, "image_id": 7, "caption": "x"}])
    (tmp_path / "train2017" / "1.jpg").unlink()
    source = opened(source="coco", path=str(tmp_path))
    assert reasons(source, workers=1) == reasons(source, workers=0) != {}


# --- emoji


@pytest.fixture
def emoji() -> dict[str, Any]:
    folder = SHARED_DATA / "emoji"
    if not folder.is_dir():
        pytest.skip("../shared/data/emoji is not here")
    from vlx.commands.data import data_config

    cfg = data_config("emoji", [f"data.path={folder}", "data.workers=0"])
    return {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}


def codepoints(source: Source, emoji: dict[str, Any], vendor: str) -> list[str]:
    """The code points of a held-out part's rows, from the file itself."""
    table = pq.read_table(Path(emoji["path"]) / f"{vendor}.parquet", columns=["codepoint"])
    values = table.column(0).to_pylist()
    return [values[int(source.describe(i).rsplit(" ", 1)[1])] for i in range(len(source))]


def test_emoji_of_two_vendors(emoji: dict[str, Any]) -> None:
    google, twitter = (opened(vendor, **emoji) for vendor in ("google", "twitter"))
    assert len(google) == len(twitter) == 1911
    assert google.info.fields == ("image", "label", "caption")
    assert google.info.class_names == twitter.info.class_names
    assert google.info.class_names[:2] == ("Activities", "Animals & Nature")
    assert google.info.num_classes == 10
    assert captions(google, 955) == captions(twitter, 955) == ["key"]
    stats = caption_stats(google)
    assert (stats.captions, stats.longest, stats.duplicates, stats.unusable) == (1911, 11, 1, [])
    aliases = opened("google", **{**emoji, "caption_column": "aliases"})
    assert caption_stats(aliases).captions > 1911


def test_a_mirror_of_emoji_beside_their_names_is_refused(emoji: dict[str, Any]) -> None:
    assert not opened("google", **emoji).info.mirror_safe


@pytest.mark.parametrize("kind", ["parquet", "captions", "coco", "webdataset"])
def test_files_say_whether_their_captions_survive_a_mirror(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        parquet(tmp_path, ["left"])
    elif kind == "coco":
        coco(tmp_path)
    elif kind == "webdataset":
        tar(tmp_path / "train-0.tar", {"a.png": image(), "a.txt": b"left"})
    else:
        write_images(tmp_path, "a.png")
        (tmp_path / "train.csv").write_text("image,caption\na.png,left\n")
    keys = {"source": kind, "path": str(tmp_path)}
    assert opened(**keys).info.mirror_safe
    assert not opened(**keys, mirror_safe=False).info.mirror_safe


def test_held_out_names_are_held_out_of_both_vendors(
    emoji: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    words = {"train_split": "google:train", "test_split": "twitter:test"}
    parts = {
        f"{vendor}:{side}": opened(f"{vendor}:{side}", **{**emoji, **words})
        for vendor in ("google", "twitter")
        for side in ("train", "test")
    }
    points = {
        split: codepoints(source, emoji, split.partition(":")[0]) for split, source in parts.items()
    }
    assert points["google:test"] == points["twitter:test"]
    assert points["google:train"] == points["twitter:train"]
    assert not set(points["google:train"]) & set(points["google:test"])
    assert len(points["google:train"]) + len(points["google:test"]) == 1911
    assert 0.17 < len(points["google:test"]) / 1911 < 0.23
    names = {part.info.class_names for part in parts.values()}
    assert len(names) == 1
    assert len({part.info.fingerprint for part in parts.values()}) == 4
    labels = np.asarray(parts["google:test"].labels())
    assert set(labels.tolist()) == set(range(10))  # every category is in the held-out part
    np.testing.assert_array_equal(labels, parts["twitter:test"].labels())
    whole = opened("google", **emoji)
    assert trained_on(whole, parts["google:train"]).sum() >= len(parts["google:train"])
    for vendor in ("google", "twitter"):
        shared = trained_on(parts[f"{vendor}:test"], parts["google:train"])
        assert shared.mean() <= INCIDENTAL
    # Artwork that Google gives to several names: flags of Australia and its island, families.
    assert trained_on(parts["google:test"], parts["google:train"]).sum() == 6


def test_a_split_column_is_checked(emoji: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"split_column.*'codpoint'. Did you mean codepoint"):
        opened("google:test", **{**emoji, "split_column": "codpoint"})
    by_caption = opened("google:test", **{**emoji, "split_column": None})
    assert 0.17 < len(by_caption) / 1911 < 0.23
