"""Which methods there are, found by reading `methods/*.py` without importing them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vlx.core.config import MethodConfig
from vlx.core.errors import VlxError, nearest
from vlx.core.paper import COMMANDS, Paper

if TYPE_CHECKING:
    from vlx.core.method import Method

ENTRY_POINT_GROUP = "vlx.methods"
METHODS_DIR = Path(__file__).resolve().parent.parent / "methods"
# Modules that a Config class may use; everything else of a method's module needs torch.
_TORCH_FREE = ("__future__", "dataclasses", "enum", "typing", "vlx.core.config", "vlx.core.errors")
_FAMILY_CONFIGS = "vlx.families.configs."


@dataclass(frozen=True)
class Entry:
    """Where a method lives: its metadata, its importable module name and its source file."""

    paper: Paper
    module: str
    file: Path


def read_paper(file: Path) -> Paper:
    """The `PAPER = Paper(...)` literal of a method's file; raises `VlxError` when it has none."""
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VlxError(f"{file} cannot be read: {error}") from error
    start = source.find("\nPAPER = Paper(")
    end = source.find("\n)", start)
    if start < 0 or end < 0:
        raise VlxError(f"{file}: no top-level `PAPER = Paper(...)`")
    try:
        call = ast.parse(source[start : end + 2].strip()).body[0]
        assert isinstance(call, ast.Assign)
        assert isinstance(call.value, ast.Call)
        keywords = {k.arg: ast.literal_eval(k.value) for k in call.value.keywords if k.arg}
        paper = Paper(**keywords)
    except (AssertionError, SyntaxError, TypeError, ValueError) as error:
        raise VlxError(f"{file}: PAPER must be a literal Paper(...): {error}") from error
    unknown = [command for command in paper.commands if command not in COMMANDS]
    if unknown or not paper.commands:
        raise VlxError(f"{file}: PAPER.commands {paper.commands} must be among {COMMANDS}")
    return paper


def scan(methods_dir: Path = METHODS_DIR) -> tuple[dict[str, Entry], list[str]]:
    """Every method by slug, sorted, and one line for each plugin that could not be read."""
    found: dict[str, Entry] = {}
    problems: list[str] = []
    candidates = [
        (f"vlx.methods.{file.parent.name if file.name == '__init__.py' else file.stem}", file)
        for file in [*methods_dir.glob("[!_]*.py"), *methods_dir.glob("[!_]*/__init__.py")]
    ]
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            spec = importlib.util.find_spec(point.value)
            if spec is None or spec.origin is None:
                raise VlxError(f"module {point.value} not found")
            candidates.append((point.value, Path(spec.origin)))
        except Exception as error:  # a broken plugin must never hide the others
            problems.append(f"plugin {point.name}: {error}")
    for module, file in candidates:
        try:
            paper = read_paper(file)
        except VlxError as error:
            problems.append(str(error))
            continue
        if paper.slug in found:
            kept = found[paper.slug].module
            problems.append(f"{module} repeats the slug {paper.slug} of {kept} and is ignored")
            continue
        found[paper.slug] = Entry(paper, module, file)
    return dict(sorted(found.items())), problems


def papers() -> Mapping[str, Paper]:
    """Metadata of every method, by slug, sorted."""
    return {slug: entry.paper for slug, entry in scan()[0].items()}


def find(slug: str) -> Entry:
    """The entry of a method; an unknown slug raises `VlxError` with the nearest names."""
    found, problems = scan()
    if slug in found:
        return found[slug]
    broken = [line for line in problems if slug in line or slug.replace("-", "_") in line]
    hint = nearest(slug, found)
    raise VlxError(f"unknown method '{slug}'. {' '.join(broken) or hint} `vlx list` shows all.")


def load(slug: str) -> type[Method]:
    """Import one method's module (this imports torch) and return its `METHOD`."""
    entry = find(slug)
    try:
        return importlib.import_module(entry.module).METHOD
    except Exception as error:  # a plugin may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise VlxError(f"{slug} cannot be imported from {entry.file}: {reason}") from error


def config_class(slug: str) -> type[MethodConfig]:
    """The method's Config class, built from its source without importing torch.

    Only the module's dataclasses and enums are executed, so this costs milliseconds. The class is
    a twin of the one in the method's module: good for keys, types and defaults.
    """
    entry = find(slug)
    name = "vlx._schema_" + slug.replace("-", "_")
    if name in sys.modules:
        return sys.modules[name].CONFIG
    module = ModuleType(name)
    module.__file__ = str(entry.file)
    sys.modules[name] = module
    try:
        tree = ast.parse(entry.file.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if _is_schema(node)]
        exec(compile(tree, str(entry.file), "exec"), module.__dict__)
        configs = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, MethodConfig)
            and value is not MethodConfig
        ]
        module.CONFIG = configs[-1]  # type: ignore[attr-defined]
    except Exception as error:
        del sys.modules[name]
        raise VlxError(f"{entry.file}: its Config class does not stand alone: {error}") from error
    return configs[-1]


def _is_schema(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        return module in _TORCH_FREE or module.startswith(_FAMILY_CONFIGS)
    if not isinstance(node, ast.ClassDef):
        return False
    words = ast.dump(ast.Module(body=[*map(ast.Expr, node.decorator_list)], type_ignores=[]))
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return "dataclass" in words or any(base.endswith("Enum") for base in bases)
