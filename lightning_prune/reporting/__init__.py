"""Showing what pruning did: plain values, tables, pages and figures."""

from lightning_prune.reporting.inspection import Inspection
from lightning_prune.reporting.measure import latency, size_on_disk, versions
from lightning_prune.reporting.plots import report_figure
from lightning_prune.reporting.report import Cut, Measurement, Report, Size, plain

__all__ = [
    "Cut",
    "Inspection",
    "Measurement",
    "Report",
    "Size",
    "latency",
    "plain",
    "report_figure",
    "size_on_disk",
    "versions",
]
