"""ViTamin: its sizes, its tower against plain formulas, open_clip, and the locked text."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, gelu, layer_norm, linear

from tests.contract.build import build, config, context, smoke_batch
from vlx.core.errors import CheckpointError, ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig, TextConfig
from vlx.encoders.tokenizers import clip_tokenizer
from vlx.engine.schedule import Rates
from vlx.evals.tokens import gmacs
from vlx.methods.vitamin import Vitamin, VitaminConfig
from vlx.ops.augment import ColorJitter, Grayscale, RandomResizedCrop

SMALL = EncoderConfig(name="vitamin_tiny_64", image_size=64, dim=48, depth=2, heads=3)
TEXT = TextConfig(dim=64, depth=2, heads=1)
TEXTS = ["a cat", "two dogs on a mat, running", "x y z 1 2 3 4" * 30, "é"]


def vitamin(cfg: VitaminConfig, encoder: EncoderConfig = SMALL, text: TextConfig = TEXT) -> Vitamin:
    tokenizer = clip_tokenizer(text.context_length)
    return Vitamin(cfg, EncoderBuilder({"encoder": encoder}, 0, text=text, tokenizer=tokenizer))


def tower(name: str, size: int = 224, drop_path: float = 0.0) -> nn.Module:
    cfg = EncoderConfig(name=name, image_size=size, drop_path=drop_path)
    return EncoderBuilder({"encoder": cfg}, 0).vision().backbone


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "embed_dim", "text", "image", "millions"),
    [
        ("small_224", 384, (384, 12, 6), 21_877_696 + 384 * 384, 40.44),
        ("base_224", 512, (512, 12, 8), 87_132_032 + 768 * 512, 63.43),
        ("large_224", 768, (768, 12, 12), 332_531_616 + 1024 * 768, 123.65),
        ("large2_224", 1024, (1024, 24, 16), 332_531_616 + 1024 * 1024, 354.0),
        ("xlarge_256", 1152, (1152, 27, 16), 434_726_976 + 1152 * 1152, 488.7),
    ],
)
def test_towers_have_the_papers_parameters(
    name: str, embed_dim: int, text: tuple[int, int, int], image: int, millions: float
) -> None:
    encoder = EncoderConfig(name=f"vitamin_{name}", image_size=int(name[-3:]))
    with torch.device("meta"):
        cfg = TextConfig(dim=text[0], depth=text[1], heads=text[2])
        towers = vitamin(VitaminConfig(embed_dim=embed_dim), encoder, cfg).towers
    assert count(towers.image) == image
    assert count(towers.text, towers.projection) / 1e6 == pytest.approx(millions, abs=0.06)


def test_the_small_towers_cost_is_the_papers_and_two_products_of_attention() -> None:
    model = tower("vitamin_small_224").eval()
    cost = gmacs(model, 224, torch.device("cpu"))
    assert cost == pytest.approx(5.89, abs=0.01)
    attention = 14 * 2 * 196**2 * 384 / 1e9
    assert cost - attention == pytest.approx(5.50, abs=0.03)  # table 4 of the paper leaves them out


def test_the_tower_has_the_papers_parts_and_nothing_else() -> None:
    with torch.device("meta"):
        model = tower("vitamin_small_224", drop_path=0.1)
        shapes = []
        backbone = model.patch_embed.backbone  # type: ignore[union-attr]
        for part in (backbone.stem, *backbone.stages, backbone):  # type: ignore
            part.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[1:])))  # type: ignore
        assert model.forward_features(torch.empty(1, 3, 224, 224)).shape == (1, 196, 384)  # type: ignore
    assert shapes == [(64, 112, 112), (64, 56, 56), (128, 28, 28), (384, 14, 14)]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert model.cls_token is None
    assert model.pos_embed.shape == (1, 196, 384)  # type: ignore[union-attr]
    for block in model.blocks:  # type: ignore[union-attr]
        assert sum(isinstance(m, nn.LayerNorm) for m in block.modules()) == 3
        assert block.mlp.w0.out_features == 2 * 384
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks]  # type: ignore
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 14))
    assert all(isinstance(m.drop_path, nn.Identity) for s in backbone.stages for m in s)  # type: ignore


def naive_tower(x: Tensor, w: dict[str, Tensor], blocks: int, heads: int) -> Tensor:
    """The card's steps 1 to 6 by torch's functions alone: (B, 3, H, H) to (B, E)."""

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = w[f"{name}.weight"]
        return conv2d(x, weight, w[f"{name}.bias"], stride, weight.shape[-1] // 2, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def norm_map(x: Tensor, name: str) -> Tensor:
        return norm(x.permute(0, 2, 3, 1), name).permute(0, 3, 1, 2)

    def dense(x: Tensor, name: str) -> Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    stem = "patch_embed.backbone"
    x = conv(x, f"{stem}.stem.conv1", 2)
    x = conv(gelu(norm_map(x, f"{stem}.stem.norm1")), f"{stem}.stem.conv2")
    for stage in range(2):
        name = f"{stem}.stages.{stage}.0"
        shortcut = avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        if f"{name}.shortcut.expand.weight" in w:
            shortcut = conv(shortcut, f"{name}.shortcut.expand")
        y = gelu(conv(norm_map(x, f"{name}.pre_norm"), f"{name}.conv1_1x1"))
        y = gelu(conv(y, f"{name}.conv2_kxk", 2, groups=y.shape[1]))
        x = conv(y, f"{name}.conv3_1x1") + shortcut
    x = conv(norm_map(x, f"{stem}.pool.norm"), f"{stem}.pool.proj", 2)
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"]
    for number in range(blocks):
        name = f"blocks.{number}"
        q, k, v = dense(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + dense((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        y = norm(norm(x, f"{name}.norm2"), f"{name}.mlp.norm")
        x = x + dense(
            gelu(dense(y, f"{name}.mlp.w0")) * dense(y, f"{name}.mlp.w1"), f"{name}.mlp.w2"
        )
    return linear(norm(x.mean(1), "fc_norm"), w["head.weight"])


def stirred(module: nn.Module) -> nn.Module:
    """Every parameter away from its start, so that zeros and ones are compared too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in module.parameters():
            param += 0.02 * torch.randn(param.shape, generator=generator)
    return module.eval()


