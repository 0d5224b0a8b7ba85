"""Classification by a frozen CLIP beside which little is trained: prompts.

B batch, C classes, M learned vectors, L tokens of a text, D width of the text tower, E joint width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlx.blocks.logit_scale import LogitScale
from vlx.blocks.prompts import ClassTexts, Sentence, words_of
from vlx.blocks.vit_block import BlockHook
from vlx.core.capability import Capability, OpenVocabulary
from vlx.core.errors import ConfigError
from vlx.core.fields import LABEL, Batch, Needs, ViewSpec
from vlx.core.method import Builder, ParamGroup, Trainable
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures
from vlx.encoders.clip_weights import load_clip
from vlx.families.classifier import Logits
from vlx.families.configs.clip_tuning import ClipTuningConfig
from vlx.families.dual_encoder import Towers
from vlx.ops.augment import HorizontalFlip, RandomResizedCrop
from vlx.ops.precision import without_autocast
from vlx.ops.tokens import put_tokens

log = logging.getLogger("vlx")
PROMPT_STD = 0.02
"""Deviation of prompts that start from no words. CoOp's code: 0.02."""


class ClipTuning(Trainable):
    """Cross-entropy of scaled cosines between images and sentences that name the classes.

    Subclasses give `build_prompts` and `text_features`; towers and temperature never change and
    stay in eval mode.
    """

    frozen_base = True
    cfg: Any

    def __init__(self, cfg: ClipTuningConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        if build.num_classes < 2:
            raise ConfigError(
                "a classifier needs labels, and the data has none: `vlx data show` says what it has"
            )
        self.towers = Towers(build, cfg.embed_dim)
        self.logit_scale = LogitScale()
        if build.load_weights and cfg.weights is not None:
            load_clip(self.towers, self.logit_scale, cfg.weights)
        elif build.load_weights:
            log.warning(
                "CLIP stays frozen with random weights, which no prompt can mend: set "
                "method.weights=RUN text.tokenizer=RUN, a run of `vlx align clip`"
            )
        self.towers.requires_grad_(False)
        self.logit_scale.requires_grad_(False)
        self.sentence = self.build_prompts(build)
        numbers = range(build.num_classes)  # shapes alone matter where the names are not known
        self.class_names = build.class_names or tuple(f"class {number}" for number in numbers)
        self.texts = self.texts_of(self.class_names)
        if build.load_weights and self.texts.cut:
            log.warning(
                f"{len(self.texts.cut)} class names do not fit text.context_length="
                f"{self.towers.tokenizer.context_length} beside the prompt and are cut: "
                f"{', '.join(self.texts.cut[:3])}"
            )

    @classmethod
    def needs(cls, cfg: ClipTuningConfig) -> Needs:
        crop = RandomResizedCrop(scale=(cfg.crop_scale[0], cfg.crop_scale[1]))
        view = ViewSpec("image", ops=(crop, HorizontalFlip(cfg.flip)))
        return Needs(views=(view,), fields=(LABEL,))

    def build_prompts(self, build: Builder) -> Sentence:
        """Make what is trained, on top of the loaded towers; returns how a class is named."""
        raise NotImplementedError

    def text_features(self, image: Tensor, texts: ClassTexts) -> Tensor:
        """(C, E) of unit length, or (B, C, E) where they depend on `image (B, E)`."""
        raise NotImplementedError

    def image_features(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, E) of unit length."""
        with torch.no_grad():
            return self.towers.embed_images(images)

    def texts_of(self, class_names: Sequence[str]) -> ClassTexts:
        """Underscores in names are spaces."""
        device = self.logit_scale.log.device
        return ClassTexts(self.towers.tokenizer, class_names, self.sentence, device)

    def word_ids(self, words: str, build: Builder) -> list[int]:
        """Token ids of words that are to stand beside a class name."""
        tokenizer = self.towers.tokenizer
        (ids,) = words_of(tokenizer, [words])
        # Where shapes alone matter, a tokenizer that will be trained knows bytes only, so that the
        # words have more tokens than they will have.
        return ids if build.load_weights else ids[: tokenizer.context_length - 3]

    def embed_names(
        self, texts: ClassTexts, vectors: Tensor, *, hook: BlockHook | None = None
    ) -> Tensor:
        """Sentences with learned vectors in their places.

        vectors: (M, D), (C, M, D), or (b, 1, M, D) for b images; hook: acts inside the text tower.
        Returns (C, E) or (b, C, E), of unit length.
        """
        count, length = texts.ids.shape
        shape = torch.broadcast_shapes(vectors.shape[:-2], (count,))  # (C,) or (b, C)
        table = self.towers.text.token_table
        x = table(texts.ids).expand(*shape, length, -1).flatten(0, -3)  # (b C, L, D)
        vectors = vectors.expand(*shape, -1, -1).flatten(0, -3)  # (b C, M, D)
        slots = texts.slots.expand(*shape, -1).flatten(0, -2)
        x = put_tokens(x, slots, vectors)
        ids = texts.ids.expand(*shape, length).flatten(0, -2)
        lengths = texts.lengths.expand(shape).flatten()
        found = self.towers.embed_text(ids, lengths, embeddings=x, hook=hook)
        return found.unflatten(0, shape)

    def _logits(self, images: Tensor, texts: ClassTexts) -> Tensor:
        image = self.image_features(images)
        text = self.text_features(image, texts)
        with without_autocast(image):
            image, text = self.logit_scale() * image.float(), text.float()
            if text.ndim == 2:
                return image @ text.T
            return (text @ image.unsqueeze(-1)).squeeze(-1)

    def class_logits(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, C) for the classes of the data."""
        return self._logits(images, self.texts)

    def logits_of(self, images: Tensor, class_names: Sequence[str]) -> Tensor:
        """The same for classes of any names."""
        if tuple(class_names) == self.class_names:
            return self._logits(images, self.texts)
        return self._logits(images, self.texts_of(class_names))

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        logits, labels = self.class_logits(batch["image"]), batch["label"]
        hits = (logits.detach().argmax(1) == labels).float().mean()
        return StepOutput({"class": cross_entropy(logits, labels)}, {"accuracy": hits})

    def train(self, mode: bool = True) -> ClipTuning:
        super().train(mode)
        self.towers.eval()
        return self

    def frozen_parts(self) -> tuple[str, ...]:
        return "towers", "logit_scale"

    def inserted(self) -> list[str]:
        return [name for name, param in self.named_parameters() if param.requires_grad]

    def param_groups(self) -> list[ParamGroup]:
        """One group: in CoOp's code weight decay acts on all that is trained, biases too."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return [ParamGroup("prompts", named)]

    def exports(self) -> tuple[Capability, ...]:
        return Logits(self), _AnyClasses(self), EncoderFeatures(self.towers.image)


class _AnyClasses(OpenVocabulary):
    def __init__(self, method: ClipTuning) -> None:
        self.method = method

    def logits_of(self, images: Tensor, class_names: Sequence[str]) -> Tensor:
        return self.method.logits_of(images, class_names)
