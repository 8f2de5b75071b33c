"""Showing what pruning did: plain values, tables, pages and figures."""

from lightning_prune.reporting.inspection import Inspection
from lightning_prune.reporting.measure import latency, size_on_disk, versions
from lightning_prune.reporting.plots import ladder_figure, report_figure
from lightning_prune.reporting.report import Cut, Measurement, Report, Rung, Size, plain
from lightning_prune.reporting.sensitivity import Sensitivity
from lightning_prune.reporting.typed import require

__all__ = [
    "Cut",
    "Inspection",
    "Measurement",
    "Report",
    "Rung",
    "Sensitivity",
    "Size",
    "ladder_figure",
    "latency",
    "plain",
    "report_figure",
    "require",
    "size_on_disk",
    "versions",
]
