"""L1 norm (Li et al., "Pruning Filters for Efficient ConvNets", 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.scoring.criterion import Criterion, unit_members
from lightning_prune.scoring.statistics import Statistic
from lightning_prune.structure.graph import Group

__all__ = ["L1"]


@final
@dataclass(frozen=True)
class L1(Criterion):
    r"""Sum of absolute weights that produce the unit, :math:`\sum_i |w_i|` (Li et al., 2017).

    Coupled producers (a residual sum) add up.
    """

    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:  # noqa: ARG002
        """Absolute sums, shape ``(width,)``."""
        return torch.stack([torch.linalg.vector_norm(rows, 1, dim=1) for rows in unit_members(group, tensors)]).sum(0)
