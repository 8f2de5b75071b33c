"""Geometric median (He et al., "Filter Pruning via Geometric Median for Deep CNNs Acceleration", 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.scoring.criterion import Criterion, unit_weights
from lightning_prune.scoring.statistics import Statistic
from lightning_prune.structure.graph import Group

__all__ = ["FPGM"]


@final
@dataclass(frozen=True)
class FPGM(Criterion):
    r"""Distance to all other units, :math:`\sum_j \lVert w_k - w_j \rVert_2` (FPGM: He et al., 2019).

    Units near the geometric median are the easiest to replace by others. Weights of coupled producers (a residual sum)
    are concatenated.
    """

    @property
    def waived(self) -> Mapping[str, str]:
        """A dead unit can be far from the others."""
        return {"dead_is_lowest": "redundancy counts, not size: a dead unit may be unlike all others"}

    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:  # noqa: ARG002
        """Sums of Euclidean distances, shape ``(width,)``."""
        weights = unit_weights(group, tensors)
        # The matrix product form is inexact for near duplicates.
        return torch.cdist(weights, weights, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
