"""Layer scores of surrogates: a table, histograms of importances, and the score over depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_prune.extras import new_figure, require
from lightning_prune.reporting.grid import MISSING, Grid, Shown, count, number, share
from lightning_prune.reporting.thresholds import SizeAtThreshold, thresholds_grid
from lightning_prune.scoring.xgb import LayerScore, log_importance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "LayerScores",
    "ScoredDepth",
    "ScoredLayer",
    "depths_grid",
    "importance_figure",
    "layers_grid",
    "score_figure",
]

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"
_COLOURS = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#56B4E9")

# Panels per row and per figure; with more layers, only every second, third, ... is shown.
_COLUMNS, _MOST_PANELS = 4, 32

_BINS = 24

# With more layers, names would overlap.
_MOST_NAMES = 60

# Channels are counted that together have this share of the gain.
_MOST_GAIN = 0.99


@dataclass(frozen=True)
class ScoredLayer:
    """One layer in the table.

    Attributes:
        layer: Its name.
        channels: Channels of its output.
        score: μ, the metric on held-out samples.
        unused: Number of channels that the surrogate never uses.
        holding: Number of channels that have 99 % of the surrogate's gain.
        kept: Number of kept channels; None before a decision.
        seconds: Time to fit the surrogate.
    """

    layer: str
    channels: int
    score: float
    unused: int
    holding: int
    kept: int | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, found: LayerScore, kept: int | None = None) -> ScoredLayer:
        """The table row for a layer's score."""
        shares = np.sort(found.share)[::-1]
        held = np.cumsum(shares)
        holding = int(np.searchsorted(held, _MOST_GAIN * held[-1] - 1e-12)) + 1 if held[-1] > 0 else 0
        station, unused = found.station, int((found.importance == 0).sum())
        name = f"{station.layer}, call {station.call + 1}" if station.call else station.layer
        return cls(name, len(found.importance), found.score, unused, holding, kept, found.seconds)


@dataclass(frozen=True)
class ScoredDepth:
    """A place at which a backbone can be truncated.

    Attributes:
        name: The module after which it is truncated.
        convolutions: Number of remaining convolutions.
        width: Channels of the module's output.
        score: μ of this output.
        chosen: Whether the network is truncated here.
    """

    name: str
    convolutions: int
    width: int
    score: float
    chosen: bool = False


def depths_grid(rows: Sequence[ScoredDepth], metric: str) -> Grid:
    """The table of depths, the shallowest first."""
    best = max((row.score for row in rows), default=math.nan)
    cells = tuple(
        (
            row.name,
            count(row.convolutions),
            count(row.width),
            number(row.score),
            number(row.score / best if best > 0 else math.nan),
            "chosen" if row.chosen else "",
        )
        for row in rows
    )
    note = f"Places at which the backbone can be truncated. μ: {metric} on held-out samples."
    return Grid("Depths", ("after", "convolutions", "channels", "μ", "μ*", ""), cells, note=note)


def layers_grid(rows: Sequence[ScoredLayer], metric: str) -> Grid:
    """The table of layers in the order of execution."""
    best = max((row.score for row in rows), default=math.nan)
    cells = tuple(
        (
            row.layer,
            count(row.channels),
            number(row.score),
            number(row.score / best if best > 0 else math.nan),
            share(row.unused, row.channels),
            count(row.holding),
            MISSING if row.kept is None else count(row.kept),
            f"{row.seconds:.3g}",
        )
        for row in rows
    )
    columns = ("layer", "channels", "μ", "μ*", "never used", "99 % of gain", "kept", "seconds")
    note = (
        f"μ: {metric} on held-out samples; μ* = μ / max μ. Never used: channels with an importance of 0. "
        "99 % of gain: number of channels that have 99 % of the surrogate's gain. Seconds: time to fit the surrogate."
    )
    return Grid("Layers", columns, cells, note=note)


