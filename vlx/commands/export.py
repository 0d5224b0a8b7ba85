"""`vlx export RUN OUT`: a run's encoder, classifier or CLIP for other libraries."""

from __future__ import annotations

import shutil
from dataclasses import replace
from enum import Enum
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from vlx.core.capability import ClassLogits, DualEncoder, ImageFeatures
from vlx.core.errors import ConfigError, VlxError
from vlx.data.training_data import read_training_data
from vlx.encoders.adapters import merge_adapters
from vlx.encoders.base import EncoderFeatures
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.export import (
    EvaluatedView,
    check_alike,
    export_hf,
    export_timm,
    hf_output,
    probe,
    timm_output,
)
from vlx.encoders.export_clip import ClipTowers, clip_outputs, export_clip
from vlx.encoders.timm_vit import TimmVit
from vlx.engine.config import RunConfig
from vlx.engine.evaluate_encoder import build_subject
from vlx.engine.load import read_config, run_config
from vlx.engine.rundir import read_record
from vlx.evals.base import Subject

_TEXTS = ["a photo of a dog", "two red squares beside a circle"]


class Layout(Enum):
    """Whose files to write."""

    timm = "timm"
    hf = "hf"


def export(run_dir: Path, out: Path, layout: str, console: Console) -> int:
    """Write what a run's newest checkpoint holds (averaged where the run kept an average).

    A classifier goes with its head and class names, a CLIP whole (`--format hf`), anything else as
    an encoder of features. The files are read again and must give the run's own numbers.
    """
    if layout not in Layout.__members__:
        raise VlxError(f"--format {layout} must be one of {', '.join(Layout.__members__)}")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise VlxError(f"{out} exists and is not an empty folder: choose another")
    read_record(run_dir)
    cfg = run_config(read_config(run_dir))
    cfg.encoder = replace(cfg.encoder, checkpoint=str(run_dir), pretrained=False)
    try:
        files, how = _write(cfg, run_dir, out, Layout[layout])
    except VlxError:
        shutil.rmtree(out, ignore_errors=True)  # it was empty, or not there
        raise
    for file in files:
        console.print(f"wrote {file}", highlight=False, soft_wrap=True)
    console.print(f"load it with {how}", highlight=False, soft_wrap=True)
    return 0


def _write(cfg: RunConfig, run_dir: Path, out: Path, layout: Layout) -> tuple[list[Path], str]:
    """The files and how to load them."""
    subject, names = _whole(cfg, run_dir)
    view = EvaluatedView(cfg.eval.crop_ratio, cfg.eval.squeeze, cfg.eval.interpolation.name)
    if layout is Layout.hf and subject is not None and subject.has(DualEncoder):
        files = _write_clip(subject.get(DualEncoder), out, view)
        return files, f'CLIPModel.from_pretrained("{out}"), AutoProcessor.from_pretrained("{out}")'
    encoder = _encoder_of(subject)
    classifies = encoder is not None and encoder.backbone.num_classes == len(names) > 0
    if subject is None or encoder is None or not classifies:
        encoder, names = EncoderBuilder({"encoder": cfg.encoder}, 0).vision(), ()
        features = EncoderFeatures(encoder)
        if subject is not None and subject.has(ImageFeatures):
            features = subject.get(ImageFeatures)
        measured = features.image_features
    else:
        measured = subject.get(ClassLogits).class_logits
    images = probe(encoder)
    expected = _run(measured, encoder, images)
    merge_adapters(encoder)
    kind = type(encoder.backbone).__name__
    if layout is Layout.timm:
        files = export_timm(encoder, cfg.encoder, out, view, names)
        written, how = timm_output(out), f'timm.create_model("local-dir:{out}", pretrained=True)'
    elif isinstance(encoder, TimmVit):
        files = export_hf(encoder, out, view, names)
        written = hf_output(out, bool(names))
        how = f'ViTModel.from_pretrained("{out}", add_pooling_layer=False)'
        how = f'ViTForImageClassification.from_pretrained("{out}")' if names else how
    else:
        raise ConfigError(f"transformers' ViT cannot hold a {kind}. Use --format timm")
    with torch.no_grad():
        check_alike(written(encoder.normalise(images)), expected, kind)
    return files, how


def _whole(cfg: RunConfig, run_dir: Path) -> tuple[Subject | None, tuple[str, ...]]:
    """The run's whole method and the names of its classes; None where its encoder is enough."""
    data = read_training_data(run_dir)
    names = data.class_names if data else ()
    if not names and cfg.text is None:
        return None, ()
    whole = replace(cfg, eval=replace(cfg.eval, at_end=["classification"]))
    subject, method = build_subject(whole, len(names), names)
    method.eval()
    return subject, names


def _encoder_of(subject: Subject | None):
    """The encoder of a method that classifies with it."""
    if subject is None or not (subject.has(ClassLogits) and subject.has(ImageFeatures)):
        return None
    features = subject.get(ImageFeatures)
    return features.encoder if isinstance(features, EncoderFeatures) else None


def _run(measured, part: nn.Module, images: Tensor) -> Tensor:
    part.eval()
    with torch.no_grad():
        return measured(images)


def _write_clip(joint: DualEncoder, out: Path, view: EvaluatedView) -> list[Path]:
    towers = getattr(joint, "towers", None)
    if not isinstance(towers, ClipTowers):
        raise ConfigError(
            "transformers' CLIPModel holds CLIP's two towers, which this method's are not"
        )
    files = export_clip(towers, joint.logit_scale, out, view)
    images = probe(towers.image)
    pixels = towers.image.normalise(images)
    theirs = clip_outputs(out, _TEXTS, pixels)
    with torch.no_grad():
        check_alike(theirs[0], joint.joint_image_features(images), "the image tower")
        check_alike(theirs[1], joint.text_features(_TEXTS), "the text tower")
    return files
