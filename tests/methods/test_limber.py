"""LiMBeR: one linear map between two frozen models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.contract.build import NUM_CLASSES, build, config, context, smoke_batch
from vlx.core.capability import Captioner
from vlx.core.method import Trainable
from vlx.data.views import evaluation_view
from vlx.encoders.config import EncoderConfig
from vlx.engine.build import builder_of
from vlx.engine.config import OptimConfig
from vlx.engine.optim import build_optimizer
from vlx.engine.text import shape_tokenizer
from vlx.methods.limber import Limber, Trains


def limber(**keys) -> Limber:
    cfg = config("limber")
    torch.manual_seed(0)
    builder = builder_of(cfg, NUM_CLASSES, shape_tokenizer(cfg.text), load_weights=False)
    return Limber(replace(cfg.method, **keys), builder)


def trained(method: Trainable) -> int:
    return sum(p.numel() for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "size", "pool", "tokens", "expected"),
    [
        ("resnet50x16_clip", 384, False, 144, 12_587_008),
        ("beit_large_patch16_224", 224, False, 196, 4_198_400),
        ("nf_resnet50", 384, True, 1, 8_392_704),
    ],
)
def test_the_papers_encoders_give_its_tokens_and_trained_parameters(
    name: str, size: int, pool: bool, tokens: int, expected: int
) -> None:
    cfg = config("limber", "paper")
    cfg.encoder = EncoderConfig(name=name, image_size=size)
    with torch.device("meta"):
        builder = builder_of(cfg, 0, shape_tokenizer(cfg.text), load_weights=False)
        method = Limber(replace(cfg.method, pool=pool), builder)
        image = method.image_tokens(torch.empty(1, 3, size, size))
    assert trained(method) == expected
    assert image.shape == (1, tokens, 4096)


def test_it_trains_on_the_view_that_it_is_evaluated_on() -> None:
    cfg = config("limber")
    assert Limber.needs(cfg.method).views == evaluation_view(cfg.eval.crop_ratio).views
    assert cfg.eval.crop_ratio == 1.0


def test_training_moves_the_map_alone() -> None:
    method = build("limber")
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = build_optimizer(OptimConfig(), method.param_groups(), 1e-2)
    method.train()
    method.step(smoke_batch("limber"), context()).losses["lm"].backward()
    optimizer.step()
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]) is not name.startswith("map."), name


def test_the_loss_is_the_language_models_own_on_vectors_built_by_hand() -> None:
    method, batch = build("limber").eval(), smoke_batch("limber")
    assert isinstance(method, Limber)
    image = method.map(method.encoder.module(batch["image"]).tokens)
    ids, lengths = batch["text"][:, 1:], batch["text_length"] - 1
    model = method.lm.model
    x = torch.cat([image, model.get_input_embeddings()(ids)], 1)
    places = image.shape[1]
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    labels = torch.cat([torch.full(image.shape[:2], -100), ids.masked_fill(~mask, -100)], 1)
    attention = torch.cat([torch.ones(image.shape[:2]), mask.float()], 1)
    theirs = model(inputs_embeds=x, attention_mask=attention, labels=labels).loss
    out = method.step(batch, context())
    torch.testing.assert_close(out.losses["lm"], theirs, rtol=1e-4, atol=1e-5)
    assert method.counts(batch, context())["lm"] == (labels != -100).sum()
    assert places == method.encoder.module.spec.num_patches


def test_every_caption_ends_in_one_end_token_that_is_a_target() -> None:
    method, batch = build("limber").eval(), smoke_batch("limber")
    assert isinstance(method, Limber)
    ids, lengths = method.words(batch)
    last = ids.gather(1, (lengths - 1)[:, None])
    assert (last == method.tokenizer.end_id).all()
    assert (ids[:, 0] != method.tokenizer.start_id).all()


def test_a_map_of_zeros_is_blind_and_a_swap_of_image_tokens_is_seen() -> None:
    method, batch = build("limber").eval(), smoke_batch("limber")
    assert isinstance(method, Limber)
    seen = method.step(batch, context()).losses["lm"]
    other = method.step(batch | {"image": batch["image"].flip(3)}, context()).losses["lm"]
    assert not torch.equal(seen, other)
    with torch.no_grad():
        method.map.weight.zero_()
        method.map.bias.zero_()
    blind = [
        method.step(batch | {"image": image}, context()).losses["lm"]
        for image in (batch["image"], torch.rand_like(batch["image"]))
    ]
    assert torch.equal(*blind)


def test_the_map_is_affine_and_the_same_for_every_position() -> None:
    method = build("limber").eval()
    assert isinstance(method, Limber)
    a, b = torch.randn(2, 5, method.map.in_features), torch.randn(2, 5, method.map.in_features)
    mixed = method.map(0.3 * a + 0.7 * b)
    torch.testing.assert_close(mixed, 0.3 * method.map(a) + 0.7 * method.map(b))
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(method.map(a)[:, order], method.map(a[:, order]))


def test_a_language_model_trained_first_reads_no_image() -> None:
    method = limber(trains=Trains.language_model)
    assert type(method).needs(method.cfg).batch_keys == ("text", "text_length")
    batch = {key: value for key, value in smoke_batch("limber").items() if key != "image"}
    loss = method.step(batch, context()).losses["lm"]
    loss.backward()
    assert all(p.grad is None for n, p in method.named_parameters() if n.startswith("encoder."))
    assert method.exports() == ()
    assert trained(method) == sum(p.numel() for p in method.lm.parameters())


def test_captions_are_those_of_a_loop_without_a_cache() -> None:
    method = limber(trains=Trains.both).eval()
    images = torch.rand(3, 3, 32, 32)
    (captioner,) = (c for c in method.exports() if isinstance(c, Captioner))
    found = captioner.captions(images, 6)
    with torch.no_grad():
        for image, text in zip(images, found):
            x = method.image_tokens(image[None])
            ids: list[int] = []
            for _ in range(6):
                real = torch.ones(x.shape[:2], dtype=torch.bool)
                token = int(method.lm(x, real)[0, -1].argmax())
                if token == method.tokenizer.end_id:
                    break
                ids.append(token)
                x = torch.cat([x, method.lm.embed(torch.tensor([[token]]))], 1)
            assert text == method.tokenizer.decode(ids)


def test_a_prompt_stands_between_image_and_caption_and_is_not_repeated() -> None:
    method = limber(trains=Trains.both).eval()
    ids = method._prompt_ids("a picture of", torch.device("cpu"))
    assert method.tokenizer.decode(ids[0].tolist()) == "a picture of"
    assert len(method.caption(torch.rand(2, 3, 32, 32), "a picture of", 4)) == 2
