"""Reliability 14: a broken plugin is reported, hides nothing, and shadows nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import ROOT
from vlx.cli import app
from vlx.commands.listing import markdown
from vlx.core import registry
from vlx.core.errors import VlxError

PAPER = """
PAPER = Paper(
    number=0,
    slug="{slug}",
    title="A Plugin",
    year=2026,
    venue="arXiv",
    url="https://example.org",
    family="plugins",
    commands=("pretrain-mim",),
    modalities=("image",),
)
"""
MODULE = (
    '''"""A plugin (2026)."""

from __future__ import annotations

from dataclasses import dataclass

from vlx.core.config import MethodConfig
from vlx.core.paper import Paper
'''
    + PAPER
    + '''

@dataclass(kw_only=True)
class PluginConfig(MethodConfig):
    strength: float = 0.5
    """How strong, 0..1."""


class Plugin:
    Config = PluginConfig


METHOD = Plugin
'''
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path in which a test installs plugins."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith(("plug_", "vlx._schema_plug"))]:
        del sys.modules[name]


def install(site: Path, module: str, text: str | None, entry: str | None = None) -> None:
    """A distribution with one entry point, as pip would leave it; text None installs no file."""
    if text is not None:
        (site / f"{module}.py").write_text(text)
    folder = site / f"{module}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[vlx.methods]\n{module} = {entry or module}\n")


def test_a_plugin_is_found_loaded_and_configured(site: Path) -> None:
    install(site, "plug_good", MODULE.format(slug="plug-good"))
    found, problems = registry.scan()
    assert problems == []
    assert found["plug-good"].module == "plug_good"
    assert "plug_good" not in sys.modules
    assert registry.config_class("plug-good")().strength == 0.5  # type: ignore[attr-defined]
    assert registry.load("plug-good").__name__ == "Plugin"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "not found"),
        ("x = 1\n", "no top-level"),
        ("\nPAPER = Paper(\n    slug=name(),\n)\n", "literal"),
        ("\nPAPER = Paper(\n    slug=,\n)\n", "literal"),
        ("\nPAPER = Paper(\n    slug='plug-bad',\n)\n", "literal"),
        (PAPER.format(slug="plug-bad").replace("pretrain-mim", "dance"), "commands"),
    ],
    ids=["missing", "no PAPER", "not literal", "not Python", "incomplete", "unknown command"],
)
def test_a_broken_plugin_is_reported_and_hides_nothing(
    site: Path, text: str | None, says: str
) -> None:
    before = set(registry.papers())
    install(site, "plug_bad", text)
    install(site, "plug_good", MODULE.format(slug="plug-good"))
    found, problems = registry.scan()
    assert set(found) == before | {"plug-good"}
    assert len(problems) == 1
    assert "plug_bad" in problems[0]
    assert says in problems[0]


def test_an_unreadable_module_and_a_package_that_raises_hide_nothing(site: Path) -> None:
    before = set(registry.papers())
    install(site, "plug_bytes", None)
    (site / "plug_bytes.py").write_bytes(b"\xff\xfe\x00")
    (site / "plug_package").mkdir()
    (site / "plug_package" / "__init__.py").write_text("raise SystemError('on import')")
    install(site, "plug_package", None, entry="plug_package.method")
    found, problems = registry.scan()
    assert set(found) == before
    assert sorted("plug_bytes" in line for line in problems) == [False, True]
    assert any("on import" in line for line in problems)


def test_a_duplicate_cannot_shadow_a_built_in(site: Path) -> None:
    install(site, "plug_mae", MODULE.format(slug="mae"))
    found, problems = registry.scan()
    assert found["mae"].module == "vlx.methods.mae"
    assert problems == ["plug_mae repeats the slug mae of vlx.methods.mae and is ignored"]


def test_vlx_list_names_problems_below_the_table(site: Path) -> None:
    install(site, "plug_bad", "x = 1\n")
    lines = CliRunner().invoke(app, ["list"]).output.splitlines()
    assert any("mae" in line for line in lines)
    assert "not listed" in lines[-1]
    assert "plug_bad" in lines[-1]


def test_asking_for_a_broken_plugin_says_what_is_wrong(site: Path) -> None:
    install(site, "plug_bad", "x = 1\n")
    with pytest.raises(VlxError, match="no top-level"):
        registry.find("plug-bad")


def test_a_plugin_whose_import_fails_is_one_line(site: Path) -> None:
    install(site, "plug_late", MODULE.format(slug="plug-late") + "\nraise OSError('no library')\n")
    registry.config_class("plug-late")  # the schema stands alone
    with pytest.raises(VlxError, match=r"plug-late cannot be imported .* OSError: no library"):
        registry.load("plug-late")


def test_a_config_that_needs_more_than_dataclasses_is_one_line(site: Path) -> None:
    text = MODULE.format(slug="plug-needy").replace("= 0.5", "= torch.pi")
    install(site, "plug_needy", text)
    with pytest.raises(VlxError, match="does not stand alone"):
        registry.config_class("plug-needy")
    assert "vlx._schema_plug_needy" not in sys.modules


def test_unknown_methods_get_the_nearest_names() -> None:
    with pytest.raises(VlxError, match=r"unknown method 'maee'\. Did you mean mae"):
        registry.find("maee")


def test_built_ins_are_read_without_importing_them() -> None:
    script = (
        "import sys; from vlx.core import registry\n"
        "for slug in registry.papers(): registry.config_class(slug)()\n"
        "assert not [m for m in sys.modules if m.startswith('vlx.methods.')]\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_schemas_are_twins_of_the_classes() -> None:
    for slug in registry.papers():
        assert repr(registry.config_class(slug)()) == repr(registry.load(slug).Config())


def test_no_built_in_has_a_problem() -> None:
    assert registry.scan()[1] == []


def test_the_readme_shows_the_table_of_methods() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- methods -->\n", 1)[1].split("<!-- /methods -->", 1)[0]
    built_in = [entry.paper for entry in registry.scan()[0].values()]
    assert shown == markdown(built_in), "put `vlx list --markdown` between README's markers"
