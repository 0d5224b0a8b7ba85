"""Towers that never change: once a run, named by every checkpoint, checked by whoever reads one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.contract.build import build
from tests.encoders.make_hf import byte_bpe
from tests.engine.compare import assert_same_bits, final
from tests.engine.inprocess import interrupt, run_here, stop_after
from tests.engine.processes import make_run
from vlx.blocks.frozen import Frozen
from vlx.blocks.momentum import MomentumCopy
from vlx.commands.export import export
from vlx.commands.replay import replay_run
from vlx.commands.start import Line, start
from vlx.core.errors import CheckpointError, DivergedError, VlxError
from vlx.core.manifest import manifest_text
from vlx.core.results import read_results
from vlx.encoders.checkpoint import read_best, read_weights
from vlx.encoders.config import TextConfig
from vlx.encoders.frozen_towers import describe_tower, digest_of, frozen_tensors, write_tower
from vlx.encoders.language_model import LanguageModel
from vlx.engine import checkpoint
from vlx.engine.nonfinite import evidence_folders
from vlx.engine.record import StepRecord

QUICK = ("train.steps=4", "train.checkpoint_every=2", "eval.at_end=[]", "data.workers=0")
MAP = {"map.weight": 48 * 48, "map.bias": 48}
TOWERS = {
    "coop": {"towers", "logit_scale"},
    "limber": {"encoder", "language_model"},
    "maple": {"towers", "logit_scale"},
    "mr-mae": {"teacher"},
    "pre": {"towers", "logit_scale"},
    "sparseformer": {"student", "teacher"},
    "unimodal-projectors": {"towers.image", "towers.text"},
    "vl2v-adip": {"teacher", "logit_scale", "student"},
}

# The others differ in no part that is here.
QUICK_SLUGS, SLOW = ("coop", "limber", "sparseformer", "unimodal-projectors"), pytest.mark.slow


@pytest.fixture(scope="module")
def limber(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that keeps its last checkpoint alone; not to be written to."""
    run_dir = make_run(
        tmp_path_factory.mktemp("limber"), "run", *QUICK, "train.keep_last=1", slug="limber"
    )
    assert run_here(run_dir)[0] == 0
    return run_dir


