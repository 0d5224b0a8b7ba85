"""FIELD-NOTES section 4, test 8: evaluations do not depend on how they are run; and parity with
naive loops and scikit-learn."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlx.core.capability import Capability, ClassLogits, ImageFeatures, Reconstruction
from vlx.core.errors import ConfigError, VlxError
from vlx.core.step import StepContext
from vlx.data.config import DataConfig
from vlx.data.open import open_source
from vlx.data.subset import Subset, evenly
from vlx.encoders.base import EncoderFeatures
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig
from vlx.engine.evaluate import run_evaluators
from vlx.evals import knn, probe
from vlx.evals.base import EvalData, Subject
from vlx.evals.config import EvalConfig
from vlx.evals.features import Features, extract
from vlx.evals.knn import knn_predict
from vlx.evals.pictures import grid, to_picture
from vlx.evals.probe import fit_logistic
from vlx.evals.registry import EVALUATORS, evaluator

DATA = DataConfig(workers=0)
ENCODER = EncoderConfig(
    name="vit_tiny_patch16_224", image_size=8, patch_size=2, dim=48, depth=2, heads=3,
    mean=[0.3] * 3, std=[0.4] * 3,
)  # fmt: skip


class Painter(Reconstruction):
    """Hides the left half and paints it grey."""

    def reconstruct(self, images: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        painted = images.clone()
        painted[..., : images.shape[-1] // 2] = 0.5
        return painted, painted


class Linear(ClassLogits):
    """Ten random linear functions of the pixels."""

    def class_logits(self, images: Tensor) -> Tensor:
        weight = torch.randn(10, 192, generator=torch.Generator().manual_seed(0))
        return 3 * images.flatten(1) @ weight.T


def subject() -> Subject:
    torch.manual_seed(0)
    encoder = EncoderBuilder({"encoder": ENCODER}, num_classes=0).vision().eval()
    return Subject("test", (EncoderFeatures(encoder), Painter()))


def eval_data(batch_size: int = 256, **keys: int) -> EvalData:
    return EvalData(
        DATA, EvalConfig(batch_size=batch_size), image_size=8, device=torch.device("cpu"), **keys
    )


def features(split: str, data: EvalData) -> Features:
    return extract(subject().get(ImageFeatures).image_features, data.pipeline(split))


@pytest.fixture(scope="module")
def train() -> Features:
    return features("train", eval_data())


@pytest.fixture(scope="module")
def test() -> Features:
    return features("test", eval_data())


def predictions(train: Features, test: Features) -> tuple[Tensor, Tensor]:
    """By k-NN and by the probe, in the order of the samples."""
    nearest = knn_predict(train.features, train.labels, test.features, 10)
    mean, std = train.features.mean(0), train.features.std(0)
    weight, bias = fit_logistic((train.features - mean) / std, train.labels, 10)
    return nearest, ((test.features - mean) / std @ weight.T + bias).argmax(1)


@pytest.mark.parametrize("batch_size", [7, 512])
def test_classification_reports_the_mean_cross_entropy(batch_size: int) -> None:
    data = eval_data(batch_size)
    found = evaluator("classification").run(Subject("test", (Linear(),)), data)
    images = torch.cat([batch["image"] for batch in data.pipeline("test").batches()])
    logits, labels = Linear().class_logits(images), np.asarray(data.source("test").labels())
    own = logits.double().log_softmax(1)[range(len(labels)), labels]
    assert found.metrics["loss"] == pytest.approx(-float(own.mean()), rel=1e-6)
    assert found.metrics["top1"] == np.mean(logits.argmax(1).numpy() == labels)
    assert found.units == {"loss": "nats"}


# Invariance


def test_every_sample_once_in_the_order_of_the_source(train: Features, test: Features) -> None:
    for split, found in (("train", train), ("test", test)):
        source = open_source(DATA, split)
        assert torch.equal(found.sample_id, torch.arange(len(source)))
        assert torch.equal(found.labels, torch.from_numpy(np.asarray(source.labels())))


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_batch_size_does_not_change_a_prediction(
    batch_size: int, train: Features, test: Features
) -> None:
    data = eval_data(batch_size)
    other_train = features("train", data) if batch_size > 1 else train  # 1437 forwards: too slow
    other = features("test", data)
    assert torch.equal(other.sample_id, test.sample_id)
    for expected, found in zip(predictions(train, test), predictions(other_train, other)):
        assert torch.equal(expected, found)


def test_order_of_the_samples_does_not_change_a_prediction(train: Features, test: Features) -> None:
    def shuffled(found: Features, seed: int) -> tuple[Features, Tensor]:
        order = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(seed))
        return Features(found.features[order], found.labels[order], found.sample_id[order]), order

    other_train, _ = shuffled(train, 1)
    other_test, order = shuffled(test, 2)
    for expected, found in zip(predictions(train, test), predictions(other_train, other_test)):
        assert torch.equal(expected[order], found)


def _evaluate_on_two(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    data = eval_data(batch_size=7, rank=rank, world=2)
    found = {split: features(split, data) for split in ("train", "test")}
    numbers = run_evaluators(
        ["knn", "linear-probe", "reconstruction"], subject(), data, weights="trained",
        pictures_dir=Path(folder), main=rank == 0,
    )  # fmt: skip
    state = {split: vars(f) for split, f in found.items()}
    metrics = [(m.name, m.value, m.num_samples) for m in numbers.metrics]
    torch.save({"features": state, "metrics": metrics}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_predict_like_one(train: Features, test: Features, tmp_path: Path) -> None:
    from tests.engine.processes import forkserver

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        forkserver().Process(target=_evaluate_on_two, args=(rank, port, str(tmp_path)))
        for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    two = {split: Features(**values) for split, values in ranks[0]["features"].items()}
    for one, other in ((train, two["train"]), (test, two["test"])):
        assert torch.equal(one.sample_id, other.sample_id)
        assert torch.equal(one.labels, other.labels)
    for expected, found in zip(predictions(train, test), predictions(two["train"], two["test"])):
        assert torch.equal(expected, found)
    here = run_evaluators(
        ["knn", "linear-probe", "reconstruction"], subject(), eval_data(), weights="trained",
        pictures_dir=tmp_path / "one",
    )  # fmt: skip
    for metric, (name, value, count) in zip(here.metrics, ranks[0]["metrics"], strict=True):
        assert (metric.name, metric.num_samples) == (name, count)
        assert metric.value == pytest.approx(value, abs=1e-7)
    name = "reconstruction-trained.png"
    own, other = (tmp_path / "one" / name).read_bytes(), (tmp_path / name).read_bytes()
    assert own == other
    assert multiprocessing.active_children() == []


# Parity


def test_knn_equals_a_naive_loop(train: Features, test: Features) -> None:
    """Wu et al. (2018): votes exp(cosine / 0.07) of the 20 nearest."""
    predicted = knn_predict(train.features, train.labels, test.features[:40], 10)
    rows = train.features.double().numpy()
    for query, expected in zip(test.features[:40].double().numpy(), predicted.tolist()):
        cosine = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
        votes = [0.0] * 10
        for neighbour in np.argsort(-cosine)[:20]:
            votes[int(train.labels[neighbour])] += math.exp(cosine[neighbour] / 0.07)
        assert int(np.argmax(votes)) == expected


def test_knn_with_fewer_samples_than_neighbours() -> None:
    train, labels = torch.eye(3), torch.tensor([2, 0, 1])
    assert knn_predict(train, labels, torch.eye(3), 3).tolist() == [2, 0, 1]


class Largest(TorchDispatchMode):
    """Values of the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return made


