"""Base and new classes: each half among its own candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlx.core.capability import OpenVocabulary
from vlx.data.config import Classes, DataConfig
from vlx.evals.base import EvalData, Subject
from vlx.evals.base_to_new import BaseToNew
from vlx.evals.config import EvalConfig


class Always(OpenVocabulary):
    """Says the class of one name wherever that is a candidate, the first elsewhere."""

    def __init__(self, favourite: str) -> None:
        self.favourite = favourite
        self.asked: list[tuple[str, ...]] = []

    def logits_of(self, images: Tensor, class_names: Sequence[str]) -> Tensor:
        self.asked.append(tuple(class_names))
        row = torch.tensor(
            [9.0 * (name == self.favourite) - i for i, name in enumerate(class_names)]
        )
        return row.expand(len(images), -1)


@pytest.mark.parametrize("trained_on", [Classes.base, Classes.all])
def test_each_half_is_classified_among_its_own_names(trained_on: Classes) -> None:
    model = Always("7")
    data = EvalData(
        DataConfig(classes=trained_on), EvalConfig(), image_size=8, device=torch.device("cpu")
    )
    found = BaseToNew().run(Subject("always", (model,)), data)
    whole = EvalData(DataConfig(), EvalConfig(), image_size=8, device=torch.device("cpu"))
    labels = torch.from_numpy(whole.source("test").labels())
    base = (labels == 0).sum() / (labels < 5).sum()
    new = (labels == 7).sum() / (labels >= 5).sum()
    assert set(model.asked) == {tuple("01234"), tuple("56789")}
    assert found.metrics["base"] == pytest.approx(float(base))
    assert found.metrics["new"] == pytest.approx(float(new))
    mean = 2 / (1 / float(base) + 1 / float(new))
    assert found.metrics["harmonic-mean"] == pytest.approx(mean)
    assert found.num_samples == len(labels)


def test_classes_of_one_name_are_one_class(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join("abcda" + "fghij"))
    model = Always("a")
    cfg = DataConfig(class_names=str(tmp_path / "names.txt"))
    data = EvalData(cfg, EvalConfig(), image_size=8, device=torch.device("cpu"))
    found = BaseToNew().run(Subject("always", (model,)), data)
    labels = torch.from_numpy(data.source("test").labels())
    base = ((labels == 0) | (labels == 4)).sum() / (labels < 5).sum()
    assert set(model.asked) == {tuple("abcd"), tuple("fghij")}
    assert found.metrics["base"] == pytest.approx(float(base))
