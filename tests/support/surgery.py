"""Cuts along given axes, through the transaction that callbacks and `prune` use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.structure import Axes
from lightning_prune.surgery import CutError, Transaction, transaction
from lightning_prune.surgery.shrink import shrink

__all__ = ["cut_and_check"]


def cut_and_check(
    model: nn.Module,
    axes: Axes,
    optimizers: Iterable[Optimizer],
    copies: Iterable[nn.Module],
    run: Callable[[], Any],
    drops: Mapping[str, str] | None = None,
) -> Transaction:
    """Cut a network of which no structure is known, and run it; what it returns can be undone."""
    with transaction(model, optimizers, copies, run) as change:
        try:
            shrink(change, model, axes, optimizers, copies, drops)
        except Exception as error:
            raise CutError(f"The cut failed and was taken back, nothing has changed: {error}") from error
    return change
