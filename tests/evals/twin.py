"""Images with captions, and a dual encoder that knows them: what the evaluators of images and texts
are tested on. Vectors are drawn from a generator of a sample's or a text's own seed."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlx.core.capability import Captioner, DualEncoder, PairScorer
from vlx.data.config import DataConfig
from vlx.data.source import Sample, SourceInfo
from vlx.evals.base import EvalData, Subject
from vlx.evals.config import EvalConfig

SIDE = 8
DIM = 16
WORDS = ("red", "big", "dog", "on", "grass", "two", "the", "street", "a", "tiny", "near", "cars")


class Pairs:
    """`count` images whose first pixel says their index, labels and 1 to `most` captions each.

    bad: captions of these samples raise `ValueError`.
    """

    def __init__(
        self, count: int = 40, *, classes: Sequence[str] = ("a_b", "c", "d", "e", "f", "g", "h"),
        most: int = 4, duplicates: bool = False, bad: Sequence[int] = (),
    ) -> None:  # fmt: skip
        draw = np.random.default_rng(count)
        self.pixels = draw.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
        self.pixels[:, 0, 0, 0] = np.arange(count)
        self.own = draw.integers(0, len(classes), count)
        vocabulary = WORDS[:3] if duplicates else WORDS
        length = 2 if duplicates else 7
        self.texts = [
            [" ".join(draw.choice(vocabulary, length)) for _ in range(draw.integers(1, most + 1))]
            for _ in range(count)
        ]
        self.bad = set(bad)
        self.info = SourceInfo(
            "pairs", "test", count, ("image", "label", "caption"), tuple(classes), f"pairs{count}"
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> Sample:
        return {"image": self.pixels[index], "label": int(self.own[index])}

    def describe(self, index: int) -> str:
        return f"pair {index}"

    def labels(self) -> np.ndarray:
        return self.own

    def captions(self, index: int) -> list[str]:
        if index in self.bad:
            raise ValueError("empty caption")
        return self.texts[index]


def vector(name: str) -> Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(crc32(name.encode())))


def indices(images: Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().long().tolist()


class Twin(DualEncoder, PairScorer, Captioner):
    """An image is near its first caption, or without a source anywhere."""

    def __init__(self, source: Pairs, noise: float = 1.5) -> None:
        self.source, self.noise = source, noise
        self.num_images = self.num_texts = 0

    @property
    def logit_scale(self) -> float:
        return 100.0

    def image_vector(self, index: int) -> Tensor:
        return vector(self.source.texts[index][0]) + self.noise * vector(f"image {index}")

    def joint_image_features(self, images: Tensor) -> Tensor:
        self.num_images += len(images)
        return normalize(torch.stack([self.image_vector(i) for i in indices(images)]), dim=1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        self.num_texts += len(texts)
        return normalize(torch.stack([vector(text) for text in texts]), dim=1)

    def pair_scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self.pair(i, t) for i, t in zip(indices(images), texts, strict=True)])

    def pair(self, index: int, text: str) -> float:
        return float(vector(f"{index} {text}")[0])

    def captions(self, images: Tensor, max_new_tokens: int) -> list[str]:
        return [self.source.texts[i][-1] + " again" for i in indices(images)]


def subject(source: Pairs, **keys: float) -> Subject:
    return Subject("twin", (Twin(source, **keys),))


def eval_data(source: Pairs, *, rank: int = 0, world: int = 1, **keys) -> EvalData:
    cfg = EvalConfig(**{"batch_size": 7, **keys})
    data = EvalData(
        DataConfig(workers=0, corrupt_limit=0.5), cfg, image_size=SIDE,
        device=torch.device("cpu"), rank=rank, world=world,
    )  # fmt: skip
    data._sources["test"] = source
    return data
