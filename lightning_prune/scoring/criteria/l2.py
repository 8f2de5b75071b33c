"""L2 norm of the weights that produce a unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.scoring.criterion import Criterion, unit_members
from lightning_prune.scoring.statistics import Statistic
from lightning_prune.structure.graph import Group

__all__ = ["L2"]


@final
@dataclass(frozen=True)
class L2(Criterion):
    r"""Euclidean norm of the weights that produce the unit, :math:`\sqrt{\sum_i w_i^2}` (He et al., 2018).

    Weights of coupled producers (a residual sum) are concatenated. See "Soft Filter Pruning for Accelerating Deep
    Convolutional Neural Networks".
    """

    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:  # noqa: ARG002
        """Euclidean norms, shape ``(width,)``."""
        norms = [torch.linalg.vector_norm(rows, dim=1) for rows in unit_members(group, tensors)]
        score: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return score
