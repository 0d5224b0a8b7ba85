"""A small CLIP with CLIP's own tokenizer, and the paper's on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vlx.core.fields import Batch
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig, TextConfig
from vlx.encoders.tokenizers import clip_tokenizer
from vlx.families.clip_tuning import ClipTuning
from vlx.families.configs.clip_tuning import ClipTuningConfig

M = TypeVar("M", bound=ClipTuning)
VIT = "vit_base_patch16_clip_quickgelu_224"
SMALL = EncoderConfig(name=VIT, image_size=32, patch_size=16, dim=32, depth=3, heads=1)
SMALL_TEXT = TextConfig(dim=32, depth=3, heads=2, context_length=16)
NAMES = ("cat", "flat_screen tv", "dog", "hibiscus", "x-ray")


def small(
    cls: type[M],
    cfg: ClipTuningConfig,
    *,
    names: Sequence[str] = NAMES,
    encoder: EncoderConfig = SMALL,
    text: TextConfig = SMALL_TEXT,
) -> M:
    """A method beside a small CLIP whose weights no seed of a test changes."""
    torch.manual_seed(0)
    builder = EncoderBuilder(
        {"encoder": encoder},
        len(names),
        load_weights=False,
        text=text,
        tokenizer=clip_tokenizer(text.context_length),
        class_names=tuple(names),
    )
    cfg.embed_dim = 16
    return cls(cfg, builder)


def published(
    cls: type[M],
    cfg: ClipTuningConfig,
    *,
    encoder: str = VIT,
    num_classes: int = 100,
) -> M:
    """The method beside CLIP's published sizes, without memory."""
    with torch.device("meta"):
        builder = EncoderBuilder(
            {"encoder": EncoderConfig(name=encoder)},
            num_classes,
            load_weights=False,
            text=TextConfig(),
            tokenizer=clip_tokenizer(),
        )
        return cls(cfg, builder)


def trainable(method: torch.nn.Module) -> int:
    return sum(p.numel() for p in method.parameters() if p.requires_grad)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def batch(count: int = 4) -> Batch:
    return {"image": images(count), "label": torch.arange(count) % len(NAMES)}


def zero_shot(method: ClipTuning, template: str, names: Sequence[str] = NAMES) -> Tensor:
    """Logits (3, C) of the towers alone and written sentences."""
    texts = [template.format(name.replace("_", " ")) for name in names]
    with torch.no_grad():
        image, text = method.towers.embed_images(images()), method.towers.embed_texts(texts)
        return method.logit_scale() * image @ text.T


def logits(method: ClipTuning, names: Sequence[str] | None = None) -> Tensor:
    with torch.no_grad():
        if names is None:
            return method.class_logits(images())
        return method.logits_of(images(), names)


def frozen_bits(method: ClipTuning) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in method.named_parameters() if not p.requires_grad}


def assert_trains_only_prompts(method: ClipTuning, trained: set[str]) -> None:
    """Three updates change every parameter that starts with a name of `trained`, and no other."""
    from tests.contract.build import context

    own = {n for n, p in method.named_parameters() if p.requires_grad}
    assert own
    assert all(name.startswith(tuple(trained)) for name in own)
    assert not any(name.startswith(("towers", "logit_scale")) for name in own)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.train()
    assert not any(part.training for part in method.towers.modules())
    sgd = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        sgd.zero_grad()
        method.step(batch(), context()).losses["class"].backward()
        sgd.step()
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in own), name
