"""Every size that a network passes through, saved: one training gives accuracy against size."""

from __future__ import annotations

import math
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_prune.reporting import Report, Rung, Size

__all__ = ["save_rung"]

#: Folder of the checkpoints, beside the report.
_FOLDER = "ladder"


def save_rung(trainer: Trainer, report: Report, size: Size, folder: Path) -> None:
    """Save the network as it is, before it is cut or at the end, and note it in the report.

    The checkpoint holds weights, hyperparameters and history, but no optimizer: it is made for
    ``load_from_checkpoint`` and ``Trainer.test``. Of networks with as many parameters the last one stays.

    Args:
        trainer: The run.
        report: What was measured; the rung joins it.
        size: Of the network.
        folder: Where the report goes.
    """
    file = f"{_FOLDER}/params={size.params}.ckpt"
    trainer.save_checkpoint(folder / file, weights_only=True)
    since = report.cuts[-1].step if report.cuts else -1
    measured = report.between(since, math.inf)
    rung = Rung(
        file, size.params, size.macs, trainer.current_epoch, trainer.global_step, measured[-1] if measured else None
    )
    report.rungs[:] = [other for other in report.rungs if other.file != file] + [rung]
