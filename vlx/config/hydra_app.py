"""A sweep by Hydra's plugins: the task that their launchers start, here or on another machine.

The task starts the same command line for one job as a process of its own and gives the sweeper
the job's objective. It composes nothing: the job does, with vlx's checks.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from vlx.config.compose import Root
from vlx.config.grid import PLUGIN_KEYS, job_name
from vlx.config.paths import conf_dir
from vlx.core.errors import ConfigError, VlxError, nearest
from vlx.core.files import write_json
from vlx.core.results import read_results

HYDRA_DIR = "hydra"
_PLAN_FILE = "plan.json"
# The optional extras of pyproject.toml.
_PACKAGES = {
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=submitit": "hydra-submitit-launcher",
    "hydra/launcher=ray": "hydra-ray-launcher",
    "hydra/sweeper=optuna": "hydra-optuna-sweeper",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every job of the sweep has in common."""

    command: str
    name: str
    preset: str | None
    fixed: list[str]
    """Keys that stand for words of the command line; a job's own line does not repeat them."""
    static: list[str]
    """The user's keys that do not vary."""
    objective: str | None
    fail_fast: bool


def write_plan(directory: Path, plan: Plan) -> None:
    """Put the plan where every job finds it."""
    (directory / HYDRA_DIR).mkdir()
    write_json(directory / HYDRA_DIR / _PLAN_FILE, asdict(plan))


def read_plan(directory: Path) -> Plan:
    """The plan of a sweep's directory."""
    return Plan(**json.loads((directory / HYDRA_DIR / _PLAN_FILE).read_text(encoding="utf-8")))


def check_plugins(parsed: Sequence[Override]) -> None:
    """Refuse a launcher or sweeper that is not installed; call inside `hydra_conf`."""
    loader = GlobalHydra.instance().config_loader()
    for override in parsed:
        key = override.key_or_group
        if key not in PLUGIN_KEYS:
            continue
        options, name = loader.get_group_options(key), str(override.value())
        if name not in options:
            package = _PACKAGES.get(f"{key}={name.split('_')[0]}")
            remedy = f"pip install {package}" if package else nearest(name, options)
            raise ConfigError(f"no {key} '{name}' here. {remedy}".rstrip())


def sweep(root: Root, directory: Path, words: Sequence[str]) -> int:
    """Hand the words to Hydra's own multirun. Returns 0, or the code that Hydra ended with."""
    _store_plain("schema")
    if root.file == "run":
        _store_plain("method", root.slug)
    place = str(directory.resolve() / HYDRA_DIR).replace("'", "\\'")
    argv = [
        "vlx",
        "--config-name",
        root.file,
        "--multirun",
        *root.fixed,
        f"hydra.sweep.dir='{place}'",
        "hydra.sweep.subdir=job-${hydra.job.num}",
        "hydra.job.name=vlx",
        *words,
    ]
    GlobalHydra.instance().clear()
    own, sys.argv = sys.argv, argv  # hydra.main reads nothing else
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = own
    return 0


def _store_plain(group: str, name: str | None = None) -> None:
    """Replace a typed node by its plain values: launchers pickle the store, and a method's schema
    class is of no module that another process can import."""
    store = ConfigStore.instance()
    repo: Any = store.repo if name is None else store.repo[group]
    node = repo[f"{name or group}.yaml"]
    plain = OmegaConf.to_container(node.node, enum_to_str=True)
    repo[f"{name or group}.yaml"] = replace(node, node=OmegaConf.create(plain))


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")
def main(_: DictConfig) -> float:
    """What a launcher calls for each job."""
    config = HydraConfig.get()
    return run_job(Path(config.sweep.dir).parent, config.job.num, list(config.overrides.task))


def run_job(directory: Path, number: int, words: Sequence[str]) -> float:
    """Run one job as a process and return its objective; NaN when it failed.

    Raises:
        RuntimeError: the job failed and the sweep was told to fail fast.
    """
    plan = read_plan(directory)
    own = [word for word in words if key_of(word) not in plan.fixed]
    run_dir = directory / job_name(number, varying(own, plan))
    command = [sys.executable, "-m", "vlx", plan.command, plan.name, *own]
    command += ["--in-sweep", str(run_dir)]
    if plan.preset is not None:
        command += ["--preset", plan.preset]
    output = directory / HYDRA_DIR / f"console-{number}.txt"
    with output.open("ab") as stream:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, check=False
        ).returncode
    if code != 0 and plan.fail_fast:
        raise RuntimeError(f"job {run_dir.name} ended with code {code}; see {output}")
    return objective(run_dir, plan.objective) if code == 0 else math.nan


def key_of(word: str) -> str:
    """`key` of `key=value`. Hydra writes values in its own way (False for false), keys as given."""
    return word.split("=", 1)[0]


def varying(words: Sequence[str], plan: Plan) -> dict[str, str]:
    """The keys that the sweep varies, with the values of one job."""
    return {key_of(w): w.split("=", 1)[1] for w in words if key_of(w) not in plan.static}


def objective(run_dir: Path, name: str | None) -> float:
    """The metric `name` of the trained weights, or the first; NaN where there is none."""
    try:
        metrics = [m for m in read_results(run_dir).metrics if m.weights != "untrained"]
    except VlxError:
        return math.nan
    return next((m.value for m in metrics if name in (None, m.name)), math.nan)
