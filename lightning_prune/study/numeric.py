"""A study's results as tables of numbers, for loggers that sort, filter and draw them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lightning_prune.reporting.numeric import Table, of_dataclasses
from lightning_prune.study.analysis import NARROW, WIDE, Analysis, Space
from lightning_prune.study.axes import Axis
from lightning_prune.study.table import Row

__all__ = ["numeric_tables"]

_RUN = ("variant", "pipeline", "remaining", "seed", "top1", "top5", "params", "macs", "seconds", "diverged")


def numeric_tables(rows: Iterable[Row], analysis: Analysis) -> dict[str, Table]:
    """All runs, the networks, their confidence ellipses and their performance risk.

    Accuracies of runs are shares in [0, 1], as in the study's table; best and prior of a network and its risk are in
    percentage points, as in the report. ``None`` stands for what is not known.

    Args:
        rows: Finished runs.
        analysis: Of these runs.
    """
    return {
        "runs": _runs(list(rows), analysis.axes),
        "networks": _networks(analysis),
        "ellipses": _ellipses(analysis),
        "risk": _risks(analysis),
    }


def _runs(rows: Sequence[Row], axes: tuple[Axis, Axis]) -> Table:
    columns = (*_RUN[:3], *(axis.key for axis in axes), *_RUN[3:])
    found = [[getattr(row, name) for name in _RUN] for row in rows]
    values = [row.values for row in rows]
    return Table(columns, [(*cells[:3], *own, *cells[3:]) for cells, own in zip(found, values, strict=True)])


def _networks(analysis: Analysis) -> Table:
    columns = ("network", "params", "macs", "macs_left", "best_top1", "prior_top1", "runs", "diverged")
    return Table(columns, [_network(analysis, space) for space in analysis.spaces])


def _network(analysis: Analysis, space: Space) -> tuple[object, ...]:
    prior = float(space.mean[analysis.prior])
    runs = sum(math.isfinite(value) for value in space.accuracy.flat)
    left = space.macs / analysis.unpruned.macs
    known = None if math.isnan(prior) else prior
    return (space.name, space.params, space.macs, left, space.best, known, runs, space.diverged)


def _ellipses(analysis: Analysis) -> Table:
    x, y = (axis.key for axis in analysis.axes)
    columns = ("network", "region", "length", "width", f"centre_{x}", f"centre_{y}", "seeds")
    found = [
        (space.name, threshold, ellipse.length, ellipse.width, *ellipse.centre, ellipse.seeds)
        for space in analysis.spaces
        for threshold in (WIDE, NARROW)
        if (ellipse := analysis.ellipse(space, threshold)) is not None
    ]
    return Table(columns, found)


def _risks(analysis: Analysis) -> Table:
    found = of_dataclasses([analysis.risk(space) for space in analysis.spaces])
    rows = [(space.name, *cells) for space, cells in zip(analysis.spaces, found.rows, strict=True)]
    return Table(("network", *found.columns), rows)
