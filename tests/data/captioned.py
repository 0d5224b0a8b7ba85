"""A captioned source in memory."""

from __future__ import annotations

import numpy as np

from vlx.data.source import Sample, SourceInfo

WORDS = ("red", "green", "blue", "small", "large", "square", "disc", "cross")


class Pictures:
    """`count` images of one size, each with one to three captions of words; some unusable."""

    def __init__(self, count: int = 40, side: int = 8, bad: tuple[int, ...] = ()) -> None:
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        self.texts = [
            [f"{WORDS[i % 8]} {WORDS[(i // 8) % 8]} number {i} {k}" for k in range(1 + i % 3)]
            for i in range(count)
        ]
        self.bad = bad
        self.info = SourceInfo(
            "pictures", "train", count, ("image", "label", "caption"), ("a", "b")
        )

    def __len__(self) -> int:
        return len(self.images)

    def captions(self, index: int) -> list[str]:
        if index in self.bad:
            raise ValueError("an empty caption")
        return self.texts[index]

    def read(self, index: int) -> Sample:
        return {
            "image": self.images[index],
            "label": index % 2,
            "caption": self.captions(index),
        }

    def describe(self, index: int) -> str:
        return f"picture {index}"

    def labels(self) -> np.ndarray:
        return np.arange(len(self)) % 2
