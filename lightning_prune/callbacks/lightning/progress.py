"""Progress and length of a run, in the units of schedules."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_prune.planning import CutPoint, RunLength

__all__ = ["is_fast_dev_run", "now", "run_length"]


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, in which everything is checked and nothing is cut."""
    return bool(getattr(trainer, "fast_dev_run", False))


def now(trainer: Trainer, point: CutPoint) -> int:
    """Epochs or steps trained so far, in the unit of a cut."""
    if point.unit == "epoch":
        return trainer.current_epoch
    # Under manual optimization, several optimizers may step on one batch, and `max_steps` counts all steps.
    return trainer.global_step if trainer.max_steps != -1 else trainer.fit_loop.epoch_loop._batches_that_stepped


def run_length(trainer: Trainer) -> RunLength:
    """Length of the run, as far as known."""
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None
    steps = trainer.max_steps if trainer.max_steps != -1 else None
    batches = trainer.num_training_batches
    per_epoch = None
    if batches != float("inf"):
        per_epoch = max(-(-int(batches) // trainer.accumulate_grad_batches), 1)
    return RunLength(epochs, steps, per_epoch)
