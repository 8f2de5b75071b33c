"""Figures of a hyperparameter performance space (Matthiesen, 2023, chapters 3 and 4), from numbers alone.

Accuracies are arrays with one number for each configuration; a threshold is in their unit. A configuration that was not
run is NaN and belongs to no region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

__all__ = [
    "Ellipse",
    "Interval",
    "Risk",
    "best_line",
    "bootstrap",
    "confidence_level",
    "cross_fitted_risk",
    "ellipse",
    "mean_interval",
    "performance_risk",
    "region_of_interest",
    "within_twice",
]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

#: Points that an ellipse is fitted to at least.
FEWEST = 5


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t) of at least two independent values.

    With more than 31 values the quantile is that of 31, which is up to 4 % too large.
    """
    if len(values) < 2:
        raise ValueError(f"expected at least two values, got {len(values)}")
    return fmean(values), _T[min(len(values) - 1, len(_T)) - 1] * stdev(values) / len(values) ** 0.5


def region_of_interest(accuracy: FloatArray, threshold: float) -> BoolArray:
    r"""The x-ROI: configurations with :math:`f(\theta) \ge f(\theta^*) - x` (eq. 3.3).

    Args:
        accuracy: f, one number for each configuration.
        threshold: x, in the unit of ``accuracy``.

    Raises:
        ValueError: If no configuration was run.
    """
    if not np.isfinite(accuracy).any():
        raise ValueError("expected at least one configuration that was run, got none")
    # Accuracies are multiples of one sample; the difference of two of them is not.
    return np.asarray(np.nan_to_num(accuracy, nan=-np.inf) >= np.nanmax(accuracy) - threshold - 1e-9)


def confidence_level(deviations: float) -> float:
    r"""Share of a bivariate normal distribution outside its ellipse at k deviations: :math:`e^{-k^2/2}` (table 3.5)."""
    return float(np.exp(-(deviations**2) / 2))


@dataclass(frozen=True)
class Ellipse:
    """A confidence ellipse.

    Attributes:
        centre: Mean of the points.
        length: Its longer diameter, in the unit of the points.
        width: Its shorter diameter.
        angle: Direction of the longer diameter, radians from the first axis, in (-π/2, π/2].
        points: How many points it was fitted to.
    """

    centre: tuple[float, float]
    length: float
    width: float
    angle: float
    points: int


def ellipse(points: FloatArray, deviations: float = 2.0) -> Ellipse | None:
    """The confidence ellipse of a sample: mean, and covariance with n - 1.

    It would hold 86.47 % of a normal distribution at two deviations if mean and covariance were known.

    Args:
        points: Shape ``(n, 2)``, in powers of ten for the thesis' figures.
        deviations: Standard deviations from the mean.

    Returns:
        ``None`` for less than five points.
    """
    if len(points) < FEWEST:
        return None
    centre = points.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(points, rowvar=False, ddof=1))
    width, length = 2 * deviations * np.sqrt(np.clip(variances, 0, None))
    x, y = directions[:, 1]
    angle = float(np.arctan2(y, x))
    if angle > np.pi / 2:
        angle -= np.pi
    elif angle <= -np.pi / 2:
        angle += np.pi
    return Ellipse((float(centre[0]), float(centre[1])), float(length), float(width), angle, len(points))


@dataclass(frozen=True)
class Interval:
    """A 95 % bootstrap interval."""

    low: float
    high: float


