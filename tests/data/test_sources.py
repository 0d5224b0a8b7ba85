"""Every kind of source, on files made here."""

from __future__ import annotations

import gzip
import http.server
import logging
import multiprocessing
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SHARED_DATA
from tests.data.make import (
    add_to_tar,
    config,
    domain_tree,
    encode,
    image_tree,
    picture,
    shard,
)
from vlx.core.errors import DataError
from vlx.data.cache import Index, cached_index
from vlx.data.config import DataConfig
from vlx.data.decode import decode_image
from vlx.data.fetch import fetch_shards
from vlx.data.labels import class_indices
from vlx.data.open import SOURCES, open_source
from vlx.data.shards import expand_braces, find_shards, not_fetched
from vlx.data.source import WithDomains

EMBEDDED = ("digits", "glyphs", "scenes", "torchvision")


def pixels(source, index: int) -> np.ndarray:
    return decode_image(source.read(index)["image"])


# --- opening


def test_an_unknown_source_names_the_nearest() -> None:
    with pytest.raises(DataError, match="Did you mean parquet"):
        open_source(config(source="parqet"), "train")


@pytest.mark.parametrize("source", [s for s in SOURCES if s not in EMBEDDED])
def test_a_missing_path_says_what_is_missing(source: str) -> None:
    with pytest.raises(DataError, match=r"data\.path is missing"):
        open_source(config(source=source), "train")


def test_digits_are_not_mirror_safe() -> None:
    assert not open_source(config(), "train").info.mirror_safe


# --- folders


def test_a_tree_gives_images_labels_and_names(tmp_path: Path) -> None:
    source = open_source(config(source="folder", path=str(image_tree(tmp_path))), "train")
    assert len(source) == 24
    assert source.info.class_names == ("ant", "bee", "cat")
    labels = source.labels()
    assert labels is not None
    np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], 8))
    np.testing.assert_array_equal(pixels(source, 9), picture(101))
    assert source.read(9)["label"] == 1
    assert source.describe(9) == str(tmp_path / "train" / "bee" / "001.png")


def test_labels_of_a_split_follow_the_training_folders(tmp_path: Path) -> None:
    image_tree(tmp_path)
    shutil.rmtree(tmp_path / "test" / "ant")
    source = open_source(config(source="folder", path=str(tmp_path)), "test")
    assert source.info.num_classes == 3
    assert set(np.asarray(source.labels()).tolist()) == {1, 2}
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(DataError, match=r"class folders that .* lacks: dog"):
        open_source(config(source="folder", path=str(tmp_path)), "test")


