"""Learned context around the class names (Zhou et al., "CoOp", IJCV 2022).

C classes, M learned vectors, D width of the text tower.
"""

from __future__ import annotations

import torch
from torch import nn

from vlx.blocks.prompts import PLACE, Sentence
from vlx.core.capability import Capability
from vlx.core.errors import ConfigError
from vlx.core.method import Builder
from vlx.families.clip_tuning import PROMPT_STD, ClipTuning
from vlx.families.configs.clip_tuning import ClassPosition, ContextConfig


class ContextTuning(ClipTuning):
    """CoOp's: M learned vectors stand around the class name, in the space of word embeddings."""

    def build_prompts(self, build: Builder) -> Sentence:
        cfg: ContextConfig = self.cfg
        table = self.towers.text.token_table
        if cfg.context_init is None:
            classes = (build.num_classes,) if cfg.class_specific else ()
            start = torch.empty(*classes, cfg.context_tokens, table.embedding_dim)
            nn.init.normal_(start, std=PROMPT_STD)
        else:
            ids = self.word_ids(cfg.context_init, build)
            if not ids:
                raise ConfigError(f"method.context_init={cfg.context_init!r} holds no word")
            start = table.weight.detach()[ids].clone()
        self.context = nn.Parameter(start)
        count = start.shape[-2]
        ahead = {
            ClassPosition.end: count,
            ClassPosition.middle: count // 2,
            ClassPosition.front: 0,
        }[cfg.class_position]
        return Sentence((PLACE,) * ahead, (PLACE,) * (count - ahead), cfg.ending)

    def exports(self) -> tuple[Capability, ...]:
        logits, any_classes, features = super().exports()
        return (logits, features) if self.cfg.class_specific else (logits, any_classes, features)
