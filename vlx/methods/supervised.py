"""Supervised: a ViT trained on labels, fully or by its head alone.

The recipe is that of DeiT (Touvron et al., ICML 2021): crops, RandAugment, erasing, mixup and
CutMix, label smoothing, stochastic depth. `encoder.checkpoint=RUN` starts from a pre-trained run.

B batch, C classes.
Departures: repeated augmentation is `data.repeats`, 1 unless a preset says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlx.core.capability import Capability
from vlx.core.config import ClassifierConfig
from vlx.core.method import Builder
from vlx.core.paper import Paper
from vlx.encoders.base import EncoderFeatures
from vlx.families.classifier import Classifier, Logits

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


@dataclass(kw_only=True)
class SupervisedConfig(ClassifierConfig):
    freeze: bool = False
    """Train the head alone: linear probing by gradient descent."""


class Supervised(Classifier):
    Config = SupervisedConfig

    def __init__(self, cfg: SupervisedConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.encoder = build.vision(num_classes=self.num_classes)
        if cfg.freeze:
            for name, param in self.encoder.named_parameters():
                param.requires_grad_(".head." in f".{name}")

    def class_logits(self, images: Tensor) -> Tensor:
        return self.encoder.classify(self.encoder(images))

    def exports(self) -> tuple[Capability, ...]:
        return Logits(self), EncoderFeatures(self.encoder)


METHOD = Supervised
