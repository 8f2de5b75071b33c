"""First-order Taylor expansion (Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.gradients import GradientStatistic
from lightning_prune.structure.graph import Structure

__all__ = ["Taylor", "TaylorStatistic"]


@final
class TaylorStatistic(GradientStatistic):
    """Squared products of weights and gradients."""

    def increment(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """``(g · w)²``."""
        return (gradient * weight).square()


@final
@dataclass(frozen=True)
class Taylor(ObservingCriterion):
    r"""Squared first-order change of the loss, :math:`\overline{\sum_i (g_i w_i)^2}` (Molchanov et al., 2019).

    Everything that goes with the unit counts: weights that produce it and that take it, biases, norms, in all coupled
    layers. The bar is the mean over observed batches, squared each by itself. The paper's sum over a unit's weights can
    be squared before or after; this is after.

    Args:
        every_n_batches: Observe every n-th training batch.
    """

    every_n_batches: int = 10

    def statistic(self, structure: Structure) -> TaylorStatistic:
        """Squared products of weights and gradients."""
        return TaylorStatistic(structure)
