"""What an evaluator is, and the data it sees."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlx.core.capability import Capability, DualEncoder, ImageFeatures
from vlx.core.errors import DataError, VlxError
from vlx.core.fields import Batch
from vlx.data.cache import digest
from vlx.data.class_names import with_classes
from vlx.data.config import DataConfig
from vlx.data.open import open_source
from vlx.data.pipeline import EvalPipeline
from vlx.data.source import Captioned, Source
from vlx.data.subset import Subset, evenly
from vlx.data.views import evaluation_view
from vlx.evals.config import EvalConfig
from vlx.evals.feature_cache import FeatureCache, Tensors
from vlx.evals.features import Features, extract, in_shares
from vlx.ops.resample import Interpolation

log = logging.getLogger("vlx")
C = TypeVar("C", bound=Capability)


class Subject:
    """What is evaluated: the capabilities that a method exports."""

    def __init__(self, name: str, capabilities: tuple[Capability, ...]) -> None:
        self.name = name
        self.capabilities = capabilities
        self.weights = "trained"
        """As `results.json` calls them: trained, untrained, ema or swad."""
        self.cache: FeatureCache | None = None
        """Where features are kept over evaluations; only for weights that change no more."""
        self._made: dict[tuple[str, ...], Tensors] = {}

    def has(self, kind: type[Capability]) -> bool:
        return any(isinstance(capability, kind) for capability in self.capabilities)

    def get(self, kind: type[C]) -> C:
        """The capability of a kind; raises `VlxError` naming what there is instead."""
        for capability in self.capabilities:
            if isinstance(capability, kind):
                return capability
        offered = ", ".join(type(c).__mro__[1].__name__ for c in self.capabilities) or "nothing"
        raise VlxError(f"this evaluation needs {kind.__name__}; {self.name} exports {offered}")

    def once(
        self,
        what: str,
        parts: tuple[str, ...],
        build: Callable[[], Tensors],
        *,
        rows: int | None,
        device: torch.device,
    ) -> Tensors:
        """`build()` of a name and all that it depends on besides the weights, for all evaluators.

        A subject's weights do not change. rows, device: as `FeatureCache.once` takes them.
        """
        key = (what, *parts)
        if key not in self._made:
            if self.cache is None:
                self._made[key] = build()
            else:
                self._made[key] = self.cache.once(what, parts, build, rows=rows, device=device)
        return self._made[key]


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
        self._classes: tuple[tuple[str, ...], str] | None = None
        self.image_size, self.device = image_size, device
        self.rank, self.world = rank, world
        self._sources: dict[str, Source] = {}
        self._pipelines: dict[str, EvalPipeline] = {}
        self._captions: dict[str, list[list[str]]] = {}

    @property
    def num_bad(self) -> int:
        """Unreadable samples that this process has met."""
        return sum(len(pipeline.bad.reasons) for pipeline in self._pipelines.values())

    def use_classes(self, names: tuple[str, ...], whose: str) -> None:
        """Number the classes as those of a trained classifier, by name.

        Sources that are opened afterwards raise `DataError` where their classes are others.
        """
        self._classes = names, whose
        self._sources.clear()

    def source(self, split: str) -> Source:
        """The source of `train` or `test` (whatever the data set calls them)."""
        if split not in self._sources:
            name = self.data.train_split if split == "train" else self.data.test_split
            source = open_source(self.data, name)
            if self._classes is not None and source.info.class_names:
                source = with_classes(source, *self._classes)
            self._sources[split] = source
        return self._sources[split]

    def pipeline(self, split: str) -> EvalPipeline:
        """One for all evaluators, so that an unreadable sample is named and counted once."""
        if split not in self._pipelines:
            self._pipelines[split] = self.pipeline_of(self.source(split))
        return self._pipelines[split]

    def pipeline_of(self, source: Source) -> EvalPipeline:
        """Of a source that is no split of the data as it stands (a half of its classes)."""
        return self._pipeline(source, self.data, shared=True)

    def _pipeline(self, source: Source, cfg: DataConfig, *, shared: bool) -> EvalPipeline:
        """shared: every process reads its share; else all read everything."""
        return EvalPipeline(
            source,
            evaluation_view(
                self.cfg.crop_ratio,
                squeeze=self.cfg.squeeze,
                interpolation=Interpolation[self.cfg.interpolation.name],
            ),
            cfg=cfg,
            image_size=self.image_size,
            batch_size=self.cfg.batch_size,
            device=self.device,
            rank=self.rank if shared else 0,
            world=self.world if shared else 1,
        )

    def sample(self, split: str, count: int) -> Iterator[Batch]:
        """At most `count` samples spread evenly over a split, the same on every process."""
        source = evenly(self.source(split), count)
        yield from (b for b in self._some(source).batches() if len(b["sample_id"]))

    def _some(self, source: Source, *, shared: bool = False) -> EvalPipeline:
        # Unreadable samples are counted by who reads the whole split, not by a picture.
        return self._pipeline(source, replace(self.data, corrupt_limit=1.0), shared=shared)

    def spread(self, split: str, count: int) -> tuple[np.ndarray, EvalPipeline]:
        """The same samples in shares of the processes, and their indices in the source."""
        source = evenly(self.source(split), count)
        return source.indices, self._some(source, shared=True)

    def images(self, split: str, indices: Sequence[int]) -> Tensor:
        """(n, 3, H, W) of readable samples, in the order of `indices`, on every process."""
        source = Subset(self.source(split), np.asarray(indices))
        return torch.cat([batch["image"] for batch in self._some(source).batches()])

    def features(self, subject: Subject, split: str) -> Features:
        """Features and labels of a split, extracted once for a subject."""
        encoder = subject.get(ImageFeatures)
        return self._features(subject, split, "image", encoder.image_features)

    def joint_features(self, subject: Subject, split: str) -> Features:
        """The same in the space that images share with texts, rows of unit length."""
        encoder = subject.get(DualEncoder)
        return self._features(subject, split, "joint", encoder.joint_image_features)

    def _features(
        self, subject: Subject, split: str, what: str, encode: Callable[[Tensor], Tensor]
    ) -> Features:
        found = subject.once(
            what,
            self._identity(split),
            lambda: vars(extract(encode, self.pipeline(split))),
            # A source that cannot say what it holds could be another one tomorrow.
            rows=len(self.source(split)) if self.source(split).info.fingerprint else None,
            device=self.device,
        )
        return Features(**found)

    def _identity(self, split: str) -> tuple[str, ...]:
        """All that decides which pixels and labels a split has; where it lies does not."""
        info = self.source(split).info
        matters = ("image_column", "label_column", "max_pixels", "max_side")
        keys = {key: getattr(self.data, key) for key in matters}
        view = {
            "image_size": self.image_size,
            "crop": "squeeze" if self.cfg.squeeze else self.cfg.crop_ratio,
            "interpolation": self.cfg.interpolation.value,
        }
        return info.fingerprint, json.dumps([*info.class_names]), json.dumps(keys | view)

    def text_features(self, subject: Subject, texts: Sequence[str]) -> Tensor:
        """(T, E) float32 of unit length, encoded once for a subject."""
        encode, size = subject.get(DualEncoder).text_features, self.cfg.batch_size
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]
        found = subject.once(
            "texts",
            (digest(*texts),),
            lambda: {"features": self.in_shares(batches, encode)},
            rows=len(texts),
            device=self.device,
        )
        return found["features"]

    def in_shares(
        self, batches: Sequence[Sequence[str]], encode: Callable[[Sequence[str]], Tensor]
    ) -> Tensor:
        """`features.in_shares` over this evaluation's processes."""
        return in_shares(batches, encode, device=self.device, rank=self.rank, world=self.world)

    def captions(self, split: str) -> list[list[str]]:
        """All captions of every sample by its index; [] where they cannot be used, which counts
        as an unreadable sample. Raises `DataError` where the source has none."""
        if split not in self._captions:
            source = self.source(split)
            if not isinstance(source, Captioned) or "caption" not in source.info.fields:
                raise DataError(f"{source.info.name} has no captions; this evaluation needs them")
            found, bad = [], []
            for index in range(len(source)):
                try:
                    own = source.captions(index)
                    if not own:
                        raise ValueError("it has no caption")
                    found.append(own)
                except ValueError as error:
                    found.append([])
                    bad.append((index, source.describe(index), str(error)))
            for line in self.pipeline(split).bad.add(bad):
                log.warning(line)
            self._captions[split] = found
        return self._captions[split]


@dataclass
class Evaluation:
    """What one evaluator found."""

    metrics: dict[str, float] = field(default_factory=dict)
    unit: str = "share"
    units: dict[str, str] = field(default_factory=dict)
    """Of metrics whose unit is another."""
    lists: dict[str, list[int]] = field(default_factory=dict)
    """Counts by layer or by class."""
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
    needs_captions: ClassVar[bool]

    def run(self, subject: Subject, data: EvalData) -> Evaluation: ...


def absent(evaluator: Evaluator, subject: Subject) -> str | None:
    """The first capability that an evaluator needs and a subject does not export, or nothing."""
    return next((k.__name__ for k in evaluator.requires if not subject.has(k)), None)


def lacking(evaluator: Evaluator, source: Source) -> str | None:
    """What a source has not that an evaluator needs: "labels", "captions", or nothing."""
    if evaluator.needs_labels and not source.info.num_classes:
        return "labels"
    captioned = isinstance(source, Captioned) and "caption" in source.info.fields
    return "captions" if evaluator.needs_captions and not captioned else None
