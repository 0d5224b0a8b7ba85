"""GMACs are those of the shapes, whatever kernel runs."""

from __future__ import annotations

import pytest
import timm
import torch

from vlx.evals.tokens import gmacs


def test_the_cpus_fused_attention_is_counted() -> None:
    """12 blocks of 17 tokens and width 192: 12 D^2 a token and 2 N^2 D for the map."""
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=0).eval()
    blocks = 12 * (12 * 17 * 192**2 + 2 * 17**2 * 192)
    expected = (blocks + 16 * 768 * 192) / 1e9  # the patch convolution
    with torch.no_grad():
        assert gmacs(model, 64, torch.device("cpu")) == pytest.approx(expected, rel=1e-12)
        meta = gmacs(model.to("meta"), 64, torch.device("meta"))
    assert meta == pytest.approx(expected, rel=1e-12)
