"""`manifest.json` of a checkpoint: the sizes and digests of its files, compared by whoever reads.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vlx.core.errors import CheckpointError
from vlx.core.files import parse_json

log = logging.getLogger("vlx")
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.safetensors"
STATE_FILE = "state.json"
WEIGHTS = (STATE_FILE, MODEL_FILE, "ema.safetensors", "swad.safetensors")
"""What a model is read from; a resume reads more."""


def digest(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a manifest has them."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": found}


def manifest_text(folder: Path) -> str:
    """The manifest of the files in a folder."""
    return json.dumps({file.name: digest(file) for file in sorted(folder.iterdir())}, indent=1)


def fault(
    checkpoint: Path, *, digests: bool = True, only: Collection[str] | None = None
) -> str | None:
    """What is wrong with a checkpoint; None where its files are those that were saved.

    digests: compare contents as well as sizes. only: names of the files that will be read; None
    for all. A file that will be read and is not in the manifest is a fault too.
    """
    try:
        manifest = parse_json((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not {MODEL_FILE, STATE_FILE} <= manifest.keys():
            return f"{MANIFEST_FILE} names no {MODEL_FILE} and {STATE_FILE}"
        for name in manifest:
            if name in (".", "..") or "/" in name or "\0" in name:
                return f"{MANIFEST_FILE} names {name!r}, which is no file of the checkpoint"
        for file in sorted(checkpoint.glob("*.safetensors")):
            if file.name not in manifest:
                return f"{MANIFEST_FILE} does not name {file.name}"
        for name, expected in manifest.items():
            if only is not None and name not in only:
                continue
            file = checkpoint / name
            if file.stat().st_size != expected["bytes"]:
                return f"{name} is cut or has grown"
            if digests and digest(file) != expected:
                return f"{name} is not what was saved"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST_FILE} cannot be read"
    return None


def check(checkpoint: Path, *, only: Collection[str] | None = None) -> None:
    """Raise `CheckpointError` for a checkpoint whose files are not those that were saved."""
    reason = fault(checkpoint, only=only)
    if reason:
        raise CheckpointError(f"{checkpoint} is incomplete or damaged: {reason}")


def newest(directory: Path, *, only: Collection[str] | None = None) -> Path | None:
    """The newest checkpoint `step-*` of a directory whose files are those that were saved.

    A line for each that is passed over. None where there is no checkpoint; raises `CheckpointError`
    where there are some and all of them are damaged.
    """
    found = sorted(directory.glob("step-*"), reverse=True)
    reason = None
    for number, checkpoint in enumerate(found):
        damage = fault(checkpoint, only=only)
        if damage is None:
            return checkpoint
        reason = reason or f"{checkpoint.name}: {damage}"
        if number + 1 < len(found):
            log.warning(f"{checkpoint} is damaged and passed over: {damage}")
    if reason is None:
        return None
    raise CheckpointError(
        f"no checkpoint in {directory} can be read ({reason}). Put a copy back; a run begins again "
        "at step 0 where that folder is removed"
    )
