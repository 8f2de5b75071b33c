"""Structured pruning while Lightning trains: decides *when*; the rooms below know how."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce
from time import perf_counter
from typing import Any, ClassVar, TypedDict

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_prune.callbacks.averages import averages
from lightning_prune.callbacks.compiled import as_written, forget_code
from lightning_prune.callbacks.extensions.applied import Extensions
from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext
from lightning_prune.callbacks.extensions.rollback import go_back, snapshot
from lightning_prune.callbacks.monitors import reset_monitors
from lightning_prune.callbacks.observation import Observation
from lightning_prune.callbacks.processes import (
    agreed,
    all_or_none,
    from_first,
    measured_on_first,
    merged,
    on_first,
    same_everywhere,
    unwrapped,
)
from lightning_prune.callbacks.scheduled import ScheduledPruning, instance_of, names_or_none, note_what_stays
from lightning_prune.callbacks.session import CutMade, Participant
from lightning_prune.callbacks.showing import Showing, log_now, log_scores, score_summary
from lightning_prune.callbacks.subjects import call_on, subject_of
from lightning_prune.planning import (
    CutPoint,
    NoEffectWarning,
    Original,
    Plan,
    Schedule,
    Scope,
    ScopeKind,
    Target,
    feasible,
    make_plan,
    select,
    staying,
)
from lightning_prune.reporting import Cut, Size, require
from lightning_prune.scoring import L1, Criterion, Statistic, bundles_of, score_groups
from lightning_prune.structure import Call, LatencyTable, Structure, StructureError, Subject, rehearse, trace
from lightning_prune.structure.flow import with_flow
from lightning_prune.structure.latency import with_latency
from lightning_prune.structure.tracing import FakeCopy
from lightning_prune.surgery import (
    Change,
    History,
    Repair,
    attach,
    begun,
    cut_and_check,
    edits_of,
    forget,
    history_of,
    install_and_check,
    latency_table,
    original_of,
)
from lightning_prune.surgery.tensors import named

__all__ = ["StructuredOptions", "StructuredPruning"]


class StructuredOptions(TypedDict, total=False):
    """Arguments of `StructuredPruning` that its presets take as they are; see there."""

    layers: str | list[str] | None
    ignore: str | list[str] | None
    reset_monitors: bool
    dirpath: str | None
    extensions: list[Repair | CutExtension] | None


class StructuredPruning(ScheduledPruning):
    """Makes the layers of a LightningModule physically narrower while it trains.

    At each cut of the schedule the units with the lowest scores leave: weights, gradients, optimizer state and
    statistics are sliced, the narrower network is run forward and backward, and only then the cut counts. Optimizer,
    schedulers, parameter groups and hooks stay the same objects. Checkpoints carry what was done, so that every
    ``ckpt_path`` loads and training resumes; ``load_from_checkpoint`` gives the narrow network without a callback.

    Cuts happen before a training batch, so a validation always measures the network that is saved with it.

    Args:
        pruning_ratio: Share of the units to remove, in [0, 1): of every group, or of all with ``scope="global"``. Or a
            share per layer, ``{"layers.1": 0.5, "encoder.*": 0.2}``: the first name or glob that fits counts, and what
            none fits stays; here 1 takes a branch out of the network, with ``Scope(min_width=0)``.
        budget: Instead of a ratio, what remains: ``{"params": 0.6}``, ``{"macs": 0.5}``, ``{"units": 40}``,
            ``{"memory": 0.5}`` (bytes of one sample's activations) or ``{"latency": 0.6}`` (milliseconds of one sample,
            by a table that is measured when the run begins). A float is a share of the dense network in (0, 1], an int
            a count; a bare number counts parameters.
        criterion: How much each unit matters; by default `L1`.
        schedule: When cuts happen; by default five, the first after 10 % and the last after 60 % of the run.
        scope: ``"local"`` (each layer loses the same share), ``"global"`` (the lowest scores go, wherever they are),
            ``"erk"`` (wide layers lose most), or a `Scope` with limits of the widths.
        layers: Only these layers: names, globs, or names of modules that contain them.
        ignore: Not these layers.
        reset_monitors: Let ``ModelCheckpoint`` and ``EarlyStopping`` start anew after each cut, so that "best" means
            best at the final size, and let early stopping wait for the last cut.
        dirpath: Folder for ``report.json``, ``report.md`` and ``report.png``; by default the logger's folder.
        extensions: What goes with every cut, in order. Repairs of the weights: `Ridge`, `FoldMean` and
            `ReestimateBatchNorm`, from some training batches, or `Reinitialise`. And what the run does around a cut:
            `Rewind`, `Rollback`, `SaveEachSize`.

    Raises:
        ValueError: At once for amounts out of range; before the first training step for everything that depends on
            network, optimizer and trainer. The text says what was expected, what came and what to do.

    Example:
        >>> from lightning_prune import L2, OneShot, StructuredPruning
        >>> callback = StructuredPruning(budget={"macs": 0.5}, criterion=L2(), schedule=OneShot(), scope="global")
    """

    default_criterion: ClassVar[type[Criterion]] = L1
    _aim = "target"

    def __init__(
        self,
        pruning_ratio: float | dict[str, float] | None = None,
        budget: float | int | dict[str, float | int] | None = None,
        criterion: Criterion | None = None,
        schedule: Schedule | None = None,
        scope: ScopeKind | Scope = "local",
        layers: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        reset_monitors: bool = True,
        dirpath: str | None = None,
        extensions: list[Repair | CutExtension] | None = None,
    ) -> None:
        self.target = self._target_of(pruning_ratio, budget)
        # None rather than a default instance: on the command line its settings would leak into another class's.
        self.criterion = self.default_criterion() if criterion is None else criterion
        instance_of(self, "criterion", self.criterion, Criterion, "L1()")
        self.scope = Scope.of(scope, comparable=self.criterion.comparable)
        for name, names in (("layers", layers), ("ignore", ignore)):
            names_or_none(self, name, names)
        self.layers = layers
        self.ignore = ignore
        self.extensions = self._checked(extensions)
        super().__init__(schedule, reset_monitors, dirpath)

    def _target_of(
        self, pruning_ratio: float | dict[str, float] | None, budget: float | int | dict[str, float | int] | None
    ) -> Target:
        """What is to remain."""
        return Target.of(pruning_ratio, budget)

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
        return tuple(extensions or ())

    @override
    def _forget(self) -> None:
        super()._forget()
        self._observation = Observation()
        self._latency: LatencyTable | None = None  # as measured when the run began
        self._extensions = Extensions(self.extensions)

    @override
    def _unprepare(self) -> None:
        super()._unprepare()
        self._structure: Structure | None = None
        self._subject: Subject | None = None
        self._examined: Call | None = None  # what a statistic that runs the network itself runs it on
        self._original = Original(0, 0, {})
        self._resolved = self.target
        self._selected: tuple[str, ...] = ()
        self._observed: tuple[str, ...] = ()  # the same before it showed which of them cannot be scored

    @property
    def structure(self) -> Structure | None:
        """Groups of the network as it is now; None before the first training batch."""
        return self._structure

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._is_fit:
            self._observation = self._observation.paused()

    @override
    def finish_batch(self) -> None:
        self._observation.stop()  # a callback may have ended the last batch before its time

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._observation.end()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._observation.stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._observation.stop()

    # -- state --------------------------------------------------------------------------------------------------------

    @override
    def _state(self) -> dict[str, Any]:
        return {
            "batches": self._observation.batches,
            "statistic": self._observation.state(),
            "latency": None if self._latency is None else self._latency.to_plain(),
            "extensions": self._extensions.state(),
        }

    @override
    def _restore(self, state: Mapping[str, Any]) -> None:
        saved, before = on_first(dict(state["statistic"])), state["report"]["config"].get("criterion")
        if saved and before not in (None, repr(self.criterion)):
            warnings.warn(f"{self.criterion!r} observes anew: the checkpoint's numbers are of {before}", stacklevel=2)
            saved = {}
        require(state["batches"], int, "batches")
        self._observation = Observation(saved=saved, batches=state["batches"])
        table = state.get("latency")
        self._latency = None if table is None else LatencyTable.from_plain(table)
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
            "target": self.target,
            "criterion": repr(self.criterion),
            "schedule": repr(self.schedule),
            "scope": self.scope,
            "extensions": [repr(one) for one in self.extensions],
            "layers": self.layers,
            "ignore": self.ignore,
        }

    # -- before the first step ----------------------------------------------------------------------------------------

    @override
    def _prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        # `true` precisions have another default type, which tensors made in `forward` take.
        with trainer.precision_plugin.module_init_context():
            subject = subject_of(module, batch, convert=trainer.precision_plugin.convert_input)
            structure = self._traced(trainer, subject)
        for note in structure.notes:
            warnings.warn(note, stacklevel=2)
        history = history_of(module)
        original = original_of(module, structure)
        self._resolved, selected = self.target.resolve(structure, self._eligible(structure))
        self._observed = selected
        statistic = self.criterion.statistic(_only(structure, selected))
        if statistic is not None:
            selected = self._observable(statistic.unobservable(module), selected)
        self._require_feasible(structure, selected, original)
        timeline = self._moments(trainer, self._fraction(structure, selected, original))
        reached = partial(self._reached, timeline, structure, selected, original)
        if self._done is None:
            # A checkpoint of a run without this callback's state; what was cut before this run began does not count.
            self._done = reached() if history is not None and trainer.global_step > 0 else -1
        if timeline and self._done < 0 and history is not None and reached() == timeline[-1].index:
            warnings.warn(f"{self.target} holds already: nothing is left to remove", NoEffectWarning, stacklevel=2)
            timeline = ()
        self._extensions.prepare(self._run(trainer, module, subject, timeline))
        self._observation = self._observation.of(statistic)
        self._structure, self._subject = structure, subject
        self._examined = _examined(statistic, module, batch, subject)
        self._original, self._selected, self._timeline = original, selected, timeline
        self._carry_over(reached)
        if self.report.dense is None:
            dense = Size.of(structure, original)
            if history is None:
                self.report.dense = self.session.writer(self, trainer).measure(subject, dense)
            else:
                self.report.pruned_before(dense, Size.of(structure), len({edit.cut for edit in history.edits}))
        note_what_stays(self.report, self._staying(structure, selected, original))
        self._begin_report()

    def _require_feasible(self, structure: Structure, selected: tuple[str, ...], original: Original) -> None:
        """Refuse a target that cannot be reached."""
        expected = bundles_of(self.criterion, (structure.group(name) for name in selected), None)
        feasible(structure, self._resolved, self.scope, selected, original, expected)

    def _fraction(self, structure: Structure, selected: tuple[str, ...], original: Original) -> float:
        """What the target leaves, as a share of the dense network."""
        return self._resolved.fraction(original, original.among(selected, structure))

    def _staying(self, structure: Structure, selected: tuple[str, ...], original: Original) -> dict[str, str]:
        """Groups that keep a unit against the target, and why."""
        return staying(structure, self._resolved, self.scope, selected, original)

    def _traced(self, trainer: Trainer, subject: Subject) -> Structure:
        """The structure, with all that planning has to know."""
        structure, history = trace(subject), history_of(subject.model)
        if self.scope.min_width == 0:
            structure = with_flow(structure, subject, history.vanished if history is not None else ())
        if self.target.quantity == "latency":
            structure = with_latency(structure, self._latency_table(trainer, subject, structure))
        return structure

    def _latency_table(self, trainer: Trainer, subject: Subject, structure: Structure) -> LatencyTable:
        """What latencies are reckoned by, measured once on the first process: another table would be another plan."""
        if self._latency is None:
            with trainer.precision_plugin.forward_context():
                self._latency = measured_on_first(trainer, lambda: latency_table(subject, structure))
        return self._latency

    @property
    @override
    def own_groups(self) -> tuple[str, ...]:
        return self._observed if self._is_prepared else ()

    @override
    def objection(self, other: Participant) -> str | None:
        exclusive = [type(one).__name__ for one in self._extensions.parts if one.is_exclusive]
        if exclusive:
            return (
                f"expected no `{exclusive[0]}`, which would take back what the other has done since. Leave one of the "
                "two out"
            )
        if self.scope.min_width == 0:
            return (
                "expected no `min_width=0`: the other may work on a layer that is taken out. Leave one of the two out"
            )
        if not isinstance(other, StructuredPruning):
            return None
        if self.layers is None:
            return "expected `layers` in both, each with its own, or one callback that does all cuts"
        if self.extensions:
            return "expected no `extensions`, which know of the cuts of one callback only. Leave them out"
        return None

    def _eligible(self, structure: Structure) -> tuple[str, ...]:
        """Groups that the user and the method let be cut."""
        return select(structure, self.layers, self.ignore)[0]

    def _observable(self, silent: Mapping[str, str], selected: tuple[str, ...]) -> tuple[str, ...]:
        """The selected groups that the criterion can score; an error if the user named one that it cannot."""
        lost = {name: why for name, why in silent.items() if name in selected}
        kept = tuple(name for name in selected if name not in lost)
        reasons = "; ".join(f"{name}: {why}" for name, why in lost.items())
        if lost and (self.layers is not None or not kept):
            raise StructureError(
                f"{type(self.criterion).__name__} cannot score {reasons}. Choose other `layers`, or a criterion "
                "of weights such as L1."
            )
        if lost:
            warnings.warn(
                f"{type(self.criterion).__name__} cannot score, so these stay as they are: {reasons}", stacklevel=2
            )
        return kept

    def _reached(
        self, timeline: tuple[CutPoint, ...], structure: Structure, selected: tuple[str, ...], original: Original
    ) -> int:
        """Index of the last cut that the network is as small as already, -1 for none."""
        scores = {name: torch.zeros(structure.group(name).width) for name in selected}
        bundles = bundles_of(self.criterion, (structure.group(name) for name in selected), None)
        plans = (
            make_plan(structure, scores, self._resolved, p.share, self.scope, original, bundles) for p in timeline[::-1]
        )
        return next((point.index for point, plan in zip(timeline[::-1], plans, strict=True) if plan.is_empty), -1)

    # -- a cut --------------------------------------------------------------------------------------------------------

    @override
    def _waits(self) -> bool:
        # A cut at the very beginning, or one that a longer run than before adds, has nothing to go by yet.
        return self._extensions.waits or self._observation.is_empty

    @override
    def _begin_batch(self, trainer: Trainer, module: LightningModule) -> bool:
        observation = self._observation
        if not (observation.statistic and self.pending and observation.batches % self.criterion.every_n_batches == 0):
            return False
        observation.start(trainer, module)
        return True

    @override
    def _cut(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> None:
        began = perf_counter()
        plan, scores, summary = self._plan(trainer, module, point)
        if plan.is_empty:
            self._done = point.index
            warnings.warn(
                f"cut {point.index} ({point.unit} {point.at}) removes nothing: its share of the target is less than "
                "one unit of any layer",
                NoEffectWarning,
                stacklevel=2,
            )
            return
        self._extensions.before_cut(self._run(trainer, module))
        self._apply_plan(trainer, module, plan, point, began)
        if self.reset_monitors:
            reset_monitors(trainer)
        seconds = {f"{self.session.writer(self, trainer).name}/seconds": self.report.cuts[-1].seconds}
        log_now(trainer, {**self.report.metrics(), **summary, **seconds})
        log_scores(trainer, scores)

    def _plan(
        self, trainer: Trainer, module: LightningModule, point: CutPoint
    ) -> tuple[Plan, dict[str, torch.Tensor], dict[str, float]]:
        """What a cut keeps, the same on every process, its scores, and these in numbers for loggers."""
        structure, statistic = self._structure, self._observation.statistic
        assert structure is not None
        tensors = {name: tensor.detach() for name, tensor in named(module).items()}
        if statistic is not None and self._examined is not None:
            self._examine(statistic, module, self._examined)
        with merged(statistic):
            if statistic is not None:
                self._selected = self._observable(statistic.unobservable(module), self._selected)
            groups = [structure.group(name) for name in self._selected]
            scores = score_groups(self.criterion, groups, tensors, statistic)
            summary = score_summary(scores, statistic)
            bundles = bundles_of(self.criterion, groups, statistic)
        plan = make_plan(structure, scores, self._resolved, point.share, self.scope, self._original, bundles)
        return agreed(trainer, plan), scores, summary

    def _examine(self, statistic: Statistic, module: LightningModule, call: Call) -> None:
        """Let a statistic run the network, or a copy of it if it is the training step that is run."""
        subject = self._subject
        if statistic.examines_loss and subject is not None:
            copy = FakeCopy(module, subject.memo, subject.prepare, kind="real").module
            statistic.examine(copy, call)
        else:
            statistic.examine(module, call)

    def _apply_plan(self, trainer: Trainer, module: LightningModule, plan: Plan, point: CutPoint, began: float) -> None:
        """The cut itself: network, optimizers, history, statistics and what this callback knows, together."""
        structure, subject = self._structure, self._subject
        assert structure is not None
        assert subject is not None
        call = subject.calls[0]
        after, axes, drops = structure.take(plan.kept), structure.axes(plan.kept), structure.drops(plan.kept)
        # Contributions count from the last cut.
        observation = Observation(self.criterion.statistic(_only(after, self._observed)))
        when = (trainer.current_epoch, trainer.global_step, point.index)
        edits = edits_of(structure, plan.kept, *when, {"share": point.share})
        copies = averages(trainer)
        before = {network: history_of(network) for network in (module, *copies)}
        remembered = {
            network: reduce(lambda history, edit: history.add(edit, network), edits, begun(network, structure))
            for network in before
        }

        def run() -> Any:
            with trainer.precision_plugin.forward_context():
                return module.forward(*call.args, **call.kwargs)

        forget_code(module)
        change: Change | None = None
        context, way_back = self._run(trainer, module), self.session.snapshot_state()
        try:
            with unwrapped(trainer, module):
                with all_or_none():
                    repairs = self._extensions.repairs(context)
                    contents = self._extensions.contents(context, repairs, axes, drops)
                contents = from_first(trainer, contents)
                with all_or_none():
                    rehearse(subject, structure, plan.kept)
                    change = cut_and_check(module, axes, trainer.optimizers, copies, run, drops)
                    install_and_check(change, module, contents, run)
                    if any(repair.restarts for repair in repairs):
                        forget(change, trainer.optimizers)
                same_everywhere(module)  # a new wrapper would make it so
            _attach(remembered)
            self._structure, self._observation, self._done = after, observation, point.index
            self._selected = tuple(name for name in self._selected if name in after.widths)
            self._observed = tuple(name for name in self._observed if name in after.widths)
            epoch, step, seconds = trainer.current_epoch, trainer.global_step, perf_counter() - began
            cut = Cut.of(self._size(), point.index, epoch, step, plan.before, plan.widths, seconds)
            self.report.cuts.append(cut)
            self._extensions.after_cut(axes, drops)
            self.session.tell_others(self, trainer, module, CutMade(plan, axes, drops, cut))
        except BaseException:
            if change is not None:
                change.undo()
            _attach(before)
            way_back()
            raise

    @override
    def on_other_cut(self, trainer: Trainer, module: LightningModule, made: CutMade) -> None:
        assert self._structure is not None
        self._structure = self._structure.take(made.plan.kept)
        # What was observed is of units that are all there: the other one cuts other groups.
        statistic = self.criterion.statistic(_only(self._structure, self._observed))
        self._observation = self._observation.paused().of(statistic)
        size, cut = self._size(), made.cut
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
        assert self._subject is not None
        note = f"Cut {self.report.cuts[-1].index + 1} was taken back and no other made: {why}."
        now, back = snapshot(trainer, module), self.snapshot_state()
        forget_code(module)
        try:
            extension.take_back(self._run(trainer, module))
            self.report.cuts.pop()
            self.report.notes.append(note)
            structure = trace(self._subject)
            self._structure = structure if self._latency is None else with_latency(structure, self._latency)
            self._observation = Observation()
            self._done = self._timeline[-1].index if self._timeline else self._done
        except BaseException:
            go_back(now, trainer, module)
            back()
            raise
        if self.reset_monitors:
            reset_monitors(trainer)
        log_now(trainer, self.report.metrics())
        warnings.warn(note, stacklevel=2)

    @override
    def _end(self, trainer: Trainer, module: LightningModule) -> None:
        self._extensions.on_train_end(self._run(trainer, module))

    @override
    def _measure(self, showing: Showing, module: LightningModule) -> Size:
        assert self._subject is not None
        with as_written(module):
            return showing.measure(self._subject, self._size())

    def _size(self) -> Size:
        assert self._structure is not None
        return Size.of(self._structure)

    def _run(
        self,
        trainer: Trainer,
        module: LightningModule,
        subject: Subject | None = None,
        timeline: tuple[CutPoint, ...] | None = None,
    ) -> RunContext:
        subject, timeline = subject or self._subject, self._timeline if timeline is None else timeline
        assert subject is not None
        folder = self.session.writer(self, trainer).folder
        return RunContext(trainer, module, subject, self.report, folder, timeline)


def _only(structure: Structure, names: tuple[str, ...]) -> Structure:
    """The structure with these groups alone: to observe what is not pruned would only cost time."""
    return replace(structure, groups=tuple(group for group in structure.groups if group.name in names))


def _examined(statistic: Statistic | None, module: LightningModule, batch: Any, subject: Subject) -> Call | None:
    """What a statistic runs, if it runs anything: ``forward`` on the batch, or its training step."""
    if statistic is None or not statistic.examines:
        return None
    return subject.optional[0] if statistic.examines_loss else call_on(module, batch, subject)


def _attach(histories: Mapping[Any, History | None]) -> None:
    for network, history in histories.items():
        attach(network, history)
