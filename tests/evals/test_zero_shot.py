"""`vlx eval zero-shot` against scikit-learn, on the same embeddings; names and templates."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import build_zero_shot_classifier
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor
from torch.nn.functional import normalize

from tests.evals.twin import Pairs, Twin, eval_data, subject, vector
from vlx.core.errors import ConfigError
from vlx.engine.evaluate import run_evaluators
from vlx.evals.base import Subject
from vlx.evals.class_texts import class_texts, class_words
from vlx.evals.config import EvalConfig, Templates
from vlx.evals.feature_cache import FeatureCache
from vlx.evals.ranking import similarity
from vlx.evals.registry import evaluator
from vlx.evals.zero_shot import classifier, classify, confusions, one_of_equals


class Labeller(Twin):
    """Images near the vector of their class's sentence."""

    def image_vector(self, index: int) -> Tensor:
        name = self.source.info.class_names[self.source.own[index]]
        return vector(name.replace("_", " ")) + self.noise * vector(f"image {index}")


def scores_of(source: Pairs, twin: Labeller) -> np.ndarray:
    images = normalize(torch.stack([twin.image_vector(i) for i in range(len(source))]), dim=1)
    names = [name.replace("_", " ") for name in source.info.class_names]
    return similarity(images, normalize(torch.stack([vector(name) for name in names]), dim=1))


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_metrics_equal_scikit_learns(batch_size: int) -> None:
    source = Pairs(120, classes=("alpha", "beta", "gamma", "delta", "eps", "zeta", "eta"))
    source.own[source.own == 4] = 5  # a class without samples
    twin = Labeller(source, noise=2.0)
    data = eval_data(source, templates=Templates.none, batch_size=batch_size)
    found = evaluator("zero-shot").run(Subject("twin", (twin,)), data)
    scores = scores_of(source, twin).numpy()
    guess = scores.argmax(1)
    assert 0.3 < found.metrics["top1"] < 0.9
    assert found.metrics["top1"] == accuracy_score(source.own, guess)
    assert found.metrics["top5"] == top_k_accuracy_score(source.own, scores, k=5, labels=range(7))
    assert found.metrics["mean-per-class"] == pytest.approx(
        balanced_accuracy_score(source.own, guess), abs=1e-15
    )
    hits, samples = found.lists["hits-by-class"], found.lists["samples-by-class"]
    assert hits == [int(((guess == c) & (source.own == c)).sum()) for c in range(7)]
    assert samples == np.bincount(source.own, minlength=7).tolist()
    assert found.num_samples == 120


def test_five_classes_have_no_top5() -> None:
    source = Pairs(20, classes=("one", "two", "three", "four", "five"))
    found = evaluator("zero-shot").run(subject(source), eval_data(source))
    assert set(found.metrics) == {"top1", "mean-per-class"}


def test_a_tie_is_a_miss() -> None:
    features, classes = torch.ones(3, 4), torch.ones(6, 4)
    place, guess = classify(features, classes, torch.tensor([0, 2, 5]))
    assert place.tolist() == [6, 6, 6]
    assert guess.tolist() == [0, 0, 0]
    lost, _ = classify(torch.full((1, 4), torch.nan), classes, torch.tensor([0]))
    assert lost.tolist() == [6]


def test_blocks_do_not_change_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    features, classes = torch.randn(50, 8), torch.randn(9, 8)
    labels = torch.randint(0, 9, (50,))
    whole = classify(features, classes, labels)
    monkeypatch.setattr("vlx.evals.zero_shot.BLOCK_BYTES", 16 * 9 * 3)
    for expected, found in zip(whole, classify(features, classes, labels)):
        assert torch.equal(expected, found)


# Names and templates


class OpenClips:
    """open_clip's own builder asks for a model and a tokenizer of this kind."""

    def encode_text(self, tokens: list[str], normalize: bool) -> Tensor:
        rows = torch.stack([vector(text) for text in tokens])
        return torch.nn.functional.normalize(rows, dim=1) if normalize else rows


@pytest.mark.parametrize("batch_size", [1, 200, 1000])
def test_classes_equal_open_clips(batch_size: int) -> None:
    names = IMAGENET_CLASSNAMES[:7]

    class Texts(list):
        def to(self, device: str) -> Texts:
            return self

    theirs = build_zero_shot_classifier(
        OpenClips(), tokenizer=Texts, classnames=names, templates=OPENAI_IMAGENET_TEMPLATES,
        num_classes_per_batch=3,
    )  # fmt: skip
    source = Pairs(5, classes=names)
    data = eval_data(source, templates=Templates.imagenet, batch_size=batch_size)
    own = classifier(subject(source), data, names)
    torch.testing.assert_close(own, theirs.T, atol=1e-6, rtol=0)


