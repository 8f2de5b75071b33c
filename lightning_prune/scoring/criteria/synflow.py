"""Synaptic flow (Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.data import DataPass
from lightning_prune.scoring.gradients import MemberStatistic
from lightning_prune.scoring.passes import positive_response
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.tracing import Call

__all__ = ["SynFlow", "SynapticFlow"]


@final
class SynapticFlow(MemberStatistic):
    """Products of absolute weights and gradients of the positive response."""

    evidence = "an extra pass"
    uses_data = False

    def collect(self, model: nn.Module, data: DataPass) -> None:
        """Run one forward and backward pass on ones in the shape of the first batch."""
        self.follow(model)
        batch = next(iter(data))
        response, weights = positive_response(model, Call(batch.args, batch.kwargs))
        gradients = torch.autograd.grad(response, tuple(weights.values()), materialize_grads=True)
        flow = [weight.detach() * gradient for weight, gradient in zip(weights.values(), gradients, strict=True)]
        self.record_weights(dict(zip(weights, flow, strict=True)))


@final
@dataclass(frozen=True)
class SynFlow(ObservingCriterion):
    r"""Synaptic flow through the unit, :math:`\sum_i |w_i| \, \partial R / \partial |w_i|` (Tanaka et al., 2020).

    :math:`R` is the sum of the outputs with absolute weights on inputs of ones; no data is needed. The sum is over all
    members of the unit. Saturating activations (``Tanh``, ``Sigmoid``) block the flow: use another criterion for the
    layers before them. The paper prunes in a hundred small steps before training; here, each cut of the schedule is one
    step.
    """

    def statistic(self, structure: Structure) -> SynapticFlow:
        """Synaptic flow of every parameter."""
        return SynapticFlow(structure)
