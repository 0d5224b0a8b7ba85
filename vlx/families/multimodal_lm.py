"""A language model that reads an image as a prefix of vectors, trained to caption it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlx.core.capability import Captioner
from vlx.core.fields import Batch
from vlx.core.method import Trainable
from vlx.core.step import StepContext, StepOutput
from vlx.core.text import Tokenizer
from vlx.encoders.language_model import LanguageModel
from vlx.ops.text import caption_loss, real_tokens


class MultimodalLM(Trainable):
    """Subclasses give `image_tokens`, and set `tokenizer` and `language_model`."""

    cfg: Any
    tokenizer: Tokenizer

    @property
    def lm(self) -> LanguageModel:
        """The language model, frozen or not."""
        raise NotImplementedError

    def image_tokens(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, S, D), D the language model's width."""
        raise NotImplementedError

    def words(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Captions (B, T) and their lengths (B,) without what the tokenizer puts before the words:
        the image stands there."""
        ahead = len(self.tokenizer.prefix)
        return batch["text"][:, ahead:], batch["text_length"] - ahead

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        image = self.image_tokens(batch["image"])  # (B, S, D)
        ids, lengths = self.words(batch)
        x = torch.cat([image, self.lm.embed(ids).to(image.dtype)], dim=1)  # (B, S + T, D)
        count = image.shape[1]
        real = torch.cat(
            [image.new_ones(image.shape[:2], dtype=torch.bool), real_tokens(lengths, ids.shape[1])],
            dim=1,
        )
        logits = self.lm(x, real, first=count - 1)  # (B, 1 + T, V)
        total, count = caption_loss(logits, ids, lengths, 1)
        return StepOutput({"lm": ctx.mean(total, "lm", count)})

    def counts(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Words of the captions, their end tokens among them."""
        return {"lm": self.words(batch)[1].sum()}

    @torch.no_grad()
    def caption(self, images: Tensor, prompt: str, max_new_tokens: int) -> list[str]:
        """Greedy captions that go on after the image and a prompt, which is not repeated."""
        image = self.image_tokens(images)
        ids = self._prompt_ids(prompt, image.device).expand(len(images), -1)
        x = torch.cat([image, self.lm.embed(ids).to(image.dtype)], dim=1)
        real = x.new_ones(x.shape[:2], dtype=torch.bool)
        rows = self.lm.generate(x, real, max_new_tokens, self.tokenizer.end_id)
        return [self.tokenizer.decode(row) for row in rows]

    def _prompt_ids(self, prompt: str, device: torch.device) -> Tensor:
        """(1, n): the words alone."""
        if not prompt:
            return torch.zeros(1, 0, dtype=torch.int64, device=device)
        found = self.tokenizer.encode([prompt])
        inside = slice(len(self.tokenizer.prefix), int(found.lengths[0]) - 1)
        return torch.from_numpy(found.ids[:, inside]).to(device)


class Captions(Captioner):
    """What such a model says of images."""

    def __init__(self, method: MultimodalLM, prompt: str) -> None:
        self.method, self.prompt = method, prompt

    def captions(self, images: Tensor, max_new_tokens: int) -> list[str]:
        return self.method.caption(images, self.prompt, max_new_tokens)
