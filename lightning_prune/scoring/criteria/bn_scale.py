"""Batch norm scales (Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.scoring.criterion import Criterion, unit_rows, unit_weights
from lightning_prune.scoring.statistics import Statistic
from lightning_prune.structure.graph import Group, Member

__all__ = ["BNScale", "norm_scales"]


def norm_scales(group: Group) -> list[Member]:
    """Scales of the norms of a group's units: weights along the units that have a bias."""
    along = {member.tensor: member for member in group.members if member.role == "along"}
    # A vector without a bias is not a norm but, for instance, the slopes of a PReLU.
    return [
        member
        for name, member in along.items()
        if name.endswith("weight") and f"{name.removesuffix('weight')}bias" in along
    ]


@final
@dataclass(frozen=True)
class BNScale(Criterion):
    r"""Absolute scale of the unit's normalisation, :math:`|\gamma|` (network slimming: Liu et al., 2017).

    Scales of several norms on the same units (a residual sum, flattened channels) are summed; any norm with scale and
    shift per unit counts. Units without a norm are scored by the L2 norm of their weights. The two are not comparable:
    under a global scope, select ``layers`` of one kind.
    """

    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:  # noqa: ARG002
        """Sums of absolute scales, shape ``(width,)``."""
        norms = norm_scales(group)
        if not norms:
            return unit_weights(group, tensors).square().sum(1).sqrt()
        return torch.cat([unit_rows(tensors[member.tensor], member).abs() for member in norms], 1).sum(1)
