"""CURL (Luo and Wu, "Neural Network Pruning with Residual-Connections and Limited-Data", 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.passes import outputs_of
from lightning_prune.scoring.statistics import ConsumerStatistic, Half
from lightning_prune.scoring.undisturbed import undisturbed
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.tracing import Call

__all__ = ["KLDivergence", "MaskedDivergence"]


@final
class MaskedDivergence(ConsumerStatistic):
    """Divergence of the outputs from those of the network in which a unit is 0, for one unit after the other."""

    evidence = "outputs, in one more pass per unit"

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        self.declare("score", "sum")

    @torch.no_grad()
    def examine(self, model: nn.Module, call: Call) -> None:
        """One forward pass, and one for each unit."""
        self.follow(model)
        places: dict[str, list[tuple[nn.Module, Tensor]]] = {}
        for layer, targets in self.targets(model).items():
            for target in targets:
                places.setdefault(target.group, []).append((layer, target.inputs))
        with undisturbed(model):
            whole = _log_probabilities(model(*call.args, **call.kwargs))
            for name, layers in places.items():
                found, zero = [], torch.zeros((), device=self.device)
                for unit in range(self.structure.group(name).width):
                    masks = [
                        layer.register_forward_pre_hook(partial(_mask, layer, inputs[unit]), with_kwargs=True)
                        for layer, inputs in layers
                    ]
                    try:
                        masked = _log_probabilities(model(*call.args, **call.kwargs))
                    finally:
                        for mask in masks:
                            mask.remove()
                    found.append(sum(((p.exp() * (p - q)).sum() for p, q in zip(whole, masked, strict=True)), zero))
                self.record(name, 0, len(whole[0]), score=torch.stack(found))

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """Means over passes."""
        return self.per_pass("score", name, half).mean(0)


def _mask(layer: nn.Module, inputs: Tensor, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What enters a layer, with some of its inputs 0."""
    x = args[0] if args else kwargs["input"]
    channel = -1 if isinstance(layer, nn.Linear) else 1 - layer.get_parameter("weight").dim()
    x = x.index_fill(channel, inputs, 0)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})


def _log_probabilities(result: Any) -> list[Tensor]:
    """Logarithms of the softmax over classes, which lie on dimension 1 as ``cross_entropy`` has it."""
    return [
        x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(min(x.dim() - 1, 1)) for x in outputs_of(result)
    ]


@final
@dataclass(frozen=True)
class KLDivergence(ObservingCriterion):
    r"""Divergence of the outputs when a unit is masked, :math:`\mathrm{KL}(p \Vert p_{-k})` (CURL: Luo and Wu, 2020).

    The unit is set to 0 where it enters the next layers; outputs are classes on dimension 1, and the divergences are
    summed over positions and averaged over the batch at hand when a cut is due. Costs one forward pass for every unit.
    """

    def statistic(self, structure: Structure) -> MaskedDivergence:
        """Divergences, unit by unit."""
        return MaskedDivergence(structure)
