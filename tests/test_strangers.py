"""What strangers hand over (run directories, presets, names) is read, and never acts."""

from __future__ import annotations

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.conftest import Cli
from vlx.commands.multirun import make_sweep_dir
from vlx.commands.sweep_file import Job, read_jobs, write_jobs
from vlx.config.compose import compose, method_root, to_yaml
from vlx.config.grid import expand
from vlx.core.errors import VlxError
from vlx.core.names import check_folder_name
from vlx.engine.config import RunConfig
from vlx.engine.load import from_dict, read_config
from vlx.engine.rundir import make_run_dir

_SHORT = ("track=none", "train.batch_size=4", "train.steps=1", "eval.at_end=[knn]")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A program that leaves the file `ran` and writes a shard."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(8):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), (number * 30, 0, 0)).save(picture, "PNG")
            for name, data in (("png", picture.getvalue()), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    script = tmp_path / "make"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\ncat {tmp_path}/x.tar\n")
    script.chmod(0o755)
    return f"pipe:{script}"


def test_a_command_runs_where_it_is_typed_alone(cli: Cli, command: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = f'data.path="{command}"'
    line = ("pretrain", "mae", "data=webdataset", *_SHORT)
    cli(*line, path, "--dry-run")
    cli(*line, path, "--cfg", "job")
    preset = tmp_path / "stranger.yaml"
    preset.write_text(yaml.safe_dump({"data": {"source": "webdataset", "path": command}}))
    done = cli("pretrain", "mae", "--preset", str(preset), *_SHORT, check=False)
    assert done.returncode == 2
    assert "is run only where it is typed" in done.stderr
    assert not (tmp_path / "runs").exists()
    assert not ran.exists()

    cli(*line, path, "name=mine", "data.test_on_train=true")  # of one shard both splits
    assert ran.exists()
    ran.unlink()
    again = ("encoder.checkpoint=runs/mine", "name=again", "data.test_on_train=true")
    cli("eval", "knn", *again)  # its output was kept
    (tmp_path / "cache").rename(tmp_path / "gone")
    for words in (
        ("eval", "knn", "encoder.checkpoint=runs/mine"),
        ("rerun", "runs/mine"),
        ("data", "preview", "mae", "--preset", str(preset)),
    ):
        done = cli(*words, check=False)
        assert done.returncode == 2, words
        assert "is run only where it is typed" in done.stderr
    assert not ran.exists()


_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in pairwise("abcdefghi")
)
_HOSTILE = {
    "hydra: {callbacks: {x: {_target_: os.system}}}": "unknown key 'hydra'",
    "_target_: os.system": "unknown key '_target_'",
    "optim: {_target_: os.system}": "_target_",
    "method: {_target_: os.system}": "_target_",
    "track: {project: '${oc.env:WANDB_API_KEY}'}": "nothing is looked up",
    "data: {path: 'x${hydra:runtime.cwd}'}": "nothing is looked up",
    "defaults: [{override hydra/launcher: submitit_local}]": "is not read",
    "defaults: [../../x]": "is not read",
    "defaults: [{override /data: ../../x}]": "is not read",
    "name: !!python/object/apply:os.system [true]": "could not determine a constructor",
    "name: &a [*a]": "contains itself",
    "seed: 1\nseed: 2": "twice",
    "name: " + "[" * 3000: "cannot be read|nested",
    "name: " + "[" * 60 + "]" * 60: "nested",
    "seed: " + "9" * 5000: "cannot be read",
    "# " + "x" * 2**20: "larger than",
    _BOMB: "values, its anchors written out",
}


@pytest.mark.parametrize("text", _HOSTILE, ids=lambda text: text[:24])
def test_a_preset_holds_keys_of_the_schema_and_plain_values(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(VlxError, match=_HOSTILE[text]):
        compose("mae", "pretrain-mim", str(tmp_path / "p.yaml"))


@pytest.mark.parametrize("text", _HOSTILE, ids=lambda text: text[:24])
def test_a_run_s_configuration_holds_them_too(text: str, tmp_path: Path) -> None:
    config = compose("mae", "pretrain-mim", "smoke")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path) == config
    key = text.split(":")[0]
    rest = {k: v for k, v in config.items() if k != key or text.count(key + ":") > 1}
    (tmp_path / "config.yaml").write_text(to_yaml(rest) + text)
    expected = "unknown key|" if key == "defaults" else ""
    with pytest.raises(VlxError, match=expected + _HOSTILE[text]):
        read_config(tmp_path)


def test_an_anchor_is_read_where_it_is_small(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("train: {log_every: &n 7}\nseed: *n\noptim: {lr: 1e-3}\n")
    config = compose("mae", "pretrain-mim", str(tmp_path / "p.yaml"))
    assert (config["seed"], config["train"]["log_every"], config["optim"]["lr"]) == (7, 7, 1e-3)


def test_a_typed_word_looks_nothing_up() -> None:
    with pytest.raises(VlxError, match="nothing is looked up"):
        compose("mae", "pretrain-mim", None, ["track.project=${oc.env:HOME}"])


_ODD = (
    "1e3",
    "007",
    "1_000",
    "yes",
    "NULL",
    "None",
    "true",
    "0x1F",
    "2024-01-01",
    "1:30",
    "nan",
    "~",
)


@pytest.mark.parametrize("text", [*_ODD, "a=b", "x y", "é", "off", "1.0"])
def test_texts_stay_the_characters_that_were_typed(text: str, tmp_path: Path) -> None:
    words = [f"{key}={text}" for key in ("name", "data.path", "track.project", "train.keep_best")]
    config = compose("coop", "finetune", "smoke", [*words, f"context_init={text}"])
    found = [config["name"], config["data"]["path"], config["track"]["project"]]
    found += [config["train"]["keep_best"], config["method"]["context_init"]]
    assert found == [text] * 5
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path)["name"] == text


@pytest.mark.parametrize(
    "text", ["~/shards/{split}-*.tar", "~/{train,test}-{0..3}.tar", "~/a (1)", "~/it's", "a\\b (c)"]
)
def test_brackets_that_hydra_cannot_read_are_a_texts_own(text: str) -> None:
    """The README's line for shards is the first."""
    assert compose("mae", "pretrain-mim", None, [f"data.path={text}"])["data"]["path"] == text


def test_brackets_that_begin_a_value_are_hydras() -> None:
    with pytest.raises(VlxError, match="cannot read"):
        compose("mae", "pretrain-mim", None, ["track.tags=[a,(b"])


def test_texts_of_a_preset_stay_the_characters_that_are_written(tmp_path: Path) -> None:
    for text in _ODD[:-1]:
        (tmp_path / "p.yaml").write_text(f"name: {text}\ntrack: {{tags: [{text}], entity: null}}\n")
        config = compose("mae", "pretrain-mim", str(tmp_path / "p.yaml"))
        assert (config["name"], config["track"]["tags"]) == (text, [text])
        assert config["track"]["entity"] is None


def test_null_unsets_a_text_and_lists_and_sweeps_keep_theirs() -> None:
    config = compose("mae", "pretrain-mim", None, ["name=null", "track.tags=[1e3,yes,a]"])
    assert config["name"] is None
    assert config["track"]["tags"] == ["1e3", "yes", "a"]
    cells = expand(method_root("mae", "pretrain-mim"), ["data.variant=1e3,007"])
    assert [cell.config["data"]["variant"] for cell in cells] == ["1e3", "007"]
    assert [cell.swept["data.variant"] for cell in cells] == ["1e3", "007"]


@pytest.mark.parametrize(
    "name", ["..", ".", "", " a", "a/b", "/tmp", "-x", "a\nb", "a\x1b[1m", "a" * 300]
)
def test_names_are_folder_names_wherever_they_come_from(name: str, tmp_path: Path) -> None:
    config = compose("mae", "pretrain-mim")
    for make in (
        lambda: make_run_dir(str(tmp_path), name, "mae", 0),
        lambda: make_sweep_dir(str(tmp_path), name, "mae"),
        lambda: from_dict(RunConfig, config | {"name": name}),
        lambda: check_folder_name(name, "--name"),
    ):
        with pytest.raises(VlxError, match="name="):
            make()
    job = Job(id="0", overrides=[], swept={}, config=config, hash="", run_dir=name)
    write_jobs(tmp_path, [job])
    with pytest.raises(VlxError, match="run_dir="):
        read_jobs(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.jsonl"]
