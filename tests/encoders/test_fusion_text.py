"""The fusing BERT against transformers' BERT with the same weights, and its sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, BertModel, RobertaConfig, RobertaModel
from transformers.models.bert.modeling_bert import BertLayer

from tests.encoders.make_hf import CORPUS, wordpiece
from vlx.blocks.word_head import WordHead
from vlx.core.errors import ConfigError
from vlx.encoders.checkpoint import load_encoder
from vlx.encoders.config import TextConfig
from vlx.encoders.fusion_text import FusionText, bert_state
from vlx.encoders.hf_tokenizer import HfTokenizer
from vlx.encoders.text_build import build_text_encoder

ROWS, LENGTH = 50, 12
LENGTHS = torch.tensor([5, 12, 3])
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": ROWS,
}


def ids() -> Tensor:
    return torch.randint(2, ROWS, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def image(tokens: int = 7) -> Tensor:
    return torch.randn(3, tokens, 32, generator=torch.Generator().manual_seed(1))


def small(**changes: Any) -> FusionText:
    torch.manual_seed(0)
    cfg = TextConfig(name="bert", dim=32, depth=4, heads=4, context_length=LENGTH)
    return FusionText(cfg, ROWS, **({"image_dim": 32} | changes)).eval()


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in module.parameters():
            param += 0.05 * torch.randn(param.shape, generator=generator)
    return module.eval()


def mask() -> Tensor:
    return (torch.arange(LENGTH) < LENGTHS[:, None]).long()


def real(x: Tensor) -> Tensor:
    return x[mask().bool()]


def test_the_text_half_equals_the_first_layers_of_transformers_bert() -> None:
    reference = stirred(BertModel(BertConfig(**SIZES)))
    ours = small()
    found = ours.load_state_dict(bert_state(reference.state_dict()), strict=False)
    assert not found.unexpected_keys
    assert all(k.split(".")[2] in ("query", "key_value", "looked") for k in found.missing_keys)
    assert {int(k.split(".")[1]) for k in found.missing_keys} == {2, 3}
    with torch.no_grad():
        theirs = reference(ids(), attention_mask=mask(), output_hidden_states=True)
        out = ours(ids(), LENGTHS, layers=(1, 2))
    for number in (1, 2):
        expected = real(theirs.hidden_states[number])
        torch.testing.assert_close(real(out.layers[number]), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.tokens, out.layers[2])
    assert torch.equal(out.pooled, out.tokens[:, 0])


def test_fused_layers_equal_transformers_layers_with_cross_attention() -> None:
    config = BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    config._attn_implementation = "sdpa"
    layers = [stirred(BertLayer(config)) for _ in range(4)]
    ours, x = small(), torch.randn(3, LENGTH, 32, generator=torch.Generator().manual_seed(2))
    state = {
        f"encoder.layer.{i}.{name}": value
        for i, layer in enumerate(layers)
        for name, value in layer.state_dict().items()
        if i >= 2 or "crossattention" not in name
    }
    assert not ours.load_state_dict(bert_state(state), strict=False).unexpected_keys
    bias = torch.zeros(3, 1, 1, LENGTH).masked_fill(~mask().bool()[:, None, None], float("-inf"))
    expected = x
    with torch.no_grad():
        for layer in layers[2:]:
            found = layer(expected, attention_mask=bias, encoder_hidden_states=image())
            expected = found[0] if isinstance(found, tuple) else found
        out = ours.fuse(x, LENGTHS, image())
    torch.testing.assert_close(real(out), real(expected), rtol=1e-5, atol=1e-5)


def test_text_then_fusion_is_all_blocks_in_turn() -> None:
    model = small()
    embedded = model.norm(
        model.tokens(ids()) + model.positions.weight[:LENGTH] + model.types.weight[0]
    )
    x = embedded
    for i, block in enumerate(model.blocks):
        x = block(x, mask().bool()) if i < 2 else block(x, mask().bool(), image())
    found = model.fuse(model(ids(), LENGTHS).tokens, LENGTHS, image())
    torch.testing.assert_close(found, x)


def test_texts_may_share_images() -> None:
    model, rows = small(), torch.tensor([2, 0, 2])
    tokens = model(ids(), LENGTHS).tokens
    shared = model.fuse(tokens, LENGTHS, image(), rows)
    torch.testing.assert_close(shared, model.fuse(tokens, LENGTHS, image()[rows]))


def test_padding_never_changes_a_result() -> None:
    model, other = small(), ids()
    other[0, 5:] = 7
    outs = []
    for words, lengths, seen in (
        (ids(), LENGTHS, image()),
        (other, LENGTHS, image()),
        (ids()[:1, :5], LENGTHS[:1], image()[:1]),
    ):
        outs.append(model.fuse(model(words, lengths).tokens, lengths, seen)[0, :5])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_new_weights_are_berts_and_a_fused_block_has_its_own() -> None:
    model = small(image_dim=24)
    assert model.blocks[3].key_value.weight.shape == (64, 24)  # type: ignore[union-attr]
    for name, param in model.named_parameters():
        if param.ndim == 2:
            assert param.std().item() == pytest.approx(0.02 * 24**0.5, rel=0.2), name
        elif "norm" not in name:
            assert param.eq(0).all(), name


def base(**changes: Any) -> FusionText:
    with torch.device("meta"):
        cfg = TextConfig(name="bert", context_length=25)
        return FusionText(cfg, 30522, image_dim=768, **changes)


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_berts_size_has_the_published_parameters_and_cost() -> None:
    model = base()
    assert count(model) == 123_075_072
    one = [part for n, part in model.blocks[6].named_children() if n in ("query", "key_value")]
    assert count(*one, model.blocks[6].looked) == 2_363_904  # type: ignore[arg-type]
    with torch.device("meta"):
        head = WordHead(768, 30522, 1e-12)
    assert count(head) == 622_650
    words = torch.empty(1, 25, dtype=torch.int64, device="meta")
    lengths = torch.empty(1, dtype=torch.int64, device="meta")
    seen = torch.empty(1, 257, 768, device="meta")
    with FlopCounterMode(display=False) as alone:
        states = model(words, lengths).tokens
    with FlopCounterMode(display=False) as fused:
        model.fuse(states, lengths, seen)
    assert alone.get_total_flops() / 2e9 == pytest.approx(1.07, rel=0.02)
    assert fused.get_total_flops() / 2e9 == pytest.approx(3.12, rel=0.02)


def test_a_directory_gives_its_weights_and_keeps_the_new_parts(tmp_path: Path) -> None:
    tokenizer = wordpiece(tmp_path)
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    reference = stirred(BertModel(BertConfig(**sizes, max_position_embeddings=40)))
    reference.save_pretrained(tmp_path)  # pyright: ignore
    cfg = TextConfig(name=str(tmp_path), context_length=LENGTH)
    own = HfTokenizer(str(tmp_path), LENGTH)
    model = build_text_encoder(cfg, own, image_dim=32, fusion_layers=1).eval()
    assert isinstance(model, FusionText)
    assert model.first_fused == 3
    assert model.positions.num_embeddings == 40
    found = own.encode(CORPUS)
    words, lengths = torch.from_numpy(found.ids), torch.from_numpy(found.lengths)
    seen = torch.arange(LENGTH) < lengths[:, None]
    with torch.no_grad():
        theirs = reference(words, attention_mask=seen.long(), output_hidden_states=True)
        out = model(words, lengths).tokens
    torch.testing.assert_close(out[seen], theirs.hidden_states[3][seen], rtol=1e-5, atol=1e-5)
    assert model.blocks[3].query.weight.std().item() == pytest.approx(0.02 * 24**0.5, rel=0.2)  # type: ignore[union-attr, operator]


def test_a_saved_one_loads_into_another(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "text.pt")
    other = stirred(small())
    load_encoder(other, tmp_path / "text.pt")
    for a, b in zip(other.parameters(), small().parameters()):
        assert torch.equal(a, b)


def test_other_encoders_too_many_blocks_and_long_texts_are_refused(tmp_path: Path) -> None:
    RobertaModel(RobertaConfig(**SIZES)).save_pretrained(tmp_path)
    for cfg, arguments, message in (
        (TextConfig(name=str(tmp_path)), {}, "is a roberta, and the image is fused inside a BERT"),
        (
            TextConfig(name="bert", depth=2, dim=32),
            {"fusion_layers": 3},
            "fusion_layers=3: .* has 2",
        ),
        (TextConfig(name="bert", dim=32, context_length=600), {}, "takes 512 tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            FusionText(cfg, ROWS, image_dim=32, **arguments)
    with pytest.raises(ConfigError, match=r"text\.name=clip is no BERT"):
        build_text_encoder(TextConfig(), HfTokenizer(_words(tmp_path), LENGTH), image_dim=32)


def _words(folder: Path) -> str:
    place = folder / "words"
    wordpiece(place)
    return str(place)


def test_the_head_of_masked_words_is_berts_where_its_files_hold_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = BertForMaskedLM(BertConfig(**SIZES)).eval()
    torch.nn.init.normal_(reference.cls.predictions.bias)
    reference.save_pretrained(tmp_path / "whole")
    reference.bert.save_pretrained(tmp_path / "bare")
    cfg = TextConfig(name=str(tmp_path / "whole"), context_length=LENGTH)
    text = FusionText(cfg, SIZES["vocab_size"], image_dim=8)
    head = WordHead(text.spec.dim, text.spec.vocab_size, text.eps)
    head.load_state_dict(text.word_head_state())
    states = torch.randn(2, 5, text.spec.dim)
    with torch.no_grad():
        torch.testing.assert_close(
            head(states, text.token_table.weight), reference.cls(states), atol=1e-5, rtol=1e-5
        )
    bare = FusionText(replace(cfg, name=str(tmp_path / "bare")), SIZES["vocab_size"], image_dim=8)
    assert bare.word_head_state() == {}
