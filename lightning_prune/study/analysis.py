"""Results of a study as arrays, and the thesis' figures for each variant, per seed and averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_prune.study.axes import Axis
from lightning_prune.study.statistics import (
    Ellipse,
    Interval,
    Risk,
    bootstrap,
    cross_fitted_risk,
    ellipse,
    performance_risk,
    region_of_interest,
    within_twice,
)
from lightning_prune.study.table import Row

__all__ = ["Analysis", "EllipseFigures", "RiskFigures", "Space", "analyse"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

#: Thresholds of the two regions of interest, in percentage points.
WIDE, NARROW = 1.0, 0.5


@dataclass(frozen=True, eq=False)
class Space:
    """The hyperparameter performance space of one variant.

    Attributes:
        name: The variant.
        accuracy: Top-1 in per cent, shape ``(seeds, configurations)``, NaN where a run is missing.
        top5: The same of the best five.
        params: Parameters of the network.
        macs: Its MACs for one sample (1 MAC = 2 FLOPs).
        diverged: Runs that diverged.
    """

    name: str
    accuracy: FloatArray
    top5: FloatArray
    params: int
    macs: int
    diverged: int

    @property
    def mean(self) -> FloatArray:
        """Accuracy of each configuration, mean over the seeds with which it was run; NaN for none."""
        return _nanmean(self.accuracy)

    @property
    def best(self) -> float:
        """The best accuracy of each seed, averaged."""
        return float(np.mean([np.nanmax(row) for row in self.accuracy if np.isfinite(row).any()]))


@dataclass(frozen=True)
class EllipseFigures:
    """An ellipse's figures, averaged over the seeds that have one; see `Ellipse`."""

    length: float
    width: float
    centre: tuple[float, float]
    seeds: int


@dataclass(frozen=True)
class RiskFigures:
    """Risk of a variant at the unpruned network's 0.5-ROI, averaged over seeds.

    Attributes:
        mean: Of d, in percentage points.
        std: Of d.
        relative_mean: Of the relative risk.
        relative_std: Of the relative risk.
        crossed: Mean of d where other seeds have chosen region and optimum; ``None`` for a single seed.
        crossed_std: Its standard deviation.
        within: Share of the configurations within twice the unpruned network's largest risk.
        configurations: Size of the region.
    """

    mean: float
    std: float
    relative_mean: float
    relative_std: float
    crossed: float | None
    crossed_std: float | None
    within: float
    configurations: float


