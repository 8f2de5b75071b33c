"""What a criterion observes while the network trains, of sampled batches only."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks.compiled import as_written
from lightning_prune.callbacks.processes import in_exception, merged
from lightning_prune.scoring import Statistic

__all__ = ["Observation"]


class Observation:
    """A statistic, its hooks and the batches since it began, from one cut to the next.

    Args:
        statistic: Of a criterion; ``None`` if it looks at weights only.
        saved: What a checkpoint had observed.
        batches: Training batches that went before, since the last cut.
    """

    def __init__(
        self, statistic: Statistic | None = None, saved: Mapping[str, torch.Tensor] | None = None, batches: int = 0
    ) -> None:
        self.statistic, self.batches = statistic, batches
        self._saved = dict(saved or {})  # waits for a statistic
        self._before: Mapping[str, torch.Tensor] | None = None  # without the batch that is running
        self._open = ExitStack()  # hooks of that batch

    def of(self, statistic: Statistic | None) -> Observation:
        """What was saved, gone on with by a statistic of the network as it is.

        Raises:
            ValueError: If it was saved by another criterion or of another network.
        """
        if statistic is not None and self._saved:
            statistic.load_state_dict(self._saved)
        return Observation(statistic, batches=self.batches)

    @property
    def is_empty(self) -> bool:
        """Whether batches have to be observed, and none was."""
        return self.statistic is not None and not self.statistic.collects and not self.statistic.update_called

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Observe the batch that begins."""
        if self.statistic is not None:
            self._before = self._whole()
            self._open.enter_context(as_written(module))
            handles: list[RemovableHandle] = []
            try:
                handles = self.statistic.attach(module, _loss_scale(trainer))
                for handle in handles:
                    self._open.callback(handle.remove)
            except BaseException:  # an interrupt may come before they are all remembered
                for handle in handles:
                    handle.remove()
                raise

    def stop(self) -> None:
        """Leave no hook behind."""
        self._open.close()

    def end(self) -> None:
        """A batch is through, observed or not."""
        self.stop()
        self._before = None
        self.batches += 1

    def paused(self) -> Observation:
        """What is kept when a fit ends and another goes on."""
        return Observation(saved=self._whole(), batches=self.batches)

    def state(self) -> dict[str, torch.Tensor]:
        """What was observed by all processes, for a checkpoint."""
        mine = self._whole()
        # Amid a batch, and where others may not come, every process keeps its own.
        if self.statistic is None or not mine or self._before is not None or in_exception():
            return dict(mine)
        with merged(self.statistic):
            return {**self._whole(), "batches": mine["batches"]}

    def _whole(self) -> Mapping[str, torch.Tensor]:
        """Up to the last whole batch: one that fails is run again by who resumes."""
        if self._before is not None:
            return self._before
        if self.statistic is None:
            return self._saved
        return {name: value.detach().clone() for name, value in self.statistic.state_dict().items()}


def _loss_scale(trainer: Trainer) -> float:
    """What mixed precision in fp16 multiplies the loss with."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
