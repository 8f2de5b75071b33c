"""Gradient flow (Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.data import Batch, DataPass
from lightning_prune.scoring.gradients import MemberStatistic
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.layers import canonical

__all__ = ["GraSP", "GradientFlow"]


@final
class GradientFlow(MemberStatistic):
    """Products of weights and the Hessian of the loss times its gradient."""

    evidence = "the loss, in one more pass and two derivatives"
    uses_loss = True

    def collect(self, model: nn.Module, data: DataPass) -> None:
        """The loss of each batch, its gradient, and the gradient of that gradient's square.

        In the mode that the network is in.
        """
        self.follow(model)
        weights = {canonical(name): p for name, p in model.named_parameters() if p.requires_grad}
        values = tuple(weights.values())

        def see(_: Batch, loss: Tensor) -> None:
            gradients = torch.autograd.grad(loss, values, create_graph=True, materialize_grads=True)
            half_square = torch.stack([gradient.square().sum() for gradient in gradients]).sum() / 2
            products = torch.autograd.grad(half_square, values, materialize_grads=True)
            self.record_weights({n: w.detach() * p for (n, w), p in zip(weights.items(), products, strict=True)})

        data.run(model, see, call=data.loss_of, keep_modes=True, grad=True)


@final
@dataclass(frozen=True)
class GraSP(ObservingCriterion):
    r"""By how much the gradient flow shrinks without the unit, :math:`\sum_i w_i (H g)_i` (GraSP: Wang et al., 2020).

    :math:`g` is the gradient of the loss and :math:`H` its Hessian, on the batch at hand when a cut is due; the sum is
    the first-order change of :math:`-\lVert g \rVert^2 / 2` when the unit's weights go to 0. Everything that goes with
    the unit counts, in all coupled layers. The paper scores single weights once, before training: cut in the first
    steps (``OneShot``) for that. Needs a ``training_step`` that returns the loss, of operators with a second
    derivative; with several processes each takes the Hessian of its own batch, and the means count.
    """

    @property
    def waived(self) -> Mapping[str, str]:
        """Units below zero."""
        return {"dead_is_lowest": "a unit without which the gradients grow scores below zero"}

    def statistic(self, structure: Structure) -> GradientFlow:
        """Hessian-gradient products."""
        return GradientFlow(structure)
