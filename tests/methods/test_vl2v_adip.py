"""VL2V-ADiP: its two stages, its loss, its prediction, and what it trains of which student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tests.contract.build import config, context
from vlx.core.capability import ClassLogits, OpenVocabulary
from vlx.core.errors import CheckpointError, ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig, TextConfig
from vlx.encoders.tokenizers import clip_tokenizer
from vlx.engine.adapter import save_adapter
from vlx.methods.clip import Clip, ClipConfig
from vlx.methods.vl2v_adip import Stage, Vl2vAdip, Vl2vAdipConfig, cosine_losses, load_projection

TEXT = TextConfig(dim=64, depth=2, heads=1, context_length=16)
TEACHER = EncoderConfig(
    name="vit_base_patch16_clip_quickgelu_224",
    image_size=32,
    patch_size=8,
    dim=64,
    depth=2,
    heads=1,
    mean=[0.48, 0.46, 0.41],
    std=[0.27, 0.26, 0.28],
)
STUDENT = EncoderConfig(
    name="vit_tiny_patch16_224", image_size=32, patch_size=8, dim=48, depth=2, heads=3
)
NAMES = ("tabby_cat", "dog", "house", "guitar")
EMBED = 32


def builder(student: EncoderConfig = STUDENT, *, load_weights: bool = True) -> EncoderBuilder:
    return EncoderBuilder(
        {"encoder": student, "teacher": TEACHER},
        len(NAMES),
        load_weights,
        text=TEXT,
        tokenizer=clip_tokenizer(TEXT.context_length),
        class_names=NAMES,
    )


def vl2v(
    stage: Stage, student: EncoderConfig = STUDENT, *, load_weights: bool = False, **values: Any
) -> Vl2vAdip:
    torch.manual_seed(0)
    cfg = Vl2vAdipConfig(**({"stage": stage, "embed_dim": EMBED} | values))
    return Vl2vAdip(cfg, builder(student, load_weights=load_weights))


def batch_of(count: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(count, 3, 32, 32, generator=generator),
        "label": torch.randint(len(NAMES), (count,), generator=generator),
    }


def steps(method: Vl2vAdip, count: int = 3) -> None:
    """A few updates, of everything that requires gradient."""
    params = [param for group in method.param_groups() for _, param in group.params]
    optimizer = torch.optim.Adam(params, lr=1e-3)
    method.train()
    for step in range(count):
        optimizer.zero_grad()
        sum(method.step(batch_of(seed=step), context(step)).losses.values()).backward()  # type: ignore
        optimizer.step()


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> list[bool]:
    return [torch.equal(value, before[name]) for name, value in module.state_dict().items()]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("vit_base_patch16_224", 393_728, 85_798_656),
        ("vit_small_patch16_224", 197_120, 21_665_664),
        ("deit_small_distilled_patch16_224", 197_120, 21_666_432),
        ("resnet50", 1_049_088, 23_508_032),
    ],
)
def test_each_stage_trains_the_published_number(name: str, first: int, second: int) -> None:
    for stage, expected in ((Stage.align, first), (Stage.distil, second)):
        with torch.device("meta"):
            method = vl2v(stage, EncoderConfig(name=name), embed_dim=512)
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        assert trained == expected, stage


def test_stage_one_trains_the_projection_and_nothing_else() -> None:
    method = vl2v(Stage.align)
    student, teacher = copies(method.student), copies(method.teacher)
    projection = copies(method.projection)
    steps(method)
    assert all(same(method.student, student))
    assert all(same(method.teacher, teacher))
    assert not any(same(method.projection, projection))


def test_stage_two_trains_the_student_from_stage_ones_projection(tmp_path: Path) -> None:
    first = vl2v(Stage.align)
    steps(first)
    save_adapter(tmp_path, first, first.state_dict(), slug="vl2v-adip")
    method = vl2v(Stage.distil, load_weights=True, projection=str(tmp_path))
    taken, student, teacher = (
        copies(m) for m in (first.projection, method.student, method.teacher)
    )
    assert all(same(method.projection, taken))
    steps(method)
    assert all(same(method.projection, taken))
    assert all(same(method.teacher, teacher))
    assert not any(same(method.student, student))


@pytest.mark.parametrize("stage", [Stage.joint, Stage.cross_entropy, Stage.kl, Stage.white_box])
def test_the_other_stages_train_all_but_the_teacher(stage: Stage) -> None:
    method = vl2v(stage)
    before = {name: param.clone() for name, param in method.named_parameters()}
    steps(method)
    for name, param in method.named_parameters():
        frozen = name.startswith(("teacher.", "logit_scale."))
        assert torch.equal(param, before[name]) == frozen, name


def test_what_stage_two_cannot_start_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run method\.stage=align first"):
        vl2v(Stage.distil, load_weights=True)
    with pytest.raises(CheckpointError, match=r"holds nothing as projection\.weight"):
        vl2v(Stage.distil, load_weights=True, projection=str(tmp_path / "nowhere"))
    first = vl2v(Stage.align)
    save_adapter(tmp_path, first, first.state_dict(), slug="vl2v-adip")
    wider = replace(STUDENT, dim=96)
    with pytest.raises(CheckpointError, match=r"holds \(32, 48\) as .*needs \(32, 96\)"):
        vl2v(Stage.distil, wider, load_weights=True, projection=str(tmp_path))
    other = nn.Linear(48, 16)
    kept = copies(other)
    with pytest.raises(CheckpointError):
        load_projection(other, str(tmp_path))
    assert all(same(other, kept))
    with pytest.raises(ConfigError, match=r"read by method\.stage=distil, not by joint"):
        Vl2vAdipConfig(stage=Stage.joint, projection="runs/aligned")
    with pytest.raises(ConfigError, match=r"has no \{\}"):
        Vl2vAdipConfig(templates=["a photo"])
    with pytest.raises(ConfigError, match=r"image_ratio=1\.5"):
        Vl2vAdipConfig(image_ratio=1.5)


def test_the_loss_does_not_see_lengths() -> None:
    z, image, text = torch.randn(3, 5, EMBED)
    plain = cosine_losses(z, image, text, 0.3)
    for scaled in ((7 * z, image, text), (z, 0.1 * image, text), (z, image, 30 * text)):
        for name, value in cosine_losses(*scaled, 0.3).items():
            torch.testing.assert_close(value, plain[name])


def test_lambda_takes_a_teachers_side_out() -> None:
    for ratio, silent in ((1.0, "text"), (0.0, "image")):
        z, image, text = (torch.randn(5, EMBED, requires_grad=True) for _ in range(3))
        sum(cosine_losses(z, image, text, ratio).values()).backward()  # type: ignore[union-attr]
        grads = {"image": image.grad, "text": text.grad}
        for name, grad in grads.items():
            assert grad is not None
            assert bool(grad.abs().sum() > 0) == (name != silent)
    z = torch.randn(5, EMBED, requires_grad=True)
    (grad,) = torch.autograd.grad(cosine_losses(z, image, text, 0.0)["image"], [z])
    assert not grad.any()


def test_the_loss_is_least_between_the_two_teachers() -> None:
    image, text = normalize(torch.randn(2, 1, EMBED), dim=-1).double()
    best = 0.3 * image + 0.7 * text

    def loss(z: Tensor) -> Tensor:
        (a, b), (c, d) = (image.double(), text.double()), (0.3, 0.7)
        z = normalize(z, dim=-1)
        own = sum(cosine_losses(z, image, text, 0.3).values())
        torch.testing.assert_close(own.double(), -(c * z * a + d * z * b).sum())  # type: ignore
        return own  # type: ignore[return-value]

    torch.testing.assert_close(loss(best).double(), -best.norm(), rtol=1e-5, atol=1e-6)
    for seed in range(20):
        torch.manual_seed(seed)
        assert loss(best + 0.2 * torch.randn(1, EMBED)) > loss(best)


@pytest.fixture
def clip_file(tmp_path: Path) -> tuple[Clip, str]:
    torch.manual_seed(3)
    cfg = ClipConfig(embed_dim=EMBED, temperature=0.02)
    tokenizer = clip_tokenizer(TEXT.context_length)
    clip = Clip(cfg, EncoderBuilder({"encoder": TEACHER}, 0, text=TEXT, tokenizer=tokenizer))
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    return clip.eval(), str(tmp_path / "clip.pt")


def zero_shot(clip: Clip, images: Tensor) -> Tensor:
    words = [name.replace("_", " ") for name in NAMES]
    texts = clip.towers.embed_texts([f"a photo of a {word}" for word in words])
    return clip.logit_scale() * clip.towers.embed_images(images) @ texts.T


@torch.no_grad()
def test_clips_own_tower_as_student_predicts_as_zero_shot_clip(
    clip_file: tuple[Clip, str],
) -> None:
    clip, file = clip_file
    images = torch.rand(5, 3, 32, 32)
    expected = zero_shot(clip, images)
    white_box = vl2v(Stage.white_box, load_weights=True, teacher_weights=file).eval()
    identity = vl2v(Stage.joint, load_weights=True, teacher_weights=file).eval()
    identity.student, identity.projection = clip.towers.image, nn.Linear(EMBED, EMBED)
    identity.projection.weight.copy_(torch.eye(EMBED))
    identity.projection.bias.zero_()
    for method in (white_box, identity):
        (logits,) = (c for c in method.exports() if isinstance(c, ClassLogits))
        torch.testing.assert_close(logits.class_logits(images), expected, rtol=1e-4, atol=1e-4)
        (named,) = (c for c in method.exports() if isinstance(c, OpenVocabulary))
        asked = named.logits_of(images, [NAMES[2], NAMES[0]])
        torch.testing.assert_close(asked, expected[:, [2, 0]], rtol=1e-4, atol=1e-4)


def test_class_weights_have_length_one_after_the_mean_over_templates() -> None:
    templates = ["a photo of a {}", "the {}", "{}"]
    method = vl2v(Stage.kl, templates=templates)
    with torch.inference_mode():  # as an evaluation before training does
        found = method.class_weights()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(NAMES)))
    texts = [t.replace("{}", "tabby cat") for t in templates]
    with torch.no_grad():
        mean = method.teacher.module.embed_texts(texts).mean(0)
    torch.testing.assert_close(found[0], mean / mean.norm())
    steps(method, 1)
    assert "classes" not in method.state_dict()
    method.load_state_dict(vl2v(Stage.kl).state_dict())
    assert method.classes is None


def test_a_distilled_students_two_tokens_are_averaged() -> None:
    student = replace(STUDENT, name="deit_tiny_distilled_patch16_224")
    method, images = vl2v(Stage.distil, student), batch_of()["image"]
    with torch.no_grad():
        for mode in (True, False):
            method.train(mode)
            out = method.student(images)
            assert out.prefix.shape[1] == 2
            expected = method.projection(out.prefix.mean(1))
            torch.testing.assert_close(method.project(images), expected)


def test_batch_norms_keep_their_statistics_while_their_affine_trains() -> None:
    student = EncoderConfig(name="test_resnet", image_size=32)
    method = vl2v(Stage.distil, student)
    before = copies(method.student)
    steps(method)
    after = method.student.state_dict()
    running = [name for name in before if "running" in name or "num_batches" in name]
    assert running
    assert all(torch.equal(after[name], before[name]) for name in running)
    assert not torch.equal(after["model.bn1.weight"], before["model.bn1.weight"])


def test_a_teacher_of_another_image_size_sees_the_same_view_resized() -> None:
    method = vl2v(Stage.align, replace(STUDENT, image_size=48))
    batch = batch_of()
    batch["image"] = torch.rand(6, 3, 48, 48)
    assert all(torch.isfinite(v) for v in method.step(batch, context()).losses.values())
    with pytest.raises(ConfigError, match=r"encoder\.image_size=32"):
        vl2v(Stage.white_box, replace(STUDENT, image_size=48))


def test_random_teachers_are_said_once_and_loaded_ones_not(
    caplog: pytest.LogCaptureFixture, clip_file: tuple[Clip, str]
) -> None:
    vl2v(Stage.align, load_weights=True)
    assert sum("random weights" in record.message for record in caplog.records) == 1
    caplog.clear()
    vl2v(Stage.align, load_weights=True, teacher_weights=clip_file[1])
    assert not caplog.records


def test_the_papers_values() -> None:
    cfg = config("vl2v-adip", "paper")
    assert (cfg.optim.lr, cfg.optim.weight_decay) == (5e-5, 0.0)
    assert (cfg.train.steps, cfg.train.batch_size) == (5001, 96)
    assert cfg.method.image_ratio == 0.5
    assert (cfg.eval.every_steps, cfg.train.swad) == (200, "classification/loss")
    assert (cfg.data.balance_domains, cfg.train.keep_best) == (True, "classification/top1")
    assert cfg.data.val_split == cfg.data.train_split.removesuffix("train") + "test"
