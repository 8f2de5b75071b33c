"""Channel independence (Sui et al., "CHIP: CHannel Independence-based Pruning for Compact Neural Networks", 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.statistics import ActivationStatistic, Half, Target, per_unit
from lightning_prune.structure.graph import Structure

__all__ = ["CHIP", "IndependenceStatistic"]


@final
class IndependenceStatistic(ActivationStatistic):
    """Channel independence at the inputs of the next layers, averaged over consumers.

    Args:
        structure: The network's groups.
        samples: Use only this many samples of each batch, as each takes a singular value decomposition per unit.
    """

    def __init__(self, structure: Structure, samples: int) -> None:
        super().__init__(structure)
        self.samples = samples
        self.declare("score", "sum")

    def see(self, layer: nn.Module, activation: Tensor, output: Tensor, targets: Sequence[Target]) -> None:  # noqa: ARG002
        """Record what the nuclear norm of all feature maps loses without each of them."""
        for name, source, inputs in targets:
            maps = per_unit(layer, activation, inputs)[: self.samples].flatten(2)
            bad = ~maps.isfinite().all()
            maps = torch.where(bad, 0, maps)
            lost = []
            for unit in range(maps.shape[1]):
                others = maps.clone()
                others[:, unit] = 0
                lost.append(_nuclear(maps) - _nuclear(others))
            independence = torch.stack(lost, 1).clamp(min=0).sum(0)  # below 0 by rounding only
            self.record(name, source, len(maps), score=torch.where(bad, torch.nan, independence))

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """Mean independence."""
        return self.per_pass("score", name, half).mean(0)


def _nuclear(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.matrix_norm(matrices, ord="nuc")
    return norms


@final
@dataclass(frozen=True)
class CHIP(ObservingCriterion):
    r"""Channel independence, :math:`\overline{\lVert A \rVert_* - \lVert A_{-k} \rVert_*}` (CHIP: Sui et al., 2021).

    :math:`A` has one row per unit, its flattened feature map of one sample at the input of the next layer;
    :math:`A_{-k}` has row :math:`k` set to zero, and :math:`\lVert \cdot \rVert_*` is the nuclear norm. A unit whose
    map the others span adds little. The paper takes maps of trained networks at the layer's own output, before pruning
    once; here they are observed in training, behind norm and activation, as for every criterion of activations.

    Args:
        every_n_batches: Observe every n-th training batch.
        samples: Samples per observed batch; each takes a singular value decomposition per unit.

    Raises:
        ValueError: If an argument is below 1.
    """

    every_n_batches: int = 10
    samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"CHIP: expected `samples` to be at least 1, got {self.samples}.")

    def statistic(self, structure: Structure) -> IndependenceStatistic:
        """Channel independence."""
        return IndependenceStatistic(structure, self.samples)
