"""The coordinator of a run: pruning callbacks act in order, and each knows what the others have done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.callbacks.checkpoints import StatefulCallback
from lightning_prune.callbacks.compiled import as_written
from lightning_prune.callbacks.monitors import Thresholds, hold_early_stopping
from lightning_prune.callbacks.showing import Showing
from lightning_prune.planning import Plan
from lightning_prune.reporting import Cut, Report
from lightning_prune.surgery import Edit, Replace

__all__ = ["CutMade", "Participant", "Session"]


@dataclass(frozen=True)
class CutMade:
    """A cut, as the other callbacks of the run are told of it.

    Attributes:
        plan: Units kept of every group that changed.
        edits: What was done, as the history has it.
        cut: What the report says of it.
    """

    plan: Plan
    edits: tuple[Edit, ...]
    cut: Cut

    @property
    def replaced(self) -> bool:
        """Whether modules were replaced, so that the network has to be traced again."""
        return any(isinstance(edit, Replace) for edit in self.edits)


class Participant(StatefulCallback, ABC):
    """What a session asks of a pruning callback.

    Attributes:
        session: The session that the callback takes part in.
        run_id: Name of the run, the same in all processes.
        report: What the callback has done and measured.
        layers: Layers that it was given.
        dirpath: The user's folder for its report.
        reset_monitors: Whether early stopping waits for its last cut.
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
        """Whether cuts are still to come."""

    @property
    def own_groups(self) -> tuple[str, ...]:
        """Groups that no other callback may cut, once it is prepared."""
        return ()

    def objection(self, other: Participant) -> str | None:  # noqa: ARG002
        """Why it cannot be in one run with ``other``, and what to do; ``None`` if it can."""
        return None

    @abstractmethod
    def finish_batch(self) -> None:
        """Clean up after the last batch, however it has ended."""

    @abstractmethod
    def prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Check all that can be checked before any weight changes."""

    @abstractmethod
    def act(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        """Make the cut that is due before this batch, if one is."""

    @abstractmethod
    def on_other_cut(self, trainer: Trainer, module: LightningModule, made: CutMade) -> None:
        """Follow a cut that another callback has made."""


class Session:
    """All pruning callbacks of one run, in the Trainer's order.

    The first of them drives the session from its own hooks, so that all are prepared, and have done what is due, before
    any of them observes a batch.

    Args:
        participants: The callbacks.
    """

    def __init__(self, participants: Sequence[Participant]) -> None:
        self.participants = tuple(participants)
        self._thresholds = Thresholds()

    @staticmethod
    def join(participant: Participant, trainer: Trainer) -> None:
        """Give a participant the session of a run that begins; the first one makes it for all.

        Raises:
            ValueError: If two of the run's pruning callbacks exclude each other.
        """
        found = [one for one in trainer.callbacks if isinstance(one, Participant)]  # type: ignore[attr-defined]
        if not found or participant is not found[0]:
            return
        session = Session(found)
        session._refuse_pairs()
        for one in found:
            one.session.close()  # of a run that ended without a word
            one.session = session

    @property
    def is_shared(self) -> bool:
        """Whether several callbacks prune."""
        return len(self.participants) > 1

    @property
    def order(self) -> list[str]:
        """The callbacks by their names in checkpoints."""
        return [one.state_key for one in self.participants]

    @property
    def pending(self) -> bool:
        """Whether cuts of any callback are still to come."""
        return any(one.pending for one in self.participants)

    def writer(self, participant: Participant, trainer: Trainer) -> Showing:
        """What writes a participant's report, into a folder that no other report of the run uses."""
        runs, place = [one.run_id for one in self.participants], self.participants.index(participant)
        return Showing(participant.report, trainer, participant.dirpath, runs, place)

    # -- the course of a run ------------------------------------------------------------------------------------------

    def begin_batch(
        self, caller: Participant, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prepare every callback that is not yet, and let each make the cut that is due; on the first one's call."""
        if caller is not self.participants[0]:
            return
        with as_written(module):
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
        """Prepare those that are not: at the first batch, and when another one has replaced modules."""
        for one in self.participants:
            if not one.is_prepared:
                one.prepare(trainer, module, batch)
        self._refuse_overlap()

    def hold_early_stopping(self, trainer: Trainer) -> None:
        """Let early stopping wait as long as a callback that asks for it has cuts to come."""
        if any(one.pending and one.reset_monitors for one in self.participants):
            hold_early_stopping(trainer)
            self._thresholds.withhold(trainer)

    def tell_others(self, cutter: Participant, trainer: Trainer, module: LightningModule, made: CutMade) -> None:
        """Let all callbacks but the one that has cut follow its cut."""
        for one in self.participants:
            if one is not cutter:
                one.on_other_cut(trainer, module, made)

    def snapshot_state(self) -> Callable[[], None]:
        """Return a function that brings all callbacks back to what they know now."""
        ways_back = [one.snapshot_state() for one in self.participants]

        # Not a context manager: an interrupt as it is left would end it as if its block had failed.
        def back() -> None:
            for way_back in ways_back:
                way_back()

        return back

    def close(self) -> None:
        """Give back what was taken from other callbacks for the run; a second call does nothing."""
        self._thresholds.give_back()

    # -- who may be in one run ----------------------------------------------------------------------------------------

    def _refuse_pairs(self) -> None:
        for one, other in permutations(self.participants, 2):
            why = one.objection(other)
            if why is None and one.dirpath is not None and one.dirpath == other.dirpath:
                why = "expected a `dirpath` of its own, or none"
            if why is not None:
                raise ValueError(f"{type(one).__name__} beside {type(other).__name__}: {why}.")

    def _refuse_overlap(self) -> None:
        """Refuse groups that two callbacks cut."""
        for other, one in permutations(self.participants, 2):
            both = [name for name in one.own_groups if name in other.own_groups]
            if both:
                raise ValueError(
                    f"{type(one).__name__}(layers={one.layers!r}): expected layers that no other callback cuts, got "
                    f"{', '.join(both)}, which {type(other).__name__}(layers={other.layers!r}) cuts. Layers that are "
                    "coupled are one: `inspect(model)` shows them. Give each callback its own `layers`."
                )
