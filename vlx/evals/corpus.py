"""What retrieval searches: images and captions of a split, in one space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlx.core.errors import DataError
from vlx.evals.base import EvalData, Subject


@dataclass(frozen=True)
class Corpus:
    """N readable images with captions, their M captions, of which U are distinct texts."""

    sample_id: Tensor
    """(N,) int64, ascending: indices in the source."""
    images: Tensor
    """(N, E) float32 of unit length."""
    texts: list[str]
    """The U distinct ones."""
    text_features: Tensor
    """(U, E)."""
    owner: Tensor
    """(M,) int64: row of the image of each caption."""
    text: Tensor
    """(M,) int64: row of the text of each caption."""


def read_corpus(subject: Subject, data: EvalData) -> Corpus:
    """Features of what can be read; raises `DataError` where nothing can."""
    features = data.joint_features(subject, "test")
    captions = data.captions("test")
    rows: list[int] = []
    owner: list[int] = []
    words: list[str] = []
    for row, index in enumerate(features.sample_id.tolist()):
        if captions[index]:
            owner += [len(rows)] * len(captions[index])
            words += captions[index]
            rows.append(row)
    if not rows:
        raise DataError(f"no captions of {data.source('test').info.name} could be read")
    texts = list(dict.fromkeys(words))
    place = {text: row for row, text in enumerate(texts)}
    chosen = torch.tensor(rows, device=data.device)
    return Corpus(
        sample_id=features.sample_id[chosen],
        images=features.features[chosen],
        texts=texts,
        text_features=data.text_features(subject, texts),
        owner=torch.tensor(owner, device=data.device),
        text=torch.tensor([place[word] for word in words], device=data.device),
    )