@pytest.fixture
def damaged(limber: Path, tmp_path: Path) -> Path:
    """A copy of it, one number of whose image tower was moved since."""
    import shutil

    run_dir = tmp_path / "run"
    shutil.copytree(limber, run_dir)
    (file,) = run_dir.glob("frozen/encoder-*.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file)
    return run_dir


def saved(run_dir: Path) -> tuple[dict[str, Tensor], dict]:
    """The newest checkpoint's own tensors and its state."""
    folder = sorted(run_dir.glob("checkpoints/step-*"))[-1]
    return load_file(folder / "model.safetensors"), json.loads((folder / "state.json").read_text())


def test_a_checkpoint_holds_what_is_trained_and_names_the_towers(limber: Path) -> None:
    own, state = saved(limber)
    assert {name: tensor.numel() for name, tensor in own.items()} == MAP
    assert sum(MAP.values()) == 2_352
    assert {row["name"]: row["values"] for row in state["frozen"]} == {
        "encoder": 62_160,
        "language_model": 104_976,
    }
    files = sorted(path.name for path in (limber / "frozen").iterdir())
    assert files == [f"{row['name']}-{row['sha256'][:16]}.safetensors" for row in state["frozen"]]
    folder = next(limber.glob("checkpoints/step-*"))
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 30_000


def test_readers_get_the_whole_model(limber: Path) -> None:
    expected = build("limber").state_dict().keys()
    (folder,) = limber.glob("checkpoints/step-*")
    for path in (limber, folder, folder / "model.safetensors"):
        assert read_weights(path).keys() == expected
    assert final(limber).model.keys() == expected


def test_encoders_and_language_models_start_from_them(limber: Path, tmp_path: Path) -> None:
    """Their names inside a run that froze them are found."""
    words = (f"encoder.checkpoint={limber}", f"text.checkpoint={limber}")
    tokenizer = f"text.tokenizer={limber}"
    run_dir = make_run(tmp_path, "next", *QUICK, *words, tokenizer, slug="limber")
    assert run_here(run_dir)[0] == 0
    assert saved(run_dir)[1]["frozen"] == saved(limber)[1]["frozen"]
    evaluate(limber)
    value = read_results(limber.parent / "evaluated").value("knn/top1")
    assert 0 < value <= 1


@pytest.mark.parametrize(
    "slug", [s if s in QUICK_SLUGS else pytest.param(s, marks=SLOW) for s in TOWERS]
)
def test_a_resume_is_the_same_run(slug: str, tmp_path: Path) -> None:
    words = (*QUICK, "train.keep_last=1")
    whole, cut = (make_run(tmp_path, name, *words, slug=slug) for name in ("whole", "cut"))
    assert run_here(whole)[0] == 0
    interrupt(cut, 1)
    assert run_here(cut)[0] == 0
    assert_same_bits(cut, whole)
    for run_dir in (whole, cut):
        own, state = saved(run_dir)
        assert {row["name"] for row in state["frozen"]} == TOWERS[slug]
        trained = {name for name, p in build(slug).named_parameters() if p.requires_grad}
        assert trained <= own.keys()
        assert len(list((run_dir / "frozen").iterdir())) == len(TOWERS[slug])


def test_a_locked_text_tower_is_one(tmp_path: Path) -> None:
    first = make_run(tmp_path, "first", *QUICK, slug="vitamin")
    assert run_here(first)[0] == 0
    assert not (first / "frozen").exists()
    words = (f"method.locked_text={first}", f"text.tokenizer={first}")
    locked = make_run(tmp_path, "locked", *QUICK, *words, slug="vitamin")
    assert run_here(locked)[0] == 0
    own, state = saved(locked)
    assert {row["name"] for row in state["frozen"]} == {"towers.projection", "towers.text"}
    assert not [name for name in own if name.startswith(("towers.text.", "towers.projection."))]
    before, after = read_weights(first), read_weights(locked)
    assert before.keys() == after.keys()
    assert torch.equal(before["towers.projection.weight"], after["towers.projection.weight"])


@pytest.mark.parametrize("tune", ["head", "lora", "layers"])
def test_a_base_beside_adapters_is_one(tmp_path: Path, tune: str) -> None:
    words = (f"method.tune={tune}", "method.tuned_layers=1")
    run_dir = make_run(tmp_path, tune, *QUICK, *words, slug="supervised")
    assert run_here(run_dir)[0] == 0
    own, state = saved(run_dir)
    assert [row["name"] for row in state["frozen"]] == ["encoder"]
    adapter = load_file(run_dir / "adapter.safetensors")
    assert own.keys() == adapter.keys()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A language model of Hugging Face in a directory."""
    folder = tmp_path / "gpt"
    folder.mkdir()
    rows = len(byte_bpe(folder, "<end>", "<pad>", eos_token="<end>", pad_token="<pad>"))
    sizes = TextConfig(name="gpt2", context_length=16, dim=32, depth=1, heads=2)
    LanguageModel(sizes, rows).model.save_pretrained(folder)
    return folder


def beside(folder: Path, name: str, *words: str) -> Path:
    """A run of limber that reads a local language model; nothing is executed."""
    sizes = ("text.dim=null", "text.depth=null", "text.heads=null", "text.vocab_size=null")
    text = (f"text.name={folder}", f"text.tokenizer={folder}", *sizes)
    return make_run(folder.parent, name, *QUICK, *text, *words, slug="limber")


def test_a_local_language_model_is_named_and_not_copied(local: Path) -> None:
    whole, cut = (beside(local, name) for name in ("whole", "cut"))
    assert run_here(whole)[0] == 0
    interrupt(cut, 1)
    assert run_here(cut)[0] == 0
    assert_same_bits(cut, whole)
    for run_dir in (whole, cut):
        rows = {row["name"]: row for row in saved(run_dir)[1]["frozen"]}
        assert rows["language_model"]["directory"] == str(local)
        assert rows["encoder"]["directory"] is None
        assert [file.name[:8] for file in (run_dir / "frozen").iterdir()] == ["encoder-"]
    evaluate(whole, "caption")
    name = "language_model.module.model.transformer.wte.weight"
    published = load_file(local / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(read_weights(whole)[name], published)


def test_a_local_language_model_that_is_another_now_is_refused(local: Path) -> None:
    run_dir = beside(local, "run")
    assert run_here(run_dir)[0] == 0
    published = load_file(local / "model.safetensors")
    moved = published | {"transformer.wte.weight": published["transformer.wte.weight"] + 1}
    save_file(moved, local / "model.safetensors", metadata={"format": "pt"})
    for read in (resume, evaluate_whole, evaluate):
        with pytest.raises(CheckpointError, match=r"language_model: the run had .*gpt now has"):
            read(run_dir)
    (local / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"language_model of .*: cannot read the weights"):
        resume(run_dir)


def test_a_local_language_model_under_other_weights_is_written(local: Path) -> None:
    words = ("method.trains=language_model",)
    first = beside(local, "first", *words)
    assert run_here(first)[0] == 0
    run_dir = beside(local, "run", f"text.checkpoint={first}")
    assert run_here(run_dir)[0] == 0
    rows = {row["name"]: row for row in saved(run_dir)[1]["frozen"]}
    assert rows["language_model"]["directory"] is None
    resume(run_dir)


# Another tower than the run's


def resume(run_dir: Path) -> None:
    run_here(run_dir)


def evaluate(run_dir: Path, name: str = "knn") -> None:
    words = [f"encoder.checkpoint={run_dir}", f"runs_dir={run_dir.parent}", "name=evaluated"]
    start(Line(command="eval", name=name, overrides=words), Console(quiet=True))


def evaluate_whole(run_dir: Path) -> None:
    evaluate(run_dir, "caption")


def start_from(run_dir: Path) -> None:
    words = (f"encoder.checkpoint={run_dir}", "encoder=glyphs", "encoder.dim=48", "encoder.depth=2")
    run_here(make_run(run_dir.parent, "next", *QUICK, *words, slug="supervised"))


def write_out(run_dir: Path) -> None:
    export(run_dir, run_dir.parent / "out", "timm", Console(quiet=True))


@pytest.mark.parametrize(
    "read", [resume, evaluate, evaluate_whole, start_from, write_out], ids=lambda f: f.__name__
)
def test_another_tower_is_refused_in_one_line(damaged: Path, read: Callable) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"frozen tower encoder: the run had sha256 \w{16}…, .* now has \w{16}",
    ) as caught:
        read(damaged)
    assert "\n" not in str(caught.value)
    assert "train again" in str(caught.value)


@pytest.mark.parametrize("read", [resume, start_from], ids=lambda f: f.__name__)
def test_a_tower_that_is_gone_is_refused_and_nothing_starts_anew(
    damaged: Path, read: Callable
) -> None:
    (file,) = damaged.glob("frozen/language_model-*.safetensors")
    next(damaged.glob("frozen/encoder-*.safetensors")).unlink()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"frozen tower encoder of .* is gone"):
        read(damaged)
    assert (damaged / "checkpoints" / "step-00000004").is_dir()


@pytest.mark.parametrize(
    "wrong", [{"name": "../../encoder"}, {"directory": "llama"}, {"sha256": "../x"}]
)
def test_a_name_that_leads_elsewhere_is_refused(
    wrong: dict[str, str], limber: Path, tmp_path: Path
) -> None:
    (folder,) = limber.glob("checkpoints/step-*")
    state = json.loads((folder / "state.json").read_text())
    state["frozen"][0] |= wrong
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "manifest.json").write_text(manifest_text(tmp_path))
    with pytest.raises(CheckpointError, match="is no name of a frozen tower"):
        read_weights(tmp_path)


def test_checkpoints_with_all_weights_go_on(
    tmp_path: Path, limber: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they were written before: the towers are put apart by the next save."""
    import shutil

    run_dir = make_run(tmp_path, "run", *QUICK, "train.keep_last=1", slug="limber")
    interrupt(run_dir, 2)
    snapshot = final(run_dir)
    snapshot.towers = []
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    checkpoint.save(run_dir / "checkpoints", snapshot)
    monkeypatch.undo()
    shutil.rmtree(run_dir / "frozen")
    assert run_here(run_dir)[0] == 0
    assert_same_bits(run_dir, limber)
    assert saved(run_dir)[0].keys() == MAP.keys()


# Retention, the best checkpoint, evidence


def test_files_that_no_checkpoint_names_are_removed_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path, "run", *QUICK, "train.keep_last=1", slug="limber")
    folder = run_dir / "frozen"
    stray = {"w": torch.zeros(2)}
    write_tower(folder, describe_tower("encoder", stray), stray)
    (folder / ".tmp-encoder-1").write_bytes(b"a killed write")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run_here(run_dir)
    kept = {path.name for path in folder.iterdir()}
    assert len(kept) == 2
    assert run_here(run_dir)[0] == 0
    assert {path.name for path in folder.iterdir()} == kept
    assert len(list(run_dir.glob("checkpoints/step-*"))) == 1


