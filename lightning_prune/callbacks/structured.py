"""Structured pruning while Lightning trains: decides *when*; the rooms below know how."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Mapping
from time import perf_counter
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch._dynamo import OptimizedModule
from typing_extensions import override

from lightning_prune.callbacks.calibration import Calibration
from lightning_prune.callbacks.checkpoints import keep_history
from lightning_prune.callbacks.guard import Guard, go_back, snapshot
from lightning_prune.callbacks.ladder import save_rung
from lightning_prune.callbacks.monitors import hold_early_stopping, reset_monitors
from lightning_prune.callbacks.processes import (
    agreed,
    in_exception,
    measured_on_first,
    merged,
    on_first,
    refuse_strategy,
    same_everywhere,
    together,
    unwrapped,
)
from lightning_prune.callbacks.showing import Pace, Showing, log_now, score_summary
from lightning_prune.callbacks.subjects import call_on, subject_of
from lightning_prune.planning import (
    CutPoint,
    Linear,
    NoEffectWarning,
    Original,
    Plan,
    RunLength,
    Schedule,
    Scope,
    Target,
    due,
    feasible,
    make_plan,
    reaches,
    select,
)
from lightning_prune.reporting import Cut, Report, Size, versions
from lightning_prune.scoring import L1, Criterion, Statistic, score_groups
from lightning_prune.structure import Call, LatencyTable, Structure, StructureError, Subject, trace
from lightning_prune.structure.latency import with_latency
from lightning_prune.surgery import (
    Keep,
    Repair,
    attach,
    begun,
    cut_and_check,
    history_of,
    install_and_check,
    latency_table,
    original_of,
    refuse,
    repaired,
)
from lightning_prune.surgery.tensors import named

__all__ = ["StructuredPruning"]

# Form of the callback's state in a checkpoint.
_FORMAT = 1


class StructuredPruning(Callback):
    """Makes the layers of a LightningModule physically narrower while it trains.

    At each cut of the schedule the units with the lowest scores leave: weights, gradients, optimizer state and
    statistics are sliced, the narrower network is run forward and backward, and only then the cut counts. Optimizer,
    schedulers, parameter groups and hooks stay the same objects. Checkpoints carry what was done, so that every
    ``ckpt_path`` loads and training resumes; ``load_from_checkpoint`` gives the narrow network without a callback.

    Cuts happen before a training batch, so a validation always measures the network that is saved with it.

    Args:
        pruning_ratio: Share of the units to remove, in [0, 1): of every group, or of all with ``scope="global"``. Or a
            share per layer, ``{"layers.1": 0.5, "encoder.*": 0.2}``: the first name or glob that fits counts, and what
            none fits stays.
        budget: Instead of a ratio, what remains: ``{"params": 0.6}``, ``{"macs": 0.5}``, ``{"units": 40}``,
            ``{"memory": 0.5}`` (bytes of one sample's activations) or ``{"latency": 0.6}`` (milliseconds of one sample,
            by a table that is measured when the run begins). A float is a share of the dense network in (0, 1], an int
            a count; a bare number counts parameters.
        criterion: How much each unit matters; by default `L1`.
        schedule: When cuts happen; by default five, the first after 10 % and the last after 60 % of the run.
        scope: ``"local"`` (each layer loses the same share), ``"global"``, or a `Scope` with limits of the widths.
        layers: Only these layers: names, globs, or names of modules that contain them.
        ignore: Not these layers.
        reset_monitors: Let ``ModelCheckpoint`` and ``EarlyStopping`` start anew after each cut, so that "best" means
            best at the final size, and let early stopping wait for the last cut.
        dirpath: Folder for ``report.json``, ``report.md`` and ``report.png``; by default the logger's folder.
        repair: What makes good for a cut at once, from some training batches: `Ridge`, `FoldMean`,
            `ReestimateBatchNorm`, or several in a list.
        guard: Take back a cut that does not recover, see `Guard`.
        ladder: Save the network of each size, right before the next cut and at the end, as
            ``ladder/params=12345.ckpt`` beside the report, with a table and a picture of metric against size.

    Raises:
        ValueError: At once for amounts out of range; before the first training step for everything that depends on
            network, optimizer and trainer. The text says what was expected, what came and what to do.

    Example:
        >>> from lightning_prune import L2, OneShot, StructuredPruning
        >>> callback = StructuredPruning(budget={"macs": 0.5}, criterion=L2(), schedule=OneShot(), scope="global")
    """

    default_criterion: ClassVar[type[Criterion]] = L1

    def __init__(
        self,
        pruning_ratio: float | dict[str, float] | None = None,
        budget: float | int | dict[str, float | int] | None = None,
        criterion: Criterion | None = None,
        schedule: Schedule | None = None,
        scope: Literal["local", "global"] | Scope = "local",
        layers: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        reset_monitors: bool = True,
        dirpath: str | None = None,
        repair: Repair | list[Repair] | None = None,
        guard: Guard | None = None,
        ladder: bool = False,
    ) -> None:
        self.target = Target.of(pruning_ratio, budget)
        # None rather than a default instance: on the command line its settings would leak into another class's.
        self.criterion = self.default_criterion() if criterion is None else criterion
        self.schedule = Linear() if schedule is None else schedule
        for name, value, kind in (("criterion", self.criterion, Criterion), ("schedule", self.schedule, Schedule)):
            if not isinstance(value, kind):
                raise TypeError(
                    f"{type(self).__name__}: expected `{name}` to be an instance of {kind.__name__}, got {value!r}. "
                    f"Import one from lightning_prune, for example `{'L1()' if name == 'criterion' else 'Linear()'}`."
                )
        self.scope = Scope.of(scope)
        self.layers = layers
        self.ignore = ignore
        self.reset_monitors = reset_monitors
        self.dirpath = dirpath
        self.repairs = (repair,) if isinstance(repair, Repair) else tuple(repair or ())
        self.guard = guard
        self.ladder = ladder
        self._is_fit = True
        self._forget()

    def _forget(self) -> None:
        """A run of its own begins: nothing is known of the network, nothing was done."""
        self.report = Report()
        self._run_id = uuid.uuid4().hex
        self._done: int | None = None  # index of the last cut that was made, -1 for none; None: the history knows
        self._batches = 0  # training batches since the last cut, to observe every n-th
        self._saved_statistic: Mapping[str, torch.Tensor] = {}
        self._kept: dict[str, Any] | None = None  # the network before a cut that is not judged yet
        self._latency: LatencyTable | None = None  # as measured when the run began
        self._unprepare()

    def _unprepare(self) -> None:
        """What is found anew whenever a fit begins."""
        self._structure: Structure | None = None
        self._subject: Subject | None = None
        self._statistic: Statistic | None = None
        self._examined: Call | None = None  # what a statistic that runs the network itself runs it on
        self._calibration: Calibration | None = None
        self._original = Original(0, 0, {})
        self._resolved = self.target
        self._selected: tuple[str, ...] = ()
        self._timeline: tuple[CutPoint, ...] = ()
        self._observing: list[Any] = []
        self._before_batch: Mapping[str, torch.Tensor] | None = None  # statistic without the batch that is running
        self._measured: dict[str, torch.Tensor] = {}  # metrics as they were last written down
        self._pace = Pace()

    # -- what others may ask ------------------------------------------------------------------------------------------

    @property
    def structure(self) -> Structure | None:
        """Groups of the network as it is now; None before the first training batch."""
        return self._structure

    @property
    def pending(self) -> bool:
        """Whether cuts are still to come."""
        return bool(self._timeline) and self._last_done < self._timeline[-1].index

    @property
    def _last_done(self) -> int:
        return -1 if self._done is None else self._done

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _refuse_surroundings(self, trainer, pl_module)
        keep_history(pl_module)
        self._is_fit = stage == "fit"
        if not self._is_fit:
            return
        if self._goes_on(trainer, pl_module):
            self._saved_statistic = self._observed()
            self._unprepare()
        else:
            self._forget()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse(trainer.optimizers)
        Showing(self.report, trainer, self.dirpath, self._run_id).claim()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_observing()  # a callback may have ended the last batch before its time
        if self._structure is None:
            self._prepare(trainer, pl_module, batch)
        if batch_idx == 0:
            self._judge(trainer, pl_module)
        waits = self._kept is not None or not self._timeline
        point = None if waits else due(self._timeline, self._last_done, _now(trainer, self._timeline[0]))
        if point is not None:
            self._cut(trainer, pl_module, point)
        if self.pending and self.reset_monitors and batch_idx == 0:
            hold_early_stopping(trainer)
        if point is not None or batch_idx == 0:
            self._log_params_left(pl_module)
        observe = self._statistic is not None and self.pending and self._batches % self.criterion.every_n_batches == 0
        self._pace.start(observed=observe)
        if observe and self._statistic is not None:
            self._before_batch = self._observed()
            self._observing = self._statistic.attach(pl_module, _loss_scale(trainer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_observing()
        self._before_batch = None
        self._batches += 1
        self._pace.stop()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_fit and self.pending and self.reset_monitors:
            hold_early_stopping(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_fit and not trainer.sanity_checking:
            self._collect(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._structure is not None:
            numbers = self.report.metrics()
            overhead = self._pace.overhead()
            if overhead is not None:
                numbers["pruning/overhead"] = overhead
            log_now(trainer, numbers)
        self._collect(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._structure is None or self._subject is None:
            return
        self._collect(trainer)
        if self.pending:
            last = self._timeline[-1]
            warnings.warn(
                f"the run ended before the last of its cuts ({last.unit} {last.at}): "
                f"{100 * self.report.ratio:.1f} % of the units are gone.",
                stacklevel=2,
            )
        showing = Showing(self.report, trainer, self.dirpath, self._run_id)
        self._warn_unjudged(trainer)
        self._save_rung(trainer)
        self.report.final = showing.measure(pl_module, self._subject.calls[0], self._size())
        showing.finish()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_observing()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_observing()

    @override
    def state_dict(self) -> dict[str, Any]:
        statistic = self._observed()
        if statistic and self._before_batch is None and not in_exception():
            own = statistic["batches"]
            with merged(self._statistic):
                statistic = {**self._observed(), "batches": own}
        return {
            "format": _FORMAT,
            "run": self._run_id,
            "done": self._done,
            "batches": self._batches,
            "statistic": dict(statistic),
            "kept": self._kept,
            "latency": None if self._latency is None else self._latency.to_plain(),
            "report": self.report.to_plain(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._is_fit:
            return  # a checkpoint that is only looked at does not change what this run has done
        if state_dict.get("format") != _FORMAT:
            raise ValueError(
                f"expected a {type(self).__name__} state of format {_FORMAT}, got {state_dict.get('format')}. "
                "It was written by another version of lightning-prune: install that one, or resume without the state."
            )
        try:
            self._run_id = str(state_dict["run"])
            self._done = None if state_dict["done"] is None else int(state_dict["done"])
            self._batches = int(state_dict["batches"])
            self._saved_statistic = on_first(dict(state_dict["statistic"]))
            self._kept = state_dict.get("kept") if self.guard is not None else None
            table = state_dict.get("latency")
            self._latency = None if table is None else LatencyTable.from_plain(table)
            self.report = Report.from_plain(state_dict["report"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the {type(self).__name__} state in the checkpoint is damaged ({type(error).__name__}: {error}). "
                "Resume from another checkpoint."
            ) from error

    def _observed(self) -> Mapping[str, torch.Tensor]:
        """What was observed up to the last whole batch: a batch that fails is run again by who resumes."""
        if self._before_batch is not None:
            return self._before_batch
        if self._statistic is None:
            return self._saved_statistic
        return {name: value.detach().clone() for name, value in self._statistic.state_dict().items()}

    def _goes_on(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether this fit continues the last one of this callback: same trainer and network, cut by nobody else."""
        history = history_of(module)
        cuts = [(edit.cut, edit.step) for edit in history.edits] if history is not None else []
        mine = [(cut.index, cut.step) for cut in self.report.cuts]
        return trainer.global_step > 0 and self._subject is not None and self._subject.model is module and cuts == mine

    # -- before the first step ----------------------------------------------------------------------------------------

    def _prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Find the structure and check everything that can be checked, before any weight has changed."""
        # `true` precisions have another default type, which tensors made in `forward` take.
        with trainer.precision_plugin.module_init_context():
            subject = subject_of(module, batch, convert=trainer.precision_plugin.convert_input)
            structure = trace(subject)
        for note in structure.notes:
            warnings.warn(note, stacklevel=2)
        history = history_of(module)
        if self.target.quantity == "latency":
            structure = with_latency(structure, self._latency_table(trainer, subject, structure))
        original = original_of(module, structure)
        selected, _ = select(structure, self.layers, self.ignore)
        self._resolved, selected = self.target.resolve(structure, selected)
        statistic = self.criterion.statistic(structure)
        if statistic is not None:
            selected = self._observable(statistic.unobservable(module), selected)
        feasible(structure, self._resolved, self.scope, selected, original)
        self._calibration = Calibration(trainer, module, subject) if self.repairs else None
        if self._done is None:
            # A checkpoint of a run without this callback's state; what was cut before this run began does not count.
            made = history.edits if history is not None and trainer.global_step > 0 else ()
            self._done = max((edit.cut for edit in made), default=-1)
        timeline = self._moments(trainer, original, selected)
        if timeline and self._done < 0 and history is not None and self._is_reached(structure, selected, original):
            warnings.warn(f"{self.target} holds already: nothing is left to remove", NoEffectWarning, stacklevel=2)
            timeline = ()
        if statistic is not None and self._saved_statistic:
            statistic.load_state_dict(self._saved_statistic)
        self._saved_statistic = {}
        self._structure, self._subject, self._statistic = structure, subject, statistic
        self._examined = call_on(module, batch, subject) if statistic is not None and statistic.examines else None
        self._original, self._selected, self._timeline = original, selected, timeline
        self._begin_report(trainer, module)

    def _latency_table(self, trainer: Trainer, subject: Subject, structure: Structure) -> LatencyTable:
        """What latencies are reckoned by, measured once on the first process: another table would be another plan."""
        if self._latency is None:
            with trainer.precision_plugin.forward_context():
                self._latency = measured_on_first(trainer, lambda: latency_table(subject, structure))
        return self._latency

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

    def _moments(self, trainer: Trainer, original: Original, selected: tuple[str, ...]) -> tuple[CutPoint, ...]:
        """The cuts of this run."""
        if _is_rehearsal(trainer):
            return ()
        timeline = self.schedule.timeline(_run_length(trainer), self._resolved.fraction(original, selected))
        if timeline and reaches(timeline) < 1:
            warnings.warn(
                f"{self.schedule!r} goes {100 * reaches(timeline):.0f} % of the way to the target in this run: "
                "train longer, start earlier or cut more often to reach it.",
                stacklevel=2,
            )
        return timeline

    def _is_reached(self, structure: Structure, selected: tuple[str, ...], original: Original) -> bool:
        widths = structure.widths
        scores = {name: torch.zeros(widths[name]) for name in selected}
        return make_plan(structure, scores, self._resolved, 1.0, self.scope, original).is_empty

    def _begin_report(self, trainer: Trainer, module: LightningModule) -> None:
        if self.report.dense is None and self._subject is not None and self._structure is not None:
            dense = Size.of(self._structure, self._original)
            if history_of(module) is None:
                showing = Showing(self.report, trainer, self.dirpath, self._run_id)
                dense = showing.measure(module, self._subject.calls[0], dense)
            self.report.dense = dense
        self.report.final = None
        self.report.versions = versions()
        self.report.config = {
            "run": self._run_id,
            "target": self.target,
            "criterion": repr(self.criterion),
            "schedule": repr(self.schedule),
            "scope": self.scope,
            "repair": [repr(repair) for repair in self.repairs],
            "guard": self.guard,
            "layers": self.layers,
            "ignore": self.ignore,
            "cuts": [[point.unit, point.at, point.share] for point in self._timeline],
        }

    # -- a cut --------------------------------------------------------------------------------------------------------

    def _cut(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> None:
        """Score, plan, cut, check; whole or not at all."""
        structure, subject, statistic = self._structure, self._subject, self._statistic
        if structure is None or subject is None:
            raise RuntimeError("a cut was asked for before the structure was found")
        began = perf_counter()
        tensors = {name: tensor.detach() for name, tensor in named(module).items()}
        if statistic is not None and self._examined is not None:
            statistic.examine(module, self._examined)
        with merged(statistic):
            if statistic is not None:
                self._selected = self._observable(statistic.unobservable(module), self._selected)
            groups = [structure.group(name) for name in self._selected]
            scores = score_groups(self.criterion, groups, tensors, statistic)
            summary = score_summary(scores, statistic)
        plan = agreed(trainer, make_plan(structure, scores, self._resolved, point.share, self.scope, self._original))
        if plan.is_empty:
            self._done = point.index
            warnings.warn(
                f"cut {point.index} ({point.unit} {point.at}) removes nothing: its share of the target is less than "
                "one unit of any layer",
                NoEffectWarning,
                stacklevel=2,
            )
            return
        after = structure.take(plan.kept)
        self._save_rung(trainer)
        kept = self._keep(trainer, module)
        self._operate(trainer, module, plan, after, point)
        self._kept = kept
        if self.reset_monitors:
            reset_monitors(trainer)
        seconds = perf_counter() - began
        epoch, step = trainer.current_epoch, trainer.global_step
        self.report.cuts.append(Cut.of(self._size(), point.index, epoch, step, plan.before, plan.widths, seconds))
        log_now(trainer, {**self.report.metrics(), **summary, "pruning/seconds": seconds})

    def _operate(
        self, trainer: Trainer, module: LightningModule, plan: Plan, after: Structure, point: CutPoint
    ) -> None:
        """The cut itself: network, optimizers, history, statistics and what this callback knows, together."""
        structure, subject = self._structure, self._subject
        assert structure is not None
        assert subject is not None
        call = subject.calls[0]
        before = history_of(module)
        # Contributions count from the last cut.
        statistic = None if self._statistic is None else self.criterion.statistic(after)
        axes = structure.axes(plan.kept)
        edit = Keep(axes, plan.kept, trainer.current_epoch, trainer.global_step, point.index, {"share": point.share})
        history = begun(module, structure).add(edit, module)

        def run() -> Any:
            with trainer.precision_plugin.forward_context():
                return module.forward(*call.args, **call.kwargs)

        with unwrapped(trainer, module):
            try:
                contents = {}
                if self._calibration is not None:
                    contents = repaired(self._calibration.copy(), axes, self.repairs, self._calibration.run)
                change = cut_and_check(module, axes, trainer.optimizers, (), run)
            except Exception as error:
                together(error)
                raise
            try:
                together(None)
            except BaseException:
                change.undo()
                raise
        try:
            install_and_check(change, module, contents, run)
            attach(module, history)
            same_everywhere(module)
        except BaseException:
            change.undo()
            attach(module, before)
            raise
        self._structure, self._statistic, self._done, self._batches = after, statistic, point.index, 0

    # -- after a cut ---------------------------------------------------------------------------------------------------

    def _keep(self, trainer: Trainer, module: LightningModule) -> dict[str, Any] | None:
        """What it takes to undo the cut that is to follow, if somebody watches over it."""
        if self.guard is None:
            return None
        missing = self.guard.missing(self.report)
        if missing is not None:
            warnings.warn(f"the guard cannot judge this cut: {missing}", stacklevel=2)
            return None
        return snapshot(module, trainer.optimizers)

    def _judge(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the last cut back if it had its time and has not recovered."""
        if self._kept is None or self.guard is None:
            return
        verdict = trainer.strategy.broadcast(self.guard.judge(self.report, trainer.current_epoch))
        if verdict == "failed":
            self._take_back(trainer, module, self.guard)
        if verdict != "open":
            self._kept = None

    def _take_back(self, trainer: Trainer, module: LightningModule, guard: Guard) -> None:
        assert self._kept is not None
        assert self._subject is not None
        note = f"Cut {self.report.cuts[-1].index + 1} was taken back and no other made: {guard.words(self.report)}."
        with unwrapped(trainer, module):
            go_back(self._kept, module, trainer.optimizers)
        self.report.cuts.pop()
        self.report.notes.append(note)
        self._structure, self._statistic = trace(self._subject), None
        if self._latency is not None:
            self._structure = with_latency(self._structure, self._latency)
        self._done = self._timeline[-1].index if self._timeline else self._done
        if self.reset_monitors:
            reset_monitors(trainer)
        log_now(trainer, self.report.metrics())
        warnings.warn(note, stacklevel=2)

    def _warn_unjudged(self, trainer: Trainer) -> None:
        if self._kept is None or self.guard is None:
            return
        if self.guard.judge(self.report, trainer.current_epoch) != "recovered":
            warnings.warn(
                f"the run ended before its last cut had recovered ({self.guard.words(self.report)}): it stays. Train "
                "longer, or cut earlier.",
                stacklevel=2,
            )

    def _save_rung(self, trainer: Trainer) -> None:
        if self.ladder and not _is_rehearsal(trainer):
            folder = Showing(self.report, trainer, self.dirpath, self._run_id).folder()
            save_rung(trainer, self.report, self._size(), folder)

    # -- showing ------------------------------------------------------------------------------------------------------

    def _size(self) -> Size:
        assert self._structure is not None
        return Size.of(self._structure)

    def _log_params_left(self, module: LightningModule) -> None:
        size = self.report.size
        if size is not None:
            module.log(
                "params", float(size.params), prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1
            )

    def _collect(self, trainer: Trainer) -> None:
        """Write down what was measured since the last time; a metric of an earlier validation stays as it is."""
        metrics = {
            name: value
            for name, value in trainer.callback_metrics.items()
            if name != "params" and not name.startswith("pruning/") and value.numel() == 1
        }
        new = {name: value for name, value in metrics.items() if self._measured.get(name) is not value}
        self._measured = metrics
        if new:
            self.report.log(trainer.current_epoch, trainer.global_step, new)

    def _stop_observing(self) -> None:
        for handle in self._observing:
            handle.remove()
        self._observing = []


