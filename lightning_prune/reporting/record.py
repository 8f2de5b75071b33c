"""The record of pruning in a run: sizes, cuts and metrics, and values derived from them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.reporting.comparison import ComparedNetwork
from lightning_prune.reporting.layer_scores import ScoredDepth, ScoredLayer
from lightning_prune.reporting.measure import Timing
from lightning_prune.reporting.metric_names import data_of_metric, kind_of_metric, mode_of_metric
from lightning_prune.structure import Size, Structure
from lightning_prune.structure.head_features import SUFFIX

__all__ = ["Cut", "Measurement", "Record", "Scores", "SizeCheckpoint", "size_of", "timed"]


def size_of(structure: Structure, dense: Size | None = None, backbone: Collection[str] | None = None) -> Size:
    """The size of a network, as far as it is known without running it.

    Args:
        structure: Structure of the current network.
        dense: Whether to return the size of the dense network.
        backbone: The modules of the backbone, see `backbone_modules`; their parameters in the dense network are
            unknown if layers were removed.
    """
    size, cost = dense or Size.of(structure), structure.cost
    # If a layer was removed, its parameters are missing in the sum.
    is_whole = backbone is not None and cost.params(size.widths) == size.params
    parameters = cost.params(size.widths, backbone) if is_whole else None
    reachable = structure.reachable if size.widths == structure.widths else {}
    return replace(size, backbone=parameters, reachable=reachable)


def timed(size: Size, timings: Mapping[int, Timing]) -> Size:
    """The same size with measurements of `latency`."""
    spread = {batch: timing.spread for batch, timing in timings.items() if timing.spread is not None}
    return replace(size, latency={batch: timing.ms for batch, timing in timings.items()}, latency_spread=spread)


@dataclass(frozen=True)
class Scores:
    """Summary of the scores of a group's units before a cut.

    Attributes:
        min: Lowest score.
        q25: First quartile.
        median: Median.
        q75: Third quartile.
        max: Highest score.
        removed: Highest score of a removed unit; ``None`` if none was removed.
    """

    min: float
    q25: float
    median: float
    q75: float
    max: float
    removed: float | None = None

    @classmethod
    def of(cls, values: Tensor, kept: Iterable[int] | None = None) -> Scores:
        """The summary for a group whose units ``kept`` remain; all units if it is not given."""
        shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=values.dtype, device=values.device)
        gone = [] if kept is None else sorted(set(range(len(values))) - set(kept))
        low, q25, median, q75, high = torch.quantile(values, shares).tolist()
        return cls(low, q25, median, q75, high, float(values[gone].max()) if gone else None)


@dataclass(frozen=True)
class Cut:
    """A cut.

    Attributes:
        index: Number of the cut, from 0.
        epoch: Epochs trained before the cut.
        step: Optimizer steps before the cut.
        before: Units before the cut, for the groups that changed.
        after: Units after the cut, for the same groups.
        size: Size of the network after the cut, without ``widths``.
        seconds: Duration of the cut.
        scores: Scores of the units before the cut, by group, if units are scored.
    """

    index: int
    epoch: int
    step: int
    before: Mapping[str, int]
    after: Mapping[str, int]
    size: Size
    seconds: float
    scores: Mapping[str, Scores] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        size: Size,
        index: int,
        epoch: int,
        step: int,
        before: Mapping[str, int],
        after: Mapping[str, int],
        seconds: float,
    ) -> Cut:
        """The cut that resulted in a network of this size."""
        return cls(index, epoch, step, dict(before), dict(after), replace(size, widths={}, reachable={}), seconds)


@dataclass(frozen=True)
class Measurement:
    """Metrics after ``step`` optimizer steps, in the epoch with Lightning's number ``epoch``."""

    epoch: int
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class SizeCheckpoint:
    """A checkpoint of the network at one of its sizes.

    Attributes:
        file: File of the checkpoint, relative to the report.
        params: Number of parameters.
        macs: MACs per sample.
        epoch: Epochs trained before saving.
        step: Optimizer steps before saving.
        metric: The last value of the main metric at this size; ``None`` if it was not measured.
    """

    file: str
    params: int
    macs: int
    epoch: int
    step: int
    metric: float | None = None


