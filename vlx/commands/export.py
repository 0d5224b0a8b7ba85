"""`vlx export RUN OUT`: a run's encoder for other libraries."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path

from rich.console import Console

from vlx.core.errors import ConfigError, VlxError
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.export import export_hf, export_timm
from vlx.encoders.timm_vit import TimmVit
from vlx.engine.load import read_config, run_config
from vlx.engine.rundir import read_record


class Layout(Enum):
    """Whose files to write."""

    timm = "timm"
    hf = "hf"


def export(run_dir: Path, out: Path, layout: str, console: Console) -> int:
    """Write the encoder of a run's newest checkpoint (averaged where the run kept an average)."""
    if layout not in Layout.__members__:
        raise VlxError(f"--format {layout} must be one of {', '.join(Layout.__members__)}")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise VlxError(f"{out} exists and is not an empty folder: choose another")
    read_record(run_dir)
    configured = run_config(read_config(run_dir)).encoder
    cfg = replace(configured, checkpoint=str(run_dir), pretrained=False)
    encoder = EncoderBuilder({"encoder": cfg}, 0).vision()
    if not isinstance(encoder, TimmVit):
        raise ConfigError(f"{cfg.name} is no ViT that timm or transformers know")
    if Layout[layout] is Layout.hf:
        files = export_hf(encoder, out)
        how = f'ViTModel.from_pretrained("{out}", add_pooling_layer=False)'
    else:
        files = export_timm(encoder, cfg, out)
        how = f'timm.create_model("local-dir:{out}", pretrained=True)'
    for file in files:
        console.print(f"wrote {file}", highlight=False, soft_wrap=True)
    console.print(f"load it with {how}", highlight=False, soft_wrap=True, markup=False)
    return 0