def test_knn_in_blocks_equals_the_dense_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_COLUMNS", 7)
    draw = torch.Generator().manual_seed(0)
    train, test = torch.randn(60, 8, generator=draw), torch.randn(30, 8, generator=draw)
    labels = torch.randint(0, 5, (60,), generator=draw)
    a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (train, test))
    similarity, index = (b @ a.T).topk(20)
    votes = torch.zeros(30, 5, dtype=torch.float64)
    votes.scatter_add_(1, labels[index], (similarity / 0.07).exp())
    assert torch.equal(knn_predict(train, labels, test, 5), votes.argmax(1))


def test_knn_and_probe_never_hold_all_pairs() -> None:
    """300,000 training rows: all similarities to 1,024 images would be 307 million values."""
    rows, tests, width = 300_000, 1024, 4
    draw = torch.Generator().manual_seed(0)
    train, test = torch.randn(rows, width, generator=draw), torch.randn(tests, width)
    labels = torch.arange(rows) % 1000
    with Largest() as knn_s:
        knn_predict(train, labels, test, 1000)
    assert knn_s.size <= knn._BLOCK * knn._COLUMNS < rows * tests / 10
    with Largest() as probe_s, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "MAX_ITERATIONS", 1)
        fit_logistic(train, labels, 1000)
    assert probe_s.size <= probe.BLOCK_BYTES // 4 < rows * 1000 / 10


