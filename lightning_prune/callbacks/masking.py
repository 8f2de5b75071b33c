"""Base class of callbacks that mask weights during training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_prune.arguments import require_names
from lightning_prune.callbacks.display.report_writer import ReportWriter, log_now
from lightning_prune.callbacks.heads import backbone_in
from lightning_prune.callbacks.lightning.averages import averages, count_from, counts
from lightning_prune.callbacks.lightning.monitors import reset_monitors
from lightning_prune.callbacks.lightning.processes import all_or_none, assert_same_parameters, broadcast_plan, unwrapped
from lightning_prune.callbacks.rewind_snapshot import RewindSnapshot
from lightning_prune.callbacks.scheduled import ScheduledPruning, instance_of
from lightning_prune.callbacks.session import CutMade, Participant
from lightning_prune.callbacks.traced_models import call_on, traced_model_of
from lightning_prune.planning import (
    NM,
    Cubic,
    CutPoint,
    Element,
    Granularity,
    NoEffectWarning,
    Plan,
    Pool,
    Schedule,
    Weight,
    choose_masks,
    select,
)
from lightning_prune.reporting import Cut, Report, require, size_of
from lightning_prune.structure import Call, Size, Structure, TracedModel, trace
from lightning_prune.structure.graph import Group, Member
from lightning_prune.structure.tracing import FakeCopy
from lightning_prune.surgery import (
    Masks,
    Transaction,
    apply_masks,
    maskable,
    masks_of,
    original_of,
    revived,
    transaction,
    with_history,
    without_dead,
    zero_gradients,
    zero_moments,
)
from lightning_prune.surgery.compiled import eager, is_compiled
from lightning_prune.surgery.tensors import named

__all__ = ["MaskPruning"]

# Default sparsity.
_SPARSITY = 0.5


class MaskPruning(ScheduledPruning):
    """Base class of mask callbacks; use `MagnitudePruning` or `HybridPruning`.

    Masked weights are zeros in ordinary parameters, without parametrizations, so that the ``state_dict`` is that of the
    plain network. After every optimizer step, they and their optimizer state are set to zero.
    """

    _aims = ("sparsity",)

    def __init__(
        self,
        sparsity: float | None,
        granularity: Granularity | None,
        pool: Pool,
        schedule: Schedule | None,
        layers: str | list[str] | None,
        ignore: str | list[str] | None,
        rewind: int | None,
        dirpath: str | None,
    ) -> None:
        # None rather than a default instance: on the command line its settings would leak into another class's.
        self.granularity: Granularity = Element() if granularity is None else granularity
        instance_of(self, "granularity", self.granularity, Granularity, "Element()")
        self.sparsity = self._checked(sparsity)
        self.pool: Pool = self.granularity.pool or pool
        require_names(type(self).__name__, layers=layers, ignore=ignore)
        self.layers = layers
        self.ignore = ignore
        self.rewind = rewind
        if rewind is not None and (isinstance(rewind, bool) or not isinstance(rewind, int) or rewind < 0):
            raise ValueError(
                f"{type(self).__name__}: expected `rewind` to be the number of epochs after which weights are "
                f"kept (0 = the initialisation), got {rewind!r}."
            )
        super().__init__(Cubic() if schedule is None else schedule, reset_monitors=True, dirpath=dirpath)

    def _checked(self, sparsity: float | None) -> float:
        implied = self.granularity.sparsity
        if sparsity is None:
            return _SPARSITY if implied is None else implied
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
            raise ValueError(
                f"{type(self).__name__}: expected `sparsity` in [0, 1), the share of the weights that become zero, got "
                f"{sparsity!r}."
            )
        if implied is not None and not math.isclose(sparsity, implied):
            raise ValueError(
                f"{type(self).__name__}: {self.granularity!r} has a sparsity of {implied:g}, got sparsity={sparsity:g}."
                " Leave `sparsity` out (null in YAML), or choose another granularity."
            )
        return float(sparsity)

    @override
    def _reset(self) -> None:
        super()._reset()
        self.report = Report(what="weights")
        asker = f"{type(self).__name__}(rewind={self.rewind})"
        self._kept = None if self.rewind is None else RewindSnapshot(self.rewind, asker)

    @override
    def _reset_fit(self) -> None:
        super()._reset_fit()
        self._structure: Structure | None = None
        self._traced_model: TracedModel | None = None
        self._batch: Call | None = None  # real data, to see whether what is removed had an effect
        self._weights: tuple[Weight, ...] = ()
        self._groups: tuple[Group, ...] = ()
        self._masks: dict[Tensor, Tensor] = {}  # by parameter, on its device
        self._enforcing: list[Any] = []

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._stop_enforcing()
        for optimizer in trainer.optimizers:
            # An optimizer hook, as Lightning's batch hooks do not tell whether a step was made (accumulation, manual #
            # optimization, steps skipped by a gradient scaler).
            self._enforcing.append(optimizer.register_step_post_hook(self._enforce))

    def _enforce(self, optimizer: Optimizer, *_: Any) -> None:
        zero_moments(optimizer, self._masks)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        zero_gradients((p for group in optimizer.param_groups for p in group["params"]), self._masks)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module, f"at the end of epoch {trainer.current_epoch}")
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._stop_enforcing()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._stop_enforcing()

    @override
    def _state(self) -> dict[str, Any]:
        return {"kept": None if self._kept is None else self._kept.weights}

    @override
    def _restore(self, state: Mapping[str, Any]) -> None:
        require(state["kept"], dict[str, Tensor] | None, "kept")
        if self._kept is not None:
            self._kept = self._kept.holding(state["kept"])

    @override
    def _continues_previous_fit(self, trainer: Trainer, module: LightningModule) -> bool:
        return trainer.global_step > 0 and self._trained is module

    @override
    def _settings(self) -> dict[str, Any]:
        return {
            "sparsity": self.sparsity,
            "granularity": repr(self.granularity),
            "scope": self.pool,
            "schedule": repr(self.schedule),
            "rewind": self.rewind,
            "layers": self.layers,
            "ignore": self.ignore,
        }

    @override
    def objection(self, other: Participant) -> str | None:
        if isinstance(other, MaskPruning):
            return "expected one callback that lays all masks: choose its `layers` and `scope`"
        if isinstance(self.granularity, NM):
            return (
                f"expected no {self.granularity!r}, whose blocks of inputs break when some of them leave. Cut the "
                "network first and mask it in a run of its own"
            )
        return None

    @override
    def on_other_cut(self, trainer: Trainer, module: LightningModule, made: CutMade) -> None:
        assert self._structure is not None
        if made.replaced:
            self._is_prepared = False  # the session prepares it again
            return
        before, self._structure = self.report.widths, self._structure.take(made.plan.kept)
        self._groups = tuple(self._structure.group(group.name) for group in self._groups)
        if self._kept is not None:
            self._kept = self._kept.after_cut(made.edits)
        apply_masks(module, masks_of(module))  # a repair writes whole weights; averaged copies keep theirs
        self._watch(module)
        changed = {name: count for name, count in self._left(module).items() if count != before[name]}
        size, when = self._size(module), (made.cut.index, made.cut.epoch, made.cut.step)
        left = {name: before[name] for name in changed}
        self.report.cuts.append(Cut.of(size, *when, left, changed, made.cut.seconds))

    @override
    def _numbers(self, trainer: Trainer) -> dict[str, float]:
        numbers = super()._numbers(trainer)
        if not self.session.is_shared:
            return numbers
        # The sizes are told by who cuts.
        return {name: value for name, value in numbers.items() if name.startswith("pruning/sparsity")}

    # -- before the first step ----------------------------------------------------------------------------------------

    @override
    def _prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        with trainer.precision_plugin.module_init_context():
            traced = traced_model_of(module, batch, convert=trainer.precision_plugin.convert_input)
            structure = with_history(trace(traced), traced)
        if self.granularity.of_units:
            names, _ = select(structure, self.layers, self.ignore)
            self._groups = tuple(structure.group(name) for name in names)
        else:
            self._weights = maskable(module, self.granularity, self.layers, self.ignore)
        if self._done is None or not masks_of(module):
            self._done = -1  # a new run, or another network was loaded: it catches up with the next cut
        self._timeline = self._moments(trainer, 1 - self.sparsity)
        self._adopt_progress(partial(self._reached, module))
        self._structure, self._traced_model, self._batch = structure, traced, call_on(module, batch, traced)
        if self._kept is not None and self.pending:
            self._kept.require(trainer, self._timeline)
        self._watch(module)
        self._check(trainer, module, "when the training began")
        if self.report.dense is None:
            present = named(module)
            widths = {_layer(name): present[name].numel() for name in self._maskable(module)}
            size = size_of(structure, original_of(module, structure), backbone_in(trainer, module))
            dense = replace(size, widths=widths, zeros=0)
            self.report.dense = self.session.writer(self, trainer).measure(traced, dense)
            self._dense_network = traced.copy("meta").module
        self._begin_report()

    @override
    def _begin_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        if self._kept is not None and self.pending:
            self._kept.begin_epoch(trainer, module)

    # -- a cut --------------------------------------------------------------------------------------------------------

    @override
    def _cut(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> None:
        """Choose new masks and apply them to the network, its optimizers and its averaged copies."""
        began, back = perf_counter(), self.snapshot_state()
        before, present = masks_of(module), named(module)
        chosen = self._chosen(module, point)
        packed = {name: mask.cpu() for name, mask in chosen.items()}
        masks = {name: m.to(present[name].device) for name, m in trainer.strategy.broadcast(packed).items()}
        self._done = point.index
        if _count(masks) == _count(before):
            warnings.warn(
                f"cut {point.index} ({point.unit} {point.at}) masks nothing: as much is masked already, or its share "
                "of the sparsity is less than one weight",
                NoEffectWarning,
                stacklevel=2,
            )
            return
        old = self._left(module)
        with transaction(module, trainer.optimizers, averages(trainer)) as change:
            change.also(back)
            if self._kept is not None:
                self._rewind(trainer, module, self._kept, change)
            change.mask(masks)
            self._watch(module)
            assert_same_parameters(module)
        reset_monitors(trainer)
        self._warn_of_empty(module)
        size, new = self._size(module), self._left(module)
        seconds = perf_counter() - began
        changed = {name: left for name, left in new.items() if left != old[name]}
        epoch, step = trainer.current_epoch, trainer.global_step
        left = {name: old[name] for name in changed}
        self.report.cuts.append(Cut.of(size, point.index, epoch, step, left, changed, seconds))
        log_now(trainer, {**self._numbers(trainer), f"{self.session.writer(self, trainer).name}/seconds": seconds})

    def _chosen(self, module: LightningModule, point: CutPoint) -> dict[str, Tensor]:
        """The masks after a cut, by tensor, on its device."""
        present = named(module)
        parts = self.granularity.parts(self._weights, self._groups, present)
        known = {name: mask.to(present[name].device) for name, mask in masks_of(module).items()}
        return choose_masks(parts, known, point.share * self.sparsity, self.pool)

    def _reached(self, module: LightningModule) -> int:
        """Index of the last cut that would mask nothing more; -1 if there is none."""
        masked = _count(masks_of(module))
        return next((p.index for p in self._timeline[::-1] if _count(self._chosen(module, p)) == masked), -1)

    def _rewind(self, trainer: Trainer, module: LightningModule, kept: RewindSnapshot, change: Transaction) -> None:
        """Restore the saved weights and buffers, and reset optimizers and averages."""
        weights, present = kept.get(), named(module)
        for name, content in weights.items():
            change.overwrite(present[name], content)
        for copy in averages(trainer):
            for name, tensor in named(copy).items():
                change.overwrite(tensor, present[name])
        change.also(partial(count_from, trainer, counts(trainer)))
        count_from(trainer, [0] * len(averages(trainer)))
        change.forget()
        if not self.pending:
            change.also(partial(setattr, kept, "weights", weights))
            kept.weights = None

    def _watch(self, module: LightningModule) -> None:
        """Update the masks of the optimizer hooks."""
        present = named(module)
        self._masks = {present[name]: mask.to(present[name].device) for name, mask in masks_of(module).items()}

    def _check(self, trainer: Trainer, module: LightningModule, when: str) -> None:
        """Set masked weights that were changed by others to zero, with a warning."""
        counts = revived(module)
        if counts:
            who = ", ".join(f"{count} in {name}" for name, count in counts.items())
            warnings.warn(
                f"{type(self).__name__}: expected masked weights to be zero {when}, got others: {who}. Did a callback "
                "or a hook write weights? They are zero again.",
                stacklevel=2,
            )
            for network in (module, *averages(trainer)):
                apply_masks(network, masks_of(module))

    def _warn_of_empty(self, module: LightningModule) -> None:
        empty = [name for name, left in self._left(module).items() if left == 0]
        if empty:
            warnings.warn(
                f"nothing is left of {', '.join(empty)}: no signal passes. Lower the sparsity, or compare within "
                'layers with scope="local".',
                stacklevel=2,
            )

    # -- at the end ---------------------------------------------------------------------------------------------------

    @override
    def _end(self, trainer: Trainer, module: LightningModule) -> None:
        self._check(trainer, module, "at the end of the training")
        if not self._masks or self.pending:
            return
        try:
            self.report.notes.extend(self._remove_dead(trainer, module))
        except Exception as error:
            # The training is not lost if only the clean-up fails.
            note = (
                f"Dead units stay, as zeros: removing them failed and was taken back ({type(error).__name__}: {error})."
            )
            self.report.notes.append(note)
            warnings.warn(note, stacklevel=2)

    def _remove_dead(self, trainer: Trainer, module: LightningModule) -> list[str]:
        """Remove dead units from the network; returns notes."""
        structure, traced, call = self._structure, self._traced_model, self._batch
        assert structure is not None
        assert traced is not None
        assert call is not None
        reasons = {
            "averaged weights have other constants": bool(averages(trainer)),
            "the network is compiled": is_compiled(module),
            "another callback decides what is cut": self.session.is_shared,
            f"the blocks of {self.granularity!r} stay whole": isinstance(self.granularity, NM),
        }
        if any(reasons.values()):
            return [f"Dead units stay: {' and '.join(why for why, holds in reasons.items() if holds)}."]
        with all_or_none():
            copied = FakeCopy(module, traced.memo, traced.prepare, kind="real").module.double().eval()
            args, kwargs = tree_map(_double, (call.args, dict(call.kwargs)))
            kept, contents = without_dead(copied, structure, lambda network: network.forward(*args, **kwargs))
        widths = structure.widths
        plan = broadcast_plan(trainer, Plan(kept, {name: widths[name] for name in kept}))
        if plan.is_empty:
            return []

        def run() -> Any:
            with trainer.precision_plugin.forward_context(), eager(module):
                return module(*call.args, **call.kwargs)

        epoch, step = trainer.current_epoch, trainer.global_step
        with (
            transaction(module, trainer.optimizers, (), run, epoch=epoch, step=step, cut=self._last_done) as change,
            unwrapped(trainer, module),
            all_or_none(),
        ):
            after = change.keep(structure, plan.kept)
            change.install(contents)
            change.verify()
        self._structure = after
        self._watch(module)
        units = sum(plan.before.values()) - sum(plan.widths.values())
        return [f"{units} unit(s) without effect were removed: {plan}."]

    @override
    def _measure(self, writer: ReportWriter, module: LightningModule) -> Size:
        assert self._traced_model is not None
        return writer.measure(self._traced_model, self._size(module), self._dense_beside(self._traced_model))

    # -- showing ------------------------------------------------------------------------------------------------------

    def _size(self, module: LightningModule) -> Size:
        """Size with unmasked parameters; MACs are unchanged, as zeros are multiplied too."""
        assert self._structure is not None
        masks, modules = masks_of(module), backbone_in(module.trainer, module)
        size = size_of(self._structure, backbone=modules)
        params, backbone = size.params - _count(masks), size.backbone
        if backbone is not None and modules is not None:
            backbone -= _count({name: mask for name, mask in masks.items() if name.rpartition(".")[0] in modules})
        return replace(size, params=params, zeros=_count(masks), backbone=backbone, widths=self._left(module))

    def _maskable(self, module: LightningModule) -> list[str]:
        """Names of the parameters that can be masked."""
        present = named(module)
        own = [weight.name for weight in self._weights]
        own += [m.tensor for group in self._groups for m in group.members if _is_masked(m, present)]
        return list(dict.fromkeys([*own, *masks_of(module)]))

    def _left(self, module: LightningModule) -> dict[str, int]:
        """Number of unmasked weights, by layer."""
        present, masks = named(module), masks_of(module)
        return {
            _layer(name): present[name].numel() - (int(masks[name].sum()) if name in masks else 0)
            for name in self._maskable(module)
        }

    def _stop_enforcing(self) -> None:
        for handle in self._enforcing:
            handle.remove()
        self._enforcing = []


def _is_masked(member: Member, tensors: Mapping[str, Tensor]) -> bool:
    return member.role != "in" and isinstance(tensors[member.tensor], nn.Parameter)


def _layer(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _count(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
