"""LiMBeR: linearly mapping from image to text space (Merullo et al., ICLR 2023).

A frozen image encoder, a frozen language model, and one linear layer that turns each image vector
into a vector that the language model reads as a word: is that enough to say what an image shows?

B batch, S image tokens, E encoder width, D language model's width, T caption tokens.
Departures: every caption ends in the end token (the official code's longest of a batch does not);
frozen towers stay in eval mode (there, the batch norms of CLIP's ResNet drift); the images are
normalised for every encoder (there, not for NF-ResNet50); captions are decoded greedily, or drawn
from a true nucleus (`ops.decoding`), where the official top-p filter leaves nearly one word. The
rate falls to 0 over the run; the official configs name 300,000 steps for a run of 15,000.
`trains` beside `map` is ours: there is no small pretrained language model offline.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from vlx.blocks.frozen import Frozen
from vlx.core.capability import Capability
from vlx.core.config import MethodConfig
from vlx.core.fields import Batch, Needs, ViewSpec
from vlx.core.method import Builder
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures
from vlx.encoders.language_model import LanguageModel
from vlx.families.dual_encoder import PAIR_FIELDS
from vlx.families.multimodal_lm import Captions, MultimodalLM
from vlx.ops.augment import CenterCrop
from vlx.ops.text import caption_loss, real_tokens

PAPER = Paper(
    number=5,
    slug="limber",
    title="Linearly Mapping from Image to Text Space",
    year=2023,
    venue="ICLR",
    url="https://arxiv.org/abs/2209.15162",
    family="multimodal-lm",
    commands=("align",),
    modalities=("image", "text"),
    trainable_params=12_587_008,
)


class Trains(Enum):
    """What is trained."""

    map = "map"
    language_model = "language_model"
    both = "both"


@dataclass(kw_only=True)
class LimberConfig(MethodConfig):
    pool: bool = False
    """Average the image tokens into one. Paper: NF-ResNet50, whose S is 1; else every position."""
    dropout: float = 0.1
    """Dropout on the mapped image, 0..1, in training. Official config: 0.1."""
    prompt: str = "A picture of"
    """What captions go on from. Paper section 3.1: "A picture of"."""
    trains: Trains = Trains.map
    """map: the paper. language_model: captions alone, without images, for a language model to
    start from (text.checkpoint=RUN text.tokenizer=RUN). both: the map and the language model."""


class Limber(MultimodalLM):
    Config = LimberConfig

    def __init__(self, cfg: LimberConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.tokenizer = build.tokenizer
        self.frozen_base = cfg.trains is Trains.map
        self.encoder = Frozen(build.vision())
        model = build.language_model(frozen=self.frozen_base)
        self.language_model = Frozen(model) if self.frozen_base else model
        self.map = nn.Linear(self.encoder.module.spec.dim, model.spec.dim)
        self.map.requires_grad_(cfg.trains is not Trains.language_model)
        self.dropout = nn.Dropout(cfg.dropout)
        self.loss = self.text_loss if cfg.trains is Trains.language_model else super().step

    @classmethod
    def needs(cls, cfg: LimberConfig) -> Needs:
        if cfg.trains is Trains.language_model:
            return Needs(views=(), fields=PAIR_FIELDS)
        return Needs(views=(ViewSpec("image", ops=(CenterCrop(ratio=1.0),)),), fields=PAIR_FIELDS)

    @property
    def lm(self) -> LanguageModel:
        found = self.language_model
        return found.module if isinstance(found, Frozen) else found  # type: ignore[return-value]

    def inserted(self) -> tuple[str, ...]:
        return ("map",)

    def image_tokens(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = self.encoder.module(images).tokens  # (B, S, E)
        if self.cfg.pool:
            tokens = tokens.mean(1, keepdim=True)  # (B, 1, E)
        return self.dropout(self.map(tokens))

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        return self.loss(batch, ctx)

    def text_loss(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Captions as plain text, after the start token where there is one."""
        ids, lengths = batch["text"], batch["text_length"]
        logits = self.lm(self.lm.embed(ids), real_tokens(lengths, ids.shape[1]))
        total, count = caption_loss(logits, ids, lengths, 0)
        return StepOutput({"lm": ctx.mean(total, "lm", count)})

    def counts(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        if self.cfg.trains is Trains.language_model:  # nothing stands before a first token
            return {"lm": (batch["text_length"] - 1).sum()}
        return super().counts(batch, ctx)

    def exports(self) -> tuple[Capability, ...]:
        if self.cfg.trains is Trains.language_model:
            return ()
        return Captions(self, self.cfg.prompt), EncoderFeatures(self.encoder.module)


METHOD = Limber
