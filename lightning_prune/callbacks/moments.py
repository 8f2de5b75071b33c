"""Where a run stands, counted as schedules count."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_prune.planning import CutPoint, RunLength

__all__ = ["is_rehearsal", "now", "run_length"]


def is_rehearsal(trainer: Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, too short for a schedule: everything is checked, nothing is cut."""
    return bool(getattr(trainer, "fast_dev_run", False))


def now(trainer: Trainer, point: CutPoint) -> int:
    """How long the run has gone, in the unit of a cut."""
    if point.unit == "epoch":
        return trainer.current_epoch
    # The two differ under manual optimization, where several optimizers step on one batch: `max_steps` counts all.
    return trainer.global_step if trainer.max_steps != -1 else trainer.fit_loop.epoch_loop._batches_that_stepped


def run_length(trainer: Trainer) -> RunLength:
    """How long the run is, as far as the trainer knows."""
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None
    steps = trainer.max_steps if trainer.max_steps != -1 else None
    batches = trainer.num_training_batches
    per_epoch = None
    if batches != float("inf"):
        per_epoch = max(-(-int(batches) // trainer.accumulate_grad_batches), 1)
    return RunLength(epochs, steps, per_epoch)
