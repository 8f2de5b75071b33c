"""Networks of finished runs side by side: what each is worth and costs, and how settings differ where seeds agree."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import override

from lightning_prune.reporting.grid import MISSING, Grid, Shown, count, number, share

__all__ = ["ComparedNetwork", "Comparison", "cost_name"]

# Marks a cost at which no other network does better.
_MARK = " *"


@dataclass(frozen=True)
class ComparedNetwork:
    """A network that a run left: at its end, or saved on the way.

    Attributes:
        run: The run it comes from.
        setting: What runs that differ by nothing but their seed have in common.
        metric: What it is judged by, as last measured.
        params: Parameters.
        macs: MACs for one sample (1 MAC = 2 FLOPs).
        seed: The run's seed, where it is known.
        latency: Milliseconds for one batch by its size, as the run measured them.
        is_final: Whether the run ended with it.
    """

    run: str
    setting: str
    metric: float
    params: int
    macs: int
    seed: int | None = None
    latency: Mapping[int, float] = field(default_factory=dict)
    is_final: bool = True

    def cost(self, what: str) -> float | None:
        """What it costs: ``"params"``, ``"macs"``, or the latency of a batch, ``"1"``; ``None`` if it is not known."""
        return self.latency.get(int(what)) if what.isdecimal() else float(getattr(self, what))


@dataclass(frozen=True)
class Comparison(Shown):
    """Networks side by side.

    Attributes:
        networks: In the order of the table. The first one's setting is what the others are compared with.
        metric: Name of the metric.
        mode: Whether more or less of it is better.
    """

    networks: tuple[ComparedNetwork, ...]
    metric: str
    mode: Literal["max", "min"] = "max"

    @property
    def settings(self) -> list[str]:
        """Each setting once."""
        return list(dict.fromkeys(network.setting for network in self.networks))

    @property
    def costs(self) -> list[str]:
        """What is known of more than one network, see `ComparedNetwork.cost`."""
        batches = sorted({batch for network in self.networks for batch in network.latency})
        measured = [batch for batch in batches if sum(batch in network.latency for network in self.networks) > 1]
        return ["params", "macs", *map(str, measured)]

    def front(self, cost: str) -> list[ComparedNetwork]:
        """The Pareto front, by rising cost: networks of which no other is at least as good in both and better in one.

        Args:
            cost: One of `costs`.
        """
        known = [(value, network) for network in self.networks if (value := network.cost(cost)) is not None]
        return [
            network
            for value, network in sorted(known, key=lambda pair: pair[0])
            if not any(self._dominates(other, against, network, value) for against, other in known)
        ]

    def _dominates(self, one: ComparedNetwork, cost: float, other: ComparedNetwork, against: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        gain, saved = sign * (one.metric - other.metric), against - cost
        return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)

    @override
    def grids(self) -> tuple[Grid, ...]:
        """The tables: all networks, and the differences of settings where seeds agree."""
        grids = (self._networks(), self._pairs())
        return tuple(grid for grid in grids if grid.rows)

    def _networks(self) -> Grid:
        first, costs = self.networks[0], self.costs
        fronts = {cost: self.front(cost) for cost in costs}
        rows = [
            (
                network.run,
                network.setting,
                MISSING if network.seed is None else str(network.seed),
                number(network.metric),
                *(_cost(network, cost) + (_MARK if network in fronts[cost] else "") for cost in costs),
                share(network.macs, first.macs),
            )
            for network in self.networks
        ]
        columns = ("run", "setting", "seed", self.metric, *(cost_name(cost) for cost in costs), "MACs / first")
        note = (
            f"{self.metric}: as last measured; {'more' if self.mode == 'max' else 'less'} is better. MACs are those of "
            f"one sample, 1 MAC = 2 FLOPs.{_MARK}: on the Pareto front, nothing is better at no higher cost."
        )
        if len(costs) > 2:
            note += " Latencies, in milliseconds, were measured by each run itself: compare those of one machine."
        return Grid("Networks", columns, tuple(rows), words=2, note=note)

    def _pairs(self) -> Grid:
        by_seed = {setting: self._by_seed(setting) for setting in self.settings}
        first, *others = self.settings
        rows = [(setting, *_pair(by_seed[first], by_seed[setting])) for setting in others]
        columns = ("setting", "seeds in common", f"{first}", "this one", "difference", "std", "smallest", "largest")
        note = (
            f"{self.metric} at the end of runs with the same seed, minus that of {first}; mean, standard deviation "
            "(ddof 1), smallest and largest of the differences."
        )
        return Grid("Paired by seed", columns, tuple(rows), note=note)

    def _by_seed(self, setting: str) -> dict[int, float]:
        """The metric at the end of the runs of a setting; of several with one seed their mean."""
        found: dict[int, list[float]] = {}
        for network in self.networks:
            if network.setting == setting and network.is_final and network.seed is not None:
                found.setdefault(network.seed, []).append(network.metric)
        return {seed: statistics.fmean(values) for seed, values in found.items()}


def cost_name(cost: str) -> str:
    """What a cost is called in tables and pictures."""
    known = {"params": "parameters", "macs": "MACs"}
    return known.get(cost) or f"ms at batch {cost}"


def _cost(network: ComparedNetwork, cost: str) -> str:
    value = network.cost(cost)
    if value is None:
        return MISSING
    return number(value, 3) if cost.isdecimal() else count(value)


def _pair(first: Mapping[int, float], other: Mapping[int, float]) -> Sequence[str]:
    seeds = sorted(first.keys() & other.keys())
    if not seeds:
        return ("none", *[MISSING] * 6)
    differences = [other[seed] - first[seed] for seed in seeds]
    spread = statistics.stdev(differences) if len(seeds) > 1 else None
    means = (statistics.fmean(each[seed] for seed in seeds) for each in (first, other))
    figures = (*means, statistics.fmean(differences), spread, min(differences), max(differences))
    return (_listed(seeds), *(number(figure) for figure in figures))


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))
