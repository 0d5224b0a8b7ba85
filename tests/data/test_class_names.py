"""Classes are matched by name, whatever order a source has them in."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.data.make import config, image_tree, picture, shard
from vlx.core.errors import DataError
from vlx.data.class_names import with_classes
from vlx.data.config import Classes
from vlx.data.open import open_source


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def parquet(file: Path, words: list[str], names: list[str]) -> None:
    images = [picture(number) for number in range(len(words))]
    made = datasets.Dataset.from_dict(
        {"image": images, "label": [names.index(word) for word in words]}
    )
    made = made.cast_column("image", datasets.Image())
    made.cast_column("label", datasets.ClassLabel(names=names)).to_parquet(str(file))


def words(source) -> list[str]:
    read = [source.info.class_names[source.read(i)["label"]] for i in range(len(source))]
    assert read == [source.info.class_names[n] for n in source.labels()]
    return read


def test_parquet_splits_with_names_in_another_order(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", ["cat", "dog"], ["cat", "dog"])
    parquet(tmp_path / "test.parquet", ["cat", "dog", "dog"], ["dog", "cat"])
    cfg = config(source="parquet", path=str(tmp_path))
    test = open_source(cfg, "test")
    assert test.info.class_names == ("cat", "dog")
    assert words(test) == ["cat", "dog", "dog"]
    assert np.asarray(test.labels()).tolist() == [0, 1, 1]
    parquet(tmp_path / "test.parquet", ["cow"], ["cow", "cat"])
    with pytest.raises(DataError, match=r"split 'test' has classes that the training split lacks"):
        open_source(cfg, "test")


def test_shards_with_names_beside_them_in_another_order(tmp_path: Path) -> None:
    for split, names in (("train", "ant\nbee\ncat\n"), ("test", "cat\nbee\nant\n")):
        shard(tmp_path / split / "0.tar", range(3))
        (tmp_path / split / "classnames.txt").write_text(names)
    test = open_source(config(source="webdataset", path=str(tmp_path)), "test")
    assert test.info.class_names == ("ant", "bee", "cat")
    assert words(test) == ["cat", "bee", "ant"]


def test_a_runs_order_of_classes_and_other_sets_are_refused(tmp_path: Path) -> None:
    source = open_source(config(source="folder", path=str(image_tree(tmp_path))), "train")
    moved = with_classes(source, ("cat", "ant", "bee"), "the run r")
    assert words(moved) == words(source)
    assert moved.info.class_names == ("cat", "ant", "bee")
    assert moved.info.fingerprint == source.info.fingerprint
    assert with_classes(source, ("ant", "bee", "cat"), "the run r") is source
    with pytest.raises(DataError, match=r"other classes than the run r: missing dog; new bee\."):
        with_classes(source, ("ant", "cat", "dog"), "the run r")
    with pytest.raises(DataError, match=r"train/train has 3 classes, the run r has 2: missing"):
        with_classes(source, ("ant", "dog"), "the run r")


def test_a_file_of_names_renames_orders_or_says_which_is_which(tmp_path: Path) -> None:
    tree, file = image_tree(tmp_path / "data"), tmp_path / "names.txt"
    keys = {"source": "folder", "path": str(tree), "class_names": str(file)}
    plain = words(open_source(config(source="folder", path=str(tree)), "train"))

    file.write_text("an ant\na bee\na cat\n")  # other names: by number
    source = open_source(config(**keys), "train")
    assert words(source) == [{"ant": "an ant", "bee": "a bee", "cat": "a cat"}[w] for w in plain]

    file.write_text("cat\nant\nbee\n")  # the own names: an order
    source = open_source(config(**keys), "train")
    assert source.info.class_names == ("cat", "ant", "bee")
    assert words(source) == plain
    halves = [open_source(config(**keys, classes=h), "train") for h in (Classes.base, Classes.new)]
    assert [half.info.class_names for half in halves] == [("cat", "ant"), ("bee",)]

    file.write_text("cat\ttabby\nant\tred ant\nbee\thoney bee\n")
    source = open_source(config(**keys), "train")
    assert source.info.class_names == ("tabby", "red ant", "honey bee")
    named = {"cat": "tabby", "ant": "red ant", "bee": "honey bee"}
    assert words(source) == [named[word] for word in plain]

    file.write_text("cat\nant\n")
    with pytest.raises(DataError, match=r"names\.txt has 2 names, data/train has 3 classes"):
        open_source(config(**keys), "train")
