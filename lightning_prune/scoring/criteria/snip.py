"""Connection sensitivity (Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.gradients import GradientStatistic
from lightning_prune.structure.graph import Structure

__all__ = ["SNIP", "SNIPStatistic"]


@final
class SNIPStatistic(GradientStatistic):
    """Absolute products of weights and gradients."""

    def increment(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """``|g · w|``."""
        return (gradient * weight).abs()


@final
@dataclass(frozen=True)
class SNIP(ObservingCriterion):
    r"""Sensitivity of the loss to the unit's connections, :math:`\overline{\sum_i |g_i w_i|}` (SNIP: Lee et al., 2019).

    The sum is over all members of the unit; the bar is the mean over observed batches. The paper scores single weights
    once, before training: use ``OneShot`` in the first steps for that.

    Args:
        every_n_batches: Observe every n-th training batch.
    """

    every_n_batches: int = 10

    def statistic(self, structure: Structure) -> SNIPStatistic:
        """Absolute products of weights and gradients."""
        return SNIPStatistic(structure)
