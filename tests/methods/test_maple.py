"""MaPLe: its sizes, its prompts in both towers, and when it is CLIP itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from tests.contract.build import context
from tests.methods.clip_tuning import (
    NAMES,
    SMALL_TEXT,
    assert_trains_only_prompts,
    batch,
    images,
    logits,
    published,
    small,
    trainable,
    zero_shot,
)
from vlx.blocks.prompts import AppendedPrompts, DeepPrompts
from vlx.core.errors import ConfigError
from vlx.encoders.config import EncoderConfig
from vlx.methods.maple import CoupledPrompts, Maple, MapleConfig, Variant

DEPTH = 3


def maple(depth: int = DEPTH, **keys) -> Maple:
    return small(Maple, MapleConfig(prompt_depth=depth, **keys))


def coupled(method: Maple) -> CoupledPrompts:
    assert isinstance(method.prompts, CoupledPrompts)
    return method.prompts


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({}, 3_555_072),
        ({"prompt_depth": 1}, 393_984 + 1_024),
        ({"variant": Variant.independent}, 23_040),
        ({"variant": Variant.language}, 9 * 2 * 512),
        ({"variant": Variant.vision}, 9 * 2 * 768),
    ],
)
def test_trainable_parameters_are_the_published_ones(keys: dict, count: int) -> None:
    assert trainable(published(Maple, MapleConfig(**keys))) == count


@pytest.mark.parametrize("variant", list(Variant))
def test_without_prompts_it_is_zero_shot_clip(variant: Variant) -> None:
    method = maple(prompt_tokens=0, variant=variant)
    assert torch.equal(logits(method), zero_shot(method, "a photo of a {}."))


def test_its_text_features_start_as_zero_shot_clips_with_one_layer_of_prompts() -> None:
    method = maple(depth=1)
    with torch.no_grad():
        found = method.text_features(torch.empty(0), method.texts)
        sentences = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
        assert torch.equal(found, method.towers.embed_texts(sentences))


def test_more_layers_of_random_prompts_change_them() -> None:
    method = maple(depth=2)
    with torch.no_grad():
        found = method.text_features(torch.empty(0), method.texts)
        sentences = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
        assert not torch.allclose(found, method.towers.embed_texts(sentences))


def test_the_phrase_stays_where_no_prompt_takes_its_words() -> None:
    method = maple()
    found = method.towers.tokenizer.encode(
        [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    )
    assert torch.equal(method.texts.ids[:, 3:], torch.from_numpy(found.ids)[:, 3:])
    assert method.texts.slots.tolist() == [[1, 2]] * len(NAMES)
    table = method.towers.text.token_table.weight
    assert torch.equal(coupled(method).text[0], table[found.ids[0, 1:3]])


@pytest.mark.parametrize("keys", [{"prompt_tokens": 5}, {"phrase": None}])
def test_too_few_words_leave_only_prompts_before_the_name(keys: dict) -> None:
    method = maple(**keys)
    count = method.cfg.prompt_tokens
    found = method.towers.tokenizer.encode(["cat."])
    assert method.texts.lengths[0] == found.lengths[0] + count
    assert method.texts.ids[0, 1 + count :].tolist() == [*found.ids[0, 1:-count]]


def block_inputs(method: Maple) -> tuple[list, list]:
    """What every block's first norm sees in one forward pass: image tower, text tower."""
    found: tuple[list, list] = ([], [])
    handles = []
    for seen, tower in zip(found, (method.towers.image.vit, method.towers.text), strict=True):
        for block in tower.blocks:
            hook = block.norm1.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].detach().clone())
            )
            handles.append(hook)
    logits(method)
    for handle in handles:
        handle.remove()
    return found


def test_prompts_are_exchanged_not_added_in_every_layer() -> None:
    method = maple(depth=2)
    seen, read = block_inputs(method)
    patches = method.towers.image.spec.num_patches
    assert [x.shape[1] for x in seen] == [1 + patches + 2] * DEPTH
    assert [x.shape[1] for x in read] == [SMALL_TEXT.context_length] * DEPTH
    text, vision = coupled(method).text, method.prompts()
    assert torch.equal(read[1][0, 1:3], text[1])
    assert torch.equal(seen[1][0, -2:], vision[1])
    # Past the depth of prompting they flow on.
    assert not torch.equal(read[2][0, 1:3], text[1])
    norm = method.towers.image.vit.norm_pre
    assert torch.equal(seen[0][0, -2:], norm(vision[0]))
    positions = method.towers.text.positions[1:3]
    assert torch.equal(read[0][0, 1:3], text[0] + positions)


@pytest.mark.parametrize("name", ["image", "text"])
def test_token_counts_at_paper_scale(name: str) -> None:
    method = published(Maple, MapleConfig())
    tower = {"image": method.towers.image.vit, "text": method.towers.text}[name]
    counts = []
    for block in tower.blocks:
        block.norm1.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    with torch.device("meta"), torch.no_grad():
        method.class_logits(torch.empty(1, 3, 224, 224))
    assert counts == [{"image": 199, "text": 77}[name]] * 12


