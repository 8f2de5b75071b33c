"""A report as tables of numbers, for loggers that can sort, filter and plot them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from lightning_prune.reporting.record import Record
from lightning_prune.structure import Size

__all__ = ["Table", "numeric_tables", "of_dataclasses"]


class Table(NamedTuple):
    """Named columns, and rows of numbers and strings; ``None`` marks an unknown value."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def of_dataclasses(rows: Sequence[Any]) -> Table:
    """One row per dataclass, all of the same type, whose fields are numbers and strings."""
    columns = tuple(field.name for field in fields(rows[0])) if rows else ()
    return Table(columns, [tuple(getattr(row, name) for name in columns) for row in rows])


def numeric_tables(report: Record) -> dict[str, Table]:
    """Before and after, the cuts, the widths and the metric at each size; tables without rows are left out."""
    tables = {"summary": _summary(report), "cuts": _cuts(report), "widths": _widths(report), "sizes": _sizes(report)}
    return {name: table for name, table in tables.items() if table.rows}


def _summary(report: Record) -> Table:
    dense, now = report.dense, report.size
    if dense is None or now is None:
        return Table((), [])
    old, new = _costs(dense), _costs(now)
    rows = [(n, old[n], new[n], _share(new[n], old[n])) for n in old if old[n] is not None or new[n] is not None]
    before, _, last = report.outcome
    if report.main_metric is not None:
        rows.append((report.main_metric, before if report.start is None else None, last, None))
    return Table(("quantity", "dense", "pruned", "left"), rows)


def _costs(size: Size) -> dict[str, float | None]:
    """The costs of a network, under the names that loggers use."""
    weights = {"nonzero_weights": size.params, "zero_weights": size.zeros}
    costs = {**({"params": size.params} if size.zeros is None else weights), "macs": size.macs}
    costs |= {"memory_bytes": size.memory, "disk_bytes": size.bytes}
    return costs | {f"latency_ms/batch_{batch}": size.latency.get(batch) for batch in (1, 64)}


def _cuts(report: Record) -> Table:
    metric = report.main_metric or "metric"
    columns = ("cut", "epoch", "step", _counted(report), "macs", "seconds")
    rows = [
        (cut.index + 1, cut.epoch, cut.step, cut.size.params, cut.size.macs, cut.seconds, *report.around(cut))
        for cut in report.cuts
    ]
    return Table((*columns, f"{metric} before", f"{metric} after", f"{metric} at the end"), rows)


def _widths(report: Record) -> Table:
    now = report.widths
    dense = report.dense.widths if report.dense else {}
    rows = [(name, width, now[name], now[name] / width) for name, width in dense.items()]
    return Table(("group", "dense", "pruned", "left"), rows)


def _sizes(report: Record) -> Table:
    whole = report.dense.params if report.dense else None
    rows = [(one.params, one.macs, _share(one.params, whole), one.metric) for one in report.networks()]
    what = _counted(report)
    return Table((what, "macs", f"{what} left", report.main_metric or "metric"), rows)


def _counted(report: Record) -> str:
    """What `Size.params` counts, under the name that loggers use."""
    return "params" if report.what == "units" else "nonzero_weights"


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
