"""The pipeline: the same batches whatever reads them, and damaged samples."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.data.make import (
    CROP_AND_FLIP,
    HTML,
    config,
    domain_tree,
    encode,
    image_tree,
    picture,
    truncated_jpeg,
)
from vlx.core.errors import ConfigError, DataError
from vlx.core.fields import Batch, Field, Needs, ViewSpec
from vlx.data.config import DataConfig, Resident
from vlx.data.open import open_source
from vlx.data.order import permute
from vlx.data.pipeline import EvalPipeline, Share, TrainPipeline, probe_sizes
from vlx.data.source import Sample, SourceInfo
from vlx.data.views import evaluation_view
from vlx.ops.augment import ColorJitter, HorizontalFlip, RandomCrop, RandomResizedCrop

CPU = torch.device("cpu")


def folder(root: Path, damaged: int = 0, **keys) -> DataConfig:
    """24 training and 12 test images, the first of the training ones damaged."""
    files = sorted((image_tree(root) / "train").rglob("*.png"))
    broken = [truncated_jpeg(), b"", HTML, encode(picture(0))[:80]]
    for i in range(damaged):
        files[i * 5].write_bytes(broken[i % len(broken)])
    return config(source="folder", path=str(root), **{"corrupt_limit": 0.2, **keys})


def pipeline(
    cfg: DataConfig,
    batch_size: int = 6,
    needs: Needs = CROP_AND_FLIP,
    split: str = "train",
    **share,
):
    source = open_source(cfg, split)
    return TrainPipeline(
        source,
        needs,
        cfg=cfg,
        image_size=16,
        seed=7,
        share=Share(batch_size, **share),
        device=CPU,
    )


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key], y[key]), key


@pytest.fixture
def with_damage(tmp_path: Path) -> DataConfig:
    return folder(tmp_path, damaged=3, resident=Resident.never)


def test_batches_are_the_same_for_any_number_of_workers(with_damage: DataConfig) -> None:
    expected = list(pipeline(with_damage).batches(0, 10))
    for workers in (1, 2):
        cfg = replace(with_damage, workers=workers)
        assert_equal(list(pipeline(cfg).batches(0, 10)), expected)


def test_batches_are_the_same_resident_or_streamed(with_damage: DataConfig) -> None:
    streamed, resident = (
        pipeline(replace(with_damage, resident=kind)) for kind in (Resident.never, Resident.always)
    )
    assert streamed.residents is None
    assert resident.residents is not None
    assert_equal(list(resident.batches(0, 10)), list(streamed.batches(0, 10)))
    assert resident.bad.reasons.keys() == streamed.bad.reasons.keys()


@pytest.mark.parametrize("start", [1, 4, 5, 9])
@pytest.mark.parametrize("resident", list(Resident))
def test_batches_are_the_same_from_any_step_on(
    with_damage: DataConfig, start: int, resident: Resident
) -> None:
    cfg = replace(with_damage, resident=resident)
    expected = list(pipeline(cfg).batches(0, 10))
    assert_equal(list(pipeline(cfg).batches(start, 10)), expected[start:])


def assert_shares_are_the_whole(
    make: Callable[..., TrainPipeline], world: int, accumulate: int, *, spread: bool = False
) -> None:
    """The micro-batches of all processes are the batches of one; make takes a process's share.

    spread: the processes take turns in a micro-batch's samples.
    """
    expected = list(make().batches(0, 4))
    parts = [
        list(make(rank=r, world=world, accumulate=accumulate).batches(0, 4)) for r in range(world)
    ]
    for step, whole in enumerate(expected):
        for key, value in whole.items():
            micros = [
                [parts[r][step * accumulate + micro][key] for r in range(world)]
                for micro in range(accumulate)
            ]
            put = [torch.stack(m, 1).flatten(0, 1) if spread else torch.cat(m) for m in micros]
            assert torch.equal(torch.cat(put), value), key


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (3, 2)])
def test_shares_put_together_are_the_single_process_s_batch(
    with_damage: DataConfig, world: int, accumulate: int
) -> None:
    assert_shares_are_the_whole(partial(pipeline, with_damage, 12), world, accumulate)


def test_an_epoch_has_every_readable_sample_once(tmp_path: Path) -> None:
    clean = pipeline(folder(tmp_path), 6)
    assert clean.steps_per_epoch == 4
    for epoch in range(2):
        steps = clean.batches(4 * epoch, 4 * epoch + 4)
        ids = torch.cat([batch["sample_id"] for batch in steps])
        assert sorted(ids.tolist()) == list(range(24))


@pytest.mark.parametrize("resident", [Resident.never, Resident.always])
def test_an_epoch_of_repeats_has_as_many_different_views_of_fewer_samples(
    tmp_path: Path, resident: Resident
) -> None:
    line = pipeline(folder(tmp_path, resident=resident, repeats=3), 6)
    assert line.steps_per_epoch == 4
    epochs = []
    for epoch in range(2):
        batches = list(line.batches(4 * epoch, 4 * epoch + 4))
        ids = torch.cat([batch["sample_id"] for batch in batches])
        samples, counts = ids.unique(return_counts=True)
        assert counts.tolist() == [3] * 8
        images = torch.cat([batch["image"] for batch in batches])
        assert len(images.flatten(1).unique(dim=0)) == 24  # no copy is like another
        epochs.append(set(samples.tolist()))
        for batch in batches:  # copies keep their label and lie in one global batch
            assert len(batch["sample_id"].unique()) == 2
            assert batch["label"].tolist() == [i // 8 for i in batch["sample_id"].tolist()]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_repeats_are_the_same_for_any_workers_start_and_residence(
    with_damage: DataConfig, repeats: int
) -> None:
    cfg = replace(with_damage, repeats=repeats)
    expected = list(pipeline(cfg).batches(0, 10))
    assert_equal(list(pipeline(replace(cfg, workers=2)).batches(0, 10)), expected)
    assert_equal(list(pipeline(replace(cfg, resident=Resident.always)).batches(0, 10)), expected)
    for start in (1, 4, 7):
        assert_equal(list(pipeline(cfg).batches(start, 10)), expected[start:])


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (3, 2)])
def test_repeats_are_the_same_for_any_split_of_the_batch(
    with_damage: DataConfig, world: int, accumulate: int
) -> None:
    cfg = replace(with_damage, repeats=3)
    assert_shares_are_the_whole(partial(pipeline, cfg, 12), world, accumulate, spread=True)


def digits(batch_size: int, **share: int) -> TrainPipeline:
    cfg = config(source="digits", repeats=3, workers=0)
    return TrainPipeline(
        open_source(cfg, "train"),
        CROP_AND_FLIP,
        cfg=cfg,
        image_size=8,
        seed=7,
        share=Share(batch_size, **share),
        device=CPU,
    )


@pytest.mark.parametrize(("world", "micro"), [(1, 256), (2, 128), (4, 64), (8, 32)])
def test_processes_share_repeats_as_timm_s_and_deit_s_sampler_does(world: int, micro: int) -> None:
    from timm.data.distributed_sampler import RepeatAugSampler

    for rank in range(world):
        line = digits(world * micro, rank=rank, world=world)
        n = len(line.source)
        theirs = RepeatAugSampler(
            range(n), num_replicas=world, rank=rank, shuffle=False, num_repeats=3
        )
        for epoch in range(2):
            steps = range(epoch * line.steps_per_epoch, (epoch + 1) * line.steps_per_epoch)
            mine = np.concatenate([line.indices(step, 0) for step in steps])
            order = permute(np.arange(n), n, line.seed, epoch)  # ours in the place of theirs
            np.testing.assert_array_equal(mine, order[list(theirs)])


def test_a_process_of_many_sees_each_sample_once() -> None:
    """The issue's numbers: 128 different samples of 128, where neighbours would be 43."""
    for rank in range(8):
        assert len(np.unique(digits(1024, rank=rank, world=8).indices(0, 0))) == 128
    assert len(np.unique(digits(128).indices(0, 0))) == 43


