"""Resetting callbacks that monitor a metric, so that networks of different sizes are not compared."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_prune.packages import both

__all__ = ["Thresholds", "hold_early_stopping", "reset_monitors"]


def reset_monitors(trainer: Trainer) -> None:
    """Reset the best scores of every ``ModelCheckpoint`` and ``EarlyStopping``; files are kept."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, both(ModelCheckpoint)) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.kth_best_model_path = ""
            callback.kth_value = _worst(callback.mode)
            callback.best_model_score = None
            callback.best_model_path = ""
            callback.current_score = None
    hold_early_stopping(trainer)


def hold_early_stopping(trainer: Trainer) -> None:
    """Reset every ``EarlyStopping``, so that the next value is an improvement."""
    for callback in _early_stopping(trainer):
        callback.wait_count = 0
        callback.best_score = _worst(callback.mode)


class Thresholds:
    """Disables ``stopping_threshold`` of ``EarlyStopping`` until the network is small enough.

    ``divergence_threshold`` stays active.
    """

    def __init__(self) -> None:
        self._withheld: list[tuple[EarlyStopping, float]] = []

    def withhold(self, trainer: Trainer) -> None:
        """Disable the thresholds."""
        for callback in _early_stopping(trainer):
            if callback.stopping_threshold is not None:
                self._withheld.append((callback, callback.stopping_threshold))
                callback.stopping_threshold = None

    def give_back(self) -> None:
        """Enable the thresholds again."""
        while self._withheld:
            callback, threshold = self._withheld.pop()
            callback.stopping_threshold = threshold


def _early_stopping(trainer: Trainer) -> list[EarlyStopping]:
    return [callback for callback in trainer.callbacks if isinstance(callback, both(EarlyStopping))]  # type: ignore[attr-defined]


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)
