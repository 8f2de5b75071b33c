"""Calls of a network and the tensors in their outputs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

__all__ = ["Call", "forked_rng", "output_tensors"]

# Types whose attributes are not searched for output tensors.
_HOLDS_NO_OUTPUT = (int, float, str, type(None), bytes, type, nn.Module, ModuleType, FunctionType, MethodType)


@dataclass(frozen=True)
class Call:
    """A call of the network: ``getattr(model, method)(*args, **kwargs)`` in train or eval mode."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    method: str = "forward"
    training: bool = False


def output_tensors(out: Any) -> list[torch.Tensor]:
    """All tensors in a nested output, including those in attributes of objects."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()

    def walk(thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            found.append(thing)
            return
        if id(thing) in seen or isinstance(thing, _HOLDS_NO_OUTPUT):
            return
        seen.add(id(thing))
        leaves = tree_leaves(thing)  # of whatever has been registered with PyTorch
        if not (len(leaves) == 1 and leaves[0] is thing):
            parts = leaves
        elif isinstance(thing, Mapping):
            parts = [*thing.keys(), *thing.values()]
        elif isinstance(thing, (Sequence, Set)):
            parts = list(thing)
        else:
            slots = (name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ()))
            parts = [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in slots)]
        for part in parts:
            walk(part)

    walk(out)
    return found


@contextmanager
def forked_rng() -> Iterator[None]:
    """Restore the state of all random generators on exit."""
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
