"""What every method must keep to, parametrised over the registry.

An exception is an entry of `Paper.waive`, (check, reason); a waiver that is not needed fails.
"""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.contract.build import (
    build,
    config,
    context,
    engine_steps,
    seeded_step,
    smoke_batch,
)
from vlx.config.compose import compose
from vlx.config.meanings import describe
from vlx.config.paths import presets
from vlx.core import registry
from vlx.core.method import Trainable
from vlx.data.pipeline import Share
from vlx.encoders.frozen_towers import frozen_tensors
from vlx.engine.checkpoint import Snapshot, load, load_optimizer, optimizer_tensors, save
from vlx.engine.ema import Ema
from vlx.engine.load import run_config
from vlx.engine.optim import build_optimizer
from vlx.engine.rundir import config_hash
from vlx.engine.step import total

SLUGS = sorted(registry.papers())
GOLDEN = ROOT / "tests" / "golden"

pytestmark = pytest.mark.parametrize("slug", SLUGS)


def waived(slug: str, check: str) -> str | None:
    return dict(registry.papers()[slug].waive).get(check)


def train(slug: str, method: Trainable, batches: list, optimizer, first_step=0, ema=None) -> list:
    """Updates by the engine's own step; returns the losses."""
    share = Share(len(batches[0]["sample_id"]))
    steps = engine_steps(slug, method, optimizer, share, average=ema)
    losses = []
    for number, batch in enumerate(batches, start=first_step):
        steps.begin(number)
        record = steps.gradients(number, iter([batch]))
        steps.update(number)
        losses.append(float(total(record.mean_losses())))
    return losses


def optimizer_for(slug: str, method: Trainable, lr: float = 1e-3):
    optimizer = build_optimizer(config(slug).optim, method.param_groups(), lr)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return optimizer


def test_files_and_metadata(slug: str) -> None:
    entry = registry.find(slug)
    stem = slug.replace("-", "_")
    assert entry.file.stem == stem or entry.file.parent.name == stem
    assert (ROOT / "conf" / "recipe" / f"{slug}.yaml").is_file()
    assert (ROOT / "tests" / "methods" / f"test_{stem}.py").is_file()
    assert {"smoke", "tiny", "paper"} <= presets(slug).keys()


def test_docstring_names_its_source(slug: str) -> None:
    module = importlib.import_module(registry.find(slug).module)
    paper = registry.papers()[slug]
    assert str(paper.year) in (module.__doc__ or "")
    assert module.METHOD.Config is not None


def test_config_is_documented_and_builds_twice_alike(slug: str) -> None:
    for name, key in describe(slug).items():
        assert key.meaning, f"{slug}: {name} has no docstring"
    cfg = config(slug)
    before = copy.deepcopy(cfg)
    first, second = build(slug), build(slug)
    assert cfg == before
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items()):
        assert torch.equal(a, b), name


def test_every_preset_composes_and_its_config_survives_a_round_trip(slug: str) -> None:
    command = registry.papers()[slug].commands[0]
    for preset in presets(slug):
        plain = compose(slug, command, preset)
        assert run_config(json.loads(json.dumps(plain))) == run_config(plain)
        assert config_hash(plain) == config_hash(compose(slug, command, preset))


class Recording(dict):
    """A batch that remembers which keys were read."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def test_needs_are_honest_and_the_batch_is_left_alone(slug: str) -> None:
    method = build(slug)
    batch = smoke_batch(slug)
    kept = {key: value.clone() for key, value in batch.items()}
    recording = Recording(batch)
    seeded_step(method, recording)
    declared = set(type(method).needs(config(slug).method).batch_keys)
    assert recording.read - {"sample_id"} == declared
    assert all(torch.equal(batch[key], kept[key]) for key in kept)


def test_its_blocks_run_through_their_own_forward_unless_it_says_otherwise(slug: str) -> None:
    """What FSDP asks for: it gathers the weights of a block around the block's forward alone."""
    method = build(slug)
    running: list[torch.nn.Module] = []
    outside: list[str] = []
    for block in method.transformer_blocks():

        def check(part: torch.nn.Module, args: Any, block: torch.nn.Module = block) -> None:
            if block not in running:
                outside.append(type(part).__name__)

        block.register_forward_pre_hook(lambda block, args: running.append(block))
        block.register_forward_hook(lambda block, args, out: running.remove(block))
        for part in block.modules():
            if part is not block:
                part.register_forward_pre_hook(check)
    seeded_step(method, smoke_batch(slug))
    assert not (method.shards and outside), outside[:3]


def test_step_gives_finite_scalar_losses_and_detached_metrics(slug: str) -> None:
    out = seeded_step(build(slug), smoke_batch(slug))
    assert out.losses
    for name, loss in out.losses.items():
        assert loss.ndim == 0, name
        assert torch.isfinite(loss), name
        assert loss.requires_grad, name
    for name, value in out.metrics.items():
        assert value.ndim == 0, name
        assert not value.requires_grad, name


def test_same_seed_same_losses_and_another_seed_others(slug: str) -> None:
    def losses(seed: int) -> list[float]:
        method = build(slug, seed=seed)
        return [float(v) for v in seeded_step(method, smoke_batch(slug), seed=seed).losses.values()]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one(slug: str) -> None:
    method = build(slug)
    optimizer = optimizer_for(slug, method)
    frozen = {n: p.clone() for n, p in method.named_parameters() if not p.requires_grad}
    reached = set()
    for step in range(2):
        optimizer.zero_grad()
        total(seeded_step(method, smoke_batch(slug, seed=step), step).losses).backward()
        for name, param in method.named_parameters():
            if param.grad is not None and param.grad.abs().sum() > 0:
                reached.add(name)
        optimizer.step()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and n not in reached]
    reason = waived(slug, "gradients")
    assert bool(missing) == (reason is not None), missing or "stale waiver 'gradients'"
    for name, param in method.named_parameters():
        if name in frozen:
            assert param.grad is None, name
            assert torch.equal(param, frozen[name]), name


