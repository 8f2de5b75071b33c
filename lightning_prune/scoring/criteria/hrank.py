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
    """Ranks of what enters the next layers, unit by unit; several consumers average.

    Args:
        structure: The network's groups.
        samples: Look at the first so many passes of each batch: a singular value decomposition for every map.
    """

    def __init__(self, structure: Structure, samples: int) -> None:
        super().__init__(structure)
        self.samples = samples
        self.declare("score", "sum")

    def see(self, layer: nn.Module, activation: Tensor, output: Tensor, targets: Sequence[Target]) -> None:  # noqa: ARG002
        """Ranks of the first maps."""
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
    if x.dim() == 3:  # flattened pixels, rows of the map one after the other
        rows = next(r for r in range(math.isqrt(x.shape[2]), 0, -1) if x.shape[2] % r == 0)
        return x.reshape(*x.shape[:2], rows, -1)
    return x if x.dim() == 4 else x.flatten(2, 3).flatten(3)


@final
@dataclass(frozen=True)
class HRank(ObservingCriterion):
    r"""Average rank of the unit's feature maps, :math:`\overline{\operatorname{rank}(a_k)}` (HRank: Lin et al., 2020).

    Maps are taken where they enter the next layer. Pixels flattened for a Linear are folded back into the squarest
    matrix, which is the map itself where maps are square; a single number has rank 1 unless it is 0, and so has a map
    of one dimension (sequences, signals): there, ranks hardly tell units apart.

    Args:
        every_n_batches: Observe every n-th training batch.
        samples: Passes per observed batch; ranks hardly differ between them, and each costs a singular value
            decomposition per map.

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
