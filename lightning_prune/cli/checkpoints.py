"""Checkpoints of a command line run: the best of each size by a logged metric, and the last."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_prune.reporting import Report
from lightning_prune.reporting.grid import short_count
from lightning_prune.reporting.metric_names import mode_of_metric

__all__ = ["BestCheckpoint", "with_checkpoints"]


class BestCheckpoint(ModelCheckpoint):
    """Saves the network whenever a metric improves at the current size, as ``epoch=7-params=12k.ckpt``.

    Args:
        monitor: The metric. Default: a logged accuracy, else a loss, else another validation metric whose name shows
            what is better; validation metrics come first.
        mode: Whether lower (``"min"``) or higher (``"max"``) is better. Default: inferred from the name.

    Raises:
        ValueError: If ``mode`` is not given and cannot be inferred from the name.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["min", "max"] | None = None) -> None:
        known = mode or mode_of_metric(monitor or "loss")
        if known is None:
            raise ValueError(
                f"checkpoint.mode: expected min or max, got none, and the name {monitor!r} does not show which is "
                "better. Give --checkpoint.mode."
            )
        super().__init__(monitor=monitor, mode=known)
        self._params, self._has_validated = 0, False

    @property
    @override
    def state_key(self) -> str:
        """Without the metric, because a resumed run determines it later."""
        return type(self).__qualname__

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_validated |= not trainer.sanity_checking
        if self._is_ready(trainer, pl_module):
            super().on_validation_end(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_ready(trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.monitor is None:
            rank_zero_info(
                "Only the last checkpoint was saved, no best one: no metric was logged whose name shows what is "
                "better. Give --checkpoint.monitor and --checkpoint.mode."
            )

    @override
    def format_checkpoint_name(
        self, metrics: dict[str, Any], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        name = filename or f"{{epoch}}-params={short_count(self._params)}"
        return super().format_checkpoint_name(metrics, name, ver, prefix)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.monitor is None and state_dict["monitor"] is not None:
            self._watch(state_dict["monitor"])
        super().load_state_dict(state_dict)

    def _is_ready(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether there is a metric to compare; also updates the network's size."""
        self._params = sum(parameter.numel() for parameter in module.parameters())
        if self.monitor is None and (self._has_validated or not trainer.enable_validation):
            logged = Report()
            logged.log(0, 0, {name: value for name, value in trainer.callback_metrics.items() if value.numel() == 1})
            if logged.main_metric is not None:
                self._watch(logged.main_metric)
        if self.monitor is not None and self._has_validated and self.monitor not in trainer.callback_metrics:
            names = [name for name in trainer.callback_metrics if name != "params" and not name.startswith("pruning/")]
            raise ValueError(
                f"checkpoint.monitor: expected a metric that the run logs, got {self.monitor!r}. It logs "
                f"{', '.join(names) or 'none'}. Give one of them as --checkpoint.monitor, or omit the option."
            )
        return self.monitor is not None

    def _watch(self, metric: str) -> None:
        same = BestCheckpoint(metric)
        self.monitor, self.mode, self.kth_value = metric, same.mode, same.kth_value


def with_checkpoints(trainer: Any, best: BestCheckpoint) -> list[Callback]:
    """The callbacks of a run plus those that save checkpoints, unless the run has its own or disables them.

    Args:
        trainer: Arguments of the Trainer, by name.
        best: The callback that saves the best checkpoints.
    """
    given = trainer["callbacks"] or []
    callbacks = [*given] if isinstance(given, list) else [given]
    if trainer["enable_checkpointing"] is not False and not any(isinstance(one, Checkpoint) for one in callbacks):
        # Not `save_last` of `best`, which writes only when the metric improves.
        callbacks += [best, ModelCheckpoint(filename="last")]
    return callbacks
