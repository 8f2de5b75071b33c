"""The same importances from a walk: every group starts where it is masked, not at the network's input."""

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
from lightning_prune.scoring.spvr.outputs import ClassScores, Task, class_scores, score_tensor
from lightning_prune.scoring.spvr.sites import Site
from lightning_prune.scoring.walk import Here, Station, Visit, Walk

__all__ = ["Masking", "Ranking", "RankingOptions", "first_stations", "prepared", "rank"]

# Numbers of masked outputs that are held at once: 64 MiB in float32.
_HELD = 2**24


@dataclass(frozen=True)
class RankingOptions:
    """What a ranking depends on, besides network and samples.

    Attributes:
        measure: What masking changes.
        group_size: Units of a group, d.
        task: What the outputs are scores of; found out if None.
        normalized: Whether the outputs are probabilities; found out if None.
        fast: Compute layers behind as differences, skip samples whose masked units are all 0, and run several variants
            as one batch: equal up to rounding.
        plain: Run the whole network with hooks for every group: the oracle.
        memory_limit: Bytes of activations that are kept in memory.
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
    """Groups of units, and what masking each of them changes.

    Attributes:
        bundles: Units that were masked together, by site.
        scores: A number for each bundle, in float64 on the CPU, by site.
        samples: Samples of this process that were looked at.
        macs: Multiply-accumulates spent on this process (1 MAC = 2 FLOPs).
        macs_naive: Those of one pass to begin with and one full forward pass for each bundle.
        seconds: Time that it took.
        complete: Which bundles were masked in all samples, by site; None if all were. The scores of the others are sums
            over fewer samples, in a race.
    """

    bundles: Mapping[str, list[tuple[int, ...]]]
    scores: Mapping[str, Tensor]
    samples: int
    macs: int
    macs_naive: int
    seconds: float = field(compare=False, default=0.0)
    complete: Mapping[str, Tensor] | None = None

    def unit_scores(self, name: str) -> Tensor:
        """Every unit's number, that of its bundle: shape ``(width,)``."""
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
    """Group the units of all sites by one pass over the samples, and mask one group after the other.

    Args:
        model: The network; left as it is.
        data: The samples; under several processes each has its own.
        sites: Where units are masked, by name.
        options: What is measured and how.
        folder: Where finished sites are written down: a ranking that was killed goes on from there.
        progress: Called with the site that is finished, the groups of units done, and their number.
        gather: Rows of all processes, from those of this one.
        agree: Whether something holds on all processes, by what holds on this one.
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
    masking, outputs = prepared(walk, sites, options, gather)
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
    """Where walks stop."""
    return list(dict.fromkeys(site.first for site in sites.values()))


@dataclass(frozen=True, eq=False)
class Masking:
    """What masked networks are compared with, and how.

    Attributes:
        bundles: Units that are masked together, by site.
        reading: How outputs are read.
        options: What is measured and how.
        most: Bundles whose outputs are held at once.
    """

    bundles: Mapping[str, list[tuple[int, ...]]]
    reading: ClassScores
    options: RankingOptions
    most: int

    def changes(self, here: Here, site: Site, bundles: Sequence[Sequence[int]], unmasked: Any) -> Tensor:
        """What masking some of a site's bundles changes for every sample of a batch.

        Args:
            here: The batch at the site's first station.
            site: Where.
            bundles: Units that are masked together.
            unmasked: What the network gives as it is.

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


def prepared(
    walk: Walk, sites: Mapping[str, Site], options: RankingOptions, gather: Callable[[Tensor], Tensor]
) -> tuple[Masking, list[Any]]:
    """Group the units of all sites by one pass over the samples; also what the network gives, batch by batch."""
    outputs, features = _first_pass(walk, sites)
    scores = torch.cat([*map(score_tensor, outputs)])
    reading = class_scores(scores, _labels(walk.data), options.task, options.normalized)
    bundles = {
        name: group_units(torch.stack([correlation(gather(x)) for x in found]).mean(0), options.group_size)
        for name, found in features.items()
    }
    return Masking(bundles, reading, options, max(1, _HELD // max(score_tensor(outputs[0]).numel(), 1))), outputs


def _importance(visit: Visit, site: Site, unmasked: Sequence[Any], masking: Masking) -> Tensor:
    """Sums over samples, one for each bundle."""
    bundles = masking.bundles[site.name]
    changes = (
        masking.changes(here, site, bundles, output).sum(1) for here, output in zip(visit, unmasked, strict=True)
    )
    return torch.stack([*changes]).sum(0)


def _first_pass(walk: Walk, sites: Mapping[str, Site]) -> tuple[list[Any], dict[str, list[Tensor]]]:
    """What the network gives batch by batch, and at every station of a site one number per sample and unit.

    Single numbers are taken as they are, of maps the sums of absolute values (eq. 4).
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


def _labels(data: DataPass) -> Tensor | None:
    """Of all samples; None where a batch has none."""
    labels = [batch.labels for batch in data]
    known = [found for found in labels if found is not None]
    return torch.cat(known) if known and len(known) == len(labels) else None
