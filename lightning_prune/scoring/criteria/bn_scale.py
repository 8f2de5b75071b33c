"""Scales of normalisation (Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.scoring.criterion import Criterion, unit_rows, unit_weights
from lightning_prune.scoring.statistics import Statistic
from lightning_prune.structure.graph import Group

__all__ = ["BNScale"]


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
        along = {member.tensor: member for member in group.members if member.role == "along"}
        # A single vector without a shift is no norm but, say, the slopes of a PReLU.
        norms = [name for name in along if name.endswith("weight") and f"{name.removesuffix('weight')}bias" in along]
        if not norms:
            return unit_weights(group, tensors).square().sum(1).sqrt()
        return torch.cat([unit_rows(tensors[name], along[name]).abs() for name in norms], 1).sum(1)
