"""Scales of normalisation (Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017)."""

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
    """The scales of the norms on a group's units: members that are one number per channel beside a shift."""
    along = {member.tensor: member for member in group.members if member.role == "along"}
    # A single vector without a shift is no norm but, say, the slopes of a PReLU.
    return [
        member
        for name, member in along.items()
        if name.endswith("weight") and f"{name.removesuffix('weight')}bias" in along
    ]


@final
@dataclass(frozen=True)
class BNScale(Criterion):
    r"""Absolute scale of the unit's normalisation, :math:`|\gamma|` (network slimming: Liu et al., 2017).

    Several norms on the same units (a residual sum, channels flattened before they are normalised) add up. Any norm
    with scale and shift per unit counts. Units without one are scored by the L2 norm of their weights, the
    structured form that is usual where there is no BatchNorm; the two do not compare: under a global scope, choose
    ``layers`` of one kind.
    """

    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:  # noqa: ARG002
        """Sums of absolute scales, shape ``(width,)``."""
        norms = norm_scales(group)
        if not norms:
            return unit_weights(group, tensors).square().sum(1).sqrt()
        return torch.cat([unit_rows(tensors[member.tensor], member).abs() for member in norms], 1).sum(1)
