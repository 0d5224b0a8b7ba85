"""CLIP: its sizes, its parity with open_clip and transformers, its temperature."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.contract.build import build, config, context, smoke_batch
from vlx.core.errors import CheckpointError
from vlx.core.method import Coupled
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig, TextConfig
from vlx.encoders.tokenizers import clip_tokenizer
from vlx.methods.clip import Clip, ClipConfig

STATISTICS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}
VIT = "vit_base_patch32_clip_quickgelu_224"
SMALL = EncoderConfig(
    name=VIT, image_size=64, patch_size=16, dim=64, depth=2, heads=1, **STATISTICS
)
SMALL_TEXT = TextConfig(dim=64, depth=2, heads=1)
RESNET = (1, 2, 1, 1)  # bottlenecks a stage
TEXTS = ["a cat", "two dogs on a mat, running", "x y z 1 2 3 4" * 30, "é"]


def test_the_class_token_is_not_decayed() -> None:
    decay, no_decay = build("clip").param_groups()
    tokens = [name for name, _ in no_decay.params if name.endswith("cls_token")]
    assert tokens == ["towers.image.vit.cls_token"]
    assert not [name for name, _ in decay.params if name.endswith("cls_token")]
    assert {"towers.image.vit.pos_embed", "towers.projection.weight"} <= dict(decay.params).keys()


def clip(cfg: ClipConfig, encoder: EncoderConfig = SMALL, text: TextConfig = SMALL_TEXT) -> Clip:
    tokenizer = clip_tokenizer(text.context_length)
    return Clip(cfg, EncoderBuilder({"encoder": encoder}, 0, text=text, tokenizer=tokenizer))


def encoded() -> tuple[torch.Tensor, torch.Tensor]:
    found = clip_tokenizer().encode(TEXTS)
    return torch.from_numpy(found.ids), torch.from_numpy(found.lengths)


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from its start, so that zeros and ones are compared too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in module.parameters():
            param += 0.02 * torch.randn(param.shape, generator=generator)
    return module.eval()


def open_clip_model():
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=16, image_size=64)
    torch.manual_seed(0)
    return stirred(CLIP(32, vision, CLIPTextCfg(width=64, heads=1, layers=2), quick_gelu=True))


@pytest.mark.parametrize(
    ("name", "embed_dim", "width", "total", "image"),
    [
        ("vit_base_patch32_clip_quickgelu_224", 512, 512, 151_277_313, 87_849_216),
        ("vit_base_patch16_clip_quickgelu_224", 512, 512, 149_620_737, 86_192_640),
        ("vit_large_patch14_clip_quickgelu_224", 768, 768, 427_616_513, 303_966_208),
        ("vit_large_patch14_clip_quickgelu_336", 768, 768, 427_944_193, 304_293_888),
        ("resnet50_clip", 1024, 512, 102_007_137, 38_316_896),
        ("resnet101_clip", 512, 512, 119_688_033, 56_259_936),
    ],
)
def test_parameters_are_the_published_ones(
    name: str, embed_dim: int, width: int, total: int, image: int
) -> None:
    side = 336 if name.endswith("336") else 224
    with torch.device("meta"):
        method = clip(
            ClipConfig(embed_dim=embed_dim),
            EncoderConfig(name=name, image_size=side),
            TextConfig(dim=width),
        )
    assert sum(p.numel() for p in method.towers.image.parameters()) == image
    assert sum(p.numel() for p in method.parameters()) == total


def test_embeddings_and_loss_equal_open_clips_with_its_weights(tmp_path: Path) -> None:
    from open_clip.loss import ClipLoss

    reference = open_clip_model()
    torch.save(reference.state_dict(), tmp_path / "open_clip.pt")
    ours = clip(ClipConfig(embed_dim=32, weights=str(tmp_path / "open_clip.pt"))).eval()
    images, (ids, lengths) = torch.rand(4, 3, 64, 64), encoded()
    with torch.no_grad():
        theirs = reference(ours.towers.image.normalise(images), ids)
        batch = {"image": images, "text": ids, "text_length": lengths}
        found = ours.embed(batch, context())
        loss = ours.step(batch, context()).losses["contrastive"]
    for a, b in zip((found["image"], found["text"], ours.logit_scale()), theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, ClipLoss()(*theirs), rtol=1e-5, atol=1e-5)


def test_embeddings_equal_transformers_with_its_weights(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    reference = stirred(
        CLIPModel(
            CLIPConfig(
                projection_dim=32,
                vision_config={**sizes, "image_size": 64, "patch_size": 16},
                text_config={**sizes, "vocab_size": 49408, "eos_token_id": 49407},
            )
        )
    )
    reference.save_pretrained(tmp_path / "hf")  # pyright: ignore
    ours = clip(ClipConfig(embed_dim=32, weights=str(tmp_path / "hf"))).eval()
    images, (ids, lengths) = torch.rand(4, 3, 64, 64), encoded()
    with torch.no_grad():
        out = reference(pixel_values=ours.towers.image.normalise(images), input_ids=ids)
        torch.testing.assert_close(ours.towers.embed_images(images), out.image_embeds)
        torch.testing.assert_close(ours.towers.embed_text(ids, lengths), out.text_embeds)


def open_clip_resnet(image_size: int = 64):
    """OpenAI's RN50 with fewer bottlenecks a stage and a small text tower."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=RESNET, width=64, head_width=64, image_size=image_size)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = stirred(CLIP(32, vision, CLIPTextCfg(width=64, heads=1, layers=2), quick_gelu=True))
    for name, value in model.named_buffers():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def resnet(monkeypatch: pytest.MonkeyPatch) -> EncoderConfig:
    """timm's `resnet50_clip` with the same."""
    from timm.models import byobnet

    known = byobnet.model_cfgs["resnet50_clip"]
    blocks = tuple(replace(b, d=d) for b, d in zip(known.blocks, RESNET))  # type: ignore[arg-type]
    monkeypatch.setitem(byobnet.model_cfgs, "resnet50_clip", replace(known, blocks=blocks))
    return EncoderConfig(name="resnet50_clip", image_size=64, **STATISTICS)


