"""Scoring of layers by surrogates in a run, over the samples of all processes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_prune.callbacks.lightning.processes import gathered, run_on_rank_zero
from lightning_prune.planning import (
    Amount,
    Depth,
    Limits,
    Plan,
    Quantity,
    Target,
    best_depth,
    best_unit,
    plan_by_use,
)
from lightning_prune.scoring import DataPass, Surrogate
from lightning_prune.scoring.score_file import ScoreFile, network_fingerprint
from lightning_prune.scoring.surrogates import Metric, metric_name, split_samples
from lightning_prune.scoring.walk import Station, Walk, feature_tables, stations_of
from lightning_prune.scoring.xgb import (
    LayerScore,
    LayerScorer,
    Usage,
    end_station,
    group_usage,
    score_layers,
    score_layers_in_turn,
    unmaskable,
    unscorable,
)
from lightning_prune.structure import Size, Structure
from lightning_prune.structure.boundaries import Boundary
from lightning_prune.structure.graph import Group

__all__ = ["Mode", "ScoreOptions", "Scored", "ScoringRun"]

#: Score all layers of the unpruned network, or each layer after the layers before it were pruned.
Mode = Literal["one_shot", "layer_wise"]

# Number of bisection steps over the threshold for a budget in layer-wise mode, and the range of its log10.
_WALKS, _LOWEST, _HIGHEST = 12, -10.0, 0.0

# Tolerance below a budget, as a share of it.
_NEAR = 0.01


@dataclass(frozen=True)
class ScoreOptions:
    """Settings of the scoring.

    Attributes:
        mode: ``"one_shot"`` or ``"layer_wise"``.
        reduction: Pooling over positions: mean or maximum.
        surrogate: The surrogate.
        metric: Metric μ.
        held_back: Share of held-out samples.
        seed: Seed of the split of the samples.
        memory_limit: Bytes of samples and activations to keep in memory.
    """

    mode: Mode
    reduction: Literal["avg", "max"]
    surrogate: Surrogate
    metric: Metric | None = None
    held_back: float = 0.2
    seed: int = 0
    memory_limit: int = 2**30

    def plain(self) -> dict[str, Any]:
        """Settings that scores depend on, as plain data."""
        return {
            "mode": self.mode,
            "reduction": self.reduction,
            "surrogate": self.surrogate.key,
            "metric": metric_name(self.metric, self.surrogate.task),
            "held_back": self.held_back,
            "seed": self.seed,
        }


@dataclass(frozen=True, eq=False)
class Scored:
    """Result of a scoring.

    Attributes:
        layers: Scores, in the order of execution.
        use: Importances of the units of each group.
        plan: The plan; empty for a budget if the network is truncated first.
        emptied: Groups that keep their best unit although the rule removes all.
        file: File of the scores.
        passes: Number of equivalent forward passes over the samples, by multiply-accumulates.
        depths: μ of every boundary, the shallowest first.
        end: Boundary at which the network is truncated; None to keep its depth.
    """

    layers: Mapping[Station, LayerScore]
    use: Mapping[str, Usage]
    plan: Plan
    emptied: tuple[str, ...]
    file: Path
    passes: float
    depths: tuple[tuple[Boundary, float], ...] = ()
    end: Boundary | None = None


class ScoringRun:
    """Scores the layers of a network on a set of samples.

    Args:
        trainer: The run.
        module: The network.
        structure: Structure of the network.
        original: Size of the dense network, which a budget is relative to.
        data: The samples of this process.
        options: Settings of the scoring.
        folder: Folder for the scores.
        table: A file with existing scores to use.
        see: Called with every score and the number of layers.

    Raises:
        ValueError: If the labels are unsuitable, or ``table`` has scores under another key.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        structure: Structure,
        original: Size,
        data: DataPass,
        options: ScoreOptions,
        folder: Path,
        table: Path | None = None,
        see: Callable[[LayerScore, int], None] = lambda *_: None,
    ) -> None:
        self.trainer, self.module, self.structure, self.original = trainer, module, structure, original
        self.data, self.options, self.folder, self.table, self._see = data, options, folder, table, see
        with trainer.precision_plugin.forward_context():
            self._order = stations_of(module, next(iter(data)))
        self._passes = 0.0
        self.labels = gathered(data.labels).cpu().numpy()
        task = options.surrogate.task
        self.parts = split_samples(self.labels, task, held_back=options.held_back, seed=options.seed)
        self._key = {
            **options.plain(),
            "network": network_fingerprint(module),
            "samples": data.fingerprint(),
            "processes": data.world_size,
        }

    def unscorable(self, groups: Sequence[Group]) -> dict[str, str]:
        """Groups that cannot be scored in this mode, with reasons."""
        lost = unscorable(groups, self._order)
        if self.options.mode == "layer_wise":
            lost |= unmaskable(self.module, [group for group in groups if group.name not in lost])
        return lost

    def run(
        self, groups: Sequence[Group], amount: Amount, ends: Sequence[Boundary] = (), depth: Depth | None = None
    ) -> Scored:
        """Score the layers that produce the units of groups, and make a plan.

        Args:
            groups: Groups that may be pruned.
            amount: Rule for the units to remove.
            ends: Boundaries of the backbone, the shallowest first, the last its end.
            depth: Rule for choosing one of them.
        """
        producers = {layer for group in groups for layer in group.producers}
        places = [end_station(end.layers, self._order, is_layer=end.is_layer) for end in ends]
        stations = [station for station in self._order if station.layer in producers]
        stations += [place for place in dict.fromkeys(places) if place not in stations]
        found, passes, file = self._found(groups, stations, amount)
        left = dict(found)
        depths = tuple((end, found[place].score) for end, place in zip(ends, places, strict=True))
        chosen = None if depth is None else ends[best_depth([score for _, score in depths], depth)]
        if chosen is not None and chosen.tail:
            # Units after the boundary are removed with it, and those of the head get another input.
            groups = [group for group in groups if not set(chosen.layers).isdisjoint(group.producers)]
            left = {station: score for station, score in found.items() if station.layer in chosen.layers}
        else:
            chosen = None
        use = group_usage(groups, left)
        if chosen is not None and not amount.is_local:  # relative to the truncated network
            return Scored(found, use, Plan({}, {}), (), file, passes, depths, chosen)
        plan, emptied = plan_by_use(self.structure, use, amount, self.original)
        return Scored(found, use, plan, emptied, file, passes, depths, chosen)

    def _found(
        self, groups: Sequence[Group], stations: Sequence[Station], amount: Amount
    ) -> tuple[Mapping[Station, LayerScore], float, Path]:
        """Scores, number of forward passes, and the file."""
        if self.options.mode == "one_shot":
            scorer, file = self._scorer(len(stations), {})
            return score_layers(scorer, stations, self._features), self._passes, file
        return self._in_turn(groups, stations, amount) if amount.is_local else self._near(groups, stations, amount)

    # -- one after the other ------------------------------------------------------------------------------------------

    def _in_turn(
        self, groups: Sequence[Group], stations: Sequence[Station], amount: Amount
    ) -> tuple[Mapping[Station, LayerScore], float, Path]:
        decided = {"amount": amount, "groups": [group.name for group in groups]}
        scorer, file = self._scorer(len(stations), decided)

        def decide(_: Group, found: Usage) -> tuple[int, ...]:
            return amount.kept(found) or (best_unit(found),)

        walk = Walk(self.module, self.data, stations, memory_limit=self._memory_left)
        found = score_layers_in_turn(walk, self._order, groups, scorer, self._visited, decide)
        return found, walk.macs / (len(self.data) * walk.forward_macs), file

    def _near(
        self, groups: Sequence[Group], stations: Sequence[Station], budget: Amount
    ) -> tuple[Mapping[Station, LayerScore], float, Path]:
        """Find a threshold near the budget by bisection, with one walk per step.

        The number of walks is limited; units with importances near the threshold make up the difference.
        """
        target = Target.of(None, budget.value)
        selected = [group.name for group in groups]
        limits = target.amounts(self.original, selected)
        low, high = _LOWEST, _HIGHEST
        passes, best = 0.0, math.inf
        nearest: tuple[Mapping[Station, LayerScore], Path] | None = None
        for _ in range(_WALKS):
            exponent = (low + high) / 2
            threshold = Amount("threshold", 10**exponent)
            found, more, file = self._in_turn(groups, stations, threshold)
            plan, _ = plan_by_use(self.structure, group_usage(groups, found), threshold, self.original)
            # The size and limit that are furthest from being met.
            (quantity, limit), size = max(self._sizes(plan, limits, selected), key=lambda one: one[1] / one[0][1])
            passes += more
            rank_zero_info(f"threshold {10**exponent:.3g}: {size:,.0f} {quantity} of {limit:,.0f} are left")
            off = abs(size / limit - 1)
            if nearest is None or off < best:
                best, nearest = off, (found, file)
            if 1 - _NEAR <= size / limit <= 1:
                break
            low, high = (exponent, high) if size > limit else (low, exponent)
        assert nearest is not None
        return nearest[0], passes, nearest[1]

    def _sizes(self, plan: Plan, limits: Limits, selected: Sequence[str]) -> list[tuple[tuple[Quantity, float], float]]:
        """Each limit with the size after the plan."""
        after = Size.of(self.structure.take(plan.kept))
        return [(limit, after.amount(limit[0], selected)) for limit in limits]

    # -- features and surrogates --------------------------------------------------------------------------------------

    def _features(self, stations: Sequence[Station]) -> Iterator[tuple[Station, Tensor]]:
        self._passes = 1.0
        with self.trainer.precision_plugin.forward_context():
            tables = feature_tables(
                self.module, self.data, stations, self.options.reduction, memory_limit=self._memory_left
            )
        return ((station, gathered(table)) for station, table in tables)

    @property
    def _memory_left(self) -> int:
        """Bytes left for activations."""
        return max(self.options.memory_limit - self.data.in_memory, 0)

    def _visited(self, visit: Any) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            return gathered(visit.features(self.options.reduction))

    def _scorer(self, layers: int, decided: Mapping[str, Any]) -> tuple[LayerScorer, Path]:
        """The scorer and its file."""
        key = {**self._key, **decided}
        name = f"scores-{hashlib.sha256(json.dumps(key, default=repr).encode()).hexdigest()[:12]}.jsonl"
        opened = run_on_rank_zero(self.trainer, lambda: self._opened(self.folder / name, key))
        memory = _SharedScores(opened, self.trainer.is_global_zero)
        scorer = LayerScorer(
            self.options.surrogate,
            self.labels,
            self.parts,
            self.options.metric,
            memory,
            on_rank_zero=lambda make: run_on_rank_zero(self.trainer, make),
            see=lambda found: self._see(found, layers),
        )
        return scorer, opened.path

    def _opened(self, path: Path, key: Mapping[str, Any]) -> ScoreFile:
        """Open the file of this scoring, with scores from an interrupted run, other runs, or the user."""
        own = ScoreFile(path, key)
        others = [] if self.table is None else [self.table]
        home = path.parent.parent
        others += sorted(
            [*home.glob(path.name), *home.glob(f"*/{path.name}"), *path.parent.glob(f"score/*/{path.name}")]
        )
        for other in others:
            if other == path:
                continue
            known = ScoreFile(other, key)
            if not known.fits and other == self.table:
                raise ValueError(
                    f"`scores`: expected a table of this network, these samples and options, got {other}, in which "
                    f"{_differences(known.difference)}. Score again, or leave it out."
                )
            if known.fits and own.merge(known):
                rank_zero_info(f"Scores of layers that {other} holds are taken from there.")
        return own


def _differences(found: Mapping[str, tuple[str | None, str]]) -> str:
    """Describe the differences between a table and a run."""
    digests = {"network": "the network's weights or shapes differ", "samples": "the training samples differ"}
    return "; ".join(digests.get(name, f"{name} is {theirs}, here {ours}") for name, (theirs, ours) in found.items())


class _SharedScores:
    """Scores read by rank zero and shared by all processes; only rank zero writes."""

    def __init__(self, file: ScoreFile, writes: bool) -> None:
        self._file, self._writes = file, writes

    def get(self, station: Station) -> LayerScore | None:
        return self._file.get(station)

    def put(self, found: LayerScore) -> None:
        if self._writes:
            self._file.put(found)