def test_without_repeats_a_view_is_drawn_from_seed_epoch_and_sample(tmp_path: Path) -> None:
    """The keys of every run before there were repeats: those must resume as they were."""
    from vlx.core import random
    from vlx.data.views import make_views

    line = pipeline(folder(tmp_path, repeats=1), 6)
    assert line.residents is not None
    for step, batch in enumerate(line.batches(0, 8)):
        images, sizes, _ = line.residents.take(batch["sample_id"])
        keys = random.key(batch["sample_id"], 7, step // 4)
        views = make_views(images, sizes, keys, CROP_AND_FLIP.views, 16)
        assert torch.equal(batch["image"], views["image"])


def test_repeats_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.repeats=0 must be at least 1"):
        pipeline(folder(tmp_path, repeats=0))


def balanced(root: Path, **keys) -> DataConfig:
    """Domains of 20, 6 and 12 samples, balanced."""
    if not root.is_dir():
        domain_tree(root, {"photo": 10, "art": 3, "sketch": 6})
    keys = {"train_split": "photo+art+sketch", "balance_domains": True, **keys}
    return config(source="folder", path=str(root), **keys)


def balanced_pipeline(cfg: DataConfig, batch_size: int = 12, **share) -> TrainPipeline:
    return pipeline(cfg, batch_size, split=cfg.train_split, **share)


@pytest.mark.parametrize("resident", [Resident.never, Resident.always])
def test_balanced_batches_have_equally_many_of_each_domain_and_new_views(
    tmp_path: Path, resident: Resident
) -> None:
    line = balanced_pipeline(balanced(tmp_path / "d", resident=resident))
    domains = np.repeat([0, 1, 2], [20, 6, 12])
    batches = list(line.batches(0, 5))
    for batch in batches:
        assert np.bincount(domains[batch["sample_id"].numpy()]).tolist() == [4, 4, 4]
    ids = torch.cat([batch["sample_id"] for batch in batches])
    counts = ids.bincount(minlength=38)
    assert counts[:20].tolist() == [1] * 20
    assert sorted(counts[20:26].tolist()) == [3, 3, 3, 3, 4, 4]
    assert sorted(counts[26:].tolist()) == [1] * 4 + [2] * 8
    images = torch.cat([batch["image"] for batch in batches])
    assert len(images.flatten(1).unique(dim=0)) == len(images)  # nor in one epoch


def test_balanced_batches_are_the_same_for_any_workers_start_and_residence(tmp_path: Path) -> None:
    cfg = balanced(tmp_path / "d", resident=Resident.never)
    expected = list(balanced_pipeline(cfg).batches(0, 10))
    for changed in ({"workers": 2}, {"resident": Resident.always}):
        assert_equal(list(balanced_pipeline(replace(cfg, **changed)).batches(0, 10)), expected)
    for start in (1, 4, 7):
        assert_equal(list(balanced_pipeline(cfg).batches(start, 10)), expected[start:])


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 4), (3, 2)])
def test_balanced_batches_are_the_same_for_any_split_of_the_batch(
    tmp_path: Path, world: int, accumulate: int
) -> None:
    cfg = balanced(tmp_path / "d")
    assert_shares_are_the_whole(partial(balanced_pipeline, cfg), world, accumulate)


