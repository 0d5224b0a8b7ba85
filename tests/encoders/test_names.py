"""Which models there are: read from timm's source, equal to what timm itself says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm

from vlx.core import registry
from vlx.core.errors import ConfigError
from vlx.core.paper import Paper
from vlx.encoders.names import is_model, model_names, timm_names
from vlx.encoders.published import published_statistics


def test_the_names_read_from_the_source_are_timms_own() -> None:
    # A method that another test has loaded has registered its own by now.
    own = {name for paper in registry.papers().values() for name in paper.backbones}
    assert timm_names() == (set(timm.list_models(module="")) | set(timm.list_models())) - own


def test_names_of_papers_are_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Backbone:
        backbones = ("lookup_small",)

    papers: dict[str, Paper] = {"lookup": Backbone()}  # type: ignore[dict-item]
    monkeypatch.setattr(registry, "papers", lambda: papers)
    assert is_model("lookup_small")
    assert model_names() - timm_names() == {"lookup_small"}
    assert published_statistics("lookup_small") is None


def test_a_tag_of_published_weights_may_follow() -> None:
    assert is_model("vit_base_patch16_224.dino")
    assert not is_model("vit_base_patch16_223.dino")


def test_statistics_are_those_of_the_weights() -> None:
    assert published_statistics("vit_small_patch16_224") == ([0.5] * 3, [0.5] * 3)
    found = published_statistics("vit_base_patch16_clip_224.openai")
    assert found == ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    assert published_statistics("deit_small_patch16_224") == (
        [0.485, 0.456, 0.406],
        [0.229, 0.224, 0.225],
    )


def test_an_unknown_tag_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no weights 'vit_base_patch16_224\.dinno'.*\.dino"):
        published_statistics("vit_base_patch16_224.dinno")


def test_finding_names_imports_nothing_heavy() -> None:
    script = (
        "import sys; from vlx.encoders.names import is_model\n"
        "assert is_model('resnet18'); assert not {'timm', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
