"""First-order Taylor expansion (Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.gradients import EndOfBatch, GradientStatistic
from lightning_prune.structure.graph import Structure

__all__ = ["Taylor", "TaylorStatistic"]


@final
class TaylorStatistic(GradientStatistic):
    """Squares of the sums of weight times gradient over all that a unit is made of, batch by batch."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        self._batch: dict[str, Tensor] = {}  # by group

    def observe(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """As for all gradients; when the hooks go, the batch is over and its squares are taken."""
        self._batch = {}
        yield from super().observe(model)
        yield EndOfBatch(self._settle)

    def increment(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """``g · w``."""
        return gradient * weight

    def gather(self, found: Mapping[str, Tensor]) -> None:
        """Add to what the batch has shown so far."""
        for name, _, sums in self.unit_sums(found):
            self._batch[name] = self._batch[name] + sums if name in self._batch else sums

    def _settle(self) -> None:
        for name, change in self._batch.items():
            self.record(name, 0, 1, score=change.square())
        self._batch = {}


@final
@dataclass(frozen=True)
class Taylor(ObservingCriterion):
    r"""Squared first-order change of the loss, :math:`\overline{(\sum_i g_i w_i)^2}` (Molchanov et al., 2019).

    Everything that goes with the unit counts: weights that produce it and that take it, biases, norms, in all coupled
    layers. The bar is the mean over observed batches, squared each by itself. The paper squares the sum over a unit's
    weights, or sums their squares; this is the former, by which what one weight adds to the loss and another takes from
    it cancels. (Weights before a batch norm then count nothing: their scale has no effect.) ``Fisher`` squares sample
    by sample, and so says the same in any number of processes; here each process has batches of its own.

    Args:
        every_n_batches: Observe every n-th training batch.
    """

    every_n_batches: int = 10

    def statistic(self, structure: Structure) -> TaylorStatistic:
        """Squared sums of weights times gradients."""
        return TaylorStatistic(structure)
