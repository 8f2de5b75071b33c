"""Coordination of all pruning callbacks of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.callbacks.display.report_writer import ReportWriter
from lightning_prune.callbacks.lightning.checkpoints import StatefulCallback
from lightning_prune.callbacks.lightning.monitors import Thresholds, hold_early_stopping
from lightning_prune.planning import Plan
from lightning_prune.reporting import Cut, Report
from lightning_prune.surgery import Edit, Replace
from lightning_prune.surgery.compiled import eager

__all__ = ["CutMade", "Participant", "Session"]


@dataclass(frozen=True)
class CutMade:
    """A cut, for the other callbacks of the run.

    Attributes:
        plan: Units kept of every changed group.
        edits: The edits of the history.
        cut: The entry of the report.
    """

    plan: Plan
    edits: tuple[Edit, ...]
    cut: Cut

    @property
    def replaced(self) -> bool:
        """Whether modules were replaced, so that the network must be traced again."""
        return any(isinstance(edit, Replace) for edit in self.edits)


class Participant(StatefulCallback, ABC):
    """Interface of pruning callbacks in a session.

    Attributes:
        session: The session of the callback.
        run_id: Id of the run, the same in all processes.
        report: Report of the callback.
        layers: The argument ``layers``.
        dirpath: The user's folder for the report.
        reset_monitors: Whether early stopping is delayed until its last cut.
    """

    session: Session
    run_id: str
    report: Report
    layers: str | list[str] | None
    dirpath: str | None
    reset_monitors: bool

    @property
    @abstractmethod
    def is_prepared(self) -> bool:
        """Whether `prepare` has succeeded in this fit."""

    @property
    @abstractmethod
    def pending(self) -> bool:
        """Whether there are further cuts."""

    @property
    def own_groups(self) -> tuple[str, ...]:
        """Groups that no other callback may cut."""
        return ()

    def objection(self, other: Participant) -> str | None:  # noqa: ARG002
        """Error message if the callback cannot be combined with ``other``, else None."""
        return None

    @abstractmethod
    def finish_batch(self) -> None:
        """Clean up after the last batch, even if it has failed."""

    @abstractmethod
    def prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Validate the run before any weight changes."""

    @abstractmethod
    def act(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        """Make the cut that is due before this batch, if any."""

    @abstractmethod
    def on_other_cut(self, trainer: Trainer, module: LightningModule, made: CutMade) -> None:
        """Update the state after a cut of another callback."""


class Session:
    """All pruning callbacks of a run, in the Trainer's order.

    The first one drives the session, so that all callbacks are prepared and have made their cuts before any observes a
    batch.

    Args:
        participants: The callbacks.
    """

    def __init__(self, participants: Sequence[Participant]) -> None:
        self.participants = tuple(participants)
        self._thresholds = Thresholds()

    @staticmethod
    def join(participant: Participant, trainer: Trainer) -> None:
        """Join the session of a new run, which the first participant creates for all.

        Raises:
            ValueError: If two pruning callbacks cannot be combined.
        """
        found = [one for one in trainer.callbacks if isinstance(one, Participant)]  # type: ignore[attr-defined]
        if not found or participant is not found[0]:
            return
        session = Session(found)
        session._refuse_pairs()
        for one in found:
            one.session.close()  # of a run that was not torn down
            one.session = session

    @property
    def is_shared(self) -> bool:
        """Whether there are several pruning callbacks."""
        return len(self.participants) > 1

    @property
    def order(self) -> list[str]:
        """State keys of the callbacks, in order."""
        return [one.state_key for one in self.participants]

    @property
    def pending(self) -> bool:
        """Whether any callback has further cuts."""
        return any(one.pending for one in self.participants)

    def writer(self, participant: Participant, trainer: Trainer) -> ReportWriter:
        """The writer of a participant's report, with a separate folder per report."""
        runs, place = [one.run_id for one in self.participants], self.participants.index(participant)
        return ReportWriter(participant.report, trainer, participant.dirpath, runs, place)

    # -- during a run ------------------------------------------------------------------------------------------

    def begin_batch(
        self, caller: Participant, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prepare all callbacks and make the cuts that are due; called by all, run for the first one."""
        if caller is not self.participants[0]:
            return
        with eager(module):
            for one in self.participants:
                one.finish_batch()
            self._prepare(trainer, module, batch)
            for one in self.participants:
                one.act(trainer, module, batch_idx)
                self._prepare(trainer, module, batch)
        if not self.pending:
            self._thresholds.give_back()
        elif batch_idx == 0:
            self.hold_early_stopping(trainer)

    def _prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Prepare callbacks at the first batch, and after another one has replaced modules."""
        for one in self.participants:
            if not one.is_prepared:
                one.prepare(trainer, module, batch)
        self._refuse_overlap()

    def hold_early_stopping(self, trainer: Trainer) -> None:
        """Delay early stopping while a callback with ``reset_monitors`` has further cuts."""
        if any(one.pending and one.reset_monitors for one in self.participants):
            hold_early_stopping(trainer)
            self._thresholds.withhold(trainer)

    def tell_others(self, cutter: Participant, trainer: Trainer, module: LightningModule, made: CutMade) -> None:
        """Notify all other callbacks of a cut."""
        for one in self.participants:
            if one is not cutter:
                one.on_other_cut(trainer, module, made)

    def snapshot_state(self) -> Callable[[], None]:
        """Return a function that restores the current state of all callbacks."""
        restorers = [one.snapshot_state() for one in self.participants]

        # Not a context manager: an interrupt as it is left would end it as if its block had failed.
        def back() -> None:
            for restore in restorers:
                restore()

        return back

    def close(self) -> None:
        """Restore other callbacks at the end of the run; a second call has no effect."""
        self._thresholds.give_back()

    # -- compatibility ----------------------------------------------------------------------------------------

    def _refuse_pairs(self) -> None:
        for one, other in permutations(self.participants, 2):
            why = one.objection(other)
            if why is None and one.dirpath is not None and one.dirpath == other.dirpath:
                why = "expected a `dirpath` of its own, or none"
            if why is not None:
                raise ValueError(f"{type(one).__name__} beside {type(other).__name__}: {why}.")

    def _refuse_overlap(self) -> None:
        """Raise an error if two callbacks cut the same group."""
        for other, one in permutations(self.participants, 2):
            both = [name for name in one.own_groups if name in other.own_groups]
            if both:
                raise ValueError(
                    f"{type(one).__name__}(layers={one.layers!r}): expected layers that no other callback cuts, got "
                    f"{', '.join(both)}, which {type(other).__name__}(layers={other.layers!r}) cuts. Layers that are "
                    "coupled are one: `inspect(model)` shows them. Give each callback its own `layers`."
                )
