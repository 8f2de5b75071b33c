"""Average percentage of zeros (Hu et al., "Network Trimming", 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.statistics import ActivationStatistic, Half, Target, per_unit
from lightning_prune.structure.graph import Structure

__all__ = ["APoZ", "NonzeroStatistic"]


@final
class NonzeroStatistic(ActivationStatistic):
    """Share of a unit's activations that are not 0, averaged over consumers."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        self.declare("score", "sum")

    def see(self, layer: nn.Module, activation: Tensor, output: Tensor, targets: Sequence[Target]) -> None:  # noqa: ARG002
        """Count nonzero activations."""
        for name, source, inputs in targets:
            x = per_unit(layer, activation, inputs).flatten(2)
            alive = torch.where(x.isnan(), x, x != 0)  # NaN is kept, to be detected
            self.record(name, source, len(x), score=alive.mean(2).sum(0))

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """Shares in [0, 1]."""
        return self.per_pass("score", name, half).mean(0)


@final
@dataclass(frozen=True)
class APoZ(ObservingCriterion):
    r"""One minus the average percentage of zeros, :math:`1 - \mathrm{APoZ}_k` (Hu et al., 2016).

    The share of the unit's activations, over passes and positions, that are not 0 at the input of the next layer. It
    only distinguishes units after activation functions with exact zeros, such as ReLU.

    Args:
        every_n_batches: Observe every n-th training batch.
    """

    every_n_batches: int = 10

    def statistic(self, structure: Structure) -> NonzeroStatistic:
        """Shares of activations that are not 0."""
        return NonzeroStatistic(structure)