def test_what_cannot_be_balanced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size=10 is no multiple of the 3 domains of d/"):
        balanced_pipeline(balanced(tmp_path / "d"), 10)
    with pytest.raises(ConfigError, match=r"d/photo/photo knows no domains"):
        balanced_pipeline(balanced(tmp_path / "d", train_split="photo"))
    with pytest.raises(ConfigError, match=r"repeats and data\.balance_domains exclude"):
        balanced_pipeline(balanced(tmp_path / "d", repeats=2))


def test_damaged_samples_are_replaced_counted_and_named(
    with_damage: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    line = pipeline(with_damage)
    batches = list(line.batches(0, 12))
    assert [len(batch["sample_id"]) for batch in batches] == [6] * 12
    damaged = {0, 5, 10}
    assert set(line.bad.reasons) == damaged
    assert not damaged & set(torch.cat([b["sample_id"] for b in batches]).tolist())
    for sample in damaged:
        name = line.source.describe(sample)
        assert caplog.text.count(name) == 1  # named once, whatever the epochs
    assert "truncated" in caplog.text
    assert "empty file" in caplog.text
    assert "not an image" in caplog.text


@pytest.mark.parametrize("resident", [Resident.never, Resident.always])
def test_too_many_damaged_samples_stop_the_run_with_the_first_named(
    with_damage: DataConfig, resident: Resident
) -> None:
    cfg = replace(with_damage, resident=resident, corrupt_limit=0.1)  # 2.4 of 24
    with pytest.raises(DataError, match=r"3 of 24 .*corrupt_limit=0\.1.*train/ant/000\.png"):
        list(pipeline(cfg).batches(0, 12))


def test_a_set_without_a_readable_sample_is_one_line(tmp_path: Path) -> None:
    cfg = folder(tmp_path, resident=Resident.never, corrupt_limit=1.0)
    for file in (tmp_path / "train").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"in a row are unreadable; last: .*empty file"):
        list(pipeline(cfg).batches(0, 1))


