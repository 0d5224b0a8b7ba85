"""`pip install .` carries everything: conf/ and experiments/ travel in the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_an_installed_wheel_composes_every_preset_of_mae(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("vlx-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("conf", "experiments"):
        for file in (ROOT / folder).rglob("*.yaml"):
            assert f"vlx/{file.relative_to(ROOT)}" in names
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "-t", str(site), wheel], check=True)
    code = (
        "import vlx; from vlx.config.compose import compose; print(vlx.__file__);"
        "[compose('mae', 'pretrain-mim', p) for p in ('smoke', 'tiny', 'paper')]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(site))
