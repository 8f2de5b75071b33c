"""Relevance of units (Yeom et al., "Pruning by Explaining: A Novel Criterion for DNN Pruning", 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_prune.scoring.contexts import preserved_state
from lightning_prune.scoring.contributions import LINEAR_LAYERS
from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.data import Batch, DataPass, forward
from lightning_prune.scoring.passes import entering, outputs_of
from lightning_prune.scoring.statistics import ConsumerStatistic, Half, per_unit
from lightning_prune.structure.attention_calls import out_proj_called
from lightning_prune.structure.graph import Structure

__all__ = ["LRP", "Relevance"]

# Treated as input times a factor per element; for ReLU, the derivative is that factor already.
_GATES = (nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.ELU, nn.Mish, nn.Hardswish, nn.Softplus)


@final
class Relevance(ConsumerStatistic):
    """Absolute relevance of every unit at the inputs of the next layers, for the predicted class."""

    evidence = "outputs, in an extra pass"

    def __init__(self, structure: Structure, epsilon: float = 1e-9) -> None:
        super().__init__(structure)
        self.epsilon = epsilon
        self.declare("score", "sum")

    def collect(self, model: nn.Module, data: DataPass) -> None:
        """Propagate relevance in one forward and backward pass per batch."""
        self.follow(model)
        for batch in data:
            self._collect(model, batch)

    @torch.enable_grad()
    def _collect(self, model: nn.Module, batch: Batch) -> None:
        targets, epsilon = self.targets(model), self.epsilon
        with out_proj_called(model), preserved_state(model), entering(targets) as entered, _propagating(model, epsilon):
            outputs = outputs_of(forward(model, batch))
        chosen = torch.stack([x.amax(1).sum() if x.dim() > 1 else x.sum() for x in outputs]).sum()
        gradients = torch.autograd.grad(chosen, [x for _, x, _ in entered], materialize_grads=True)
        relevance: dict[str, Tensor] = {}
        for (layer, x, where), gradient in zip(entered, gradients, strict=True):
            for name, _, inputs in where:
                here = per_unit(layer, x.detach() * gradient, inputs).flatten(2).sum(2)
                relevance[name] = relevance[name] + here if name in relevance else here
        for name, found in relevance.items():
            self.record(name, 0, len(found), score=found.abs().sum(0))

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """Means over passes."""
        return self.per_pass("score", name, half).mean(0)


@contextmanager
def _propagating(model: nn.Module, epsilon: float) -> Iterator[None]:
    """Within the context, activation times gradient is the relevance by the ε-rule."""

    def stabilised(_: nn.Module, __: Any, z: Tensor) -> None:
        if z.requires_grad:
            factor = z.detach() / (z.detach() + epsilon * torch.where(z.detach() < 0, -1, 1))
            z.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]

    def gated(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        z = args[0]
        return z * torch.where(z == 0, 0, out.detach() / z.detach())

    handles = []
    for module in model.modules():
        if isinstance(module, (*LINEAR_LAYERS, _NormBase)):
            handles.append(module.register_forward_hook(stabilised))
        elif isinstance(module, _GATES):
            # Cloned, as an in-place activation would overwrite its input.
            handles.append(module.register_forward_pre_hook(lambda _, args: (args[0].clone(),)))
            handles.append(module.register_forward_hook(gated))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@final
@dataclass(frozen=True)
class LRP(ObservingCriterion):
    r"""Relevance of the unit for the prediction, :math:`\overline{|R_k|}`, by layer-wise relevance propagation.

    The score of the predicted class is propagated back through the network in proportion to contributions, :math:`R_i =
    \sum_j \frac{w_{ij} a_i}{z_j + \varepsilon \, \mathrm{sign}(z_j)} R_j` (Bach et al., 2015; as a criterion: Yeom et
    al., 2021). Relevance is summed over positions, repeats and consumers within a sample; the bar is the mean over the
    current batch when a cut is due. Classes are on dimension 1 of the outputs. The paper explains the label; here it is
    the predicted class, since ``forward`` has no labels, and the absolute value is used, so that evidence against a
    class counts too.

    ReLU and the activations of ``torch.nn`` are handled exactly. Other activations, and functional ones, use their
    derivative, like Captum, with which it agrees on networks without branches.

    Args:
        epsilon: Stabilizer of denominators.
    """

    epsilon: float = 1e-9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon >= 0:
            raise ValueError(f"LRP: expected `epsilon` of at least 0, got {self.epsilon}.")

    def statistic(self, structure: Structure) -> Relevance:
        """Relevance at the inputs of the next layers."""
        return Relevance(structure, self.epsilon)
