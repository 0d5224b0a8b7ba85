"""Masked language modelling: which words are hidden, and behind what (Devlin et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASKED, _RANDOM = 0.8, 0.1  # of the chosen: a mask, another word, else unchanged


@dataclass(frozen=True)
class MaskedWords:
    """Chosen words of a batch of captions, (B, L) each."""

    chosen: Tensor
    """bool: to be predicted."""
    masked: Tensor
    """bool: shown as the mask token."""
    ids: Tensor
    """int64: what is shown elsewhere; some of the chosen words are another word."""


def choose_words(
    ids: Tensor, may: Tensor, u: Tensor, *, mask_ratio: float, vocab_size: int
) -> MaskedWords:
    """BERT's rule: every word that `may (B, L)` be hidden is chosen with probability `mask_ratio`;
    of the chosen 80 % are shown as the mask token, 10 % as a random word, 10 % as they are.

    ids: (B, L); u: (B, 3 L) uniform in [0, 1).
    """
    pick, kind, word = u.chunk(3, dim=1)
    chosen = may & (pick < mask_ratio)
    masked = chosen & (kind < _MASKED)
    other = chosen & (kind >= _MASKED) & (kind < _MASKED + _RANDOM)
    random_ids = (word * vocab_size).long().clamp(max=vocab_size - 1)
    return MaskedWords(chosen, masked, torch.where(other, random_ids, ids))


def distilled_words(logits: Tensor, taught: Tensor, ids: Tensor, alpha: float) -> Tensor:
    """(B, L) cross-entropy of each word against its id, mixed with the teacher's softmax (ALBEF, Li
    et al. 2021, equation 7).

    logits, taught: (B, L, V); ids: (B, L).
    """
    log_probabilities = logits.log_softmax(-1)
    by_id = -log_probabilities.gather(-1, ids[..., None])[..., 0]
    by_teacher = -(taught.softmax(-1) * log_probabilities).sum(-1)
    return (1 - alpha) * by_id + alpha * by_teacher
