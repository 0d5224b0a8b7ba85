"""Every name of timm's registry: an encoder that equals timm's model, or refused in one line.

Names are grouped by what differs beside numbers (`timm_kinds`): of every class and every value of
an argument a small model is built. On the meta device shapes and gradients cost no arithmetic;
numbers are compared where the code is ours (plain ViTs, made small), and once for every class of
timm where timm's own runs.
"""

from __future__ import annotations

from functools import cache

import pytest
import timm
import torch
from torch import Tensor

from tests.encoders.timm_kinds import cover, kinds, timm_names
from vlx.blocks.vit_block import BlockHook, UnsupportedBlock
from vlx.core.errors import ConfigError
from vlx.encoders.base import VisionEncoder
from vlx.encoders.build import build_encoder
from vlx.encoders.config import EncoderConfig
from vlx.encoders.timm_vit import TimmVit, is_plain_vit

pytestmark = pytest.mark.slow
CLASSES = 7
LARGE = 150_000_000  # parameters: minutes of arithmetic, for a forward that is timm's own


@cache
def all_kinds() -> dict[tuple[str, str], list[str]]:
    return kinds()


def plain_kinds() -> list[str]:
    return [names[0] for names in all_kinds().values() if is_plain_vit(names[0])]


def config(name: str) -> EncoderConfig:
    published = timm.get_pretrained_cfg(name)
    size = published.input_size[-1] if published else 224
    return EncoderConfig(name=name, image_size=size)


def build(cfg: EncoderConfig, num_classes: int) -> VisionEncoder | None:
    """None where it is refused, in one line."""
    try:
        return build_encoder(cfg, num_classes, {}).eval()
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either refused so, or checked by the caller
        return None


def test_every_name_is_of_a_kind() -> None:
    named = [name for names in all_kinds().values() for name in names]
    assert sorted(named) == sorted(timm_names())
    assert len(all_kinds()) < len(named) / 2


def test_every_argument_is_refused_or_uses_every_parameter() -> None:
    wrong, refused = {}, []
    for name in cover():
        try:
            with torch.device("meta"):
                encoder = build(config(name), CLASSES)
                if encoder is None:
                    refused.append(name)
                    continue
                images = torch.empty(2, 3, *[encoder.spec.image_size] * 2)
                out = encoder(images)
                logits = encoder.classify(out)
                assert logits.shape == (2, CLASSES), logits.shape
                count = encoder.spec.num_patches
                assert out.tokens.shape == (2, count, encoder.spec.dim), out.tokens.shape
                logits.sum().backward()
            unused = [key for key, p in encoder.named_parameters() if p.grad is None]
            assert not unused, f"{len(unused)} without gradient: {unused[:4]}"
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {str(error)[:200]}"
    assert len(refused) < 20, refused
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


def small(name: str, num_classes: int) -> TimmVit:
    """A plain ViT of that kind: two blocks, 4x4 patches, every parameter with its own value."""
    with torch.device("meta"):
        patch = timm.create_model(name, num_classes=0, depth=1).patch_embed.patch_size[0]  # type: ignore
    sizes = {"image_size": 4 * patch, "dim": 96, "depth": 2, "heads": 4}
    encoder = build(EncoderConfig(name=name, **sizes), num_classes)
    assert isinstance(encoder, TimmVit)
    vary(encoder)
    return encoder


@cache
def drawn() -> Tensor:
    return 0.05 * torch.randn(65_537, generator=torch.Generator().manual_seed(0))


def noise(like: Tensor, start: int = 0) -> Tensor:
    """The same numbers again and again; their count is prime, so that no two rows are equal."""
    count = like.numel()
    if like.device.type == "meta":
        return torch.empty_like(like)
    return drawn().roll(start).repeat(count // 65_537 + 1)[:count].view(like.shape)


def vary(encoder: VisionEncoder) -> None:
    with torch.no_grad():
        for index, param in enumerate(encoder.parameters()):
            param += noise(param, index)


def seen(encoder: VisionEncoder) -> tuple[Tensor, Tensor]:
    """Images and the same as the encoder's model sees them."""
    side = encoder.spec.image_size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return images, encoder.normalise(images)


@torch.no_grad()
def test_every_kind_of_plain_vit_is_timms() -> None:
    wrong = {}
    for name in plain_kinds():
        for num_classes in (CLASSES, 0):
            try:
                check_vit(small(name, num_classes))
            except Exception as error:
                wrong[name, num_classes] = f"{type(error).__name__}: {str(error)[:200]}"
    assert not wrong, wrong


def check_vit(encoder: TimmVit) -> None:
    images, pixels = seen(encoder)
    out = encoder(images)
    whole = torch.cat([out.prefix, out.tokens], 1)
    torch.testing.assert_close(whole, encoder.vit.forward_features(pixels))
    if encoder.vit.num_classes:
        torch.testing.assert_close(encoder.classify(out), encoder.vit(pixels))
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    kept = encoder(images, keep=order)
    expected = torch.stack([tokens[places] for tokens, places in zip(out.tokens, order)])
    torch.testing.assert_close(kept.tokens, expected, rtol=1e-3, atol=1e-4)
    try:
        encoder.check_hooks()
    except UnsupportedBlock as error:
        assert "\n" not in str(error)  # noqa: PT017 - either refused so, or equal below
    else:
        hooked = encoder(images, hook=BlockHook())
        torch.testing.assert_close(hooked.tokens, out.tokens, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_every_class_of_timm_gives_its_own_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawing initial weights is most of the time.
    for draw in ("normal_", "uniform_", "erfinv_"):
        monkeypatch.setattr(Tensor, draw, lambda tensor, *_, **__: tensor.copy_(noise(tensor)))
    wrong, seen_classes = {}, set()
    for (cls, _), names in all_kinds().items():
        if cls in seen_classes or is_plain_vit(names[0]):
            continue
        encoder = smallest(names)
        if encoder is None:
            continue
        seen_classes.add(cls)
        vary(encoder)
        images, pixels = seen(encoder)
        out, model = encoder(images), encoder.backbone
        assert out.features is not None
        same = torch.equal(out.features, model.forward_features(pixels))  # type: ignore[operator]
        if not same or not torch.equal(encoder.classify(out), model(pixels)):
            wrong[cls] = names[0]
    assert len(seen_classes) > 80
    assert not wrong, wrong


def smallest(names: list[str]) -> VisionEncoder | None:
    """On images of 64 pixels where it takes them, else of its own size; none where large."""
    sizes = (64, 96, config(names[0]).image_size)
    for size in sizes:
        with torch.device("meta"):
            found = build(EncoderConfig(name=names[0], image_size=size), CLASSES)
        if found is not None:
            if sum(p.numel() for p in found.parameters()) > LARGE:
                return None
            return build(EncoderConfig(name=names[0], image_size=size), CLASSES)
    return None
