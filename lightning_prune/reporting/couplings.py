"""The figure of `inspect`: producers and consumers of each group, and what cannot be pruned and why."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_prune.extras import new_figure, require
from lightning_prune.reporting.grid import plural
from lightning_prune.structure.graph import Structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["couplings", "couplings_figure"]

# Okabe & Ito's palette, as in the figure of a run; the first two colours are for groups, the others for reasons.
_OUT, _IN, _BOTH = "#0072B2", "#E69F00", "#000000"
_REASONS = ("#D55E00", "#CC79A7", "#009E73", "#56B4E9", "#F0E442")
_OTHER = "#999999"

# Largest size of a cell, and of the whole matrix, for which cells get smaller, in inches.
_CELL, _SMALLEST, _ROOM = 0.17, 0.07, 14.0

# Minimum width of the figure, and maximum width of a column, in inches.
_LEAST, _WIDEST = 5.0, 0.8

# Characters per inch in the headline and in a legend.
_LETTERS, _SMALL_LETTERS = 13, 14

#: Colour and text of each reason.
_Reasons = dict[str, tuple[str, str]]


def couplings(structure: Structure) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Layers in the order of their definition, and their role in each group.

    Returns:
        The names, and an array ``(layers, groups)``: 1 if a layer produces the units, 2 if it consumes them, 3 if
        both. Layers that only follow (norms) are omitted; frozen layers have a row of zeros.
    """
    at = {tensor: i for i, tensor in enumerate(structure.cost.shapes)}
    met = [(m.layer, m.tensor) for g in structure.groups for m in g.members if m.role != "along"]
    met += [(axis.layer, axis.tensor) for axis in structure.frozen]
    rows: dict[str, int] = {}
    for layer, tensor in met:
        rows[layer] = min(at[tensor], rows.get(layer, at[tensor]))
    layers = sorted(rows, key=rows.__getitem__)
    place = {layer: i for i, layer in enumerate(layers)}
    cells = np.zeros((len(layers), len(structure.groups)), dtype=np.int64)
    for column, group in enumerate(structure.groups):
        for member in group.members:
            if member.role != "along":
                cells[place[member.layer], column] |= 1 if member.role == "out" else 2
    return layers, cells


def couplings_figure(structure: Structure, headline: str) -> Figure:
    """One row per layer, one column per group with its width above, and a last column for frozen axes by reason.

    Needs the extra ``plot``; does not touch matplotlib's global state.

    Args:
        structure: The structure of the network.
        headline: The title.
    """
    layers, cells = couplings(structure)
    rows, columns = max(len(layers), 1), max(cells.shape[1], 1)
    cell = min(_CELL, max(_SMALLEST, _ROOM / max(rows, columns)))
    letters = max([len(layer) for layer in layers] or [0])
    size = min(7.5, 48 * cell)
    left, right = 0.0085 * size * letters + 0.35, 0.9
    # A few columns share the width that the headline needs anyway.
    across = max(cell, min(_WIDEST, (_LEAST - left - right) / columns))
    width = max(left + columns * across + right, _LEAST)
    left += (width - left - columns * across - right) / 2
    text = textwrap.fill(headline, int(width * _LETTERS))
    reasons = _reasons(structure, int(width * _SMALL_LETTERS))
    below = _depth(reasons)
    height = 1.35 + 0.16 * text.count("\n") + rows * cell + below
    figure = new_figure(figsize=(width, height), dpi=150)
    box = (left / width, below / height, columns * across / width, rows * cell / height)
    axes = figure.add_axes(box)
    _matrix(axes, layers, cells, size)
    _stays(axes, structure, layers, reasons, size)
    _widths(figure.add_axes((box[0], box[1] + box[3] + 0.08 / height, box[2], 0.8 / height)), structure, size)
    _legend(figure, reasons, height, both=bool((cells == 3).any()))
    figure.text(0.15 / width, 1 - 0.15 / height, text, va="top", fontsize=9)
    return figure


