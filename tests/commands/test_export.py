"""What is exported gives, on picture files, the numbers that `vlx eval` measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from timm.data import create_transform
from timm.data.config import resolve_data_config
from torch import Tensor

from tests.commands.conftest import text_console, text_of
from vlx.commands.export import export
from vlx.commands.start import prepare
from vlx.config.compose import compose
from vlx.core.capability import ClassLogits, DualEncoder, ImageFeatures
from vlx.core.errors import ConfigError
from vlx.core.registry import load
from vlx.data.host import collate
from vlx.data.source import SourceInfo
from vlx.data.training_data import keep_training_data
from vlx.data.views import evaluation_view, to_float
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.tokenizers import FILE, bpe_bytes, train_bpe
from vlx.engine.build import builder_of
from vlx.engine.checkpoint import Snapshot, save
from vlx.engine.load import run_config
from vlx.evals.base import Subject
from vlx.ops.resample import Interpolation

NAMES = ("cat", "a dog", "Zürich")
RATIO = "eval.crop_ratio=0.5"
SIZES = [(32, 32), (32, 48), (60, 32)]
"""Of pictures (width, height) whose central half is 16 pixels: nothing is resampled."""


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = []
    for number, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def as_evaluated(files: list[Path], size: int, **view: Any) -> Tensor:
    """The files as the evaluators' view makes them."""
    arrays = [np.asarray(Image.open(file)) for file in files]
    host = collate(arrays, [0] * len(files), range(len(files)), [], None)
    (view,) = evaluation_view(**(view or {"crop_ratio": 0.5})).views
    noise = torch.zeros(len(files), 1)
    return view.ops[0](to_float(host.images), host.sizes, noise, size)


def make_run(folder: Path, slug: str, command: str, *words: str, names=NAMES):
    """A run directory with one checkpoint of varied weights, and its capabilities."""
    overrides = [f"runs_dir={folder}", "name=run", "track=none", RATIO, *words]
    values = compose(slug, command, "smoke", overrides)
    run_dir = prepare(values, overrides)
    cfg = run_config(values)
    tokenizer = None
    if cfg.text is not None:
        captions = ["a dog runs", "two cats and a bird", "red squares beside a blue circle"] * 9
        tokenizer = train_bpe(captions, cfg.text.vocab_size or 0, cfg.text.context_length)
        (run_dir / FILE).write_bytes(bpe_bytes(tokenizer))
    method = load(slug)(
        cfg.method, builder_of(cfg, len(names), tokenizer, names, load_weights=False)
    ).eval()
    with torch.no_grad():
        for index, param in enumerate(method.parameters()):
            generator = torch.Generator().manual_seed(index)
            param += 0.1 * torch.randn(param.shape, generator=generator)
    state = {"step": 4}
    save(run_dir / "checkpoints", Snapshot(4, method.state_dict(), {}, {}, state))
    info = SourceInfo("pictures", "train", 9, (), class_names=names, fingerprint="x")
    keep_training_data(run_dir, info)
    return run_dir, cfg, Subject(slug, method.exports())


def timm_on(files: list[Path], out: Path) -> tuple[torch.nn.Module, Tensor]:
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model), is_training=False)
    with torch.no_grad():
        return model, model(torch.stack([transform(Image.open(file)) for file in files]))  # type: ignore


SMALL = ("encoder=digits", "encoder.image_size=16", "encoder.patch_size=4")


