"""Tensors of torch's zip archives, TorchScript's among them, without running what they name.

A pickle names functions and classes to call. Here only those that rebuild tensors are called; for
all else (a script's modules, `argparse.Namespace`, numpy's scalars) a hollow object is made.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip


class Hollow:
    """What a pickle would have made of a class that is not run; `held` is its state."""

    named = ""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.held: Any = None

    def __setstate__(self, state: Any) -> None:
        self.held = state

    # What a pickle may do to an object that it takes for a list, a set or a dictionary.
    def append(self, _: Any) -> None: ...
    def extend(self, _: Any) -> None: ...
    def add(self, _: Any) -> None: ...
    def __setitem__(self, _: Any, __: Any) -> None: ...


def read_archive(file: Path) -> Any:
    """What the archive holds, with `Hollow` where it is no tensor and no plain value.

    Raises `pickle.UnpicklingError`, `ValueError` or `OSError` for a file of another kind.
    """
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("no data.pkl: it is no archive of torch")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("it was written on a big-endian machine")
        return _Unpickler(archive, folder).load()


def tensors_of(held: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of nested mappings and script modules, by its path with dots between."""
    if isinstance(held, Hollow):
        held = held.held
    if isinstance(held, Tensor):
        return {prefix: held}
    if not isinstance(held, dict):
        return {}
    found: dict[str, Tensor] = {}
    for name, part in held.items():
        found |= tensors_of(part, f"{prefix}.{name}" if prefix else str(name))
    return found


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.archive, self.folder = archive, folder
        self.stored: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in _REBUILT:
            return _REBUILT[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, _: value
        return type(name, (Hollow,), {"named": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Tensor:
        """The bytes of one storage as a flat tensor. pid: ("storage", type, key, device, count)."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it stores a {kind} of {dtype}")
        if key not in self.stored:
            data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self.stored[key] = flat
        if len(self.stored[key]) < count:
            raise pickle.UnpicklingError(f"storage {key} is cut short")
        return self.stored[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any):
    return storage.as_strided(size, stride, offset).clone()


_REBUILT: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor": _tensor,
    "_rebuild_parameter": lambda data, *_: data,
}
