"""Gradient flow (Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.data import Batch, DataPass
from lightning_prune.scoring.gradients import MemberStatistic
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.layers import canonical

__all__ = ["GraSP", "GradientFlow"]


@final
class GradientFlow(MemberStatistic):
    """Products of weights and Hessian-gradient products."""

    evidence = "second derivatives of the loss, in an extra pass"
    uses_loss = True

    def collect(self, model: nn.Module, data: DataPass) -> None:
        """Compute Hessian-gradient products for each batch, in the network's current mode."""
        self.follow(model)
        weights = {canonical(name): p for name, p in model.named_parameters() if p.requires_grad}
        values = tuple(weights.values())

        def see(_: Batch, loss: Tensor) -> None:
            gradients = torch.autograd.grad(loss, values, create_graph=True, materialize_grads=True)
            half_square = torch.stack([gradient.square().sum() for gradient in gradients]).sum() / 2
            products = torch.autograd.grad(half_square, values, materialize_grads=True)
            self.record_weights({n: w.detach() * p for (n, w), p in zip(weights.items(), products, strict=True)})

        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivatives
            data.run(model, see, call=data.loss_of, keep_modes=True, grad=True)


@final
@dataclass(frozen=True)
class GraSP(ObservingCriterion):
    r"""Decrease of the gradient flow without the unit, :math:`\sum_i w_i (H g)_i` (GraSP: Wang et al., 2020).

    :math:`g` and :math:`H` are the gradient and Hessian of the loss on the current batch when a cut is due; the sum is
    the first-order change of :math:`-\lVert g \rVert^2 / 2` if the unit's weights become 0, over all members of the
    unit. The paper scores single weights once, before training: use ``OneShot`` in the first steps for that. Requires a
    ``training_step`` that returns the loss, and operators with second derivatives; several processes average over their
    batches.
    """

    @property
    def waived(self) -> Mapping[str, str]:
        """Scores can be negative."""
        return {"dead_is_lowest": "a unit without which the gradients grow scores below zero"}

    def statistic(self, structure: Structure) -> GradientFlow:
        """Hessian-gradient products."""
        return GradientFlow(structure)
