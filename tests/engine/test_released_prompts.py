"""Prompts that CoOp, CoCoOp, PRE and MaPLe released load by `train.adapter=FILE`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlx.config.compose import compose
from vlx.core import registry
from vlx.core.errors import CheckpointError
from vlx.engine.adapter import load_adapter
from vlx.engine.build import builder_of
from vlx.engine.load import run_config
from vlx.engine.text import shape_tokenizer


def save(state: dict[str, Tensor], file: Path) -> None:
    """As Dassl writes a checkpoint: half precision, a numpy scalar, an optimizer's state."""
    halves = {name: value.half() for name, value in state.items()}
    more = {"epoch": 50, "val_result": np.float64(80.5), "optimizer": {"state": {}}}
    torch.save({"state_dict": halves, **more}, file)


def like(param: Tensor) -> Tensor:
    return torch.randn(param.shape).half().float()


def method_of(slug: str, *words: str):
    cfg = run_config(compose(slug, "finetune", "smoke", ["track=none", *words]))
    tokenizer = shape_tokenizer(cfg.text)
    names = ("a cat", "dog", "bird")
    builder = builder_of(cfg, len(names), tokenizer, names, load_weights=False)
    return registry.load(slug)(cfg.method, builder)


@pytest.mark.parametrize("variant", ["coop", "cocoop"])
def test_coops_prompts(tmp_path: Path, variant: str) -> None:
    method = method_of("coop", f"method.variant={variant}")
    own = dict(method.named_parameters())
    state = {"ctx": like(own["context"]), "token_prefix": torch.rand(3, 1, 4)}
    state["token_suffix"] = torch.rand(3, 9, 4)
    if variant == "cocoop":
        for ours, theirs in ((0, "linear1"), (2, "linear2")):
            for kind in ("weight", "bias"):
                value = own[f"prompts.meta_net.{ours}.{kind}"]
                state[f"meta_net.{theirs}.{kind}"] = like(value)
    save(state, tmp_path / "model.pth.tar-50")
    load_adapter(str(tmp_path / "model.pth.tar-50"), method, slug="coop")
    assert torch.equal(method.context, state["ctx"])
    if variant == "cocoop":
        assert torch.equal(own["prompts.meta_net.2.bias"], state["meta_net.linear2.bias"])


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("encoder", ["lstm1", "lstm2", "mlp1", "mlp2"])
def test_pres_prompts(tmp_path: Path, encoder: str, residual: bool) -> None:
    words = f"method.encoder={encoder}", f"method.residual={str(residual).lower()}"
    method = method_of("pre", *words)
    own = dict(method.named_parameters())
    dim = own["context"].shape[-1]
    if encoder.startswith("lstm"):
        layers = int(encoder[-1])
        lstm = nn.LSTM(dim, dim // 2, layers, bidirectional=True)
        theirs = {f"encoder_network.lstm_head.{k}": like(v) for k, v in lstm.named_parameters()}
    else:
        width = method.cfg.bottleneck
        parts = [nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim)]
        mlp = nn.Sequential(*parts * int(encoder[-1]))
        theirs = {f"encoder_network.module.{k}": like(v) for k, v in mlp.state_dict().items()}
    state = {"ctx": like(own["context"]), "token_prefix": torch.rand(3, 1, 4), **theirs}
    save(state, tmp_path / "model.pth.tar-50")
    load_adapter(str(tmp_path / "model.pth.tar-50"), method, slug="pre")
    assert torch.equal(method.context, state["ctx"])
    network = [value for name, value in own.items() if name.startswith("encoder.")]
    loaded = list(theirs.values())[: len(network)]
    assert all(torch.equal(ours, value) for ours, value in zip(network, loaded, strict=True))


def test_maples_prompts(tmp_path: Path) -> None:
    method = method_of("maple")
    own = dict(method.named_parameters())
    text = own["prompts.text"]
    state = {"prompt_learner.ctx": like(text[0]), "logit_scale": torch.tensor(4.6)}
    state |= {"prompt_learner.token_prefix": torch.rand(3, 1, 4)}
    state |= {
        "image_encoder.conv1.weight": torch.rand(4),
        "text_encoder.ln_final.bias": torch.rand(4),
    }
    for number in range(len(text) - 1):
        state[f"prompt_learner.compound_prompts_text.{number}"] = like(text[0])
    for number in range(len(text)):
        theirs = "proj" if number == 0 else f"compound_prompt_projections.{number - 1}"
        for kind in ("weight", "bias"):
            value = own[f"prompts.couplings.{number}.{kind}"]
            state[f"prompt_learner.{theirs}.{kind}"] = like(value)
    save(state, tmp_path / "model.pth.tar-2")
    load_adapter(str(tmp_path / "model.pth.tar-2"), method, slug="maple")
    assert torch.equal(text[0], state["prompt_learner.ctx"])
    last = len(text) - 1
    assert torch.equal(text[last], state[f"prompt_learner.compound_prompts_text.{last - 1}"])
    first = own["prompts.couplings.0.weight"]
    assert torch.equal(first, state["prompt_learner.proj.weight"])


def test_prompts_of_another_length_load_nothing(tmp_path: Path) -> None:
    method = method_of("coop")
    before = method.context.detach().clone()
    save({"ctx": torch.rand(99, before.shape[-1])}, tmp_path / "model.pth.tar-50")
    with pytest.raises(CheckpointError, match="does not fit, nothing was loaded: 1: context"):
        load_adapter(str(tmp_path / "model.pth.tar-50"), method, slug="coop")
    assert torch.equal(method.context, before)