def test_the_best_checkpoint_refers_to_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlx.engine.run import Run

    scores = iter([0.9, 0.1])
    monkeypatch.setattr(Run, "_evaluate_during", lambda self, step: {"x": next(scores)})
    words = ("train.keep_best=x", "train.keep_last=1", "eval.every_steps=2")
    run_dir = make_run(tmp_path, "run", *QUICK, *words, slug="limber")
    assert run_here(run_dir)[0] == 0
    best = read_best(run_dir)
    assert best is not None
    assert best.keys() == build("limber").state_dict().keys()
    assert not torch.equal(best["map.weight"], final(run_dir).model["map.weight"])


def test_evidence_is_replayed_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step called bad whose numbers are finite, so that they can be compared."""
    run_dir = make_run(tmp_path, "run", *QUICK, "train.max_skipped_steps=0", slug="limber")
    with monkeypatch.context() as patch:
        patch.setattr(StepRecord, "is_finite", lambda self, *, gradients: False)
        with pytest.raises(DivergedError):
            run_here(run_dir)
    (folder,) = evidence_folders(run_dir)
    (weights,) = folder.glob("step-*/model.safetensors")
    assert load_file(weights).keys() == MAP.keys()
    found = replay_run(run_dir, Console(quiet=True))
    assert found.micro_batches[0].losses == found.evidence.losses
    assert found.grad_norm == found.evidence.grad_norm
    next(run_dir.glob("frozen/encoder-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"frozen tower encoder of .* is gone"):
        replay_run(run_dir, Console(quiet=True))


# What a tower is


def test_the_digest_is_of_names_types_shapes_and_bytes() -> None:
    base = {"a": torch.arange(6.0), "b": torch.zeros(2, dtype=torch.bfloat16)}
    assert digest_of(base) == digest_of(dict(reversed(base.items())))
    others = [
        {**base, "a": torch.arange(6.0).view(2, 3)},
        {**base, "b": torch.zeros(2, dtype=torch.float16)},
        {"c": base["a"], "b": base["b"]},
        {**base, "a": torch.arange(6.0) + 1},
    ]
    assert len({digest_of(found) for found in (base, *others)}) == 5
    transposed = torch.arange(6.0).view(3, 2).T
    assert digest_of({"a": transposed}) == digest_of({"a": transposed.clone()})


def test_tied_weights_are_written_and_read(tmp_path: Path) -> None:
    table = torch.rand(3, 2)
    tensors = {"head": table, "table": table, "part": table[1:]}
    tower = describe_tower("lm", tensors)
    write_tower(tmp_path, tower, tensors)
    assert digest_of(load_file(tmp_path / tower.file)) == tower.sha256


def test_a_teacher_that_follows_stays_in_checkpoints() -> None:
    method = build("mae")
    method.teacher = Frozen(MomentumCopy(method.encoder, 0.99))
    method.fixed = Frozen(nn.Sequential(nn.Linear(2, 2)))
    assert frozen_tensors(method) == {"fixed": ["fixed.module.0.weight", "fixed.module.0.bias"]}


def test_running_statistics_beside_what_is_trained_stay_in_checkpoints() -> None:
    method = build("mae")
    method.base = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2))
    method.frozen_parts = lambda: ("base",)
    assert frozen_tensors(method) == {"base": ["base.0.weight", "base.0.bias"]}


def test_a_tower_that_changes_after_all_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlx.methods.limber import Limber

    def moved(self: Limber, ctx: object) -> None:
        with torch.no_grad():
            next(self.encoder.parameters()).add_(1)

    monkeypatch.setattr(Limber, "after_step", moved)
    run_dir = make_run(tmp_path, "run", *QUICK, slug="limber")
    with pytest.raises(VlxError, match=r"encoder\.module\.\S+ and 0 more changed"):
        run_here(run_dir)
    assert not list(run_dir.glob("checkpoints/step-*"))


def test_the_result_says_which_weights_it_is_of(limber: Path) -> None:
    whole = checkpoint.weights_checksum(final(limber).model)
    assert read_results(limber).weights_checksum == whole
