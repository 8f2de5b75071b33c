"""Every size that a network passes through, saved: one training gives accuracy against size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from lightning_prune.callbacks.averages import as_validated
from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext
from lightning_prune.callbacks.moments import is_rehearsal
from lightning_prune.reporting import SizeCheckpoint

__all__ = ["SaveEachSize"]

#: Folder of the checkpoints, beside the report.
_FOLDER = "sizes"


@final
@dataclass(frozen=True)
class SaveEachSize(CutExtension):
    """Saves the network before each cut and at the end, as ``sizes/params=12345.ckpt`` beside the report.

    The report gets a table and a picture of the main metric against size. The checkpoints hold weights,
    hyperparameters and history, but no optimizer: they are made for ``load_from_checkpoint`` and ``Trainer.test``. Of
    several networks with the same number of parameters the last one stays.
    """

    @override
    def before_cut(self, run: RunContext) -> None:
        trainer, report, size = run.trainer, run.report, run.report.size
        if is_rehearsal(trainer) or size is None:
            return
        file = f"{_FOLDER}/params={size.params}.ckpt"
        with as_validated(trainer, run.module):
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
