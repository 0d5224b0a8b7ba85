"""Evaluation at the end of a run and by `vlx eval`. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vlx.core.errors import ConfigError


class Templates(Enum):
    """Sentences that zero-shot classification puts a class name into."""

    none = "none"
    simple = "simple"
    imagenet = "imagenet"


class Resampling(Enum):
    """Filters that images are resized by, antialiased; names of `ops.resample.Interpolation`."""

    bilinear = "bilinear"
    bicubic = "bicubic"


@dataclass(kw_only=True)
class EvalConfig:
    at_end: list[str] = field(default_factory=lambda: ["knn", "linear-probe", "reconstruction"])
    """Evaluators to run on the finished run, where the data allows them."""
    compare_untrained: bool = True
    """Run them on the same model as it was before training too."""
    every_epochs: int = 0
    """Run `during` every so many epochs; 0 never."""
    every_steps: int = 0
    """Run `during` every so many steps in the place of epochs; 0 leaves it to `every_epochs`."""
    during: list[str] = field(default_factory=lambda: ["knn"])
    """Evaluators to run during training, on `data.val_split` where there is one."""
    batch_size: int = 256
    """Images (or texts) at a time."""
    crop_ratio: float = 1.0
    """Side of the central square taken, as a share of the short side. ImageNet practice: 0.875."""
    squeeze: bool = False
    """Resize the whole image to a square in the place of a crop; `crop_ratio` is then without
    effect."""
    interpolation: Resampling = Resampling.bicubic
    """Filter that crop or image is resized by: bicubic or bilinear."""
    speed_batches: list[int] = field(default_factory=lambda: [32])
    """Batch sizes at which `tokens` measures images/s; [] measures none."""
    templates: Templates = Templates.simple
    """Sentences of `zero-shot`: none (the bare class name), simple (7) or imagenet (80), CLIP's."""
    template_list: list[str] = field(default_factory=list)
    """Your own sentences in the place of `templates`, {} where the class name goes, e.g.
    'a photo of a {}.'"""
    rerank: int = 0
    """Candidates of `retrieval` that a model that scores pairs ranks again; 0 none. ALBEF: 256 on
    COCO, 128 on Flickr30k."""
    caption_samples: int = 500
    """Images that `caption` describes, spread evenly over the test split."""
    cache_features: bool = True
    """Let `vlx eval` keep features in ~/.cache/vlx/features for the next evaluation of the same
    weights on the same data; training never does."""

    def __post_init__(self) -> None:
        for template in self.template_list:
            if "{}" not in template:
                raise ConfigError(
                    f"eval.template_list: '{template}' has no {{}} where the class name goes, "
                    "e.g. 'a photo of a {}.'"
                )
        if self.every_steps < 0 or self.every_epochs < 0:
            raise ConfigError("eval.every_steps and eval.every_epochs must be at least 0, never")
        if self.rerank < 0:
            raise ConfigError(f"eval.rerank={self.rerank} must be at least 0, which is off")
        if self.caption_samples < 1:
            raise ConfigError(f"eval.caption_samples={self.caption_samples} must be at least 1")
