"""Layer-adaptive magnitude (Lee et al., "Layer-Adaptive Sparsity for the Magnitude-based Pruning", 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_prune.scoring.criterion import Criterion, unit_weights
from lightning_prune.scoring.statistics import Statistic
from lightning_prune.structure.graph import Group

__all__ = ["LAMP"]


@final
@dataclass(frozen=True)
class LAMP(Criterion):
    r"""Squared magnitude divided by the sum over all units that are at least as large (LAMP: Lee et al., 2021).

    .. math:: s_k = \frac{m_k}{\sum_{j: m_j \ge m_k} m_j}, \qquad m_k = \sum_i w_{ki}^2

    The largest unit of every group scores 1, so that scores are comparable across layers and no layer is emptied under
    a global scope. The paper scores single weights; here :math:`w_k` are the weights that produce a unit.
    """

    comparable: ClassVar[bool] = True

    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:  # noqa: ARG002
        """Shares in (0, 1], 0 for dead units; shape ``(width,)``."""
        magnitude = unit_weights(group, tensors).square().sum(1)
        remaining = torch.where(magnitude >= magnitude[:, None], magnitude, 0).sum(1)
        return magnitude / remaining.clamp_min(torch.finfo(remaining.dtype).tiny)
