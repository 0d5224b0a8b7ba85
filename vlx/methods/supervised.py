"""Supervised: an encoder trained on labels: fully, by its last layers, by its head, by adapters.

The recipe is that of DeiT (Touvron et al., ICML 2021): crops, RandAugment, erasing, mixup and
CutMix, label smoothing, stochastic depth. `encoder.checkpoint=RUN` starts from a pre-trained run.

B batch, C classes.
Departures: repeated augmentation is `data.repeats`, 1 unless a preset says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from vlx.core.capability import Capability
from vlx.core.errors import ConfigError
from vlx.core.method import Builder
from vlx.core.paper import Paper
from vlx.encoders.adapters import MARKS, insert_ia3, insert_lora
from vlx.encoders.base import EncoderFeatures, VisionEncoder
from vlx.families.classifier import Classifier, Logits
from vlx.families.configs.classifier import ClassifierConfig

PAPER = Paper(
    number=0,
    slug="supervised",
    title="Training data-efficient image transformers & distillation through attention",
    year=2021,
    venue="ICML",
    url="https://arxiv.org/abs/2012.12877",
    family="classifier",
    commands=("finetune",),
    modalities=("image",),
    trainable_params=22_050_664,
    gmacs=4.599,
)


class Tune(Enum):
    """What is trained."""

    full = "full"
    head = "head"
    layers = "layers"
    lora = "lora"
    ia3 = "ia3"


@dataclass(kw_only=True)
class SupervisedConfig(ClassifierConfig):
    tune: Tune = Tune.full
    """full; head (linear probing by gradient descent); layers (the last `tuned_layers` blocks, the
    final norm and the head); lora or ia3 (adapters inside the blocks, and the head)."""
    tuned_layers: int = 2
    """layers: blocks that are trained, counted from the last."""
    rank: int = 8
    """lora: rank of the update. Hu et al. (2022): 4 to 8 is enough."""
    alpha: float = 16.0
    """lora: the update is scaled by alpha / rank. Ours: twice the rank."""
    lora_dropout: float = 0.0
    """lora: dropout on the update's input, 0..1."""


def freeze_all_but_last(encoder: VisionEncoder, count: int) -> None:
    """Leave the last `count` layers of an encoder trainable, and what belongs to no layer.

    Raises `ConfigError` where the encoder has fewer layers, or names none.
    """
    depths = encoder.layer_depths()
    top = max(depths.values(), default=0)
    if not 1 <= count <= top:
        raise ConfigError(f"method.tuned_layers={count}: this encoder has {top} layers to choose")
    for name, param in encoder.named_parameters():
        found = [d for prefix, d in depths.items() if f"{name}.".startswith(f"{prefix}.")]
        param.requires_grad_(not found or found[0] > top - count)


class Supervised(Classifier):
    Config = SupervisedConfig

    def __init__(self, cfg: SupervisedConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.encoder = build.vision(num_classes=self.num_classes)
        self.frozen_base = cfg.tune is not Tune.full
        if cfg.tune is Tune.lora:
            insert_lora(self.encoder, cfg.rank, cfg.alpha, cfg.lora_dropout)
        elif cfg.tune is Tune.ia3:
            insert_ia3(self.encoder)
        elif cfg.tune is Tune.layers:
            freeze_all_but_last(self.encoder, cfg.tuned_layers)
        elif cfg.tune is Tune.head:
            self.encoder.requires_grad_(False)
        if self.frozen_base:
            for name, param in self.encoder.named_parameters():
                if ".head." in f".{name}":
                    param.requires_grad_(True)

    def frozen_parts(self) -> tuple[str, ...]:
        return ("encoder",) if self.frozen_base else ()

    def inserted(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if any(m in name for m in MARKS)]

    def train(self, mode: bool = True) -> Supervised:
        """Batch norms of a frozen base keep their statistics."""
        super().train(mode)
        for part in self.modules():
            frozen = not any(param.requires_grad for param in part.parameters())
            if frozen and isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self

    def class_logits(self, images: Tensor) -> Tensor:
        return self.encoder.classify(self.encoder(images))

    def exports(self) -> tuple[Capability, ...]:
        return Logits(self), EncoderFeatures(self.encoder)


METHOD = Supervised
