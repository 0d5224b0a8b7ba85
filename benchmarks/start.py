"""How long vlx takes to answer, and to reach the first training step."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Row

ROUNDS = 3


def seconds(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "vlx", *words], capture_output=True, check=True)
    return time.perf_counter() - start


def to_first_step() -> float:
    """From the command to the first record of metrics.jsonl (W&B offline, as by default)."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        subprocess.run(
            [sys.executable, "-m", "vlx", "pretrain", "mae", "train.epochs=null", "train.steps=1",
             "train.log_every=1", f"runs_dir={folder}", "name=run"],
            capture_output=True, check=True,
        )  # fmt: skip
        line = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[0]
        return json.loads(line)["time"] - start


def main() -> list[Row]:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    rows = [
        Row(f"`vlx {' '.join(words)}`", median([seconds(*words) for _ in range(ROUNDS)]),
            0.5, "s", "the budget", "< 1")
        for words in (["--help"], ["list"])
    ]  # fmt: skip
    first = median([to_first_step() for _ in range(ROUNDS)])
    return [
        *rows,
        Row("`vlx pretrain mae` to its first step", first, 8.0, "s", "the budget", "< 1"),
    ]