def test_a_file_that_vanishes_is_a_damaged_sample(tmp_path: Path) -> None:
    cfg = folder(tmp_path, resident=Resident.never)
    line = pipeline(cfg)
    (tmp_path / "train" / "bee" / "003.png").unlink()
    list(line.batches(0, 4))
    assert list(line.bad.reasons) == [11]
    assert "No such file" in line.bad.reasons[11]


def test_a_larger_batch_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size=25 is larger than the 24 samples"):
        pipeline(folder(tmp_path), 25)


def test_a_field_that_the_source_lacks_is_named(tmp_path: Path) -> None:
    needs = Needs(
        views=CROP_AND_FLIP.views, fields=(Field("caption", "B T", torch.int64, "tokens"),)
    )
    with pytest.raises(DataError, match=r"needs the field 'caption'.*image, label"):
        pipeline(folder(tmp_path), needs=needs)


class WithMasks:
    """A folder that says that it has masks too."""

    def __init__(self, cfg: DataConfig) -> None:
        self._source = open_source(cfg, "train")
        self.info = replace(self._source.info, fields=("image", "label", "mask"))

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Sample:
        return self._source.read(index)

    def describe(self, index: int) -> str:
        return self._source.describe(index)


@pytest.mark.parametrize(
    ("needs", "line"),
    [
        (Needs(views=(ViewSpec("local", (), of="mask"),)), "view 'local' is of the field 'mask'"),
        (Needs(views=(ViewSpec("a", (), of="b"), ViewSpec("b", ()))), "needs the field 'b'"),
        (
            Needs(views=(), fields=(Field("mask", "B H W", torch.bool, "where"),)),
            "reads the field 'mask'.*carry label, text, text_length",
        ),
    ],
)
def test_what_the_pipeline_cannot_carry_is_refused_when_the_run_is_built(
    tmp_path: Path, needs: Needs, line: str
) -> None:
    cfg = folder(tmp_path)
    with pytest.raises(DataError, match=line):
        TrainPipeline(
            WithMasks(cfg), needs, cfg=cfg, image_size=16, seed=7, share=Share(6), device=CPU
        )


# --- evaluation


def evaluated(cfg: DataConfig, split: str, **keys) -> list[Batch]:
    return list(evaluation(cfg, split, **keys).batches())


def evaluation(cfg: DataConfig, split: str, **keys) -> EvalPipeline:
    return EvalPipeline(
        open_source(cfg, split),
        evaluation_view(1.0),
        cfg=cfg,
        image_size=16,
        device=CPU,
        **{"batch_size": 5, **keys},
    )


