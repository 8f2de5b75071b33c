"""The interface of what goes with every cut of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.arguments import Settings
from lightning_prune.planning import CutPoint
from lightning_prune.reporting import Report
from lightning_prune.scoring import DataPass
from lightning_prune.structure import TracedModel
from lightning_prune.surgery import Edit, Repair

__all__ = ["CutExtension", "RunContext", "require_one_restart"]


@dataclass(frozen=True)
class RunContext:
    """What an extension can see of a training run.

    Attributes:
        trainer: Its trainer.
        module: The network that trains.
        traced: How copies of the network are made.
        report: What was done and measured so far.
        folder: Gives the folder for files; all processes must call it.
        timeline: The cuts of the run, those already made included.
        samples: Gives samples of the training data with their labels, the same in every process: those that the method
            decides by, if it looks at labels. With a number so many batches only, to check them.
    """

    trainer: Trainer
    module: LightningModule
    traced: TracedModel
    report: Report
    folder: Callable[[], Path]
    timeline: tuple[CutPoint, ...]
    samples: Callable[[int | None], DataPass]


class CutExtension(Settings):
    """Base of what a pruning callback does around its cuts, given to it in ``extensions=[...]``.

    Every hook does nothing by default. An instance holds settings; a run works on a copy of it, so that one instance
    serves several fits and callbacks. What changes the weights that a cut leaves, and works without a Trainer, is a
    `Repair` instead.

    Attributes:
        is_exclusive: Whether no second pruning callback may be in the run.
        restarts: Whether it decides on all weights that a cut leaves, so that only one such part can be there.
    """

    is_exclusive: ClassVar[bool] = False
    restarts: ClassVar[bool] = False

    @property
    def waits(self) -> bool:
        """Whether the next cut has to wait."""
        return False

    def prepare(self, run: RunContext) -> None:
        """Check the run before its first training step; raises ``ValueError`` where the extension does not fit it."""

    def on_epoch_start(self, run: RunContext) -> None:
        """Act before the first batch of an epoch, and before a cut that is due there."""

    def before_cut(self, run: RunContext) -> None:
        """Act right before a cut."""

    def repairs(self, run: RunContext) -> tuple[Repair, ...]:  # noqa: ARG002
        """Repairs that become part of the next cut, in the place that the extension has in the list."""
        return ()

    def after_cut(self, edits: Sequence[Edit]) -> None:
        """Act when a cut has been made.

        Args:
            edits: What was done to the network, as its history has it.
        """

    def judge(self, run: RunContext) -> str | None:  # noqa: ARG002
        """Why the last cut has to be taken back, or ``None``; asked at the start of every epoch."""
        return None

    def take_back(self, run: RunContext) -> None:
        """Bring network and optimizers back to before the last cut, after `judge` has asked for it."""

    def after_take_back(self) -> None:
        """Act when the last cut has been taken back, by this extension or another one; no other cut is made."""

    def on_train_end(self, run: RunContext) -> None:
        """Act when the training is over, before the report is written."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold: plain data and tensors."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave.

        Raises:
            TypeError: If a value is of another type.
        """


def require_one_restart(asker: str, extensions: Sequence[Repair | CutExtension]) -> None:
    """Refuse extensions of which several decide on all weights.

    Raises:
        ValueError: With what to do.
    """
    several = [one for one in extensions if one.restarts]
    if len(several) > 1:
        raise ValueError(
            f"{asker}: expected at most one of `extensions` that decides on all weights, got "
            f"{', '.join(map(repr, several))}. The last of them would count: leave the others out."
        )