def test_a_resnets_embeddings_equal_open_clips_with_its_weights(
    tmp_path: Path, resnet: EncoderConfig
) -> None:
    reference = open_clip_resnet()
    state = reference.state_dict()
    assert "visual.layer1.0.downsample.0.weight" in state
    torch.save(state, tmp_path / "RN.pt")
    ours = clip(ClipConfig(embed_dim=32, weights=str(tmp_path / "RN.pt")), resnet).eval()
    images, (ids, lengths) = torch.rand(4, 3, 64, 64), encoded()
    with torch.no_grad():
        theirs = reference(ours.towers.image.normalise(images), ids)
        found = (ours.towers.embed_images(images), ours.towers.embed_text(ids, lengths))
    for a, b in zip((*found, ours.logit_scale()), theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_resnets_weights_of_other_sizes_load_nothing_and_name_the_keys(
    tmp_path: Path, resnet: EncoderConfig
) -> None:
    file = str(tmp_path / "RN.pt")
    torch.save(open_clip_resnet().state_dict(), file)
    with pytest.raises(CheckpointError, match=r"reshaped: .*head\.proj\.bias \(32,\) for \(16,\)"):
        clip(ClipConfig(embed_dim=16, weights=file), resnet)
    with pytest.raises(CheckpointError, match=r"a ResNet, and the encoder is a Vision.*clip_rn50"):
        clip(ClipConfig(embed_dim=32, weights=file))
    torch.save(open_clip_model().state_dict(), file)
    with pytest.raises(CheckpointError, match=r"missing: image\.model.*unexpected: image\.vit"):
        clip(ClipConfig(embed_dim=32, weights=file), resnet)


def test_a_resnets_positions_are_resampled_for_another_image_size(
    tmp_path: Path, resnet: EncoderConfig
) -> None:
    from timm.layers.pos_embed import resample_abs_pos_embed

    state = open_clip_resnet().state_dict()
    torch.save(state, tmp_path / "RN.pt")
    larger = replace(resnet, image_size=96)
    ours = clip(ClipConfig(embed_dim=32, weights=str(tmp_path / "RN.pt")), larger)
    table = state["visual.attnpool.positional_embedding"]  # (1 + 2 * 2, D)
    expected = resample_abs_pos_embed(table[None], [3, 3], [2, 2], 1)[0]
    assert torch.equal(ours.towers.image.backbone.state_dict()["head.pos_embed"], expected)


def test_towers_of_other_kinds_name_the_keys(tmp_path: Path) -> None:
    file = tmp_path / "trunk.pt"
    state = {"visual.trunk.norm.weight": torch.ones(4), "logit_scale": torch.zeros(())}
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"unexpected: image\.model\.norm\.weight"):
        clip(ClipConfig(embed_dim=32, weights=str(file)))


def test_another_vocabulary_names_the_tokenizer_and_the_file(tmp_path: Path) -> None:
    from vlx.encoders.tokenizers import train_bpe

    file = tmp_path / "open_clip.pt"
    torch.save(open_clip_model().state_dict(), file)
    words = train_bpe(TEXTS, 400, 77)
    size = words.vocab_size
    cfg = ClipConfig(embed_dim=32, weights=str(file))
    roles = {"encoder": SMALL}
    with pytest.raises(CheckpointError, match=rf"open_clip\.pt has .* 49,408 ids.* of {size}: set"):
        Clip(cfg, EncoderBuilder(roles, 0, text=SMALL_TEXT, tokenizer=words))
    alone = replace(SMALL_TEXT, checkpoint=str(file))
    text = {f"text.{k}": v for k, v in clip(ClipConfig()).towers.text.state_dict().items()}
    torch.save(text, file)
    builder = EncoderBuilder(roles, 0, text=alone, tokenizer=words)
    with pytest.raises(CheckpointError, match=rf"open_clip\.pt has .* 49,408 ids.* of {size}: set"):
        builder.text()


