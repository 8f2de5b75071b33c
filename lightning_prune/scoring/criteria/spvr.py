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
    r"""Change of predictions when a bundle of units is masked, :math:`\sum_x [c' \neq c] + |p_c - p'_c|` (SPvR).

    :math:`c` is the class that the unmasked network predicts, not the label. Units with correlated activations are
    masked and removed together. Scores are comparable over the whole network.

    Args:
        group_size: Units per bundle, d; in the paper 2 (CIFAR-10), 4 (TinyImageNet) or 8 (ImageNet).
        samples_per_class: Number of samples of each class.
        task: Kind of classification; inferred by default, see `class_scores`.
        normalized: Whether the outputs are probabilities; inferred by default.
    """

    group_size: int = 4

    def statistic(self, structure: Structure) -> MaskingStatistic:
        """Changes of predictions per bundle."""
        return MaskingStatistic(structure, "prediction_change", self)