def test_templates_of_each_set() -> None:
    def texts(**keys) -> list[str]:
        (found,) = class_texts(["big dog"], EvalConfig(**keys))
        return found

    assert texts(templates=Templates.none) == ["big dog"]
    assert len(texts()) == 7
    assert "itap of a big dog." in texts()
    assert len(texts(templates=Templates.imagenet)) == 80
    own = ["a {} {{x}}", "no. {}"]
    assert texts(template_list=own) == ["a big dog {{x}}", "no. big dog"]
    with pytest.raises(ConfigError, match=r"eval\.template_list: 'a photo' has no \{\} where"):
        EvalConfig(template_list=["a photo of {}", "a photo"])


def test_underscores_are_spaces_and_wordnet_ids_are_open_clips_names(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert class_words(["hot_dog", "n01440764"]) == ["hot dog", "n01440764"]
    ids = ImageNetInfo().label_names()
    assert class_words(ids) == list(IMAGENET_CLASSNAMES)
    assert class_words([ids[207], ids[2]]) == ["Golden Retriever", "great white shark"]
    assert not caplog.text
    assert class_words([ids[0], "n99999999"]) == ["tench", "n99999999"]
    assert "1 classes are not ImageNet's 1000 and keep ids as names: n99999999" in caplog.text


# Confusions


def test_confusions_come_by_their_number(caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    guess = torch.tensor([1, 1, 0, 0, 0, 0, 0])
    assert confusions(labels, guess, 3) == [(2, 0, 3), (0, 1, 2), (1, 0, 1)]
    source = Pairs(120)
    with caplog.at_level(logging.INFO, "vlx"):
        found = evaluator("zero-shot").run(subject(source), eval_data(source))
    (line,) = [r.message for r in caplog.records if "confused" in r.message]
    assert line.startswith("zero-shot, trained weights: most often confused: ")
    assert line.count(" as ") == 5
    picture = found.pictures["confusions"]
    assert picture.size == (6 + 102 + 386, 22 + 8 * 102 + 6)


def test_no_confusion_no_picture() -> None:
    source = Pairs(20)
    twin = Labeller(source, noise=0.0)
    data = eval_data(source, templates=Templates.none)
    found = evaluator("zero-shot").run(Subject("twin", (twin,)), data)
    assert found.metrics == {"top1": 1, "top5": 1, "mean-per-class": 1}
    assert found.pictures == {}


# Two processes


def _on_two(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache{rank}"  # as on two machines
    first, second = _numbers(rank, 2), _numbers(rank, 2)
    torch.save((first, second), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def _numbers(rank: int = 0, world: int = 1) -> tuple[list[tuple[str, float, int]], bool]:
    """What is measured, and whether anything had to be encoded for it."""
    source = Pairs(31, bad=(4,), duplicates=True)
    twin = Twin(source)
    subject = Subject("twin", (twin,))
    subject.cache = FeatureCache("twin", rank=rank, world=world)
    data = eval_data(source, rank=rank, world=world, rerank=4, caption_samples=9)
    names = ["zero-shot", "retrieval", "caption"]
    found = run_evaluators(
        names, subject, data, weights="trained", pictures_dir=None, main=rank == 0
    )
    numbers = [(m.name, m.value, m.num_samples) for m in found.metrics]
    return numbers, twin.num_images + twin.num_texts > 0


@pytest.mark.slow
def test_two_processes_measure_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engine.processes import forkserver

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        forkserver().Process(target=_on_two, args=(rank, port, str(tmp_path))) for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here, _ = _numbers()
    assert len(here) == 3 + 11 + 8 + 6
    for rank in range(2):
        first, second = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert first == (here, True)
        assert second == (here, False)  # the main process's files serve both
    assert (tmp_path / "cache0").exists()
    assert not (tmp_path / "cache1").exists()


def test_classes_of_equal_texts_are_one_class(caplog: pytest.LogCaptureFixture) -> None:
    source = Pairs(60, classes=("missile", "b", "c", "missile", "d", "e", "f"))
    twin = Labeller(source, noise=0.5)
    data = eval_data(source, templates=Templates.none)
    found = evaluator("zero-shot").run(Subject("twin", (twin,)), data)
    scores = scores_of(source, twin)[:, [0, 1, 2, 4, 5, 6]].numpy()
    own = np.array([0, 1, 2, 0, 3, 4, 5])[source.own]
    assert found.metrics["top1"] == accuracy_score(own, scores.argmax(1))
    assert found.metrics["top1"] > 0.9  # a tie was a miss for both
    assert found.metrics["merged"] == 1
    assert found.lists["merged-classes"] == [0, 3]
    assert found.lists["samples-by-class"] == np.bincount(own, minlength=6).tolist()
    assert "classes of equal texts count as one: missile (0 and 3)" in caplog.text


def test_open_clips_imagenet_names_hold_two_names_twice() -> None:
    names = class_words(ImageNetInfo().label_names())
    merged, left, of_class = one_of_equals(names, eval_data(Pairs(4)))
    assert merged == [(657, 744), (836, 837)]
    assert len(left) == 998
    assert [left[place] for place in of_class] == names
