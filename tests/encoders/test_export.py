"""Exports load in the other library and give the same outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from vlx.commands.export import export
from vlx.commands.start import prepare
from vlx.config.compose import compose
from vlx.core.errors import ConfigError, VlxError
from vlx.core.registry import load
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig
from vlx.encoders.export import EvaluatedView, export_hf, export_timm
from vlx.encoders.timm_vit import TimmVit
from vlx.engine.checkpoint import Snapshot, save
from vlx.engine.load import run_config

VIEW = EvaluatedView(crop_ratio=1.0)


def encoder_and_config(name: str = "vit_tiny_patch16_224") -> tuple[TimmVit, EncoderConfig]:
    cfg = EncoderConfig(
        name=name,
        image_size=32,
        patch_size=8,
        dim=24,
        depth=2,
        heads=3,
        mean=[0.3, 0.4, 0.5],
        std=[0.2, 0.3, 0.4],
    )
    encoder = TimmVit(cfg)
    for index, param in enumerate(encoder.parameters()):
        generator = torch.Generator().manual_seed(index)
        param.data += 0.1 * torch.randn(param.shape, generator=generator)
    return encoder.eval(), cfg


def outputs(encoder: TimmVit, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = encoder(images)
    return torch.cat([out.prefix, out.tokens], dim=1)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"]
)
def test_timm_takes_the_weights_strictly_and_agrees(tmp_path: Path, name: str) -> None:
    import timm

    encoder, cfg = encoder_and_config(name)
    export_timm(encoder, cfg, tmp_path / "out", VIEW)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    model = timm.create_model(config["architecture"], pretrained=False, **config["model_args"])
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        theirs = model.eval().forward_features(encoder.normalise(images))  # pyright: ignore
    torch.testing.assert_close(outputs(encoder, images), theirs, atol=1e-5, rtol=1e-5)


def test_timm_reads_the_directory_by_itself_with_its_statistics(tmp_path: Path) -> None:
    import timm
    from timm.data.config import resolve_data_config

    encoder, cfg = encoder_and_config()
    export_timm(encoder, cfg, tmp_path / "out", VIEW)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    for name, value in encoder.vit.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    data = resolve_data_config(model=model)
    assert (*data["mean"],) == encoder.spec.mean
    assert (*data["std"],) == encoder.spec.std
    assert (*data["input_size"],) == (3, 32, 32)


def test_transformers_loads_the_directory_and_agrees(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, ViTModel

    encoder, _ = encoder_and_config()
    export_hf(encoder, tmp_path / "out", VIEW)
    model, report = ViTModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=list(pixels), return_tensors="pt")
    with torch.no_grad():
        theirs = model.eval()(**inputs).last_hidden_state
    ours = outputs(encoder, pixels.float() / 255)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_small_patch14_reg4_dinov2", "register tokens"),
        ("deit3_small_patch16_224", "layer scale"),
        ("vit_base_patch16_clip_224", "a norm before the blocks"),
    ],
)
def test_what_transformers_cannot_hold_is_refused(tmp_path: Path, name: str, words: str) -> None:
    encoder, _ = encoder_and_config(name)
    with pytest.raises(ConfigError, match=words):
        export_hf(encoder, tmp_path / "out", VIEW)
    assert not (tmp_path / "out").exists()


def make_run(tmp_path: Path, slug: str, *words: str, ema: bool = False) -> tuple[Path, TimmVit]:
    """A run directory with one checkpoint of fresh weights, as the loop writes it."""
    overrides = [f"runs_dir={tmp_path}", "name=run", "track=none", *words]
    values = compose(slug, "pretrain-mim", "smoke", overrides)
    run_dir = prepare(values, overrides)
    cfg = run_config(values)
    roles = {"encoder": cfg.encoder, "teacher": cfg.teacher}
    torch.manual_seed(3)
    method = load(slug)(cfg.method, EncoderBuilder(roles, 10, load_weights=False))
    shadow = {}
    if ema:
        trained = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
        shadow = {name: p.detach() * 2 for name, p in trained}
    state = {"step": 4}
    save(run_dir / "checkpoints", Snapshot(4, method.state_dict(), {}, shadow, state))
    if ema:
        method.load_state_dict(shadow, strict=False)
    assert isinstance(method.encoder, TimmVit)
    return run_dir, method.encoder.eval()


@pytest.mark.parametrize("slug", ["mae", "gmml", "mr-mae"])
@pytest.mark.parametrize("layout", ["timm", "hf"])
def test_the_command_exports_any_methods_encoder(tmp_path: Path, slug: str, layout: str) -> None:
    import timm
    from transformers import ViTModel

    run_dir, encoder = make_run(tmp_path, slug)
    out = tmp_path / "out"
    assert export(run_dir, out, layout, Console(quiet=True)) == 0
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        if layout == "timm":
            model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
            theirs = model.forward_features(encoder.normalise(images))  # pyright: ignore
        else:
            model = ViTModel.from_pretrained(out, add_pooling_layer=False).eval()
            theirs = model(encoder.normalise(images)).last_hidden_state
    torch.testing.assert_close(outputs(encoder, images), theirs, atol=1e-5, rtol=1e-4)


def test_the_average_is_what_is_exported(tmp_path: Path) -> None:
    run_dir, encoder = make_run(tmp_path, "mae", ema=True)
    export(run_dir, tmp_path / "out", "timm", Console(quiet=True))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["norm.weight"], encoder.vit.norm.weight)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    run_dir, _ = make_run(tmp_path, "mae")
    console = Console(quiet=True)
    with pytest.raises(VlxError, match="must be one of timm, hf"):
        export(run_dir, tmp_path / "out", "onnx", console)
    with pytest.raises(VlxError, match="not an empty folder"):
        export(run_dir, run_dir, "timm", console)
    with pytest.raises(VlxError, match="is not a run directory"):
        export(tmp_path / "nowhere", tmp_path / "out", "timm", console)
