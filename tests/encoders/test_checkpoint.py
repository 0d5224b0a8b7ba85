"""Loading encoder weights from published layouts, runs and files."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.contract.build import build
from vlx.core.errors import CheckpointError
from vlx.core.manifest import manifest_text
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.checkpoint import load_encoder, read_best, read_weights
from vlx.encoders.config import EncoderConfig
from vlx.encoders.timm_vit import TimmVit

SMALL = {
    "name": "vit_tiny_patch16_224",
    "image_size": 16,
    "patch_size": 4,
    "dim": 24,
    "depth": 2,
    "heads": 3,
}


def encoder(**changes: object) -> TimmVit:
    torch.manual_seed(5)
    return TimmVit(EncoderConfig(**{**SMALL, **changes}))  # type: ignore[arg-type]


def published_mae() -> dict[str, Tensor]:
    """The key names of facebookresearch/mae's pre-training files, encoder and decoder."""
    torch.manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 24),
        "pos_embed": (1, 17, 24),
        "mask_token": (1, 1, 16),
        "decoder_pos_embed": (1, 17, 16),
        "patch_embed.proj.weight": (24, 3, 4, 4),
        "patch_embed.proj.bias": (24,),
        "decoder_embed.weight": (16, 24),
        "decoder_embed.bias": (16,),
        "decoder_pred.weight": (48, 16),
        "decoder_pred.bias": (48,),
    }
    for blocks, norm, depth, dim in (("blocks", "norm", 2, 24), ("decoder_blocks",) * 2 + (1, 16)):
        norm = "decoder_norm" if norm == "decoder_blocks" else norm
        shapes |= {f"{norm}.weight": (dim,), f"{norm}.bias": (dim,)}
        for i in range(depth):
            for layer, out, into in (
                ("attn.qkv", 3 * dim, dim),
                ("attn.proj", dim, dim),
                ("mlp.fc1", 4 * dim, dim),
                ("mlp.fc2", dim, 4 * dim),
            ):
                shapes[f"{blocks}.{i}.{layer}.weight"] = (out, into)
                shapes[f"{blocks}.{i}.{layer}.bias"] = (out,)
            for layer in ("norm1", "norm2"):
                shapes |= {f"{blocks}.{i}.{layer}.{kind}": (dim,) for kind in ("weight", "bias")}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def build_from(path: Path, **changes: object) -> TimmVit:
    cfg = EncoderConfig(**{**SMALL, **changes, "checkpoint": str(path)})  # type: ignore[arg-type]
    made = EncoderBuilder({"encoder": cfg}, 0).vision(pos_embed="sincos")
    assert isinstance(made, TimmVit)
    return made


def test_the_official_pretraining_file_loads_and_its_decoder_is_left_out(tmp_path: Path) -> None:
    state = published_mae()
    torch.save({"model": state}, tmp_path / "mae.pth")
    loaded = build_from(tmp_path / "mae.pth").vit.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())
    assert not any("decoder" in name for name in loaded)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "encoder.vit."])
def test_a_safetensors_file_loads_under_any_usual_prefix(tmp_path: Path, prefix: str) -> None:
    state = encoder().vit.state_dict()
    torch.manual_seed(7)
    state = {name: torch.randn_like(value) for name, value in state.items()}
    save_file({prefix + k: v for k, v in state.items()}, tmp_path / "vit.safetensors")
    loaded = build_from(tmp_path / "vit.safetensors").vit.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def run_directory(
    folder: Path,
    state: dict[str, Tensor],
    ema: dict[str, Tensor],
    progress: Mapping[str, object] = MappingProxyType({}),
) -> Path:
    checkpoint = folder / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    save_file(state, checkpoint / "model.safetensors")
    if ema:
        save_file(ema, checkpoint / "ema.safetensors")
    (checkpoint / "state.json").write_text(json.dumps(dict(progress)))
    (checkpoint / "manifest.json").write_text(manifest_text(checkpoint))
    return folder


