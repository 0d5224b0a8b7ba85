"""What an evaluator is, and the data it sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, TypeVar

import torch
from PIL import Image

from vlx.core.capability import Capability, ImageFeatures
from vlx.core.errors import VlxError
from vlx.core.fields import Batch
from vlx.data.config import DataConfig
from vlx.data.open import open_source
from vlx.data.pipeline import EvalPipeline
from vlx.data.source import Source
from vlx.data.subset import evenly
from vlx.data.views import evaluation_view
from vlx.evals.config import EvalConfig
from vlx.evals.features import Features, extract

C = TypeVar("C", bound=Capability)


class Subject:
    """What is evaluated: the capabilities that a method exports."""

    def __init__(self, name: str, capabilities: tuple[Capability, ...]) -> None:
        self.name = name
        self.capabilities = capabilities
        self.weights = "trained"
        """As `results.json` calls them: trained, untrained or ema."""
        self.features: dict[str, Features] = {}
        """By split; a subject's weights do not change, so evaluators share them."""

    def has(self, kind: type[Capability]) -> bool:
        return any(isinstance(capability, kind) for capability in self.capabilities)

    def get(self, kind: type[C]) -> C:
        """The capability of a kind; raises `VlxError` naming what there is instead."""
        for capability in self.capabilities:
            if isinstance(capability, kind):
                return capability
        offered = ", ".join(type(c).__mro__[1].__name__ for c in self.capabilities) or "nothing"
        raise VlxError(f"this evaluation needs {kind.__name__}; {self.name} exports {offered}")


class EvalData:
    """Both splits of the data under the deterministic evaluation view."""

    def __init__(
        self,
        data: DataConfig,
        cfg: EvalConfig,
        *,
        image_size: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.data, self.cfg = data, cfg
        self.image_size, self.device = image_size, device
        self.rank, self.world = rank, world
        self.num_bad = 0
        self._sources: dict[str, Source] = {}
        self._pipelines: dict[str, EvalPipeline] = {}

    def source(self, split: str) -> Source:
        """The source of `train` or `test` (whatever the data set calls them)."""
        if split not in self._sources:
            name = self.data.train_split if split == "train" else self.data.test_split
            self._sources[split] = open_source(self.data, name)
        return self._sources[split]

    def pipeline(self, split: str) -> EvalPipeline:
        """One for all evaluators, so that an unreadable sample is named and counted once."""
        if split not in self._pipelines:
            self._pipelines[split] = EvalPipeline(
                self.source(split),
                evaluation_view(self.cfg.crop_ratio),
                cfg=self.data,
                image_size=self.image_size,
                batch_size=self.cfg.batch_size,
                device=self.device,
                rank=self.rank,
                world=self.world,
            )
        return self._pipelines[split]

    def sample(self, split: str, count: int) -> Iterator[Batch]:
        """At most `count` samples spread evenly over a split, the same on every process."""
        pipeline = EvalPipeline(
            evenly(self.source(split), count),
            evaluation_view(self.cfg.crop_ratio),
            # Unreadable samples are counted by who reads the whole split, not by a picture.
            cfg=replace(self.data, corrupt_limit=1.0),
            image_size=self.image_size,
            batch_size=self.cfg.batch_size,
            device=self.device,
        )
        yield from (batch for batch in pipeline.batches() if len(batch["sample_id"]))

    def features(self, subject: Subject, split: str) -> Features:
        """Features and labels of a split, extracted once for a subject."""
        if split not in subject.features:
            subject.features[split] = extract(subject.get(ImageFeatures), self.pipeline(split))
        return subject.features[split]


@dataclass
class Evaluation:
    """What one evaluator found."""

    metrics: dict[str, float] = field(default_factory=dict)
    unit: str = "share"
    units: dict[str, str] = field(default_factory=dict)
    """Of metrics whose unit is another."""
    lists: dict[str, list[int]] = field(default_factory=dict)
    """Counts by layer."""
    split: str = ""
    num_samples: int = 0
    pictures: dict[str, Image.Image] = field(default_factory=dict)


class Evaluator(Protocol):
    """Measures a subject. Its name and version identify the protocol for ever: when a number
    could change, the version does."""

    name: ClassVar[str]
    version: ClassVar[int]
    requires: ClassVar[tuple[type[Capability], ...]]
    needs_labels: ClassVar[bool]

    def run(self, subject: Subject, data: EvalData) -> Evaluation: ...
