"""FIELD-NOTES section 4, test 12: W&B through its real client, read back from its own file."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from tests.engine.inprocess import run_here, stop_after
from tests.engine.processes import make_run
from vlx.core.errors import EXIT_DIVERGED, DivergedError
from vlx.engine.rundir import read_record
from vlx.track import wandb as track_wandb
from vlx.track.config import TrackConfig, WandbMode
from vlx.track.jsonl import read_metrics

_BLOCK, _HEADER = 32768, 7

QUICK = ("track=wandb", "train.steps=4", "data.workers=0", "eval.compare_untrained=false")


def read_wandb(file: Path) -> Iterator[Record]:
    """Records of a .wandb file: a LevelDB log of 32 KiB blocks after 7 bytes of file header; a
    record is one chunk (type 1), or first, middles and last (2, 3, 4), each behind CRC (4 bytes),
    length (2), type (1)."""
    data = file.read_bytes()
    position, parts = _HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:  # padding at the end of a block
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:  # preallocated, not written
            return
        parts += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def records(run_dir: Path) -> list[Record]:
    wandb.teardown()  # waits until the client's own process has written everything
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    return [record for file in files for record in read_wandb(file)]


def history(run_dir: Path) -> list[dict[str, Any]]:
    rows = [r.history for r in records(run_dir) if r.WhichOneof("record_type") == "history"]
    return [
        {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in row.item}
        for row in rows
    ]


def runs_of(run_dir: Path) -> list[Any]:
    return [r.run for r in records(run_dir) if r.WhichOneof("record_type") == "run"]


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_offline_run_holds_metrics_config_picture_and_table(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run", *QUICK, "track.tags=[a,b]")
    assert run_here(run_dir)[0] == 0
    rows = history(run_dir)
    logged = {row["_step"]: row for row in rows if "train/loss" in row}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        if "train/loss" in record:
            row = logged[record["step"]]
            for key in ("train/loss", "train/loss/recon", "optim/lr", "optim/grad_norm"):
                assert row[key] == pytest.approx(record[key])
    assert list(logged) == [1, 2, 3, 4]
    together = {key for row in rows for key in row}
    assert any(key.startswith("eval/knn/top1") for key in together)
    assert any(key.startswith("pictures/reconstruction-trained") for key in together)
    assert any(key.startswith("results") for key in together)
    media = [f.relative_to(run_dir).as_posix() for f in run_dir.glob("wandb/*/files/media/**/*.*")]
    assert any(name.endswith(".png") for name in media)
    tables = list(run_dir.glob("wandb/*/files/media/**/*.table.json"))
    assert json.loads(tables[0].read_text())["columns"][0] == "metric"
    first = runs_of(run_dir)[0]
    assert first.run_id == read_record(run_dir).wandb_id
    assert first.display_name == "run"
    assert list(first.tags) == ["a", "b"]
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert config["slug"] == "mae"
    assert config["method"]["mask_ratio"] == 0.75
    assert config["train"]["steps"] == 4
    assert exit_codes(run_dir) == [0]


def exit_codes(run_dir: Path) -> list[int]:
    return [r.exit.exit_code for r in records(run_dir) if r.WhichOneof("record_type") == "exit"]


def test_resumed_run_continues_the_same_run_with_rising_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path, "run", *QUICK, "eval.at_end=[]")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run_here(run_dir)[0] == 75
    # The client names folders by the second: a resume within it would share the first's folder.
    for folder in run_dir.glob("wandb/offline-run-*"):
        folder.rename(folder.with_name(folder.name.replace("offline-run-2", "offline-run-1")))
    assert run_here(run_dir)[0] == 0
    assert {run.run_id for run in runs_of(run_dir)} == {read_record(run_dir).wandb_id}
    assert len(list(run_dir.glob("wandb/offline-run-*"))) == 2
    assert [row["_step"] for row in history(run_dir) if "train/loss" in row] == [1, 2, 3, 4]
    assert exit_codes(run_dir) == [75, 0]


def test_failed_run_shows_its_exit_code(tmp_path: Path) -> None:
    words = ("optim.lr=1e20", "optim.weight_decay=0", "schedule=constant", "train.steps=20")
    run_dir = make_run(tmp_path, "run", *QUICK, *words)
    with pytest.raises(DivergedError):
        run_here(run_dir)
    assert exit_codes(run_dir) == [EXIT_DIVERGED]


def test_crash_shows_an_exit_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlx.engine.loop import Trainer

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Trainer, "_apply", broken)
    run_dir = make_run(tmp_path, "run", *QUICK)
    with pytest.raises(ZeroDivisionError):
        run_here(run_dir)
    assert exit_codes(run_dir) == [1]


def test_sweep_is_the_group(tmp_path: Path) -> None:
    track = track_wandb.WandbTrack(
        TrackConfig(mode=WandbMode.offline), run_dir=tmp_path, run_id="abc", sweep="s1", config={}
    )
    track.close(0)
    assert runs_of(tmp_path)[0].run_group == "s1"
    own = track_wandb.WandbTrack(
        TrackConfig(mode=WandbMode.offline, group="mine"),
        run_dir=tmp_path / "b", run_id="abd", sweep="s1", config={},
    )  # fmt: skip
    own.close(0)
    assert runs_of(tmp_path / "b")[0].run_group == "mine"


def test_track_none_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(**_: object) -> None:
        raise AssertionError("wandb.init was called")

    monkeypatch.setattr(wandb, "init", never)
    run_dir = make_run(tmp_path, "run", *QUICK, "track=none")
    assert run_here(run_dir)[0] == 0
    assert not (run_dir / "wandb").exists()


def test_broken_client_leaves_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("the client is broken")

    monkeypatch.setattr(wandb, "init", broken)
    run_dir = make_run(tmp_path, "run", *QUICK)
    with caplog.at_level(logging.WARNING, "vlx"):
        assert run_here(run_dir)[0] == 0
    assert "W&B is off for this run: the client is broken" in caplog.text
    assert (run_dir / "results.json").exists()


def test_client_that_breaks_during_the_run_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def log(self, *_: object, **__: object) -> None:
            raise ConnectionError("gone")

        def finish(self, **_: object) -> None:
            raise ConnectionError("gone")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    run_dir = make_run(tmp_path, "run", *QUICK)
    with caplog.at_level(logging.WARNING, "vlx"):
        assert run_here(run_dir)[0] == 0
    assert caplog.text.count("W&B stopped taking data") == 1


def test_server_that_is_not_there_only_costs_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as probe:  # a port that nobody listens at
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(track_wandb, "INIT_TIMEOUT_SECONDS", 1.0)
    wandb.teardown()  # the client reads its environment once in a process
    run_dir = make_run(tmp_path, "run", *QUICK, "track.mode=online", "eval.at_end=[]")
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, "vlx"):
        assert run_here(run_dir)[0] == 0
    assert time.monotonic() - started < 60  # the client's own default would be 90
    wandb.teardown()
    assert "the run is kept offline" in caplog.text
    assert f"127.0.0.1:{port}" in caplog.text
    assert [row["_step"] for row in history(run_dir) if "train/loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        (WandbMode.auto, {}, "offline"),
        (WandbMode.auto, {"WANDB_API_KEY": "x"}, "online"),
        (WandbMode.auto, {"WANDB_MODE": "offline", "WANDB_API_KEY": "x"}, "offline"),
        (WandbMode.online, {"WANDB_MODE": "offline"}, "online"),
        (WandbMode.offline, {"WANDB_API_KEY": "x"}, "offline"),
    ],
)
def test_mode(
    mode: WandbMode,
    environment: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert track_wandb.resolve_mode(TrackConfig(mode=mode)) == expected


def test_login_is_found_in_netrc(tmp_path: Path) -> None:
    Path(os.environ["NETRC"]).write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert track_wandb.is_logged_in()
