"""The axes of a study's grid, and how the grid grows while the optimum lies at its edge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

__all__ = ["Axis", "Extent", "Point", "axis_of", "points", "sides"]

#: Steps from the prior on each axis, in the order of the axes.
Point = tuple[int, ...]

#: Lowest and highest number of steps from the prior on each axis.
Extent = tuple[tuple[int, int], ...]

# Digits of a grid value: the same number on every machine, whatever its power function rounds to.
_DIGITS = 6


@dataclass(frozen=True)
class Axis:
    """One hyperparameter of the grid: values in even steps around a prior.

    Attributes:
        key: Dotted key of the recipe, as on the command line (``"optimizer.weight_decay"``).
        prior: The value in the middle, known or believed to be good for the unpruned network.
        step: Distance of neighbouring values: in powers of ten (``"log"``) or as it is (``"linear"``).
        points: Values of the first grid, an odd number of at least 3.
        scale: ``"log"`` or ``"linear"``.

    Raises:
        ValueError: If a number is out of range.
    """

    key: str
    prior: float
    step: float = 0.2
    points: int = 9
    scale: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        where = f"grid: {self.key}:"
        if self.scale not in ("log", "linear"):
            raise ValueError(f'{where} expected `scale` of "log" or "linear", got {self.scale!r}.')
        if not math.isfinite(self.prior) or (self.scale == "log" and self.prior <= 0):
            raise ValueError(
                f"{where} expected a finite `prior`, above 0 on a log scale, got {self.prior}. Give scale: linear for "
                "values that may be 0."
            )
        if not (math.isfinite(self.step) and self.step > 0):
            raise ValueError(f"{where} expected a `step` above 0, got {self.step}.")
        if self.points < 3 or self.points % 2 == 0:
            raise ValueError(
                f"{where} expected an odd number of `points` of at least 3 (the prior is the middle one), got "
                f"{self.points}. A hyperparameter with one value belongs into `set`, not into the grid."
            )

    @property
    def reach(self) -> tuple[int, int]:
        """Lowest and highest number of steps of the first grid."""
        return -(self.points // 2), self.points // 2

    @property
    def name(self) -> str:
        """The hyperparameter's own name, the last part of its key."""
        return self.key.rpartition(".")[2]

    def value(self, steps: int) -> float:
        """The value so many steps from the prior, to six significant digits."""
        exact = self.prior * 10 ** (steps * self.step) if self.scale == "log" else self.prior + steps * self.step
        return float(f"{exact:.{_DIGITS}g}")

    def position(self, value: float) -> float:
        """Coordinate of a value in pictures and ellipses: its decimal logarithm on a log scale."""
        return math.log10(value) if self.scale == "log" else value


def points(extent: Extent) -> Iterator[Point]:
    """Every point of a grid, the last axis varying fastest."""
    return product(*(range(low, high + 1) for low, high in extent))


def sides(extent: Extent, most: int) -> Iterator[tuple[tuple[int, int], Extent]]:
    """Return every side on which a grid may grow, as ``(axis, edge)``, with the grid one step larger there.

    Args:
        extent: The grid as it is.
        most: Values that an axis may have.
    """
    for axis, (low, high) in enumerate(extent):
        if high - low + 1 >= most:
            continue
        for edge, grown in ((low, (low - 1, high)), (high, (low, high + 1))):
            yield (axis, edge), (*extent[:axis], grown, *extent[axis + 1 :])


def axis_of(key: str, settings: Mapping[str, Any], recipe_value: Any) -> Axis:
    """The axis that a definition describes.

    Args:
        key: Dotted key of the recipe.
        settings: What the definition says of it.
        recipe_value: The prior where the definition names none.
    """
    unknown = sorted(settings.keys() - {"prior", "step", "points", "scale"})
    if unknown:
        raise ValueError(f"grid: {key}: expected prior, step, points and scale, got {', '.join(unknown)}.")
    given = {"prior": recipe_value, **settings}
    if given["prior"] is None:
        raise ValueError(f"grid: {key}: expected a `prior`, as the recipe has no value of its own for it.")
    try:
        numbers = {name: float(given[name]) for name in ("prior", "step") if name in given}
    except (TypeError, ValueError):
        raise ValueError(f"grid: {key}: expected numbers for `prior` and `step`, got {dict(given)}.") from None
    step, points, scale = (
        numbers.get("step", Axis.step),
        int(given.get("points", Axis.points)),
        given.get("scale", "log"),
    )
    return Axis(key, numbers["prior"], step, points, scale)
