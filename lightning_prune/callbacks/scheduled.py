"""Base class of pruning callbacks: schedule, report and resuming."""

from __future__ import annotations

import os
import re
import uuid
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_prune.arguments import require_type
from lightning_prune.callbacks.display.report_writer import Pace, ReportWriter, log_now
from lightning_prune.callbacks.display.wandb_run import wandb_run
from lightning_prune.callbacks.lightning.checkpoints import keep_history
from lightning_prune.callbacks.lightning.compatibility import require_compatible
from lightning_prune.callbacks.lightning.progress import is_fast_dev_run, now, run_length
from lightning_prune.callbacks.lightning.sharding import narrow_before_loading, refuse_sharded
from lightning_prune.callbacks.lightning.spawned import patch_spawn_launcher, return_history
from lightning_prune.callbacks.session import CutMade, Participant, Session
from lightning_prune.planning import CutPoint, LinearSchedule, Schedule, due, reaches
from lightning_prune.reporting import Report, plain, require, versions
from lightning_prune.structure import Size, TracedModel
from lightning_prune.surgery import history_of, refuse
from lightning_prune.surgery.restore import dense_copy

__all__ = ["ScheduledPruning", "instance_of"]

# Prefix of notes that a longer, resumed fit removes.
_MISSED = "The target was not reached: "

# Metrics logged by pruning callbacks.
_OURS = re.compile(r"pruning(-\d+)?/")

# Format of the callback's state in a checkpoint, and readable formats.
_FORMAT, _READ = 2, (1, 2)


