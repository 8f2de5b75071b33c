"""Structured pruning during training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypedDict

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_prune.arguments import require_type
from lightning_prune.callbacks.display.report_writer import split_halves
from lightning_prune.callbacks.display.status import log_status
from lightning_prune.callbacks.extensions.extension import CutExtension
from lightning_prune.callbacks.lightning.processes import (
    all_or_none,
    broadcast_plan,
    gathered,
    measure_on_rank_zero,
    merged,
    on_rank_zero,
    run_on_rank_zero,
)
from lightning_prune.callbacks.network_pruning import Decision, NetworkPruning
from lightning_prune.callbacks.observation import Observation
from lightning_prune.callbacks.scheduled import instance_of
from lightning_prune.callbacks.session import CutMade, Participant
from lightning_prune.callbacks.training_data import data_at_cut
from lightning_prune.planning import (
    CutPoint,
    NoEffectWarning,
    Plan,
    Schedule,
    Scope,
    ScopeKind,
    Target,
    feasible,
    make_plan,
    notes_on_widths,
    select,
)
from lightning_prune.reporting import note_latency_table, require, warn_of_kept_units
from lightning_prune.scoring import L1, Criterion, DataPass, Statistic, bundles_of, score_groups, statistic_of
from lightning_prune.structure import CostModel, LatencyTable, Size, Structure, StructureError, TracedModel
from lightning_prune.structure.flow import with_flow
from lightning_prune.structure.latency import with_latency
from lightning_prune.structure.sharding import WholeTensors
from lightning_prune.surgery import (
    Repair,
    history_of,
    losses_of_plans,
    table_of,
)
from lightning_prune.surgery.tensors import named

__all__ = ["StructuredOptions", "StructuredPruning"]

_SAMPLES_OF_DRAWS = 1000


class StructuredOptions(TypedDict, total=False):
    """Arguments that presets pass on to `StructuredPruning`; see there."""

    layers: str | list[str] | None
    ignore: str | list[str] | None
    reset_monitors: bool
    dirpath: str | None
    extensions: list[Repair | CutExtension] | None
    latency_table: str | None


class StructuredPruning(NetworkPruning):
    """Removes units of a LightningModule's layers while it trains, so that the layers become physically narrower.

    At each cut of the schedule the units with the lowest scores are removed: weights, gradients, optimizer state and
    statistics are sliced, and the narrower network is run forward and backward before the cut is accepted. Optimizer,
    schedulers, parameter groups and hooks stay the same objects. Checkpoints store the cuts, so that every
    ``ckpt_path`` loads and training resumes; ``load_from_checkpoint`` returns the narrow network without a callback.

    Cuts are made before a training batch, so that validation always measures the network that is saved with it.

    Args:
        pruning_ratio: Share of the units to remove, in [0, 1): of every group, or of all with ``scope="global"``. Or a
            share per layer, ``{"layers.1": 0.5, "encoder.*": 0.2}``: the first name or glob that matches counts, and
            layers that match none are not pruned; here 1 removes a branch from the network, with
            ``Scope(min_width=0)``. Features of attention heads need a name of their own:
            ``{"*": 0.5, "*#head_dim": 0.25}``.
        budget: Instead of a ratio, the size that remains: ``{"params": 0.6}``, ``{"macs": 0.5}``, ``{"units": 40}``,
            ``{"memory": 0.5}`` (bytes of one sample's activations), ``{"latency": 0.6}`` or ``{"latency_ms": 2.5}``
            (one sample, by a table measured at the start of the run). A float is a share of the dense network in (0,
            1], an int a count, ``latency_ms`` always milliseconds; a bare number counts parameters. Several budgets,
            ``{"macs": 0.5, "latency_ms": 3}``, are all met.
        criterion: Score of the units; by default `L1`.
        schedule: When to cut; by default five times, first after 10 % and last after 60 % of the run.
        scope: ``"local"`` (each layer loses the same share), ``"global"`` (the lowest scores over all layers go),
            ``"erk"`` (wide layers lose most), ``"random"`` (a random allocation), or a `Scope` with limits of the
            widths, such as the best of twenty draws, ``Scope("random", draws=20)``.
        layers: Layers to prune, all by default: names, globs, or names of modules that contain them. Features of
            attention heads are pruned only if a name or glob with ``#head_dim`` selects them: ``"*#head_dim"``, or
            ``["*", "*#head_dim"]`` with everything else.
        ignore: Layers not to prune, with the features of their heads; takes precedence over ``layers``.
        reset_monitors: Reset ``ModelCheckpoint`` and ``EarlyStopping`` after each cut, so that "best" means best at the
            final size, and disable early stopping until the last cut.
        dirpath: Folder for ``report.html``, ``.md``, ``.json`` and pictures; by default the logger's folder.
        extensions: Extensions of every cut, in order. Repairs of the weights: `Ridge`, `SequentialRidge`,
            `Fold`, `FoldMean`, `ReestimateBatchNorm` and `RefitLayerNorm`, from some training batches, or
            `Reinitialise`. Extensions of the run: `Rewind`, `Rollback`, `SaveEachSize`, `Distill`, `GrowPenalty`.
        latency_table: File that a script of `latency_script` has written, so that a budget of latency is one on the
            device where it ran. By default the latency on the training device is measured.

    Raises:
        ValueError: On construction for amounts out of range; before the first training step for everything that depends
            on network, optimizer and trainer.

    Example:
        >>> from lightning_prune import L2, OneShot, StructuredPruning
        >>> callback = StructuredPruning(budget={"macs": 0.5}, criterion=L2(), schedule=OneShot(), scope="global")
    """

    default_criterion: ClassVar[type[Criterion]] = L1

    def __init__(
        self,
        pruning_ratio: float | dict[str, float] | None = None,
        budget: int | float | dict[str, int | float] | None = None,
        criterion: Criterion | None = None,
        schedule: Schedule | None = None,
        scope: ScopeKind | Scope = "local",
        layers: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        reset_monitors: bool = True,
        dirpath: str | None = None,
        extensions: list[Repair | CutExtension] | None = None,
        latency_table: str | None = None,
    ) -> None:
        self.target = Target.of(pruning_ratio, budget)
        # None rather than a default instance: on the command line its settings would leak into another class's.
        self.criterion = self.default_criterion() if criterion is None else criterion
        instance_of(self, "criterion", self.criterion, Criterion, "L1()")
        self.scope = Scope.of(scope, comparable=self.criterion.comparable)
        require_type(type(self).__name__, "latency_table", latency_table, str | None)
        self.latency_table = latency_table
        super().__init__(schedule, layers, ignore, reset_monitors, dirpath, extensions)

    @override
    def _reset(self) -> None:
        super()._reset()
        self._observation = Observation()
        self._latency: LatencyTable | None = None  # measured at the start of the run

    @override
    def _reset_fit(self) -> None:
        super()._reset_fit()
        self._data_at_cut: DataPass | None = None  # for a statistic that runs the network itself
        self._data_of_draws: DataPass | None = None  # to compare random allocations
        self._resolved = self.target
        self._selected: tuple[str, ...] = ()
        self._observed: tuple[str, ...] = ()  # including those that cannot be scored

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._is_fit:
            self._observation = self._observation.paused()

    @override
    def finish_batch(self) -> None:
        super().finish_batch()
        self._observation.stop()  # a callback may have ended the last batch early

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._observation.end()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    # -- state --------------------------------------------------------------------------------------------------------

    @override
    def _state(self) -> dict[str, Any]:
        return {
            "batches": self._observation.batches,
            "statistic": self._observation.state(),
            "latency": None if self._latency is None else self._latency.to_plain(),
            **super()._state(),
        }

    @override
    def _restore(self, state: Mapping[str, Any]) -> None:
        saved, before = on_rank_zero(dict(state["statistic"])), state["report"]["config"].get("criterion")
        if saved and before not in (None, repr(self.criterion)):
            warnings.warn(
                f"{self.criterion!r} starts without observations: those of the checkpoint are of {before}", stacklevel=2
            )
            saved = {}
        require(state["batches"], int, "batches")
        self._observation = Observation(saved=saved, batches=state["batches"])
        table = state.get("latency")
        self._latency = None if table is None else LatencyTable.from_plain(table)
        super()._restore(state)

    @override
    def _settings(self) -> dict[str, Any]:
        return {"target": self.target, "criterion": repr(self.criterion), "scope": self.scope, **super()._settings()}

    # -- before the first step ----------------------------------------------------------------------------------------

    @override
    def _check(
        self, trainer: Trainer, module: LightningModule, batch: Any, structure: Structure, original: Size
    ) -> tuple[CutPoint, ...]:
        self._resolved, selected = self.target.resolve(structure, self._eligible(structure))
        self._observed = selected
        statistic = statistic_of(self.criterion, _only(structure, selected))
        if statistic is not None:
            selected = self._observable(statistic.unobservable(module), selected)
        self._selected = selected
        feasible(structure, self._resolved, self.scope, selected, original, self._bundles(structure))
        self._observation = self._observation.of(statistic)
        assert self._traced_model is not None
        self._data_at_cut = None
        if statistic is not None and statistic.collects:
            self._data_at_cut = data_at_cut(trainer, module, self._traced_model, batch, self.criterion.amount)
        self._data_of_draws = self._for_draws(trainer, module, batch)
        timeline = self._moments(trainer, self._resolved.fraction(original, original.among(selected, structure)))
        warn_of_kept_units(self.report, notes_on_widths(structure, self._resolved, self.scope, selected, original))
        note_latency_table(self.report, self._latency, is_given=self.latency_table is not None)
        return timeline

    def _for_draws(self, trainer: Trainer, module: LightningModule, batch: Any) -> DataPass | None:
        """Samples with a loss, if several random allocations are to be compared."""
        if self.scope.draws == 1:
            return None
        assert self._traced_model is not None
        data = data_at_cut(trainer, module, self._traced_model, batch, {"samples": _SAMPLES_OF_DRAWS})
        if data.loss is None:
            raise ValueError(
                f"{type(self).__name__}: expected a `training_step` that can be run, for its loss, to compare "
                f"{self.scope.draws} draws, got none. Give the module one, or `draws=1`."
            )
        return data

    def _bundles(self, structure: Structure) -> Mapping[str, Sequence[Sequence[int]]]:
        """Units that the criterion removes only together, as far as known before observations."""
        return bundles_of(self.criterion, (structure.group(name) for name in self._selected), None)

    @override
    def _is_met(self) -> bool:
        if self._reached() < self._timeline[-1].index:
            return False
        warnings.warn(f"{self.target} holds already: nothing is left to remove", NoEffectWarning, stacklevel=2)
        return True

    @override
    def _traced(self, trainer: Trainer, traced: TracedModel) -> Structure:
        """The structure with everything that planning needs."""
        structure, history = super()._traced(trainer, traced), history_of(traced.model)
        if self.scope.min_width == 0 and structure.flow is None:
            structure = with_flow(structure, traced, history.vanished if history is not None else ())
        if self.latency_table is not None or self.target.uses_latency or self.scope.per == "latency":
            structure = with_latency(structure, self._latency_table(trainer, traced, structure))
        return structure

    def _latency_table(self, trainer: Trainer, traced: TracedModel, structure: Structure) -> LatencyTable:
        """Latency table, measured once on rank zero so that all processes make the same plan."""
        if self.latency_table is not None:
            read = run_on_rank_zero(trainer, lambda: table_of(traced, structure, self.latency_table).to_plain())
            self._latency = LatencyTable.from_plain(read)
        if self._latency is None:
            saying = log_status(trainer, "Measuring the latency of each layer at several widths")
            with trainer.precision_plugin.forward_context(), saying:
                self._latency = measure_on_rank_zero(trainer, lambda: table_of(traced, structure))
        return self._latency

    @property
    @override
    def own_groups(self) -> tuple[str, ...]:
        return self._observed if self._is_prepared else ()

    @property
    @override
    def removes_layers(self) -> bool:
        return self.scope.min_width == 0

    @override
    def objection(self, other: Participant) -> str | None:
        why = super().objection(other)
        if why is not None:
            return why
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

    @property
    @override
    def needs_whole_network(self) -> str | None:
        statistic = statistic_of(self.criterion, Structure((), (), CostModel((), (), {})))
        if statistic is not None and (statistic.uses_loss or statistic.collects):
            return f"`criterion={self.criterion!r}`, which uses {statistic.evidence}"
        if self.extensions:
            return f"`extensions={list(self.extensions)!r}`"
        if self.scope.draws > 1 or self.scope.min_width == 0:
            return f"`scope={self.scope!r}`, which compares networks or removes layers"
        if self.target.uses_latency or self.scope.per == "latency":
            return f"{self.target}, which needs a latency"
        return None

    def _eligible(self, structure: Structure) -> tuple[str, ...]:
        """Groups that the settings and the method allow to prune."""
        return select(structure, self.layers, self.ignore, self.target.names)[0]

    def _observable(self, silent: Mapping[str, str], selected: tuple[str, ...]) -> tuple[str, ...]:
        """Selected groups that the criterion can score.

        Raises:
            StructureError: If one that the user named cannot be scored.
        """
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

    @override
    def _reached(self) -> int:
        structure = self._structure
        assert structure is not None
        scores = {name: torch.zeros(structure.group(name).width) for name in self._selected}
        bundles = self._bundles(structure)
        for point in self._timeline[::-1]:
            plan = make_plan(structure, scores, self._resolved, point.share, self.scope, self._original, bundles)
            if plan.is_empty:
                return point.index
        return -1

    # -- a cut --------------------------------------------------------------------------------------------------------

    @override
    def _waits(self) -> bool:
        # A cut at the very start, or one that a longer run than before adds, has no observations yet.
        return super()._waits() or self._observation.is_empty

    @override
    def _begin_batch(self, trainer: Trainer, module: LightningModule) -> bool:
        observation = self._observation
        if not (observation.statistic and self.pending and observation.batches % self.criterion.every_n_batches == 0):
            return False
        observation.start(trainer, module)
        return True

    @override
    def _decide(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> Decision | None:
        plan, scores, numbers = self._plan(trainer, module, point)
        if not plan.is_empty:
            return Decision(plan, {"share": point.share}, numbers, scores)
        warnings.warn(
            f"cut {point.index} ({point.unit} {point.at}) removes nothing: its share of the target is less than "
            "one unit of any layer",
            NoEffectWarning,
            stacklevel=2,
        )
        return None

    def _plan(
        self, trainer: Trainer, module: LightningModule, point: CutPoint
    ) -> tuple[Plan, dict[str, torch.Tensor], dict[str, float]]:
        """Plan of a cut, the same in all processes, scores by group, and values to log."""
        structure, statistic = self._structure, self._observation.statistic
        assert structure is not None
        tensors = WholeTensors(named(module))
        if statistic is not None and self._data_at_cut is not None:
            self._let_collect(statistic, module, self._data_at_cut)
        with merged(statistic):
            if statistic is not None:
                self._selected = self._observable(statistic.unobservable(module), self._selected)
            groups = [structure.group(name) for name in self._selected]
            scores = score_groups(self.criterion, groups, tensors, statistic)
            numbers = split_halves(scores, statistic)
            bundles = bundles_of(self.criterion, groups, statistic)
        plans = [
            make_plan(structure, scores, self._resolved, point.share, scope, self._original, bundles)
            for scope in self.scope.drawn
        ]
        plan, found = self._best(trainer, plans)
        return broadcast_plan(trainer, plan), scores, {**numbers, **found}

    def _best(self, trainer: Trainer, plans: Sequence[Plan]) -> tuple[Plan, dict[str, float]]:
        """Plan whose network has the lowest loss, the first of equal ones, and values to log."""
        data, structure = self._data_of_draws, self._structure
        if data is None:
            return plans[0], {}
        assert structure is not None
        assert self._traced_model is not None
        with all_or_none(), trainer.precision_plugin.forward_context():
            sums = losses_of_plans(self._traced_model.copy("real").module, structure, plans, data)
        *losses, samples = gathered(torch.cat([sums, sums.new_tensor([len(data)])])[None]).sum(0).tolist()
        best = min(range(len(plans)), key=losses.__getitem__)
        return plans[best], {"pruning/draw": float(best), "pruning/draw_loss": losses[best] / samples}

    @override
    def _plan_again(self) -> None:
        # Plans from the same batches would agree without being stable.
        self._restart_observation()

    @override
    def _set_structure(self, structure: Structure) -> None:
        super()._set_structure(structure)
        self._selected = tuple(name for name in self._selected if name in structure.widths)
        self._observed = tuple(name for name in self._observed if name in structure.widths)
        self._restart_observation()  # contributions count from the last cut

    def _restart_observation(self) -> None:
        assert self._structure is not None
        self._observation = Observation(statistic_of(self.criterion, _only(self._structure, self._observed)))

    def _let_collect(self, statistic: Statistic, module: LightningModule, data: DataPass) -> None:
        """Collect a statistic on the network, or on a copy if the training step is run."""
        assert self._traced_model is not None
        statistic.collect(self._traced_model.copy("real").module if statistic.uses_loss else module, data)

    @override
    def on_other_cut(self, trainer: Trainer, module: LightningModule, made: CutMade) -> None:
        super().on_other_cut(trainer, module, made)
        if made.replaced:
            self._observation = Observation()  # the layers may have been replaced
            return
        assert self._structure is not None
        # The observed units all remain: the other callback cuts other groups.
        statistic = statistic_of(self.criterion, _only(self._structure, self._observed))
        self._observation = self._observation.paused().of(statistic)


def _only(structure: Structure, names: tuple[str, ...]) -> Structure:
    """Restrict the structure to these groups, so that only layers that are pruned are observed."""
    return replace(structure, groups=tuple(group for group in structure.groups if group.name in names))
