"""Structured pruning via ranking (Hassan et al., "SPvR"): bundles of units ranked by the effect of masking them."""

from lightning_prune.scoring.spvr.grouping import correlation, group_units
from lightning_prune.scoring.spvr.importance import (
    MEASURES,
    Measure,
    kl_divergence,
    misclassification,
    prediction_change,
)
from lightning_prune.scoring.spvr.outputs import ClassScores, Task, class_scores, score_tensor

__all__ = [
    "MEASURES",
    "ClassScores",
    "Measure",
    "Task",
    "class_scores",
    "correlation",
    "group_units",
    "kl_divergence",
    "misclassification",
    "prediction_change",
    "score_tensor",
]