@pytest.mark.parametrize("layout", ["timm", "hf"])
def test_features_of_files_are_those_of_the_evaluation(tmp_path, pictures, layout: str) -> None:
    run_dir, _, subject = make_run(tmp_path, "mae", "pretrain-mim", *SMALL)
    out = tmp_path / "out"
    assert export(run_dir, out, layout, Console(quiet=True)) == 0
    ours = subject.get(ImageFeatures).image_features(as_evaluated(pictures, 16))
    if layout == "timm":
        theirs = timm_on(pictures, out)[1]
    else:
        from transformers import AutoImageProcessor, ViTModel

        processor = AutoImageProcessor.from_pretrained(out)
        model = ViTModel.from_pretrained(out, add_pooling_layer=False).eval()
        inputs = processor([Image.open(file) for file in pictures], return_tensors="pt")
        with torch.no_grad():
            theirs = model(**inputs).last_hidden_state[:, 1:].mean(1)
    torch.testing.assert_close(theirs, ours.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("words", [(), ("method.tune=lora",), ("method.tune=ia3",)])
@pytest.mark.parametrize("layout", ["timm", "hf"])
def test_a_classifier_keeps_its_head_and_names(tmp_path, pictures, layout: str, words) -> None:
    run_dir, _, subject = make_run(tmp_path, "supervised", "finetune", *SMALL, *words)
    out = tmp_path / "out"
    assert export(run_dir, out, layout, Console(quiet=True)) == 0
    with torch.no_grad():
        ours = subject.get(ClassLogits).class_logits(as_evaluated(pictures, 16))
    if layout == "timm":
        theirs = timm_on(pictures, out)[1]
        assert json.loads((out / "config.json").read_text())["label_names"] == list(NAMES)
    else:
        from transformers import AutoImageProcessor, ViTForImageClassification

        processor = AutoImageProcessor.from_pretrained(out)
        model = ViTForImageClassification.from_pretrained(out).eval()
        assert [model.config.id2label[i] for i in range(3)] == list(NAMES)
        inputs = processor([Image.open(file) for file in pictures], return_tensors="pt")
        with torch.no_grad():
            theirs = model(**inputs).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_a_classifier_that_is_no_vit_goes_to_timm(tmp_path, pictures) -> None:
    words = ("encoder=resnet18", "encoder.image_size=16")
    run_dir, _, subject = make_run(tmp_path, "supervised", "finetune", *words)
    assert export(run_dir, tmp_path / "out", "timm", Console(quiet=True)) == 0
    with torch.no_grad():
        ours = subject.get(ClassLogits).class_logits(as_evaluated(pictures, 16))
    torch.testing.assert_close(timm_on(pictures, tmp_path / "out")[1], ours, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="cannot hold a ResNet"):
        export(run_dir, tmp_path / "hf", "hf", Console(quiet=True))
    assert not (tmp_path / "hf").exists()


def test_what_timms_model_does_not_compute_is_not_written(tmp_path) -> None:
    run_dir, _, _ = make_run(tmp_path, "evit", "prune-tokens", *SMALL, "method.keep_rate=0.5")
    with pytest.raises(ConfigError, match="other numbers than the run"):
        export(run_dir, tmp_path / "out", "timm", Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_clip_goes_out_whole(tmp_path, pictures) -> None:
    from transformers import AutoProcessor, CLIPModel

    words = (
        "encoder=vit_base_patch16_clip_quickgelu_224", "encoder.image_size=16",
        "encoder.patch_size=4", "encoder.dim=48", "encoder.depth=2", "encoder.heads=3",
    )  # fmt: skip
    run_dir, _, subject = make_run(tmp_path, "clip", "align", *words, names=())
    out, console = tmp_path / "out", text_console()
    assert export(run_dir, out, "hf", console) == 0
    assert "CLIPModel.from_pretrained" in text_of(console)
    model, processor = CLIPModel.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)
    texts = ["a dog runs", "  Two CATS\nand a bird ", "red squares " * 40]
    images = [Image.open(file) for file in pictures]
    inputs = processor(
        images=images, text=texts, return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        found = model(**inputs)
        joint = subject.get(DualEncoder)
        image = joint.joint_image_features(as_evaluated(pictures, 16))
        text = joint.text_features(texts)
    torch.testing.assert_close(found.image_embeds, image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.text_embeds, text, atol=1e-5, rtol=1e-5)
    logits = joint.logit_scale * image @ text.T
    torch.testing.assert_close(found.logits_per_image, logits, atol=1e-4, rtol=1e-4)


def test_a_published_state_goes_in_and_out_unchanged(tmp_path) -> None:
    from safetensors.torch import load_file

    from vlx.encoders.config import EncoderConfig
    from vlx.encoders.export import EvaluatedView, export_timm

    published = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    cfg = EncoderConfig(
        name="vit_tiny_patch16_224",
        image_size=32,
        depth=2,
        checkpoint=str(tmp_path / "weights.pth"),
    )
    encoder = EncoderBuilder({"encoder": cfg}, 0).vision()
    export_timm(encoder, cfg, tmp_path / "out", EvaluatedView(1.0))
    written, wanted = load_file(tmp_path / "out" / "model.safetensors"), published.state_dict()
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", ["timm", "hf"])
@pytest.mark.parametrize("squeeze", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_librarys_own_pixels_are_the_evaluations(
    tmp_path, layout: str, squeeze: bool, interpolation: str
) -> None:
    """Of pictures that are resampled: PIL and torchvision round to levels, twice. Resized and then
    cropped, the outermost pixels also see what was cut away, which ours do not."""
    from transformers import AutoImageProcessor

    words = (f"eval.squeeze={str(squeeze).lower()}", f"eval.interpolation={interpolation}")
    run_dir, cfg, _ = make_run(tmp_path, "mae", "pretrain-mim", *SMALL, *words)
    out = tmp_path / "out"
    export(run_dir, out, layout, Console(quiet=True))
    y, x = np.mgrid[0:192, 0:128]
    smooth = np.stack([np.sin(x / 9), np.cos(y / 11), np.sin((x + y) / 13)], -1)
    Image.fromarray(((smooth + 1) * 127).astype(np.uint8)).save(tmp_path / "photo.png")
    photo = Image.open(tmp_path / "photo.png")
    ours = as_evaluated(
        [tmp_path / "photo.png"],
        16,
        crop_ratio=cfg.eval.crop_ratio,
        squeeze=squeeze,
        interpolation=Interpolation[interpolation],
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (cfg.encoder.mean, cfg.encoder.std))
    if layout == "timm":
        model = timm.create_model(f"local-dir:{out}", pretrained=True)
        theirs = create_transform(**resolve_data_config(model=model), is_training=False)(photo)[
            None
        ]
    else:
        processor = AutoImageProcessor.from_pretrained(out)
        theirs = processor(photo, return_tensors="pt")["pixel_values"]
    inside = slice(None) if squeeze else slice(2, -2)
    assert (theirs * std + mean - ours)[..., inside, inside].abs().max() < 2.1 / 255
