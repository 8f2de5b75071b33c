"""The number of predictions that a unit decides: the first term of SPvR's importance alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_prune.scoring.spvr.criterion import MaskingCriterion, MaskingStatistic
from lightning_prune.structure.graph import Structure

__all__ = ["Misclassification"]


@final
@dataclass(frozen=True)
class Misclassification(MaskingCriterion):
    r"""Number of predictions that change when a unit is masked, :math:`\sum_x [c' \neq c]`.

    :math:`c` is the class that the unmasked network predicts. This is the truth that the paper of SPvR compares
    rankings with (its appendix A). Many units change none, and are then tied.

    Args:
        group_size: Units that are masked together, grouped by the correlation of their activations.
        samples_per_class: Samples of each class that are looked at.
        task: What the outputs are scores of; by default found out, see `class_scores`.
        normalized: Whether the outputs are probabilities already; by default found out.
    """

    def statistic(self, structure: Structure) -> MaskingStatistic:
        """Counts, group by group."""
        return MaskingStatistic(structure, "misclassification", self)
