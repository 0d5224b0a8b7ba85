"""K shots a class, base and new classes, and a split that another run reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlx.core.errors import DataError
from vlx.data.config import Classes, DataConfig
from vlx.data.few_shot import Selected, halves
from vlx.data.open import open_source
from vlx.data.source import Captioned


def opened(split: str = "train", **keys) -> Selected:
    source = open_source(DataConfig(**keys), split)
    assert isinstance(source, Selected)
    return source


def samples(source: Selected) -> list[int]:
    return source.record()["samples"]


@pytest.mark.parametrize("shots", [1, 4, 16])
def test_every_class_has_its_shots(shots: int) -> None:
    labels = opened(shots=shots, split_seed=1).labels()
    assert labels is not None
    assert np.bincount(labels).tolist() == [shots] * 10


def test_a_seed_gives_the_same_shots_and_fewer_are_part_of_more() -> None:
    one, four = (set(samples(opened(shots=k, split_seed=3))) for k in (1, 4))
    assert one < four
    assert four == set(samples(opened(shots=4, split_seed=3)))
    assert four != set(samples(opened(shots=4, split_seed=4)))


def test_shots_leave_the_test_split_whole() -> None:
    assert len(open_source(DataConfig(shots=1), "test")) == 360


@pytest.mark.parametrize(("count", "base"), [(10, 5), (11, 6), (2, 1)])
def test_the_first_half_of_the_classes_is_base(count: int, base: int) -> None:
    found = halves(count)
    assert found[Classes.base] == range(base)
    assert found[Classes.new] == range(base, count)


@pytest.mark.parametrize("split", ["train", "test"])
def test_base_and_new_share_a_split_and_are_numbered_from_zero(split: str) -> None:
    base, new = (opened(split, classes=c) for c in (Classes.base, Classes.new))
    whole = open_source(DataConfig(), split)
    assert len(base) + len(new) == len(whole)
    assert base.info.class_names == tuple("01234")
    assert new.info.class_names == tuple("56789")
    for source, first in ((base, 0), (new, 5)):
        labels = source.labels()
        assert labels is not None
        assert set(labels.tolist()) == set(range(5))
        for row, index in enumerate(samples(source)[:20]):
            sample = source.read(row)
            assert sample["label"] == labels[row]
            assert whole.read(index)["label"] == sample["label"] + first
            assert np.array_equal(whole.read(index)["image"], sample["image"])


def test_the_fingerprint_tells_selections_apart() -> None:
    prints = {opened(shots=k, split_seed=s).info.fingerprint for k in (1, 2) for s in (0, 1)}
    assert len(prints) == 4


def test_another_run_reads_a_split(tmp_path: Path) -> None:
    first = opened(shots=3, split_seed=7, classes=Classes.base)
    file = tmp_path / "split.json"
    file.write_text(json.dumps(first.record()))
    again = opened(split_file=str(file), classes=Classes.base)
    assert samples(again) == samples(first)
    assert again.info == first.info


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.shots=200: class '\d' of digits has 1\d\d samples"):
        opened(shots=200)
    with pytest.raises(DataError, match=r"data\.shots=0 must be at least 1"):
        opened(shots=0)
    record = opened(shots=3).record() | {"fingerprint": "0123", "source": "flowers"}
    (tmp_path / "other.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"was made of flowers \(0123\), this data is digits"):
        opened(split_file=str(tmp_path / "other.json"))
    for samples_of in ([[0]], [99999], [-1]):
        record = opened(shots=3).record() | {"samples": samples_of}
        (tmp_path / "wrong.json").write_text(json.dumps(record))
        with pytest.raises(DataError, match=r"wrong\.json: samples are no list of 0\.\.1436"):
            opened(split_file=str(tmp_path / "wrong.json"))
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(DataError, match="is not a split of vlx"):
        opened(split_file=str(tmp_path / "empty.json"))


def test_a_part_of_a_captioned_source_has_its_samples_captions() -> None:
    cfg = DataConfig(source="glyphs", shots=2, classes=Classes.new, split_seed=0)
    part = open_source(cfg, "train")
    assert isinstance(part, Captioned)
    for index in (0, len(part) - 1):
        assert part.captions(index) == part.read(index)["caption"]


def test_shots_are_those_of_the_runs_seed_wherever_its_configuration_is_read() -> None:
    from vlx.engine.config import RunConfig

    assert RunConfig(seed=5).data.split_seed == 5
    assert RunConfig(seed=5, data=DataConfig(split_seed=0)).data.split_seed == 0
