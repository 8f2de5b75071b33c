"""Fisher information (Liu et al., "Group Fisher Pruning for Practical Network Compression", 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.gradients import MaskGradientStatistic
from lightning_prune.structure.graph import Structure

__all__ = ["Fisher"]


@final
@dataclass(frozen=True)
class Fisher(ObservingCriterion):
    r"""Fisher information of a factor on the unit (Theis et al., 2018; coupled units: Liu et al., 2021).

    .. math:: s_k = \frac{1}{N} \sum_n \Big( \sum_{l, p} a_{nklp} \frac{\partial L_n}{\partial a_{nklp}} \Big)^2

    over samples :math:`n`, consumers :math:`l` and positions :math:`p`: twice the second-order estimate of the increase
    of the loss if the unit is removed. The loss is assumed to be a mean over the batch; the division by MACs of Liu et
    al. is part of the target.

    Args:
        every_n_batches: Observe every n-th training batch.
    """

    every_n_batches: int = 10

    def statistic(self, structure: Structure) -> MaskGradientStatistic:
        """Squared gradients of factors on the units."""
        return MaskGradientStatistic(structure)