def test_a_missing_split_says_what_to_type(tmp_path: Path) -> None:
    image_tree(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    with pytest.raises(DataError, match=r"no folder 'test', but train, val\. .*test_split=val"):
        open_source(config(source="folder", path=str(tmp_path)), "test")


def test_folders_joined_by_a_plus_are_domains_of_one_source(tmp_path: Path) -> None:
    root = domain_tree(tmp_path / "pacs", {"photo": 3, "art": 2, "sketch": 4})
    (root / "art" / "cow").mkdir()
    keys = {"source": "folder", "path": str(root), "train_split": "photo+art"}
    source = open_source(config(**keys), "photo+art")
    assert (len(source), source.info.name, source.info.split) == (10, "pacs", "photo+art")
    assert source.info.domain_names == ("photo", "art")
    assert isinstance(source, WithDomains)
    assert source.domains().tolist() == [0] * 6 + [1] * 4
    # Classes are those of all training folders, in every split.
    test = open_source(config(**keys, test_split="sketch"), "sketch")
    assert source.info.class_names == test.info.class_names == ("ant", "bee", "cow")
    assert np.asarray(source.labels()).tolist() == [0] * 3 + [1] * 3 + [0] * 2 + [1] * 2
    for index, (file, number) in {5: ("photo/bee/002", 102), 6: ("art/ant/000", 1000)}.items():
        assert source.describe(index) == str(root / f"{file}.png")
        np.testing.assert_array_equal(pixels(source, index), picture(number))
        assert source.read(index)["label"] == np.asarray(source.labels())[index]
    with pytest.raises(DataError, match=r"no folder 'arts'\. Did you mean art"):
        open_source(config(**keys), "photo+arts")
    (root / "sketch" / "dog").mkdir()
    with pytest.raises(DataError, match=r"class folders that photo\+art lacks: dog"):
        open_source(config(**keys, test_split="sketch"), "sketch")


def test_folders_that_are_joined_have_the_same_fields(tmp_path: Path) -> None:
    root = domain_tree(tmp_path / "pacs", {"photo": 3})
    (root / "loose").mkdir()
    (root / "loose" / "a.png").write_bytes(encode(picture(0)))
    cfg = config(source="folder", path=str(root), train_split="photo")
    with pytest.raises(DataError, match=r"pacs/loose \(loose\) has other classes or fields"):
        open_source(cfg, "photo+loose")


def test_a_fifth_of_joined_folders_is_held_out_by_file_wherever_they_lie(tmp_path: Path) -> None:
    sides: list[dict[str, set[str]]] = []
    for place in ("here", "there"):
        root = domain_tree(tmp_path / place / "pacs", {"photo": 40, "art": 30})
        cfg = config(source="folder", path=str(root), train_split="photo+art", split_column="file")
        found = {side: open_source(cfg, f"photo+art:{side}") for side in ("train", "test")}
        for source in found.values():  # labels and domains follow
            for i in range(0, len(source), 7):
                parts = Path(source.describe(i)).parts
                assert isinstance(source, WithDomains)
                assert source.info.domain_names[source.domains()[i]] == parts[-3]
                assert source.info.class_names[np.asarray(source.labels())[i]] == parts[-2]
        names = {
            side: {source.describe(i).removeprefix(str(root)) for i in range(len(source))}
            for side, source in found.items()
        }
        assert not names["train"] & names["test"]
        assert len(names["train"] | names["test"]) == 140
        assert 15 <= len(names["test"]) <= 45
        sides.append(names)
    assert sides[0] == sides[1]
    with pytest.raises(DataError, match="has no column 'name'"):
        open_source(replace(cfg, split_column="name"), "photo:test")


def test_a_tree_without_splits_is_split_by_name(tmp_path: Path) -> None:
    image_tree(tmp_path / "made", per_class=40)
    root = tmp_path / "made" / "train"
    parts = {s: open_source(config(source="folder", path=str(root)), s) for s in ("train", "test")}
    files = {s: {p.describe(i) for i in range(len(p))} for s, p in parts.items()}
    assert not files["train"] & files["test"]
    assert len(files["train"] | files["test"]) == 120
    assert 4 <= len(files["test"]) <= 24  # a tenth, by hash
    (root / "ant" / "new.png").write_bytes(encode(picture(1)))
    again = open_source(config(source="folder", path=str(root)), "test")
    assert files["test"] <= {again.describe(i) for i in range(len(again))}


def test_a_folder_of_images_has_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encode(picture(i), "JPEG"))
    source = open_source(config(source="folder", path=str(tmp_path)), "all")
    assert source.info.fields == ("image",)
    assert source.labels() is None
    assert "label" not in source.read(0)


def test_other_files_hidden_files_and_loops_are_left_out(tmp_path: Path) -> None:
    image_tree(tmp_path)
    ant = tmp_path / "train" / "ant"
    (ant / "notes.txt").write_text("x")
    (ant / "._000.png").write_bytes(b"x")
    (ant / "deep").mkdir()
    (ant / "deep" / "UPPER.PNG").write_bytes(encode(picture(1)))
    (ant / "deep" / "loop").symlink_to(tmp_path / "train")
    source = open_source(config(source="folder", path=str(tmp_path)), "train")
    assert len(source) == 25
    assert (np.asarray(source.labels()) == 0).sum() == 9


