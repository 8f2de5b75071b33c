"""The figure of a run: metric and size over time with the cuts marked, and the width of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_prune.extras import new_figure
from lightning_prune.reporting.grid import count, number, plural, share
from lightning_prune.reporting.metric_names import family

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_prune.reporting.record import Cut, Record

__all__ = ["headline", "panel_figures", "report_figure", "scores_figure"]

FloatArray = npt.NDArray[np.float64]

# Okabe & Ito's palette: distinguishable with every common colour blindness, and by lightness in print.
_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
# Separates the parts of a headline.
_BETWEEN = "   ·   "

# With more layers, names would overlap; the axis then shows positions in the order of execution.
_MOST_NAMES = 70

# Characters that fit side by side below the widths, per inch.
_CHARACTERS = 10

# Characters of a legend that fit in one line above a panel.
_LEGEND = 75

# Two layers alone would make bars as wide as walls.
_FEWEST_SLOTS = 4


def report_figure(report: Record) -> Figure:
    """Three panels: the main metric over the run, remaining parameters and MACs, widths before and after.

    Needs the extra ``plot``; does not touch matplotlib's global state. Save it with ``figure.savefig("report.png")``.

    Args:
        report: The report; a panel without data shows a note instead.
    """
    names = _groups(report)
    width = min(16.0, max(10.0, 0.22 * len(names) + 3))
    figure = new_figure(figsize=(width, 7.5 + _below(names, width)), dpi=150)
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
    grid = figure.add_gridspec(2, 2)
    clock = _Clock(report)
    _metric_panel(figure.add_subplot(grid[0, 0]), report, clock)
    _size_panel(figure.add_subplot(grid[0, 1]), report, clock)
    _width_panel(figure.add_subplot(grid[1, :]), report)
    lines = headline(report).split(_BETWEEN)
    figure.suptitle("\n".join(lines), fontsize="large" if max(map(len, lines)) < 80 else "small")
    return figure


def panel_figures(report: Record) -> tuple[Figure, Figure, Figure]:
    """The panels of `report_figure` as separate figures, small enough for a phone."""
    figures = _figure(5.2, 3.6), _figure(5.2, 3.6), _with_names(_groups(report))
    metric, size, widths = (figure.subplots() for figure in figures)
    clock = _Clock(report)
    _metric_panel(metric, report, clock)
    _size_panel(size, report, clock)
    _width_panel(widths, report)
    return figures


def scores_figure(cut: Cut) -> Figure:
    """Scores of the units before a cut: range, quartiles and median per group, and the highest score removed.

    Args:
        cut: A cut with scores.
    """
    figure = _with_names(list(cut.scores))
    axes, found, x = figure.subplots(), list(cut.scores.values()), range(len(cut.scores))
    axes.vlines(x, [s.min for s in found], [s.max for s in found], color=_GREY, lw=1.2, label="lowest to highest")
    axes.vlines(x, [s.q25 for s in found], [s.q75 for s in found], color=_BLUE, lw=7, label="middle half")
    axes.plot(x, [s.median for s in found], "o", color="white", ms=3.5, zorder=3)
    gone = [(place, s.removed) for place, s in enumerate(found) if s.removed is not None]
    if gone:
        axes.plot(*zip(*gone, strict=True), "_", color=_ORANGE, ms=16, mew=2.2, zorder=4, label="removed up to here")
    lowest, highest = min(s.min for s in found), max(s.max for s in found)
    if lowest > 0 and highest > 50 * lowest:
        axes.set_yscale("log")
    axes.set(ylabel="score", xlim=(-0.7, max(len(found), _FEWEST_SLOTS) - 0.3))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, lw=0.6)
    _names(axes, list(cut.scores), len(found))
    _legend(axes)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = new_figure(figsize=(width, height), dpi=150)
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    return figure


def _groups(report: Record) -> list[str]:
    return list(report.dense_widths)


def _with_names(names: Sequence[str]) -> Figure:
    """A figure with one bar per group and room for the groups' names."""
    width = min(16.0, max(5.2, 0.22 * len(names) + 1))
    return _figure(width, 3.6 + _below(names, width))


def _below(names: Sequence[str], width: float) -> float:
    """Inches to add to the height of a figure for long names, which are written upwards."""
    if not names or len(names) > _MOST_NAMES or not _turned(names, max(len(names), _FEWEST_SLOTS), width):
        return 0.0
    return 0.07 * max(0, max(map(len, names)) - 20)


def _turned(names: Sequence[str], slots: int, width: float) -> bool:
    """Whether names as tick labels would overlap side by side."""
    return slots * max(map(len, names)) > _CHARACTERS * width


class _Clock:
    """Maps optimizer steps to the time axis: in epochs, or in steps if there was at most one epoch."""

    def __init__(self, report: Record) -> None:
        # Metrics of an epoch are logged at its end, so its last recorded step is that end.
        ends = {row.epoch: row.step for row in report.history}
        self.in_epochs = len(ends) > 1
        self.label = "epochs trained" if self.in_epochs else "optimizer steps trained"
        self._steps = [0, *ends.values()]
        self._epochs = [0, *(epoch + 1 for epoch in ends)]
        last = max([0, *ends.values(), *(cut.step for cut in report.cuts)])
        self.end = float(self.at([last])[0]) or 1.0

    def at(self, steps: list[int]) -> FloatArray:
        """Positions of steps on the axis."""
        if not self.in_epochs:
            return np.asarray(steps, dtype=np.float64)
        return np.interp(steps, self._steps, self._epochs)


