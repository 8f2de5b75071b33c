"""Starting anew after a cut: the narrow network keeps its shape, and of what it has learnt nothing or the beginning."""

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

#: How new weights are drawn: normal by He et al., or as each module's ``reset_parameters`` does.
Rule = Literal["he", "own"]


@final
@dataclass(frozen=True)
class Reinitialise(Repair):
    r"""Draws all weights anew, so that the narrow network trains from scratch.

    By the rule ``"he"`` (the thesis), linear and convolutional weights are normal with
    :math:`\sigma^2 = 2 / \mathrm{fan}_{in}` (He et al., 2015) and their biases 0; every other layer draws as its
    ``reset_parameters`` does, running statistics of norms included. By the rule ``"own"`` every layer does. What a
    network's constructor does to its weights after that is not repeated. Frozen parameters are drawn as well. The
    optimizer's state is cleared; learning rate and schedulers go on as they are. The history of the cut remembers the
    rule (``reinitialised/he``).

    Args:
        seed: Of the random numbers, the same in all processes; those of the training go on as if none were drawn.
        rule: ``"he"`` or ``"own"``.

    Raises:
        ValueError: For an unknown rule; in ``after``, for a parameter of a module that cannot draw it.
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
                f"{', '.join(lost)}. Give its module a `reset_parameters()` that draws it."
            )
        after = _own(model)
        return {name: after[name].detach().clone() for name in before if not torch.equal(after[name], before[name])}


@final
@dataclass(frozen=True, eq=False)
class StoredWeights(Repair):
    """Gives parameters and buffers contents that are known, and clears the optimizer's state.

    Args:
        weights: Contents by name, in the shapes before the cut, which slices them.
    """

    weights: Mapping[str, Tensor]

    batches = 0
    restarts = True

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:  # noqa: ARG002
        """The given contents."""
        return dict(self.weights)


def _own(model: nn.Module) -> dict[str, Tensor]:
    return {canonical(name): tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _draw(module: nn.Module, rule: Rule) -> bool:
    """Draw what the module itself owns; whether it can."""
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        return False
    reset()
    if rule == "he" and isinstance(module, (nn.Linear, _ConvNd)) and isinstance(module.weight, nn.Parameter):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return True
