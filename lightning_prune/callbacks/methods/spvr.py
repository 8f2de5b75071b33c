"""SPvR: rank groups of units by the effect of masking them, and remove the lowest, entire layers included."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.callbacks.display.ranking_display import RankingProgress
from lightning_prune.callbacks.extensions.extension import CutExtension
from lightning_prune.callbacks.lightning.processes import gathered, holds_on_all_ranks, run_on_rank_zero
from lightning_prune.callbacks.network_pruning import Decision, NetworkPruning
from lightning_prune.callbacks.training_data import training_data
from lightning_prune.planning import CutPoint, NoEffectWarning, Plan, Schedule, Target, select
from lightning_prune.planning.ranked import Ranked, RankedPlan, by_stage, in_order, plan_ranked
from lightning_prune.scoring import DataPass, SPvR, stations_of
from lightning_prune.scoring.contexts import preserved_state
from lightning_prune.scoring.data import forward
from lightning_prune.scoring.spvr import Task, class_scores, score_tensor
from lightning_prune.scoring.spvr.racing import Race, RaceKind, rank_by_race
from lightning_prune.scoring.spvr.sites import Site, sites_of_groups, sites_of_layers
from lightning_prune.scoring.spvr.walk_ranking import Ranking, RankingOptions, rank
from lightning_prune.structure import Size, Structure, StructureError, TracedModel
from lightning_prune.structure.bypass import Bypasses, find_bypasses
from lightning_prune.structure.flow import with_flow
from lightning_prune.structure.stages import stages_of
from lightning_prune.surgery import Reinitialise, Repair, Transaction, history_of
from lightning_prune.surgery.bypassing import bypassed

__all__ = ["Coupling", "SPvRPruning"]

#: How coupled layers are ranked: as one, or each layer separately.
Coupling = Literal["group", "stage"]


_RACES: dict[RaceKind | None, list[str]] = {
    "exact": ["The ranking was raced: scores of groups that stay may be of fewer samples."],
    "statistical": [
        "The ranking was raced statistically: scores are of fewer samples, and near the threshold groups may "
        "have been taken for others."
    ],
}


@dataclass(frozen=True)
class _Removal(Decision):
    """A decision with the groups that are removed entirely from chains."""

    bypassed: tuple[str, ...] = ()


@final
class SPvRPruning(NetworkPruning):
    """Ranks groups of units by the effect of masking them, and removes the lowest until a parameter budget is met.

    A. Hassan, J. H. Paik and S. Khare, "SPvR: Structured Pruning via Ranking" (2025). Units of a layer whose
    activations correlate form groups; each group is masked alone, and its importance is the number of predictions that
    change plus the change of the predicted class's probability, summed over samples. The groups of the whole network
    are sorted by this importance, and the lowest are removed. Layers have no minimum width: a layer that loses all its
    groups is removed with its norm and activation, and with its pooling or stride if its whole stage is removed;
    its input goes to the next layer. Then all weights and the optimizer's state are reinitialised, and the small
    network trains from scratch.

    It prunes once: before the first training batch, or at the point its schedule gives. The layers that read the
    network's input keep their best group, and so do layers that cannot be removed (because they change the size of
    a map that later layers need, for example); the report lists them. The module's ``forward`` has to return class
    scores.

    Args:
        budget: Parameters that remain: ``{"params": 0.1}`` or 0.1 for a tenth, ``{"params": 50_000}`` for a count. The
            result is never above it, and less than one group of units below.
        group_size: Units per group, d. The paper uses 2 for CIFAR-10, 4 for TinyImageNet, 8 for ImageNet.
        samples_per_class: Training samples per class that masked networks are run on; for dense prediction, images that
            contain the class. The paper uses 50, and 20 for ImageNet.
        reinit: Reinitialise all weights by each module's ``reset_parameters``; a `Reinitialise` for another rule or
            seed; ``False`` to keep the weights and fine-tune, in which case layers of a chain keep their best group.
        coupling: ``"group"``: coupled layers (those that add to one residual stream) are masked and ranked as one.
            ``"stage"``: every layer is ranked separately, after its norm and before the sum; when one of its groups is
            next, every layer of its stage, inner ones included, loses its own lowest group (the paper's appendix B).
            This is for reinitialised weights, since it determines widths only.
        race: ``"exact"``: groups far above the budget's threshold are masked in fewer samples, and their scores are
            lower bounds; the plan is that of the full ranking. ``"statistical"``: groups below it too, at much less
            cost; the plan is nearly always the same. None: all groups in all samples. See
            `lightning_prune.scoring.spvr.racing.Race`.
        task: Task of the class scores; by default inferred, see `lightning_prune.scoring.spvr.class_scores`.
        normalized: Whether the outputs are probabilities; by default inferred.
        schedule: When to prune, exactly once; by default at the start.
        layers: Layers to prune, all by default: names, globs, or names of modules that contain them.
        ignore: Layers not to prune.
        seed: Seed of the choice of samples.
        reset_monitors: See `StructuredPruning`.
        dirpath: Folder for the report; by default the logger's folder.
        extensions: Extensions of the cut, see `StructuredPruning`; with ``reinit`` no repairs.
        memory_limit: Bytes of activations and samples kept in memory; the rest is written to temporary files.

    Raises:
        ValueError: On construction for settings out of range; before the first training step for a budget below the
            smallest reachable network, outputs that are not class scores, and fewer samples than classes.

    Example:
        >>> from lightning_prune import SPvRPruning
        >>> callback = SPvRPruning(budget={"params": 0.1}, group_size=2)
    """

    acts_once = True
    _aims = ("target", "group_size", "samples_per_class", "reinit", "coupling", "race", "seed", "layers", "ignore")

    def __init__(
        self,
        budget: int | float | dict[str, int | float],
        group_size: int = 4,
        samples_per_class: int = 50,
        reinit: bool | Reinitialise = True,
        coupling: Coupling = "group",
        race: RaceKind | None = "exact",
        task: Task | None = None,
        normalized: bool | None = None,
        schedule: Schedule | None = None,
        layers: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        seed: int = 0,
        reset_monitors: bool = True,
        dirpath: str | None = None,
        extensions: list[Repair | CutExtension] | None = None,
        memory_limit: int = 2**30,
    ) -> None:
        self.target = Target.of(None, budget)
        if (quantities := [limit.quantity for limit in self.target.limits]) != ["params"]:
            raise ValueError(
                f'SPvRPruning: expected a budget of parameters, {{"params": 0.1}}, got one of {", ".join(quantities)}. '
                "For other budgets give `StructuredPruning` the criterion `SPvR()`."
            )
        SPvR(group_size, samples_per_class, task, normalized)  # its own checks
        if coupling not in get_args(Coupling):
            raise ValueError(f'SPvRPruning: expected `coupling` of "group" or "stage", got {coupling!r}.')
        if race is not None and race not in get_args(RaceKind):
            raise ValueError(f'SPvRPruning: expected `race` of "exact", "statistical" or None, got {race!r}.')
        self.race = race
        self.reinit = Reinitialise(rule="own") if reinit is True else None if reinit is False else reinit
        if self.reinit is not None and not isinstance(self.reinit, Reinitialise):
            raise TypeError(f"SPvRPruning: expected `reinit` of True, False or a Reinitialise, got {reinit!r}.")
        if coupling == "stage" and self.reinit is None:
            raise ValueError(
                'SPvRPruning: expected `reinit` with coupling="stage": every layer of a stage loses units of its own, '
                'so that their weights no longer fit to each other. Give `reinit=True`, or coupling="group".'
            )
        self.coupling, self.samples_per_class, self.seed = coupling, samples_per_class, seed
        self.options = RankingOptions("prediction_change", group_size, task, normalized, memory_limit=memory_limit)
        super().__init__(
            schedule,
            layers,
            ignore,
            reset_monitors,
            dirpath,
            extensions,
        )
        repairs = [type(one).__name__ for one in self.extensions if isinstance(one, Repair)]
        if repairs and self.reinit is not None:
            raise ValueError(
                f"SPvRPruning: expected no repair with `reinit`, which reinitialises all weights, got {repairs[0]}. "
                "Leave it out, or give `reinit=False`."
            )

    @override
    def _reset_fit(self) -> None:
        super()._reset_fit()
        self._bypasses = Bypasses({}, {})
        self._selected: tuple[str, ...] = ()
        self._ranking: Ranking | None = None

    @property
    def ranking(self) -> Ranking | None:
        """Groups of units and their importances; None before they were ranked in this fit."""
        return self._ranking

    @property
    @override
    def own_groups(self) -> tuple[str, ...]:
        return self._selected

    @property
    @override
    def removes_layers(self) -> bool:
        return True

    @override
    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "target": self.target,
            "group_size": self.options.group_size,
            "samples_per_class": self.samples_per_class,
            "reinit": repr(self.reinit),
            "coupling": self.coupling,
            "race": self.race,
            "seed": self.seed,
        }

    # -- before the first step ----------------------------------------------------------------------------------------

    @override
    def _traced(self, trainer: Trainer, traced: TracedModel) -> Structure:
        history = history_of(traced.model)
        return with_flow(super()._traced(trainer, traced), traced, history.vanished if history is not None else ())

    @override
    def _check(
        self, trainer: Trainer, module: LightningModule, batch: Any, structure: Structure, original: Size
    ) -> tuple[CutPoint, ...]:
        if self._last_done >= 0:  # the layers to rank may have been removed
            return self._moments(trainer)
        assert self._traced_model is not None
        self._selected = select(structure, self.layers, self.ignore)[0]
        if self.reinit is not None:
            self._bypasses = _among(find_bypasses(structure, self._traced_model), self._selected)
        data = self._data(trainer, module)
        self._require_scores(trainer, module, data)
        self._selected = self._scorable(module, data, structure)
        self._require_feasible(structure, original)
        timeline = self._moments(trainer)
        if timeline and structure.cost.params(structure.widths) <= self._limit(original):
            self._warn_of_no_effect()
            return ()
        return timeline

    @override
    def _reached(self) -> int:
        return self._last_done  # it prunes once, whatever the network's size

    def _data(self, trainer: Trainer, module: LightningModule) -> DataPass:
        return training_data(
            trainer,
            module,
            per_class=self.samples_per_class,
            seed=self.seed,
            memory_limit=self.options.memory_limit,
        )

    def _require_scores(self, trainer: Trainer, module: LightningModule, data: DataPass) -> None:
        """Check on a first batch that outputs are class scores and that the training data has classes."""
        try:
            batch = next(iter(data))
        except ValueError as error:
            raise ValueError(
                f"SPvRPruning takes `samples_per_class` samples of every class from the training data: {error}"
            ) from error
        with preserved_state(module), torch.no_grad(), trainer.precision_plugin.forward_context():
            outputs = score_tensor(forward(module, batch))
        reading = class_scores(outputs, batch.labels, self.options.task, self.options.normalized)
        classes = outputs.shape[1] if reading.task == "multiclass" else 2
        if data.total < classes and outputs.dim() <= 2:  # a segmented image contains several
            raise ValueError(
                f"SPvRPruning: expected a sample or more for each of the {classes} classes, got {data.total} in all. "
                "Train on more data."
            )

    def _sites(self, module: nn.Module, data: DataPass, structure: Structure) -> tuple[dict[str, Site], dict[str, str]]:
        """Sites at which groups are masked, and the reasons for groups without one."""
        groups = [structure.group(name) for name in self._selected]
        batch = next(iter(data))
        if self.coupling == "group":
            return sites_of_groups(module, groups, stations_of(module, batch, point="input"))
        sites, refused = sites_of_layers(groups, stations_of(module, batch))
        lost = {group.name: refused[layer] for group in groups for layer in group.producers if layer in refused}
        return {name: site for name, site in sites.items() if not _in_any(name, lost, structure)}, lost

    def _scorable(self, module: LightningModule, data: DataPass, structure: Structure) -> tuple[str, ...]:
        """Selected groups that can be masked.

        Raises:
            StructureError: If one that the user named cannot.
        """
        _, lost = self._sites(module, data, structure)
        left = tuple(name for name in self._selected if name not in lost)
        reasons = "; ".join(f"{name}: {why}" for name, why in lost.items())
        if lost and (self.layers is not None or not left):
            raise StructureError(f"SPvRPruning cannot rank {reasons}. Choose other `layers`.")
        if lost:
            warnings.warn(f"SPvRPruning cannot rank, so these stay as they are: {reasons}", stacklevel=2)
        return left

    def _limit(self, original: Size) -> int:
        """Maximum number of parameters."""
        remaining = self.target.remaining
        if isinstance(remaining, int):
            return remaining
        assert isinstance(remaining, float)
        return math.floor(remaining * original.params + 1e-9)

    def _require_feasible(self, structure: Structure, original: Size) -> None:
        """Check that the budget can be met by removing everything that can be removed."""
        size = self.options.group_size
        removals = [
            {name: tuple(range(first, min(first + size, structure.widths[name])))}
            for name in self._selected
            for first in range(0, structure.widths[name], size)
        ]
        plan_ranked(structure, removals, self._limit(original), self._bypasses)

    # -- the cut ------------------------------------------------------------------------------------------------------

    @override
    def _decide(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> Decision | None:
        structure = self._structure
        assert structure is not None
        data = self._data(trainer, module)
        sites, _ = self._sites(module, data, structure)
        limit = self._limit(self._original)
        ranking = self._ranked(trainer, module, data, sites, limit)
        self._ranking = ranking
        removals = [step.removal for step in self._steps(structure, ranking.bundles, ranking.scores)]
        plan = run_on_rank_zero(trainer, lambda: plan_ranked(structure, removals, limit, self._bypasses))
        if not plan.kept and not plan.bypassed:
            self._warn_of_no_effect()
            return None
        self.report.notes += _RACES.get(self.race, [])
        self.report.notes += [f"The best group of {name} stays: {why}." for name, why in plan.stays.items()]
        return self._decision(structure, ranking, plan)

    def _warn_of_no_effect(self) -> None:
        warnings.warn(f"{self.target} holds already: nothing is left to remove", NoEffectWarning, stacklevel=2)

    def _ranked(
        self, trainer: Trainer, module: LightningModule, data: DataPass, sites: Mapping[str, Site], limit: int
    ) -> Ranking:
        folder = self.session.writer(self, trainer).folder().parent / "rankings"
        with RankingProgress(trainer) as bar, trainer.precision_plugin.forward_context():
            settings: dict[str, Any] = {"folder": folder, "progress": bar.see}
            settings |= {"gather": gathered, "agree": holds_on_all_ranks}
            if self.race is None:
                return rank(module, data, sites, self.options, **settings)
            key = repr((limit, self.coupling, self._selected, sorted(self._bypasses.groups)))
            race = Race(self.race, partial(self._decisive, limit), key)
            return rank_by_race(module, data, sites, self.options, race, **settings)

    def _decisive(
        self, limit: int, bundles: Mapping[str, Sequence[Sequence[int]]], scores: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Masks of the bundles that decide the plan at these scores."""
        assert self._structure is not None
        steps = self._steps(self._structure, bundles, scores)
        try:
            count = plan_ranked(self._structure, (step.removal for step in steps), limit, self._bypasses).examined
        except ValueError:  # the budget cannot be met in this order
            count = len(steps)
        decisive = {name: torch.zeros(len(found), dtype=torch.bool) for name, found in bundles.items()}
        for name, place in (entry for step in steps[:count] for entry in step.decisive):
            decisive[name][place] = True
        return decisive

    def _steps(
        self, structure: Structure, bundles: Mapping[str, Sequence[Sequence[int]]], scores: Mapping[str, Tensor]
    ) -> list[Ranked]:
        numbers = {name: found.tolist() for name, found in scores.items()}
        if self.coupling == "group":
            return in_order(bundles, numbers)
        stages = {
            stream: [name for name in inner if name in self._selected]
            for stream, inner in stages_of(structure).items()
            if stream in self._selected
        }
        return by_stage(structure, stages, bundles, numbers)

    def _decision(self, structure: Structure, ranking: Ranking, plan: RankedPlan) -> Decision:
        widths = structure.widths
        kept = Plan(plan.kept, {name: widths[name] for name in plan.kept})
        info = dict(self.reinit.info) if self.reinit is not None else {}
        numbers = {
            "pruning/ranking/macs": float(ranking.macs),
            "pruning/ranking/macs_naive": float(ranking.macs_naive),
            "pruning/ranking/seconds": ranking.seconds,
            "pruning/ranking/groups": float(sum(map(len, ranking.bundles.values()))),
        }
        scores = {name: ranking.unit_scores(name) for name in ranking.bundles}
        return _Removal(kept, info, numbers, scores, plan.bypassed)

    @override
    def _change(self, change: Transaction, trainer: Trainer, module: LightningModule, decision: Decision) -> Structure:
        structure = super()._change(change, trainer, module, decision)
        if isinstance(decision, _Removal) and decision.bypassed:
            specs = bypassed(module, self._bypasses, decision.bypassed, structure.widths)
            structure = change.replace(specs, self._retrace(trainer), structure, info=decision.info)
        if self.reinit is not None:
            assert self._traced_model is not None
            copy = self._traced_model.copy("real").module
            change.install(self.reinit.after(copy, lambda *_: None))
            change.forget()
        return structure


def _among(bypasses: Bypasses, selected: Iterable[str]) -> Bypasses:
    """Bypasses that remove selected groups only."""
    names = set(selected)
    groups = {name: found for name, found in bypasses.groups.items() if {name, *found.along} <= names}
    return Bypasses(groups, {pool: stage for pool, stage in bypasses.pools.items() if stage <= groups.keys()})


def _in_any(layer: str, groups: Mapping[str, str], structure: Structure) -> bool:
    return any(layer in structure.group(name).producers for name in groups)
