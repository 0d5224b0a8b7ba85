"""Who may import whom (DESIGN section 3), read from the source with `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vlx.core import registry

# Layer -> layers of vlx that it may import besides itself.
LAYERS: dict[str, set[str]] = {
    "core": set(),
    "ops": {"core"},
    "blocks": {"core", "ops"},
    "encoders": {"core", "ops", "blocks"},
    "families": {"core", "ops", "blocks", "encoders"},
    "methods": {"core", "ops", "blocks", "encoders", "families"},
    "data": {"core", "ops"},
    "track": {"core", "ops"},
    "evals": {"core", "ops", "blocks", "data"},
    "engine": {"core", "ops", "data", "evals", "track", "encoders"},
    "config": {"core", "engine", "data", "evals", "track", "encoders"},
    "results": {"core", "config", "engine"},
    "commands": {
        "core", "ops", "data", "evals", "track", "encoders", "engine", "config", "results",
    },
    "cli": {"core", "commands"},
    "__main__": {"cli"},
    "__init__": set(),
}  # fmt: skip
# Third-party package -> where it may be imported.
FENCES: dict[str, tuple[str, ...]] = {
    "wandb": ("track/wandb.py",),
    "hydra": ("config/",),
    "omegaconf": ("config/",),
    "typer": ("cli.py",),
    "accelerate": ("engine/",),
    "transformers": ("encoders/",),
    "peft": ("encoders/",),
    "open_clip": ("encoders/", "evals/"),
    "timm.layers": ("encoders/", "blocks/", "methods/", "engine/batch_norm.py"),
    "timm.models": ("encoders/", "blocks/", "methods/"),
    "timm.optim": ("engine/optim.py",),
    "timm.data": ("encoders/", "evals/"),
    "timm": ("encoders/",),
    "pycocoevalcap": ("evals/",),
}
CLI_AT_MODULE_LEVEL = {"vlx.core", "typer", "rich"}
# A method's loop belongs to the engine; these words in a method mean that it has its own.
FORBIDDEN_IN_METHODS = (".backward(", "optimizer", "DataLoader", ".item()", ".cpu()")
MAX_LINES = 420

FILES = sorted((ROOT / "vlx").rglob("*.py"))


def imports(file: Path, *, module_level: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those inside functions too unless `module_level`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if module_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT / "vlx"))


def layer_of(file: Path) -> str:
    return relative(file).split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_keep_to_the_layers(file: Path) -> None:
    layer = layer_of(file)
    for line, module in imports(file):
        parts = module.split(".")
        if parts[0] == "vlx" and len(parts) > 1 and parts[1] != "__version__":
            allowed = LAYERS[layer] | {layer}
            assert parts[1] in allowed, (
                f"{relative(file)}:{line} imports {module}; {layer} may import {sorted(allowed)}. "
                "Move the shared piece down a layer, or pass it in"
            )
            if layer == "methods":
                own = relative(file).split("/")[1].removesuffix(".py")  # a module or a package
                assert parts[1] != "methods" or parts[2] == own, (
                    f"{relative(file)}:{line} imports another method; move the shared piece to "
                    "blocks, ops or families"
                )


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_third_party_packages_stay_behind_their_fences(file: Path) -> None:
    for line, module in imports(file):
        for package in sorted(FENCES, key=len, reverse=True):
            if module == package or module.startswith(package + "."):
                where = FENCES[package]
                assert relative(file).startswith(where), (
                    f"{relative(file)}:{line} imports {module}; only {', '.join(where)} may"
                )
                break


def test_cli_imports_little_at_module_level() -> None:
    for line, module in imports(ROOT / "vlx" / "cli.py", module_level=True):
        heavy = not (
            module.split(".")[0] in ("typer", "rich")
            or module.startswith(("vlx.core.", "vlx.__version__"))
        )
        standard = module.split(".")[0] in __import__("sys").stdlib_module_names
        assert standard or not heavy, f"cli.py:{line} imports {module} at module level"


def test_only_the_registry_imports_methods() -> None:
    for file in FILES:
        if layer_of(file) != "methods":
            for line, module in imports(file):
                assert not module.startswith("vlx.methods"), f"{relative(file)}:{line}: {module}"


def test_nothing_outside_methods_compares_with_a_slug() -> None:
    slugs = set(registry.papers())
    for file in FILES:
        if layer_of(file) == "methods":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                for value in ast.walk(node):
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        assert value.value not in slugs, (
                            f"{relative(file)}:{node.lineno} compares with the slug {value.value}; "
                            "give the method a capability or a config key instead"
                        )


@pytest.mark.parametrize(
    "file", [f for f in FILES if layer_of(f) in ("methods", "families")], ids=relative
)
def test_methods_hold_no_loop(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    for word in FORBIDDEN_IN_METHODS:
        assert word not in source, f"{relative(file)} holds {word!r}: that is the engine's business"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_files_and_functions_stay_short(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_LINES, f"{relative(file)} is longer than {MAX_LINES} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 70, f"{relative(file)}: {node.name} has {length} lines, at most 70"


def test_no_config_is_opened_up() -> None:
    for file in FILES:
        source = file.read_text(encoding="utf-8")
        for word in ("set_struct(", "open_dict("):
            assert word not in source, f"{relative(file)} weakens the schema with {word}"