def test_weights_of_another_size_load_nothing_and_name_the_keys(tmp_path: Path) -> None:
    torch.save(open_clip_model().state_dict(), tmp_path / "open_clip.pt")
    with pytest.raises(CheckpointError, match=r"reshaped: .*\(32, 64\) for \(16, 64\)"):
        clip(ClipConfig(embed_dim=16, weights=str(tmp_path / "open_clip.pt")))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="holds no CLIP"):
        clip(ClipConfig(embed_dim=16, weights=str(tmp_path / "other.pt")))


def test_positions_are_resampled_for_another_image_size(tmp_path: Path) -> None:
    torch.save(open_clip_model().state_dict(), tmp_path / "open_clip.pt")
    larger = replace(SMALL, image_size=96)
    ours = clip(ClipConfig(embed_dim=32, weights=str(tmp_path / "open_clip.pt")), larger)
    assert ours.towers.image.spec.grid == (6, 6)


def test_a_scalar_temperature_of_an_older_run_loads() -> None:
    method = build("clip")
    state = method.state_dict()
    assert state["logit_scale.log"].shape == (1,)
    method.load_state_dict(state | {"logit_scale.log": torch.tensor(1.5)})
    assert method.logit_scale().item() == pytest.approx(math.exp(1.5))  # type: ignore[operator]


def test_the_temperature_starts_learns_and_stays_within_its_bounds() -> None:
    method = build("clip")
    assert isinstance(method, Clip)
    assert method.logit_scale.log.item() == pytest.approx(2.6593, abs=1e-4)
    loss = method.step(smoke_batch("clip"), context()).losses["contrastive"]
    (grad,) = torch.autograd.grad(loss, [method.logit_scale.log])
    assert grad.abs() > 0
    for huge, bound in ((1e3, math.log(100)), (-1e3, 0.0)):
        with torch.no_grad():
            method.logit_scale.log.fill_(huge)
        method.after_step(context())
        assert method.logit_scale.log.item() == pytest.approx(bound)
    decay, _ = method.param_groups()
    assert not any("logit_scale" in name for name, _ in decay.params)


def test_a_pair_does_not_depend_on_its_neighbours() -> None:
    method, batch = build("clip").eval(), smoke_batch("clip")
    assert isinstance(method, Clip)
    whole = method.embed(batch, context())
    alone = method.embed({key: value[:1] for key, value in batch.items()}, context())
    for name in whole:
        torch.testing.assert_close(whole[name][:1], alone[name], rtol=1e-5, atol=1e-5)


def test_cached_gradients_equal_those_of_the_whole_batch_and_plain_accumulation_differs() -> None:
    from vlx.engine.config import LauncherConfig, TrainConfig
    from vlx.engine.gradient_cache import cached_gradients
    from vlx.engine.parallel import Parallel, StepModule

    batch = smoke_batch("clip", batch_size=8)
    halves = [{key: value[i : i + 4] for key, value in batch.items()} for i in (0, 4)]
    whole, cached, plain = (copy.deepcopy(build("clip")) for _ in range(3))
    whole.step(batch, context()).losses["contrastive"].backward()
    parallel = Parallel(TrainConfig(), LauncherConfig())
    assert isinstance(cached, Coupled)
    out = cached_gradients(cached, StepModule(cached), parallel, halves, lambda micro: context())  # type: ignore[arg-type]
    torch.testing.assert_close(
        out.losses["contrastive"], whole.step(batch, context()).losses["contrastive"].detach()
    )
    for half in halves:
        (plain.step(half, context()).losses["contrastive"] / 2).backward()
    differs = []
    for (name, a), b, c in zip(whole.named_parameters(), cached.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
        differs.append(not torch.allclose(a.grad, c.grad, rtol=1e-2, atol=1e-5))  # type: ignore[arg-type]
    assert any(differs)


def test_its_exports_embed_texts_as_written() -> None:
    from vlx.core.capability import DualEncoder

    method = build("clip").eval()
    (joint,) = (c for c in method.exports() if isinstance(c, DualEncoder))
    with torch.no_grad():
        features = joint.text_features(["latin small letter a", "rightwards arrow"])
        images = joint.joint_image_features(torch.rand(2, 3, 32, 32))
    assert features.shape == images.shape == (2, config("clip").method.embed_dim)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    assert joint.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)


def test_a_runs_weights_ask_for_its_own_tokenizer(tmp_path: Path) -> None:
    from vlx.encoders.tokenizers import bpe_bytes, train_bpe

    (tmp_path / "tokenizer.json").write_bytes(bpe_bytes(train_bpe(TEXTS, 400, 16)))
    with pytest.raises(CheckpointError, match=rf"set text\.tokenizer={tmp_path}"):
        clip(ClipConfig(embed_dim=16, weights=str(tmp_path)))
