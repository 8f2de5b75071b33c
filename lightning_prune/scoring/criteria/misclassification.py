"""Number of predictions that masking a unit changes: the first term of SPvR's importance."""

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

    :math:`c` is the class that the unmasked network predicts. The SPvR paper uses this as the reference ranking
    (appendix A). Many units change no prediction and are tied.

    Args:
        group_size: Units that are masked together, grouped by the correlation of their activations.
        samples_per_class: Number of samples of each class.
        task: Kind of classification; inferred by default, see `class_scores`.
        normalized: Whether the outputs are probabilities; inferred by default.
    """

    def statistic(self, structure: Structure) -> MaskingStatistic:
        """Counts per bundle."""
        return MaskingStatistic(structure, "misclassification", self)
