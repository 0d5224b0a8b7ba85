"""Patch scaling: counts by patch size, Adventurer's block, its mixer against transformers'."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from tests.contract.build import build, config, seeded_step, smoke_batch
from vlx.commands.dry_run import measure
from vlx.config.compose import compose
from vlx.core.errors import ConfigError
from vlx.encoders.checkpoint import load_encoder
from vlx.encoders.config import EncoderConfig
from vlx.encoders.timm_backbone import TimmBackbone
from vlx.engine.build import builder_of
from vlx.engine.config import RunConfig
from vlx.engine.load import run_config
from vlx.methods.patch_scaling import (
    PAPER,
    Adventurer,
    Flips,
    Mamba2,
    PatchScaling,
    PatchScalingConfig,
    Scan,
)
from vlx.ops.augment import GaussianBlur, Grayscale, OneOf, Solarize
from vlx.ops.selective_scan import scan_chunks

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_classes": 5}


def adventurer(**arguments: object) -> Adventurer:
    """16 patches; weights away from their start, so that every part shows."""
    torch.manual_seed(0)
    model = Adventurer(**{**SIZES, **arguments})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1 * torch.randn(param.shape, generator=generator)
    return model.double().eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(
        count, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )


def preset(name: str, *words: str) -> RunConfig:
    return run_config(compose("patch-scaling", "finetune", name, list(words)))


# --- patch sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "params", "patches"),
    [
        (16, 250_314, 4),
        (8, 214_218, 16),
        (4, 208_074, 64),
        (2, 218_058, 256),
        (1, 266_634, 1024),
    ],
)
def test_a_vit_changes_by_its_patches_and_positions_alone(
    patch: int, params: int, patches: int
) -> None:
    sizes = ("encoder.dim=64", "encoder.depth=4", "encoder.heads=4")
    report = measure(preset("tiny", f"encoder.patch_size={patch}", *sizes), num_classes=10)
    assert report.trainable_params == params
    assert report.tokens["encoder.vit.blocks"] == [patches + 1] * 4


@pytest.mark.parametrize(
    ("size", "patch", "gmacs"),
    [(64, 16, 1.5), (64, 8, 5.6), (64, 4, 23.1), (64, 2, 106.4), (64, 1, 657.4), (224, 1, 50_669)],
)
def test_deit_base_costs_what_its_tokens_cost(size: int, patch: int, gmacs: float) -> None:
    words = (f"encoder.image_size={size}", f"encoder.patch_size={patch}")
    found = measure(preset("deit-base-64", *words)).gmacs
    assert found == pytest.approx(gmacs, rel=0.01 if patch < 16 else 0.03)  # the card rounds


@pytest.mark.parametrize(
    ("name", "size", "params"),
    [
        ("adventurer_tiny_patch16", 224, 11_608_840),
        ("adventurer_base_patch16", 224, 98_657_608),
        ("adventurer_base_patch1", 224, 136_454_728),
        ("adventurer_base_patch1", 64, 101_065_288),
    ],
)
def test_parameters_of_adventurer_are_the_cards(name: str, size: int, params: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, img_size=size)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("adventurer_small_patch16", 44.5),
        ("adventurer_large_patch16", 346.2),
        ("adventurer_tiny_patch1", 24.2),
        ("adventurer_small_patch1", 69.7),
        ("adventurer_large_patch1", 396.6),
    ],
)
def test_millions_of_the_others_are_the_cards(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_pixels_and_their_positions_may_be_permuted_together() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 1, "embed_dim": 24, "depth": 2, "num_heads": 3}
    vit = timm.create_model("deit_tiny_patch16_224", **sizes, num_classes=5).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    order = torch.randperm(64)
    with torch.no_grad():
        before = vit(x)
        vit.pos_embed[:, 1:] = vit.pos_embed[:, 1:][:, order]  # type: ignore[index]
        after = vit(x.flatten(2)[:, :, order].unflatten(2, (8, 8)))
    torch.testing.assert_close(after, before)


def test_the_sweep_is_the_papers_patch_sizes() -> None:
    assert PAPER.sweep == ("encoder.patch_size=16,8,4,2,1",)


# --- the mixer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 70])
def test_the_mixer_is_that_of_transformers(count: int) -> None:
    torch.manual_seed(0)
    settings = Mamba2Config(
        num_heads=2,
        head_dim=64,
        hidden_size=64,
        state_size=64,
        n_groups=1,
        conv_kernel=4,
        expand=2,
        chunk_size=32,
        layer_norm_epsilon=1e-5,
        num_hidden_layers=1,
    )
    theirs = Mamba2Mixer(settings, layer_idx=0).eval()
    ours = Mamba2(64, lambda *given: scan_chunks(*given, size=16))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, count, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_the_start_is_the_releases() -> None:
    torch.manual_seed(0)
    model = Adventurer(img_size=32, patch_size=4, embed_dim=128, depth=4, num_classes=50)
    mixer = model.blocks[3].mixer
    steps = nn.functional.softplus(mixer.dt_bias)
    assert ((steps > 0.99e-3) & (steps < 1.01e-1)).all()
    assert ((mixer.A_log.exp() >= 1) & (mixer.A_log.exp() <= 16)).all()
    assert (mixer.D == 1).all()
    # Kaiming-uniform(sqrt 5) over sqrt(depth): a bound of 1 / sqrt(fan in) / 2.
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx(256**-0.5 / 2, rel=0.01)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(48**-0.5, rel=0.05)
    assert model.blocks[0].mlp.fc1_g.weight.std().item() == pytest.approx((3 * 128) ** -0.5, 0.05)
    assert not model.blocks[0].mlp.fc2.bias.any()
    for weight in (model.pos_embed, model.head.weight):
        assert weight is not None
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


# --- Adventurer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [Scan.all, Scan.tokens])
def test_three_ways_to_scan_give_equal_logits(scan: Scan) -> None:
    chunks, other = adventurer(chunk_size=7), adventurer(scan=scan)
    with torch.no_grad():
        torch.testing.assert_close(other(images()), chunks(images()), rtol=1e-10, atol=1e-10)


class Recorded(nn.Module):
    """A mixer that keeps what it was given and gives it back."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