@dataclass(frozen=True, eq=False)
class Analysis:
    """A study's results.

    Attributes:
        axes: The two hyperparameters.
        values: Of every configuration, shape ``(configurations, 2)``.
        positions: The same where they lie in pictures, see `Axis.position`.
        initial: Which configurations are in the first grid.
        seeds: The seeds, in the order of the rows of each variant's accuracies.
        spaces: The variants, the unpruned one first.
    """

    axes: tuple[Axis, Axis]
    values: FloatArray
    positions: FloatArray
    initial: BoolArray
    seeds: tuple[int, ...]
    spaces: tuple[Space, ...]

    @property
    def unpruned(self) -> Space:
        """The variant that the others are compared with."""
        return self.spaces[0]

    @property
    def prior(self) -> int:
        """Index of the configuration in the middle of the first grid."""
        middle = [axis.position(axis.prior) for axis in self.axes]
        return int(np.abs(self.positions - middle).sum(axis=1).argmin())

    def ellipses(self, space: Space, threshold: float) -> list[tuple[int, Ellipse]]:
        """The confidence ellipse of every seed whose region has at least five points."""
        fitted = [(seed, ellipse(points)) for seed, points in self._regions(space, threshold)]
        return [(seed, found) for seed, found in fitted if found is not None]

    def ellipse(self, space: Space, threshold: float) -> EllipseFigures | None:
        """The figures of the thesis' table 4.1, averaged over seeds."""
        found = [ellipse for _, ellipse in self.ellipses(space, threshold)]
        if not found:
            return None
        x, y = np.mean([each.centre for each in found], axis=0)
        length, width = (float(np.mean([getattr(each, name) for each in found])) for name in ("length", "width"))
        return EllipseFigures(length, width, (float(x), float(y)), len(found))

    def intervals(self, space: Space, threshold: float) -> list[tuple[int, int, dict[str, Interval]]]:
        """Seed, points of its region, and bootstrap intervals of its ellipse."""
        drawn = [(seed, len(points), bootstrap(points)) for seed, points in self._regions(space, threshold)]
        return [(seed, count, found) for seed, count, found in drawn if found is not None]

    def centre(self, space: Space) -> FloatArray:
        """Mean position of the 0.5-ROI, averaged over seeds, whatever its size."""
        return np.asarray(np.mean([points.mean(axis=0) for _, points in self._regions(space, NARROW)], axis=0))

    def risks(self, space: Space) -> list[Risk]:
        """Risk at the unpruned network's 0.5-ROI, for each seed."""
        pairs = self._pairs(space)
        return [performance_risk(own, region_of_interest(base, NARROW)) for own, base in pairs]

    def risk(self, space: Space) -> RiskFigures:
        """The figures of the thesis' table 4.2, and further ones."""
        risks, bases = self.risks(space), self.risks(self.unpruned)
        crossed = cross_fitted_risk(space.accuracy, self.unpruned.accuracy, NARROW)
        mean, std, relative_mean, relative_std = (
            float(np.mean([getattr(risk, name) for risk in risks])) for name in _RISK
        )
        return RiskFigures(
            mean,
            std,
            relative_mean,
            relative_std,
            None if crossed is None else crossed.mean,
            None if crossed is None else crossed.std,
            float(np.mean([within_twice(risk, base) for risk, base in zip(risks, bases, strict=True)])),
            float(np.mean([len(risk.absolute) for risk in risks])),
        )

    def edges(self) -> dict[str, list[str]]:
        """Sides of the grid that a 1.0-ROI still touches, in words, with the variants whose region does."""
        found: dict[str, list[str]] = {}
        low, high = self.positions.min(axis=0), self.positions.max(axis=0)
        for space in self.spaces:
            for side, axis in enumerate(self.axes):
                at = np.concatenate([points[:, side] for _, points in self._regions(space, WIDE)])
                ends = [word for word, edge in (("lowest", low), ("highest", high)) if (at == edge[side]).any()]
                for word in ends:
                    found.setdefault(f"{word} {axis.name}", []).append(space.name)
        return found

    def _regions(self, space: Space, threshold: float) -> list[tuple[int, FloatArray]]:
        return [
            (seed, self.positions[region_of_interest(accuracy, threshold)])
            for seed, accuracy in zip(self.seeds, space.accuracy, strict=True)
            if np.isfinite(accuracy).any()
        ]

    def _pairs(self, space: Space) -> list[tuple[FloatArray, FloatArray]]:
        """Accuracies of a variant and of the unpruned network with the same seed."""
        pairs = zip(space.accuracy, self.unpruned.accuracy, strict=True)
        return [(own, base) for own, base in pairs if np.isfinite(own).any() and np.isfinite(base).any()]


_RISK = ("mean", "std", "relative_mean", "relative_std")


def analyse(rows: Iterable[Row], axes: tuple[Axis, Axis]) -> Analysis:
    """Arrange the rows of a table, in its order of variants.

    Raises:
        ValueError: If there is no run of the first variant, the unpruned network, or of another one.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("expected a table with finished runs, got an empty one. Let the study run first.")
    seeds = tuple(sorted({row.seed for row in rows}))
    configurations = sorted({row.values for row in rows})
    place = {values: index for index, values in enumerate(configurations)}
    values = np.array(configurations)
    positions = np.array([[axis.position(v) for axis, v in zip(axes, c, strict=True)] for c in configurations])
    steps = np.array([Row.point(_row(rows, c), axes) for c in configurations])
    low, high = np.array([axis.reach for axis in axes]).T
    spaces = [
        _space(name, [row for row in rows if row.variant == name], seeds, place)
        for name in dict.fromkeys(row.variant for row in rows)
    ]
    initial = ((steps >= low) & (steps <= high)).all(axis=1)
    return Analysis(axes, values, positions, initial, seeds, tuple(spaces))


def _space(name: str, rows: Sequence[Row], seeds: tuple[int, ...], place: dict[tuple[float, ...], int]) -> Space:
    accuracy, top5 = (np.full((len(seeds), len(place)), np.nan) for _ in range(2))
    for row in rows:
        at = seeds.index(row.seed), place[row.values]
        accuracy[at] = 100 * row.top1
        top5[at] = np.nan if row.top5 is None else 100 * row.top5
    sizes = [(row.params, row.macs) for row in rows]
    params, macs = (round(float(np.mean(each))) for each in zip(*sizes, strict=True))
    return Space(name, accuracy, top5, params, macs, sum(row.diverged for row in rows))


def _row(rows: Sequence[Row], values: tuple[float, ...]) -> Row:
    return next(row for row in rows if row.values == values)


def _nanmean(accuracy: FloatArray) -> FloatArray:
    count = np.isfinite(accuracy).sum(axis=0)
    return np.where(count > 0, np.nansum(accuracy, axis=0) / np.maximum(count, 1), np.nan)
