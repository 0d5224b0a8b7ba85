"""What is trained beside a frozen model: printed, saved alone, loaded onto the same model only."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from vlx.core.errors import CheckpointError
from vlx.core.files import write_atomic
from vlx.core.method import Trainable
from vlx.core.released import Released
from vlx.encoders.checkpoint import ADAPTER_FILE, DIGEST_KEY, read_safetensors, read_weights
from vlx.encoders.frozen_towers import digest_of
from vlx.engine.checkpoint import weights_checksum

log = logging.getLogger("vlx")
_SHOWN = 4


def describe(method: Trainable) -> str:
    """`trainable 7.16 k of 53.3 k: inserted encoder.vit.blocks; tuned encoder.vit.head`."""
    params = dict(method.named_parameters())
    trained = {name: param for name, param in params.items() if param.requires_grad}
    inserted = tuple(method.inserted())
    groups = {"inserted": [], "tuned": []}
    for name in trained:
        kind = "inserted" if name.startswith(inserted) and inserted else "tuned"
        group = ".".join(name.split(".")[:3][: max(1, name.count("."))])
        if group not in groups[kind]:
            groups[kind].append(group)
    parts = []
    for kind, names in groups.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{kind} {', '.join(names[:_SHOWN])}{more}")
    counts = (sum(p.numel() for p in group.values()) for group in (trained, params))
    return "trainable {} of {}: {}".format(*map(_short, counts), "; ".join(parts))


def _short(count: int) -> str:
    """Three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def split_state(
    method: nn.Module, state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict as (what is trained, the frozen base)."""
    trained = {name for name, param in method.named_parameters() if param.requires_grad}
    return (
        {name: value for name, value in state.items() if name in trained},
        {name: value for name, value in state.items() if name not in trained},
    )


def save_adapter(run_dir: Path, method: nn.Module, state: dict[str, Tensor], *, slug: str) -> Path:
    """Write the trained tensors of a full host-side state dict with the digest of the others."""
    adapter, base = split_state(method, state)
    adapter = {name: value.contiguous() for name, value in adapter.items()}
    meta = {
        "base": weights_checksum(base),
        "method": slug,
        "format": "1",
        DIGEST_KEY: digest_of(adapter),
    }
    file = run_dir / ADAPTER_FILE
    write_atomic(file, save(adapter, metadata=meta))
    return file


def load_adapter(path: str, method: nn.Module, *, slug: str) -> None:
    """Put a saved adapter onto a method whose frozen weights are those that it was trained beside.

    path: the file, or the run directory that holds it. Raises `CheckpointError`, with nothing
    loaded, for another base, another method, tensors that do not fit or are not those saved.
    """
    file = Path(path).expanduser()
    file = file / ADAPTER_FILE if file.is_dir() else file
    if not file.is_file():
        raise CheckpointError(
            f"no adapter at {file}: a run with a frozen base writes {ADAPTER_FILE}"
        )
    if isinstance(method, Released) and file.suffix != ".safetensors":
        _load_released(file, method)
        return
    try:
        saved, meta = read_safetensors(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not an adapter: {error}") from error
    own, base = split_state(method, {n: v.cpu() for n, v in method.state_dict().items()})
    if meta.get("method") != slug:
        raise CheckpointError(f"{file} is an adapter of {meta.get('method')}, not of {slug}")
    _check_fit(file, own, saved)
    found = weights_checksum(base)
    if meta.get("base") != found:
        raise CheckpointError(
            f"{file} was trained beside the weights {meta.get('base')}; this model's frozen "
            f"weights are {found}: start from the same encoder.checkpoint or pretrained weights"
        )
    method.load_state_dict(saved, strict=False)


def _check_fit(file: Path, own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    differing = [
        name
        for name in sorted(own.keys() | saved.keys())
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    ]
    if differing:
        shown = ", ".join(differing[:3])
        raise CheckpointError(f"{file} does not fit, nothing was loaded: {len(differing)}: {shown}")


def _load_released(file: Path, method: nn.Module) -> None:
    """What the authors of a method published; beside which base they do not say."""
    assert isinstance(method, Released)
    saved = method.own_names(read_weights(file))
    own, _ = split_state(method, method.state_dict())
    _check_fit(file, own, saved)
    method.load_state_dict(saved, strict=False)
    log.info(f"{file}: released weights, which do not say beside which frozen ones: set those")
