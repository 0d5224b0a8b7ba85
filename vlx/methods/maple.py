"""MaPLe: multi-modal prompt learning (Khattak et al., CVPR 2023).

Learned tokens go into the first J layers of a frozen CLIP's text tower, and a linear map of each
into the same layer of its image tower, so that both towers are adapted together.

B batch, C classes, J depth of prompting, n prompts a layer, D_l and D_v widths of the towers.
Departures: prompts stay in fp32 (the official code casts them to half inside the blocks); the
schedule is CoOp's (`vlx.methods.coop`); `variant` has the paper's ablations at equal n and J.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from vlx.blocks.prompts import PLACE, AppendedPrompts, ClassTexts, DeepPrompts, Sentence
from vlx.core.errors import ConfigError
from vlx.core.method import Builder
from vlx.core.paper import Paper
from vlx.core.released import Renames, renamed
from vlx.families.clip_tuning import PROMPT_STD, ClipTuning
from vlx.families.configs.clip_tuning import ClipTuningConfig

PAPER = Paper(
    number=54,
    slug="maple",
    title="MaPLe: Multi-modal Prompt Learning",
    year=2023,
    venue="CVPR",
    url="https://arxiv.org/abs/2210.03117",
    family="clip-tuning",
    commands=("finetune",),
    modalities=("image", "text"),
    trainable_params=3_555_072,
)


class Variant(Enum):
    """Which towers have prompts of their own."""

    coupled = "coupled"
    independent = "independent"
    language = "language"
    vision = "vision"


@dataclass(kw_only=True)
class MapleConfig(ClipTuningConfig):
    prompt_tokens: int = 2
    """n: prompts of each layer and tower. Official config: 2."""
    prompt_depth: int = 9
    """J: layers with prompts of their own, the first one included. Official config: 9."""
    phrase: str | None = "a photo of a"
    """What stands before the class name; its first n tokens are where the first prompts start from
    and stand. null, or shorter than n: n prompts of N(0, 0.02^2) and nothing else."""
    variant: Variant = Variant.coupled
    """coupled: MaPLe; the ablations: independent (prompts in both towers without maps), language or
    vision (in one tower)."""

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 0), ("prompt_depth", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"method.{name}={value} must be at least {least}")


class CoupledPrompts(nn.Module):
    """`text`: the text tower's prompts (J, n, D_l). Called, gives the image tower's (J, n, D_v)."""

    def __init__(self, text: Tensor, image_dim: int) -> None:
        super().__init__()
        self.text = nn.Parameter(text)
        dim = text.shape[-1]
        first, deep = nn.Linear(dim, image_dim), nn.Linear(dim, image_dim)
        copies = [copy.deepcopy(deep) for _ in range(len(text) - 1)]  # alike, as published
        self.couplings = nn.ModuleList([first, *copies])

    def forward(self) -> Tensor:
        maps = zip(self.couplings, self.text, strict=True)
        return torch.stack([coupling(prompts) for coupling, prompts in maps])


class SeparatePrompts(nn.Module):
    """The same without maps; one of the towers may have no prompts (n = 0)."""

    def __init__(self, text: Tensor, vision: Tensor) -> None:
        super().__init__()
        self.text = nn.Parameter(text, requires_grad=text.numel() > 0)
        self.vision = nn.Parameter(vision, requires_grad=vision.numel() > 0)

    def forward(self) -> Tensor:
        return self.vision


_RELEASED: Renames = (
    (r"^prompt_learner\.token_(prefix|suffix)$", None),  # of the class names
    (r"^(image_encoder|text_encoder)\.|^logit_scale$", None),  # CLIP's own, frozen
    (r"^prompt_learner\.proj\.", "prompts.couplings.0."),
    (
        r"^prompt_learner\.compound_prompt_projections\.(\d+)\.",
        lambda match: f"prompts.couplings.{int(match[1]) + 1}.",
    ),
)
_FIRST, _DEEP = "prompt_learner.ctx", "prompt_learner.compound_prompts_text."


class Maple(ClipTuning):
    Config = MapleConfig
    shards = False

    def build_prompts(self, build: Builder) -> Sentence:
        cfg, depth = self.cfg, self.cfg.prompt_depth
        image, text = self.towers.image, self.towers.text
        image.check_hooks()
        shallower = min(image.spec.depth, text.spec.depth)
        if depth > shallower:
            raise ConfigError(
                f"method.prompt_depth={depth}: the shallower tower has {shallower} layers"
            )
        count = 0 if cfg.variant is Variant.vision else cfg.prompt_tokens
        phrase = [] if cfg.phrase is None else self.word_ids(cfg.phrase, build)
        start = torch.empty(depth, count, text.spec.dim)
        nn.init.normal_(start, std=PROMPT_STD)
        if count <= len(phrase):
            start[0] = text.token_table.weight.detach()[phrase[:count]]
            before = (PLACE,) * count + tuple(phrase[count:])
        else:
            before = (PLACE,) * count
        if cfg.variant is Variant.coupled:
            self.prompts: CoupledPrompts | SeparatePrompts = CoupledPrompts(start, image.spec.dim)
        else:
            seen = 0 if cfg.variant is Variant.language else cfg.prompt_tokens
            vision = torch.empty(depth, seen, image.spec.dim)
            self.prompts = SeparatePrompts(start, nn.init.normal_(vision, std=PROMPT_STD))
        return Sentence(before, ending=cfg.ending)

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From those of MaPLe's released models: CLIP is left out, the prompts are stacked."""
        found = renamed(state, _RELEASED)
        if _FIRST in found:
            deep = sorted((name for name in found if name.startswith(_DEEP)), key=_number)
            found["prompts.text"] = torch.stack([found.pop(name) for name in (_FIRST, *deep)])
        return found

    def image_features(self, images: Tensor) -> Tensor:
        tower, vision = self.towers.image, self.prompts()
        # They join the patches after the positions and before the norm that CLIP has there.
        first = tower.vit.norm_pre(vision[0])
        hook = AppendedPrompts(first, vision[1:], tower.spec.depth)
        return self.towers.embed_images(images, hook=hook)

    def text_features(self, image: Tensor, texts: ClassTexts) -> Tensor:
        text = self.prompts.text
        hook = DeepPrompts(len(self.towers.tokenizer.prefix), text[1:])
        return self.embed_names(texts, text[0], hook=hook)


def _number(name: str) -> int:
    return int(name.rsplit(".", 1)[1])


METHOD = Maple
