"""Changing a network that a Trainer trains: in all processes and callbacks, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.callbacks.averages import averages
from lightning_prune.callbacks.compiled import as_written, forget_code
from lightning_prune.callbacks.processes import all_or_none, same_everywhere, unwrapped
from lightning_prune.callbacks.session import Session
from lightning_prune.structure import TracedModel
from lightning_prune.surgery import Transaction, transaction

__all__ = ["live_transaction"]


@contextmanager
def live_transaction(
    trainer: Trainer, module: LightningModule, traced: TracedModel, session: Session, cut: int
) -> Iterator[Transaction]:
    """Change the network of a run with its optimizers, averaged copies and pruning callbacks, whole or not at all.

    A `transaction` that also discards compiled code, rebuilds the DDP wrapper, and restores the state of the session's
    callbacks if anything fails. It has to succeed in every process; all must enter it.

    Args:
        trainer: The run.
        module: What trains.
        traced: How the network is run on an example.
        session: The pruning callbacks of the run, which may change within the context.
        cut: Place of the cut in the schedule, from 0, for the history.

    Yields:
        The `Transaction`, to make edits and install contents with.

    Raises:
        CutError: If an edit does not fit, or the network does not run after it.
        DisagreementError: If another process has failed, or the weights are not the same in all of them.
    """
    call = traced.calls[0]

    def run() -> Any:
        with trainer.precision_plugin.forward_context(), as_written(module):
            return module(*call.args, **call.kwargs)

    when = {"epoch": trainer.current_epoch, "step": trainer.global_step, "cut": cut}
    forget_code(module)
    way_back = session.snapshot_state()
    change: Transaction | None = None
    try:
        with unwrapped(trainer, module):
            with all_or_none(), transaction(module, trainer.optimizers, averages(trainer), run, **when) as change:
                yield change
            same_everywhere(module)  # a new wrapper would make it so
    except BaseException:
        if change is not None:
            change.undo()
        way_back()
        raise
