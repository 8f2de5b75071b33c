"""Check the types of values read from a file before they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

__all__ = ["require"]


def require(found: object, kind: Any, what: str) -> None:
    """Refuse a value that does not have a type, or has parts that do not.

    Args:
        found: The value.
        kind: A type, also ``X | None``, ``list[X]``, ``dict[X, Y]``, a ``Literal`` or a dataclass. An int is a count:
            not negative, with at most 63 bits. An int is accepted as a float; a bool is not accepted as a number.
        what: Name of the value, for the error.

    Raises:
        TypeError: If the value or a part has another type; the message names the part.
        ValueError: If a count is out of range.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if found is None:
            return
        (kind,) = (option for option in inner if option is not NoneType)
    if not _is(found, kind):
        raise TypeError(f"expected {what} to be {getattr(kind, '__name__', kind)}, got {type(found).__name__}")
    if isinstance(found, Tensor) and (found.is_meta or found.layout is not torch.strided):
        raise TypeError(f"expected {what} to be a dense tensor with values, got {found.layout} on {found.device}")
    if kind is int and not 0 <= found < 2**63:  # type: ignore[operator]
        raise ValueError(f"expected {what} to be a count, got {found}")
    for part, its_kind, name in _parts(found, kind, what):
        require(part, its_kind, name)


def _is(found: object, kind: Any) -> bool:
    plain = get_origin(kind) or kind
    if plain is Literal:
        return isinstance(found, str) and found in get_args(kind)
    if plain is Any or (isinstance(found, bool) and plain in (int, float)):
        return plain is Any
    return isinstance(found, (int, float) if plain is float else plain)


def _parts(found: object, kind: Any, what: str) -> Iterator[tuple[object, Any, str]]:
    """The parts of a value, each with its type and name."""
    inner = get_args(kind)
    if isinstance(found, list) and inner:
        yield from ((item, inner[0], f"{what}[{index}]") for index, item in enumerate(found))
    elif isinstance(found, Mapping) and inner:
        yield from ((key, inner[0], f"a key of {what}") for key in found)
        yield from ((value, inner[1], f"{what}[{key!r}]") for key, value in found.items())
    elif is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        yield from ((getattr(found, f.name), hints[f.name], f"{what}.{f.name}") for f in fields(kind))