def test_param_groups_cover_the_trainable_parameters_once(slug: str) -> None:
    method = build(slug)
    grouped = [name for group in method.param_groups() for name, _ in group.params]
    trainable = [name for name, p in method.named_parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)


def test_checkpoint_round_trip_continues_bit_for_bit(slug: str, tmp_path: Path) -> None:
    batches = [smoke_batch(slug, seed=s) for s in range(5)]

    def fresh():
        method = build(slug)
        return method, optimizer_for(slug, method), Ema(method, 0.9)

    method, optimizer, ema = fresh()
    expected = train(slug, method, batches, optimizer, ema=ema)
    first, first_optimizer, first_ema = fresh()
    train(slug, first, batches[:3], first_optimizer, ema=first_ema)
    path = save(
        tmp_path,
        Snapshot(
            3, first.state_dict(), optimizer_tensors(first_optimizer), first_ema.shadow, {"step": 3}
        ),
    )
    second, second_optimizer, second_ema = fresh()
    snapshot = load(path)
    second.load_state_dict(snapshot.model)
    load_optimizer(second_optimizer, snapshot.optimizer)
    second_ema.load(snapshot.ema)
    losses = train(slug, second, batches[3:], second_optimizer, first_step=3, ema=second_ema)
    assert losses == expected[3:]
    for name, value in method.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    for name, value in ema.shadow.items():
        assert torch.equal(value, second_ema.shadow[name]), name


def test_frozen_towers_never_change_and_leave_out_nothing_that_does_not(slug: str) -> None:
    """Checkpoints hold the rest. A fixed table of positions may be in them."""
    method = build(slug)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    train(slug, method, [smoke_batch(slug, seed=s) for s in range(2)], optimizer_for(slug, method))
    trained = {name for name, param in method.named_parameters() if param.requires_grad}
    found = method.state_dict()
    still = {name for name in found.keys() - trained if torch.equal(found[name], before[name])}
    frozen = {name for names in frozen_tensors(method).values() for name in names}
    assert frozen <= still
    assert [name for name in still - frozen if not name.endswith("pos_embed")] == []


def test_bf16_autocast_stays_finite(slug: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = seeded_step(build(slug), smoke_batch(slug))
    assert all(torch.isfinite(loss) for loss in out.losses.values())
    total(out.losses).backward()


def test_loss_falls_on_a_fixed_batch(slug: str) -> None:
    method = build(slug)
    losses = []
    optimizer = optimizer_for(slug, method, lr=2e-3)
    batch = smoke_batch(slug)
    for _ in range(30):
        losses += train(slug, method, [batch], optimizer)
    assert losses[-1] < losses[0]


def test_exported_image_features_are_finite_and_do_not_depend_on_the_batch(slug: str) -> None:
    from vlx.core.capability import ImageFeatures

    method = build(slug).eval()
    found = [c for c in method.exports() if isinstance(c, ImageFeatures)]
    if not found:
        pytest.skip("exports no ImageFeatures")
    side = config(slug).encoder.image_size
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = found[0].image_features(images)
        alone = found[0].image_features(images[:1])
        maps = found[0].patch_features(images)
    assert features.ndim == 2
    assert torch.isfinite(features).all()
    torch.testing.assert_close(features[:1], alone, rtol=1e-4, atol=1e-5)
    assert maps.ndim == 4
    assert maps.shape[:2] == features.shape


def test_exported_reconstruction_shows_visible_pixels_unchanged(slug: str) -> None:
    from vlx.core.capability import Reconstruction

    method = build(slug).eval()
    found = [c for c in method.exports() if isinstance(c, Reconstruction)]
    if not found:
        pytest.skip("exports no Reconstruction")
    side = config(slug).encoder.image_size
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen, painted = found[0].reconstruct(images, context())
    assert seen.shape == painted.shape == images.shape
    assert painted.min() >= 0
    assert painted.max() <= 1
    changed = (seen != images).any(1, keepdim=True).expand_as(images)
    assert changed.any()
    assert not torch.equal(painted[changed], images[changed])


@pytest.mark.parametrize("what", ["params", "gmacs"])
def test_paper_preset_matches_the_published_size(slug: str, what: str) -> None:
    from vlx.commands.dry_run import measure

    paper = registry.papers()[slug]
    published = paper.trainable_params if what == "params" else paper.gmacs
    if published is None:
        pytest.skip(f"no published {what}")
    report = measure(config(slug, "paper"), paper.num_classes)
    if what == "params":
        assert report.trainable_params == published
    else:
        found = report.gmacs if report.reduced_gmacs is None else report.reduced_gmacs
        assert found == pytest.approx(published, rel=0.01)


def test_golden_losses(slug: str, request: pytest.FixtureRequest) -> None:
    """Losses of four smoke steps, as they were when somebody last looked."""
    method = build(slug)
    optimizer = optimizer_for(slug, method)
    losses = train(slug, method, [smoke_batch(slug, seed=s) for s in range(4)], optimizer)
    file = GOLDEN / f"{slug}.json"
    if request.config.getoption("--write-golden") in (slug, "all"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"losses": losses}, indent=1) + "\n")
    assert file.is_file(), f"make golden SLUG={slug} writes {file}"
    expected = json.loads(file.read_text())["losses"]
    assert losses == pytest.approx(expected, abs=1e-4)
