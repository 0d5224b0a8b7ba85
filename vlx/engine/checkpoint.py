"""Checkpoints that a kill at any instant cannot damage.

A checkpoint is a folder `checkpoints/step-00000123/`: safetensors for every tensor, JSON for the
rest, and `manifest.json` with sizes and digests, written last. It is made under a temporary name,
synced to disk and renamed; older ones are removed only after the new one is in place. Towers that
never change lie beside the checkpoints, once a run (`encoders.frozen_towers`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlx.core.errors import CheckpointError
from vlx.core.files import explain_write, system_error
from vlx.core.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    STATE_FILE,
    check,
    fault,
    manifest_text,
    newest,
)
from vlx.encoders.frozen_towers import (
    FOLDER,
    FrozenTower,
    read_model,
    state_of,
    towers_of,
)

FORMAT = 2
_READ = (1, 2)  # 1 had no frozen towers beside it
_TMP = ".tmp-"
_GROUP_STEP = "group_step"


@dataclass
class Snapshot:
    """Everything a checkpoint holds, on the host, as full tensors."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """`<parameter name>/<state key>` to tensor."""
    ema: dict[str, Tensor]
    state: dict[str, Any]
    """Plain JSON: step, config hash, slug, skipped steps, scaler, best metric ..."""
    swad: dict[str, Tensor] = field(default_factory=dict)
    """What a run with `train.swad` goes on from; the average itself is `ema`."""
    towers: list[FrozenTower] = field(default_factory=list)
    """Whose tensors are in `model` after `load`, and are not for `save`."""


def save(directory: Path, snapshot: Snapshot) -> Path:
    """Write `directory/step-N` atomically and return it; `CheckpointError` when it cannot."""
    final = directory / f"step-{snapshot.step:08d}"
    tmp = directory / f"{_TMP}{final.name}-{os.getpid()}"
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        _write(tmp, snapshot)
        _replace(tmp, final)
    except OSError as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise CheckpointError(explain_write(error, final)) from error
    return final


def _write(tmp: Path, snapshot: Snapshot) -> None:
    for name, tensors in _parts(snapshot).items():
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, tmp / name)
        except SafetensorError as error:
            raise system_error(error) from error
    (tmp / STATE_FILE).write_text(
        json.dumps({"format": FORMAT, **snapshot.state, **state_of(snapshot.towers)}, indent=1)
    )
    manifest = manifest_text(tmp)
    for file in tmp.iterdir():
        _sync(file)
    (tmp / MANIFEST_FILE).write_text(manifest)
    _sync(tmp / MANIFEST_FILE)
    _sync(tmp)


def _replace(tmp: Path, final: Path) -> None:
    """Rename `tmp` to `final`; what stood there is removed only when the new one is in place."""
    old = final.with_name(f"{_TMP}old-{final.name}-{os.getpid()}")
    if final.exists():
        os.rename(final, old)
    os.rename(tmp, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _parts(snapshot: Snapshot) -> dict[str, dict[str, Tensor]]:
    parts = {MODEL_FILE: snapshot.model, "optimizer.safetensors": snapshot.optimizer}
    averages = {"ema.safetensors": snapshot.ema, "swad.safetensors": snapshot.swad}
    return parts | {name: tensors for name, tensors in averages.items() if tensors}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(checkpoint: Path, *, digests: bool = False) -> bool:
    """Whether every file of the manifest is there with its size (and its digest)."""
    return fault(checkpoint, digests=digests) is None


def complete(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [p for p in sorted(directory.glob("step-*")) if is_complete(p)]


def latest(directory: Path) -> Path | None:
    """The newest checkpoint whose contents match their digests; a line for each passed over.

    Raises `CheckpointError` where there are checkpoints and all of them are damaged.
    """
    return newest(directory)


def load(checkpoint: Path) -> Snapshot:
    """Read a checkpoint; a damaged or foreign one raises `CheckpointError`."""
    check(checkpoint)
    state = json.loads((checkpoint / STATE_FILE).read_text())
    if state.pop("format", None) not in _READ:
        known = " and ".join(map(str, _READ))
        raise CheckpointError(
            f"{checkpoint} has a format other than {known}; this vlx cannot read it"
        )
    state.pop(FOLDER, None)  # as `towers`
    ema, swad = (checkpoint / f"{name}.safetensors" for name in ("ema", "swad"))
    return Snapshot(
        step=state["step"],
        model=read_model(checkpoint),
        optimizer=load_file(checkpoint / "optimizer.safetensors"),
        ema=load_file(ema) if ema.exists() else {},
        state=state,
        swad=load_file(swad) if swad.exists() else {},
        towers=towers_of(checkpoint),
    )


def check_keys(own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Raise `CheckpointError` listing missing, unexpected and reshaped tensors, if any."""
    reshaped = [k for k in own.keys() & saved.keys() if own[k].shape != saved[k].shape]
    problems = {
        "missing": sorted(own.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - own.keys()),
        "reshaped": sorted(reshaped),
    }
    report = [f"{len(k)} {what} ({', '.join(k[:3])})" for what, k in problems.items() if k]
    if report:
        raise CheckpointError(f"the checkpoint does not fit the method: {'; '.join(report)}")


def prune(directory: Path, keep_last: int, best: str | None = None) -> None:
    """Remove all but the newest checkpoints and the best one, and what killed saves left."""
    kept = {p.name for p in complete(directory)[-keep_last:]} | ({best} if best else set())
    for path in directory.glob("step-*"):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
    sweep(directory)


def sweep(directory: Path) -> None:
    """Remove what killed saves left; only the holder of the run's lock may."""
    for path in directory.glob(f"{_TMP}*"):
        shutil.rmtree(path, ignore_errors=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """Optimizer state by `<parameter name>/<key>`, full tensors on the host.

    Under FSDP this gathers shards: every process must call it; `keep` False keeps nothing.
    """
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["names"], group["params"]):
            state = dict(optimizer.state.get(param, {}))
            if "step" in group:  # timm's LAMB counts in the group, not beside the moments
                state[_GROUP_STEP] = group["step"]
            for key, value in state.items():
                if value is not None:
                    tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return gather(tensors, keep=keep)


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave, onto the parameters' devices and shards."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    saved: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        saved.setdefault(name, {})[key] = value
    for group in optimizer.param_groups:
        for name, param in zip(group["names"], group["params"]):
            for key, value in saved.get(name, {}).items():
                if key == _GROUP_STEP:
                    group["step"] = value
                    continue
                if value.shape == param.shape and key != "step":
                    value = value.to(param.device)
                    if isinstance(param, DTensor):
                        value = distribute_tensor(value, param.device_mesh, param.placements)
                elif param.is_cuda and group.get("fused"):
                    value = value.to(param.device)
                optimizer.state[param][key] = value


def gather(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Full copies on the host. Sharded tensors are gathered by all processes, kept by some."""
    from torch.distributed.tensor import DTensor

    if keep:
        return {name: full(tensor) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        if isinstance(tensor, DTensor):
            tensor.full_tensor()
    return {}


def full(tensor: Tensor) -> Tensor:
    """A detached copy on the host, gathered when sharded."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True)


def weights_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of full tensors; 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
