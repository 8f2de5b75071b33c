"""Copies of the network in which Lightning's callbacks average its weights: cut, taken back and loaded as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

__all__ = ["as_validated", "averages"]


def averages(trainer: Trainer) -> tuple[nn.Module, ...]:
    """The averaged copies there are now, in the order of their callbacks."""
    found: list[nn.Module] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            found.append(callback._average_model.module)
        elif isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            found.append(callback._average_model)
    return tuple(found)


@contextmanager
def as_validated(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Within the context the network has the weights that are validated: averaged ones, where Lightning averages.

    Lightning saves the others in a checkpoint with ``weights_only``.
    """
    swapping = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None
    ]
    for callback in swapping:
        callback._swap_models(module)
    try:
        yield
    finally:
        for callback in reversed(swapping):
            callback._swap_models(module)
