"""Size of a network at different thresholds, shown by `lightning-prune score` before anything is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_prune.extras import new_figure
from lightning_prune.reporting.grid import Grid, count, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SizeAtThreshold", "threshold_figure", "thresholds_grid"]

_BLUE, _ORANGE = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class SizeAtThreshold:
    """The size at one threshold.

    Attributes:
        threshold: ρ; units with an importance of at most this are removed.
        units: Remaining units of the scored groups.
        params: Remaining parameters.
        of_units: Units of these groups before.
        of_params: Parameters before.
    """

    threshold: float
    units: int
    params: int
    of_units: int
    of_params: int


def thresholds_grid(rows: Sequence[SizeAtThreshold], what: str) -> Grid:
    """The table of thresholds, the smallest first.

    Args:
        rows: The size at each threshold.
        what: The part whose parameters are counted, such as ``"the backbone"``.
    """
    cells = tuple(
        (f"{row.threshold:g}", count(row.units), share(row.units, row.of_units), count(row.params),
         share(row.params, row.of_params))
        for row in rows
    )  # fmt: skip
    columns = ("threshold ρ", "units", "of all", "parameters", "of all")
    note = f"Remaining size if units with an importance of at most ρ are removed. Parameters of {what}."
    return Grid("Sizes by threshold", columns, cells, words=0, note=note)


def threshold_figure(rows: Sequence[SizeAtThreshold], what: str, threshold: float | None = None) -> Figure:
    """Remaining units and parameters against ρ, with a logarithmic axis; needs the extra ``plot``.

    Args:
        rows: The size at each threshold, ascending.
        what: The part whose parameters are counted.
        threshold: The run's ρ, if any, which is marked.
    """
    figure = new_figure(figsize=(7, 4.2), dpi=130)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    drawn = [row for row in rows if row.threshold > 0]
    for word, colour, line, left in (
        (f"parameters of {what}", _BLUE, "o-", [100 * row.params / max(row.of_params, 1) for row in drawn]),
        ("units", _ORANGE, "s--", [100 * row.units / max(row.of_units, 1) for row in drawn]),
    ):
        axes.plot([row.threshold for row in drawn], left, line, ms=4, color=colour, label=word)
    if threshold:
        axes.axvline(threshold, color="black", lw=1, ls="--", label=f"ρ = {threshold:g}")
    axes.set(xscale="log", xlabel="threshold ρ", ylabel="left (%)", ylim=(0, 104))
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)
    return figure
