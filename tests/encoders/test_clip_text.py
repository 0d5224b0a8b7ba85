"""CLIP's text transformer: its mask, its sizes, its hooks."""

from __future__ import annotations

import pytest
import torch

from vlx.blocks.vit_block import BlockHook
from vlx.core.errors import ConfigError
from vlx.encoders.clip_text import ClipText
from vlx.encoders.config import TextConfig

SMALL = TextConfig(context_length=10, dim=48, depth=2, heads=3)


def small(**kwargs) -> ClipText:
    torch.manual_seed(0)
    return ClipText(SMALL, 50, **kwargs).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 50, (4, 10), generator=torch.Generator().manual_seed(0))
    return ids, torch.tensor([10, 7, 3, 1])


@pytest.mark.parametrize(
    ("dim", "depth", "expected"),
    [(512, 12, 63_428_096), (512, 6, 44_513_792), (768, 12, 123_650_304)],
)
def test_sizes_are_clips(dim: int, depth: int, expected: int) -> None:
    with torch.device("meta"):
        text = ClipText(TextConfig(dim=dim, depth=depth), 49408)
    assert sum(p.numel() for p in text.parameters()) + dim * dim == expected  # with the projection
    assert text.spec.heads == dim // 64


def test_what_follows_the_end_token_changes_nothing_and_what_precedes_it_does() -> None:
    text, (ids, lengths) = small(), batch()
    before = text(ids, lengths).pooled
    after_end, earlier = ids.clone(), ids.clone()
    after_end[1, 7:] = 5
    earlier[1, 3] = (ids[1, 3] + 1) % 50
    torch.testing.assert_close(text(after_end, lengths).pooled, before)
    assert not torch.allclose(text(earlier, lengths).pooled[1], before[1])


def test_a_causal_token_does_not_see_later_ones_and_an_open_one_does() -> None:
    ids, lengths = batch()
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % 50
    for causal in (True, False):
        text = small(causal=causal)
        same = torch.allclose(
            text(ids, lengths).tokens[0, :9], text(changed, lengths).tokens[0, :9], atol=1e-6
        )
        assert same is causal


def test_padding_has_no_influence_without_the_causal_mask() -> None:
    text, (ids, lengths) = small(causal=False), batch()
    padded = ids.clone()
    padded[1, 7:] = 9
    torch.testing.assert_close(text(padded, lengths).pooled, text(ids, lengths).pooled)


def test_embeddings_take_the_place_of_ids() -> None:
    text, (ids, lengths) = small(), batch()
    given = text(torch.zeros_like(ids), lengths, embeddings=text.token_table(ids))
    torch.testing.assert_close(given.pooled, text(ids, lengths).pooled)


def test_a_hook_that_does_nothing_changes_nothing_and_layers_are_tapped_alike() -> None:
    text, (ids, lengths) = small(), batch()
    plain = text(ids, lengths, layers=(1, 2))
    hooked = text(ids, lengths, layers=(1, 2), hook=BlockHook())
    torch.testing.assert_close(hooked.tokens, plain.tokens, rtol=1e-5, atol=1e-5)
    for layer in (1, 2):
        torch.testing.assert_close(hooked.layers[layer], plain.layers[layer], rtol=1e-5, atol=1e-5)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"text\.dim=48 .* text\.heads=5"):
        ClipText(TextConfig(dim=48, heads=5), 50)
