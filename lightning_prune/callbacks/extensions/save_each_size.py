"""Checkpoints of a network at every size: accuracy against size from one training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext
from lightning_prune.callbacks.lightning.averages import validation_weights
from lightning_prune.callbacks.lightning.progress import is_fast_dev_run
from lightning_prune.reporting import SizeCheckpoint

__all__ = ["SaveEachSize"]

#: Folder of the checkpoints, next to the report.
_FOLDER = "sizes"


@final
@dataclass(frozen=True)
class SaveEachSize(CutExtension):
    """Saves the network before each cut and at the end, as ``sizes/params=12345.ckpt`` in the report's folder.

    The report gets a table and a picture of the main metric against size. The checkpoints contain weights,
    hyperparameters and history, but no optimizer: use them with ``load_from_checkpoint`` and ``Trainer.test``. Of
    several networks with the same number of parameters the last one is kept.
    """

    @override
    def before_cut(self, run: RunContext) -> None:
        trainer, report, size = run.trainer, run.report, run.report.size
        if is_fast_dev_run(trainer) or size is None:
            return
        file = f"{_FOLDER}/params={size.params}.ckpt"
        with validation_weights(trainer, run.module):
            trainer.save_checkpoint(run.folder() / file, weights_only=True)
        since = report.cuts[-1].step if report.cuts else -1
        measured = report.between(since, math.inf)
        saved = SizeCheckpoint(
            file, size.params, size.macs, trainer.current_epoch, trainer.global_step, measured[-1] if measured else None
        )
        report.size_checkpoints[:] = [other for other in report.size_checkpoints if other.file != file] + [saved]

    @override
    def on_train_end(self, run: RunContext) -> None:
        self.before_cut(run)
