"""What all callbacks share that change the network itself, whatever they go by."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.averages import OwnAverages
from lightning_prune.callbacks.compiled import as_written, forget_code
from lightning_prune.callbacks.extensions.applied import Extensions
from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext, require_one_restart
from lightning_prune.callbacks.extensions.rollback import go_back, snapshot
from lightning_prune.callbacks.heads import backbone_in
from lightning_prune.callbacks.live_transaction import live_transaction
from lightning_prune.callbacks.monitors import reset_monitors
from lightning_prune.callbacks.processes import all_or_none, from_first, made_on_first
from lightning_prune.callbacks.scheduled import ScheduledPruning, require_names
from lightning_prune.callbacks.session import CutMade, Participant
from lightning_prune.callbacks.showing import Showing, log_now
from lightning_prune.callbacks.telling import telling
from lightning_prune.callbacks.traced_models import inputs_of, traced_model_of
from lightning_prune.callbacks.training_data import training_data
from lightning_prune.planning import AtStart, CutPoint, Plan, Schedule
from lightning_prune.reporting import Cut, Scores, require, size_of
from lightning_prune.scoring import DataPass
from lightning_prune.structure import Size, Structure, TracedModel, trace, verify_shapes
from lightning_prune.surgery import Repair, Replace, Transaction, history_of, original_of, with_history

__all__ = ["Decision", "NetworkPruning"]

# Samples by which extensions judge a cut, where the method itself looks at none.
_JUDGED = 2000
_OWN_AVERAGE = (
    "averaged copy that is kept by hand inside the module, {}: it would stay as it is when the other is cut. Average "
    "with the callback `EMAWeightAveraging` of Lightning, whose copy is cut too, or leave these layers out (`ignore`)."
)


@dataclass(frozen=True)
class Decision:
    """What is to be done at one cut.

    Attributes:
        plan: Units to keep, the same in all processes. It may be empty where modules are replaced.
        info: Plain numbers that the history remembers.
        numbers: Plain numbers for loggers.
        scores: Scores of the units by group, for loggers, which draw their histograms.
    """

    plan: Plan
    info: Mapping[str, float] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    def summaries(self) -> dict[str, Scores]:
        """The scores in a few numbers, for the report."""
        return {name: Scores.of(values, self.plan.kept.get(name)) for name, values in self.scores.items()}


class NetworkPruning(ScheduledPruning):
    """Base of callbacks that remove units and layers, or replace modules, at the moments of a schedule.

    A subclass decides, and this class does what it decides: whole or not at all, in all processes, with optimizers,
    averaged copies, extensions, history and report. A subclass has three things to say:

    - `_check`, before the first training batch: check what can be checked, and return the cuts of the run;
    - `_decide`, at each cut: which units to keep, with all the data and time that takes;
    - `_change`, if more is to be done than to keep these units: replace modules, install weights.

    A method that acts once in a run (`acts_once`) has `AtStart` as its schedule, or one later moment. By `AtStart` its
    cut is made at the first ``on_train_batch_start`` of the run: the training data, the optimizers and what a
    checkpoint holds are there, and no step has been made. A resumed run does not act a second time.

    Attributes:
        acts_once: Whether the schedule may have one moment only.

    Args:
        schedule: When cuts happen.
        layers: Only these layers: names, globs, or names of modules that contain them.
        ignore: Not these layers.
        reset_monitors: Let ``ModelCheckpoint`` and ``EarlyStopping`` start anew after each cut.
        dirpath: Folder for the report; by default the logger's folder.
        extensions: What goes with every cut.
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
        return tuple(extensions or ())

    @override
    def _forget(self) -> None:
        super()._forget()
        self._extensions = Extensions(self.extensions)

    @override
    def _unprepare(self) -> None:
        super()._unprepare()
        self._structure: Structure | None = None
        self._traced_model: TracedModel | None = None
        self._original = Size(0, 0, {})
        self._own_averages: OwnAverages | None = None  # until the first cut

    @property
    def structure(self) -> Structure | None:
        """Groups of the network as it is now; None before the first training batch."""
        return self._structure

    # -- what a subclass says -----------------------------------------------------------------------------------------

    @abstractmethod
    def _check(
        self, trainer: Trainer, module: LightningModule, batch: Any, structure: Structure, original: Size
    ) -> tuple[CutPoint, ...]:
        """Check the run before any weight has changed, and return its cuts, see `_moments`.

        Args:
            trainer: The run. Its training data, its optimizers and what a checkpoint held are there.
            module: What trains.
            batch: The first training batch, on its device.
            structure: What can be removed of the network as it is.
            original: Size of the network before any cut.
        """

    @abstractmethod
    def _decide(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> Decision | None:
        """What to do at a cut, the same in all processes; ``None`` if nothing is to be done.

        Nothing has changed yet, and nothing may be changed here. What a subclass needs later in `_change` goes into a
        subclass of `Decision`.
        """

    def _change(self, change: Transaction, trainer: Trainer, module: LightningModule, decision: Decision) -> Structure:
        """Make a cut within a transaction; the structure after it.

        By default the units of the plan are kept, see `_keep`. A subclass may replace modules before or after that,
        ``change.replace(modules, self._retrace(trainer), structure)``, and go on with ``change.install(contents)`` and
        ``change.forget()``.
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
            module: What trains.
            decision: What to keep.
            structure: Of the network as it is within the transaction.

        Returns:
            The structure after it.
        """
        traced, plan = self._traced_model, decision.plan
        assert traced is not None
        if plan.is_empty:
            return structure
        context = self._run(trainer, module)
        axes, drops = structure.axes(plan.kept), structure.drops(plan.kept)
        with all_or_none():
            repairs = self._extensions.repairs(context)
            with telling(trainer, "Repairing the weights that stay"):
                contents = self._extensions.contents(context, repairs, axes, drops)
        contents = from_first(trainer, contents)
        notes = made_on_first(trainer, lambda: {key: value for one in repairs for key, value in one.info.items()})
        verify_shapes(traced, structure, plan.kept)
        after = change.keep(structure, plan.kept, {**decision.info, **notes})
        change.install(contents)
        if any(repair.restarts for repair in repairs):
            change.forget()
        return after

    def _know(self, structure: Structure) -> None:
        """Know the network as it is after a cut of one's own."""
        self._structure = structure

    def _reached(self) -> int:
        """Index of the last cut of the timeline that the network is as small as already, -1 for none.

        For a checkpoint without this callback's state, and for a run that is resumed with another target. By default
        the history says that something was done, not how much.
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
        return timeline

    def _traced(self, trainer: Trainer, traced: TracedModel) -> Structure:  # noqa: ARG002
        """The structure, with all that planning has to know."""
        return with_history(trace(traced), traced)

    # -- state --------------------------------------------------------------------------------------------------------

    @override
    def _state(self) -> dict[str, Any]:
        return {"extensions": self._extensions.state()}

    @override
    def _restore(self, state: Mapping[str, Any]) -> None:
        extensions = state.get("extensions", {})
        if "extensions" not in state and self.extensions and (state.get("kept") or state.get("rewind")):
            warnings.warn("extensions begin anew: a version of format 1 wrote the checkpoint", stacklevel=2)
        require(extensions, dict[str, Any], "extensions")
        self._extensions.restore(extensions)

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
    def _said_of_other_aims(self, others: Mapping[str, tuple[Any, Any]]) -> str:
        if not self.acts_once:
            return super()._said_of_other_aims(others)
        differences = "; ".join(f"`{name}` was {then!r} and is {now!r}" for name, (then, now) in others.items())
        gone = f"{100 * self.report.pruning_ratio:.1f} % of the {self.report.what} are gone"
        return (
            f"{type(self).__name__}: the run so far had other settings ({differences}), and {gone}. It acts once: "
            "nothing more is cut. For a network of these settings resume from a checkpoint of before the cut."
        )

    @override
    def _prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        # `true` precisions have another default type, which tensors made in `forward` take.
        with trainer.precision_plugin.module_init_context(), telling(trainer, "Tracing the network"):
            traced = traced_model_of(module, batch, convert=trainer.precision_plugin.convert_input)
            structure = self._traced(trainer, traced)
        for note in structure.notes:
            warnings.warn(note, stacklevel=2)
        self._structure, self._traced_model, self._original = structure, traced, original_of(module, structure)
        self._timeline = self._check(trainer, module, batch, structure, self._original)
        history = history_of(module)
        if self._done is None:
            # A checkpoint of a run without this callback's state; what was cut before this run began does not count.
            self._done = self._reached() if history is not None and trainer.global_step > 0 else -1
        if self._timeline and self._done < 0 and history is not None and self._is_met():
            self._timeline = ()
        if self.pending or not self._timeline:
            self._extensions.prepare(self._run(trainer, module))
        self._carry_over(self._reached)
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
        """Whether a network that was pruned before this run began leaves nothing to do; says so, if it does."""
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
        if self.pending and not self.report.cuts and batch_idx <= 1:  # what is updated after a batch, or after an epoch
            self._refuse_own_averages(trainer, module)
        super().act(trainer, module, batch_idx)

    def _refuse_own_averages(self, trainer: Trainer, module: LightningModule) -> OwnAverages:
        """Refuse averages that the user's code keeps inside the module, as soon as they can be told from others."""
        assert self._structure is not None
        if self._own_averages is None:
            groups = [group for group in self._structure.groups if not self.own_groups or group.name in self.own_groups]
            self._own_averages = OwnAverages(trainer, module, {m.tensor for group in groups for m in group.members})
        found = self._own_averages.found()
        if found:
            raise ValueError(f"{type(self).__name__}: expected no {_OWN_AVERAGE.format(found)}")
        return self._own_averages

    # -- a cut --------------------------------------------------------------------------------------------------------

    @override
    def _waits(self) -> bool:
        return self._extensions.waits

    @override
    def _cut(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> None:
        began = perf_counter()
        if not self.report.cuts:
            own = self._refuse_own_averages(trainer, module)
            if own.suspects and trainer.global_step == own.step:
                warnings.warn(f"there may be an {_OWN_AVERAGE.format(own.suspects)}", stacklevel=2)
        decision = self._decide(trainer, module, point)
        if decision is None:
            self._done = point.index
            return
        self._extensions.before_cut(self._run(trainer, module))
        self._apply(trainer, module, decision, point, began)
        if self.reset_monitors:
            reset_monitors(trainer)
        seconds = {f"{self.session.writer(self, trainer).name}/seconds": self.report.cuts[-1].seconds}
        log_now(trainer, {**self.report.metrics(), **decision.numbers, **seconds}, decision.scores)

    def _apply(
        self, trainer: Trainer, module: LightningModule, decision: Decision, point: CutPoint, began: float
    ) -> None:
        """The cut itself: network, optimizers, history, and what the callbacks of the run know, together."""
        structure, traced = self._structure, self._traced_model
        assert structure is not None
        assert traced is not None
        before = history_of(module)
        with live_transaction(trainer, module, traced, self.session, point.index) as change:
            after = self._change(change, trainer, module, decision)
            history = history_of(module)
            edits = history.edits[len(before.edits) if before is not None else 0 :] if history is not None else ()
            self._know(after)
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
        """What traces the network again after a module was replaced."""
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
        """Network and optimizers become as before the last cut, and what is known of them; nothing more is cut."""
        note = f"Cut {self.report.cuts[-1].index + 1} was taken back and no other made: {why}."
        now, back = snapshot(trainer, module), self.snapshot_state()
        forget_code(module)
        try:
            extension.take_back(self._run(trainer, module))
            self._extensions.after_take_back()
            self.report.cuts.pop()
            self.report.notes.append(note)
            self._know(self._retrace(trainer)())
            self._done = self._timeline[-1].index if self._timeline else self._done
        except BaseException:
            go_back(now, trainer, module)
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
    def _measure(self, showing: Showing, module: LightningModule) -> Size:
        assert self._traced_model is not None
        with as_written(module):
            return showing.measure(self._traced_model, self._size(showing.trainer), self._dense_network)

    def _size(self, trainer: Trainer) -> Size:
        assert self._structure is not None
        assert self._traced_model is not None
        return size_of(self._structure, backbone=backbone_in(trainer, self._traced_model.model))

    def _run(self, trainer: Trainer, module: LightningModule) -> RunContext:
        assert self._traced_model is not None
        folder = self.session.writer(self, trainer).folder
        samples = partial(self._samples, trainer, module)
        return RunContext(trainer, module, self._traced_model, self.report, folder, self._timeline, samples)

    def _samples(self, trainer: Trainer, module: LightningModule, batches: int | None = None) -> DataPass:
        """Samples of the training data that extensions judge a cut by, all of them in every process.

        Args:
            trainer: The run.
            module: The network.
            batches: So many batches only.
        """
        assert self._traced_model is not None
        samples = _JUDGED if batches is None else None
        data = training_data(trainer, module, batches=batches, samples=samples, is_shared=False)
        return data.using(inputs=inputs_of(module, data.batch(0).raw, self._traced_model))


def _changed(before: Structure, after: Structure) -> tuple[dict[str, int], dict[str, int]]:
    """Widths before and after a cut, of the groups that are not as they were; 0 where a group is not there."""
    then, now = before.widths, after.widths
    names = [name for name in (*then, *(now.keys() - then.keys())) if then.get(name) != now.get(name)]
    return {name: then.get(name, 0) for name in names}, {name: now.get(name, 0) for name in names}
