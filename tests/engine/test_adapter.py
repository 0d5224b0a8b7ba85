"""What is trained beside a frozen model: saved alone, and fit for that model only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.engine.inprocess import run_here
from vlx.commands.start import prepare
from vlx.config.compose import compose
from vlx.core.errors import CheckpointError, ConfigError
from vlx.core.results import read_results
from vlx.engine.adapter import describe, load_adapter
from vlx.engine.load import run_config


def run(tmp_path: Path, name: str, *overrides: str, preset: str = "smoke") -> Path:
    common = ["track=none", f"runs_dir={tmp_path}", f"name={name}", "train.threads=1"]
    config = compose("supervised", "finetune", preset, [*common, *overrides])
    directory = prepare(config, overrides)
    code, _ = run_here(directory)
    assert code == 0
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return run(tmp_path, "base")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from vlx.engine import checkpoint

    found = checkpoint.latest(directory / "checkpoints")
    assert found is not None
    return checkpoint.load(found).model


@pytest.mark.parametrize("tune", ["head", "lora", "ia3", "layers"])
def test_frozen_weights_are_the_same_bits_after_training(
    tmp_path: Path, base: Path, tune: str
) -> None:
    keys = (f"encoder.checkpoint={base}", f"method.tune={tune}", "method.tuned_layers=1")
    tuned = run(tmp_path, tune, *keys)
    before, after = weights(base), weights(tuned)
    with safe_open(tuned / "adapter.safetensors", "pt") as file:
        trained = set(file.keys())
    assert trained
    for name, value in after.items():
        if name in trained:
            continue
        plain = name.replace(".base_layer", "")
        assert torch.equal(value, before[plain]), name
    changed = [n for n in trained if n not in before or not torch.equal(after[n], before[n])]
    assert len(changed) == len(trained)


def test_an_adapter_gives_its_runs_numbers_on_the_same_base(tmp_path: Path, base: Path) -> None:
    keys = (f"encoder.checkpoint={base}", "method.tune=lora")
    first = run(tmp_path, "lora", *keys)
    again = run(tmp_path, "again", *keys, f"train.adapter={first}", "train.steps=0", "seed=5")
    value = read_results(first).value("classification/top1")
    assert value is not None
    assert read_results(again).value("classification/top1") == value
    assert (first / "adapter.safetensors").stat().st_size < 200_000


def test_an_adapter_is_refused_by_another_base_method_and_shape(tmp_path: Path, base: Path) -> None:
    from tests.methods.test_supervised import tuned
    from vlx.methods.supervised import Tune

    first = run(tmp_path, "lora", f"encoder.checkpoint={base}", "method.tune=lora")
    method = tuned(Tune.lora)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with pytest.raises(CheckpointError, match="was trained beside the weights"):
        load_adapter(str(first), method, slug="supervised")
    with pytest.raises(CheckpointError, match="an adapter of supervised, not of coop"):
        load_adapter(str(first), method, slug="coop")
    with pytest.raises(CheckpointError, match="does not fit, nothing was loaded"):
        load_adapter(str(first), tuned(Tune.lora, rank=3), slug="supervised")
    with pytest.raises(CheckpointError, match="no adapter at"):
        load_adapter(str(base), method, slug="supervised")
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())


def test_an_adapter_with_a_flipped_bit_is_refused(tmp_path: Path, base: Path) -> None:
    from tests.methods.test_supervised import tuned
    from vlx.encoders.checkpoint import read_weights
    from vlx.methods.supervised import Tune

    first = run(tmp_path, "lora", f"encoder.checkpoint={base}", "method.tune=lora")
    file = first / "adapter.safetensors"
    assert read_weights(file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="its tensors are not those that were saved"):
        load_adapter(str(first), tuned(Tune.lora), slug="supervised")
    with pytest.raises(CheckpointError, match="its tensors are not those that were saved"):
        read_weights(file)


def test_a_run_that_trains_everything_refuses_an_adapter(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.adapter: supervised trains its whole model"):
        run(tmp_path, "full", f"train.adapter={base}")


def test_the_line_says_how_much_is_trained_and_what() -> None:
    from tests.methods.test_supervised import tuned
    from vlx.methods.supervised import Tune

    line = describe(tuned(Tune.lora))
    assert line.startswith("trainable ")
    assert "inserted encoder.vit.blocks" in line
    assert "tuned encoder.vit.head" in line


def test_a_resumed_adapter_run_is_the_same_run(tmp_path: Path, base: Path, monkeypatch) -> None:
    from tests.engine.compare import assert_same_bits
    from tests.engine.inprocess import stop_after

    keys = (f"encoder.checkpoint={base}", "method.tune=lora")
    whole = run(tmp_path, "whole", *keys)
    common = ["track=none", f"runs_dir={tmp_path}", "name=cut", "train.threads=1", *keys]
    directory = prepare(compose("supervised", "finetune", "smoke", common), common)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        code, _ = run_here(directory)
    assert code != 0
    code, _ = run_here(directory)
    assert code == 0
    assert run_config(compose("supervised", "finetune", "smoke", common)).train.steps == 4
    assert_same_bits(directory, whole)
