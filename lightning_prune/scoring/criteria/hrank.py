"""Rank of feature maps (Lin et al., "HRank: Filter Pruning using High-Rank Feature Map", 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.scoring.feature_maps import FeatureMapCriterion

__all__ = ["HRank"]


def _matrices(x: Tensor) -> Tensor:
    """Feature maps ``(passes, width, k, *positions)`` as matrices ``(passes, width, rows, columns)``."""
    if x.dim() == 3:  # flattened pixels in row-major order
        rows = next(r for r in range(math.isqrt(x.shape[2]), 0, -1) if x.shape[2] % r == 0)
        return x.reshape(*x.shape[:2], rows, -1)
    return x if x.dim() == 4 else x.flatten(2, 3).flatten(3)


@final
@dataclass(frozen=True)
class HRank(FeatureMapCriterion):
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

    @staticmethod
    def measure(maps: Tensor) -> Tensor:
        """Ranks of feature maps."""
        ranks: Tensor = torch.linalg.matrix_rank(_matrices(maps))
        return ranks
