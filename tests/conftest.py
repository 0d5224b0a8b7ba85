"""Fixtures shared by all tests. No test needs the network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run `vlx WORDS` in a temporary directory, as a user would, and return what it printed."""

    def run(*words: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, "-m", "vlx", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "COLUMNS": "200"},
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def cifar10() -> str:
    """Folder of CIFAR-10 as Parquet; skips where it is not there."""
    if not (SHARED_DATA / "cifar10").is_dir():
        pytest.skip("../shared/data/cifar10 is not here")
    return str(SHARED_DATA / "cifar10")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", default="", help="slug (or all) whose losses to rewrite")
