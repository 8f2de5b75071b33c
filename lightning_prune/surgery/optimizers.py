"""Slicing of optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.errors import PruningError
from lightning_prune.structure.graph import IndexArray
from lightning_prune.surgery.tensors import rescaled, take

__all__ = ["OptimizerRefusedError", "UnsliceableStateError", "migrate", "refuse", "unwrap"]

#: Unsupported optimizers by class name, including subclasses, with reasons.
_REFUSED = {
    "LBFGS": "keeps its history as flat vectors over all parameters at once",
    "ZeroRedundancyOptimizer": "shards its state over the processes",
}
#: State of PyTorch's optimizers that changes with a weight: its power of the factor by which that is multiplied.
_POWERS = {
    **dict.fromkeys(("momentum_buffer", "exp_avg", "exp_inf", "grad_avg", "prev"), -1),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "row_var"), -2),
    **dict.fromkeys(("ax", "step_size"), 1),
}


class OptimizerRefusedError(PruningError, ValueError):
    """Raised for an optimizer whose state cannot be sliced."""


class UnsliceableStateError(PruningError, ValueError):
    """Raised for optimizer state that does not match the parameter's axes."""


def unwrap(optimizer: Optimizer) -> Optimizer:
    """Unwrap Lightning's ``LightningOptimizer``."""
    # Recognised by name, as this package does not import Lightning; the wrapper's `__dict__` is a stale copy.
    if "LightningOptimizer" in _ancestry(optimizer):
        return optimizer.optimizer  # type: ignore[attr-defined, no-any-return]  # only the wrapper has it
    return optimizer


def refuse(optimizers: Iterable[Optimizer]) -> None:
    """Check that all optimizers are supported.

    Raises:
        OptimizerRefusedError: If one flattens or shards its parameters.
        TypeError: If one is not an optimizer.
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


def migrate(
    state: Mapping[str, Any],
    shape: tuple[int, ...],
    kept: Mapping[int, IndexArray],
    factors: tuple[IndexArray, float] | None = None,
) -> dict[str, Any]:
    """Slice the optimizer state of a parameter.

    Tensors of the parameter's shape (momentum, second moments) are sliced like it; factored ones, whose axes are the
    parameter's or of length 1 (Adafactor's row and column means), along the axes they have; scalars (step counts) are
    kept. The contribution of removed units to a factored mean decays with the optimizer's own rate.

    Args:
        state: ``optimizer.state[parameter]``.
        shape: The parameter's shape before the cut.
        kept: Positions kept by dimension.
        factors: Rows of the parameter after the cut that are multiplied, and by what. Gradients are divided by it, so
            momentum and moments of PyTorch's optimizers are, too.

    Raises:
        UnsliceableStateError: If an entry has another shape or type; the message names its key.
    """
    return {
        key: _rescaled(_migrated(key, value, shape, kept), factors, _POWERS.get(key, 0)) for key, value in state.items()
    }


def _rescaled(value: Any, factors: tuple[IndexArray, float] | None, power: int) -> Any:
    has_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) > 1
    return rescaled(value, factors, power) if has_rows and power else value


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