@dataclass
class Record:
    """The data of a `Report`.

    Attributes:
        dense: Size of the network before its first cut.
        final: Size of the network at the end.
        cuts: Cuts in order.
        history: Metrics in order of their steps.
        config: The configuration, in plain values.
        versions: Versions of the packages, see `versions`.
        seed: Seed of the run.
        metric: Name of the main metric; by default the first logged accuracy, else the first loss; validation metrics
            come first.
        size_checkpoints: Checkpoints of each size, if they were saved.
        notes: Other events, as sentences.
        start: Size of the network at the start of this report, if it was pruned earlier.
        earlier: Number of cuts before this report.
        what: What is removed and counted in ``widths``: units of groups, or with masks, weights of layers.
        scored: Layers scored by surrogates.
        depths: Places at which the backbone could be truncated, if they were scored.
    """

    dense: Size | None = None
    final: Size | None = None
    cuts: list[Cut] = field(default_factory=list)
    history: list[Measurement] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    metric: str | None = None
    size_checkpoints: list[SizeCheckpoint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    start: Size | None = None
    earlier: int = 0
    what: Literal["units", "weights"] = "units"
    scored: list[ScoredLayer] = field(default_factory=list)
    depths: list[ScoredDepth] = field(default_factory=list)

    # collecting

    def log(self, epoch: int, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Add metrics; those of an existing step are merged (validation ends before the training epoch does).

        Args:
            epoch: Number of the epoch, from 0.
            step: Optimizer steps trained so far.
            metrics: Numbers by name, as in ``trainer.callback_metrics``.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if self.history and self.history[-1].step == step:
            last = self.history.pop()
            epoch, values = last.epoch, {**last.metrics, **values}  # at the end, Lightning's epoch is higher by one
        self.history.append(Measurement(epoch, step, values))

    def pruned_before(self, dense: Size, present: Size, cuts: int) -> None:
        """Record that the network was pruned before this report.

        Args:
            dense: Size of the network before its first cut, as far as it is known.
            present: Size of the current network.
            cuts: Number of cuts between the two.
        """
        self.dense, self.earlier = dense, cuts
        self.start = replace(present, widths={name: present.widths.get(name, 0) for name in dense.widths})

    # reading

    @property
    def widths(self) -> dict[str, int]:
        """Units per group after the last cut."""
        widths = dict(self.dense.widths) if self.dense else {}
        widths |= self.start.widths if self.start else {}
        for cut in self.cuts:
            widths.update(cut.after)
        return widths

    @property
    def size(self) -> Size | None:
        """Size of the current network: at the end, after the last cut, or dense."""
        if self.final or not self.cuts:
            return self.final or self.start or self.dense
        return replace(self.cuts[-1].size, widths=self.widths)

    @property
    def epochs(self) -> int:
        """Number of epochs trained at the last measurement, including a started one."""
        return self.history[-1].epoch + 1 if self.history else 0

    @property
    def trained_before(self) -> str | None:
        """Training before the first cut as a part of the run's, such as "2 of 6 epochs"; None if it was all or none."""
        first = self.cuts[0] if self.cuts else None
        if first is None or not self.history:
            return None
        if 0 < first.epoch < self.epochs:
            return f"{first.epoch} of {self.epochs} epochs"
        steps = self.history[-1].step
        return f"{first.step:,} of {steps:,} steps" if first.epoch == 0 and 0 < first.step < steps else None

    @property
    def when(self) -> tuple[str, str]:
        """The times of the first and the last column of the report, as text."""
        if not self.cuts:
            return "", ""
        part, earlier = self.trained_before, self.start is not None
        before = "before the first cut" if part is None or earlier else "not fully trained"
        now = f"after {self.epochs} epochs" if self.epochs > 1 else "at the end" if self.history else ""
        return f"after {part}, {before}" if part else before, now

    @property
    def dense_widths(self) -> dict[str, int]:
        """Units of the dense network by group, without features of heads of which none was removed.

        Those are pruned only where they are named, and belong to heads, which are counted.
        """
        now = self.widths
        dense = self.dense.widths if self.dense else {}
        return {name: n for name, n in dense.items() if not name.endswith(SUFFIX) or now.get(name, n) < n}

    @property
    def pruning_ratio(self) -> float:
        """Share of the units (with masks: of the weights) that is removed, in [0, 1)."""
        dense, now = self.dense_widths, self.widths
        return 1 - sum(now[name] for name in dense) / sum(dense.values()) if sum(dense.values()) else 0.0

    @property
    def main_metric(self) -> str | None:
        """Name of the main metric, ``None`` if nothing suitable was logged."""
        names = list(dict.fromkeys(name for row in self.history for name in row.metrics))
        if self.metric is not None:
            return self.metric if self.metric in names else None
        candidates = [name for name in names if not name.endswith("_step") and kind_of_metric(name) is not None]
        return min(candidates, key=lambda name: (kind_of_metric(name), data_of_metric(name)), default=None)

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether higher or lower is better for the main metric, by its name."""
        return mode_of_metric(self.main_metric or "") or "max"

    def values(self, name: str) -> list[tuple[int, float]]:
        """Every value of a metric with its step."""
        return [(row.step, row.metrics[name]) for row in self.history if name in row.metrics]

    def between(self, first: int, last: float) -> list[float]:
        """Values of the main metric measured after step ``first`` and up to step ``last``."""
        return [value for step, value in self.values(self.main_metric or "") if first < step <= last]

    def around(self, cut: Cut) -> tuple[float | None, float | None, float | None]:
        """The main metric: last value before a cut, first value after it, last value before the next cut or the end."""
        following = [other.step for other in self.cuts[self.cuts.index(cut) + 1 :]]
        before = self.between(-1, cut.step)
        after = self.between(cut.step, following[0] if following else math.inf)
        return before[-1] if before else None, after[0] if after else None, after[-1] if after else None

    @property
    def outcome(self) -> tuple[float | None, float | None, float | None]:
        """The main metric before the first cut, the best at the final size, and the last."""
        before = self.between(-1, self.cuts[0].step if self.cuts else math.inf)
        after = self.between(self.cuts[-1].step if self.cuts else -1, math.inf)
        real = [value for value in after if not math.isnan(value)]
        best = (max(real) if self.mode == "max" else min(real)) if real else None
        return before[-1] if before else None, best, after[-1] if after else None

    @property
    def shows_depth(self) -> bool:
        """Whether the report shows parameters over depth: for runs that score layers and have a backbone."""
        return bool(self.scored and self.final and self.dense and len(self.dense.layers) > 1)

    def networks(self) -> list[ComparedNetwork]:
        """The network at every size with a measured main metric, just before the next cut or at the end.

        These are the saved checkpoints of each size, if any; otherwise the networks between cuts.
        """
        found: list[tuple[int, int, float | None]] = [(s.params, s.macs, s.metric) for s in self.size_checkpoints]
        first, name = self.start or self.dense, self.main_metric
        if not found and first is not None:
            found = [(first.params, first.macs, self.outcome[0])]
            found += [(cut.size.params, cut.size.macs, self.around(cut)[2]) for cut in self.cuts]
        last = len(found) - 1
        return [
            ComparedNetwork("", name or "", metric, params, macs, is_final=place == last)
            for place, (params, macs, metric) in enumerate(found)
            if metric is not None and not math.isnan(metric)
        ]

    def summary(self) -> dict[str, float]:
        """The results of the run: `metrics`, remaining shares in [0, 1], and the main metric of each network."""
        numbers, size, name = self.metrics(), self.size, self.main_metric
        if self.dense is not None and size is not None:
            shares = {"params": (size.params, self.dense.params), "macs": (size.macs, self.dense.macs)}
            numbers |= {f"pruning/{what}_left": now / whole for what, (now, whole) in shares.items() if whole}
        before, best, last = self.outcome
        if name is not None:
            found = {name: last, f"pruning/{name}_best": best}
            found |= {f"pruning/{name}_dense": before} if self.start is None else {}
            numbers |= {key: value for key, value in found.items() if value is not None}
        return numbers

    def at_step(self, step: int) -> dict[str, Any]:
        """The network after this many optimizer steps: its size, and the main metric at that time."""
        made = [cut for cut in self.cuts if cut.step < step]
        size = made[-1].size if made else self.start or self.dense
        if size is None:
            return {"step": step}
        what = "params" if self.what == "units" else "nonzero_weights"
        known = {"step": step, what: size.params, "macs": size.macs, "cuts": self.earlier + len(made)}
        measured = [value for at, value in self.values(self.main_metric or "") if at <= step]
        return known | ({str(self.main_metric): measured[-1]} if measured else {})

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger: current size, share removed, width of every group, and measurements at the end.

        ``pruning/params`` includes masked weights; ``pruning/nonzero_weights`` does not.
        """
        size = self.size
        if size is None:
            return {}
        numbers: dict[str, float] = {
            "pruning/params": size.params + (size.zeros or 0),
            "pruning/macs": size.macs,
            "pruning/ratio": self.pruning_ratio,
        }
        if self.what == "weights" and self.dense is not None:
            numbers["pruning/sparsity"] = self.pruning_ratio
            numbers["pruning/nonzero_weights"] = size.params
            now = self.widths
            numbers |= {f"pruning/sparsity/{n}": 1 - now[n] / whole for n, whole in self.dense.widths.items()}
        else:
            numbers |= {f"pruning/width/{name}": width for name, width in self.widths.items()}
        if size.backbone is not None:
            numbers["pruning/backbone_params"] = size.backbone
        if size.memory is not None:
            numbers["pruning/memory_bytes"] = size.memory
        if size.table_latency is not None:
            numbers["pruning/latency_ms"] = size.table_latency
        if size is self.final and size.bytes is not None:
            numbers["pruning/disk_bytes"] = size.bytes
        timed = size.latency if size is self.final else {}
        return numbers | {f"pruning/latency_ms/batch_{batch}": ms for batch, ms in timed.items()}