class ScheduledPruning(Participant):
    """Base class of callbacks that prune by a schedule, before training batches, and keep a report.

    Subclasses implement the preparation before the first batch (`_prepare`), a cut (`_cut`) and the final size
    (`_measure`), and extend state and settings. Several callbacks in a run share a `Session`, which calls them in
    order.

    Args:
        schedule: When cuts are made; by default five, the first after 10 % and the last after 60 % of the run.
        reset_monitors: Delay early stopping until the last cut; a subclass may do more.
        dirpath: Folder for the report; by default the logger's folder.
    """

    #: Settings that determine what is removed; a resumed run with others gets a warning.
    _aims: ClassVar[tuple[str, ...]] = ("target",)

    def __init__(self, schedule: Schedule | None, reset_monitors: bool, dirpath: str | None) -> None:
        self.schedule: Schedule = LinearSchedule() if schedule is None else schedule
        instance_of(self, "schedule", self.schedule, Schedule, "LinearSchedule()` or `Explicit(((3, 0.5), (5, 1.0)))")
        if self.schedule.decides_by_plans and not self._compares_plans:
            raise ValueError(
                f"{type(self).__name__}: expected a schedule with fixed moments, got {self.schedule!r}, which compares "
                "plans of `StructuredPruning` and its presets. Give `OneShot(0.6)`."
            )
        require_type(type(self).__name__, "reset_monitors", reset_monitors, bool)
        require_type(type(self).__name__, "dirpath", dirpath, str | PathLike | None)
        self.reset_monitors = reset_monitors
        self.dirpath = None if dirpath is None else fspath(dirpath)
        self._is_fit = True
        # What `Trainer.validate` has found of a network before it trains: the dense accuracy of a pretrained one.
        self._validated: tuple[LightningModule | None, dict[str, torch.Tensor]] = None, {}
        self.session = Session([self])  # until a run begins
        patch_spawn_launcher()
        self._reset()

    def _reset(self) -> None:
        """Reset all state at the start of a new run."""
        self.report = Report()
        self.run_id = uuid.uuid4().hex
        self._done: int | None = None  # index of the last cut that was made, -1 for none; None: the history knows
        self._trained: LightningModule | None = None  # by the last fit that came to a batch
        self._reset_fit()

    def _reset_fit(self) -> None:
        """Reset the state of a fit."""
        self._is_prepared = False
        self._timeline: tuple[CutPoint, ...] = ()
        self._measured: dict[str, torch.Tensor] = {}  # metrics as they were last written down
        self._pace = Pace()
        self._dense_network: torch.nn.Module | None = None  # on the meta device, to be timed beside the pruned one

    @property
    @override
    def is_prepared(self) -> bool:
        return self._is_prepared

    @property
    def removes_layers(self) -> bool:
        """Whether a cut may remove whole layers."""
        return False

    @property
    def _compares_plans(self) -> bool:
        """Whether the schedule may decide by plans that are made without a cut."""
        return False

    @property
    @override
    def pending(self) -> bool:
        return bool(self._timeline) and self._last_done < self._timeline[-1].index

    @property
    @override
    def state_key(self) -> str:
        return super().state_key if self.layers is None else self._generate_state_key(layers=self.layers)

    @property
    def _last_done(self) -> int:
        return -1 if self._done is None else self._done

    # -- for subclasses to implement
    # -----------------------------------------------------------------------------------------

    @abstractmethod
    def _continues_previous_fit(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether this fit continues the last one: same trainer and network, without other cuts."""

    @abstractmethod
    def _prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Validate the run before any weight has changed; set the timeline and the last cut made."""

    @abstractmethod
    def _cut(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> None:
        """Make a cut, atomically."""

    @abstractmethod
    def _measure(self, writer: ReportWriter, module: LightningModule) -> Size:
        """Size of the network at the end of the run."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Settings for the report."""

    @override
    def finish_batch(self) -> None:
        """Clean up after the last batch; by default there is nothing."""

    def _begin_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """Called at the start of an epoch, before a cut that is due."""

    def _waits(self) -> bool:
        """Whether a cut that is due must wait."""
        return False

    def _begin_batch(self, trainer: Trainer, module: LightningModule) -> bool:  # noqa: ARG002
        """Called before a batch, after a cut that is due; returns whether the batch is observed."""
        return False

    @override
    def on_other_cut(self, trainer: Trainer, module: LightningModule, made: CutMade) -> None:
        """Update the state after a cut of another callback."""

    def _end(self, trainer: Trainer, module: LightningModule) -> None:
        """Called at the end of the training, before the report is written."""

    def _state(self) -> dict[str, Any]:
        """Additional state for checkpoints."""
        return {}

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Restore the additional state."""

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        require_compatible(self, trainer, pl_module)
        narrow_before_loading(trainer)
        Session.join(self, trainer)
        keep_history(pl_module)
        _warn_of_parts(pl_module)
        return_history(trainer)
        self._is_fit = stage == "fit"
        if self._is_fit and self._continues_previous_fit(trainer, pl_module):
            self._reset_fit()
        elif self._is_fit:
            self._reset()
            self.run_id = trainer.strategy.broadcast(self.run_id)  # one run, one name
            validated, metrics = self._validated
            if validated is pl_module:
                self.report.log(0, 0, metrics)
            self._validated = None, {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse(trainer.optimizers)
        refuse_sharded(type(self).__name__, trainer, pl_module)
        self.session.writer(self, trainer).claim()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.session.begin_batch(self, trainer, pl_module, batch, batch_idx)
        self._show_size(trainer, pl_module, batch_idx)
        self._pace.start(observed=self._begin_batch(trainer, pl_module))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pace.stop()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_fit:
            self.session.hold_early_stopping(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_fit and not trainer.sanity_checking:
            self._collect(trainer)
        elif not self._is_fit and trainer.global_step == 0:
            self._validated = pl_module, self._metrics(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_prepared:
            numbers = self._numbers(trainer)
            overhead = self._pace.overhead()
            if overhead is not None:
                numbers[f"{self.session.writer(self, trainer).name}/overhead"] = overhead
            log_now(trainer, numbers)
        self._collect(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_prepared:
            return
        self._collect(trainer)
        if self.pending:
            last = self._timeline[-1]
            self._miss(
                f"the run ended before the last of its cuts ({last.unit} {last.at}): "
                f"{100 * self.report.pruning_ratio:.1f} % of the {self.report.what} are gone."
            )
        self._end(trainer, pl_module)
        writer = self.session.writer(self, trainer)
        self.report.final = self._measure(writer, pl_module)
        writer.finish(self._numbers(trainer))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.session.close()  # Lightning does not call `teardown` then

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.session.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "run": self.run_id,
            "done": self._done,
            **self._state(),
            "report": self.report.to_plain(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._is_fit:
            return  # only a fit restores the state
        if isinstance(state_dict, dict) and state_dict.get("format") not in _READ:
            raise ValueError(
                f"expected a {type(self).__name__} state of format {_FORMAT}, got {state_dict.get('format')}. "
                "It was written by another version of lightning-prune: install that one, or resume without the state."
            )
        back = self.snapshot_state()
        try:
            require(state_dict["run"], str, "run")
            self.report = Report.from_plain(state_dict["report"])
            _require_config(self.report.config)
            _require_done(state_dict["done"], self.report.config.get("cuts") or [])
            self._restore(state_dict)
            self.run_id, self._done = state_dict["run"], state_dict["done"]
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            back()
            raise ValueError(
                f"the {type(self).__name__} state in the checkpoint is damaged ({type(error).__name__}: {error}). "
                "Resume from another checkpoint."
            ) from error

    # -- for subclasses -----------------------------------------------------------------------------------------------

    def _moments(self, trainer: Trainer, fraction: float) -> tuple[CutPoint, ...]:
        """The cuts of this run, for a remaining share ``fraction`` of the network."""
        if is_fast_dev_run(trainer):
            return ()
        timeline = self.schedule.timeline(run_length(trainer), fraction)
        self.report.notes[:] = [note for note in self.report.notes if not note.startswith(_MISSED)]
        if timeline and reaches(timeline) < 1:
            self._miss(
                f"{self.schedule!r} goes {100 * reaches(timeline):.0f} % of the way to the target in this run: "
                "train longer, start earlier or cut more often to reach it."
            )
        return timeline

    def _miss(self, why: str) -> None:
        """Warn, and note in the report, why this run does not reach its target."""
        self.report.notes.append(f"{_MISSED}{why}")
        warnings.warn(why, stacklevel=2)

    @override
    def prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        before = self.report.config
        curves, order = wandb_run(trainer, before.get("wandb")), self._order(before.get("order"))
        self._prepare(trainer, module, batch)
        self.report.config |= {"wandb": curves, **({"order": order} if len(order) > 1 else {})}
        self._trained, self._is_prepared = module, True

    def _order(self, before: Any) -> list[str]:
        """State keys of all pruning callbacks in order; warns if the order has changed."""
        order = self.session.order
        if self.state_key == order[0] and before is not None and before != order and sorted(before) == sorted(order):
            warnings.warn(
                f"expected the pruning callbacks in the order of the run so far, {', '.join(before)}, got "
                f"{', '.join(order)}: of two that are due at once, the other one now begins, and the run ends with "
                "another network than it would have.",
                stacklevel=2,
            )
        return order

    def _adopt_progress(self, reached: Callable[[], int]) -> None:
        """Continue a run with another schedule or target, by the share that was reached.

        Args:
            reached: Returns the index of the last cut of this run that the network's size already meets; -1 for none.
        """
        before = self.report.config.get("cuts") or []
        now = [[point.unit, point.at, point.share] for point in self._timeline]
        made = before[: self._last_done + 1]
        if not now or not made:
            return
        others = self._other_aims()
        if others:
            self._done = reached()
            warnings.warn(self._message_for_other_aims(others), stacklevel=2)
            return
        if made == now[: len(made)]:
            return
        share_reached = max(share for _, _, share in made)
        self._done = max((point.index for point in self._timeline if point.share <= share_reached + 1e-9), default=-1)
        then, here = (", ".join(f"{unit} {at} ({share:.0%})" for unit, at, share in cuts) for cuts in (before, now))
        warnings.warn(
            f"{type(self).__name__}: the run so far had cuts (share of the target) at {then}; this one has {here}. "
            f"{share_reached:.0%} of the target is reached: the cuts that go further are made, the others count as "
            "done.",
            stacklevel=2,
        )

    def _other_aims(self) -> dict[str, tuple[Any, Any]]:
        """Changed settings that determine what is removed: previous and current value."""
        settings = self._settings()
        named = [name for name in self._aims if name in settings]  # a method of one's own may have no target
        pairs = {name: (plain(self.report.config.get(name)), plain(settings[name])) for name in named}
        return {name: (then, now) for name, (then, now) in pairs.items() if then != now}

    def _message_for_other_aims(self, others: Mapping[str, tuple[Any, Any]]) -> str:  # noqa: ARG002
        """Warning for a run that is resumed with other settings."""
        so_far = f"{100 * self.report.pruning_ratio:.1f} % of the {self.report.what} are gone"
        goes_on = (
            "The cuts that go further are made, what is overdue at once: give a schedule with later moments to "
            "spread it."
            if self.pending
            else "The network is as small already, and what was cut does not come back: nothing more is cut. For a "
            "larger network resume from an earlier checkpoint."
        )
        return f"{type(self).__name__}: the run so far had another target, and {so_far}. {goes_on}"

    @override
    def act(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        if batch_idx == 0:
            self._begin_epoch(trainer, module)
        waits = self._waits() or not self._timeline
        point = None if waits else self._due(trainer, module)
        if point is not None:
            self._cut(trainer, module, point)

    def _due(self, trainer: Trainer, module: LightningModule) -> CutPoint | None:  # noqa: ARG002
        """The cut that is due before this batch, if any."""
        return due(self._timeline, self._last_done, now(trainer, self._timeline[0]))

    @override
    def snapshot_state(self) -> Callable[[], None]:
        mine, report = dict(vars(self)), self.report
        cuts, notes, dense = list(report.cuts), list(report.notes), report.dense

        # Not a context manager, so that an interrupt on exit does not restore the state.
        def back() -> None:
            vars(self).update(mine)
            report.cuts[:], report.notes[:], report.dense = cuts, notes, dense

        return back

    def _begin_report(self) -> None:
        self.report.final = None
        self.report.versions = versions()
        seed = os.environ.get("PL_GLOBAL_SEED")  # where `seed_everything` leaves it
        self.report.seed = None if seed is None else int(seed)
        cuts = [[point.unit, point.at, point.share] for point in self._timeline]
        self.report.config = {"run": self.run_id, **self._settings(), "cuts": cuts}

    def _dense_beside(self, traced: TracedModel) -> torch.nn.Module | None:
        """The dense network, to be timed beside the pruned one.

        After a resume it is made again from the history: the latency in the checkpoint may be of another machine.
        """
        is_resumed = self._dense_network is None and self.report.dense is not None and bool(self.report.dense.latency)
        return dense_copy(traced) if is_resumed else self._dense_network

    def _numbers(self, trainer: Trainer) -> dict[str, float]:  # noqa: ARG002
        """Metrics for loggers and the progress bar."""
        return self.report.metrics()

    def _show_size(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        """Show the number of parameters in the progress bar, at the start of an epoch and after a cut."""
        cuts = self.report.cuts
        is_cut = bool(cuts) and cuts[-1].step == trainer.global_step
        params = self._numbers(trainer).get("pruning/params") if is_cut or batch_idx == 0 else None
        if params is not None:
            module.log("params", params, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def _collect(self, trainer: Trainer) -> None:
        """Add metrics logged since the last call to the report; those of an earlier validation are kept."""
        metrics = self._metrics(trainer)
        new = {name: value for name, value in metrics.items() if self._measured.get(name) is not value}
        self._measured = metrics
        if new:
            self.report.log(trainer.current_epoch, trainer.global_step, new)

    @staticmethod
    def _metrics(trainer: Trainer) -> dict[str, torch.Tensor]:
        """What the user's module logs."""
        return {
            name: value
            for name, value in trainer.callback_metrics.items()
            if name != "params" and not _OURS.match(name) and value.numel() == 1
        }


def instance_of(callback: Callback, name: str, value: object, kind: type, example: str) -> None:
    """Check the type of an argument.

    Raises:
        TypeError: If ``value`` is not a ``kind``.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{type(callback).__name__}: expected `{name}` to be an instance of {kind.__name__}, got {value!r}. "
            f"Import one from lightning_prune, for example `{example}`."
        )


def _require_config(config: Mapping[str, Any]) -> None:
    """Validate the settings in a checkpoint that a resumed run reads."""
    require(config.get("order"), list[str] | None, "order")
    require(config.get("criterion"), str | None, "criterion")
    require(config.get("cuts"), list[list[Any]] | None, "cuts")
    for unit, at, share in config.get("cuts") or ():
        require(unit, Literal["epoch", "step"], "the unit of a cut")
        require(at, int, "the moment of a cut")
        require(share, float, "the share of a cut")
        if not 0 <= share <= 1:
            raise ValueError(f"expected the share of a cut to be in [0, 1], got {share}")


def _require_done(done: object, cuts: Sequence[Any]) -> None:
    """Validate the index of the last cut, which is -1 before the first."""
    if done is not None and done != -1:
        require(done, int, "done")
        if cuts and done >= len(cuts):  # type: ignore[operator]
            raise ValueError(f"expected `done` to be one of {len(cuts)} cuts, got {done}")


def _warn_of_parts(module: LightningModule) -> None:
    """Warn of a part that was pruned by itself: its history is not in the checkpoints of the whole."""
    if history_of(module) is None:
        pruned = next((name for name, part in module.named_modules() if name and history_of(part) is not None), None)
        if pruned is not None:
            warnings.warn(
                f"`{pruned}` was pruned by itself, so that checkpoints of {type(module).__name__} do not hold its "
                "history and load only where it is as narrow. Prune the LightningModule instead.",
                stacklevel=2,
            )
