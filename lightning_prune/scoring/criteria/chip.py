"""Channel independence (Sui et al., "CHIP: CHannel Independence-based Pruning for Compact Neural Networks", 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.scoring.feature_maps import FeatureMapCriterion

__all__ = ["CHIP"]


def _nuclear(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.matrix_norm(matrices, ord="nuc")
    return norms


@final
@dataclass(frozen=True)
class CHIP(FeatureMapCriterion):
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

    @staticmethod
    def measure(maps: Tensor) -> Tensor:
        """What the nuclear norm of all feature maps loses without each of them."""
        rows, lost = maps.flatten(2), []
        whole = _nuclear(rows)
        for unit in range(rows.shape[1]):
            others = rows.clone()
            others[:, unit] = 0
            lost.append(whole - _nuclear(others))
        return torch.stack(lost, 1).clamp(min=0)  # below 0 by rounding only
