"""Training batches for repairs."""

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
    """Runs training batches through copies of a module, without side effects on the run.

    The samples are always the same, so that resumed runs are identical. The batches are passed to ``training_step`` of
    a copy with stubs for logging, metrics and optimizers.

    Args:
        trainer: The run.
        module: The LightningModule.
        traced: The network with its calls, for copies.
        batches: Maximum number of batches.
        reader: Name of the repair that needs them, for messages; None if there is none.

    Raises:
        ValueError: If batches are needed and the training data is not one loader over a dataset with a length.
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
