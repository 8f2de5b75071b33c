"""The figure of a comparison: metric against parameters, MACs and latency, with their Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_prune.extras import new_figure
from lightning_prune.reporting.comparison import Comparison, cost_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["comparison_figure"]

# Okabe & Ito's palette; with the markers, 8 × 6 settings can be distinguished.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKS = "osD^vP"

# A cost with a larger ratio of maximum to minimum has a logarithmic axis.
_WIDE = 8.0


def comparison_figure(comparison: Comparison, costs: Sequence[str] | None = None) -> Figure:
    """One panel per cost, with one colour per setting, one line per run, and the Pareto front in grey.

    Needs the extra ``plot``. Networks at the end of a run are filled, those saved earlier are hollow.

    Args:
        comparison: The networks.
        costs: The costs to plot; by default all.
    """
    costs = comparison.costs if costs is None else costs
    figure = new_figure(figsize=(4.4 * len(costs) + 0.8, 4.8), dpi=150)
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, costs, strict=True):
        _panel(axes, comparison, cost)
    panels[0].set_ylabel(comparison.metric)
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper left", ncols=3, frameon=False, fontsize="small")
    return figure


def _panel(axes: Axes, comparison: Comparison, cost: str) -> None:
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    unit = " of one sample" if cost == "macs" else ""
    axes.set_xlabel(f"{cost_name(cost)}{unit}")
    values = [value for network in comparison.networks if (value := network.cost(cost)) is not None]
    if min(values) > 0 and max(values) / min(values) > _WIDE:
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=5)
    _front(axes, comparison, cost)
    for place, setting in enumerate(comparison.settings):
        colour, mark = _COLOURS[place % len(_COLOURS)], _MARKS[place // len(_COLOURS) % len(_MARKS)]
        _setting(axes, comparison, cost, setting, colour, mark)


def _front(axes: Axes, comparison: Comparison, cost: str) -> None:
    front = comparison.front(cost)
    x, y = [network.cost(cost) for network in front], [network.metric for network in front]
    axes.step(x, y, where="post", color="#bbbbbb", lw=4, zorder=0, label="Pareto front")  # type: ignore[arg-type]


def _setting(axes: Axes, comparison: Comparison, cost: str, setting: str, colour: str, mark: str) -> None:
    own = [network for network in comparison.networks if network.setting == setting and network.cost(cost) is not None]
    for run in dict.fromkeys(network.run for network in own):
        line = sorted(
            ((network.cost(cost), network.metric) for network in own if network.run == run), key=lambda p: p[0] or 0
        )
        axes.plot(*zip(*line, strict=True), color=colour, lw=1, alpha=0.6)
    for is_final in (True, False):
        drawn = [network for network in own if network.is_final == is_final]
        axes.plot(
            [network.cost(cost) for network in drawn],  # type: ignore[arg-type]
            [network.metric for network in drawn],
            mark,
            color=colour,
            mfc=colour if is_final else "white",
            ms=6,
            label=setting if is_final else None,
        )