class LayerScores(Shown):
    """The result of scoring layers, displayed with `print` or in a notebook.

    Args:
        layers: Scores in the order of execution.
        kept: Kept channels by layer.
        metric: Name of the metric μ.
        depths: Places at which the backbone can be truncated, the shallowest first.
        thresholds: ρ by layer, if a threshold separates kept from removed channels.
        sizes: Sizes at other thresholds, ascending.
        whole: The part whose parameters are counted in ``sizes``.
    """

    def __init__(
        self,
        layers: Sequence[LayerScore],
        kept: Mapping[str, Sequence[int]],
        metric: str,
        depths: Sequence[ScoredDepth] = (),
        thresholds: Mapping[str, float] | None = None,
        sizes: Sequence[SizeAtThreshold] = (),
        whole: str = "the network",
    ) -> None:
        self.layers, self.kept, self.metric, self.depths = tuple(layers), dict(kept), metric, tuple(depths)
        self.thresholds, self.sizes, self.whole = dict(thresholds or {}), tuple(sizes), whole

    @property
    def rows(self) -> list[ScoredLayer]:
        """One row per layer."""
        return [ScoredLayer.of(one, self._number_kept(one)) for one in self.layers]

    def grids(self) -> tuple[Grid, ...]:
        """The table of layers, and those of depths and thresholds, if any."""
        grids = (
            layers_grid(self.rows, self.metric),
            depths_grid(self.depths, self.metric),
            thresholds_grid(self.sizes, self.whole),
        )
        return tuple(grid for grid in grids if grid.rows)

    def channels(self) -> list[tuple[str, int, float, float, str]]:
        """One row per channel: layer, channel, I, Λ, and whether it is kept or gone (empty before a decision)."""
        rows = []
        for found in self.layers:
            kept = self.kept.get(found.station.layer)
            stays = None if kept is None else set(kept)
            numbers = zip(found.importance.tolist(), log_importance(found.importance).tolist(), strict=True)
            for channel, (importance, logarithm) in enumerate(numbers):
                word = "" if stays is None else "kept" if channel in stays else "gone"
                rows.append((found.station.layer, channel, importance, logarithm, word))
        return rows

    def _number_kept(self, found: LayerScore) -> int | None:
        kept = self.kept.get(found.station.layer)
        return None if kept is None else len(kept)


def importance_figure(
    layers: Sequence[LayerScore],
    kept: Mapping[str, Sequence[int]],
    threshold: float | Mapping[str, float] | None = None,
) -> Figure:
    r"""Histograms of :math:`\Lambda = \ln(I + 10^{-16})`, one panel per layer; needs the extra ``plot``.

    Args:
        layers: Scores in the order of execution.
        kept: Kept channels by layer; removed ones are drawn in another colour.
        threshold: ρ, for all layers or by layer, if any; it is marked.
    """
    step = -(-len(layers) // _MOST_PANELS)
    shown = list(layers)[::step] if layers else []
    rows = max(-(-len(shown) // _COLUMNS), 1)
    figure = new_figure(figsize=(3.2 * _COLUMNS, 2.2 * rows + 0.8), dpi=130)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axes, found in zip(panels, shown, strict=False):
        layer = found.station.layer
        marked = threshold.get(layer) if isinstance(threshold, Mapping) else threshold
        _histogram(axes, found, kept.get(layer), marked)
    for axes in list(figure.axes)[len(shown) :]:
        axes.set_visible(False)
    left_out = f" (one in {step} layers)" if step > 1 else ""
    line = ", dashed: ln ρ" if threshold else ""
    title = f"Λ = ln(I + 1e-16) of each layer's channels: kept blue, removed orange{line}{left_out}"
    figure.suptitle(title, fontsize="large")
    return figure


def _histogram(axes: Axes, found: LayerScore, kept: Sequence[int] | None, threshold: float | None) -> None:
    used = found.importance > 0
    stays = np.ones(len(used), dtype=np.bool_)
    if kept is not None:
        stays[:] = False
        stays[list(kept)] = True
    values: npt.NDArray[Any] = log_importance(found.importance)
    if used.any():
        edges = np.linspace(values[used].min() - 0.2, values[used].max() + 0.2, _BINS + 1)
        both = [values[used & stays], values[used & ~stays]]
        axes.hist(both, edges.tolist(), stacked=True, color=[_BLUE, _ORANGE])
    if threshold:
        axes.axvline(math.log(threshold), color="black", lw=1, ls="--")
    never = len(used) - int(used.sum())
    axes.set_title(f"{found.station.layer} ({len(used)})", fontsize="small")
    axes.text(0.02, 0.96, f"μ {found.score:.3f}\n{never} never used", transform=axes.transAxes, va="top", fontsize=7)
    axes.yaxis.set_major_locator(require("matplotlib.ticker", extra="plot").MaxNLocator(4, integer=True))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def score_figure(curves: Mapping[str, Sequence[tuple[str, float]]]) -> Figure:
    """μ* = μ / max μ over depth, one line per surrogate; needs the extra ``plot``.

    Args:
        curves: For each surrogate, the layers with their μ in the order of execution.
    """
    figure = new_figure(figsize=(9, 4.2), dpi=130)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    layers = list(dict.fromkeys(layer for curve in curves.values() for layer, _ in curve))
    places = {layer: place for place, layer in enumerate(layers, 1)}
    for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
        best = max((mu for _, mu in curve), default=math.nan)
        label = f"{name}: best μ {best:.3f} at {max(curve, key=lambda one: one[1])[0]}" if curve else name
        axes.plot(
            [places[layer] for layer, _ in curve], [mu / best for _, mu in curve], "o-", ms=4, color=colour, label=label
        )
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(ylabel="μ* = μ / max μ", xlabel="layer, in the order of execution")
    if len(layers) <= _MOST_NAMES:
        axes.set_xticks(range(1, len(layers) + 1), layers, rotation=90, fontsize=7)
    axes.legend(fontsize="small", frameon=False)
    return figure
