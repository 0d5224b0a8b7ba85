"""Published weights: which of several a name means, and pixels at the scale they know."""

from __future__ import annotations

import logging

import pytest
import timm
import torch

from vlx.core.errors import ConfigError
from vlx.encoders.base import VisionEncoder
from vlx.encoders.build import build_encoder
from vlx.encoders.config import EncoderConfig
from vlx.encoders.published import load_published, published_statistics
from vlx.encoders.timm_vit import TimmVit

HALF = [0.5, 0.5, 0.5]


def without_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """timm's models with random weights in the place of downloads; the names that were asked for.

    What `load_published` does before and after is what a user gets.
    """
    asked: list[str] = []

    def published(self: TimmVit, cfg: EncoderConfig) -> torch.nn.Module:
        asked.append(cfg.name)
        return timm.create_model(cfg.name.split(".")[0], num_classes=0)

    monkeypatch.setattr(TimmVit, "published", published)
    return asked


def encoder_of(name: str) -> tuple[VisionEncoder, EncoderConfig]:
    statistics = published_statistics(name)
    assert statistics is not None
    cfg = EncoderConfig(name=name, mean=statistics[0], std=statistics[1])
    return build_encoder(cfg, 0, {}), cfg


def test_a_bare_name_of_several_weights_says_which_it_takes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_network(monkeypatch)
    caplog.set_level(logging.INFO)
    name = "vit_tiny_patch16_224"
    taken = timm.get_pretrained_cfg(name).tag  # type: ignore[union-attr]
    others = {full.split(".", 1)[1] for full in timm.list_pretrained(f"{name}.*")} - {taken}
    assert others
    load_published(*encoder_of(name))
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert f"was trained in {len(others) + 1} ways, and this timm takes {taken}" in warning
    assert f"encoder.name={name}.{taken}" in warning
    assert all(other in warning for other in others)
    caplog.clear()
    load_published(*encoder_of(f"{name}.{taken}"))
    load_published(*encoder_of("deit_tiny_patch16_224"))  # one set of weights: nothing to choose
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]
    assert f"weights of {name}.{taken}" in caplog.text
    assert "weights of deit_tiny_patch16_224.fb_in1k" in caplog.text


def test_pixels_at_another_scale_are_refused_unless_they_are_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = without_network(monkeypatch)
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert published_statistics(name) == (HALF, HALF)
    encoder, _ = encoder_of(name)
    imagenet = EncoderConfig(name=name)
    with pytest.raises(ConfigError, match=r"mean=\[0\.485.*set mean=\[0\.5, 0\.5, 0\.5\] beside"):
        load_published(encoder, imagenet)
    with pytest.raises(ConfigError, match=r"std=\[0\.229.*set std=\[0\.5, 0\.5, 0\.5\] beside"):
        load_published(encoder, EncoderConfig(name=name, mean=HALF))
    assert asked == []
    meant = EncoderConfig(name=name, foreign_statistics=True)
    encoder = build_encoder(meant, 0, {})
    load_published(encoder, meant)
    assert asked == [name]
    # They are kept: the same picture is another input than under the weights' own.
    assert (encoder.spec.mean, encoder.spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    grey = torch.full((1, 3, 2, 2), 0.5)
    expected = (0.5 - torch.tensor(meant.mean)) / torch.tensor(meant.std)
    torch.testing.assert_close(encoder.normalise(grey)[0, :, 0, 0], expected)


def test_a_model_without_published_weights_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = without_network(monkeypatch)
    cfg = EncoderConfig(name="vit_wee_patch16_reg1_gap_256")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    with pytest.raises(ConfigError, match="timm publishes no weights of vit_wee"):
        load_published(build_encoder(EncoderConfig(name="deit_tiny_patch16_224"), 0, {}), cfg)
    assert asked == []
