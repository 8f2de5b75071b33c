"""Cumulative parameters over the depth of a backbone, before and after pruning."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from lightning_prune.extras import new_figure
from lightning_prune.reporting.grid import Grid, count, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["over_depth_figure", "over_depth_grid"]

_BLUE, _GREY = "#0072B2", "#777777"

# With more layers, names would overlap.
_MOST_NAMES = 60


def over_depth_grid(dense: Mapping[str, int], pruned: Mapping[str, int]) -> Grid:
    """The table: one row per convolution, with its parameters (including its norm) and the cumulative sum.

    Args:
        dense: Parameters by layer before pruning, in order.
        pruned: The same after pruning; a missing layer was removed.
    """
    after = [pruned.get(name, 0) for name in dense]
    whole, sums = sum(dense.values()), zip(accumulate(dense.values()), accumulate(after), strict=True)
    rows = tuple(
        (name, count(old), count(new), count(old_sum), share(old_sum, whole), count(new_sum), share(new_sum, whole))
        for (name, old), new, (old_sum, new_sum) in zip(dense.items(), after, sums, strict=True)
    )
    columns = ("layer", "dense", "pruned", "dense so far", "of the backbone", "pruned so far", "of the dense backbone")
    note = "Parameters of each convolution with its norm, and cumulative."
    return Grid("Parameters over depth", columns, rows, note=note)


def over_depth_figure(dense: Mapping[str, int], pruned: Mapping[str, int]) -> Figure:
    """Cumulative parameters as a share of the dense backbone, two lines; needs the extra ``plot``.

    Args:
        dense: Parameters by layer before pruning, in order.
        pruned: The same after pruning; the line ends at the last remaining layer.
    """
    figure = new_figure(figsize=(9, 4.2), dpi=130)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    whole, places = sum(dense.values()), {name: place for place, name in enumerate(dense, 1)}
    lines = (
        ("dense", dense, _GREY, "--"),
        ("pruned", {name: pruned[name] for name in dense if name in pruned}, _BLUE, "-"),
    )
    for word, layers, colour, line in lines:
        so_far = [100 * some / whole for some in accumulate(layers.values())]
        label = f"{word}: {count(sum(layers.values()))} in {len(layers)} layers"
        axes.plot([places[name] for name in layers], so_far, f"o{line}", ms=3, color=colour, label=label)
    axes.axvline(len(dense) / 2 + 0.5, color="0.8", lw=1, zorder=0)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(ylabel="parameters so far (% of dense)", ylim=(0, 104))
    if len(dense) <= _MOST_NAMES:
        axes.set_xticks(range(1, len(dense) + 1), list(dense), rotation=90, fontsize=7)
    axes.set_xlabel("convolution, in the order of registration; the line marks half of the depth")
    axes.legend(fontsize="small", frameon=False)
    return figure
