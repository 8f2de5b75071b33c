"""Restarting after a cut: the narrow network gets new weights, or earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_prune.scoring.contexts import seeded_rng
from lightning_prune.structure.graph import Axes
from lightning_prune.structure.layers import tensors
from lightning_prune.surgery.repairs.repair import Repair, Run
from lightning_prune.surgery.tensors import canonical

__all__ = ["Reinitialise", "StoredWeights"]

#: Initialisation: normal as by He et al., or by each module's ``reset_parameters``.
Rule = Literal["he", "own"]


@final
@dataclass(frozen=True)
class Reinitialise(Repair):
    r"""Reinitialises all weights, so that the narrow network trains from scratch.

    With the rule ``"he"`` (used in the thesis), linear and convolutional weights are normal with
    :math:`\sigma^2 = 2 / \mathrm{fan}_{in}` (He et al., 2015) and their biases 0; every other layer uses its
    ``reset_parameters``, which also resets running statistics of norms. With the rule ``"own"``, every layer uses
    ``reset_parameters``. `torch.nn.MultiheadAttention`, which has none, is initialised as PyTorch does. Custom
    initialisation in a network's constructor is not repeated. Frozen parameters are reinitialised as well. The
    optimizer state is cleared; learning rate and schedulers continue. The rule is recorded in the history of the cut
    (``reinitialised/he``).

    Args:
        seed: Seed of the weights, the same in all processes; the random state of the training is not changed.
        rule: ``"he"`` or ``"own"``.

    Raises:
        ValueError: For an unknown rule; in ``after``, for a parameter of a module without ``reset_parameters``.
    """

    seed: int = 0
    rule: Rule = "he"

    batches = 0
    restarts = True

    @property
    def info(self) -> dict[str, float]:
        """The rule, for the history of the cut."""
        return {f"reinitialised/{self.rule}": 1}

    def after(self, model: nn.Module, run: Run) -> dict[str, Tensor]:  # noqa: ARG002
        """New contents of every parameter, and of the buffers of norms."""
        before = {name: tensor.detach().clone() for name, tensor in _own(model).items()}
        with seeded_rng(self.seed):
            drawn = [
                id(tensor)
                for module in model.modules()
                if _draw(module, self.rule)
                for tensor in tensors(module).values()
            ]
        parameters = {canonical(name): parameter for name, parameter in model.named_parameters()}
        lost = [name for name, parameter in parameters.items() if id(parameter) not in drawn]
        if lost:
            raise ValueError(
                f"Reinitialise: expected every parameter to belong to a module with `reset_parameters`, got "
                f"{', '.join(lost)}. Add a `reset_parameters()` that initialises it to its module."
            )
        after = _own(model)
        return {name: after[name].detach().clone() for name in before if not torch.equal(after[name], before[name])}


@final
@dataclass(frozen=True, eq=False)
class StoredWeights(Repair):
    """Sets parameters and buffers to given values, and clears the optimizer state.

    Args:
        weights: Values by name, in the shapes before the cut, which slices them.
    """

    weights: Mapping[str, Tensor]

    batches = 0
    restarts = True

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:  # noqa: ARG002
        """The given values."""
        return dict(self.weights)


def _own(model: nn.Module) -> dict[str, Tensor]:
    return {canonical(name): tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _draw(module: nn.Module, rule: Rule) -> bool:
    """Initialise the module's own parameters; returns whether this is possible."""
    if isinstance(module, nn.MultiheadAttention):
        _draw_attention(module)
        return True
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        return False
    reset()
    if rule == "he" and isinstance(module, (nn.Linear, _ConvNd)) and isinstance(module.weight, nn.Parameter):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return True


def _draw_attention(layer: nn.MultiheadAttention) -> None:
    """Initialise the layer's own parameters as PyTorch does; its output projection is a layer by itself."""
    for name, tensor in tensors(layer).items():
        if name.endswith("_weight"):
            nn.init.xavier_uniform_(tensor)
        elif name == "in_proj_bias":
            nn.init.zeros_(tensor)
        else:
            nn.init.xavier_normal_(tensor)
