"""YAML of anybody's: plain values, bounded, nothing in it acts."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from vlx.core.errors import ConfigError, one_line

_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 1 << 20, 100_000, 50


class _Loader(yaml.SafeLoader):
    """As OmegaConf's: `1e-3` is a number; dates stay the characters that they are."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?$"
               r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)  # fmt: skip


def read_yaml(file: Path, texts: Collection[str] = ()) -> dict[str, Any]:
    """The mapping that a file holds; an empty file is an empty one.

    texts: dotted keys whose values stay the characters that are written (but for `null`).

    Raises:
        ConfigError: it cannot be read, is no mapping, is larger than a configuration can be (its
            anchors written out), gives a key twice, or has an interpolation, `${...}`, which could
            take an environment's secrets into what is written.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"{file} is larger than {_MAX_BYTES >> 20} MiB: no configuration is")
        loader = _Loader(data.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return {}
        _check(node, file, {}, 0)
        _keep_texts(node, "", texts)
        values = loader.construct_document(node)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{file} is no configuration: it must be KEY: VALUE lines")
    return values


def _keep_texts(node: yaml.Node, key: str, texts: Collection[str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            _keep_texts(value, f"{key}.{name.value}" if key else str(name.value), texts)
    elif isinstance(node, yaml.SequenceNode) and key in texts:
        for value in node.value:
            _keep_texts(value, key, texts)
    elif isinstance(node, yaml.ScalarNode) and key in texts and node.value not in ("null", ""):
        node.tag = "tag:yaml.org,2002:str"


def _check(node: yaml.Node, file: Path, sizes: dict[int, int], depth: int) -> int:
    """The number of values in a node with every anchor written out; raises past the limits."""
    if id(node) in sizes:
        if sizes[id(node)] < 0:
            raise ConfigError(f"{file} holds a value that contains itself")
        return sizes[id(node)]
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{file} is nested more than {_MAX_DEPTH} deep")
    sizes[id(node)] = -1
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ConfigError(f"{file} has the key '{twice}' twice")
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    elif "${" in node.value:
        raise ConfigError(f"{file}: '{node.value}': nothing is looked up; write the value itself")
    size = 1 + sum(_check(part, file, sizes, depth + 1) for part in below)
    if size > _MAX_VALUES:
        raise ConfigError(f"{file} holds over {_MAX_VALUES:,} values, its anchors written out")
    sizes[id(node)] = size
    return size