def test_the_index_is_read_from_the_cache_until_a_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlx.data.sources import folder

    image_tree(tmp_path)
    built = []
    scan = folder._scan
    monkeypatch.setattr(folder, "_scan", lambda root: built.append(root) or scan(root))
    monkeypatch.setattr(folder, "RACY_NS", 0)  # else a folder just written is looked at again
    cfg = config(source="folder", path=str(tmp_path))
    first = open_source(cfg, "train")
    assert open_source(cfg, "train").info == first.info
    assert len(built) == 1
    (tmp_path / "train" / "bee" / "new.png").write_bytes(encode(picture(99)))
    changed = open_source(cfg, "train")
    assert len(built) == 2
    assert len(changed) == 25
    assert changed.info.fingerprint != first.info.fingerprint


def test_the_index_holds_no_python_list_of_files(tmp_path: Path) -> None:
    source = open_source(config(source="folder", path=str(image_tree(tmp_path))), "train")
    arrays = source._index.arrays.values()  # pyright: ignore
    assert all(isinstance(array, np.memmap) for array in arrays)
    again = pickle.loads(pickle.dumps(source))
    assert again.describe(3) == source.describe(3)


def test_an_unwritable_cache_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = open_source(config(source="folder", path=str(image_tree(tmp_path / "t"))), "train")
    assert len(source) == 24
    assert "cannot keep an index" in caplog.text


# --- one index, two processes


def _build_slowly(folder: Path, started, go) -> None:
    """What a process does: report that it builds, wait for leave, leave a trace."""

    def build() -> Index:
        started.set()
        assert go.wait(30)
        with (folder / "built").open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        return Index({"x": np.arange(3)}, {})

    found = cached_index("kind", "name", build, lambda index: True)
    assert found.arrays["x"].tolist() == [0, 1, 2]


@pytest.fixture
def spawn():
    """Starts processes in this one's image; ends them after the test."""
    context = multiprocessing.get_context("fork")
    running = []

    def start(*args):
        process = context.Process(target=_build_slowly, args=args)
        process.start()
        running.append(process)
        return process

    start.Event = context.Event  # pyright: ignore
    yield start
    for process in running:
        process.kill()


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path, spawn) -> None:
    first_started, second_started, go = spawn.Event(), spawn.Event(), spawn.Event()
    first = spawn(tmp_path, first_started, go)
    assert first_started.wait(30)
    second = spawn(tmp_path, second_started, go)
    second.join(0.3)
    assert second.is_alive()  # it waits for the lock
    assert not second_started.is_set()
    go.set()
    first.join(30)
    second.join(30)
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert len((tmp_path / "built").read_text().split()) == 1


def test_the_lock_of_a_killed_builder_is_free(tmp_path: Path, spawn) -> None:
    started, never, go = spawn.Event(), spawn.Event(), spawn.Event()
    first = spawn(tmp_path, started, never)
    assert started.wait(30)
    first.kill()
    first.join(30)
    go.set()
    second = spawn(tmp_path, spawn.Event(), go)
    second.join(30)
    assert second.exitcode == 0
    assert (tmp_path / "built").read_text().split() == [str(second.pid)]


def test_a_half_written_index_is_built_again(own_cache: Path) -> None:
    def build() -> Index:
        return Index({"x": np.arange(5)}, {"y": 1})

    cached_index("kind", "name", build, lambda index: True)
    file = own_cache / "kind" / "name" / "x.npy"
    file.write_bytes(file.read_bytes()[:90])
    found = cached_index("kind", "name", build, lambda index: True)
    assert found.arrays["x"].tolist() == [0, 1, 2, 3, 4]
    assert np.load(file).tolist() == [0, 1, 2, 3, 4]


# --- labels


def test_whole_numbers_are_class_indices_as_they_stand() -> None:
    labels, names = class_indices(np.array([0, 3]), np.array([0, 1, 4]), "test")
    assert labels.tolist() == [0, 3]
    assert names == ("0", "1", "2", "3", "4")


def test_a_whole_number_beyond_the_training_splits_is_refused() -> None:
    with pytest.raises(DataError, match=r"split 'test' has labels that the .* split lacks: 5, 7"):
        class_indices(np.array([0, 7, 5]), np.array([0, 1, 4]), "test")