def _is_rehearsal(trainer: Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, too short for a schedule: everything is checked, nothing is cut."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _loss_scale(trainer: Trainer) -> float:
    """What mixed precision in fp16 multiplies the loss with."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _now(trainer: Trainer, point: CutPoint) -> int:
    """How long the run has gone, in what the schedule counts."""
    if point.unit == "epoch":
        return trainer.current_epoch
    # The two differ under manual optimization, where several optimizers step on one batch: `max_steps` counts all.
    return trainer.global_step if trainer.max_steps != -1 else trainer.fit_loop.epoch_loop._batches_that_stepped


def _run_length(trainer: Trainer) -> RunLength:
    """How long the run is, as far as the trainer knows."""
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None
    steps = trainer.max_steps if trainer.max_steps != -1 else None
    batches = trainer.num_training_batches
    per_epoch = None
    if batches != float("inf"):
        per_epoch = max(-(-int(batches) // trainer.accumulate_grad_batches), 1)
    return RunLength(epochs, steps, per_epoch)


def _refuse_surroundings(callback: StructuredPruning, trainer: Trainer, module: LightningModule) -> None:
    """Refuse what a cut cannot be made safe in, before anything happens."""
    name = type(callback).__name__
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"{name}: expected a Trainer of `lightning.pytorch`, got one of `{type(trainer).__module__}`. Import "
            "Trainer, LightningModule and callbacks from `lightning.pytorch`, not from `pytorch_lightning`."
        )
    refuse_strategy(name, trainer)
    others = [c for c in trainer.callbacks if isinstance(c, StructuredPruning) and c is not callback]  # type: ignore[attr-defined]
    if others:
        raise ValueError(
            f"{name}: expected one pruning callback, got {1 + len(others)}. Let one callback do all cuts: choose its "
            "`layers` and `scope`."
        )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        kinds = {base.__name__ for base in type(other).__mro__}
        if kinds & {"WeightAveraging", "StochasticWeightAveraging"}:
            raise ValueError(
                f"{name}: expected no callback that averages weights, got {type(other).__name__}: its copy of the "
                "network would stay wide. Remove one of the two; average the narrow network in a run of its own."
            )
    parts = list(module.modules())
    if any(isinstance(part, OptimizedModule) or part._compiled_call_impl is not None for part in parts) or getattr(
        module, "_compiler_ctx", None
    ):
        raise ValueError(
            f"{name}: expected a module that is not compiled: hooks and shapes change while it trains. Train without "
            "`torch.compile` and compile the narrow network afterwards."
        )