def _matrix(axes: Axes, layers: list[str], cells: npt.NDArray[np.int64], size: float) -> None:
    colours = require("matplotlib.colors", extra="plot").ListedColormap(["white", _OUT, _IN, _BOTH])
    if cells.size:
        axes.pcolormesh(cells, cmap=colours, vmin=0, vmax=3, edgecolors="#E8E8E8", linewidth=0.3)
    axes.set(xlim=(0, max(cells.shape[1], 1)), ylim=(len(layers), 0), xticks=[])
    axes.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=size)
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set(color=_OTHER, lw=0.5)


def _widths(axes: Axes, structure: Structure, size: float) -> None:
    widths = list(structure.widths.values())
    axes.bar(np.arange(len(widths)) + 0.5, widths, 0.8, color=_OUT)
    axes.set(xlim=(0, max(len(widths), 1)), xticks=[], yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_ylim(0, 1.6 * max([*widths, 1]))
    for i, n in enumerate(widths):
        axes.annotate(str(n), (i + 0.5, n), (0, 2), textcoords="offset points", rotation=90, fontsize=size, ha="center")
    axes.set_ylabel("units", fontsize=8)


def _reasons(structure: Structure, line: int) -> _Reasons:
    """Colour and wrapped text of every reason, the most frequent first; the last one may combine several."""
    ranked = Counter(kind for kind, _ in {(_kind(axis.reason), axis.layer) for axis in structure.frozen}).most_common()
    named = {
        kind: (colour, textwrap.fill(f"not pruned: {kind} ({plural(n, 'layer')})", line))
        for (kind, n), colour in zip(ranked, _REASONS, strict=False)
    }
    rest = plural(sum(n for _, n in ranked[len(_REASONS) :]), "layer")
    return named | {kind: (_OTHER, f"not pruned: another reason ({rest})") for kind, _ in ranked[len(_REASONS) :]}


def _kind(reason: str) -> str:
    return re.sub(r" in `[^`]*`", "", reason)


def _stays(axes: Axes, structure: Structure, layers: list[str], reasons: _Reasons, size: float) -> None:
    """A square and the width, right of the matrix, for each frozen width of a layer."""
    end = axes.get_xlim()[1]
    place = {layer: i for i, layer in enumerate(layers)}
    widest: dict[str, tuple[int, str]] = {}
    for axis in structure.frozen:
        widest[axis.layer] = max(widest.get(axis.layer, (0, "")), (axis.width, reasons[_kind(axis.reason)][0]))
    for layer, (width, colour) in widest.items():
        square: dict[str, Any] = {"color": colour, "fontsize": size, "va": "center", "clip_on": False}
        axes.text(end + 0.3, place[layer] + 0.5, f"■ {width}", **square)


def _legend(figure: Figure, reasons: _Reasons, height: float, *, both: bool) -> None:
    patch = require("matplotlib.patches", extra="plot").Patch
    place: dict[str, Any] = {"fontsize": 8, "frameon": False, "loc": "lower left", "borderaxespad": 0.4}
    kinds = {"produces the units": _OUT, "takes them in": _IN} | ({"both": _BOTH} if both else {})
    stays = [patch(color=colour, label=text) for colour, text in dict.fromkeys(reasons.values())]
    handles = [patch(color=colour, label=label) for label, colour in kinds.items()]
    figure.legend(handles=handles, bbox_to_anchor=(0, (_depth(reasons) - 0.3) / height), ncols=3, **place)
    if stays:
        figure.legend(
            handles=stays, bbox_to_anchor=(0, (_depth(reasons) - 0.25) / height), **place | {"loc": "upper left"}
        )


def _depth(reasons: _Reasons) -> float:
    """Height of the legends below the matrix, in inches."""
    return 0.5 + 0.16 * sum(text.count("\n") + 1.2 for _, text in dict.fromkeys(reasons.values()))
