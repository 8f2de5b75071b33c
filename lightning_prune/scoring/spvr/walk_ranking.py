"""Importance of bundles by a walk, which runs only the part of the network after the masked site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.scoring.data import DataPass
from lightning_prune.scoring.spvr.grouping import correlation, group_units
from lightning_prune.scoring.spvr.importance import MEASURES, Measure
from lightning_prune.scoring.spvr.outputs import ClassScores, Task, class_scores, labels_of, score_tensor
from lightning_prune.scoring.spvr.sites import Site
from lightning_prune.scoring.walk import Station, StationBatch, Visit, Walk

__all__ = ["Masking", "Ranking", "RankingOptions", "first_stations", "prepare_masking", "rank"]

# Most elements of masked outputs in memory at once: 64 MiB in float32.
_HELD = 2**24


@dataclass(frozen=True)
class RankingOptions:
    """Settings of a ranking.

    Attributes:
        measure: Measure of the change.
        group_size: Units per bundle, d.
        task: Kind of classification; inferred if None.
        normalized: Whether the outputs are probabilities; inferred if None.
        fast: Compute the next layers as differences, skip samples whose masked units are all 0, and run several
            variants as one batch: equal up to rounding.
        plain: Run the whole network with hooks for every bundle, as a reference.
        memory_limit: Bytes of activations to keep in memory.
    """

    measure: Measure = "prediction_change"
    group_size: int = 4
    task: Task | None = None
    normalized: bool | None = None
    fast: bool = True
    plain: bool = False
    memory_limit: int = 2**30


@dataclass(frozen=True, eq=False)
class Ranking:
    """Bundles of units with their scores.

    Attributes:
        bundles: Units that were masked together, by site.
        scores: Score of each bundle, in float64 on the CPU, by site.
        samples: Number of samples of this process.
        macs: Multiply-accumulates of this process (1 MAC = 2 FLOPs).
        macs_naive: Multiply-accumulates of one full forward pass per bundle and one without a mask.
        seconds: Elapsed time.
        complete: Whether each bundle was masked in all samples, by site; None if all were. In a race, scores of others
            are partial sums.
    """

    bundles: Mapping[str, list[tuple[int, ...]]]
    scores: Mapping[str, Tensor]
    samples: int
    macs: int
    macs_naive: int
    seconds: float = field(compare=False, default=0.0)
    complete: Mapping[str, Tensor] | None = None

    def unit_scores(self, name: str) -> Tensor:
        """Scores of units, which are those of their bundles: shape ``(width,)``."""
        found = torch.empty(sum(map(len, self.bundles[name])), dtype=torch.float64)
        for units, score in zip(self.bundles[name], self.scores[name], strict=True):
            found[list(units)] = score
        return found


def rank(
    model: nn.Module,
    data: DataPass,
    sites: Mapping[str, Site],
    options: RankingOptions,
    *,
    folder: str | Path | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    agree: Callable[[bool], bool] = bool,
) -> Ranking:
    """Bundle the units of all sites by one pass over the samples, and mask the bundles one by one.

    Args:
        model: The network, which is not changed.
        data: The samples of this process.
        sites: Sites at which units are masked, by name.
        options: Settings of the ranking.
        folder: Folder for finished sites, from which an interrupted ranking is resumed.
        progress: Called with the finished site, the bundles done, and the number of bundles.
        gather: Gathers rows from all processes.
        agree: Reduces a boolean over all processes to whether it holds on all.
    """
    began = perf_counter()
    walk = Walk(
        model,
        data,
        first_stations(sites),
        memory_limit=options.memory_limit,
        folder=folder,
        options=repr(options),
        plain=options.plain,
        agree=agree,
    )
    masking, outputs = prepare_masking(walk, sites, options, gather)
    bundles = masking.bundles
    scores: dict[str, Tensor] = {}
    done, count = 0, sum(map(len, bundles.values()))
    for visit in walk:
        here = [site for site in sites.values() if site.first == visit.station]
        found = visit.once(
            lambda visit=visit, here=here: {  # type: ignore[misc]
                site.name: gather(_importance(visit, site, outputs, masking)[None]).sum(0) for site in here
            }
        )
        scores |= found
        for site in here:
            done += len(bundles[site.name])
            progress(site.name, done, count)
    naive = (count + 1) * len(data) * walk.forward_macs
    return Ranking(bundles, scores, len(data), walk.macs, naive, perf_counter() - began)


def first_stations(sites: Mapping[str, Site]) -> list[Station]:
    """Stations at which walks stop: the first of each site."""
    return list(dict.fromkeys(site.first for site in sites.values()))


@dataclass(frozen=True, eq=False)
class Masking:
    """Bundles, and the comparison of masked outputs.

    Attributes:
        bundles: Units that are masked together, by site.
        reading: Interpretation of the outputs.
        options: Settings of the ranking.
        most: Most bundles whose outputs are in memory at once.
    """

    bundles: Mapping[str, list[tuple[int, ...]]]
    reading: ClassScores
    options: RankingOptions
    most: int

    def changes(self, here: StationBatch, site: Site, bundles: Sequence[Sequence[int]], unmasked: Any) -> Tensor:
        """Change of the outputs of every sample of a batch by masking bundles of a site.

        Args:
            here: The batch at the site's first station.
            site: The site.
            bundles: Units that are masked together.
            unmasked: Output of the unmasked network.

        Returns:
            Shape ``(bundles, samples)``, in float64 on the CPU.
        """
        measure, fast, places = MEASURES[self.options.measure], self.options.fast, here.visit.walk.places
        whole = self.reading.log_probabilities(score_tensor(unmasked))
        found = []
        for first in range(0, len(bundles), self.most):
            part = bundles[first : first + self.most]
            masks = {station: site.masks(station, part, places[station].channels) for station in site.channels}
            own = masks.pop(site.first)
            outputs = score_tensor(here.rest_masked(own, masks or None, delta=fast, skip=fast, output=unmasked))
            found += [measure(whole, self.reading.log_probabilities(one)) for one in outputs]
        return torch.stack(found).to("cpu", torch.float64)


def prepare_masking(
    walk: Walk, sites: Mapping[str, Site], options: RankingOptions, gather: Callable[[Tensor], Tensor]
) -> tuple[Masking, list[Any]]:
    """Bundle the units of all sites by one pass over the samples; also returns the outputs of each batch."""
    outputs, features = _first_pass(walk, sites)
    scores = torch.cat([*map(score_tensor, outputs)])
    reading = class_scores(scores, labels_of(walk.data), options.task, options.normalized)
    bundles = {
        name: group_units(torch.stack([correlation(gather(x)) for x in found]).mean(0), options.group_size)
        for name, found in features.items()
    }
    return Masking(bundles, reading, options, max(1, _HELD // max(score_tensor(outputs[0]).numel(), 1))), outputs


def _importance(visit: Visit, site: Site, unmasked: Sequence[Any], masking: Masking) -> Tensor:
    """Scores of bundles, summed over samples."""
    bundles = masking.bundles[site.name]
    changes = (
        masking.changes(here, site, bundles, output).sum(1) for here, output in zip(visit, unmasked, strict=True)
    )
    return torch.stack([*changes]).sum(0)


def _first_pass(walk: Walk, sites: Mapping[str, Site]) -> tuple[list[Any], dict[str, list[Tensor]]]:
    """Outputs of each batch, and pooled values of units at every station of a site.

    Scalars are taken as they are; feature maps are pooled by sums of absolute values (eq. 4).
    """
    stations = list(dict.fromkeys(station for site in sites.values() for station in site.channels))
    rows: dict[tuple[str, Station], list[Tensor]] = {}
    outputs: list[Any] = []
    for output, values in walk.first_pass(stations):
        outputs.append(output)
        for name, site in sites.items():
            for station, channels in site.channels.items():
                value = values[station].movedim(walk.places[station].dim, 1)
                x = value[:, channels.to(value.device)].flatten(2)
                x = x.to(torch.promote_types(x.dtype, torch.float32))
                pooled = x[..., 0] if x.shape[2] == 1 else x.abs().sum(2)
                rows.setdefault((name, station), []).append(pooled.cpu())
    features = {name: [torch.cat(rows[name, station]) for station in site.channels] for name, site in sites.items()}
    return outputs, features
