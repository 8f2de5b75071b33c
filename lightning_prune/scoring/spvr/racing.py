"""A ranking that is only as good as a plan needs it: groups whose place is decided are masked in no further samples."""

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
from lightning_prune.scoring.spvr.walked import Masking, Ranking, RankingOptions, first_stations, prepared
from lightning_prune.scoring.walk import Here, Walk

__all__ = ["Race", "RaceKind", "raced"]

#: Whether the plan equals that of the full ranking, or nearly always.
RaceKind = Literal["exact", "statistical"]
#: Bundles by site, and a number for each: which of them decide a plan, in the order of those numbers.
Decides = Callable[[Mapping[str, Sequence[Sequence[int]]], Mapping[str, Tensor]], Mapping[str, Tensor]]

_PARTS = 50  # that the samples are looked at in, at most
_WINDOW = 4  # parts by which the change of what is left is judged
_DEVIATIONS = 3  # standard errors of that


@dataclass(frozen=True)
class Race:
    """When groups need no further samples.

    Samples are looked at in the order of the unmasked network's certainty, the least certain first, in up to 50 parts.
    Terms are never negative, so what was summed up is a lower bound of a score, and after a part a group stays for good
    if it is above what the threshold of the plan can be expected to reach.

    ``"exact"``: groups that go are masked in all samples. In the end every score that decides the plan has to be
    complete; groups for which that was not expected are masked in the samples that they lack. So the plan is that of
    the full ranking: all other groups come behind it with their lower bounds, hence with their scores.

    ``"statistical"``: a group also goes for good if it is below the threshold by more than what is expected of the
    samples that are left, the mean of its last four parts and three standard errors. Nothing is completed.

    Attributes:
        kind: Which.
        decides: Which bundles' scores decide the plan, by the bundles of each site and a number for each of them.
        key: Whatever else ``decides`` depends on, for a race that was killed.
        samples: Samples of a part, at least: smaller parts decide earlier, and each of them costs some time.
    """

    kind: RaceKind
    decides: Decides
    key: str = ""
    samples: int = 16


def raced(
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
    """Rank as `rank` does, as far as a plan needs it; the arguments are the same.

    Args:
        model: The network; left as it is.
        data: The samples; under several processes each has its own.
        sites: Where units are masked, by name.
        options: What is measured and how.
        race: When a group needs no further samples.
        folder: Where finished parts are written down: a race that was killed goes on from there.
        progress: Called with the samples that were looked at, the groups of units decided, and their number.
        gather: Rows of all processes, from those of this one.
        agree: Whether something holds on all processes, by what holds on this one.
    """
    began, stations = perf_counter(), first_stations(sites)
    look = Walk(model, data, stations, plain=True)
    masking, outputs = prepared(look, sites, options, gather)
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
    """The mean distance of the two most probable classes' probabilities, by sample."""
    found = []
    for output in outputs:
        two = masking.reading.log_probabilities(score_tensor(output)).topk(2, 1).values.exp()
        found.append((two[:, 0] - two[:, 1]).double().mean(1).cpu())
    return torch.cat(found)


@final
class _State:
    """How far a race is.

    Attributes:
        parts: Number of parts of the samples, the most of any process.
        scores: What was summed up, by site.
        done: In how many parts each bundle was masked, by site.
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
        """One part after the other, and what then lacks."""
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
        """Which bundles need no further samples."""
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
        """The highest score that decides the plan, by what was summed up."""
        decides = self.race.decides(self.masking.bundles, self.scores)
        return max((float(self.scores[name][found].max()) for name, found in decides.items() if found.any()), default=0)

    def _complete(self) -> bool:
        """Mask bundles that decide the plan in the samples that they lack; whether there were any."""
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
        """Mask bundles in those of some parts in which they were not masked."""
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

    def _add(self, sums: Tensor, here: Here, name: str, chosen: Tensor) -> None:
        chosen = chosen[self.done[name][chosen] <= here.number]
        if len(chosen):
            bundles = [self.masking.bundles[name][number] for number in chosen.tolist()]
            changes = self.masking.changes(here, self.sites[name], bundles, self.outputs[here.number])
            sums[0, chosen] += changes.sum(1)
            sums[1, chosen] += changes.square().sum(1)

    # -- a race that was killed ---------------------------------------------------------------------------------------

    def _read(self) -> int:
        """Take what was written down; the first part that is to be looked at."""
        notes = self.walk.notes
        if notes is None:
            return 0
        last = next((part for part in reversed(range(self.parts)) if notes.read(part) is not None), -1)
        last = int(self.gather(torch.tensor([[last]])).min())  # a process may have been killed before it wrote
        if last >= 0 and (found := notes.read(last)) is not None:
            self.scores, self.done, self.decided = found["scores"], found["done"], found["decided"]
            self.window, self.threshold = found["window"], found["threshold"]
        return last + 1

    def _write(self, part: int) -> None:
        if self.walk.notes is not None:
            names = ("scores", "done", "decided", "window", "threshold")
            self.walk.notes.write(part, {name: getattr(self, name) for name in names})
