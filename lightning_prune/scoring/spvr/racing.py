"""Racing: rank bundles only as accurately as a plan needs, skipping further samples for decided bundles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.data import DataPass
from lightning_prune.scoring.spvr.outputs import score_tensor
from lightning_prune.scoring.spvr.sites import Site
from lightning_prune.scoring.spvr.walk_ranking import Masking, Ranking, RankingOptions, first_stations, prepare_masking
from lightning_prune.scoring.walk import StationBatch, Walk

__all__ = ["Race", "RaceKind", "rank_by_race"]

#: Whether the plan always, or nearly always, equals that of the full ranking.
RaceKind = Literal["exact", "statistical"]
#: Given bundles by site and a score for each, returns a mask of the bundles whose scores decide the plan.
Decides = Callable[[Mapping[str, Sequence[Sequence[int]]], Mapping[str, Tensor]], Mapping[str, Tensor]]

_PARTS = 50  # most parts that samples are processed in
_WINDOW = 4  # parts used to extrapolate scores
_DEVIATIONS = 3  # standard errors added to the extrapolation


@dataclass(frozen=True)
class Race:
    """Settings of a race.

    Samples are processed in up to 50 parts, in the order of the unmasked network's certainty, the least certain first.
    Terms are non-negative, so that partial sums are lower bounds of scores. After each part, bundles above the expected
    final threshold of the plan are decided to stay.

    ``"exact"``: removed bundles are masked in all samples. At the end, every score that decides the plan must be
    complete; bundles with missing samples are completed. The plan then equals that of the full ranking, since all other
    bundles rank behind it with their lower bounds, and hence with their scores.

    ``"statistical"``: bundles are also decided to be removed if they are below the threshold by more than the expected
    sum over the remaining samples: the mean of the last four parts plus three standard errors. Nothing is completed.

    Attributes:
        kind: Kind of race.
        decides: Returns the bundles whose scores decide the plan.
        key: Whatever else ``decides`` depends on, to identify an interrupted race.
        samples: Minimum number of samples per part: smaller parts decide earlier, with more overhead.
    """

    kind: RaceKind
    decides: Decides
    key: str = ""
    samples: int = 16


def rank_by_race(
    model: nn.Module,
    data: DataPass,
    sites: Mapping[str, Site],
    options: RankingOptions,
    race: Race,
    *,
    folder: str | Path | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    agree: Callable[[bool], bool] = bool,
) -> Ranking:
    """Rank like `rank`, but only as accurately as a plan needs.

    Args:
        model: The network, which is not changed.
        data: The samples of this process.
        sites: Sites at which units are masked, by name.
        options: Settings of the ranking.
        race: Settings of the race.
        folder: Folder for finished parts, from which an interrupted race is resumed.
        progress: Called with the samples processed, the bundles decided, and the number of bundles.
        gather: Gathers rows from all processes.
        agree: Reduces a boolean over all processes to whether it holds on all.
    """
    began, stations = perf_counter(), first_stations(sites)
    look = Walk(model, data, stations, plain=True)
    masking, outputs = prepare_masking(look, sites, options, gather)
    order = _certainty(masking, outputs).argsort(stable=True).tolist()
    hardest = data.rearranged(order, max(race.samples, math.ceil(len(data) / _PARTS)))
    walk = Walk(
        model,
        hardest,
        stations,
        memory_limit=options.memory_limit,
        folder=folder,
        options=repr((options, race.kind, race.key)),
        plain=options.plain,
        agree=agree,
    )
    state = _State(walk, sites, masking, race, gather)
    state.run(progress)
    groups = sum(map(len, masking.bundles.values()))
    naive = (groups + 1) * len(data) * walk.forward_macs
    complete = {name: parts >= state.parts for name, parts in state.done.items()}
    seconds = perf_counter() - began
    return Ranking(masking.bundles, state.scores, len(data), look.macs + walk.macs, naive, seconds, complete)


def _certainty(masking: Masking, outputs: Iterable[Any]) -> Tensor:
    """Difference of the two highest class probabilities per sample, averaged over decisions."""
    found = []
    for output in outputs:
        two = masking.reading.log_probabilities(score_tensor(output)).topk(2, 1).values.exp()
        found.append((two[:, 0] - two[:, 1]).double().mean(1).cpu())
    return torch.cat(found)


@final
class _State:
    """State of a race.

    Attributes:
        parts: Number of parts, the maximum over processes.
        scores: Partial sums, by site.
        done: Number of parts in which each bundle was masked, by site.
    """

    def __init__(
        self,
        walk: Walk,
        sites: Mapping[str, Site],
        masking: Masking,
        race: Race,
        gather: Callable[[Tensor], Tensor],
    ) -> None:
        self.walk, self.sites, self.masking, self.race, self.gather = walk, sites, masking, race, gather
        own = walk.data.batch_sizes
        most = int(gather(torch.tensor([[len(own)]])).max())
        sizes = torch.tensor(own + [0] * (most - len(own)))
        self.sizes = [int(size) for size in gather(sizes[None]).sum(0) if size]
        self.parts = len(self.sizes)
        self.outputs = [output for output, _ in walk.first_pass([])]
        counts = {name: len(masking.bundles[name]) for name in sites}
        self.scores = {name: torch.zeros(count, dtype=torch.float64) for name, count in counts.items()}
        self.done = {name: torch.zeros(count, dtype=torch.int64) for name, count in counts.items()}
        self.decided = {name: torch.zeros(count, dtype=torch.bool) for name, count in counts.items()}
        self.window: list[dict[str, Tensor]] = []
        self.threshold = 0.0

    def run(self, progress: Callable[[str, int, int], None]) -> None:
        """Process all parts, then complete missing scores."""
        first = self._read()
        for part in range(first, self.parts):
            self._mask({name: (~decided).nonzero()[:, 0] for name, decided in self.decided.items()}, [part])
            self._decide(part)
            self._write(part)
            decided = sum(int(found.sum()) for found in self.decided.values())
            progress(f"{sum(self.sizes[: part + 1])} of {sum(self.sizes)} samples", decided, self._count)
        while self.race.kind == "exact" and self._complete():
            pass
        progress("all samples", self._count, self._count)

    @property
    def _count(self) -> int:
        return sum(map(len, self.scores.values()))

    def _decide(self, part: int) -> None:
        """Decide which bundles need no further samples."""
        before, self.threshold = self.threshold, self._threshold()
        seen, left = sum(self.sizes[: part + 1]), sum(self.sizes[part + 1 :])
        rate = self.threshold / seen if part == 0 else (self.threshold - before) / self.sizes[part]
        reached = self.threshold + max(rate, 0.0) * left
        rows = sum(self.sizes[max(0, part + 1 - _WINDOW) : part + 1])
        for name, scores in self.scores.items():
            stays, goes = scores > reached, torch.zeros_like(self.decided[name])
            if self.race.kind == "statistical":
                sums, squares = torch.stack([found[name] for found in self.window]).sum(0)
                mean = sums / rows
                error = ((squares / rows - mean**2).clamp(min=0) / rows).sqrt()
                goes = scores + left * (mean + _DEVIATIONS * error) < self.threshold
            self.decided[name] |= stays | goes

    def _threshold(self) -> float:
        """The highest partial score that decides the plan."""
        decides = self.race.decides(self.masking.bundles, self.scores)
        return max((float(self.scores[name][found].max()) for name, found in decides.items() if found.any()), default=0)

    def _complete(self) -> bool:
        """Complete the bundles that decide the plan; returns whether any were incomplete."""
        decides = self.race.decides(self.masking.bundles, self.scores)
        lacking = {
            name: (decides[name] & (done < self.parts)).nonzero()[:, 0]
            for name, done in self.done.items()
            if name in decides
        }
        lacking = {name: found for name, found in lacking.items() if len(found)}
        if lacking:
            first = min(int(self.done[name][found].min()) for name, found in lacking.items())
            self._mask(lacking, range(first, self.parts))
        return bool(lacking)

    def _mask(self, chosen: Mapping[str, Tensor], parts: Sequence[int]) -> None:
        """Mask bundles in the parts in which they were not masked before."""
        found = {name: torch.zeros(2, len(scores), dtype=torch.float64) for name, scores in self.scores.items()}
        batches = [part for part in parts if part < len(self.walk.data.batch_sizes)]
        left = [name for name in self.sites if len(chosen.get(name, ()))]
        if batches and left:
            for visit in self.walk.visits(batches):
                for name in [name for name in left if self.sites[name].first == visit.station]:
                    left.remove(name)
                    for here in visit:
                        self._add(found[name], here, name, chosen[name])
                if not left:
                    break
        for name, sums in found.items():
            together = self.gather(sums[None]).sum(0)
            found[name] = together
            self.scores[name] = self.scores[name] + together[0]
            if len(chosen.get(name, ())):
                self.done[name][chosen[name]] = parts[-1] + 1
        self.window = [*self.window, found][-_WINDOW:]

    def _add(self, sums: Tensor, here: StationBatch, name: str, chosen: Tensor) -> None:
        chosen = chosen[self.done[name][chosen] <= here.number]
        if len(chosen):
            bundles = [self.masking.bundles[name][number] for number in chosen.tolist()]
            changes = self.masking.changes(here, self.sites[name], bundles, self.outputs[here.number])
            sums[0, chosen] += changes.sum(1)
            sums[1, chosen] += changes.square().sum(1)

    # -- resuming ---------------------------------------------------------------------------------------

    def _read(self) -> int:
        """Load the saved state and return the first part to process."""
        cache = self.walk.cache
        if cache is None:
            return 0
        last = next((part for part in reversed(range(self.parts)) if cache.read(part) is not None), -1)
        last = int(self.gather(torch.tensor([[last]])).min())  # a process may have been killed before writing
        if last >= 0 and (found := cache.read(last)) is not None:
            self.scores, self.done, self.decided = found["scores"], found["done"], found["decided"]
            self.window, self.threshold = found["window"], found["threshold"]
        return last + 1

    def _write(self, part: int) -> None:
        if self.walk.cache is not None:
            names = ("scores", "done", "decided", "window", "threshold")
            self.walk.cache.write(part, {name: getattr(self, name) for name in names})