@torch.no_grad()
def test_logits_equal_those_of_two_loops_over_the_layers() -> None:
    """Every block called by hand, prompts cut out and put in between."""
    method = maple(depth=2)
    towers, prompts = method.towers, coupled(method)
    vit, text = towers.image.vit, prompts.text
    vision = [c(p) for c, p in zip(prompts.couplings, text, strict=True)]
    x = vit.patch_embed(towers.image.normalise(images()))
    x = torch.cat([vit.cls_token.expand(3, -1, -1), x], 1) + vit.pos_embed
    x = vit.norm_pre(torch.cat([x, vision[0].expand(3, -1, -1)], 1))
    for layer, block in enumerate(vit.blocks):
        if layer == 1:
            x = torch.cat([x[:, :-2], vision[1].expand(3, -1, -1)], 1)
        x = block(x)
    image = normalize(vit.head(vit.norm(x)[:, 0]), dim=-1)
    y = towers.text.tokens(method.texts.ids)
    y = torch.cat([y[:, :1], text[0].expand(len(y), -1, -1), y[:, 3:]], 1)
    y = y + towers.text.positions
    hidden = torch.full((16, 16), float("-inf")).triu(1)
    for layer, block in enumerate(towers.text.blocks):
        if layer == 1:
            y = torch.cat([y[:, :1], text[1].expand(len(y), -1, -1), y[:, 3:]], 1)
        y = block(y, attn_mask=hidden)
    ends = towers.text.norm(y)[torch.arange(len(y)), method.texts.lengths - 1]
    expected = method.logit_scale() * image @ normalize(towers.projection(ends), dim=-1).T
    torch.testing.assert_close(logits(method), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_a_layer_makes_of_prompts_does_not_matter_within_their_depth() -> None:
    method = maple(depth=2)

    def stir(layer: int):
        """Add noise to a layer's outputs at its prompts, in both towers."""
        handles = [
            block.mlp.register_forward_hook(
                lambda _, __, out, places=places: out.index_fill(1, torch.tensor(places), 3.0)
            )
            for block, places in (
                (method.towers.image.vit.blocks[layer], [5, 6]),  # behind class token, 4 patches
                (method.towers.text.blocks[layer], [1, 2]),
            )
        ]
        found = logits(method)
        for handle in handles:
            handle.remove()
        return found

    plain = logits(method)
    assert torch.equal(stir(0), plain)  # layer 1 has prompts of its own
    assert not torch.allclose(stir(1), plain)


@torch.no_grad()
def test_the_class_token_attends_to_the_prompts() -> None:
    method = maple(depth=1)
    before = method.image_features(images())
    bias = coupled(method).couplings[0].bias
    assert isinstance(bias, torch.Tensor)
    bias[0] += 3.0
    assert not torch.allclose(method.image_features(images()), before)


def test_every_prompt_and_map_gets_a_gradient() -> None:
    method = maple()
    method.step(batch(), context()).losses["class"].backward()
    grad = coupled(method).text.grad
    assert grad is not None
    assert (grad.abs().sum((1, 2)) > 0).all()
    for coupling in coupled(method).couplings:
        assert coupling.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
        assert coupling.bias.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_prompts_learn_through_both_towers_and_through_text_alone_without_maps() -> None:
    """With maps at zero the gradient is that of independent prompts whose vision part is zero."""
    method, alone = maple(), maple(variant=Variant.independent)
    both = coupled(method)
    text = []
    with torch.no_grad():
        alone.prompts.text.copy_(both.text)  # type: ignore[operator]
        alone.prompts.vision.zero_()  # type: ignore[operator]
    loss = method.step(batch(), context()).losses["class"]
    text.append(torch.autograd.grad(loss, both.text)[0])
    with torch.no_grad():
        for param in both.couplings.parameters():
            param.zero_()
    for one, prompts in ((method, both.text), (alone, alone.prompts.text)):
        loss = one.step(batch(), context()).losses["class"]
        text.append(torch.autograd.grad(loss, prompts)[0])  # type: ignore[arg-type]
    through_both, zero_maps, independent = text
    torch.testing.assert_close(zero_maps, independent)
    assert not torch.allclose(through_both, zero_maps)


def test_the_deep_maps_start_alike_and_the_first_apart() -> None:
    first, second, third = coupled(maple()).couplings
    assert torch.equal(second.weight, third.weight)  # type: ignore[arg-type]
    assert not torch.equal(first.weight, second.weight)  # type: ignore[arg-type]
    assert second.weight is not third.weight


@pytest.mark.parametrize("variant", list(Variant))
def test_towers_and_temperature_stay_the_same_bits(variant: Variant) -> None:
    assert_trains_only_prompts(maple(variant=variant), {"prompts"})


def test_other_classes_change_no_classs_logit() -> None:
    method = maple()
    known = logits(method)
    more = logits(method, ["zebra", *NAMES[::-1]])
    torch.testing.assert_close(more[:, 1:], known.flip(1), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"prompt_depth=4: the shallower tower has 3 layers"):
        maple(depth=4)
    with pytest.raises(ConfigError, match=r"method\.prompt_depth=0 must be at least 1"):
        MapleConfig(prompt_depth=0)
    encoder = EncoderConfig(name="resnet50_clip", image_size=32)
    with pytest.raises(ConfigError, match="is not a plain ViT"):
        small(Maple, MapleConfig(prompt_depth=1), encoder=encoder)


@torch.no_grad()
def test_prompts_are_gone_behind_the_last_layer_and_shallow_ones_flow_to_it() -> None:
    tower = maple().towers.image
    deep = AppendedPrompts(torch.ones(2, 32), torch.ones(1, 2, 32), tower.spec.depth)
    out = tower(images(), hook=deep)
    assert out.tokens.shape == tower(images()).tokens.shape
    kept = DeepPrompts(3, torch.zeros(0, 2, 32))
    torch.testing.assert_close(tower(images(), hook=kept).tokens, tower(images()).tokens)