@pytest.mark.parametrize(
    ("batch_size", "workers"), [(1, 0), (2, 0), (7, 0), (24, 0), (100, 0), (7, 2)]
)
def test_evaluation_sees_every_readable_sample_once_in_order(
    with_damage: DataConfig, batch_size: int, workers: int
) -> None:
    cfg = replace(with_damage, workers=workers)
    batches = evaluated(cfg, "train", batch_size=batch_size)
    ids = torch.cat([batch["sample_id"] for batch in batches])
    assert ids.tolist() == [i for i in range(24) if i not in (0, 5, 10)]
    labels = torch.cat([batch["label"] for batch in batches])
    assert labels.tolist() == [i // 8 for i in ids.tolist()]


def test_evaluation_views_do_not_depend_on_the_batch_size(with_damage: DataConfig) -> None:
    one, seven = (
        torch.cat([b["image"] for b in evaluated(with_damage, "train", batch_size=size)])
        for size in (1, 7)
    )
    assert torch.equal(one, seven)


@pytest.mark.parametrize("world", [2, 3])
def test_evaluation_shares_cover_the_split_with_equally_many_batches(
    with_damage: DataConfig, world: int
) -> None:
    parts = [evaluated(with_damage, "train", rank=r, world=world) for r in range(world)]
    assert len({len(part) for part in parts}) == 1
    seen = {i for part in parts for batch in part for i in batch["sample_id"].tolist()}
    assert seen == set(range(24)) - {0, 5, 10}


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_sample_is_of_one_share_once(with_damage: DataConfig, world: int) -> None:
    found = []
    for rank in range(world):
        line = evaluation(with_damage, "train", rank=rank, world=world)
        ids = [batch["sample_id"] for batch in line.batches()]
        found += [i for batch in ids for i in batch[line.own(batch)].tolist()]
    assert sorted(found) == sorted(set(range(24)) - {0, 5, 10})


# --- sizes


def test_images_of_many_sizes_stream_and_give_the_views_they_give_alone(tmp_path: Path) -> None:
    image_tree(tmp_path)
    for i, file in enumerate(sorted((tmp_path / "train").rglob("*.png"))):
        file.write_bytes(encode(picture(i, 20 + 3 * (i % 5))[: 18 + i % 4]))
    cfg = config(source="folder", path=str(tmp_path))
    line = pipeline(cfg, 8)
    assert line.residents is None  # auto: one size only
    together = {
        int(i): image
        for batch in line.batches(0, 3)
        for i, image in zip(batch["sample_id"], batch["image"])
    }
    alone = {
        int(batch["sample_id"]): batch["image"][0] for batch in pipeline(cfg, 1).batches(0, 24)
    }
    assert together.keys() == alone.keys()
    for i, image in together.items():
        # The canvas is as large as the batch's largest image: sums in another order.
        torch.testing.assert_close(image, alone[i], rtol=0, atol=1e-5)


def test_resident_always_refuses_many_sizes(tmp_path: Path) -> None:
    cfg = folder(tmp_path, resident=Resident.always)
    (tmp_path / "train" / "bee" / "002.png").write_bytes(encode(picture(1, 30)))
    with pytest.raises(DataError, match=r"images of one size.*data\.resident=never"):
        pipeline(cfg)


def test_resident_auto_keeps_to_its_limit(tmp_path: Path) -> None:
    cfg = folder(tmp_path)
    assert pipeline(cfg).residents is not None
    assert pipeline(replace(cfg, resident_limit_mb=0)).residents is None


class Blank:
    """`count` black images of one size."""

    def __init__(self, height: int, width: int, count: int = 8) -> None:
        self.image = np.zeros((height, width, 3), np.uint8)
        self.info = SourceInfo("blank", "train", count, ("image", "label"))

    def __len__(self) -> int:
        return self.info.num_samples

    def read(self, index: int) -> Sample:
        return {"image": self.image, "label": 0}

    def describe(self, index: int) -> str:
        return f"blank {index}"

    def labels(self) -> np.ndarray | None:
        return None


@pytest.mark.parametrize(
    ("image", "encoder", "expected"),
    [
        ((32, 32), 8, "encoder=cifar or encoder.image_size=32"),
        ((8, 8), 32, "encoder=digits or encoder.image_size=8"),
        ((96, 128), 224, "own size: encoder.image_size=96"),
        ((32, 32), 32, None),
        ((256, 341), 224, None),
    ],
)
def test_a_source_of_another_size_than_the_encoder_s_is_warned_of_once(
    image: tuple[int, int], encoder: int, expected: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    source = Blank(*image)
    for _ in TrainPipeline(
        source,
        CROP_AND_FLIP,
        cfg=config(),
        image_size=encoder,
        seed=0,
        share=Share(4),
        device=CPU,
    ).batches(0, 3):
        pass
    found = [r.getMessage() for r in caplog.records if "the encoder sees" in r.getMessage()]
    assert len(found) == (expected is not None)
    if expected:
        assert f"{image[0]}x{image[1]}" in found[0]
        assert found[0].endswith(expected)


def test_the_encoders_that_the_warning_names_exist() -> None:
    import yaml

    from vlx.config.paths import conf_dir
    from vlx.data.pipeline import _ENCODERS

    for side, name in _ENCODERS.items():
        text = (conf_dir() / "encoder" / f"{name}.yaml").read_text()
        assert yaml.safe_load(text)["image_size"] == side


# --- views


def views_of(ops: tuple, images: Tensor, keys: Tensor) -> Tensor:
    from vlx.data.views import make_views

    sizes = torch.tensor(images.shape[-2:]).expand(len(images), 2)
    return make_views(images, sizes, keys, (ViewSpec("image", ops=ops),), 32)["image"]


def test_moving_pixels_as_uint8_equals_moving_them_as_float() -> None:
    images = torch.from_numpy(np.stack([picture(i, 32) for i in range(16)])).permute(0, 3, 1, 2)
    keys = torch.arange(16)
    ops = (RandomCrop(4), HorizontalFlip())
    made = views_of(ops, images, keys)
    from vlx.core import random

    x = images.float() / 255
    sizes = torch.tensor([32, 32]).expand(16, 2)
    view_keys = random.key(keys, "image")
    for position, op in enumerate(ops):
        x = op(x, sizes, random.uniform(random.key(view_keys, position), op.draws), 32)
    torch.testing.assert_close(made, x, rtol=0, atol=1e-6)
    assert made.dtype == torch.float32


def test_two_views_of_one_image_differ_and_are_float() -> None:
    from vlx.data.views import make_views

    images = torch.from_numpy(picture(3, 32)).permute(2, 0, 1)[None].repeat(4, 1, 1, 1)
    sizes = torch.tensor([32, 32]).expand(4, 2)
    crop = RandomResizedCrop()
    specs = (
        ViewSpec("a", ops=(crop,), size=24),
        ViewSpec("b", ops=(crop, ColorJitter(brightness=0.4)), size=24),
        ViewSpec("c", ops=(HorizontalFlip(1.0),), of="a", keep=False),
        ViewSpec("d", ops=(HorizontalFlip(1.0),), of="c"),
        ViewSpec("plain", ops=()),
    )
    made = make_views(images, sizes, torch.arange(4), specs, 32)
    assert set(made) == {"a", "b", "d", "plain"}
    assert not torch.equal(made["a"], made["b"])
    assert not torch.equal(made["a"][0], made["a"][1])  # another key, another crop
    assert torch.equal(made["d"], made["a"])
    assert torch.equal(made["plain"], images.float() * (1 / 255))
    assert images.dtype == torch.uint8


def test_the_host_s_parts_travel_to_a_spawned_worker(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path), "train")
    assert pickle.loads(pickle.dumps(source)).read(3)["label"] == source.read(3)["label"]


def test_reading_with_workers_leaves_torch_s_generator_alone(tmp_path: Path) -> None:
    cfg = folder(tmp_path, resident=Resident.never, workers=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(pipeline(cfg).batches(0, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_on_a_folder_with_damaged_files_counts_them(tmp_path: Path) -> None:
    """From the config to results.json, in this process."""
    from rich.console import Console

    from vlx.commands.start import prepare
    from vlx.config.compose import compose
    from vlx.core.results import read_results
    from vlx.engine.run import execute

    cfg = folder(tmp_path / "images", damaged=3)
    overrides = [
        *("data=folder", f"data.path={cfg.path}", "data.corrupt_limit=0.2", "data.workers=0"),
        *(
            "track=none",
            "train.batch_size=8",
            "eval.at_end=[knn]",
            f"runs_dir={tmp_path}",
            "name=run",
        ),
    ]
    run_dir = prepare(compose("mae", "pretrain-mim", "smoke", overrides), overrides)
    try:
        assert execute(run_dir, console=Console(quiet=True)) == 0
        assert read_results(run_dir).bad_samples == 3
        lines = (run_dir / "log.txt").read_text().splitlines()
        skipped = [line for line in lines if "skipped unreadable sample" in line]
        assert len(skipped) == 6  # once in training, once for all evaluators
    finally:
        for handler in logging.getLogger("vlx").handlers[:]:
            if isinstance(handler, logging.FileHandler):
                logging.getLogger("vlx").removeHandler(handler)


def test_windows_larger_than_the_padded_images_are_refused(tmp_path: Path) -> None:
    cfg = folder(tmp_path)
    needs = Needs(views=(ViewSpec("image", ops=(RandomCrop(padding=1),)),))
    source = open_source(cfg, "train")
    side = int(probe_sizes(source, cfg).max())
    common = {"cfg": cfg, "seed": 0, "share": Share(6), "device": CPU}
    TrainPipeline(source, needs, image_size=side + 2, **common)
    with pytest.raises(ConfigError, match=f"crop_padding=1 cuts windows of {side + 3}"):
        TrainPipeline(source, needs, image_size=side + 3, **common)
