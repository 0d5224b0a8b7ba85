"""Language models of transformers fed with vectors, against transformers and a loop without
cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.encoders.make_hf import byte_bpe, wordpiece
from vlx.blocks.frozen import Frozen
from vlx.core.errors import CheckpointError, ConfigError
from vlx.encoders.config import TextConfig
from vlx.encoders.hf_model import decoder_kinds
from vlx.encoders.hf_tokenizer import HfTokenizer
from vlx.encoders.language_model import LanguageModel
from vlx.encoders.text_build import build_language_model
from vlx.ops.decoding import Nucleus, greedy
from vlx.ops.text import caption_loss, real_tokens

ROWS, IMAGE, LENGTH = 50, 4, 7
LENGTHS = torch.tensor([7, 3, 5])
END = 1


def config(name: str = "llama", **changes: Any) -> TextConfig:
    sizes: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 4, "context_length": 16}
    return TextConfig(name=name, **(sizes | changes))


def small(kind: str = "llama") -> LanguageModel:
    """Weights are drawn wider than usual, so that greedy decoding does not repeat one token."""
    torch.manual_seed(0)
    model = LanguageModel(config(kind), ROWS).eval()
    for param in model.parameters():
        if param.ndim == 2:
            nn.init.normal_(param, std=0.2)
    return model


def image(model: LanguageModel, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, IMAGE, model.spec.dim, generator=generator)


def ids() -> Tensor:
    return torch.randint(2, ROWS, (3, LENGTH), generator=torch.Generator().manual_seed(2))


def sequence(model: LanguageModel) -> tuple[Tensor, Tensor]:
    """Image vectors and caption (3, IMAGE + LENGTH, D) and what of them is real."""
    x = torch.cat([image(model), model.embed(ids())], dim=1)
    return x, real_tokens(LENGTHS + IMAGE, IMAGE + LENGTH)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gptj", "opt"])
def test_logits_equal_those_of_transformers_on_vectors_built_by_hand(kind: str) -> None:
    model = small(kind)
    theirs = AutoModelForCausalLM.from_config(model.model.config).eval()
    theirs.load_state_dict(model.model.state_dict())
    found = model(*sequence(model))
    for row, length in enumerate(LENGTHS.tolist()):
        words = theirs.get_input_embeddings()(ids()[row : row + 1, :length])
        vectors = torch.cat([image(model)[row : row + 1], words], dim=1)
        expected = theirs(inputs_embeds=vectors).logits[0]
        assert torch.allclose(found[row, : IMAGE + length], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gptj"])
def test_a_prefix_of_word_vectors_equals_the_plain_model_on_ids(kind: str) -> None:
    model = small(kind)
    x = torch.cat([model.embed(ids()[:, :3]), model.embed(ids()[:, 3:])], dim=1)
    real = torch.ones(3, LENGTH, dtype=torch.bool)
    assert torch.allclose(model(x, real), model.model(input_ids=ids()).logits, atol=1e-5)


@pytest.mark.parametrize("kind", decoder_kinds())
def test_padding_changes_nothing_and_the_cache_changes_nothing(kind: str) -> None:
    model = small(kind)
    x, real = sequence(model)
    logits = model(x, real)
    other = x.clone()
    other[~real] = 3.0
    short = model(x[1:2, : IMAGE + 3], real[1:2, : IMAGE + 3])
    assert torch.allclose(model(other, real)[real], logits[real], atol=1e-5)
    assert torch.allclose(short, logits[1:2, : IMAGE + 3], atol=1e-4)
    assert torch.allclose(model(x, real, first=5), logits[:, 5:], atol=1e-5)
    rows = [x[i : i + 1, : IMAGE + int(n)] for i, n in enumerate(LENGTHS)]
    for choose in (greedy, third):
        found = model.generate(x, real, 6, END, choose)
        assert found == [naive(model, row, choose) for row in rows]
    assert any(len(set(row)) > 1 for row in found)


def third(logits: Tensor) -> Tensor:
    """The third likeliest: models whose head is their token table like to repeat the last token."""
    return logits.topk(3).indices[..., 2]


@torch.no_grad()
def naive(model: LanguageModel, x: Tensor, choose: Callable[[Tensor], Tensor]) -> list[int]:
    """Decoding of one sequence (1, L, D), everything computed again for every token."""
    found: list[int] = []
    while len(found) < 6:
        logits = model.model(inputs_embeds=x, use_cache=False).logits
        token = int(choose(logits[:, -1]))
        if token == END:
            break
        found.append(token)
        x = torch.cat([x, model.embed(torch.tensor([[token]]))], dim=1)
    return found


def test_a_row_stops_at_the_end_token_and_the_others_go_on() -> None:
    model = small()
    x, real = sequence(model)
    free = model.generate(x, real, 8, end_id=-1)
    end = free[0][2]
    stopped = model.generate(x, real, 8, end_id=end)
    assert [len(row) for row in free] == [8, 8, 8]
    for row, whole in zip(stopped, free):
        assert row == (whole[: whole.index(end)] if end in whole else whole)
    assert len(stopped[0]) <= 2
    assert model.generate(x, real, 0, end_id=end) == [[], [], []]


def test_sampling_repeats_with_its_seed_and_turns_greedy_when_cold() -> None:
    model = small()
    x, real = sequence(model)

    def draw(seed: int, temperature: float = 1.0, top_p: float = 0.9) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(x, real, 6, END, Nucleus(temperature, top_p, generator))

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0, top_p=0.0) == model.generate(x, real, 6, END)
    assert draw(0, temperature=1e-4) == model.generate(x, real, 6, END)


def test_gradients_pass_through_frozen_weights() -> None:
    frozen = Frozen(small())
    model = frozen.module
    frozen.train()
    assert not model.training
    vectors = image(model).requires_grad_()
    x = torch.cat([vectors, model.embed(ids())], dim=1)
    logits = model(x, real_tokens(LENGTHS + IMAGE, IMAGE + LENGTH))
    caption_loss(logits, ids(), LENGTHS, IMAGE)[0].backward()
    assert vectors.grad is not None
    assert (vectors.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(param.grad is None for param in model.parameters())


def test_caption_loss_equals_that_of_transformers_with_its_labels() -> None:
    model = small()
    x, real = sequence(model)
    labels = torch.full((3, IMAGE + LENGTH), -100)
    labels[:, IMAGE:] = ids().masked_fill(~real[:, IMAGE:], -100)
    expected = model.model(inputs_embeds=x, attention_mask=real.long(), labels=labels).loss
    total, count = caption_loss(model(x, real), ids(), LENGTHS, IMAGE)
    assert torch.allclose(total / count, expected, atol=1e-5)
    late = model(x, real, first=IMAGE - 1)  # one place before the caption is enough
    total, count = caption_loss(late, ids(), LENGTHS, 1)
    assert torch.allclose(total / count, expected, atol=1e-5)


def test_spec_and_proportions_follow_the_sizes() -> None:
    model = small("gptj")
    assert (model.spec.dim, model.spec.depth, model.spec.heads) == (32, 2, 4)
    assert (model.spec.vocab_size, model.spec.context_length) == (ROWS, 2048)
    with torch.device("meta"):
        whole = LanguageModel(TextConfig(name="gptj"), 50400)
        logits = whole(torch.empty(1, 5, 4096), torch.ones(1, 5, dtype=torch.bool))
    assert logits.shape == (1, 5, 50400)
    # GPT-J-6B: 6.05e9 parameters (its model card).
    assert sum(param.numel() for param in whole.parameters()) == 6_050_882_784


def test_more_places_than_the_model_has_are_refused() -> None:
    model = LanguageModel(config("gpt2"), ROWS)
    places = model.spec.context_length
    x = torch.zeros(1, places, 32)
    with pytest.raises(ConfigError, match=f"are {places + 3} tokens, and text.name=gpt2 takes"):
        model.generate(x, torch.ones(1, places, dtype=torch.bool), 3, END)
    with pytest.raises(ConfigError, match="context_length=2000, but gpt2 takes 1024"):
        LanguageModel(config("gpt2", context_length=2000), ROWS)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_local_directory_loads_in_single_precision(kind: str, tmp_path: Path) -> None:
    size = len(byte_bpe(tmp_path, "<end>", "<pad>", eos_token="<end>", pad_token="<pad>"))
    saved = LanguageModel(config(kind), size).model.to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    tokenizer = HfTokenizer(str(tmp_path), 16)
    model = build_language_model(TextConfig(name=str(tmp_path), context_length=16), tokenizer)
    for name, param in model.model.named_parameters():
        assert param.dtype is torch.float32
        assert torch.equal(param, saved.get_parameter(name).float())


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    byte_bpe(tmp_path, "<end>", eos_token="<end>")
    tokenizer = HfTokenizer(str(tmp_path), 16)
    local = TextConfig(name=str(tmp_path), context_length=16)
    LanguageModel(config(), 100).model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        build_language_model(local, tokenizer)
    assert f"has {tokenizer.vocab_size} ids" in str(caught.value)
    assert "has 100 rows" in str(caught.value)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read the weights") as caught:
        build_language_model(local, tokenizer)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="Did you mean llama"):
        build_language_model(TextConfig(name="lama"), tokenizer)
    wordpiece(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is a bert, not a language model"):
        build_language_model(TextConfig(name=str(tmp_path / "bert")), tokenizer)
