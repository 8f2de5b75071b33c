"""Propagated importance (Yu et al., "NISP: Pruning Networks using Neuron Importance Score Propagation", 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.data import DataPass
from lightning_prune.scoring.passes import entering, positive_response
from lightning_prune.scoring.statistics import ConsumerStatistic, Half, per_unit
from lightning_prune.structure.attention_calls import out_proj_called
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.tracing import Call

__all__ = ["NISP", "PropagatedImportance"]


@final
class PropagatedImportance(ConsumerStatistic):
    """Summed gradients of the positive response at the inputs of the next layers."""

    evidence = "an extra pass"
    uses_data = False

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        self.declare("score", "sum")

    def collect(self, model: nn.Module, data: DataPass) -> None:
        """Run one forward and backward pass on ones in the shape of the first batch."""
        self.follow(model)
        batch = next(iter(data))
        with out_proj_called(model), entering(self.targets(model)) as entered:
            response, _ = positive_response(model, Call(batch.args, batch.kwargs))
        inputs = [alias for _, alias, _ in entered]
        gradients = torch.autograd.grad(response, inputs, materialize_grads=True)
        importance: dict[tuple[str, int], Tensor] = {}  # a layer may be called several times
        for (layer, _, where), gradient in zip(entered, gradients, strict=True):
            for name, source, of_units in where:
                here = per_unit(layer, gradient, of_units).flatten(2).sum((0, 2))
                importance[name, source] = importance.get((name, source), 0) + here
        for (name, source), score in importance.items():
            self.record(name, source, 1, score=score)

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """Sums over consumers."""
        return self.per_pass("score", name, half).sum(0)


@final
@dataclass(frozen=True)
class NISP(ObservingCriterion):
    r"""Importance propagated from the outputs, :math:`s_k = \sum_j |w_{jk}| s_j` (NISP: Yu et al., 2018).

    The gradient of the summed outputs with respect to the unit in a network with absolute weights on inputs of ones (0
    before a saturating activation such as ``Tanh``), summed over positions, repeats and consumers. Unlike in the paper,
    where the features of the last hidden layer are ranked by data, all outputs are equally important.
    """

    def statistic(self, structure: Structure) -> PropagatedImportance:
        """Importance at the inputs of the next layers."""
        return PropagatedImportance(structure)
