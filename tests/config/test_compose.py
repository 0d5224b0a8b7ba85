"""Composition: what a line resolves to, and that its config file is a fixed point."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from vlx.cli import app
from vlx.config.compose import compose, compose_root, evaluation_root, keys, method_root, to_yaml
from vlx.config.frozen import apply_harmless
from vlx.config.grid import expand, job_name
from vlx.config.meanings import describe, head_comment
from vlx.config.paths import presets
from vlx.config.shorthand import long_words
from vlx.core.errors import ConfigError
from vlx.engine.load import read_config
from vlx.engine.rundir import HARMLESS_KEYS, config_hash

WORDS = [
    "plain",
    "true",
    "null",
    "1e3",
    "0x10",
    "a: b",
    "- x",
    "#1",
    "a,b",
    "ß",
    "",
    " ",
    "on",
    "~",
]


def smoke(*overrides: str) -> dict:
    return compose("mae", "pretrain-mim", "smoke", overrides)


def printed(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("seed", range(8))
def test_dump_load_dump_is_a_fixed_point(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    text = draw.choice(WORDS).replace("'", "")
    overrides = [
        f"seed={draw.randrange(2**40)}",
        f"optim.lr={draw.choice([1e-5, 3, 2.5e-7, 1e22, 0.1 + 0.2])}",
        f"train.ema_decay={draw.choice(['null', '0.999', '1'])}",
        f"train.precision={draw.choice(['fp32', 'bf16'])}",
        f"train.compile={draw.choice(['true', 'false'])}",
        f"optim.betas=[{draw.random()},{draw.random()}]",
        f"track.tags=['{text}','{draw.choice(WORDS)}']",
        f"track.project='{text}'",
        f"encoder={draw.choice(['cifar', 'digits', 'vit_small'])}",
    ]
    plain = smoke(*overrides)
    (tmp_path / "config.yaml").write_text(to_yaml(plain))
    loaded = read_config(tmp_path)
    assert loaded == plain
    assert to_yaml(loaded) == to_yaml(plain)
    assert config_hash(loaded) == config_hash(plain)


@pytest.mark.parametrize("word", WORDS)
def test_any_text_survives_the_file(word: str) -> None:
    assert yaml.safe_load(to_yaml({"name": word, "tags": [word]})) == {"name": word, "tags": [word]}


def test_cfg_job_prints_the_resolved_config_and_flags_may_stand_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        ["pretrain", "mae", "--cfg", "job", "--preset", "smoke", "train.steps=3", "seed=1"],
        ["pretrain", "mae", "train.steps=3", "--preset", "smoke", "seed=1", "--cfg", "job"],
        ["pretrain-mim", "--cfg=job", "mae", "train.steps=3", "-p", "smoke", "seed=1"],
    ]
    texts = {printed(*line) for line in lines}
    assert len(texts) == 1
    assert yaml.safe_load(texts.pop()) == smoke("train.steps=3", "seed=1")
    grid = printed(
        "pretrain", "mae", "train.steps=3", "--preset", "smoke", "-m", "seed=0,1", "-c", "job"
    )
    assert [config["seed"] for config in yaml.safe_load_all(grid)] == [0, 1]
    assert list(tmp_path.iterdir()) == []


def test_overrides_beat_presets_and_presets_beat_recipes() -> None:
    assert compose("mae", "pretrain-mim", "paper")["train"]["batch_size"] == 4096
    assert smoke()["train"]["batch_size"] == 64
    assert smoke("train.batch_size=8", "++seed=3")["train"]["batch_size"] == 8
    assert smoke("data=cifar10")["data"]["source"] == "parquet"


def test_a_preset_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n  - override /encoder: cifar\nmethod:\n  mask_ratio: 0.6\n")
    config = compose("mae", "pretrain-mim", str(file))
    assert config["preset"] == "mine"
    assert config["method"]["mask_ratio"] == 0.6
    assert config["encoder"]["image_size"] == 32


def test_a_teacher_is_added_by_its_group() -> None:
    config = smoke("+encoder@teacher=vit_small", "teacher.drop_path=0.1")
    assert config["teacher"]["dim"] == 384
    assert config["teacher"]["drop_path"] == 0.1


def test_compositions_leave_no_state_behind() -> None:
    before = smoke()
    smoke("seed=3", "encoder=cifar")
    with pytest.raises(ConfigError):
        smoke("sed=3")
    compose("mae", "pretrain-mim", "paper")
    assert smoke() == before


# short words


def evit(*overrides: str, preset: str = "smoke") -> dict:
    return compose("evit", "prune-tokens", preset, overrides)


def test_a_models_name_chooses_it_at_its_own_size() -> None:
    encoder = evit("encoder=vit_small_patch16_224")["encoder"]  # the preset sets dim and heads
    sizes = {key: encoder[key] for key in ("name", "image_size", "patch_size", "dim", "depth")}
    assert sizes == {
        "name": "vit_small_patch16_224", "image_size": 224, "patch_size": None, "dim": None,
        "depth": None,
    }  # fmt: skip
    assert encoder["heads"] is None
    assert encoder["mean"] == encoder["std"] == [0.5, 0.5, 0.5]  # of the published weights
    imagenet = evit("encoder=resnet18")["encoder"]
    assert imagenet["mean"] == [0.485, 0.456, 0.406]


def test_keys_of_the_line_stand_above_the_models_own() -> None:
    lines = [
        ["encoder=vit_small_patch16_224", "encoder.image_size=96", "encoder.depth=3"],
        ["encoder.image_size=96", "encoder.depth=3", "encoder=vit_small_patch16_224"],
    ]
    for line in lines:
        encoder = evit(*line)["encoder"]
        assert (encoder["image_size"], encoder["depth"], encoder["dim"]) == (96, 3, None)


def test_files_of_conf_come_before_models_() -> None:
    assert evit("encoder=vit_small", preset="tiny")["encoder"]["dim"] == 384
    assert evit("encoder=deit_small", preset="paper")["encoder"]["patch_size"] == 16


def test_a_models_weights_and_teachers_are_named_alike() -> None:
    config = smoke(
        "encoder=vit_base_patch16_224.dino", "+encoder@teacher=vit_base_patch16_clip_224.openai"
    )
    assert config["encoder"]["name"] == "vit_base_patch16_224.dino"
    assert config["teacher"]["name"] == "vit_base_patch16_clip_224.openai"
    assert config["teacher"]["mean"] == [0.48145466, 0.4578275, 0.40821073]
    with pytest.raises(ConfigError, match=r"no weights 'vit_base_patch16_224\.dinno'"):
        smoke("encoder=vit_base_patch16_224.dinno")


def test_a_bare_key_is_the_methods() -> None:
    config = evit("keep_rate=0.6", "++fuse=false", "reduction_layers=[1]", "seed=3")
    assert config["method"]["keep_rate"] == 0.6
    assert config["method"]["fuse"] is False
    assert config["method"]["reduction_layers"] == [1]
    assert config["seed"] == 3
    assert evit("keep_rate=0.6") == evit("method.keep_rate=0.6")


def test_a_key_of_the_run_stays_the_runs() -> None:
    words = ["name=x", "seed=1", "data=cifar10", "keep_rate=0.5", "flip", "a.flip=1"]
    assert long_words("evit", words) == [
        "name=x", "seed=1", "data=cifar10", "method.keep_rate=0.5", "method.flip", "a.flip=1",
    ]  # fmt: skip


def test_models_and_bare_keys_sweep() -> None:
    root = method_root("evit", "prune-tokens", "smoke")
    cells = expand(root, ["encoder=vit_tiny_patch16_224,digits_fine", "keep_rate=0.9,0.5"])
    found = [(c.config["encoder"]["dim"], c.config["method"]["keep_rate"]) for c in cells]
    assert found == [(None, 0.9), (None, 0.5), (24, 0.9), (24, 0.5)]
    assert cells[1].swept == {"encoder": "vit_tiny_patch16_224", "method.keep_rate": "0.5"}
    assert job_name(1, cells[1].swept) == "001-encoder_vit_tiny_patch16_224-keep_rate_0.5"


# evaluations


def frozen_run(folder: Path, *overrides: str) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(smoke(*overrides)))
    return folder


def evaluation(*overrides: str) -> dict:
    return compose_root(evaluation_root("knn", overrides), overrides)


def test_an_evaluation_starts_from_the_runs_encoder_data_and_view(tmp_path: Path) -> None:
    run = frozen_run(tmp_path / "run", "encoder.dim=36", "eval.crop_ratio=0.9", "data=cifar10")
    config = evaluation(f"encoder.checkpoint={run}")
    assert config["encoder"]["dim"] == 36
    assert config["encoder"]["checkpoint"] == str(run)
    assert config["data"]["source"] == "parquet"
    assert config["eval"]["crop_ratio"] == 0.9
    assert config["eval"]["at_end"] == ["knn"]
    assert config["method"] is None
    assert (config["command"], config["slug"]) == ("eval", "knn")


def test_overrides_and_groups_stand_above_the_run(tmp_path: Path) -> None:
    run = frozen_run(tmp_path / "run", "encoder.dim=36")
    config = evaluation(f"encoder.checkpoint={run}", "encoder.image_size=16", "data=cifar10")
    assert (config["encoder"]["dim"], config["encoder"]["image_size"]) == (36, 16)
    assert config["data"]["source"] == "parquet"
    assert evaluation(f"encoder.checkpoint={run}", "encoder=cifar")["encoder"]["dim"] == 192


def test_names_of_a_runs_classes_are_of_its_own_data(tmp_path: Path) -> None:
    names = ("data.class_names=names.txt", "data.split_file=other/split.json", "data.shots=4")
    run = frozen_run(tmp_path / "run", "data=folder", f"data.path={tmp_path}/own", *names)
    given = f"encoder.checkpoint={run}"
    kept = ("names.txt", "other/split.json", 4)

    def said(*overrides: str) -> tuple[str | None, str | None, int]:
        data = evaluation(given, *overrides)["data"]
        return data["class_names"], data["split_file"], data["shots"]

    same = f"data.path={tmp_path}/run/../own/"  # the same folder, written otherwise
    for words in ((), ("data.test_split=val",), ("data.source=folder",), (same,)):
        assert said(*words) == kept
    for word in ("data.source=parquet", f"data.path={tmp_path}/other", "data.variant=CIFAR10"):
        assert said(word) == (None, None, 4)
        assert said(word, "data.class_names=mine.txt") == ("mine.txt", None, 4)
    overrides = [given, f"data.path={tmp_path}/own,{tmp_path}/other"]
    root = evaluation_root("knn", overrides)
    cells = expand(root, overrides, lambda words: evaluation_root("knn", words))
    assert [cell.config["data"]["class_names"] for cell in cells] == ["names.txt", None]


def test_each_job_of_an_evaluation_takes_its_own_runs_encoder(tmp_path: Path) -> None:
    runs = [frozen_run(tmp_path / f"run{d}", f"encoder.dim={d}") for d in (36, 48)]
    overrides = [f"encoder.checkpoint={runs[0]},{runs[1]}"]
    root = evaluation_root("knn", overrides)
    cells = expand(root, overrides, lambda words: evaluation_root("knn", words))
    assert [cell.config["encoder"]["dim"] for cell in cells] == [36, 48]


# grids: Hydra's own parser, semi-public, so its behaviour is pinned here


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("seed=0,1", ["0", "1"]),
        ("seed=choice(3,5)", ["3", "5"]),
        ("seed=range(0,6,2)", ["0", "2", "4"]),
        ("optim.betas=[0.9,0.95],[0.9,0.999]", ["[0.9,0.95]", "[0.9,0.999]"]),
        ("data=glob(*i*)", ["cifar10", "digits"]),
        ("track.project='a b','c,d'", ["a b", "c,d"]),
        ("optim.lr=1e-3,2e-3", ["0.001", "0.002"]),
    ],
)
def test_every_kind_of_sweep_expands(word: str, values: list[str]) -> None:
    cells = expand(method_root("mae", "pretrain-mim", "smoke"), [word, "train.steps=2"])
    key = word.split("=", 1)[0]
    found = [cell.swept[key] for cell in cells]
    if key == "data":  # other sources are added beside these
        assert set(values) <= set(found)
    else:
        assert found == values
    assert all(cell.config["train"]["steps"] == 2 for cell in cells)
    assert all(cell.overrides[1] == "train.steps=2" for cell in cells)


def test_a_grid_is_the_product_in_the_order_of_the_line() -> None:
    root = method_root("mae", "pretrain-mim", "smoke")
    cells = expand(root, ["encoder=digits,cifar", "seed=0,1"])
    found = [(c.config["encoder"]["image_size"], c.config["seed"]) for c in cells]
    assert found == [(8, 0), (8, 1), (32, 0), (32, 1)]
    assert job_name(2, cells[2].swept) == "002-encoder_cifar-seed_0"


# resume's changes


def test_resume_takes_harmless_keys_and_their_groups() -> None:
    config = smoke("track.project=mine", "launcher=torchrun")
    changed = apply_harmless(config, ["train.log_every=7", "track=none", "launcher=local"])
    assert changed["train"]["log_every"] == 7
    assert (changed["track"]["name"], changed["track"]["project"]) == ("none", "mine")
    assert (changed["launcher"]["name"], changed["launcher"]["processes"]) == ("local", 1)
    assert config_hash(changed) == config_hash(config)
    assert list(changed) == list(config)
    assert config["train"]["log_every"] == 1


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.steps=9", "train.log_every"),
        ("method.mask_ratio=0.5", "has begun"),
        ("encoder=cifar", "has begun"),
        ("name=other", "has begun"),
        ("train.log_evry=1", "train.log_every"),
        ("train.log_every=often", "must be an integer"),
        ("train.log_every=0", "at least 1"),
        ("track=wandbb", "wandb"),
        ("track.mode=of", "offline"),
        ("train.log_every=1,2", "one value"),
    ],
)
def test_resume_refuses_the_rest(word: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        apply_harmless(smoke(), [word])


def test_the_harmless_keys_exist() -> None:
    known = keys("mae", "smoke")
    for key in HARMLESS_KEYS:
        assert any(name == key or name.startswith(f"{key}.") for name in known), key


# meanings


def test_every_key_has_a_type_and_a_meaning() -> None:
    described, known = describe("mae"), keys("mae", "tiny")
    assert known.keys() <= described.keys()
    for name, key in described.items():
        assert key.meaning, name
        assert key.type, name
    assert described["method.mask_ratio"].meaning.startswith("Share of patches hidden")
    assert described["train.precision"].choices == ("fp32", "bf16", "fp16")
    assert described["optim.betas"].type == "list of numbers"
    assert described["train.steps"].type == "integer or null"


def test_presets_explain_themselves() -> None:
    for name, file in presets("mae").items():
        assert head_comment(file), name