@pytest.mark.parametrize("label", [3, -2])
def test_a_label_beyond_the_named_classes_is_refused(tmp_path: Path, label: int) -> None:
    names = datasets.ClassLabel(names=["a", "b", "c"])
    rows = table(range(4), [0, 1, 2, 0]).cast_column("label", names)
    file = tmp_path / "train.parquet"
    rows.to_parquet(file)
    assert open_source(config(source="parquet", path=str(file)), "train").info.num_classes == 3
    stored = pq.read_table(file)
    values = pa.array([0, 1, label, 0], pa.int64())
    pq.write_table(
        stored.set_column(
            stored.schema.get_field_index("label"), stored.schema.field("label"), values
        ),
        file,
    )
    with pytest.raises(
        DataError, match=rf"1 of 4 .* beyond its 3 classes \(first: .*row 2 has {label}, .*0\.\.2\)"
    ):
        open_source(config(source="parquet", path=str(file)), "train")


def test_rows_without_a_label_count_as_unreadable(tmp_path: Path) -> None:
    from vlx.data.pipeline import probe_sizes

    names = datasets.ClassLabel(names=["a", "b"])
    rows = table(range(4), [0, 1, -1, -1]).cast_column("label", names)
    rows.to_parquet(tmp_path / "train.parquet")
    source = open_source(config(source="parquet", path=str(tmp_path)), "train")
    assert source.read(1)["label"] == 1
    with pytest.raises(ValueError, match="no label, where other samples have one"):
        source.read(2)
    assert len(probe_sizes(source, config())) == 2


def test_words_are_numbered_by_the_training_split() -> None:
    labels, names = class_indices(np.array(["cat"]), np.array(["dog", "ant", "cat"]), "test")
    assert labels.tolist() == [1]
    assert names == ("ant", "cat", "dog")
    with pytest.raises(DataError, match="training split lacks: emu"):
        class_indices(np.array(["emu"]), np.array(["ant"]), "test")


# --- WebDataset


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}/{0..1}", ["x/0", "x/1", "y/0", "y/1"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize("labels", ["cls", "json"])
@pytest.mark.parametrize(
    "path", ["{root}", "{root}/train-{{00..01}}.tar", "{root}/train-00.tar::{root}/*-01.tar"]
)
def test_shards_are_read_by_index(tmp_path: Path, labels: str, path: str) -> None:
    for number in range(2):
        shard(tmp_path / f"train-{number:02d}.tar", range(number * 5, number * 5 + 5), labels)
    cfg = config(source="webdataset", path=path.format(root=tmp_path))
    source = open_source(cfg, "train")
    assert len(source) == 10
    assert np.asarray(source.labels()).tolist() == [i % 3 for i in range(10)]
    for index in (7, 0, 9, 4):
        np.testing.assert_array_equal(pixels(source, index), picture(index))
    assert source.describe(7).endswith("train-01.tar: 00007")


def test_split_in_the_pattern_and_class_names_beside_it(tmp_path: Path) -> None:
    shard(tmp_path / "train" / "0.tar", range(6))
    shard(tmp_path / "test" / "0.tar", range(2))
    (tmp_path / "classnames.txt").write_text("ant\nbee\ncat\n")
    cfg = config(source="webdataset", path=f"{tmp_path}/{{split}}/{{0..0}}.tar")
    source = open_source(cfg, "test")
    assert len(source) == 2
    assert source.info.class_names == ("ant", "bee", "cat")


