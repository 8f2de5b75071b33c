"""Pictures of a hyperparameter performance space, in the form of the thesis' figures 4.1 to 4.5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_prune.extras import new_figure, require
from lightning_prune.study.analysis import NARROW, WIDE, Analysis, Space
from lightning_prune.study.axes import Axis
from lightning_prune.study.statistics import Ellipse, best_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

__all__ = ["grid_figure", "risk_figure", "spaces_figure"]

FloatArray = npt.NDArray[np.float64]

# Share of all observations that the colours span.
_TOP = 15

_COLOURS = "viridis"


def spaces_figure(
    analysis: Analysis, batch_size: int | None = None, momentum: float = 0.0, top5: bool = False
) -> Figure:
    """Contours above, runs with confidence ellipses below, a column for each variant; needs the extra ``plot``.

    Colours span the best 15 % of all observations, as in the thesis. What lies below has the lowest colour, while the
    thesis interpolates over it, which paints a good region over bad runs where only one row of the grid is good.

    Args:
        analysis: What to show.
        batch_size: For the line of eq. 2.2, which is left out without it.
        momentum: Of SGD, for the same line.
        top5: Show top-5 instead of top-1.
    """
    columns = len(analysis.spaces)
    figure: Figure = _figure(2.9 * columns + 1.2, 6.4)
    panels = figure.subplots(2, columns, sharex=True, sharey=True, squeeze=False)
    shown = [_shown(space, top5) for space in analysis.spaces]
    scale = _scale(np.concatenate(shown))
    line = _line(analysis, batch_size, momentum)
    for column, (space, accuracy) in enumerate(zip(analysis.spaces, shown, strict=True)):
        above, below = panels[0][column], panels[1][column]
        _contour(above, analysis, accuracy, scale)
        _scatter(below, analysis, space, accuracy, scale)
        for axes in (above, below):
            if line is not None:
                axes.plot(line[:, 0], line[:, 1], "--", color="#D55E00", lw=1.2)
        below.locator_params(nbins=5)
        above.set_title(space.name, fontsize="medium")
        below.set_xlabel(_label(analysis.axes[0]))
    for row in panels:
        row[0].set_ylabel(_label(analysis.axes[1]))
        _limits(row[0], analysis)
    figure.colorbar(
        scale, ax=panels, label=f"top-{5 if top5 else 1} accuracy (%)", extend="min", fraction=0.02, pad=0.01
    )
    return figure


def grid_figure(analysis: Analysis) -> Figure:
    """The grid with the accuracy of the unpruned network at each point, the first grid shaded darker (figure 4.4)."""
    across, down = (len(np.unique(analysis.positions[:, side])) for side in (0, 1))
    figure = _figure(max(4.0, 0.72 * across + 1.5), max(3.0, 0.5 * down + 1.2))
    axes: Axes = figure.add_subplot()
    accuracy = analysis.unpruned.mean
    for (x, y), initial, value in zip(analysis.positions, analysis.initial, accuracy, strict=True):
        colour = "#9ecae1" if initial else "#deebf7"
        axes.scatter(x, y, s=900, marker="s", color=colour, linewidths=0)
        text = "–" if math.isnan(value) else f"{value:.1f}"
        axes.annotate(text, (x, y), ha="center", va="center", fontsize="small")
    prior = analysis.positions[analysis.prior]
    axes.scatter(prior[0], prior[1], s=900, marker="s", facecolors="none", edgecolors="#333333", linewidths=1.2)
    axes.set(xlabel=_label(analysis.axes[0]), ylabel=_label(analysis.axes[1]))
    axes.set_xticks(np.unique(analysis.positions[:, 0]))
    axes.set_yticks(np.unique(analysis.positions[:, 1]))
    axes.margins(0.5 / max(across, 2))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def risk_figure(analysis: Analysis) -> Figure:
    """Absolute and relative performance risk as box plots, the unpruned network darker (figure 4.5)."""
    figure = _figure(max(7.0, 1.5 * len(analysis.spaces) + 2), 4.2)
    left, right = figure.subplots(1, 2)
    names = [space.name.replace(" ", "\n", 1) for space in analysis.spaces]
    risks = [analysis.risks(space) for space in analysis.spaces]
    for axes, part, label in (
        (left, "absolute", "performance risk (percentage points)"),
        (right, "relative", "relative performance risk"),
    ):
        values = [np.concatenate([getattr(risk, part) for risk in each]) for each in risks]
        boxes = axes.boxplot(values, patch_artist=True, showmeans=True, tick_labels=names)
        for place, box in enumerate(boxes["boxes"]):
            box.set(facecolor="#9ecae1" if place else "#3182bd", edgecolor="#333333")
        for median in boxes["medians"]:
            median.set_color("#111111")
        axes.set_ylabel(label)
        axes.tick_params(axis="x", labelsize="small")
        axes.grid(axis="y", alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _contour(axes: Axes, analysis: Analysis, accuracy: FloatArray, scale: ScalarMappable) -> None:
    xs, ys = (np.unique(analysis.positions[:, side]) for side in (0, 1))
    table = np.full((len(ys), len(xs)), np.nan)
    for (x, y), value in zip(analysis.positions, accuracy, strict=True):
        table[np.searchsorted(ys, y), np.searchsorted(xs, x)] = value
    low, high = scale.get_clim()
    levels = np.linspace(low, high, 13)
    known: Any = np.ma.masked_invalid(table)
    axes.contourf(xs, ys, known, levels=levels, norm=scale.norm, cmap=scale.cmap, extend="min")
    if known.count() and known.max() > levels[0]:
        axes.contour(xs, ys, known, levels=levels[::3], colors="white", linewidths=0.6)


def _scatter(axes: Axes, analysis: Analysis, space: Space, accuracy: FloatArray, scale: ScalarMappable) -> None:
    axes.set_facecolor("#d0d4d8")
    norm: Any = scale.norm
    x, y = analysis.positions.T
    axes.scatter(x, y, c=np.nan_to_num(accuracy), cmap=scale.cmap, norm=norm, s=42, linewidths=0)
    for threshold, colour in ((WIDE, "white"), (NARROW, "black")):
        for _, ellipse in analysis.ellipses(space, threshold):
            _draw(axes, ellipse, colour)


def _draw(axes: Axes, ellipse: Ellipse, colour: str) -> None:
    patches: Any = require("matplotlib.patches", extra="plot")
    angle = math.degrees(ellipse.angle)
    axes.add_patch(
        patches.Ellipse(ellipse.centre, ellipse.length, ellipse.width, angle=angle, fill=False, ec=colour, lw=1.6)
    )


def _scale(values: FloatArray) -> ScalarMappable:
    """Colours that all variants share, over the best 15 % of everything that was observed."""
    seen = values[np.isfinite(values)]
    low, high = float(np.percentile(seen, 100 - _TOP)), float(seen.max())
    colours: Any = require("matplotlib.colors", extra="plot")
    maps: Any = require("matplotlib.cm", extra="plot")
    scale: ScalarMappable = maps.ScalarMappable(colours.Normalize(min(low, high - 0.1), high), _COLOURS)
    return scale


def _line(analysis: Analysis, batch_size: int | None, momentum: float) -> FloatArray | None:
    """The line of eq. 2.2 within the grid, where the axes are a weight decay and a learning rate."""
    decay, rate = analysis.axes
    if batch_size is None or (decay.name, rate.name) != ("weight_decay", "lr"):
        return None
    rates = np.geomspace(analysis.values[:, 1].min(), analysis.values[:, 1].max(), 100)
    decays = best_line(rates, batch_size, momentum)
    inside = (decays >= analysis.values[:, 0].min()) & (decays <= analysis.values[:, 0].max())
    pairs = zip(decays[inside], rates[inside], strict=True)
    points = [(decay.position(float(x)), rate.position(float(y))) for x, y in pairs]
    return np.array(points) if points else None


def _shown(space: Space, top5: bool) -> FloatArray:
    if not top5:
        return space.mean
    count = np.isfinite(space.top5).sum(axis=0)
    return np.where(count > 0, np.nansum(space.top5, axis=0) / np.maximum(count, 1), np.nan)


def _limits(axes: Axes, analysis: Analysis) -> None:
    """The grid and half a step around it: ellipses reach beyond, and are cut off there."""
    for side, limit in ((0, axes.set_xlim), (1, axes.set_ylim)):
        positions: Sequence[float] = analysis.positions[:, side].tolist()
        limit(min(positions) - 0.5 * analysis.axes[side].step, max(positions) + 0.5 * analysis.axes[side].step)


def _label(axis: Axis) -> str:
    name = {"lr": "learning rate", "weight_decay": "weight decay"}.get(axis.name, axis.name)
    return f"log10({name})" if axis.scale == "log" else name


def _figure(width: float, height: float) -> Figure:
    figure = new_figure(figsize=(width, height), dpi=150)
    figure.set_layout_engine("constrained")
    return figure
