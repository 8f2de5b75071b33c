"""Validated reading of plain data from files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import PruningError
from lightning_prune.structure.graph import IndexArray

__all__ = [
    "HistoryError",
    "array",
    "count",
    "counts",
    "damaged",
    "entry",
    "items",
    "number",
    "positions",
    "shape",
    "value",
]

# Files hold integers of 64 bits.
_LARGEST = 2**63 - 1

T = TypeVar("T")


class HistoryError(PruningError, ValueError):
    """Raised for a history that is damaged or does not belong to the network; the network is unchanged."""


def damaged(problem: str) -> HistoryError:
    """The error for a history in which there is a ``problem``."""
    return HistoryError(f"The pruning history has an error: {problem}. Nothing has changed.")


def value(found: object, kind: type[T], what: str) -> T:
    """``found``, if it is of the type ``kind``; truth values are no integers here."""
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
        raise damaged(f"expected {what} to be a {kind.__name__}, got {type(found).__name__}")
    return found


def entry(mapping: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """``mapping[key]``, if it is there and of the type ``kind``."""
    if key not in mapping:
        raise damaged(f"it has no {key!r}")
    return value(mapping[key], kind, repr(key))


def items(mapping: Mapping[str, Any], key: str, kind: type[T]) -> Iterator[tuple[str, T]]:
    """The items of the dictionary ``mapping[key]``, if they are strings with values of the type ``kind``."""
    for name, found in entry(mapping, key, dict).items():
        yield value(name, str, f"a key of {key!r}"), value(found, kind, f"{key}[{name!r}]")


def count(mapping: Mapping[str, Any], key: str, least: int = 0) -> int:
    """``mapping[key]``, if it is an integer of at least ``least``."""
    return _at_least(entry(mapping, key, int), least, repr(key))


def counts(mapping: Mapping[str, Any], key: str) -> dict[str, int]:
    """The dictionary ``mapping[key]``, if it has positive integers by name."""
    return {name: _at_least(found, 1, f"{key}[{name!r}]") for name, found in items(mapping, key, int)}


def number(found: object, what: str) -> int | float:
    """``found``, if it is an integer or a float."""
    return found if isinstance(found, float) else _at_least(value(found, int, what), -_LARGEST, what)


def shape(found: list[Any], name: str) -> tuple[int, ...]:
    """``found`` as the shape of the tensor ``name``."""
    lengths = tuple(value(length, int, f"each length of {name!r}") for length in found)
    if not lengths or min(lengths) < 1 or max(lengths) > _LARGEST:
        raise damaged(f"{list(lengths)} is not the shape of a tensor with units ({name!r})")
    return lengths


def array(found: object, what: str) -> Tensor:
    """``found``, if it is a tensor whose values can be read one by one."""
    tensor = value(found, Tensor, what)
    if tensor.layout is not torch.strided or tensor.is_meta:
        where = "on the meta device" if tensor.is_meta else f"of the layout {tensor.layout}"
        raise damaged(f"expected {what} to be a dense tensor, got one {where}")
    return tensor


def positions(found: object, length: int, name: str) -> IndexArray:
    """``found`` as what is kept of ``length`` positions of ``name``: ascending, at least one."""
    tensor = array(found, f"what is kept of {name!r}")
    if tensor.dtype != torch.int64 or tensor.ndim != 1:
        raise damaged(f"expected int64 positions in one dimension for {name!r}, got {tensor.dtype} in {tensor.ndim}")
    kept = tensor.cpu().numpy().copy()
    if not kept.size or kept[0] < 0 or kept[-1] >= length or np.any(np.diff(kept) <= 0):
        raise damaged(f"expected ascending positions in [0, {length}) for {name!r}, got {kept.tolist()[:8]}")
    return kept


def _at_least(found: int, least: int, what: str) -> int:
    if not least <= found <= _LARGEST:
        raise damaged(f"expected {what} to be at least {least} and at most {_LARGEST}, got {found}")
    return found
