"""Calls of ``forward`` on an example or a training batch, of which the network's inputs are found by trying."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.structure.discovery import trace
from lightning_prune.structure.traced_model import StructureError, TracedModel
from lightning_prune.structure.tracing import Call

__all__ = ["Arguments", "accepted", "candidates", "forward_calls"]


class Arguments(tuple[Any, ...]):
    """An example given as a tuple, which is tried first as the arguments of ``forward``."""


def forward_calls(model: nn.Module, batch: Any, own_example: Any, **copying: Any) -> tuple[Call, ...]:
    """Calls of ``forward`` in eval and in train mode, on the first candidate that the network accepts."""
    found = list(candidates(batch, own_example))
    if len(found) == 1:
        return _calls(model, found[0])
    return _calls(model, found[accepted(model, batch, own_example, **copying)])


def _calls(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Call, ...]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = tree_map(lambda leaf: _moved(leaf, device), inputs)
    return tuple(Call(args, kwargs, training=training) for training in (False, True))


def accepted(model: nn.Module, batch: Any, own_example: Any = None, **copying: Any) -> int:
    """Index of the first candidate that the network accepts.

    Raises:
        StructureError: If it accepts none.
    """
    failures = []
    for number, inputs in enumerate(candidates(batch, own_example)):
        failure = _failure(model, inputs, **copying)
        if failure is None:
            return number
        failures.append(failure)
    if not failures:
        raise StructureError(
            f"{type(model).__name__}: expected an example of what `forward` takes, found none. Set "
            "`example_input_array` in the module, or pass an `example`."
        )
    raise StructureError(
        f"{type(model).__name__}: `forward` accepts no part of the example or training batch, as it is or taken apart. "
        f"Set `example_input_array` in the module, or pass an `example`. The first attempt: {failures[0]}"
    )


def _failure(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], **copying: Any) -> str | None:
    """Why a network does not accept these inputs; None if it does."""
    try:
        trace(TracedModel(model, _calls(model, inputs), **copying), trial=False)
    except StructureError as error:
        return str(error)
    return None


def _moved(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_meta and device.type != "meta":
        raise StructureError("expected an example with content, got a tensor on the meta device. Give real numbers.")
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def candidates(batch: Any, own_example: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield arguments to try, the most likely first."""
    if isinstance(batch, Arguments):
        yield tuple(batch), {}
        yield from candidates(tuple(batch), None)
    elif own_example is not None:
        if isinstance(own_example, Mapping):
            yield (), dict(own_example)
        else:
            yield (tuple(own_example) if isinstance(own_example, (tuple, list)) else (own_example,)), {}
    elif isinstance(batch, Mapping):
        yield (batch,), {}
        yield (), dict(batch)
        for value in batch.values():
            yield (value,), {}
    elif isinstance(batch, (tuple, list)) and batch:
        yield (batch[0],), {}
        yield tuple(batch), {}
        yield (batch,), {}
        yield tuple(batch[:-1]), {}
    elif batch is not None:
        yield (batch,), {}
