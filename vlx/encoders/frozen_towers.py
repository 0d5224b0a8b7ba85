"""Weights that a run never changes: written once beside its checkpoints, which name them.

`RUN/frozen/NAME-DIGEST.safetensors` holds the tensors of one tower by their names inside it. A
checkpoint holds none of them; its `state.json` says of each tower what it is and the digest of its
tensors, and whoever reads the checkpoint checks that the tower is still that one. A language model
of a local directory, which its run cannot do without and which may be large, is not written: the
checkpoint names the directory.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlx.blocks.frozen import Frozen
from vlx.blocks.momentum import MomentumCopy
from vlx.core.errors import CheckpointError, StorageError, VlxError, one_line
from vlx.core.files import explain_write, parse_json, system_error
from vlx.core.manifest import MODEL_FILE, STATE_FILE
from vlx.core.method import Trainable
from vlx.encoders.language_model import LanguageModel, directory_weights

FOLDER = "frozen"
"""In a run's directory; the key in `state.json` too."""
_DIGITS = 16
_INNER = "module."  # where `Frozen` has what it holds
_LEVELS = 4  # RUN is so many folders above a checkpoint at most, itself included: evidence


@dataclass(frozen=True, kw_only=True)
class FrozenTower:
    """What a checkpoint says of a tower."""

    name: str
    """Of the tower in its method: what its tensors' names begin with."""
    sha256: str
    """`digest_of` its tensors."""
    values: int
    """Numbers in them."""
    directory: str | None = None
    """Of the language model that the tower is, and is read from; None: `file` has it."""

    @property
    def file(self) -> str:
        return f"{self.name}-{self.sha256[:_DIGITS]}.safetensors"


def frozen_tensors(method: Trainable) -> dict[str, list[str]]:
    """Names in the state dict that never change, by the tower that they are in.

    A tower is a `Frozen` or one of `Trainable.frozen_parts`. What is trained inside one (inserted
    layers) is left out, and with it the buffers beside it, which may be running statistics.
    """
    names = {
        name
        for name, part in method.named_modules()
        if isinstance(part, Frozen) and not any(isinstance(p, MomentumCopy) for p in part.modules())
    } | set(method.frozen_parts())
    params = dict(method.named_parameters(remove_duplicate=False))
    trained = {name for name, param in params.items() if param.requires_grad}
    beside = {name.rpartition(".")[0] for name in trained}
    fixed = [
        name
        for name in method.state_dict()
        if name not in trained and (name in params or name.rpartition(".")[0] not in beside)
    ]
    outermost = [n for n in sorted(names) if not any(n.startswith(f"{o}.") for o in names)]
    found = {name: [key for key in fixed if key.startswith(f"{name}.")] for name in outermost}
    return {name: keys for name, keys in found.items() if keys}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors; their order and device are alike."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_tower(
    name: str, tensors: Mapping[str, Tensor], directory: str | None = None
) -> FrozenTower:
    """tensors: by their names inside the tower."""
    values = sum(tensor.numel() for tensor in tensors.values())
    return FrozenTower(name=name, sha256=digest_of(tensors), values=values, directory=directory)


def directory_of(part: nn.Module) -> str | None:
    """Of the local language model that a tower is, and nothing else."""
    inner = part.module if isinstance(part, Frozen) else None
    return inner.directory if isinstance(inner, LanguageModel) else None


def write_tower(folder: Path, tower: FrozenTower, tensors: Mapping[str, Tensor]) -> None:
    """Write a tower whole or not at all, where it is not there yet; `StorageError` if it cannot."""
    if tower.directory is not None:
        return
    file = folder / tower.file
    if file.is_file() and _found(file) == tower.sha256:
        return
    tmp = folder / f".tmp-{tower.file}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_apart(tensors), tmp)
        with tmp.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(tmp, file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else system_error(error)
        raise StorageError(explain_write(cause, file)) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, which safetensors asks for: tied weights are written twice."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return found


def remove_unused(run: Path, towers: list[FrozenTower]) -> None:
    """Remove what neither `towers` nor a checkpoint of the run, or of its evidence, names."""
    used = {tower.file for tower in towers if tower.directory is None}
    for state in run.glob(f"**/step-*/{STATE_FILE}"):
        used |= {tower.file for tower in towers_of(state.parent)}
    for file in (run / FOLDER).glob("*"):
        if file.name not in used:
            file.unlink(missing_ok=True)


def towers_of(checkpoint: Path) -> list[FrozenTower]:
    """What a checkpoint refers to; nothing where it holds all of its weights, as older ones do."""
    file = checkpoint / STATE_FILE
    if not file.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = parse_json(file.read_text(encoding="utf-8")).get(FOLDER, [])
        towers = [FrozenTower(**row) for row in rows]
        wrong = [tower for tower in towers if not _is_sound(tower)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from error
    if wrong:
        raise CheckpointError(f"{file}: {wrong[0].name!r} is no name of a frozen tower")
    return towers


def _is_sound(tower: FrozenTower) -> bool:
    """Whether what a file says leads to no other place and, of a directory, to no kind of model."""
    names = re.fullmatch(r"\w+(\.\w+)*", tower.name) and re.fullmatch(r"[0-9a-f]{64}", tower.sha256)
    return bool(names) and (tower.directory is None or Path(tower.directory).is_absolute())


def state_of(towers: list[FrozenTower]) -> dict[str, Any]:
    """What goes into a checkpoint's `state.json`."""
    return {FOLDER: [asdict(tower) for tower in towers]} if towers else {}


def read_model(checkpoint: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint: its own and those of the towers that it refers to.

    Raises `CheckpointError` for a file that cannot be read, and for a tower that is gone or is
    another by now.
    """
    file = checkpoint / MODEL_FILE
    try:
        model = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {one_line(error)}") from error
    for tower in towers_of(checkpoint):
        found = _read_tower(checkpoint, tower)
        model |= {f"{tower.name}.{name}": tensor for name, tensor in found.items()}
    return model


def _read_tower(checkpoint: Path, tower: FrozenTower) -> dict[str, Tensor]:
    where, tensors = _stored(checkpoint, tower)
    found = digest_of(tensors)
    if found != tower.sha256:
        raise CheckpointError(
            f"frozen tower {tower.name}: the run had sha256 {tower.sha256[:_DIGITS]}…, "
            f"{where} now has {found[:_DIGITS]}…: put back what the run had, or train again"
        )
    return tensors


def _stored(checkpoint: Path, tower: FrozenTower) -> tuple[str, dict[str, Tensor]]:
    """Where a tower's tensors are now, and what is there."""
    if tower.directory is not None:
        try:
            found = directory_weights(tower.directory)
        except VlxError as error:
            raise CheckpointError(
                f"frozen tower {tower.name} of {checkpoint} is that of a directory: {error}"
            ) from error
        return tower.directory, {f"{_INNER}{name}": tensor for name, tensor in found.items()}
    places = [checkpoint.absolute(), *checkpoint.absolute().parents][:_LEVELS]
    files = [place / FOLDER / tower.file for place in places]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(
            f"frozen tower {tower.name} of {checkpoint} is gone: its run had {tower.file} in "
            f"{FOLDER}/, beside checkpoints/. Put it back, or copy the whole run"
        )
    try:
        return str(file), load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"frozen tower {file} cannot be read: {one_line(error)}") from error


def _found(file: Path) -> str | None:
    """The digest of a file's tensors; None where it is damaged."""
    try:
        return digest_of(load_file(file))
    except (OSError, SafetensorError):
        return None