@pytest.mark.parametrize("flip", [False, True])
def test_the_scan_reads_mean_patches_and_class_token_and_two_flips_are_none(flip: bool) -> None:
    block = adventurer().blocks[0]
    block.mixer, block.flip = Recorded(), flip
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    out = block.scanned(x)
    patches = x[:, 1:].flip(1) if flip else x[:, 1:]
    expected = torch.cat([x.mean(1, keepdim=True), patches, x[:, :1]], dim=1)
    assert torch.equal(block.mixer.seen, expected)
    assert torch.equal(out, x)


def test_a_block_is_the_releases_sum() -> None:
    model = adventurer()
    block = model.blocks[2]
    assert block.flip
    x = torch.randn(2, 17, 32, dtype=torch.float64)

    def norm(part: nn.RMSNorm, y: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * part.weight

    y = norm(block.norm, x)
    y = torch.cat([y.mean(1, keepdim=True), y[:, 1:].flip(1), y[:, :1]], dim=1)
    y = block.mixer(y)[:, 1:]
    h = x + torch.cat([y[:, -1:], y[:, :-1].flip(1)], dim=1)
    z, mlp = norm(block.norm_mlp, h), block.mlp
    gated = nn.functional.silu(z @ mlp.fc1_g.weight.T + mlp.fc1_g.bias)
    hidden = gated * (z @ mlp.fc1_x.weight.T + mlp.fc1_x.bias)
    assert hidden.shape[-1] == 80
    torch.testing.assert_close(block(x), h + hidden @ mlp.fc2.weight.T + mlp.fc2.bias)


@pytest.mark.parametrize(
    ("flips", "numbers"),
    [(Flips.alternate, [2, 3, 6, 7, 10, 11]), (Flips.once, [2, 3]), (Flips.none, [])],
)
def test_the_blocks_that_flip(flips: Flips, numbers: list[int]) -> None:
    model = Adventurer(**{**SIZES, "depth": 12}, flips=flips)  # type: ignore[arg-type]
    assert [n for n, block in enumerate(model.blocks) if block.flip] == numbers


def test_the_first_two_blocks_have_no_drop_path_and_the_last_less_than_the_full() -> None:
    model = Adventurer(**SIZES, drop_path_rate=0.3)  # type: ignore[arg-type]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2])


def test_only_the_heading_average_and_flips_let_a_patch_change_those_before_it() -> None:
    changed = images(1)
    changed[:, :, 4:8, 8:12] += 1.0  # patch 6

    def moved(**arguments: object) -> Tensor:
        model = adventurer(**arguments)
        with torch.no_grad():
            before, after = (model.forward_features(x)[0] for x in (images(1), changed))
        return (before != after).any(1)

    causal = moved(flips=Flips.none, heading_average=False)
    assert causal[0]  # the class token, which comes first in what is given and last in the scan
    assert not causal[1:7].any()
    assert causal[7:].all()
    assert moved(flips=Flips.none).all()
    assert moved(heading_average=False).all()


# --- released weights and stages -----------------------------------------------------------------


def released_state(model: Adventurer) -> dict[str, Tensor]:
    """A random state by the release's names; its class token's position is the last row."""
    names = (
        ("blocks.", "layers."),
        (".mlp.fc1_g.", ".mlp.w1."),
        (".mlp.fc1_x.", ".mlp.w2."),
        (".mlp.fc2.", ".mlp.w3."),
    )
    found = {}
    for name, value in model.state_dict().items():
        for own, official in names:
            name = name.replace(own, official)
        name = name.replace("norm.", "norm_f.") if name.startswith("norm.") else name
        found[name] = torch.randn(value.shape, dtype=value.dtype)
    return found


def test_released_weights_load_and_the_class_tokens_position_comes_along(tmp_path) -> None:
    model = adventurer()
    state = released_state(model)
    torch.save({"model": state}, tmp_path / "released.pth")
    load_encoder(model, tmp_path / "released.pth", grid=(4, 4), prefix=1)
    assert model.pos_embed is not None
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, -1])
    assert torch.equal(model.pos_embed[:, 1:], state["pos_embed"][:, :-1])
    assert torch.equal(model.blocks[1].mlp.fc1_g.weight, state["layers.1.mlp.w1.weight"])
    assert torch.equal(model.norm.weight, state["norm_f.weight"])
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.own_names(own).items())


