"""Evaluation at the end of a run and by `vlx eval`. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class EvalConfig:
    at_end: list[str] = field(default_factory=lambda: ["knn", "linear-probe", "reconstruction"])
    """Evaluators to run on the finished run, where the data allows them."""
    compare_untrained: bool = True
    """Run them on the same model as it was before training too."""
    every_epochs: int = 0
    """Run `during` every so many epochs; 0 never."""
    during: list[str] = field(default_factory=lambda: ["knn"])
    """Evaluators to run during training."""
    batch_size: int = 256
    """Images at a time."""
    crop_ratio: float = 1.0
    """Side of the central square taken, as a share of the short side. ImageNet practice: 0.875."""
    speed_batches: list[int] = field(default_factory=lambda: [32])
    """Batch sizes at which `tokens` measures images/s; [] measures none."""
    templates: str = "simple"
    """Sentences that `zero-shot` puts class names in: none, simple or imagenet."""
