"""What was trained on is known by its content, whatever it is called and wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data.make import config, encode, image_tree, picture, shard
from vlx.core.errors import DataError
from vlx.data.config import DataConfig
from vlx.data.joined import Joined
from vlx.data.open import open_source
from vlx.data.overlap import INCIDENTAL, contents_of, trained_on, training_samples
from vlx.data.split_hint import split_hint
from vlx.data.subset import Subset


def both(cfg: DataConfig):
    return open_source(cfg, cfg.test_split), open_source(cfg, cfg.train_split)


def test_images_copied_to_another_name_are_the_same(tmp_path: Path) -> None:
    tree = image_tree(tmp_path)
    cfg = config(source="folder", path=str(tree))
    assert not trained_on(*both(cfg)).any()
    shutil.copy(tree / "train" / "ant" / "000.png", tree / "test" / "bee" / "other.png")
    test, train = both(cfg)
    (row,) = np.flatnonzero(trained_on(test, train))
    assert test.describe(int(row)).endswith("bee/other.png")
    # A file that cannot be read is not the same as another that cannot.
    for split in ("train", "test"):
        (tree / split / "ant" / "gone.png").symlink_to(tmp_path / "nowhere")
    assert trained_on(*both(cfg)).sum() == 1


def test_the_splits_of_embedded_sources_share_nothing_and_all_shares_its_parts() -> None:
    for source in ("digits", "glyphs", "scenes"):
        cfg = config(source=source)
        test, train = both(cfg)
        assert not trained_on(test, train).any()
        whole = open_source(cfg, "all")
        assert trained_on(whole, train).sum() == len(train)
        assert trained_on(whole, test).sum() == len(test)
    faces = {"train_split": "train:DejaVuSans", "test_split": "all:DejaVuSerif"}
    assert not trained_on(*both(config(source="glyphs", **faces))).any()


def test_one_pattern_for_both_splits_and_a_shard_in_both(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"{number}.tar", range(4 * number, 4 * number + 4))
    every = config(source="webdataset", path=str(tmp_path / "*.tar"))
    assert trained_on(*both(every)).all()
    (tmp_path / "named").mkdir()
    for split, parts in (("train", (0, 1)), ("test", (1, 2))):
        for part in parts:
            shutil.copy(tmp_path / f"{part}.tar", tmp_path / "named" / f"{split}-{part}.tar")
    test, train = both(config(source="webdataset", path=str(tmp_path / "named")))
    assert trained_on(test, train).tolist() == [True] * 4 + [False] * 4


def test_rows_in_another_order_and_file_are_the_same(tmp_path: Path) -> None:
    from tests.data.test_sources import save_parquet

    save_parquet(tmp_path / "train.parquet", range(6))
    save_parquet(tmp_path / "test.parquet", [9, 3, 8, 1])
    test, train = both(config(source="parquet", path=str(tmp_path)))
    assert trained_on(test, train).tolist() == [False, True, False, True]


def test_the_column_of_images_decides_what_is_compared(tmp_path: Path) -> None:
    import datasets

    def save(file: Path, left: list[int], right: list[int]) -> None:
        columns = {"left": left, "right": right}
        made = datasets.Dataset.from_dict({k: [picture(n) for n in v] for k, v in columns.items()})
        for name in columns:
            made = made.cast_column(name, datasets.Image())
        made.to_parquet(str(file))

    save(tmp_path / "train.parquet", [0, 1], [2, 3])
    save(tmp_path / "test.parquet", [0, 1], [4, 5])
    keys = {"source": "parquet", "path": str(tmp_path)}
    assert trained_on(*both(config(**keys, image_column="left"))).all()
    assert not trained_on(*both(config(**keys, image_column="right"))).any()


def test_parts_and_joined_sources_keep_what_their_samples_hold(tmp_path: Path) -> None:
    source = open_source(config(source="folder", path=str(image_tree(tmp_path))), "train")
    known = contents_of(source)
    assert known is not None
    part = Subset(source, np.array([5, 2]))
    np.testing.assert_array_equal(contents_of(part), known[[5, 2]])
    joined = Joined({"a": source, "b": source}, "twice")
    np.testing.assert_array_equal(contents_of(joined), np.concatenate([known, known]))
    assert trained_on(source, part).sum() == 2


class Unknown:
    """A source that says neither what it holds nor what its samples hold."""

    def __init__(self, source) -> None:
        from dataclasses import replace

        self.info, self._source = replace(source.info, fingerprint=""), source
        self.read, self.describe, self.labels = source.read, source.describe, source.labels

    def __len__(self) -> int:
        return len(self._source)


def test_a_source_of_unknown_content_is_not_the_same_as_anything() -> None:
    source = Unknown(open_source(config(), "train"))
    assert contents_of(source) is None
    assert contents_of(Subset(source, np.arange(3))) is None
    assert not trained_on(source, source).any()


def test_samples_that_were_trained_on_are_refused_counted_or_asked_for() -> None:
    whole, train = (open_source(config(), split) for split in ("all", "train"))
    said = f"scored on training data: {len(train)} of {len(whole)} samples, of digits/train"
    with pytest.raises(DataError, match=rf"data\.test_split=all would be {said} .*test_on_train"):
        training_samples(whole, train, key="data.test_split", allowed=False)
    assert training_samples(whole, train, key="data.test_split", allowed=True) == said
    test = open_source(config(), "test")
    assert training_samples(test, train, key="data.test_split", allowed=False) == ""
    few = Subset(whole, np.concatenate([np.arange(0, 500, 5), [1, 2]]))  # every fifth is a test
    assert INCIDENTAL * len(few) >= 2
    said = training_samples(few, train, key="data.test_split", allowed=False)
    assert said.startswith("scored on training data: 2 of 102 samples")


@pytest.mark.parametrize(
    ("found", "hint"),
    [
        (["train", "val"], "Use data.test_split=val"),
        (["train", "testing", "validation"], "Use data.test_split=testing"),
        (["train"], "data.train_split=train:train data.test_split=train:test"),
        ([], "data.train_split=train:train data.test_split=train:test"),
    ],
)
def test_a_hint_never_proposes_what_is_trained_on(found: list[str], hint: str) -> None:
    said = split_hint(config(), "test", found)
    assert hint in said
    assert not said.endswith("test_split=train")


def test_hints_for_joined_and_training_splits() -> None:
    joined = config(train_split="photo+art:train", test_split="draft")
    assert split_hint(joined, "draft", ["art", "photo", "sketch"]) == "Use data.test_split=sketch"
    assert split_hint(config(), "train", ["test", "training"]) == "Use data.train_split=training"
    assert split_hint(config(), "train", ["test"]) == ""
    val = config(val_split="dev")
    assert split_hint(val, "dev", ["train", "eval"]) == "Use data.val_split=eval"


def test_only_a_training_folder_says_how_to_hold_some_out(tmp_path: Path) -> None:
    image_tree(tmp_path)
    shutil.rmtree(tmp_path / "test")
    cfg = config(source="folder", path=str(tmp_path))
    words = r"data\.train_split=train:train data\.test_split=train:test"
    with pytest.raises(DataError, match=words):
        open_source(cfg, "test")
    held = {"train_split": "train:train", "test_split": "train:test", "split_column": "file"}
    test, train = both(config(source="folder", path=str(tmp_path), **held))
    assert len(test) + len(train) == 24
    assert not trained_on(test, train).any()


def test_a_whole_set_of_torchvision_is_split_by_its_files(tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / "eurosat" / "2750" / ("Forest", "River")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode(picture(number)))
    keys = {"source": "torchvision", "variant": "EuroSAT", "path": str(tmp_path)}
    with pytest.raises(DataError, match=r"data\.train_split=all:train data\.test_split=all:test"):
        open_source(config(**keys), "test")
    held = {"train_split": "all:train", "test_split": "all:test", "split_column": "file"}
    test, train = both(config(**keys, **held))
    assert len(test) + len(train) == 40
    assert len(test) > 0
    assert not trained_on(test, train).any()
    assert trained_on(open_source(config(**keys), "all"), test).sum() == len(test)
