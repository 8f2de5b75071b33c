"""Rollback of cuts that the network does not recover from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext
from lightning_prune.callbacks.lightning.averages import averages, count_from, counts
from lightning_prune.callbacks.lightning.processes import unwrapped
from lightning_prune.reporting import Report, require
from lightning_prune.surgery import Edit, History, history_of, match_checkpoint_shapes

__all__ = ["Rollback", "Verdict", "restore_snapshot", "snapshot"]

#: State of the last cut: may still recover, has recovered, has not recovered in time, or has nothing to compare with.
Verdict = Literal["open", "recovered", "failed", "unknown"]


@final
@dataclass
class Rollback(CutExtension):
    """Undoes a cut from which a metric does not recover in time, and continues the run without further cuts.

    Before each cut the network and the optimizers' state are stored in memory, and in checkpoints, until the cut is
    judged: at the start of every epoch the metric since the cut is compared with its last value before. The next cut
    is postponed until then. Learning rates and schedules are not rolled back. A cut is also postponed after a run is
    resumed from a checkpoint of an epoch's last batch, whose validation Lightning skips, until metrics are logged.

    Args:
        epochs: Epochs to recover, at least 1.
        tolerance: Accepted loss of the metric against its value before the cut, at least 0.
        monitor: Name of a metric, which must have been logged before the first cut; by default the first accuracy that
            was logged, else the first loss; validation metrics come first. Its name determines whether lower is better
            (a loss, an error).
    """

    is_exclusive = True  # changes of another callback since the cut would be undone, too

    epochs: int = 3
    tolerance: float = 0.01
    monitor: str | None = None
    #: Snapshot from before a cut that is not judged yet.
    _kept: dict[str, Any] | None = field(init=False, repr=False, compare=False)
    #: Snapshot for the cut in progress, which may still fail.
    _next: dict[str, Any] | None = field(init=False, repr=False, compare=False)
    #: Epoch until which cuts of a resumed run are postponed if the metric is missing.
    _blind_until: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise ValueError(f"Rollback: expected `epochs` of at least 1, got {self.epochs}.")
        if not self.tolerance >= 0:
            raise ValueError(f"Rollback: expected `tolerance` of at least 0, got {self.tolerance}. It is a difference.")
        self._kept = self._next = None
        self._blind_until = 0

    # -- hooks --------------------------------------------------------------------------------------------------------

    @property
    @override
    def waits(self) -> bool:
        return self._kept is not None or self._blind_until > 0

    @override
    def prepare(self, run: RunContext) -> None:
        if run.trainer.global_step > 0 and self.missing(run.report) is not None:
            # The rest of the checkpoint's epoch is skipped, with its validation.
            self._blind_until = run.trainer.current_epoch + (run.trainer.check_val_every_n_epoch or 1)

    @override
    def on_epoch_start(self, run: RunContext) -> None:
        if self._blind_until and (run.trainer.current_epoch >= self._blind_until or self.missing(run.report) is None):
            self._blind_until = 0

    @override
    def before_cut(self, run: RunContext) -> None:
        missing = self.missing(run.report)
        if missing is None:
            self._next = snapshot(run.trainer, run.module)
        elif self.monitor is not None:
            raise ValueError(
                f"Rollback: expected `monitor` to name a metric that was logged before the first cut, but {missing}. "
                "Use one of these, or start the schedule after it is logged."
            )
        else:
            warnings.warn(f"Rollback cannot judge this cut: {missing}", stacklevel=2)

    @override
    def after_cut(self, edits: Sequence[Edit]) -> None:
        self._kept, self._next = self._next, None

    @override
    def judge(self, run: RunContext) -> str | None:
        if self._kept is None:
            return None
        verdict = run.trainer.strategy.broadcast(self.verdict(run.report, run.trainer.current_epoch))
        if verdict == "open":
            return None
        if verdict == "failed":
            return self.describe(run.report)
        self._kept = None
        return None

    @override
    def take_back(self, run: RunContext) -> None:
        assert self._kept is not None
        with unwrapped(run.trainer, run.module):
            restore_snapshot(self._kept, run.trainer, run.module)

    @override
    def after_take_back(self) -> None:
        self._kept = None

    @override
    def on_train_end(self, run: RunContext) -> None:
        if self._kept is not None and self.verdict(run.report, run.trainer.current_epoch) != "recovered":
            warnings.warn(
                f"the run ended before its last cut had recovered ({self.describe(run.report)}): it is kept. Train "
                "longer, or cut earlier.",
                stacklevel=2,
            )

    @override
    def state(self) -> dict[str, Any]:
        return {} if self._kept is None else {"kept": self._kept}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        kept = state["kept"]
        # Check now rather than when a cut is undone.
        require(kept["weights"], dict[str, Tensor], "weights before the cut")
        require(kept["optimizers"], list[dict[Any, Any]], "optimizers before the cut")
        # Not in checkpoints of earlier versions.
        require(kept.get("groups"), list[list[list[str | None]]] | None, "groups before the cut")
        require(kept.get("averages"), list[dict[str, Tensor]] | None, "averages before the cut")
        require(kept.get("counts"), list[int] | None, "counts before the cut")
        if kept["history"] is not None:
            History.from_plain(kept["history"])
        self._kept = kept

    # -- judgement ------------------------------------------------------------------------------------------------

    def verdict(self, report: Report, epoch: int) -> Verdict:
        """Whether the last cut of the report has recovered.

        Args:
            report: The report, with the logged metrics.
            epoch: Epochs trained so far.
        """
        last = report.cuts[-1]
        view = self._view(report)
        before, after = view.between(-1, last.step), view.between(last.step, math.inf)
        if not before or math.isnan(before[-1]):
            return "unknown"
        if any(self._is_good(value, before[-1], view.mode) for value in after):
            return "recovered"
        return "failed" if after and epoch - last.epoch >= self.epochs else "open"

    def describe(self, report: Report) -> str:
        """Describe the metric before and after the last cut, for messages."""
        view, step = self._view(report), report.cuts[-1].step
        before, after = view.between(-1, step), view.between(step, math.inf)
        best = (max if view.mode == "max" else min)(after, default=math.nan)
        return f"{view.main_metric} {before[-1] if before else math.nan:.4g} before it, {best:.4g} at best since"

    def missing(self, report: Report) -> str | None:
        """Return why there is nothing to compare with yet, or ``None``."""
        view = self._view(report)
        if view.main_metric is not None:
            return None
        known = ", ".join(dict.fromkeys(name for row in report.history for name in row.metrics)) or "none"
        return f"no value of {self.monitor or 'an accuracy or a loss'} was logged before it (logged: {known})"

    def _view(self, report: Report) -> Report:
        """The report with the monitored metric as its main metric."""
        return replace(report, metric=self.monitor or report.metric)

    def _is_good(self, value: float, before: float, mode: str) -> bool:
        return value >= before - self.tolerance if mode == "max" else value <= before + self.tolerance


def snapshot(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return network, history, optimizers' state and averaged copies on the CPU, as plain data for checkpoints."""
    history, optimizers = history_of(module), trainer.optimizers
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        "weights": _copied(dict(module.state_dict())),
        "history": None if history is None else history.to_plain(),
        "optimizers": [_copied(optimizer.state_dict()["state"]) for optimizer in optimizers],
        "groups": [
            [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
            for optimizer in optimizers
        ],
        "averages": [_copied(dict(copy.state_dict())) for copy in averages(trainer)],
        "counts": counts(trainer),
    }


