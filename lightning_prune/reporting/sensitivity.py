"""Sensitivity of a network to pruning one layer at a time, at several shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_prune.extras import new_figure, require
from lightning_prune.reporting.grid import Grid, Shown, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Sensitivity"]

# With more layers, curves would overlap, and a matrix is drawn instead.
_MOST_CURVES = 10


@dataclass(frozen=True)
class Sensitivity(Shown):
    """The metric after one layer has lost a share of its units, for every layer and share.

    Attributes:
        dense: The metric of the unpruned network.
        shares: Shares removed, ascending, in (0, 1).
        metrics: The metric at each share, by group in the order of execution.
        criterion: The criterion that chose the units.
    """

    dense: float
    shares: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]]
    criterion: str = ""

    def ratios(self, tolerance: float, mode: Literal["max", "min"] = "max") -> dict[str, float]:
        """The largest share that each layer alone can lose before the metric is worse by more than ``tolerance``.

        Use the result as ``pruning_ratio=`` of `StructuredPruning` and `prune`; layers that can lose nothing are
        omitted. Pruning all layers costs more than pruning each one alone, so choose a tolerance well below the
        acceptable loss of the whole network.

        Args:
            tolerance: Accepted loss of the metric, at least 0.
            mode: ``"max"`` if higher is better (an accuracy), ``"min"`` if lower is better (a loss).
        """
        if not tolerance >= 0:
            raise ValueError(f"expected a `tolerance` of at least 0, got {tolerance}. It is a difference.")
        if mode not in ("max", "min"):
            raise ValueError(f'expected `mode` of "max" or "min", got {mode!r}')
        sign = 1 if mode == "max" else -1
        ratios = {}
        for name, values in self.metrics.items():
            bearable = 0.0
            for share, value in zip(self.shares, values, strict=True):
                if not sign * (self.dense - value) <= tolerance:  # NaN is worse
                    break
                bearable = share
            if bearable:
                ratios[name] = bearable
        return ratios

    def grids(self) -> tuple[Grid, ...]:
        """The table: one row per layer, one column per share."""
        columns = ("layer", *(f"{100 * share:.0f} %" for share in self.shares))
        rows = tuple((name, *map(number, values)) for name, values in self.metrics.items())
        note = (
            f"Metric after one layer has lost this share of its units ({self.criterion}); dense {number(self.dense)}."
        )
        return (Grid("Sensitivity", columns, rows, note=note),)

    def figure(self) -> Figure:
        """One curve per layer; with more than ten layers, a matrix of layers and shares. Needs the extra ``plot``."""
        many = len(self.metrics) > _MOST_CURVES
        size = (8.5, max(4.0, 0.2 * len(self.metrics) + 1.5)) if many else (7.5, 4.5)
        figure = new_figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots()
        (self._matrix if many else self._curves)(figure, axes)
        figure.suptitle(
            f"One layer cut at a time, by {self.criterion}" if self.criterion else "One layer cut at a time"
        )
        return figure

    def _curves(self, _: Figure, axes: Any) -> None:
        percent = [0.0, *(100 * share for share in self.shares)]
        colours = require("matplotlib", extra="plot").colormaps["viridis"]
        last = max(len(self.metrics) - 1, 1)
        for i, (name, values) in enumerate(self.metrics.items()):
            axes.plot(percent, [self.dense, *values], "o-", ms=4, lw=1.5, color=colours(0.92 * i / last), label=name)
        axes.axhline(self.dense, color="black", lw=0.8, ls=(0, (4, 3)))
        axes.set(xlabel="units of the layer removed (%)", ylabel="metric")
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small")

    def _matrix(self, figure: Figure, axes: Any) -> None:
        image = axes.imshow([list(values) for values in self.metrics.values()], aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(self.metrics)), list(self.metrics), fontsize="small")
        axes.set_xticks(range(len(self.shares)), [f"{100 * share:.0f}" for share in self.shares])
        axes.set_xlabel("units of the layer removed (%)")
        figure.colorbar(image, label=f"metric (dense {number(self.dense)})")
