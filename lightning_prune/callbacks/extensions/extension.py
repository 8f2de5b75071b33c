"""Base class of extensions of a run's cuts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.arguments import Settings
from lightning_prune.planning import CutPoint, Plan
from lightning_prune.reporting import Report
from lightning_prune.scoring import DataPass
from lightning_prune.structure import Group, TracedModel
from lightning_prune.surgery import Edit, Repair

__all__ = ["CutExtension", "RunContext"]


@dataclass(frozen=True)
class RunContext:
    """A training run as seen by extensions.

    Attributes:
        trainer: Its trainer.
        module: The network that trains.
        traced: How copies of the network are made.
        groups: Groups that the callback may cut.
        report: The report so far.
        folder: Returns the folder for files; all processes must call it.
        timeline: The cuts of the run, including those already made.
        samples: Returns labelled samples of the training data, the same in every process: those used for scoring, if
            the method uses labels. A number limits them to this many batches, for checks.
        held_out_losses: Returns the loss of ``training_step`` in eval mode, averaged over at most this many samples of
            the validation data, of the network cut by each plan; the same in all processes, which all must call it.
    """

    trainer: Trainer
    module: LightningModule
    traced: TracedModel
    groups: tuple[Group, ...]
    report: Report
    folder: Callable[[], Path]
    timeline: tuple[CutPoint, ...]
    samples: Callable[[int | None], DataPass]
    held_out_losses: Callable[[Sequence[Plan], int], list[float]]


class CutExtension(Settings):
    """Base class for actions around the cuts of a pruning callback, passed in ``extensions=[...]``.

    All hooks do nothing by default. An instance holds settings, and each run uses a copy, so that one instance can be
    passed to several fits and callbacks. To change the remaining weights without a Trainer, write a `Repair` instead.

    Attributes:
        is_exclusive: Whether the run must have no other pruning callback.
        restarts: Whether it sets all remaining weights, so that only one such extension is allowed.
        delays: Whether it prepares planned cuts, see `prepare_cut`.
    """

    is_exclusive: ClassVar[bool] = False
    restarts: ClassVar[bool] = False
    delays: ClassVar[bool] = False

    @property
    def waits(self) -> bool:
        """Whether the next cut is postponed."""
        return False

    def prepare(self, run: RunContext) -> None:
        """Check the run before its first training step; raises ``ValueError`` if it is not supported."""

    def on_epoch_start(self, run: RunContext) -> None:
        """Called before the first batch of an epoch, and before a cut that is due there."""

    def before_step(self, run: RunContext, batch: Any, batch_idx: int) -> None:
        """Called before a training batch, after a cut that is due there.

        Args:
            run: The run.
            batch: The batch, on its device.
            batch_idx: Its index in the epoch.
        """

    def after_step(self, run: RunContext) -> None:
        """Called after a training batch; ``run.module.log`` may be used."""

    def finish_step(self) -> None:
        """Called after a training batch, also after one that has failed: to remove hooks."""

    def prepare_cut(self, run: RunContext, plan: Plan) -> bool:  # noqa: ARG002
        """Prepare a planned cut and return whether it is made now; called before each batch until all extensions agree.

        Args:
            run: The run.
            plan: Units that the cut keeps.
        """
        return True

    def cancel_cut(self) -> None:
        """Called instead of a further `prepare_cut` if the planned cut is not made."""

    def before_cut(self, run: RunContext) -> None:
        """Called right before a cut."""

    def repairs(self, run: RunContext) -> tuple[Repair, ...]:  # noqa: ARG002
        """Return repairs for the next cut, applied at the extension's position in the list."""
        return ()

    def after_cut(self, edits: Sequence[Edit]) -> None:
        """Called after a cut.

        Args:
            edits: The changes of the network, as in its history.
        """

    def judge(self, run: RunContext) -> str | None:  # noqa: ARG002
        """Return why the last cut must be undone, or ``None``; called at the start of every epoch."""
        return None

    def take_back(self, run: RunContext) -> None:
        """Restore network and optimizers from before the last cut; called after `judge` returned a reason."""

    def after_take_back(self) -> None:
        """Called after the last cut was undone by any extension; no further cut is made."""

    def on_train_end(self, run: RunContext) -> None:
        """Called at the end of training, before the report is written."""

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: plain data and tensors."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            TypeError: If a value is of another type.
        """
