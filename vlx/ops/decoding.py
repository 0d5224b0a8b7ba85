"""Which token comes next, given the logits of every token of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def greedy(logits: Tensor) -> Tensor:
    """(B, V) to the likeliest token of each row (B,)."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class Nucleus:
    """Draws from the fewest tokens that hold `top_p` of the probability (Holtzman et al. 2020)."""

    temperature: float
    """Divides the logits; above 0."""
    top_p: float
    """0..1; 1 draws from all tokens."""
    generator: torch.Generator
    """On the device of the logits."""

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, V) to one token a row (B,)."""
        chances = (logits / self.temperature).softmax(-1)
        chances, order = chances.sort(-1, descending=True)
        before = chances.cumsum(-1) - chances  # what the likelier tokens hold together
        kept = chances.masked_fill(before >= self.top_p, 0.0)
        kept[:, 0] = chances[:, 0]  # top_p = 0 leaves the likeliest
        drawn = torch.multinomial(kept, 1, generator=self.generator)  # (B, 1)
        return order.gather(1, drawn)[:, 0]
