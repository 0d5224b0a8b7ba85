"""MAE: the card's checks, and parity with transformers' independent implementation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.contract.build import build, config, context
from vlx.commands.dry_run import measure
from vlx.core.errors import CheckpointError, ConfigError
from vlx.core.step import StepContext
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig
from vlx.engine.config import RunConfig
from vlx.methods.mae import Mae, MaeConfig
from vlx.ops.masking import num_kept, random_masking
from vlx.ops.patches import patchify, unpatchify
from vlx.ops.targets import masked_patch_mse, norm_pix

SIZES = {
    "base": (768, 12, 12, 16),
    "large": (1024, 24, 16, 16),
    "huge": (1280, 32, 16, 14),
}


class FixedNoise(StepContext):
    """A context whose uniforms are given."""

    noise: Tensor

    def uniform(self, like: Tensor, count: int, stream: str) -> Tensor:
        assert self.noise.shape == (len(like), count)
        return self.noise


# The card's figures embed all 196 patches; only the 49 kept ones are embedded here. In GMACs.
NOT_EMBEDDED = 147 * (3 * 16 * 16) * 768 / 1e9


def fixed(noise: Tensor) -> FixedNoise:
    ctx = FixedNoise(step=0, total_steps=1, steps_per_epoch=1, seed=0)
    ctx.noise = noise
    return ctx


def paper_run(size: str) -> RunConfig:
    dim, depth, heads, patch = SIZES[size]
    cfg = config("mae", "paper")
    name = f"vit_{size}_patch{patch}_224"
    return replace(
        cfg,
        encoder=replace(
            cfg.encoder, name=name, dim=dim, depth=depth, heads=heads, patch_size=patch
        ),
    )


def small_method(**method: object) -> Mae:
    """16 patches of 4 pixels, width 24."""
    torch.manual_seed(0)
    encoder = EncoderConfig(
        name="vit_tiny_patch16_224", image_size=16, patch_size=4, dim=24, depth=2, heads=3
    )
    cfg = MaeConfig(decoder_dim=16, decoder_depth=2, decoder_heads=2, **method)  # type: ignore[arg-type]
    return Mae(cfg, EncoderBuilder({"encoder": encoder}, 0))


@pytest.mark.parametrize(
    ("size", "trainable", "total"),
    [
        ("base", 111_655_680, 111_907_840),
        ("large", 329_239_296, 329_541_888),
        ("huge", 656_613_964, 657_074_508),
    ],
)
def test_parameter_counts_of_the_published_sizes(size: str, trainable: int, total: int) -> None:
    report = measure(paper_run(size))
    assert (report.trainable_params, report.total_params) == (trainable, total)


def test_tokens_and_cost_of_base() -> None:
    report = measure(paper_run("base"))
    assert report.tokens == {"encoder.vit.blocks": [50] * 12, "decoder.blocks": [197] * 8}
    assert report.gmacs == pytest.approx(9.78 - NOT_EMBEDDED, abs=0.01)


def test_tokens_of_huge_and_its_prediction() -> None:
    cfg = paper_run("huge")
    assert measure(cfg).tokens == {"encoder.vit.blocks": [65] * 32, "decoder.blocks": [257] * 8}
    with torch.device("meta"):
        method = Mae(cfg.method, EncoderBuilder({"encoder": cfg.encoder}, 0, load_weights=False))
        pred, mask = method.predict(torch.empty(2, 3, 224, 224), context())
    assert pred.shape == (2, 256, 588)
    assert mask.shape == (2, 256)


def test_cost_of_encoder_and_decoder_apart() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    cfg = paper_run("base")
    with torch.device("meta"):
        method = Mae(cfg.method, EncoderBuilder({"encoder": cfg.encoder}, 0, load_weights=False))
        images, keep = torch.empty(1, 3, 224, 224), torch.empty(1, 49, dtype=torch.int64)
        with FlopCounterMode(display=False) as encoder:
            out = method.encoder(images, keep=keep, normalised=True)
        with FlopCounterMode(display=False) as decoder:
            method.decoder(out.prefix, out.tokens, torch.empty(1, 196, dtype=torch.int64))
        with FlopCounterMode(display=False) as whole:
            method.encoder(images, normalised=True)
    assert encoder.get_total_flops() / 2e9 == pytest.approx(4.41 - NOT_EMBEDDED, abs=0.01)
    assert decoder.get_total_flops() / 2e9 == pytest.approx(5.37, abs=0.01)
    assert whole.get_total_flops() / 2e9 == pytest.approx(17.56, abs=0.01)


def test_every_sample_hides_the_same_number_of_patches() -> None:
    noise = torch.rand(5, 196)
    keep, restore, mask = random_masking(noise, 0.75)
    assert mask.sum(1).tolist() == [147] * 5
    assert keep.shape == (5, 49)
    assert not mask.gather(1, keep).any()
    order = torch.cat([keep, mask.nonzero()[:, 1].reshape(5, 147)], 1)
    assert order.sort(1).values.equal(torch.arange(196).expand(5, -1))
    assert torch.equal(mask, restore >= 49)


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(196, 0.9, 19), (196, 0.75, 49)])
def test_kept_patches_are_floored(patches: int, ratio: float, kept: int) -> None:
    assert num_kept(patches, ratio) == kept


@pytest.mark.parametrize(("patches", "ratio"), [(16, 0.0), (16, 1.0), (10, 0.9)])
def test_a_ratio_that_hides_or_keeps_nothing_is_refused(patches: int, ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"method\.mask_ratio"):
        num_kept(patches, ratio)


def test_mask_ratio_zero_is_refused_by_the_method() -> None:
    method = small_method(mask_ratio=0.0)
    with pytest.raises(ConfigError, match=r"mask_ratio=0\.0 keeps 16 of 16"):
        method.step({"image": torch.rand(2, 3, 16, 16)}, context())


def test_unpatchify_inverts_patchify_and_channels_are_last() -> None:
    images = torch.rand(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert torch.equal(unpatchify(patches, 4, (2, 3)), images)
    assert torch.equal(patches[0, 1, :3], images[0, :, 0, 4])  # first pixel of the second patch
    assert torch.equal(patches[0, 1, 3:6], images[0, :, 0, 5])  # the next column follows


def test_position_tables_are_fixed_and_zero_at_the_class_token() -> None:
    method = small_method()
    for table in (method.encoder.vit.pos_embed, method.decoder.tokens.pos_embed):
        assert not table.requires_grad
        assert torch.equal(table[:, 0], torch.zeros_like(table[:, 0]))
    table = method.encoder.vit.pos_embed[0, 1:]
    for patch in range(16):
        row, column = divmod(patch, 4)
        for half, position in ((0, column), (12, row)):  # the first half is the column
            for i in range(6):
                angle = position / 10000 ** (i / 6)
                assert table[patch, half + i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert table[patch, half + 6 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_no_gradient_on_the_prediction_at_kept_places() -> None:
    pred = torch.rand(3, 16, 12, requires_grad=True)
    _, _, mask = random_masking(torch.rand(3, 16), 0.75)
    masked_patch_mse(pred, torch.rand(3, 16, 12), mask).backward()
    assert pred.grad is not None
    assert torch.equal(pred.grad[~mask], torch.zeros_like(pred.grad[~mask]))
    assert (pred.grad[mask] != 0).any(-1).all()


def test_the_loss_divides_by_hidden_patches_of_the_whole_batch() -> None:
    pred, target = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    target[1, 0] = 3.0
    assert masked_patch_mse(pred, target, mask).item() == (3 * 1 + 9) / 4


def test_hidden_pixels_do_not_reach_the_encoder() -> None:
    method = small_method().eval()
    images = torch.rand(2, 3, 16, 16)
    keep, _, mask = random_masking(torch.rand(2, 16), 0.75)
    patches = patchify(images, 4)
    patches[mask] = torch.rand_like(patches[mask])
    changed = unpatchify(patches, 4, (4, 4))
    before, after = method.encoder(images, keep=keep), method.encoder(changed, keep=keep)
    assert torch.equal(before.tokens, after.tokens)
    assert torch.equal(before.prefix, after.prefix)


def test_the_decoder_sees_the_class_token() -> None:
    method = small_method().eval()
    images, ctx = torch.rand(2, 3, 16, 16), fixed(torch.rand(2, 16))
    before, _ = method.predict(images, ctx)
    method.encoder.vit.cls_token.data += 1.0
    after, _ = method.predict(images, ctx)
    assert not torch.allclose(before, after)


def test_norm_pix_targets_have_mean_zero_and_variance_one() -> None:
    target = norm_pix(torch.rand(4, 16, 48))
    torch.testing.assert_close(target.mean(-1), torch.zeros(4, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(4, 16), atol=1e-3, rtol=0)


def test_class_and_mask_tokens_are_decayed_and_biases_are_not() -> None:
    groups = {group.name: dict(group.params) for group in small_method().param_groups()}
    assert {"encoder.vit.cls_token", "decoder.tokens.mask_token"} <= groups["decay"].keys()
    assert all(p.ndim == 1 for p in groups["no_decay"].values())


def hf_weights(method: Mae) -> dict[str, Tensor]:
    """Our weights under transformers' in-memory names."""

    def block(ours: str, theirs: str) -> dict[str, Tensor]:
        names = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
        names |= {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        found = {}
        for kind in ("weight", "bias"):
            for own, other in names.items():
                found[f"{theirs}.{other}.{kind}"] = state[f"{ours}.{own}.{kind}"]
            for part, rows in zip("qkv", state[f"{ours}.attn.qkv.{kind}"].chunk(3)):
                found[f"{theirs}.attention.{part}_proj.{kind}"] = rows
        return found

    state = method.state_dict()
    plain = {
        "vit.embeddings.cls_token": "encoder.vit.cls_token",
        "vit.embeddings.position_embeddings": "encoder.vit.pos_embed",
        "decoder.mask_token": "decoder.tokens.mask_token",
        "decoder.decoder_pos_embed": "decoder.tokens.pos_embed",
    }
    layers = {
        "vit.embeddings.patch_embeddings.projection": "encoder.vit.patch_embed.proj",
        "vit.layernorm": "encoder.vit.norm",
        "decoder.decoder_embed": "decoder.tokens.embed",
        "decoder.decoder_norm": "decoder.norm",
        "decoder.decoder_pred": "decoder.head",
    }
    mapped = {theirs: state[ours] for theirs, ours in plain.items()}
    for theirs, ours in layers.items():
        for kind in ("weight", "bias"):
            mapped[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    for i in range(2):
        mapped |= block(f"encoder.vit.blocks.{i}", f"vit.layers.{i}")
        mapped |= block(f"decoder.blocks.{i}", f"decoder.decoder_layers.{i}")
    return mapped


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_outputs_and_loss_equal_transformers_vitmae(norm_pix_loss: bool) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    method = small_method(norm_pix_loss=norm_pix_loss)
    other = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=96,
            layer_norm_eps=1e-6,
            image_size=16,
            patch_size=4,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
            mask_ratio=0.75,
            norm_pix_loss=norm_pix_loss,
        )
    )
    # Biases and norms start at 0 and 1: give every weight a value of its own.
    for index, param in enumerate(p for p in method.parameters() if p.requires_grad):
        generator = torch.Generator().manual_seed(index)
        param.data += 0.1 * torch.randn(param.shape, generator=generator)
    other.load_state_dict(hf_weights(method))
    images, noise = torch.rand(3, 3, 16, 16), torch.rand(3, 16)
    normalised = method.encoder.normalise(images)
    pred, mask = method.predict(normalised, fixed(noise))
    loss = method.step({"image": images}, fixed(noise)).losses["recon"]
    theirs = other(normalised, noise=noise)
    torch.testing.assert_close(pred, theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mask.float(), theirs.mask)
    torch.testing.assert_close(loss, theirs.loss, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_survives_the_papers_initialisation(tmp_path) -> None:
    """encoder.checkpoint is loaded after, not before, the method initialises its encoder."""
    source = small_method()
    torch.save(source.encoder.vit.state_dict(), tmp_path / "vit.pth")
    encoder = EncoderConfig(
        name="vit_tiny_patch16_224",
        image_size=16,
        patch_size=4,
        dim=24,
        depth=2,
        heads=3,
        checkpoint=str(tmp_path / "vit.pth"),
    )
    torch.manual_seed(1)
    loaded = Mae(MaeConfig(decoder_dim=16), EncoderBuilder({"encoder": encoder}, 0))
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(loaded.encoder.state_dict()[name], value), name
    wrong = replace(encoder, checkpoint=str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Mae(MaeConfig(decoder_dim=16), EncoderBuilder({"encoder": wrong}, 0))


def test_the_picture_keeps_visible_pixels() -> None:
    from vlx.core.capability import Reconstruction

    method = build("mae").eval()
    (capability,) = [c for c in method.exports() if isinstance(c, Reconstruction)]
    images = torch.rand(2, 3, 8, 8)
    seen, painted = capability.reconstruct(images, context())
    visible = seen == images
    assert torch.equal(painted[visible], images[visible])
    assert visible.float().mean() == pytest.approx(0.25, abs=0.02)