def test_shards_without_labels(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", range(4), "none")
    source = open_source(config(source="webdataset", path=str(tmp_path)), "train")
    assert source.info.fields == ("image",)
    np.testing.assert_array_equal(pixels(source, 3), picture(3))


def test_every_cut_of_a_shard_keeps_the_whole_samples_and_counts_one(tmp_path: Path) -> None:
    whole = shard(tmp_path / "whole" / "train-0.tar", range(6)).read_bytes()
    file = tmp_path / "cut" / "train-0.tar"
    file.parent.mkdir()
    cfg = config(source="webdataset", path=str(file.parent))
    lengths = []
    for cut in range(700, 10 * 512, 512):
        file.write_bytes(whole[:cut])
        source = open_source(cfg, "train")
        good = [source.read(index) for index in range(len(source) - 1)]
        with pytest.raises(ValueError, match="damaged shard"):
            source.read(len(source) - 1)
        assert str(file) in source.describe(len(source) - 1)
        for index, sample in enumerate(good):
            np.testing.assert_array_equal(decode_image(sample["image"]), picture(index))
            assert sample.get("label", index % 3) == index % 3
        lengths.append(len(good))
    assert lengths == sorted(lengths)
    assert lengths[-1] > 1


def test_overwritten_shard_and_empty_shard_are_damage_not_the_end(tmp_path: Path) -> None:
    file = shard(tmp_path / "train-0.tar", range(6))
    data = bytearray(file.read_bytes())
    member = data.find(b"00003.png")
    data[member : member + 2000] = b"\xaa" * 2000
    file.write_bytes(data)
    (tmp_path / "train-1.tar").write_bytes(b"")
    source = open_source(config(source="webdataset", path=str(tmp_path)), "train")
    assert len(source) == 5  # three samples, and a stand-in for the damage of either shard
    for index in (3, 4):
        with pytest.raises(ValueError, match="damaged shard"):
            source.read(index)
    assert "after 00002" in source.describe(3)


def test_samples_without_an_image_or_a_label_are_named(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        add_to_tar(tar, "a.png", encode(picture(0)))
        add_to_tar(tar, "a.cls", b"1")
        add_to_tar(tar, "b.cls", b"0")
        add_to_tar(tar, "c.png", encode(picture(2)))
    source = open_source(config(source="webdataset", path=str(tmp_path)), "train")
    assert source.read(0)["label"] == 1
    with pytest.raises(ValueError, match="no member jpg"):
        source.read(1)
    with pytest.raises(ValueError, match="no label"):
        source.read(2)


def test_compressed_shards_say_why_not(tmp_path: Path) -> None:
    file = shard(tmp_path / "train-0.tar", range(2))
    packed = tmp_path / "train-0.tar.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(DataError, match="compressed"):
        open_source(config(source="webdataset", path=str(packed)), "train")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def log_message(self, format: str, *args: object) -> None:
        self.requests.append(self.path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A server of tmp_path on this machine, and the paths asked of it."""
    requests: list[str] = []
    handler = type("Handler", (_Quiet,), {"requests": requests})
    serve = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=str(tmp_path))
    )
    thread = threading.Thread(target=serve.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{serve.server_port}", requests
    serve.shutdown()
    serve.server_close()


def test_shards_at_a_url_are_fetched_once_and_read_by_index(tmp_path: Path, server) -> None:
    for number in range(2):
        shard(tmp_path / "remote" / f"train-{number}.tar", range(number * 5, number * 5 + 5))
    url, requests = server
    cfg = config(source="webdataset", path=f"{url}/remote/{{split}}-{{0..1}}.tar")
    source = open_source(cfg, "train")
    np.testing.assert_array_equal(pixels(source, 8), picture(8))
    open_source(cfg, "train")
    assert len(requests) == 2


def test_a_url_that_is_not_there_is_one_line(server) -> None:
    url, _ = server
    with pytest.raises(DataError, match=r"cannot fetch .*/none\.tar: .*404"):
        open_source(config(source="webdataset", path=f"{url}/none.tar"), "train")


def test_a_command_is_run_where_it_was_typed_and_its_output_is_kept(tmp_path: Path) -> None:
    file = shard(tmp_path / "my shards" / "train-0.tar", range(3))
    command = f"pipe:cat '{file}'"
    cfg = config(source="webdataset", path=command)
    with pytest.raises(DataError, match="is run only where it is typed"):
        open_source(cfg, "train")
    assert not_fetched(cfg) == [command]
    fetch_shards([command], run_commands=True)
    assert len(open_source(cfg, "train")) == 3
    assert not_fetched(cfg) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat /no/such/file.tar", "exit code"),
        ("no-such-program x", "No such file"),
        ("cat a.tar | tee b.tar", "no shell"),
        ("cat 'a.tar", "quotation"),
        ("", "no command"),
    ],
)
def test_what_is_no_command_is_one_line(command: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetch_shards([f"pipe:{command}"], run_commands=True)


def test_no_shell_reads_a_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exit code"):
        fetch_shards([f"pipe:cat $(touch {tmp_path}/ran) /none.tar;touch"], run_commands=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("pattern", ["a{0..999999999}", "{a,b}" * 40, "{" + "a," * 9000 + "a}"])
def test_braces_that_name_too_much_are_refused_at_once(pattern: str) -> None:
    with pytest.raises(DataError, match=r"name a folder"):
        find_shards(pattern, "train")
    with pytest.raises(DataError, match=r"name a folder"):
        find_shards("::".join(["a{0..90000}"] * 9), "train")


# --- Parquet and Arrow


def table(numbers: range, labels: list | None = None, **columns: list) -> datasets.Dataset:
    images = [{"bytes": encode(picture(n)), "path": None} for n in numbers]
    features = {"image": datasets.Image()}
    content: dict = {"image": images, **columns}
    if labels is not None:
        content["label"] = labels
    made = datasets.Dataset.from_dict(content)
    return made.cast_column("image", features["image"])


def save_parquet(file: Path, numbers: range, labels: list | None = None, **columns: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table(numbers, labels, **columns).to_parquet(str(file))
    return file


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def test_hub_style_shards_of_a_split_are_one_source(tmp_path: Path) -> None:
    save_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", range(4), [0, 1, 2, 0])
    save_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", range(4, 6), [1, 2])
    save_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", range(9, 11), [0, 1])
    source = open_source(config(source="parquet", path=str(tmp_path)), "train")
    assert len(source) == 6
    np.testing.assert_array_equal(pixels(source, 5), picture(5))
    test = open_source(config(source="parquet", path=str(tmp_path)), "test")
    assert test.info.num_classes == 3  # the training split's
    assert source.info.fingerprint != test.info.fingerprint


def test_a_saved_dataset_dict_and_its_class_names(tmp_path: Path) -> None:
    feature = datasets.ClassLabel(names=["ant", "bee"])
    parts = {
        "train": table(range(4), [0, 1, 0, 1]).cast_column("label", feature),
        "validation": table(range(4, 6), [1, 1]).cast_column("label", feature),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    cfg = config(source="parquet", path=str(tmp_path / "saved"), test_split="validation")
    source = open_source(cfg, "validation")
    assert source.info.class_names == ("ant", "bee")
    assert source.read(0)["label"] == 1
    np.testing.assert_array_equal(pixels(source, 1), picture(5))
    with pytest.raises(DataError, match=r"no split 'valid', .*Use data\.test_split=validation"):
        open_source(cfg, "valid")


def test_arrow_files_are_read(tmp_path: Path) -> None:
    table(range(3), [0, 1, 0]).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "arrow").mkdir()
    written = next((tmp_path / "saved").glob("*.arrow"))
    shutil.copy(written, tmp_path / "arrow" / "train.arrow")
    source = open_source(config(source="parquet", path=str(tmp_path / "arrow")), "train")
    np.testing.assert_array_equal(pixels(source, 2), picture(2))


def test_a_missing_image_column_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    table(range(2)).rename_column("image", "images").to_parquet(str(file))
    with pytest.raises(DataError, match=r"data\.image_column.*'image'. Did you mean images"):
        open_source(config(source="parquet", path=str(file)), "train")


def test_a_missing_label_column_names_the_nearest_or_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = save_parquet(tmp_path / "train.parquet", range(2), fine_label=[3, 4])
    with pytest.raises(DataError, match="Did you mean fine_label"):
        open_source(config(source="parquet", path=str(file), label_column="fine_labl"), "train")
    source = open_source(config(source="parquet", path=str(file)), "train")
    assert source.info.fields == ("image",)
    assert "Did you mean fine_label" in caplog.text
    chosen = open_source(config(source="parquet", path=str(file), label_column="fine_label"), "all")
    assert np.asarray(chosen.labels()).tolist() == [3, 4]


def test_labels_that_are_not_classes_are_refused(tmp_path: Path) -> None:
    file = save_parquet(tmp_path / "train.parquet", range(2), label=[0.5, 1.5])
    with pytest.raises(DataError, match="a label is a whole number or a word"):
        open_source(config(source="parquet", path=str(file)), "train")


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    file = save_parquet(tmp_path / "train.parquet", range(2))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match="cannot read split 'train'"):
        open_source(config(source="parquet", path=str(file)), "train")


def test_cifar10_of_the_shared_folder(cifar10: str) -> None:
    source = open_source(config(source="parquet", path=cifar10), "test")
    assert len(source) == 10_000
    assert source.info.class_names[:2] == ("airplane", "automobile")
    assert pixels(source, 123).shape == (32, 32, 3)


def test_photographs_of_the_shared_folder_decode() -> None:
    if not (SHARED_DATA / "imagenet_samples").is_dir():
        pytest.skip("../shared/data/imagenet_samples is not here")
    source = open_source(
        config(source="parquet", path=str(SHARED_DATA / "imagenet_samples")), "samples"
    )
    assert {pixels(source, i).ndim for i in range(0, 200, 20)} == {3}


# --- torchvision


def write_mnist(root: Path, split: str, numbers: np.ndarray, labels: np.ndarray) -> None:
    """The IDX files that torchvision's MNIST reads."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "train" if split == "train" else "t10k"
    header = np.array([2051, *numbers.shape], dtype=">i4").tobytes()
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + numbers.tobytes())
    header = np.array([2049, len(labels)], dtype=">i4").tobytes()
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def test_torchvision_mnist(tmp_path: Path) -> None:
    grey = np.stack([picture(i, 28)[..., 0] for i in range(10)])
    for split in ("train", "test"):
        write_mnist(tmp_path, split, grey, np.arange(10, dtype=np.uint8))
    cfg = config(source="torchvision", variant="MNIST", path=str(tmp_path))
    source = open_source(cfg, "test")
    assert len(source) == 10
    assert source.info.class_names[3] == "3 - three"
    assert not source.info.mirror_safe
    np.testing.assert_array_equal(pixels(source, 4)[..., 0], grey[4])
    assert source.read(4)["label"] == 4
    with pytest.raises(DataError, match="no split 'val'"):
        open_source(cfg, "val")


def test_torchvision_files_by_class_name(tmp_path: Path) -> None:
    import json

    root = tmp_path / "food-101"
    for name in ("pie", "soup"):
        (root / "images" / name).mkdir(parents=True)
        (root / "images" / name / "1.jpg").write_bytes(encode(picture(1, 40), "JPEG", quality=95))
    (root / "meta").mkdir()
    for split in ("train", "test"):
        listed = {name: [f"{name}/1"] for name in ("pie", "soup")}
        (root / "meta" / f"{split}.json").write_text(json.dumps(listed))
    cfg = config(source="torchvision", variant="Food101", path=str(tmp_path))
    source = open_source(cfg, "train")
    assert source.info.class_names == ("pie", "soup")
    assert source.read(1)["label"] == 1
    assert np.abs(pixels(source, 0).astype(int) - picture(1, 40)).mean() < 5
    with pytest.raises(DataError, match=r"Food101: .*split"):
        open_source(cfg, "valid")


def test_torchvision_downloads_only_when_asked(tmp_path: Path) -> None:
    cfg = config(source="torchvision", variant="CIFAR10", path=str(tmp_path))
    with pytest.raises(DataError, match=r"CIFAR10 is not in .* Type data\.download=true"):
        open_source(cfg, "train")


@pytest.mark.parametrize("variant", ["CIFAR11", None])
def test_an_unknown_variant_names_the_nearest(variant: str | None) -> None:
    with pytest.raises(DataError, match="CIFAR10"):
        open_source(config(source="torchvision", variant=variant), "train")


def test_every_named_torchvision_class_exists() -> None:
    from torchvision import datasets as theirs

    from vlx.data.sources.torchvision import _NAMES

    assert [name for name in _NAMES if not hasattr(theirs, name)] == []


def test_every_conf_of_data_is_a_data_config() -> None:
    import yaml

    from vlx.config.paths import conf_dir
    from vlx.engine.load import from_dict

    for file in (conf_dir() / "data").glob("*.yaml"):
        cfg = from_dict(DataConfig, yaml.safe_load(file.read_text()), "data.")
        assert cfg.source in SOURCES, file
    assert logging.getLogger("vlx")
