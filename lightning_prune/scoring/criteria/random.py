"""Random scores, the baseline of comparisons."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.scoring.criterion import Criterion
from lightning_prune.scoring.statistics import Statistic
from lightning_prune.structure.graph import Group

__all__ = ["Random"]


@final
@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random scores, a baseline for other criteria.

    Scores depend on the seed, the group's name and its width alone: they are the same after a resume and on every rank,
    and differ at the next cut, when the width has changed. The global random state is neither read nor changed.

    Args:
        seed: Seed of the scores.
    """

    seed: int = 0

    @property
    def waived(self) -> Mapping[str, str]:
        """A random score depends on the position only."""
        return dict.fromkeys(("dead_is_lowest", "equivariant"), "a random score does not look at the unit")

    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:  # noqa: ARG002
        """Uniform in [0, 1), shape ``(width,)``."""
        # `hash` of a string differs between processes
        seed = zlib.crc32(f"{self.seed}/{group.name}/{group.width}".encode())
        return torch.rand(group.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
