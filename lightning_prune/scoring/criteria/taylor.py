"""First-order Taylor expansion (Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.gradients import GradientStatistic
from lightning_prune.scoring.statistics import EndOfBatch
from lightning_prune.structure.graph import Structure

__all__ = ["Taylor", "TaylorStatistic"]


@final
class TaylorStatistic(GradientStatistic):
    """Squared sums of weight times gradient over all members of a unit, per batch."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        self._batch: dict[str, Tensor] = {}  # by group

    def observe(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register hooks; when they are removed, the batch is complete and its squares are recorded."""
        self._batch = {}
        yield from super().observe(model)
        yield EndOfBatch(self._finish_batch)

    def increment(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """``g · w``."""
        return gradient * weight

    def gather(self, found: Mapping[str, Tensor]) -> None:
        """Add to the sums of the current batch."""
        for name, _, sums in self.unit_sums(found):
            self._batch[name] = self._batch[name] + sums if name in self._batch else sums

    def _finish_batch(self) -> None:
        for name, change in self._batch.items():
            self.record(name, 0, 1, score=change.square())
        self._batch = {}


@final
@dataclass(frozen=True)
class Taylor(ObservingCriterion):
    r"""Squared first-order change of the loss, :math:`\overline{(\sum_i g_i w_i)^2}` (Molchanov et al., 2019).

    The sum is over all members of the unit (producing and consuming weights, biases, norms); the bar is the mean of the
    squares over observed batches. The paper squares the sum over a unit's weights or sums their squares; this is the
    former, in which contributions of opposite sign cancel. (Weights before a batch norm then have no effect, as their
    scale does not matter.) Each process squares over its own batches, so scores depend on the number of processes;
    those of ``Fisher``, which squares per sample, do not.

    Args:
        every_n_batches: Observe every n-th training batch.
    """

    every_n_batches: int = 10

    def statistic(self, structure: Structure) -> TaylorStatistic:
        """Squared sums of weights times gradients."""
        return TaylorStatistic(structure)
