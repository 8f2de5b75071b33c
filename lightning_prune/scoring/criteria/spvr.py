"""SPvR (Hassan, Paik and Khare, "SPvR: Structured Pruning via Ranking", 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_prune.scoring.spvr.criterion import MaskingCriterion, MaskingStatistic
from lightning_prune.structure.graph import Structure

__all__ = ["SPvR"]


@final
@dataclass(frozen=True)
class SPvR(MaskingCriterion):
    r"""Predictions that change when a group of units is masked, :math:`\sum_x [c' \neq c] + |p_c - p'_c|` (SPvR).

    :math:`c` is the class that the unmasked network predicts, not the label. Units whose activations correlate are
    masked together, and go together. Scores are compared over the whole network as they are.

    Args:
        group_size: Units of a group, d: the paper's 2 (CIFAR-10), 4 (TinyImageNet) or 8 (ImageNet).
        samples_per_class: Samples of each class that are looked at.
        task: What the outputs are scores of; by default found out, see `class_scores`.
        normalized: Whether the outputs are probabilities already; by default found out.
    """

    group_size: int = 4

    def statistic(self, structure: Structure) -> MaskingStatistic:
        """Changes of predictions, group by group."""
        return MaskingStatistic(structure, "prediction_change", self)
