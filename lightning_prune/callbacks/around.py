"""What goes with every cut: a network saved or kept before it, repaired in it, judged after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_prune.planning import CutPoint
from lightning_prune.reporting import Report
from lightning_prune.structure import Axes, Subject

__all__ = ["Around", "Run"]


@dataclass(frozen=True)
class Run:
    """What there is to a training run.

    Attributes:
        trainer: Its trainer.
        module: What trains.
        subject: How copies of it are made.
        report: What was done and measured.
        folder: Where files go; asks all processes.
        timeline: The cuts of the run, those already made included.
    """

    trainer: Trainer
    module: LightningModule
    subject: Subject
    report: Report
    folder: Callable[[], Path]
    timeline: tuple[CutPoint, ...] = ()


class Around:
    """One thing that goes with every cut. The callback says when; every part is nothing where it is not needed."""

    @property
    def waits(self) -> bool:
        """Whether the next cut has to wait."""
        return False

    @property
    def restarts(self) -> bool:
        """Whether training starts anew from the contents, so that the optimizers' state is cleared."""
        return False

    def begin(self, run: Run) -> None:
        """Refuse a run that it does not fit, before the first step."""

    def epoch(self, run: Run) -> None:
        """An epoch begins, what is due at it comes later."""

    def before(self, run: Run) -> None:
        """A cut follows."""

    def contents(self, run: Run, axes: Axes, drops: Mapping[str, str]) -> Mapping[str, Tensor]:  # noqa: ARG002
        """What parameters and buffers, by name, hold after a cut, where not what they held.

        Args:
            run: What is trained.
            axes: What the cut keeps.
            drops: Layers that it takes out, and what takes their place.
        """
        return {}

    def after(self) -> None:
        """The cut stands."""

    def judge(self, run: Run) -> str | None:  # noqa: ARG002
        """An epoch begins: why the last cut has to be taken back, if so."""
        return None

    def take_back(self, run: Run) -> None:
        """Bring network and optimizers back to before the last cut."""

    def end(self, run: Run) -> None:
        """The training is over."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, in names that no other one has."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the callback's state in a checkpoint."""
