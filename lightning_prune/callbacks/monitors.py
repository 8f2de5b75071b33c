"""What watches a metric must not compare a narrow network with the wider one it was."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

__all__ = ["hold_early_stopping", "reset_monitors"]


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
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = _worst(callback.mode)


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)