def test_the_tower_equals_plain_formulas() -> None:
    image = vitamin(VitaminConfig(embed_dim=32)).towers.image
    stirred(image)
    pictures = torch.rand(2, 3, 64, 64)
    weights = dict(image.backbone.state_dict())
    with torch.no_grad():
        expected = naive_tower(image.normalise(pictures), weights, blocks=2, heads=3)
        torch.testing.assert_close(image.classify(image(pictures)), expected, rtol=1e-4, atol=1e-5)


def open_clip_model() -> nn.Module:
    """open_clip's model for the small towers, a model of timm in it."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    torch.manual_seed(0)
    vision = CLIPVisionCfg(
        timm_model_name="vitamin_tiny_64", timm_pool="", timm_proj="linear", image_size=64
    )
    return stirred(CustomTextCLIP(32, vision, CLIPTextCfg(width=64, heads=1, layers=2)))


FULL = replace(SMALL, dim=96, depth=4)  # open_clip sets no sizes of a model of timm


def test_embeddings_and_loss_equal_open_clips_with_its_weights(tmp_path: Path) -> None:
    from open_clip.loss import ClipLoss

    reference = open_clip_model()
    torch.save(reference.state_dict(), tmp_path / "open_clip.pt")
    ours = vitamin(VitaminConfig(embed_dim=32, weights=str(tmp_path / "open_clip.pt")), FULL).eval()
    images, found = torch.rand(4, 3, 64, 64), clip_tokenizer().encode(TEXTS)
    ids, lengths = torch.from_numpy(found.ids), torch.from_numpy(found.lengths)
    batch = {"image": images, "text": ids, "text_length": lengths}
    with torch.no_grad():
        theirs = reference(ours.towers.image.normalise(images), ids)
        out = ours.embed(batch, context())
        loss = ours.step(batch, context()).losses["contrastive"]
    for a, b in zip((out["image"], out["text"], ours.logit_scale()), theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, ClipLoss()(*theirs), rtol=1e-5, atol=1e-5)


def test_positions_are_resampled_for_another_image_size(tmp_path: Path) -> None:
    torch.save(open_clip_model().state_dict(), tmp_path / "open_clip.pt")
    larger = replace(FULL, image_size=96)
    ours = vitamin(VitaminConfig(embed_dim=32, weights=str(tmp_path / "open_clip.pt")), larger)
    assert ours.towers.image.spec.grid == (6, 6)
    assert ours.towers.image.backbone.pos_embed.shape == (1, 36, 96)  # type: ignore[union-attr]


def test_the_paper_decays_what_open_clip_decays() -> None:
    method = build("vitamin")
    decay, no_decay = ({name for name, _ in g.params} for g in method.param_groups())
    for name, param in method.named_parameters():
        exempt = param.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        assert (name in no_decay) == exempt
        assert (name in decay) != exempt
    tables = {"image.model.pos_embed", "text.positions", "text.tokens.weight"}
    assert {f"towers.{name}" for name in tables} <= decay


def test_rates_are_open_clips() -> None:
    cfg = config("vitamin", "paper")
    total, warmup = 156_250, 500
    rates = Rates(cfg.schedule, 5e-4, cfg.optim.weight_decay, total, 1000)
    for step in (499, 500, 40_000, total - 1):
        left = (step - warmup) / (total - warmup)
        expected = 5e-4 * (1 + math.cos(math.pi * left)) / 2 if step >= warmup else 5e-4
        assert rates.lr(step) == pytest.approx(expected, rel=3e-3, abs=1e-12)


def test_the_long_schedule_also_jitters_colours() -> None:
    views = Vitamin.needs(config("vitamin", "large").method).views
    crop, _, colours, grey = views[0].ops
    assert crop == RandomResizedCrop(scale=(0.4, 1.0))
    assert colours == ColorJitter(0.32, 0.32, 0.32, 0.08, p=0.8)
    assert grey == Grayscale(0.2)
    short = Vitamin.needs(config("vitamin", "paper").method).views[0].ops
    images, sizes = torch.rand(3, 3, 8, 8), torch.full((3, 2), 8)
    for op in short[1:]:  # no flip, no colours
        assert torch.equal(op(images, sizes, torch.zeros(3, op.draws), 8), images)


def test_a_locked_text_side_is_the_other_models_and_stays(tmp_path: Path) -> None:
    file = str(tmp_path / "open_clip.pt")
    torch.save(open_clip_model().state_dict(), file)
    ours = vitamin(VitaminConfig(embed_dim=32, locked_text=file))  # another image tower
    whole = vitamin(VitaminConfig(embed_dim=32, weights=file), FULL)
    assert torch.equal(ours.logit_scale.log, whole.logit_scale.log)
    for part in ("text", "projection"):
        found, expected = (getattr(m.towers, part).state_dict() for m in (ours, whole))
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    batch = smoke_batch("vitamin")
    batch["text"] = torch.randint(0, 49_000, (8, 77))
    batch["text_length"] = torch.full((8,), 77)
    ours.step(batch, context()).losses["contrastive"].backward()
    for name, param in ours.named_parameters():
        locked = name.startswith(("towers.text.", "towers.projection."))
        assert (param.grad is None) == locked, name
    trained = {name for group in ours.param_groups() for name, _ in group.params}
    assert "logit_scale.log" in trained
    assert not any(name.startswith(("towers.text.", "towers.projection.")) for name in trained)


def test_a_text_side_of_another_width_loads_nothing_and_names_the_keys(tmp_path: Path) -> None:
    file = str(tmp_path / "open_clip.pt")
    torch.save(open_clip_model().state_dict(), file)
    with pytest.raises(CheckpointError, match=r"reshaped: projection\.weight \(32, 64\) for \(16"):
        vitamin(VitaminConfig(embed_dim=16, locked_text=file))


def test_two_text_sides_are_refused() -> None:
    with pytest.raises(ConfigError, match="both give a text tower"):
        VitaminConfig(weights="a", locked_text="b")
