"""Rank of feature maps (Lin et al., "HRank: Filter Pruning using High-Rank Feature Map", 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.statistics import ActivationStatistic, Half, Target, per_unit
from lightning_prune.structure.graph import Structure

__all__ = ["HRank", "RankStatistic"]


@final
class RankStatistic(ActivationStatistic):
    """Ranks of the units' feature maps at the inputs of the next layers, averaged over consumers.

    Args:
        structure: The network's groups.
        samples: Use only this many samples of each batch, as every map needs a singular value decomposition.
    """

    def __init__(self, structure: Structure, samples: int) -> None:
        super().__init__(structure)
        self.samples = samples
        self.declare("score", "sum")

    def see(self, layer: nn.Module, activation: Tensor, output: Tensor, targets: Sequence[Target]) -> None:  # noqa: ARG002
        """Record the ranks of feature maps."""
        for name, source, inputs in targets:
            maps = _matrices(per_unit(layer, activation, inputs)[: self.samples])
            bad = ~maps.isfinite().all()
            rank = torch.linalg.matrix_rank(torch.where(bad, 0, maps)).to(maps.dtype).sum(0)
            self.record(name, source, len(maps), score=torch.where(bad, torch.nan, rank))

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """Mean ranks."""
        return self.per_pass("score", name, half).mean(0)


def _matrices(x: Tensor) -> Tensor:
    """Feature maps ``(passes, width, k, *positions)`` as matrices ``(passes, width, rows, columns)``."""
    if x.dim() == 3:  # flattened pixels in row-major order
        rows = next(r for r in range(math.isqrt(x.shape[2]), 0, -1) if x.shape[2] % r == 0)
        return x.reshape(*x.shape[:2], rows, -1)
    return x if x.dim() == 4 else x.flatten(2, 3).flatten(3)


@final
@dataclass(frozen=True)
class HRank(ObservingCriterion):
    r"""Average rank of the unit's feature maps, :math:`\overline{\operatorname{rank}(a_k)}` (HRank: Lin et al., 2020).

    Maps are taken at the input of the next layer. Pixels flattened for a Linear are reshaped to the squarest matrix,
    which is the map itself if it is square. Scalars and maps of one dimension (sequences, signals) have rank 1 unless
    they are 0, so that ranks hardly distinguish units there.

    Args:
        every_n_batches: Observe every n-th training batch.
        samples: Samples per observed batch; ranks hardly differ between samples, and each map needs a singular value
            decomposition.

    Raises:
        ValueError: If an argument is below 1.
    """

    every_n_batches: int = 10
    samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"HRank: expected `samples` to be at least 1, got {self.samples}.")

    def statistic(self, structure: Structure) -> RankStatistic:
        """Ranks of feature maps."""
        return RankStatistic(structure, self.samples)