def test_the_next_stage_resamples_positions_and_keeps_the_class_tokens_row(tmp_path) -> None:
    first = adventurer()
    torch.save(first.state_dict(), tmp_path / "first.pth")
    second = adventurer(img_size=32)
    load_encoder(second, tmp_path / "first.pth", grid=(8, 8), prefix=1)
    assert first.pos_embed is not None
    assert second.pos_embed is not None
    assert torch.equal(second.pos_embed[:, 0], first.pos_embed[:, 0])
    assert second.pos_embed.shape == (1, 65, 32)


def test_the_encoder_says_where_its_class_token_is() -> None:
    cfg = EncoderConfig(
        name="adventurer_tiny_patch16", image_size=16, patch_size=4, dim=32, depth=2
    )
    encoder = TimmBackbone(cfg, num_classes=5)
    assert (encoder.spec.num_prefix, encoder.spec.class_token) == (1, True)
    assert encoder.spec.grid == (4, 4)
    x = torch.rand(2, 3, 16, 16)
    out = encoder(x)
    assert torch.equal(encoder.classify(out), encoder.model(encoder.normalise(x)))


# --- the recipe ----------------------------------------------------------------------------------


def test_the_stages_are_the_readmes() -> None:
    first, second, last = (preset(name) for name in ("paper", "paper-224", "paper-last"))
    stages = [
        (cfg.train.epochs, cfg.encoder.image_size, cfg.encoder.drop_path, cfg.train.batch_size)
        for cfg in (first, second, last)
    ]
    assert stages == [(300, 128, 0.1, 1024), (100, 224, 0.4, 1024), (20, 224, 0.6, 512)]
    assert [cfg.method.three_augment for cfg in (first, second, last)] == [True, True, False]
    assert (last.optim.lr, last.optim.weight_decay, last.method.smoothing) == (1e-5, 0.1, 0.1)
    assert [cfg.data.repeats for cfg in (first, second, last)] == [3, 3, 1]


def test_three_augment_stands_after_crop_and_flip() -> None:
    (view,) = PatchScaling.needs(PatchScalingConfig()).views
    choice = OneOf((Grayscale(1.0), Solarize(1.0), GaussianBlur(p=1.0)))
    assert view.ops[2] == choice
    assert [type(op).__name__ for op in view.ops[:2]] == ["RandomResizedCrop", "HorizontalFlip"]
    assert type(view.ops[3]).__name__ == "ColorJitter"
    assert len(view.ops) == 4


def test_positions_class_token_and_vectors_are_not_decayed() -> None:
    names = {name for name, _ in build("patch-scaling").param_groups()[1].params}
    wanted = ("pos_embed", "cls_token", "blocks.0.mixer.A_log", "blocks.0.mixer.D", "norm.weight")
    assert {f"encoder.model.{name}" for name in wanted} <= names
    assert "encoder.model.blocks.0.mixer.conv1d.weight" not in names


@pytest.mark.parametrize("arm", ["smoke", "tiny"])
def test_recomputed_blocks_give_equal_gradients_and_keep_less(arm: str) -> None:
    kept = []
    gradients = []
    for recompute in (False, True):
        cfg = preset(arm, f"method.recompute={str(recompute).lower()}", "encoder.drop_path=0.2")
        kept.append(measure(cfg, num_classes=10).activation_bytes)
        torch.manual_seed(0)
        method = PatchScaling(cfg.method, builder_of(cfg, 10, None, load_weights=False))
        loss = seeded_step(method, smoke_batch("patch-scaling")).losses["class"]
        gradients.append(torch.autograd.grad(loss, [*method.parameters()]))
    assert kept[1] < kept[0] / 2
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no multiple of encoder\.patch_size=5"):
        adventurer(patch_size=5)
    with pytest.raises(ConfigError, match="multiple of 32"):
        adventurer(embed_dim=40)
    with pytest.raises(ConfigError, match="chunk_size=0"):
        PatchScalingConfig(chunk_size=0)
    cfg = preset("tiny", "method.flips=none")
    with pytest.raises(ConfigError, match=r"method\.flips is of Adventurer's"):
        measure(cfg)


def test_smoke_is_adventurer() -> None:
    assert config("patch-scaling").encoder.name == "adventurer_tiny_patch16"
