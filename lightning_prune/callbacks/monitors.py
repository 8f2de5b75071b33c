"""What watches a metric must not compare a narrow network with the wider one it was."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

__all__ = ["Thresholds", "hold_early_stopping", "reset_monitors"]


def reset_monitors(trainer: Trainer) -> None:
    """Let the best so far of every ``ModelCheckpoint`` and ``EarlyStopping`` start anew; files stay."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.kth_best_model_path = ""
            callback.kth_value = _worst(callback.mode)
            callback.best_model_score = None
            callback.best_model_path = ""
            callback.current_score = None
    hold_early_stopping(trainer)


def hold_early_stopping(trainer: Trainer) -> None:
    """Any next value is an improvement for every ``EarlyStopping``: it does not stop before that."""
    for callback in _early_stopping(trainer):
        callback.wait_count = 0
        callback.best_score = _worst(callback.mode)


class Thresholds:
    """Values that are good enough for ``EarlyStopping`` to end a run, taken away until the network is small enough.

    Values that are too bad stay: a run that diverges ends.
    """

    def __init__(self) -> None:
        self._withheld: list[tuple[EarlyStopping, float]] = []

    def withhold(self, trainer: Trainer) -> None:
        """Take them away."""
        for callback in _early_stopping(trainer):
            if callback.stopping_threshold is not None:
                self._withheld.append((callback, callback.stopping_threshold))
                callback.stopping_threshold = None

    def give_back(self) -> None:
        """They count again."""
        while self._withheld:
            callback, threshold = self._withheld.pop()
            callback.stopping_threshold = threshold


def _early_stopping(trainer: Trainer) -> list[EarlyStopping]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)
