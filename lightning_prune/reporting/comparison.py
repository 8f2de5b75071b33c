"""Comparison of finished runs: metric and costs of each network, and differences of settings paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import override

from lightning_prune.reporting.grid import MISSING, Grid, Shown, count, number, share

__all__ = ["ComparedNetwork", "Comparison", "cost_name"]

# Marks networks on the Pareto front of a cost.
_MARK = " *"


@dataclass(frozen=True)
class ComparedNetwork:
    """A network from the end of a run, or saved earlier.

    Attributes:
        run: The run it comes from.
        setting: Name of the setting; runs of one setting differ in their seeds only.
        metric: The last measured value of the metric.
        params: Number of parameters.
        macs: MACs per sample (1 MAC = 2 FLOPs).
        seed: The run's seed, if known.
        latency: Milliseconds per batch, by batch size, as measured by the run.
        is_final: Whether it is the network at the end of the run.
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
        """A cost: ``"params"``, ``"macs"``, or the latency at a batch size such as ``"1"``; ``None`` if unknown."""
        return self.latency.get(int(what)) if what.isdecimal() else float(getattr(self, what))


@dataclass(frozen=True)
class Comparison(Shown):
    """A comparison of networks.

    Attributes:
        networks: The networks in the order of the table. Settings are compared with that of the first one.
        metric: Name of the metric.
        mode: Whether higher (``"max"``) or lower (``"min"``) is better.
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
        """Costs known for more than one network, see `ComparedNetwork.cost`."""
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
        """The tables: all networks, and the differences of settings paired by seed."""
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
            f"{self.metric}: last measured value; {'higher' if self.mode == 'max' else 'lower'} is better. MACs are "
            f"per sample, 1 MAC = 2 FLOPs.{_MARK}: on the Pareto front (no other is better at the same or lower cost)."
        )
        if len(costs) > 2:
            note += " Latencies, in milliseconds, were measured by each run: compare only runs on the same machine."
        return Grid("Networks", columns, tuple(rows), words=2, note=note)

    def _pairs(self) -> Grid:
        by_seed = {setting: self._by_seed(setting) for setting in self.settings}
        first, *others = self.settings
        rows = [(setting, *_pair(by_seed[first], by_seed[setting])) for setting in others]
        columns = ("setting", "paired by", f"{first}", "this one", "difference", "std", "smallest", "largest")
        note = (
            f"{self.metric} at the end of runs with the same seed, minus that of {first}; mean, standard deviation "
            "(ddof 1), smallest and largest of the differences."
        )
        return Grid("Paired by seed", columns, tuple(rows), note=note)

    def _by_seed(self, setting: str) -> dict[int, float]:
        """The metric at the end of a setting's runs by seed; the mean if there are several with one seed."""
        found: dict[int, list[float]] = {}
        for network in self.networks:
            if network.setting == setting and network.is_final and network.seed is not None:
                found.setdefault(network.seed, []).append(network.metric)
        return {seed: statistics.fmean(values) for seed, values in found.items()}


def cost_name(cost: str) -> str:
    """Label of a cost in tables and figures."""
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
        return ("no seed in common", *[MISSING] * 6)
    differences = [other[seed] - first[seed] for seed in seeds]
    spread = statistics.stdev(differences) if len(seeds) > 1 else None
    means = (statistics.fmean(each[seed] for seed in seeds) for each in (first, other))
    figures = (*means, statistics.fmean(differences), spread, min(differences), max(differences))
    return (_listed(seeds), *(number(figure) for figure in figures))


def _listed(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