def flip(file: Path) -> None:
    """Change one bit of the last tensor."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
def test_a_flipped_bit_is_refused_in_a_run_a_checkpoint_and_a_file(
    name: str, tmp_path: Path
) -> None:
    run = run_directory(tmp_path, {"w": torch.ones(2)}, {"w": torch.zeros(2)})
    checkpoint = run / "checkpoints" / "step-00000004"
    places = (run, checkpoint, checkpoint / name)
    for place in places:
        assert read_weights(place).keys() == {"w"}
    flip(checkpoint / name)
    for place in places:
        with pytest.raises(CheckpointError, match=f"{name} is not what was saved"):
            read_weights(place)
    if name == "ema.safetensors":
        assert torch.equal(read_weights(checkpoint / "model.safetensors")["w"], torch.ones(2))


def test_a_damaged_checkpoint_is_passed_over_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_directory(tmp_path, {"w": torch.ones(2)}, {})
    shutil.copytree(run / "checkpoints/step-00000004", run / "checkpoints/step-00000008")
    assert read_weights(run)["w"].tolist() == [1, 1]
    assert not caplog.records
    flip(run / "checkpoints/step-00000008/model.safetensors")
    assert read_weights(run)["w"].tolist() == [1, 1]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "step-00000008 is damaged and passed over: model.safetensors is not what" in line


def test_a_checkpoint_without_its_manifest_is_damaged_and_a_strange_folder_is_not(
    tmp_path: Path,
) -> None:
    run = run_directory(tmp_path, {"w": torch.ones(2)}, {})
    checkpoint = run / "checkpoints" / "step-00000004"
    (checkpoint / "manifest.json").unlink()
    for place in (run, checkpoint):
        with pytest.raises(CheckpointError, match=r"no manifest\.json"):
            read_weights(place)
    (checkpoint / "state.json").unlink()  # as transformers writes folders
    assert read_weights(checkpoint).keys() == {"w"}


@pytest.mark.parametrize("name", ["../../other", "/etc", "..", 7, ["step-00000004"]])
def test_the_best_checkpoint_is_one_of_the_run(name: object, tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    progress = {"progress": {"best_checkpoint": name}}
    run = run_directory(tmp_path / "run", state, {}, progress)
    run_directory(tmp_path / "other", state, {})
    with pytest.raises(CheckpointError, match=r"state\.json: .* is no checkpoint of the run"):
        read_best(run)
    progress = {"progress": {"best_checkpoint": "step-00000004"}}
    again = run_directory(tmp_path / "again", state, {}, progress)
    assert read_best(again) is not None
    flip(again / "checkpoints" / "step-00000004" / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not what was saved"):
        read_best(again)


def test_a_run_directory_loads_and_its_average_is_preferred(tmp_path: Path) -> None:
    method = build("mae")
    state = method.state_dict()
    plain = run_directory(tmp_path / "plain", state, {})
    averaged = {n: p.detach() + 1 for n, p in method.named_parameters() if p.requires_grad}
    ema = run_directory(tmp_path / "ema", state, averaged)
    sizes = {"image_size": 8, "patch_size": 2, "dim": 48, "depth": 2}
    loaded = build_from(plain, **sizes).vit.norm.weight
    assert torch.equal(loaded, state["encoder.vit.norm.weight"])
    loaded = build_from(ema, **sizes).vit.norm.weight
    assert torch.equal(loaded, state["encoder.vit.norm.weight"] + 1)


def test_a_mismatch_names_the_keys_and_loads_nothing(tmp_path: Path) -> None:
    state = published_mae()
    state["blocks.1.mlp.fc1.weight"] = torch.randn(10, 24)
    state["blocks.7.norm1.weight"] = torch.randn(24)
    del state["norm.bias"]
    torch.save({"model": state}, tmp_path / "mae.pth")
    fresh = encoder()
    before = {name: value.clone() for name, value in fresh.vit.state_dict().items()}
    with pytest.raises(CheckpointError, match="nothing was loaded") as caught:
        load_encoder(fresh.vit, tmp_path / "mae.pth")
    for words in ("norm.bias", "blocks.7.norm1.weight", "(10, 24) for (96, 24)"):
        assert words in str(caught.value)
    assert all(torch.equal(before[n], v) for n, v in fresh.vit.state_dict().items())


def test_a_position_table_of_another_image_size_is_resampled(tmp_path: Path) -> None:
    from timm.layers.pos_embed import resample_abs_pos_embed

    state = published_mae()
    torch.save({"model": state}, tmp_path / "mae.pth")
    larger = build_from(tmp_path / "mae.pth", image_size=24).vit
    assert larger.pos_embed is not None
    assert larger.pos_embed.shape == (1, 37, 24)
    expected = resample_abs_pos_embed(state["pos_embed"], [6, 6], [4, 4], 1)
    assert torch.equal(larger.pos_embed, expected)
    assert torch.equal(larger.pos_embed[:, 0], state["pos_embed"][:, 0])


def test_a_table_that_is_no_square_is_refused(tmp_path: Path) -> None:
    state = published_mae()
    state["pos_embed"] = torch.randn(1, 14, 24)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"pos_embed \(1, 14, 24\) for \(1, 17, 24\)"):
        build_from(tmp_path / "odd.pth")


class Malicious:
    def __reduce__(self):
        return (Path("/tmp/vlx-pickle-was-run").touch, ())


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps({"model": Malicious()}))
    with pytest.raises(CheckpointError, match=r"cannot read .*evil\.pth"):
        build_from(file)
    torch.save({"model": Malicious()}, file)
    with pytest.raises(CheckpointError, match=r"cannot read .*evil\.pth"):
        build_from(file)
    assert not Path("/tmp/vlx-pickle-was-run").exists()


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2]])
def test_a_file_without_weights_says_so(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        build_from(tmp_path / "none.pth")


def test_the_encoder_of_a_run_with_another_backbone_is_found(tmp_path: Path) -> None:
    def build_resnet(checkpoint: str | None):
        cfg = EncoderConfig(name="resnet18", image_size=32, checkpoint=checkpoint)
        return EncoderBuilder({"encoder": cfg}, 0).vision()

    trained = build_resnet(None)
    state = {f"encoder.{name}": value for name, value in trained.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    loaded = build_resnet(str(tmp_path)).state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded[name], value), name
