"""`make bench`: every benchmark in a process of its own; rewrites benchmarks/RESULTS.md.

`python benchmarks/run.py data loop` runs some of them and prints without writing.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("start", "data", "loop", "mae_step", "augment", "tokens", "retrieval", "knn")


def run_one(name: str) -> list[str]:
    """Markdown rows of one benchmark, from a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", name], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    if done.returncode:
        return [f"| {name} failed with exit code {done.returncode} | | | | |"]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.measure import HEADER

    if sys.argv[1:2] == ["--child"]:
        rows = importlib.import_module(f"benchmarks.{sys.argv[2]}").main()
        print(json.dumps([row.markdown() for row in rows]))
        return
    lines = [line for name in sys.argv[1:] or NAMES for line in run_one(name)]
    table = "\n".join([HEADER, *lines])
    print(table)
    if sys.argv[1:]:
        return
    from vlx.engine.environment import git_commit, hardware, versions

    machine = hardware("cpu", 1)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = (
        "# Benchmarks\n\n"
        f"`make bench` on {datetime.now(UTC):%Y-%m-%d}, commit {git_commit()[:12]}: "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB. {packages}.\n"
        "Medians of alternating runs; ratios compare the two sides of one run.\n\n"
        f"{table}\n"
    )
    (ROOT / "benchmarks" / "RESULTS.md").write_text(text)


if __name__ == "__main__":
    main()
