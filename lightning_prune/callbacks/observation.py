"""Observation of training batches by a criterion's statistic."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks.lightning.processes import in_exception, merged
from lightning_prune.scoring import Statistic
from lightning_prune.surgery.compiled import eager

__all__ = ["Observation"]


class Observation:
    """A statistic with its hooks and number of batches since the last cut.

    Args:
        statistic: Statistic of a criterion; None if it uses weights only.
        saved: State of the statistic from a checkpoint.
        batches: Number of training batches since the last cut.
    """

    def __init__(
        self, statistic: Statistic | None = None, saved: Mapping[str, torch.Tensor] | None = None, batches: int = 0
    ) -> None:
        self.statistic, self.batches = statistic, batches
        self._saved = dict(saved or {})  # loaded when there is a statistic
        self._before: Mapping[str, torch.Tensor] | None = None  # state without the current batch
        self._open = ExitStack()  # hooks of the current batch

    def of(self, statistic: Statistic | None) -> Observation:
        """Continue with a statistic of the current network, into which the saved state is loaded.

        Raises:
            ValueError: If the state is of another criterion or network.
        """
        if statistic is not None and self._saved:
            statistic.load_state_dict(self._saved)
        return Observation(statistic, batches=self.batches)

    @property
    def is_empty(self) -> bool:
        """Whether batches must be observed and none was."""
        return self.statistic is not None and not self.statistic.collects and not self.statistic.update_called

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start to observe a batch."""
        if self.statistic is not None:
            self._before = self._whole()
            self._open.enter_context(eager(module))
            handles: list[RemovableHandle] = []
            try:
                handles = self.statistic.attach(module, _loss_scale(trainer))
                for handle in handles:
                    self._open.callback(handle.remove)
            except BaseException:  # an interrupt may come before all are on the stack
                for handle in handles:
                    handle.remove()
                raise

    def stop(self) -> None:
        """Remove the hooks."""
        self._open.close()

    def end(self) -> None:
        """Finish a batch, observed or not."""
        self.stop()
        self._before = None
        self.batches += 1

    def paused(self) -> Observation:
        """The observation without a statistic, to be continued by another fit."""
        return Observation(saved=self._whole(), batches=self.batches)

    def state(self) -> dict[str, torch.Tensor]:
        """State of the statistic, merged over all processes, for a checkpoint."""
        mine = self._whole()
        # Not merged within a batch or an exception, where other processes may not take part.
        if self.statistic is None or not mine or self._before is not None or in_exception():
            return dict(mine)
        with merged(self.statistic):
            return {**self._whole(), "batches": mine["batches"]}

    def _whole(self) -> Mapping[str, torch.Tensor]:
        """State without an incomplete batch, which is repeated after a resume."""
        if self._before is not None:
            return self._before
        if self.statistic is None:
            return self._saved
        return {name: value.detach().clone() for name, value in self.statistic.state_dict().items()}


def _loss_scale(trainer: Trainer) -> float:
    """Loss scale of fp16 mixed precision."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
