"""Copies of the network in which Lightning's callbacks average its weights: cut, taken back and loaded as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

__all__ = ["as_validated", "averages", "count_from", "counts"]


def averages(trainer: Trainer) -> tuple[nn.Module, ...]:
    """The averaged copies there are now, in the order of their callbacks."""
    models = [(callback, callback._average_model) for callback in _averaging(trainer)]
    return tuple(model.module if isinstance(callback, WeightAveraging) else model for callback, model in models)


def counts(trainer: Trainer) -> list[int]:
    """How many networks each copy is the average of; the next one weighs accordingly."""
    return [0 if (count := _count(callback)) is None else int(count) for callback in _averaging(trainer)]


def count_from(trainer: Trainer, numbers: Sequence[int]) -> None:
    """Let each copy be the average of so many networks."""
    for callback, number in zip(_averaging(trainer), numbers, strict=True):
        count = _count(callback)
        if count is not None:  # else SWA has not begun, and there were none before either
            count.fill_(number)


def _averaging(trainer: Trainer) -> list[Any]:
    return [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)) and callback._average_model is not None
    ]


def _count(callback: Any) -> torch.Tensor | None:
    inside = isinstance(callback, WeightAveraging)
    return cast(torch.Tensor | None, (callback._average_model if inside else callback).n_averaged)


@contextmanager
def as_validated(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Within the context the network has the weights that are validated: averaged ones, where Lightning averages.

    Lightning saves the others in a checkpoint with ``weights_only``.
    """
    swapping = [callback for callback in _averaging(trainer) if isinstance(callback, WeightAveraging)]
    for callback in swapping:
        callback._swap_models(module)
    try:
        yield
    finally:
        for callback in reversed(swapping):
            callback._swap_models(module)