def test_probe_in_blocks_is_the_probe(train: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step: nearer to the end rounding grows with the condition of the problem."""
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 5)
    x, labels = train.features.double(), train.labels
    whole = fit_logistic((x - x.mean(0)) / x.std(0), labels, 10)
    monkeypatch.setattr(probe, "BLOCK_BYTES", 100 * 10 * 8)
    blocks = fit_logistic((x - x.mean(0)) / x.std(0), labels, 10)
    for a, b in zip(whole, blocks):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_probe_equals_scikit_learns(train: Features, test: Features) -> None:
    """The same objective (C = 1, no penalty on the bias) on the same standardised features."""
    mean, std = train.features.mean(0), train.features.std(0)
    x, y = (train.features - mean) / std, (test.features - mean) / std
    weight, bias = fit_logistic(x, train.labels, 10)
    peer = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8)
    peer.fit(x.double().numpy(), train.labels.numpy())
    own = (y @ weight.T + bias).argmax(1).numpy()
    assert (own == peer.predict(y.double().numpy())).all()

    def objective(w: Tensor, b: Tensor) -> float:
        logits = x.double() @ w.double().T + b.double()
        loss = torch.nn.functional.cross_entropy(logits, train.labels, reduction="sum")
        return float(loss + w.double().square().sum() / 2)

    best = objective(torch.from_numpy(peer.coef_), torch.from_numpy(peer.intercept_))
    assert objective(weight, bias) == pytest.approx(best, rel=1e-5)


def test_probe_survives_a_constant_feature() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 1.0
    data = eval_data()

    class Constant(ImageFeatures):
        def image_features(self, images: Tensor) -> Tensor:
            flat = images.flatten(1)
            return torch.cat([flat[:, :8], torch.ones(len(images), 1)], 1)

        def patch_features(self, images: Tensor) -> Tensor:
            raise NotImplementedError

    found = evaluator("linear-probe").run(Subject("constant", (Constant(),)), data)
    assert 0.1 < found.metrics["top1"] < 1


# The picture


def test_grid_has_the_stated_layout() -> None:
    found = evaluator("reconstruction").run(subject(), eval_data())
    picture = found.pictures["reconstruction"]
    # 8 rows of 8 columns (original, masked, reconstruction, five neighbours) of 96 pixels, 6
    # apart, 22 of title above and 18 more before the neighbours.
    assert picture.size == (6 + 8 * 102 + 18, 22 + 8 * 102 + 6)
    assert found.num_samples == 8
    source = open_source(DATA, "test")
    pixels = np.asarray(picture).astype(int)
    for row, index in enumerate(np.linspace(0, len(source) - 1, 8).round().astype(int)):
        top = 22 + row * 102
        original = pixels[top : top + 96, 6:102]
        expected = np.asarray(source.read(int(index))["image"]).repeat(12, 0).repeat(12, 1)
        assert np.abs(original - expected).max() <= 1
        masked = pixels[top : top + 96, 108:204]
        assert (masked[:, :48] == 128).all()
        assert (masked[:, 48:] == original[:, 48:]).all()
    hidden = torch.stack([_image(source, i) for i in np.linspace(0, 359, 8).round().astype(int)])
    error = (hidden[..., :4] - 0.5).square().mean().item() / 2
    assert found.metrics["mse"] == pytest.approx(error, rel=1e-4)


def _image(source, index: int) -> Tensor:
    array = np.asarray(source.read(int(index))["image"])
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("batch_size", [1, 7])
def test_picture_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    whole = evaluator("reconstruction").run(subject(), eval_data())
    if batch_size == 1:  # its neighbours are 1437 forwards away
        plain = Subject("plain", (Painter(),))
        whole = evaluator("reconstruction").run(plain, eval_data())
        other = evaluator("reconstruction").run(plain, eval_data(1))
    else:
        other = evaluator("reconstruction").run(subject(), eval_data(batch_size))
    assert other.metrics == whole.metrics
    pictures = [f.pictures["reconstruction"].tobytes() for f in (whole, other)]
    assert pictures[0] == pictures[1]


def test_pictures_are_enlarged_by_whole_pixels() -> None:
    image = torch.rand(3, 8, 8)
    picture = np.asarray(to_picture(image))
    assert picture.shape == (96, 96, 3)
    assert (picture[::12, ::12] == (image * 255).round().permute(1, 2, 0).numpy()).all()
    assert to_picture(torch.rand(3, 224, 224)).size == (224, 224)
    assert grid([[to_picture(image)] * 2], [(0, "a")]).size == (6 + 2 * 102, 22 + 102 + 6)


# What runs


class Unlabelled:
    """The digits without their labels."""

    def __init__(self, split: str) -> None:
        self._source = open_source(DATA, split)
        self.info = replace(self._source.info, class_names=(), fields=("image",))

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> dict:
        return {"image": self._source.read(index)["image"]}

    def describe(self, index: int) -> str:
        return self._source.describe(index)

    def labels(self) -> None:
        return None


def test_unlabelled_source_skips_what_needs_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = eval_data()
    monkeypatch.setattr(data, "source", Unlabelled)
    with caplog.at_level(logging.INFO, "vlx"):
        outcome = run_evaluators(
            ["knn", "linear-probe", "reconstruction"], subject(), data, weights="trained",
            pictures_dir=tmp_path,
        )  # fmt: skip
    assert [m.name for m in outcome.metrics] == ["reconstruction/mse"]
    assert "knn not run: digits has no labels" in caplog.text
    assert "linear-probe not run: digits has no labels" in caplog.text
    assert [p.name for p in outcome.pictures] == ["reconstruction-trained.png"]


def test_missing_capability_is_named(caplog: pytest.LogCaptureFixture) -> None:
    only_features = Subject("features", subject().capabilities[:1])
    with caplog.at_level(logging.INFO, "vlx"):
        outcome = run_evaluators(
            ["reconstruction"], only_features, eval_data(), weights="trained", pictures_dir=None
        )
    assert outcome.metrics == []
    assert "reconstruction not run: it needs Reconstruction" in caplog.text
    with pytest.raises(VlxError, match=r"needs Reconstruction; features exports ImageFeatures"):
        only_features.get(Reconstruction)


@pytest.mark.parametrize("name", EVALUATORS)
def test_evaluators_name_themselves_as_the_registry_does(name: str) -> None:
    found = evaluator(name)
    assert found.name == name
    assert found.version >= 1
    assert all(issubclass(kind, Capability) for kind in found.requires)


def test_unknown_evaluator_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no evaluation 'knm'\. Did you mean knn\?"):
        evaluator("knm")


# Unreadable samples


class HalfDamaged(Subset):
    """Every second sample cannot be read."""

    def read(self, index: int) -> dict:
        if index % 2:
            raise OSError("damaged")
        return super().read(index)


def test_unreadable_samples_are_left_out_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    data = EvalData(
        DataConfig(workers=0, corrupt_limit=1.0), EvalConfig(batch_size=3), image_size=8,
        device=torch.device("cpu"),
    )  # fmt: skip
    source = HalfDamaged(open_source(DATA, "test"), np.arange(10))
    monkeypatch.setattr(data, "source", lambda split: source)
    found = features("test", data)
    assert found.sample_id.tolist() == [0, 2, 4, 6, 8]


def test_even_subset_spans_the_source() -> None:
    source = open_source(DATA, "test")
    chosen = evenly(source, 3)
    assert [chosen.describe(i) for i in range(3)] == [source.describe(i) for i in (0, 180, 359)]
    assert chosen.info.num_samples == len(chosen) == 3
    labels = chosen.labels()
    assert labels is not None
    assert labels.tolist() == np.asarray(source.labels())[[0, 180, 359]].tolist()
    assert len(evenly(source, 10_000)) == 360
