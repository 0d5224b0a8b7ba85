"""`vlx doctor`: what works here, and what to type to make the rest work."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlx.config.paths import conf_dir
from vlx.core.errors import EXIT_OK, EXIT_USER_ERROR, VlxError
from vlx.data.config import DataConfig
from vlx.data.open import open_source
from vlx.track.config import TrackConfig


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    about: str
    works: bool
    detail: str
    remedy: str = ""
    """What to type; empty where nothing is wrong."""
    essential: bool = False
    """Without it no run starts at all."""


def doctor(console: Console, runs_dir: Path = Path("runs")) -> int:
    """Print every finding. Returns 0 unless something essential is missing."""
    findings = examine(runs_dir)
    table = Table("", "", "here", "to mend it, type")
    for finding in findings:
        mark = Text("ok", style="green") if finding.works else Text("--", style="yellow")
        if not finding.works and finding.essential:
            mark = Text("no", style="bold red")
        table.add_row(mark, finding.about, finding.detail, finding.remedy)
    console.print(table)
    ill = any(finding.essential and not finding.works for finding in findings)
    return EXIT_USER_ERROR if ill else EXIT_OK


def examine(runs_dir: Path) -> list[Finding]:
    """All findings; one that cannot be made says why instead of ending the others."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("torch", _torch),
        ("device", _device),
        ("precision", _precision),
        ("processors", _processors),
        ("decoding", _decoding),
        ("digits", _digits),
        ("CIFAR-10", _cifar10),
        ("W&B", _wandb),
        ("runs", lambda: _runs(runs_dir)),
        ("torch.compile", _compiler),
        ("several processes", _distributed),
    ]
    findings = []
    for about, check in checks:
        try:
            findings.append(check())
        except Exception as error:  # whatever is broken here is what we are asked to name
            reason = f"{type(error).__name__}: {error}"
            findings.append(Finding(about, False, reason.splitlines()[0]))
    return findings


def _torch() -> Finding:
    python = f"Python {platform.python_version()}"
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return Finding("torch", False, f"{python}; {error}", "pip install torch", essential=True)
    return Finding("torch", True, f"{torch.__version__}, {python}", essential=True)


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("device", True, ", ".join(names))
    if shutil.which("nvidia-smi"):
        built = torch.version.cuda or "no CUDA"
        return Finding(
            "device",
            False,
            f"CPU; there is a GPU driver, but this torch ({built}) sees no GPU",
            "pip install torch --index-url https://download.pytorch.org/whl/cu130",
        )
    return Finding("device", True, "CPU; no GPU here")


def _precision() -> Finding:
    import torch

    if torch.cuda.is_available():
        found = ["fp32", "fp16", *(["bf16"] if torch.cuda.is_bf16_supported() else [])]
        return Finding("precision", True, ", ".join(found))
    return Finding("precision", True, "fp32, bf16 (slow on most CPUs); fp16 needs a GPU")


def _processors() -> Finding:
    import torch

    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    detail = f"{cores} cores for us of {os.cpu_count()}, {threads} threads"
    if threads > cores:
        return Finding("processors", False, detail, f"export OMP_NUM_THREADS={cores}")
    return Finding("processors", True, detail)


def _decoding() -> Finding:
    from PIL import __version__, features

    turbo = features.check_feature("libjpeg_turbo")
    missing = [kind for kind in ("jpg", "webp") if not features.check(kind)]
    detail = f"Pillow {__version__}, libjpeg{'-turbo' if turbo else ''}"
    if missing:
        return Finding("decoding", False, f"{detail}; without {missing}", "pip install -U pillow")
    return Finding("decoding", True, detail)


def _digits() -> Finding:
    try:
        info = open_source(DataConfig(source="digits"), "train").info
    except VlxError as error:
        return Finding("digits", False, str(error), "pip install scikit-learn", essential=True)
    return Finding("digits", True, f"{info.num_samples} images, embedded", essential=True)


def _cifar10() -> Finding:
    values = yaml.safe_load((conf_dir() / "data" / "cifar10.yaml").read_text(encoding="utf-8"))
    folder = Path(values["path"]).expanduser()
    if folder.is_dir():
        return Finding("CIFAR-10", True, str(folder))
    remedy = "data=cifar10 data.path=FOLDER with train.parquet and test.parquet"
    return Finding("CIFAR-10", False, f"no {folder} from here", remedy)


def _wandb() -> Finding:
    try:
        installed = version("wandb")
    except PackageNotFoundError:
        return Finding("W&B", False, "not installed", "pip install wandb, or run with track=none")
    from vlx.track.wandb import is_logged_in, resolve_mode

    mode = resolve_mode(TrackConfig())
    detail = f"wandb {installed}, {mode}"
    if is_logged_in():
        return Finding("W&B", True, f"{detail}, logged in")
    return Finding("W&B", True, f"{detail}, not logged in", "wandb login (to send runs)")


def _runs(runs_dir: Path) -> Finding:
    place = runs_dir.resolve()
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 2**30
    detail = f"{place}, {free:.0f} GiB free"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding("runs", False, f"cannot write in {place}", "runs_dir=DIR", essential=True)
    if free < 1:
        return Finding("runs", False, detail, "runs_dir=DIR on another disk")
    return Finding("runs", True, detail, essential=True)


def _compiler() -> Finding:
    named = os.environ.get("CXX")
    found = next((c for c in (named, "g++", "clang++") if c and shutil.which(c)), None)
    if found is None:
        return Finding("torch.compile", False, "no C++ compiler", "apt-get install g++")
    return Finding("torch.compile", True, f"with {shutil.which(found)}")


def _distributed() -> Finding:
    import torch.distributed as dist

    if not dist.is_available():
        return Finding("several processes", False, "torch is built without", "pip install torch")
    backends = [name for name in ("gloo", "nccl") if dist.is_backend_available(name)]
    return Finding("several processes", bool(backends), ", ".join(backends) or "no backend")