def _metric_panel(axes: Axes, report: Record, clock: _Clock) -> None:
    main = report.main_metric
    _frame(axes, clock, report, main or "metric")
    if main is None:
        _note(axes, "no accuracy or loss was logged" if report.metric is None else f"{report.metric} was not logged")
        return
    relatives = list(dict.fromkeys(n for row in report.history for n in row.metrics if family(n) == family(main)))
    shown = [main, *(name for name in relatives if name != main and not name.endswith("_step"))]
    styles = [(_BLUE, "-", 2.0), (_ORANGE, "--", 1.5), (_GREEN, "-.", 1.5), (_PURPLE, ":", 1.5)]
    for name, (colour, line, width) in zip(shown, styles, strict=False):
        steps, values = zip(*report.values(name), strict=True)
        marker: dict[str, Any] = {"marker": "o", "ms": 3.5} if len(steps) <= 40 else {}
        axes.plot(clock.at(list(steps)), values, line, color=colour, lw=width, label=name, **marker)
    _legend(axes)


def _size_panel(axes: Axes, report: Record, clock: _Clock) -> None:
    _frame(axes, clock, report, "left of the dense network (%)")
    axes.set_ylim(0, 106)
    if report.dense is None:
        _note(axes, "no size was recorded")
        return
    x = np.append(np.insert(clock.at([cut.step for cut in report.cuts]), 0, 0), clock.end)
    word = "parameters" if report.what == "units" else "non-zero weights"
    lines = (("params", word, _BLUE, "-", 2.4), ("macs", "MACs per sample", _ORANGE, "--", 1.8))
    for quantity, word, colour, line, width in lines:
        sizes = [getattr(size, quantity) for size in (report.start or report.dense, *(cut.size for cut in report.cuts))]
        left = [100 * size / (getattr(report.dense, quantity) or 1) for size in (*sizes, sizes[-1])]
        label = f"{word}: {count(getattr(report.dense, quantity))} → {count(sizes[-1])}"
        axes.step(x, left, line, where="post", color=colour, lw=width, label=label)
    _legend(axes)


def _width_panel(axes: Axes, report: Record) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    dense = report.dense_widths
    if not dense:
        _note(axes, "no widths were recorded")
        return
    now, x = report.widths, np.arange(len(dense))
    labels = ("dense", "pruned") if report.what == "units" else ("zero or gone", "non-zero")
    axes.bar(x, list(dense.values()), 0.8, color="#DDDDDD", edgecolor=_GREY, lw=0.6, label=labels[0])
    axes.bar(x, [now[name] for name in dense], 0.8, color=_BLUE, label=labels[1])
    slots, few = max(len(dense), _FEWEST_SLOTS), len(dense) <= 16
    middle = (len(dense) - 1) / 2
    axes.set(ylabel=report.what, xlim=(middle - slots / 2 - 0.2, middle + slots / 2 + 0.2))
    axes.set_ylim(0, 1.1 * max(dense.values()))
    if few:
        for i, (name, old) in enumerate(dense.items()):
            text = f"{old} → {now[name]}" if now[name] != old else f"{old}"
            if report.what == "weights":
                text = f"{share(old - now[name], old)} zero"
            axes.annotate(text, (i, old), xytext=(0, 3), textcoords="offset points", ha="center", fontsize="small")
    _names(axes, list(dense), slots)
    axes.set_xlabel("group of layers" if report.what == "units" else "layer")
    _legend(axes)


def _names(axes: Axes, names: Sequence[str], slots: int) -> None:
    """Group names as tick labels, if there is room for them."""
    if len(names) > _MOST_NAMES:
        return
    turned = _turned(names, slots, axes.figure.get_figwidth())  # type: ignore[union-attr]
    size = 9 if len(names) <= 16 else 7
    axes.set_xticks(range(len(names)), names, rotation=90 if turned else 0, fontsize=size)


def _frame(axes: Axes, clock: _Clock, report: Record, label: str) -> None:
    marks = ", cuts dashed" if report.cuts else ""
    axes.set(xlabel=f"{clock.label}{marks}", ylabel=label, xlim=(0, clock.end * 1.02))
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    cuts = clock.at([cut.step for cut in report.cuts])
    # Hundreds of cuts must not hide the curve.
    alpha = 0.9 if len(cuts) <= 15 else 0.35
    for x in cuts:
        axes.axvline(x, color=_GREY, lw=0.8, ls=(0, (4, 3)), alpha=alpha, zorder=0)


def _legend(axes: Axes) -> None:
    # Above the panel, where it cannot hide a curve.
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
    place["ncols"] = 3 if sum(len(name) + 6 for name in axes.get_legend_handles_labels()[1]) <= _LEGEND else 1
    axes.legend(fontsize="small", frameon=False, columnspacing=1.2, handlelength=1.6, **place)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GREY)


def headline(report: Record) -> str:
    """Size and metric before and after, in one line."""
    dense, now = report.dense, report.size
    if dense is None or now is None:
        return "Pruning report"
    left = "parameters are left" if report.what == "units" else "weights are not zero"
    parts = [f"{share(now.params, dense.params)} of the {left} after {plural(len(report.cuts), 'cut')}"]
    before, _, last = report.outcome
    if report.main_metric and last is not None and report.cuts:
        then, end = report.when
        kind = "dense" if report.start is None else "pruned earlier"
        parts.append(f"{report.main_metric} {number(before)} ({kind}, {then}) → {number(last)} ({end})")
    return _BETWEEN.join(parts)
