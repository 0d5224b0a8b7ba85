"""MR-MAE: the card's checks, for the plain and the masked-convolution student."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.contract.build import build, config, context, smoke_batch
from vlx.commands.dry_run import measure
from vlx.config.compose import compose
from vlx.core.errors import ConfigError
from vlx.core.manifest import manifest_text
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig
from vlx.engine.load import run_config
from vlx.methods.mae import Mae, MaeConfig
from vlx.methods.mr_mae import MrMae, MrMaeConfig
from vlx.ops.masking import random_masking
from vlx.ops.patches import upsample_mask
from vlx.ops.tokens import gather_tokens

VIT = EncoderConfig(
    name="vit_tiny_patch16_224", image_size=16, patch_size=4, dim=24, depth=2, heads=3
)
TEACHER = replace(VIT, dim=36, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
CONV = replace(VIT, name="convmae_base", depth=1)
STUDENTS = pytest.mark.parametrize("student", [VIT, CONV], ids=["vit", "conv"])


def small_method(
    student: EncoderConfig = VIT, teacher: EncoderConfig = TEACHER, **method: object
) -> MrMae:
    """16 patches of 4 pixels; 4 are kept."""
    torch.manual_seed(0)
    keys = {"decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1}
    cfg = MrMaeConfig(**{**keys, **method})  # type: ignore[arg-type]
    return MrMae(cfg, EncoderBuilder({"encoder": student, "teacher": teacher}, 0, False))


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_parameter_counts_of_the_plain_student() -> None:
    cfg = config("mr-mae", "paper")
    for width, expected in ((768, 112_246_272), (512, 112_049_408)):
        teacher = replace(TEACHER, image_size=224, patch_size=16, dim=width, depth=1, heads=8)
        roles = {"encoder": cfg.encoder, "teacher": teacher}
        with torch.device("meta"):
            assert trainable(MrMae(cfg.method, EncoderBuilder(roles, 0, False))) == expected


def test_parameter_counts_of_the_masked_convolution_student() -> None:
    cfg = run_config(compose("mr-mae", "pretrain-mim", "mcmae"))
    roles = {"encoder": cfg.encoder, "teacher": cfg.teacher}
    with torch.device("meta"):
        method = MrMae(cfg.method, EncoderBuilder(roles, 0, False))
    assert trainable(method.encoder) == 88_782_208
    assert trainable(method.decoder) == 26_008_320
    assert trainable(method) - trainable(method.mimic_head) == 114_790_528


def test_cost_is_maes_and_the_teachers() -> None:
    report = measure(config("mr-mae", "paper"))
    assert report.gmacs == pytest.approx(
        9.78 + 17.56, rel=0.005
    )  # less the embedding of hidden patches
    assert report.tokens["encoder.vit.blocks"] == [50] * 12
    assert report.tokens["teacher.module.vit.blocks"] == [197] * 12


def test_the_paper_preset_has_clips_tower_with_clips_statistics() -> None:
    from vlx.encoders.published import check_statistics

    teacher = config("mr-mae", "paper").teacher
    assert teacher is not None
    assert teacher.pretrained
    check_statistics(teacher)


def test_the_teacher_can_be_chosen_from_the_command_line() -> None:
    words = ["encoder@teacher=dino_vit_base", "teacher.depth=3", "teacher.checkpoint=runs/teacher"]
    teacher = run_config(compose("mr-mae", "pretrain-mim", "paper", words)).teacher
    assert teacher is not None
    assert (teacher.name, teacher.depth) == ("vit_base_patch16_224.dino", 3)
    assert teacher.checkpoint == "runs/teacher"
    words = ["teacher.name=vit_small_patch16_224", "teacher.pretrained=false"]
    teacher = run_config(compose("mr-mae", "pretrain-mim", "paper", words)).teacher
    assert teacher is not None
    assert teacher.name == "vit_small_patch16_224"


@pytest.mark.parametrize(
    ("slug", "word", "message"),
    [
        ("mr-mae", "teacher.nme=x", r"unknown key 'teacher\.nme'.*teacher\.name"),
        ("mae", "teacher.name=x", "teacher is null here"),
        ("mr-mae", "encoder@teacher=clip_vit_bas", "no encoder 'clip_vit_bas'.*clip_vit_base"),
    ],
)
def test_a_wrong_teacher_key_is_one_line(slug: str, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose(slug, "pretrain-mim", "smoke", [word])
    assert "\n" not in str(caught.value)


def test_the_teacher_is_frozen_in_eval_mode_and_in_no_group() -> None:
    method = small_method(teacher=replace(TEACHER, drop_path=0.5))
    method.train()
    assert not any(part.training for part in method.teacher.modules())
    assert not any(p.requires_grad for p in method.teacher.parameters())
    names = [name for group in method.param_groups() for name, _ in group.params]
    assert not any(name.startswith("teacher") for name in names)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(method.teach(images), method.teach(images))  # no drop path
    assert not method.teach(images).requires_grad


@STUDENTS
def test_the_two_losses_meet_in_the_encoder_only(student: EncoderConfig) -> None:
    method = small_method(student)
    losses = method.step({"image": torch.rand(4, 3, 16, 16)}, context()).losses

    def reached(loss: Tensor) -> set[str]:
        method.zero_grad()
        loss.backward(retain_graph=True)
        return {
            name.split(".")[0]
            for name, p in method.named_parameters()
            if p.grad is not None and p.grad.any()
        }

    assert reached(losses["mimic"]) == {"encoder", "mimic_head"}
    assert reached(losses["recon"]) == {"encoder", "decoder"}


@STUDENTS
def test_visible_tokens_do_not_change_with_hidden_pixels(student: EncoderConfig) -> None:
    method = small_method(student).eval()
    images = torch.rand(2, 3, 16, 16)
    keep, _, mask = random_masking(torch.rand(2, 16), 0.75)
    changed = images.masked_fill(upsample_mask(mask, 4, (4, 4)), 5.0)
    before = method.encoder(images, keep=keep).tokens
    after = method.encoder(changed, keep=keep).tokens
    assert torch.equal(before, after)


def test_masks_of_the_convolution_stages_follow_the_patches() -> None:
    """Without the mask a 5x5 convolution would see hidden neighbours; with all kept it may."""
    encoder = small_method(CONV).eval().encoder
    images = torch.rand(1, 3, 16, 16)
    other = images.clone()
    other[:, :, :4, :4] += 1.0  # patch 0
    keep = torch.arange(16)[None]
    a, b = encoder(images, keep=keep).tokens, encoder(other, keep=keep).tokens
    assert not torch.allclose(a[:, 1], b[:, 1])
    torch.testing.assert_close(encoder(images).tokens, a)


def test_the_convolution_student_has_no_class_token_and_its_stages_are_added() -> None:
    method = small_method(CONV).eval()
    out = method.encoder(torch.rand(2, 3, 16, 16), layers=(1,))
    assert out.prefix.shape == (2, 0, 24)
    assert out.tokens.shape == (2, 16, 24)
    without = method.encoder.norm(out.layers[1])
    assert not torch.allclose(without, out.tokens)
    assert method.decoder.tokens.pos_embed.shape == (1, 16, 16)


@pytest.mark.parametrize("changes", [{"name": "convmae_huge"}, {"patch_size": 6, "image_size": 18}])
def test_a_convolution_student_that_does_not_exist_is_refused(changes: dict) -> None:
    with pytest.raises(ConfigError, match=r"ConvMAE has|divisible by 4"):
        small_method(replace(CONV, **changes))


def test_the_teachers_feature_k_is_that_of_patch_keep_k() -> None:
    method = small_method(normalise_teacher=False)
    images = torch.rand(3, 3, 16, 16)
    _, masked = method.encode(method.encoder.normalise(images), context())
    gathered = gather_tokens(method.teach(images), masked.keep)
    teacher = method.teacher.module
    pixels = (images - torch.tensor(TEACHER.mean)[:, None, None]) / torch.tensor(TEACHER.std)[
        :, None, None
    ]
    with torch.no_grad():
        features = teacher.vit.forward_features(pixels)[:, 1:]
    for b in range(3):
        for k in range(4):
            torch.testing.assert_close(gathered[b, k], features[b, masked.keep[b, k]])


def test_a_student_that_is_its_teacher_mimics_at_no_cost() -> None:
    method = small_method(teacher=VIT, normalise_teacher=False, mask_ratio=0.01)
    method.teacher.module.load_state_dict(method.encoder.state_dict())
    method.mimic_head = nn.Identity()  # type: ignore[assignment]
    images = torch.rand(2, 3, 16, 16)
    everything = torch.stack([torch.randperm(16) for _ in range(2)])
    student = method.encoder(images, keep=everything).tokens
    teacher = gather_tokens(method.teach(images), everything)
    torch.testing.assert_close(student, teacher, atol=1e-5, rtol=1e-4)


def test_normalised_targets_have_mean_zero_and_variance_one() -> None:
    features = small_method().teach(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    variance = features.var(-1, unbiased=False)
    torch.testing.assert_close(variance, torch.ones(2, 16), atol=1e-3, rtol=0)


def test_without_mimic_weight_the_loss_is_maes_bit_for_bit() -> None:
    method = small_method(mimic_weight=0.0)
    keys = {"decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1}
    mae = Mae(MaeConfig(**keys), EncoderBuilder({"encoder": VIT}, 0))  # type: ignore[arg-type]
    own = method.state_dict()
    mae.load_state_dict({name: own[name] for name in mae.state_dict()})
    batch = {"image": torch.rand(4, 3, 16, 16)}
    ours, theirs = method.step(batch, context()).losses, mae.step(batch, context()).losses
    assert ours["mimic"] == 0
    assert torch.equal(ours["recon"] + ours["mimic"], theirs["recon"])


def test_a_teacher_of_another_patch_size_gets_a_larger_picture() -> None:
    method = small_method(teacher=replace(TEACHER, patch_size=7, image_size=28))
    assert method.teach(torch.rand(2, 3, 16, 16)).shape == (2, 16, 36)
    with pytest.raises(ConfigError, match=r"2x2 patches and the encoder 4x4: set .*image_size=28"):
        small_method(teacher=replace(TEACHER, patch_size=7, image_size=14))


def test_a_method_without_a_teacher_says_which_key_to_set() -> None:
    with pytest.raises(ConfigError, match=r"set teacher\.name"):
        MrMae(MrMaeConfig(), EncoderBuilder({"encoder": VIT, "teacher": None}, 0))


def test_a_teacher_with_random_weights_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vlx"):
        EncoderBuilder({"encoder": VIT, "teacher": TEACHER}, 0).vision("teacher")
    assert "the teacher has random weights" in caplog.text


def test_a_run_is_a_teacher_by_its_directory(tmp_path) -> None:
    from safetensors.torch import save_file

    method = build("mae")
    run = tmp_path / "checkpoints" / "step-00000004"
    run.mkdir(parents=True)
    save_file(method.state_dict(), run / "model.safetensors")
    (run / "state.json").write_text("{}")
    (run / "manifest.json").write_text(manifest_text(run))
    teacher = replace(config("mae").encoder, checkpoint=str(tmp_path))
    roles = {"encoder": config("mr-mae").encoder, "teacher": teacher}
    student = MrMae(config("mr-mae").method, EncoderBuilder(roles, 0))
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(student.teacher.module.state_dict()[name], value), name


def test_bfloat16_of_the_convolution_student_stays_finite() -> None:
    method = small_method(CONV)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method.step({"image": torch.rand(2, 3, 16, 16)}, context()).losses
    assert all(loss.isfinite() for loss in losses.values())


def test_the_smoke_step_gives_both_losses() -> None:
    losses = build("mr-mae").step(smoke_batch("mr-mae"), context()).losses
    assert losses.keys() == {"recon", "mimic"}
