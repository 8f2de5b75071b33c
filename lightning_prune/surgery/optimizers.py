"""What an optimizer remembers of a parameter, and how it follows a cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.errors import PruningError
from lightning_prune.structure.graph import IndexArray
from lightning_prune.surgery.tensors import take

__all__ = ["OptimizerRefusedError", "UnsliceableStateError", "migrate", "refuse", "unwrap"]

#: Optimizers, by class name (subclasses count), that cannot follow a cut, and why.
_REFUSED = {
    "LBFGS": "keeps its history as flat vectors over all parameters at once",
    "ZeroRedundancyOptimizer": "shards its state over the processes",
}


class OptimizerRefusedError(PruningError, ValueError):
    """An optimizer whose state cannot follow a cut."""


class UnsliceableStateError(PruningError, ValueError):
    """A piece of optimizer state that lies on none of its parameter's axes."""


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself where Lightning's ``LightningOptimizer`` stands around it."""
    # The wrapper's own `__dict__` is a stale copy, and its class is recognised by name: this room knows no Lightning.
    if "LightningOptimizer" in _ancestry(optimizer):
        return optimizer.optimizer  # type: ignore[attr-defined, no-any-return]  # only the wrapper has it
    return optimizer


def refuse(optimizers: Iterable[Optimizer]) -> None:
    """Do nothing if every optimizer can follow a cut.

    Raises:
        OptimizerRefusedError: If one flattens or shards its parameters; the text says which, why and what to use.
        TypeError: If something else than an optimizer comes.
    """
    for optimizer in map(unwrap, optimizers):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Expected a `torch.optim.Optimizer`, got {type(optimizer).__name__}.")
        for name in _ancestry(optimizer):
            if name in _REFUSED:
                raise OptimizerRefusedError(
                    f"{type(optimizer).__name__} {_REFUSED[name]}, so a network cannot shrink under it. Use one that "
                    "keeps its state per parameter (SGD, Adam, AdamW, ...), or remove the pruning callback."
                )


def migrate(state: Mapping[str, Any], shape: tuple[int, ...], kept: Mapping[int, IndexArray]) -> dict[str, Any]:
    """One parameter's optimizer state after a cut of that parameter.

    Tensors of the parameter's shape (momentum, second moments) are sliced like it; factored ones, whose every axis is
    either the parameter's or of length 1 (Adafactor's row and column means), along the axes they have; single numbers
    (step counts) are kept. A factored mean still contains what the removed units contributed: it fades with the
    optimizer's own decay.

    Args:
        state: ``optimizer.state[parameter]``.
        shape: The parameter's shape before the cut.
        kept: Positions kept by dimension.

    Raises:
        UnsliceableStateError: If an entry fits none of this; the text names its key.
    """
    return {key: _migrated(key, value, shape, kept) for key, value in state.items()}


def _migrated(key: str, value: Any, shape: tuple[int, ...], kept: Mapping[int, IndexArray]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if not isinstance(value, Tensor):
        raise UnsliceableStateError(f"`{key}` is a {type(value).__name__}")
    if value.numel() == 1:
        return value
    if value.ndim == len(shape) and all(own in (full, 1) for own, full in zip(value.shape, shape, strict=True)):
        return take(value, {dim: rows for dim, rows in kept.items() if value.shape[dim] == shape[dim]})
    raise UnsliceableStateError(f"`{key}` has shape {tuple(value.shape)}, the parameter {shape}")


def _ancestry(optimizer: object) -> list[str]:
    return [base.__name__ for base in type(optimizer).__mro__]
