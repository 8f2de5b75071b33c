"""Atomic changes of a network during training, in all processes and callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.callbacks.lightning.averages import averages
from lightning_prune.callbacks.lightning.processes import (
    all_or_none,
    assert_same_parameters,
    holds_on_all_ranks,
    unwrapped,
)
from lightning_prune.callbacks.session import Session
from lightning_prune.structure import TracedModel
from lightning_prune.structure.sharding import fit_groups, has_shards, require_reduced
from lightning_prune.surgery import Transaction, transaction
from lightning_prune.surgery.compiled import eager, reset_compiled

__all__ = ["live_transaction"]


@contextmanager
def live_transaction(
    trainer: Trainer, module: LightningModule, traced: TracedModel, session: Session, cut: int
) -> Iterator[Transaction]:
    """Change the network of a run, with its optimizers, averaged copies and pruning callbacks, atomically.

    A `transaction` that also discards compiled code, rebuilds the DDP wrapper or tells FSDP2 the new shapes, and
    restores the state of the session's callbacks if anything fails. All processes must enter it, and it must succeed in
    all.

    Args:
        trainer: The run.
        module: The LightningModule.
        traced: The network with its calls.
        session: The pruning callbacks of the run, which may change within the context.
        cut: Index of the cut in the schedule, for the history.

    Yields:
            The `Transaction`.

    Raises:
            CutError: If an edit does not match, or the network does not run after it.
            DisagreementError: If another process has failed, or weights differ between processes.
    """
    call = traced.calls[0]

    def run() -> Any:
        fit_groups(module)
        with trainer.precision_plugin.forward_context(), eager(module):
            return module(*call.args, **call.kwargs)

    when = {"epoch": trainer.current_epoch, "step": trainer.global_step, "cut": cut}
    options: dict[str, Any] = {**when, "agree": holds_on_all_ranks if has_shards(module) else bool}
    reset_compiled(module)
    require_reduced(module)
    fit_groups(module)
    restore = session.snapshot_state()
    change: Transaction | None = None
    try:
        with unwrapped(trainer, module):
            with all_or_none(), transaction(module, trainer.optimizers, averages(trainer), run, **options) as change:
                yield change
            assert_same_parameters(module)  # a new DDP wrapper would synchronize them
    except BaseException:
        if change is not None:
            change.undo()
        restore()
        raise
    finally:
        fit_groups(module)
