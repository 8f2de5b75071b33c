"""Recipes as plain dictionaries: several in one, and values set by dotted keys as on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

__all__ = ["get", "merge", "read", "set_value"]

Config = dict[str, Any]


def read(files: Sequence[Path]) -> Config:
    """The recipes of several files as one; later ones win.

    Raises:
        ValueError: If a file holds no mapping.
    """
    merged: Config = {}
    for file in files:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise ValueError(f"expected a recipe (a mapping of model, data, trainer, ...) in {file}, got {loaded!r}")
        merged = merge(merged, loaded)
    return merged


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> Config:
    """Merge two nested mappings into a new one; values of the second take precedence."""
    merged = deepcopy(dict(first))
    for key, value in second.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, Mapping)
        merged[key] = merge(merged[key], value) if both else deepcopy(value)
    return merged


def set_value(config: Config, key: str, value: Any) -> None:
    """Set a dotted key in place: ``model.lr`` also where ``model`` is a class with ``init_args``.

    The last callback in the list is meant by ``trainer.callbacks``, as on the command line.
    """
    *parents, last = key.split(".")
    node = config
    for part in parents:
        node = _arguments(node, part)
        if not isinstance(node.get(part), (dict, list)):
            # A class can be given by its name alone.
            node[part] = {"class_path": node[part]} if isinstance(node.get(part), str) else {}
        node = node[part][-1] if isinstance(node[part], list) else node[part]
    _arguments(node, last)[last] = deepcopy(value)


def get(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; ``None`` where the recipe leaves it out."""
    node: Any = config
    for part in key.split("."):
        node = node[-1] if isinstance(node, list) and node else node
        if isinstance(node, dict) and part not in node:
            node = node.get("init_args")
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def _arguments(node: Config, part: str) -> Config:
    """Where a key of a node is: among the arguments if the node is a class."""
    if "class_path" in node and part not in node and part not in ("class_path", "init_args"):
        arguments: Config = node.setdefault("init_args", {})
        return arguments
    return node
