"""PRE: its sizes, what its network does to the vectors, and when it is CoOp or CLIP itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.contract.build import context
from tests.methods.clip_tuning import (
    NAMES,
    assert_trains_only_prompts,
    batch,
    logits,
    published,
    small,
    trainable,
    zero_shot,
)
from vlx.methods.coop import Coop, CoopConfig
from vlx.methods.pre import Encoder, Pre, PreConfig, Recurrent, make_encoder


def network(method: Pre) -> nn.Module:
    """What stands beside the skip connection."""
    found = method.encoder.inner
    assert isinstance(found, nn.Module)
    return found


def silent(method: Pre) -> Pre:
    """A network that gives zeros."""
    with torch.no_grad():
        for param in network(method).parameters():
            param.zero_()
    return method


@pytest.mark.parametrize(
    ("encoder", "count"),
    [
        (Encoder.lstm1, 1_576_960),
        (Encoder.lstm2, 3_153_920),
        (Encoder.mlp1, 66_112),
        (Encoder.mlp2, 66_112),
        (Encoder.none, 0),
    ],
)
def test_the_networks_have_the_published_sizes(encoder: Encoder, count: int) -> None:
    with torch.device("meta"):
        made = make_encoder(PreConfig(encoder=encoder), 512)
    assert sum(p.numel() for p in made.parameters()) == count


def test_the_lstms_parameters_are_those_of_the_cards_formula() -> None:
    with torch.device("meta"):
        made = make_encoder(PreConfig(), 512)
    assert sum(p.numel() for p in made.parameters()) == 2 * (4 * 256 * (512 + 256) + 2 * 4 * 256)


def test_trainable_parameters_are_the_published_ones() -> None:
    assert trainable(published(Pre, PreConfig())) == 1_579_008


@pytest.mark.parametrize("encoder", [Encoder.lstm1, Encoder.mlp1])
def test_a_silent_network_is_coop_and_zero_shot_clip(encoder: Encoder) -> None:
    method = silent(small(Pre, PreConfig(encoder=encoder)))
    plain = small(Coop, CoopConfig(context_init="a photo of a"))
    assert torch.equal(method.context, plain.context)
    assert torch.equal(logits(method), logits(plain))
    assert torch.equal(logits(method), zero_shot(method, "a photo of a {}."))


@pytest.mark.parametrize("residual", [True, False])
def test_no_network_is_coop(residual: bool) -> None:
    method = small(Pre, PreConfig(encoder=Encoder.none, residual=residual))
    plain = small(Coop, CoopConfig(context_init="a photo of a"))
    assert torch.equal(logits(method), logits(plain))


def test_the_network_alone_moves_the_first_prompt_away_from_its_words() -> None:
    method = small(Pre, PreConfig())
    assert not torch.equal(method.prompt(), method.context)
    assert not torch.equal(logits(method), zero_shot(method, "a photo of a {}."))


@pytest.mark.parametrize(
    ("encoder", "moved"),
    [
        (Encoder.lstm1, [True] * 4),
        (Encoder.lstm2, [True] * 4),
        (Encoder.mlp1, [True] + [False] * 3),
    ],
)
@torch.no_grad()
def test_whom_a_change_of_the_first_vector_reaches(encoder: Encoder, moved: list[bool]) -> None:
    method = small(Pre, PreConfig(encoder=encoder, residual=False)).eval()
    before = method.prompt()
    method.context[0] += 1.0
    assert (method.prompt() != before).any(1).tolist() == moved


@torch.no_grad()
def test_the_lstm_is_two_naive_loops_over_the_vectors() -> None:
    torch.manual_seed(0)
    made = Recurrent(8, 1, 0.0)
    x = torch.randn(5, 8)
    halves = []
    for suffix, order in (("", range(5)), ("_reverse", range(4, -1, -1))):
        w_in, w_h, b_in, b_h = (
            getattr(made.lstm, f"{name}_l0{suffix}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        state, cell = torch.zeros(4), torch.zeros(4)
        rows = [torch.zeros(4)] * 5
        for place in order:
            i, f, g, o = (w_in @ x[place] + b_in + w_h @ state + b_h).chunk(4)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
            rows[place] = state
        halves.append(torch.stack(rows))
    torch.testing.assert_close(made(x), torch.cat(halves, dim=1))
    assert made(x[:1]).shape == (1, 8)  # one vector keeps its axis


@torch.no_grad()
def test_mlp2_is_mlp1_twice() -> None:
    once = make_encoder(PreConfig(encoder=Encoder.mlp1, residual=False), 16)
    twice = make_encoder(PreConfig(encoder=Encoder.mlp2, residual=False), 16)
    twice.load_state_dict(once.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(twice(x), once(once(x)))


def test_the_skip_connection_adds_its_input_and_leaves_it_alone() -> None:
    cfg = PreConfig(encoder=Encoder.mlp1)
    made, x = make_encoder(cfg, 16), torch.randn(4, 16)
    kept = x.clone()
    assert torch.equal(made(x), made.inner(x) + x)  # type: ignore[operator]
    assert torch.equal(x, kept)


def test_gradients_reach_the_vectors_and_the_whole_network_and_nothing_else() -> None:
    method = small(Pre, PreConfig())
    method.step(batch(), context()).losses["class"].backward()
    for name, param in method.named_parameters():
        if name.startswith(("towers", "logit_scale")):
            assert param.grad is None, name
        else:
            assert param.grad is not None, name
            assert param.grad.abs().sum() > 0, name


@pytest.mark.parametrize("encoder", [Encoder.lstm1, Encoder.lstm2, Encoder.mlp2])
def test_towers_and_temperature_stay_the_same_bits(encoder: Encoder) -> None:
    method = small(Pre, PreConfig(encoder=encoder))
    assert_trains_only_prompts(method, {"context", "encoder"})


def test_an_exported_prompt_makes_coop_give_the_same_logits() -> None:
    method = small(Pre, PreConfig())
    assert_trains_only_prompts(method, {"context", "encoder"})
    plain = small(Coop, CoopConfig(context_init="a photo of a"))
    with torch.no_grad():
        plain.context.copy_(method.prompt())
    assert torch.equal(logits(plain), logits(method))


def test_other_classes_change_no_classs_logit() -> None:
    method = small(Pre, PreConfig())
    more = logits(method, [*NAMES, "zebra"])
    torch.testing.assert_close(more[:, : len(NAMES)], logits(method), rtol=1e-5, atol=1e-5)
    alone = logits(method, ["zebra"])
    torch.testing.assert_close(alone, more[:, len(NAMES) :], rtol=1e-5, atol=1e-5)


def test_each_class_may_have_vectors_of_its_own_through_one_network() -> None:
    cfg = PreConfig(class_specific=True, context_init=None, context_tokens=3)
    method = small(Pre, cfg)
    whole = method.prompt()
    assert whole.shape == (len(NAMES), 3, 32)
    torch.testing.assert_close(method.encoder(method.context[:1]), whole[:1])


def test_autocast_leaves_the_network_in_fp32() -> None:
    method = small(Pre, PreConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert method.prompt().dtype == torch.float32
