"""Reports on pruning: plain values, tables, pages and figures."""

from lightning_prune.reporting.backbone import backbone_modules, layer_parameters
from lightning_prune.reporting.comparison import ComparedNetwork, Comparison
from lightning_prune.reporting.comparison_figure import comparison_figure
from lightning_prune.reporting.exported import Exported
from lightning_prune.reporting.inspection import Inspection
from lightning_prune.reporting.layer_scores import (
    LayerScores,
    ScoredDepth,
    ScoredLayer,
    importance_figure,
    score_figure,
)
from lightning_prune.reporting.measure import Timing, latencies, latency, size_on_disk, versions
from lightning_prune.reporting.over_depth import over_depth_figure, over_depth_grid
from lightning_prune.reporting.plots import report_figure
from lightning_prune.reporting.quantised import Quantised, QuantisedRow, wilson
from lightning_prune.reporting.record import Cut, Measurement, Scores, SizeCheckpoint, size_of, timed
from lightning_prune.reporting.report import Report, note_latency_table, plain, warn_of_kept_units
from lightning_prune.reporting.sensitivity import Sensitivity
from lightning_prune.reporting.thresholds import SizeAtThreshold, threshold_figure, thresholds_grid
from lightning_prune.reporting.typed import require

__all__ = [
    "ComparedNetwork",
    "Comparison",
    "Cut",
    "Exported",
    "Inspection",
    "LayerScores",
    "Measurement",
    "Quantised",
    "QuantisedRow",
    "Report",
    "ScoredDepth",
    "ScoredLayer",
    "Scores",
    "Sensitivity",
    "SizeAtThreshold",
    "SizeCheckpoint",
    "Timing",
    "backbone_modules",
    "comparison_figure",
    "importance_figure",
    "latencies",
    "latency",
    "layer_parameters",
    "note_latency_table",
    "over_depth_figure",
    "over_depth_grid",
    "plain",
    "report_figure",
    "require",
    "score_figure",
    "size_of",
    "size_on_disk",
    "threshold_figure",
    "thresholds_grid",
    "timed",
    "versions",
    "warn_of_kept_units",
    "wilson",
]
