"""What can be wrong in a checkpoint: every part of what we keep in it, by itself, in every way there is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Damage", "damaged", "damages"]

#: In place of a number.
NUMBERS = (-5, 0, 10**9, 10**40, 1.5, math.nan, math.inf, True)
#: In place of anything.
OTHERS = (None, "x", 3, [], [None], {}, {"x": 1}, torch.tensor([1.0]))


@dataclass(frozen=True)
class Damage:
    """One part of a checkpoint, and what becomes of it.

    Attributes:
        path: Keys that lead to it.
        kind: What is done, for the test's name.
        value: What is in its place; `GONE` if nothing is.
    """

    path: tuple[Any, ...]
    kind: str
    value: Any

    def __str__(self) -> str:
        return f"{'/'.join(map(str, self.path))}: {self.kind}"


#: In place of a part that is missing.
GONE = object()


def damages(checkpoint: Any, keys: tuple[str, ...]) -> Iterator[Damage]:
    """Everything that can be done to the parts of a checkpoint that begin with one of these keys."""
    for key in keys:
        if key in checkpoint:
            yield from _of(checkpoint[key], (key,))
    for name, state in checkpoint.get("callbacks", {}).items():
        if isinstance(state, dict) and "format" in state:
            yield from _of(state, ("callbacks", name))


def damaged(checkpoint: dict[str, Any], damage: Damage) -> dict[str, Any]:
    """A copy of a checkpoint with the damage."""
    result = owner = copy.deepcopy(checkpoint)
    for key in damage.path[:-1]:
        owner = owner[key]
    if damage.value is GONE:
        del owner[damage.path[-1]]
    else:
        owner[damage.path[-1]] = damage.value
    return result


def _of(value: Any, path: tuple[Any, ...]) -> Iterator[Damage]:
    yield Damage(path, "gone", GONE)
    for other in OTHERS:
        if type(other) is not type(value):
            yield Damage(path, f"a {type(other).__name__} {str(other)[:10]}", other)
    yield from (Damage(path, kind, changed) for kind, changed in _changed(value))
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from _of(item, (*path, key))


def _changed(value: Any) -> Iterator[tuple[str, Any]]:
    """Others of the same type."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from ((f"number {number}", number) for number in NUMBERS if number != value)
    elif isinstance(value, str):
        yield "another text", "another"
    elif isinstance(value, Tensor):
        yield from _tensors(value)
    elif isinstance(value, list):
        yield "one more", [*value, *(value[-1:] or [1])]
    elif isinstance(value, dict):
        yield "empty", {}
        yield "a key more", {**value, "x": next(iter(value.values()), 1)}
        yield "a number for a key", {**value, 7: 1}


def _tensors(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "meta", tensor.to("meta")
    yield "empty", tensor.new_empty((0,))
    yield "complex", tensor.to(torch.complex64)
    yield "another dimension", tensor.unsqueeze(0)
    if not tensor.is_floating_point():
        yield "real", tensor.double() + 0.5
        yield "NaN", torch.full_like(tensor, math.nan, dtype=torch.float64)
    if tensor.dtype == torch.int64:
        yield "negative", -tensor - 1
    if tensor.ndim:
        yield "shorter", tensor[:-1]
        yield "longer", torch.cat([tensor, tensor[-1:]])
        yield "sparse", tensor.to_sparse()
