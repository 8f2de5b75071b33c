"""Batches of the training data for repairs, apart from the loop that trains."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_prune.callbacks.training_data import require_readable, training_data
from lightning_prune.scoring import Batch, DataPass
from lightning_prune.structure import TracedModel
from lightning_prune.structure.tracing import FakeCopy

__all__ = ["Calibration"]


class Calibration:
    """Runs training batches through copies of a module, without a trace in module, loop and random states.

    The samples are the same every time, whatever was trained in between: a run that was interrupted repairs as one
    that never stopped. The batches go through ``training_step``, on a copy whose logging, metrics and optimizers do
    nothing.

    Args:
        trainer: The run, whose training data and devices are used.
        module: The module that trains.
        traced: How copies of it are made.
        batches: How many are read at most.
        reader: Who reads them, for texts; ``None`` if nobody does.

    Raises:
        ValueError: If the training data is needed and not one loader over a data set with a length.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, traced: TracedModel, *, batches: int, reader: str | None
    ) -> None:
        self.trainer, self.module, self.traced = trainer, module, traced
        self.data: DataPass | None = None
        if reader is not None:
            require_readable(trainer, reader)
            (step,) = traced.optional
            rest = step.args[1:]
            data = training_data(trainer, module, batches=batches, is_shared=False)
            self.data = data.using(inputs=lambda raw: (raw, *rest), call=partial(_stepped, trainer, step.method))

    def copy(self) -> nn.Module:
        """A copy of the module without the user's hooks, ready to run."""
        return FakeCopy(self.module, self.traced.memo, self.traced.prepare, kind="real").module

    def run(self, copy: nn.Module, n: int) -> None:
        """Run the first ``n`` batches through a copy."""
        if self.data is not None:
            self.data.run(copy, keep_modes=True, limit=n)


def _stepped(trainer: Trainer, method: str, copy: nn.Module, batch: Batch) -> Any:
    """A training step of a copy."""
    with trainer.precision_plugin.forward_context():
        return getattr(copy, method)(*batch.args)
