"""Base class of callbacks that change the network itself."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_prune.arguments import require_names
from lightning_prune.callbacks.display.report_writer import ReportWriter, log_now
from lightning_prune.callbacks.display.status import log_status
from lightning_prune.callbacks.extensions.applied import Extensions
from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext
from lightning_prune.callbacks.extensions.rollback import restore_snapshot, snapshot
from lightning_prune.callbacks.heads import backbone_in
from lightning_prune.callbacks.lightning.averages import ManualAverages
from lightning_prune.callbacks.lightning.monitors import reset_monitors
from lightning_prune.callbacks.lightning.processes import all_or_none, from_rank_zero, gathered, run_on_rank_zero
from lightning_prune.callbacks.lightning.progress import now, run_length
from lightning_prune.callbacks.live_transaction import live_transaction
from lightning_prune.callbacks.scheduled import ScheduledPruning
from lightning_prune.callbacks.session import CutMade, Participant
from lightning_prune.callbacks.stored_plan import stored_plan
from lightning_prune.callbacks.traced_models import inputs_of, traced_model_of
from lightning_prune.callbacks.training_data import held_out_data, training_data
from lightning_prune.planning import AtStart, CutPoint, Plan, Schedule
from lightning_prune.reporting import Cut, Scores, require, size_of
from lightning_prune.scoring import DataPass
from lightning_prune.structure import Group, Size, Structure, TracedModel, trace, verify_shapes
from lightning_prune.surgery import (
    Repair,
    Replace,
    Transaction,
    history_of,
    losses_of_plans,
    original_of,
    require_one_restart,
    with_history,
)
from lightning_prune.surgery.compiled import eager, reset_compiled

__all__ = ["Decision", "NetworkPruning"]

# Samples for extensions that judge a cut, if the method itself uses none.
_JUDGED = 2000
_MANUAL_AVERAGE = (
    "averaged copy that is kept by hand inside the module, {}: it would stay as it is when the other is cut. Average "
    "with the callback `EMAWeightAveraging` of Lightning, whose copy is cut too, or leave these layers out (`ignore`)."
)


@dataclass(frozen=True)
class Decision:
    """Decision at a cut.

    Attributes:
        plan: Units to keep, equal in all processes; may be empty if modules are replaced.
        info: Additional numbers for the history.
        numbers: Numbers for loggers.
        scores: Scores of the units by group, for histograms in loggers.
    """

    plan: Plan
    info: Mapping[str, float] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """Plain data and tensors for checkpoints."""
        parts = {"info": self.info, "numbers": self.numbers, "scores": self.scores}
        return {"plan": self.plan.to_plain(), **{name: dict(part) for name, part in parts.items()}}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Decision:
        """Read what `to_plain` wrote."""
        require(plain["info"], dict[str, float], "numbers of a planned cut")
        require(plain["numbers"], dict[str, float], "numbers of a planned cut")
        require(plain["scores"], dict[str, Tensor], "scores of a planned cut")
        return cls(stored_plan(plain["plan"]), plain["info"], plain["numbers"], plain["scores"])

    def summaries(self) -> dict[str, Scores]:
        """Summaries of the scores, for the report."""
        return {name: Scores.of(values, self.plan.kept.get(name)) for name, values in self.scores.items()}


@dataclass(frozen=True)
class _Agreements:
    """Agreement of the plans that a schedule compares, so far.

    Attributes:
        at: Moment of the last plan; None before the first.
        plan: The last plan.
        values: Agreement of each plan with the one before.
    """

    at: int | None = None
    plan: Plan | None = None
    values: tuple[float, ...] = ()

    def then(self, at: int, plan: Plan) -> _Agreements:
        """Add a plan."""
        values = self.values if self.plan is None else (*self.values, plan.agreement(self.plan))
        return _Agreements(at, plan, values)

    def to_plain(self) -> dict[str, Any]:
        """Plain data for checkpoints."""
        return {
            "at": self.at,
            "plan": None if self.plan is None else self.plan.to_plain(),
            "values": list(self.values),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> _Agreements:
        """Read what `to_plain` wrote."""
        require(plain["at"], int | None, "the moment of the last plan")
        require(plain["values"], list[float], "agreements of plans")
        plan = plain["plan"]
        return cls(plain["at"], None if plan is None else stored_plan(plan), tuple(plain["values"]))


class NetworkPruning(ScheduledPruning):
    """Base class of callbacks that remove units and layers, or replace modules, by a schedule.

    Subclasses decide on cuts, which this class applies atomically, in all processes, with optimizers, averaged copies,
    extensions, history and report. A subclass implements:

    - `_check`, before the first training batch: validate the run and return its cuts;
    - `_decide`, at each cut: choose the units to keep;
    - `_change`, optionally, to replace modules or install weights.

    A method that acts once (`acts_once`) has the schedule `AtStart` or one with a single moment. With `AtStart`, the
    cut is made at the first ``on_train_batch_start``, after training data and optimizers are set up and a checkpoint is
    loaded, before any step. A resumed run does not act again.

    Attributes:
        acts_once: Whether the schedule must have a single moment.

    Args:
        schedule: When cuts are made.
        layers: Layers to prune: names, globs, or names of parent modules; all by default.
        ignore: Layers not to prune.
        reset_monitors: Reset ``ModelCheckpoint`` and ``EarlyStopping`` after each cut.
        dirpath: Folder for the report; by default the logger's folder.
        extensions: Repairs and cut extensions.
    """

    acts_once: ClassVar[bool] = False

    def __init__(
        self,
        schedule: Schedule | None,
        layers: str | list[str] | None,
        ignore: str | list[str] | None,
        reset_monitors: bool,
        dirpath: str | None,
        extensions: list[Repair | CutExtension] | None,
    ) -> None:
        require_names(type(self).__name__, layers=layers, ignore=ignore)
        self.layers = layers
        self.ignore = ignore
        self.extensions = self._checked(extensions)
        if schedule is None and self.acts_once:
            schedule = AtStart()
        super().__init__(schedule, reset_monitors, dirpath)

    def _checked(self, extensions: object) -> tuple[Repair | CutExtension, ...]:
        if extensions is not None and not isinstance(extensions, (list, tuple)):
            raise TypeError(
                f"{type(self).__name__}: expected `extensions` to be a list, got {extensions!r}. Give "
                "`extensions=[Ridge(), Rollback()]`."
            )
        for one in extensions or ():
            if not isinstance(one, (Repair, CutExtension)):
                raise TypeError(
                    f"{type(self).__name__}: expected repairs and cut extensions in `extensions`, got {one!r}. Give "
                    "instances such as `Ridge()` or `Rollback()`."
                )
        require_one_restart(type(self).__name__, extensions or ())
        delaying = [one for one in extensions or () if isinstance(one, CutExtension) and one.delays]
        restarts = [one for one in extensions or () if one.restarts]
        if delaying and restarts:
            raise ValueError(
                f"{type(self).__name__}: expected {delaying[0]!r} without {restarts[0]!r}, which sets all weights at "
                "the cut, so that preparing it has no effect. Leave one of the two out."
            )
        if delaying and self.acts_once:
            raise ValueError(
                f"{type(self).__name__}: expected no {delaying[0]!r}, because this method decides and cuts at once. "
                "Use `StructuredPruning` with the criterion."
            )
        return tuple(extensions or ())

    @override
    def _reset(self) -> None:
        super()._reset()
        self._extensions = Extensions(self.extensions)
        self._agreements = _Agreements()
        self._planned: tuple[CutPoint, Decision] | None = None  # a cut that extensions prepare

    @override
    def _reset_fit(self) -> None:
        super()._reset_fit()
        self._structure: Structure | None = None
        self._traced_model: TracedModel | None = None
        self._original = Size(0, 0, {})
        self._manual_averages: ManualAverages | None = None  # until the first cut
        self._comparisons: tuple[int, ...] = ()  # moments of plans that the schedule compares
        self._held_out: dict[int, DataPass] = {}  # by number of samples

    @property
    def structure(self) -> Structure | None:
        """Structure of the network; None before the first training batch."""
        return self._structure

    # -- for subclasses -----------------------------------------------------------------------------------------

    @abstractmethod
    def _check(
        self, trainer: Trainer, module: LightningModule, batch: Any, structure: Structure, original: Size
    ) -> tuple[CutPoint, ...]:
        """Validate the run before any weight has changed, and return its cuts, see `_moments`.

        Args:
            trainer: The run, with training data and optimizers set up and a checkpoint loaded.
            module: The LightningModule.
            batch: The first training batch, on its device.
            structure: Structure of the network.
            original: Size of the dense network.
        """

    @abstractmethod
    def _decide(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> Decision | None:
        """Decide on a cut, equally in all processes; None if there is nothing to do.

        Must not change anything. A subclass of `Decision` can hold data for `_change`.
        """

    def _change(self, change: Transaction, trainer: Trainer, module: LightningModule, decision: Decision) -> Structure:
        """Make a cut within a transaction, and return the structure after it.

        By default, the units of the plan are kept, see `_keep`. A subclass may also call ``change.replace(modules,
        self._retrace(trainer), structure)``, ``change.install(contents)`` and ``change.forget()``.
        """
        assert self._structure is not None
        return self._keep(change, trainer, module, decision, self._structure)

    def _keep(
        self,
        change: Transaction,
        trainer: Trainer,
        module: LightningModule,
        decision: Decision,
        structure: Structure,
    ) -> Structure:
        """Keep the units of the plan, with the repairs of the extensions.

        Args:
            change: The open transaction.
            trainer: The run.
            module: The LightningModule.
            decision: The decision.
            structure: Structure of the network within the transaction.

        Returns:
                The structure after the cut.
        """
        traced, plan = self._traced_model, decision.plan
        assert traced is not None
        if plan.is_empty:
            return structure
        context = self._run(trainer, module)
        with all_or_none():
            repairs = self._extensions.repairs(context)
            with log_status(trainer, "Repairing the weights that stay"):
                contents = self._extensions.contents(context, repairs, structure, plan)
        contents = from_rank_zero(trainer, contents)
        notes = run_on_rank_zero(trainer, lambda: {key: value for one in repairs for key, value in one.info.items()})
        verify_shapes(traced, structure, plan.kept)
        after = change.keep(structure, plan.kept, {**decision.info, **notes})
        change.install(contents)
        if any(repair.restarts for repair in repairs):
            change.forget()
        return after

    def _set_structure(self, structure: Structure) -> None:
        """Update the state after a cut of this callback."""
        self._structure = structure

    def _reached(self) -> int:
        """Index of the last cut of the timeline that the network's size already meets; -1 if there is none.

        For checkpoints without this callback's state, and runs that are resumed with another target.
        """
        module = None if self._traced_model is None else self._traced_model.model
        history = None if module is None else history_of(module)
        return self._timeline[-1].index if self._timeline and history is not None and history.edits else -1

    @override
    def _moments(self, trainer: Trainer, fraction: float = 0.5) -> tuple[CutPoint, ...]:
        timeline = super()._moments(trainer, fraction)
        if self.acts_once and len(timeline) > 1:
            raise ValueError(
                f"{type(self).__name__}: expected a `schedule` with one moment, got {len(timeline)}: it acts once. "
                "Give `AtStart()` to act before the first batch, or `OneShot(0.5)`."
            )
        self._comparisons = self.schedule.comparisons(run_length(trainer)) if timeline else ()
        return timeline

    @property
    @override
    def _compares_plans(self) -> bool:
        return not self.acts_once

    def _traced(self, trainer: Trainer, traced: TracedModel) -> Structure:  # noqa: ARG002
        """The structure for planning."""
        return with_history(trace(traced), traced)

    # -- state --------------------------------------------------------------------------------------------------------

    @override
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"extensions": self._extensions.state()}
        if self._agreements.plan is not None:
            state["agreements"] = self._agreements.to_plain()
        if self._planned is not None:
            point, decision = self._planned
            state["planned"] = {"point": [*astuple(point)], **decision.to_plain()}
        return state

    @override
    def _restore(self, state: Mapping[str, Any]) -> None:
        extensions = state.get("extensions", {})
        if "extensions" not in state and self.extensions and (state.get("kept") or state.get("rewind")):
            warnings.warn("extensions start without their state: the checkpoint is of format 1", stacklevel=2)
        require(extensions, dict[str, Any], "extensions")
        self._extensions.restore(extensions)
        if "agreements" in state:
            self._agreements = _Agreements.from_plain(state["agreements"])
        if "planned" in state:
            planned = state["planned"]
            index, at, unit, share, earliest = planned["point"]
            require([index, at, earliest], list[int | None], "the moment of a planned cut")
            self._planned = CutPoint(index, at, unit, share, earliest), Decision.from_plain(planned)

    @override
    def _continues_previous_fit(self, trainer: Trainer, module: LightningModule) -> bool:
        history = history_of(module)
        cuts = list(dict.fromkeys((edit.cut, edit.step) for edit in history.edits)) if history is not None else []
        mine = list(dict.fromkeys((cut.index, cut.step) for cut in self.report.cuts))
        return trainer.global_step > 0 and self._trained is module and cuts == mine

    @override
    def _settings(self) -> dict[str, Any]:
        return {
            "schedule": repr(self.schedule),
            "extensions": [repr(one) for one in self.extensions],
            "layers": self.layers,
            "ignore": self.ignore,
        }

    # -- before the first step ----------------------------------------------------------------------------------------

    @override
    def _message_for_other_aims(self, others: Mapping[str, tuple[Any, Any]]) -> str:
        if not self.acts_once:
            return super()._message_for_other_aims(others)
        differences = "; ".join(f"`{name}` was {then!r} and is {now!r}" for name, (then, now) in others.items())
        gone = f"{100 * self.report.pruning_ratio:.1f} % of the {self.report.what} are gone"
        return (
            f"{type(self).__name__}: the run so far had other settings ({differences}), and {gone}. It acts once: "
            "nothing more is cut. For a network of these settings resume from a checkpoint of before the cut."
        )

    @override
    def _prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        # `true` precisions change the default dtype, which tensors created in `forward` have.
        with trainer.precision_plugin.module_init_context(), log_status(trainer, "Tracing the network"):
            traced = traced_model_of(module, batch, convert=trainer.precision_plugin.convert_input)
            structure = self._traced(trainer, traced)
        for note in structure.notes:
            warnings.warn(note, stacklevel=2)
        self._structure, self._traced_model, self._original = structure, traced, original_of(module, structure)
        self._timeline = self._check(trainer, module, batch, structure, self._original)
        if self._planned is not None and (self._planned[0] not in self._timeline or self._other_aims()):
            self._planned = None  # this run has other cuts
            self._extensions.cancel_cut()
        history = history_of(module)
        if self._done is None:
            # A checkpoint without this callback's state; cuts before this run do not count.
            self._done = self._reached() if history is not None and trainer.global_step > 0 else -1
        if self._timeline and self._done < 0 and history is not None and self._is_met():
            self._timeline = ()
        if self.pending or not self._timeline:
            self._extensions.prepare(self._run(trainer, module))
        self._adopt_progress(self._reached)
        if self.report.dense is None:
            backbone = backbone_in(trainer, module)
            dense = size_of(structure, self._original, backbone)
            if history is None:
                self.report.dense = self.session.writer(self, trainer).measure(traced, dense)
                self._dense_network = traced.copy("meta").module
            else:
                self.report.pruned_before(dense, self._size(trainer), len({edit.cut for edit in history.edits}))
        self._begin_report()

    def _is_met(self) -> bool:
        """Whether a network that was pruned before this run meets the target already, with a warning."""
        return False

    @override
    def objection(self, other: Participant) -> str | None:
        exclusive = [type(one).__name__ for one in self._extensions.parts if one.is_exclusive]
        if exclusive:
            return (
                f"expected no `{exclusive[0]}`, which would take back what the other has done since. Leave one of the "
                "two out"
            )
        return None

    @override
    def act(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        if self.pending and not self.report.cuts and batch_idx <= 1:  # updated after a batch, or after an epoch
            self._refuse_manual_averages(trainer, module)
        super().act(trainer, module, batch_idx)

    def _own(self, structure: Structure | None) -> tuple[Group, ...]:
        """Groups that this callback may cut."""
        groups = () if structure is None else structure.groups
        return tuple(group for group in groups if not self.own_groups or group.name in self.own_groups)

    def _refuse_manual_averages(self, trainer: Trainer, module: LightningModule) -> ManualAverages:
        """Raise an error for averages that the user's code keeps inside the module, as soon as they are detected."""
        assert self._structure is not None
        if self._manual_averages is None:
            tensors = {member.tensor for group in self._own(self._structure) for member in group.members}
            self._manual_averages = ManualAverages(trainer, module, tensors)
        found = self._manual_averages.found()
        if found:
            raise ValueError(f"{type(self).__name__}: expected no {_MANUAL_AVERAGE.format(found)}")
        return self._manual_averages

    # -- a training batch ---------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._extensions.parts:
            self._extensions.before_step(self._run(trainer, pl_module), batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._extensions.finish_step()
        if self._extensions.parts:
            self._extensions.after_step(self._run(trainer, pl_module))

    @override
    def finish_batch(self) -> None:
        super().finish_batch()
        self._extensions.finish_step()  # a callback may have ended the last batch early

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self.finish_batch()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self.finish_batch()

    # -- a cut --------------------------------------------------------------------------------------------------------

    @override
    def _waits(self) -> bool:
        return self._extensions.waits

    @override
    def _due(self, trainer: Trainer, module: LightningModule) -> CutPoint | None:
        if self._planned is not None:
            return self._planned[0]
        point = super()._due(trainer, module)
        if not self.pending or not self._comparisons:
            return point
        last, passed = self._timeline[-1], now(trainer, self._timeline[-1])
        before = -1 if self._agreements.at is None else self._agreements.at
        if not any(before < moment <= passed for moment in self._comparisons):
            # Stable plans whose cut has failed, in a run that is resumed from there.
            return last if self.schedule.is_stable(self._agreements.values) else point
        decision = self._decide(trainer, module, last)
        if decision is None:
            self._done = last.index
            return None
        self._agreements = self._agreements.then(passed, decision.plan)
        stability = self._log_agreement(trainer)
        if point is None and not self.schedule.is_stable(self._agreements.values):
            self._plan_again()
            return None
        self._planned = last, decision
        moment = f"Plans after {last.unit} {passed}: their mean agreement is {stability}"
        if self.schedule.is_stable(self._agreements.values):
            self.report.notes.append(f"{moment}, and the cut is made.")
        else:
            note = (
                f"{moment}, less than {self.schedule!r} asks for, and the cut is made because it is the latest moment. "
                "Give a later `latest` or a lower `threshold`, or train with a lower learning rate before."
            )
            self.report.notes.append(note)
            warnings.warn(note, stacklevel=2)
        return last

    def _log_agreement(self, trainer: Trainer) -> str:
        """Log how well the last plans agree, and return it as text."""
        values = self._agreements.values
        stability, prefix = self.schedule.stability(values), self.session.writer(self, trainer).name
        numbers = {} if not values else {f"{prefix}/agreement": values[-1]}
        if stability is not None:
            numbers[f"{prefix}/stability"] = stability
        if numbers:
            log_now(trainer, numbers)
        return "not known" if stability is None else f"{stability:.3f}"

    def _plan_again(self) -> None:
        """Called after a plan without a cut."""

    @override
    def _cut(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> None:
        began = perf_counter()
        if not self.report.cuts:
            own = self._refuse_manual_averages(trainer, module)
            if own.suspects and trainer.global_step == own.step:
                warnings.warn(f"there may be an {_MANUAL_AVERAGE.format(own.suspects)}", stacklevel=2)
        decision = self._decide(trainer, module, point) if self._planned is None else self._planned[1]
        if decision is None:
            self._done = point.index
            return
        if any(part.delays for part in self._extensions.parts):
            self._planned = point, decision
            if not self._extensions.prepare_cut(self._run(trainer, module), decision.plan):
                return
        self._extensions.before_cut(self._run(trainer, module))
        self._apply(trainer, module, decision, point, began)
        self._planned = None
        if self.reset_monitors:
            reset_monitors(trainer)
        seconds = {f"{self.session.writer(self, trainer).name}/seconds": self.report.cuts[-1].seconds}
        log_now(trainer, {**self.report.metrics(), **decision.numbers, **seconds}, decision.scores)

    def _apply(
        self, trainer: Trainer, module: LightningModule, decision: Decision, point: CutPoint, began: float
    ) -> None:
        """Apply a cut to network, optimizers, history and the callbacks of the run."""
        structure, traced = self._structure, self._traced_model
        assert structure is not None
        assert traced is not None
        before = history_of(module)
        with live_transaction(trainer, module, traced, self.session, point.index) as change:
            after = self._change(change, trainer, module, decision)
            history = history_of(module)
            edits = history.edits[len(before.edits) if before is not None else 0 :] if history is not None else ()
            self._set_structure(after)
            self._done, self._original = point.index, original_of(module, after)
            if any(isinstance(edit, Replace) and edit.new_dense for edit in edits):
                layers = {} if self.report.dense is None else self.report.dense.layers
                dense = size_of(after, self._original, backbone_in(trainer, module))
                self.report.dense, self._dense_network = replace(dense, layers=layers), None
            epoch, step, seconds = trainer.current_epoch, trainer.global_step, perf_counter() - began
            widths = _changed(structure, after)
            cut = Cut.of(self._size(trainer), point.index, epoch, step, *widths, seconds)
            cut = replace(cut, scores=decision.summaries())
            self.report.cuts.append(cut)
            self._extensions.after_cut(edits)
            self.session.tell_others(self, trainer, module, CutMade(decision.plan, edits, cut))

    def _retrace(self, trainer: Trainer) -> Callable[[], Structure]:
        """A function that traces the network again after a module was replaced."""
        traced = self._traced_model
        assert traced is not None

        def retraced() -> Structure:
            with trainer.precision_plugin.module_init_context():
                return self._traced(trainer, traced)

        return retraced

    @override
    def on_other_cut(self, trainer: Trainer, module: LightningModule, made: CutMade) -> None:
        assert self._structure is not None
        if made.replaced:
            self._is_prepared = False  # the session prepares it again
            return
        self._structure = self._structure.take(made.plan.kept)
        size, cut = self._size(trainer), made.cut
        self.report.cuts.append(Cut.of(size, cut.index, cut.epoch, cut.step, cut.before, cut.after, cut.seconds))

    @override
    def snapshot_state(self) -> Callable[[], None]:
        mine, theirs = super().snapshot_state(), self._extensions.snapshot_state()

        def back() -> None:
            mine()
            theirs()

        return back

    @override
    def _begin_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        run = self._run(trainer, module)
        for extension in self._extensions.parts:
            extension.on_epoch_start(run)
            why = extension.judge(run)
            if why is not None:
                self._take_back(trainer, module, extension, why)

    def _take_back(self, trainer: Trainer, module: LightningModule, extension: CutExtension, why: str) -> None:
        """Undo the last cut of network and optimizers, and make no further cuts."""
        note = f"Cut {self.report.cuts[-1].index + 1} was taken back and no other made: {why}."
        now, back = snapshot(trainer, module), self.snapshot_state()
        reset_compiled(module)
        try:
            extension.take_back(self._run(trainer, module))
            self._extensions.after_take_back()
            self.report.cuts.pop()
            self.report.notes.append(note)
            self._set_structure(self._retrace(trainer)())
            self._done = self._timeline[-1].index if self._timeline else self._done
        except BaseException:
            restore_snapshot(now, trainer, module)
            back()
            raise
        if self.reset_monitors:
            reset_monitors(trainer)
        log_now(trainer, self.report.metrics())
        warnings.warn(note, stacklevel=2)

    # -- the end ------------------------------------------------------------------------------------------------------

    @override
    def _end(self, trainer: Trainer, module: LightningModule) -> None:
        self._extensions.on_train_end(self._run(trainer, module))

    @override
    def _measure(self, writer: ReportWriter, module: LightningModule) -> Size:
        traced = self._traced_model
        assert traced is not None
        with eager(module):
            return writer.measure(traced, self._size(writer.trainer), self._dense_beside(traced))

    def _size(self, trainer: Trainer) -> Size:
        assert self._structure is not None
        assert self._traced_model is not None
        return size_of(self._structure, backbone=backbone_in(trainer, self._traced_model.model))

    def _run(self, trainer: Trainer, module: LightningModule) -> RunContext:
        assert self._traced_model is not None
        folder = self.session.writer(self, trainer).folder
        samples = partial(self._samples, trainer, module)
        losses = partial(self._held_out_losses, trainer, module)
        traced, groups = self._traced_model, self._own(self._structure)
        return RunContext(trainer, module, traced, groups, self.report, folder, self._timeline, samples, losses)

    def _held_out_losses(
        self, trainer: Trainer, module: LightningModule, plans: Sequence[Plan], samples: int
    ) -> list[float]:
        """Loss on validation data of the network cut by each plan, for extensions."""
        traced, structure = self._traced_model, self._structure
        assert traced is not None
        assert structure is not None
        if samples not in self._held_out:
            asker = ", ".join(type(one).__name__ for one in self._extensions.parts)
            self._held_out[samples] = held_out_data(asker, trainer, module, traced, samples)
        data = self._held_out[samples]
        with all_or_none(), trainer.precision_plugin.forward_context():
            sums = losses_of_plans(traced.copy("real").module, structure, plans, data)
        *losses, count = gathered(torch.cat([sums, sums.new_tensor([len(data)])])[None]).sum(0).tolist()
        return [loss / count for loss in losses]

    def _samples(self, trainer: Trainer, module: LightningModule, batches: int | None = None) -> DataPass:
        """Samples of the training data for extensions, the same in every process.

        Args:
            trainer: The run.
            module: The network.
            batches: Number of batches, if limited.
        """
        assert self._traced_model is not None
        samples = _JUDGED if batches is None else None
        data = training_data(trainer, module, batches=batches, samples=samples, is_shared=False)
        return data.using(inputs=inputs_of(module, data.batch(0).raw, self._traced_model))


def _changed(before: Structure, after: Structure) -> tuple[dict[str, int], dict[str, int]]:
    """Widths of changed groups before and after a cut; 0 for missing groups."""
    then, now = before.widths, after.widths
    names = [name for name in (*then, *(now.keys() - then.keys())) if then.get(name) != now.get(name)]
    return {name: then.get(name, 0) for name in names}, {name: now.get(name, 0) for name in names}