def bootstrap(
    points: FloatArray, deviations: float = 2.0, draws: int = 1000, seed: int = 0
) -> dict[str, Interval] | None:
    """Bootstrap intervals of an ellipse's figures: percentiles over samples drawn with replacement.

    Returns:
        Intervals of ``length``, ``width``, ``x`` and ``y`` (the centre); ``None`` for less than five points.
    """
    if len(points) < FEWEST:
        return None
    generator = np.random.default_rng(seed)
    drawn = [ellipse(points[generator.integers(len(points), size=len(points))], deviations) for _ in range(draws)]
    figures = np.array([(e.length, e.width, *e.centre) for e in drawn if e is not None])
    low, high = np.percentile(figures, [2.5, 97.5], axis=0)
    names = ("length", "width", "x", "y")
    return {name: Interval(float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


@dataclass(frozen=True, eq=False)
class Risk:
    """The risk of keeping configurations instead of tuning.

    Attributes:
        absolute: d of every configuration, the best accuracy minus its own.
        relative: The same as a share of the best accuracy.
    """

    absolute: FloatArray
    relative: FloatArray

    @property
    def mean(self) -> float:
        """Mean of d."""
        return float(self.absolute.mean())

    @property
    def std(self) -> float:
        """Standard deviation of d, with n."""
        return float(self.absolute.std())

    @property
    def relative_mean(self) -> float:
        """Mean of the relative risk."""
        return float(self.relative.mean())

    @property
    def relative_std(self) -> float:
        """Standard deviation of the relative risk, with n."""
        return float(self.relative.std())

    @property
    def largest(self) -> float:
        """The largest d."""
        return float(self.absolute.max())


def performance_risk(accuracy: FloatArray, region: BoolArray) -> Risk:
    r"""Risk of a network over configurations that were chosen for another one (eqs. 3.4 to 3.6).

    .. math:: d_\theta = f(\theta^*) - f(\theta), \qquad d^R_\theta = d_\theta / f(\theta^*)

    Args:
        accuracy: f of the network, one number for each configuration.
        region: The configurations, those of the unpruned network's 0.5-ROI; those that were not run are left out.
    """
    best = float(np.nanmax(accuracy))
    chosen = accuracy[region & np.isfinite(accuracy)]
    if not len(chosen):
        raise ValueError("expected a region with at least one configuration that was run, got none")
    absolute = best - chosen
    return Risk(absolute, absolute / best if best else np.zeros_like(absolute))


def cross_fitted_risk(accuracy: FloatArray, unpruned: FloatArray, threshold: float) -> Risk | None:
    """Risk with region and optimum chosen by some seeds and measured with another.

    With one sample the unpruned network's own risk is at most the threshold, because the same runs define its region
    and its risk, while a pruned network meets fresh noise. Here both meet it: each seed measures once, what it measures
    was chosen by the mean of the others. Risks of the single seeds are put together, so that one can be negative.

    Args:
        accuracy: f of the network, shape ``(seeds, configurations)``.
        unpruned: f of the unpruned network, the same shape.
        threshold: x of its ROI.

    Returns:
        ``None`` for a single seed.
    """
    seeds = len(accuracy)
    if seeds < 2:
        return None
    absolute, relative = [], []
    for seed in range(seeds):
        others = [other for other in range(seeds) if other != seed]
        region = region_of_interest(_mean(unpruned[others]), threshold) & np.isfinite(accuracy[seed])
        choice = np.where(np.isfinite(accuracy[seed]), _mean(accuracy[others]), np.nan)
        best = accuracy[seed][np.nanargmax(choice)]
        difference = best - accuracy[seed][region]
        absolute.append(difference)
        relative.append(difference / best if best else np.zeros_like(difference))
    return Risk(np.concatenate(absolute), np.concatenate(relative))


def within_twice(risk: Risk, base: Risk) -> float:
    """The verdict: share of the configurations whose risk is at most twice the unpruned network's largest one."""
    return float(np.mean(risk.absolute <= 2 * base.largest + 1e-9))


def best_line(lr: FloatArray, batch_size: int, momentum: float, product: float = 1e-6) -> FloatArray:
    r"""Weight decays with :math:`\mathrm{lr} \cdot \mathrm{wd} / (B (1 - \mu)) \approx 10^{-6}` (eq. 2.2)."""
    return np.asarray(product * batch_size * (1 - momentum) / lr)


def _mean(accuracy: FloatArray) -> FloatArray:
    """Mean over seeds; NaN where one is missing."""
    return np.asarray(np.mean(accuracy, axis=0))