def restore_snapshot(kept: dict[str, Any], trainer: Trainer, module: LightningModule) -> None:
    """Restore the network, the optimizers' state and averaged copies from a snapshot; gradients are cleared.

    Optimizers and their groups stay the same objects, and hyperparameters are not changed.
    """
    copies, optimizers = averages(trainer), trainer.optimizers
    history = None if kept["history"] is None else History.from_plain(kept["history"])
    for parameter in module.parameters():
        parameter.grad = None
    for network, weights in zip((module, *copies), (kept["weights"], *kept.get("averages", ())), strict=True):
        match_checkpoint_shapes(network, weights, history)
        network.load_state_dict(weights)
    count_from(trainer, kept.get("counts", counts(trainer)))  # not in checkpoints of earlier versions
    parameters = dict(module.named_parameters())
    for optimizer, groups in zip(optimizers, kept.get("groups", ()), strict=False):
        # Parameters of layers that were removed and are restored are new objects.
        optimizer.state.clear()
        for group, names in zip(optimizer.param_groups, groups, strict=True):
            if None not in names:
                group["params"] = [parameters[name] for name in names]
                if "param_names" in group:
                    group["param_names"] = list(names)
    for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
        optimizer.load_state_dict({"state": _copied(state), "param_groups": optimizer.state_dict()["param_groups"]})


def _copied(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf, tree)
