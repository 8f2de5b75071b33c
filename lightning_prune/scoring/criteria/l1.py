"""L1 norm (Li et al., "Pruning Filters for Efficient ConvNets", 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

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

    Sums over coupled producers (a residual sum, an expansion and the depthwise convolution after it) are added.

    Args:
        producers: ``"all"`` producers of a group, or only the ``"first"`` in the order of execution: the expansion
            convolution in MobileNetV2's blocks (Matthiesen, 2023).
    """

    producers: Literal["all", "first"] = "all"

    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:  # noqa: ARG002
        """Absolute sums, shape ``(width,)``."""
        if self.producers == "first":
            # Units without producers are scored by their consumers, as with "all".
            own = tuple(member for member in group.members if member.role == "out" and member.layer == group.name)
            group = replace(group, members=own or group.members)
        return torch.stack([torch.linalg.vector_norm(rows, 1, dim=1) for rows in unit_members(group, tensors)]).sum(0)
