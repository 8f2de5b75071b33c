"""What is observed in the backward pass: numbers made of parameters, or of activations, and their gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.scoring.contributions import per_pass
from lightning_prune.scoring.criterion import crossings, unit_rows
from lightning_prune.scoring.statistics import ActivationStatistic, Half, Statistic, Target
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.layers import named

__all__ = ["EndOfBatch", "GradientStatistic", "MaskGradientStatistic", "MemberStatistic"]


class MemberStatistic(Statistic):
    """A number per weight, summed over everything a unit is made of: one source per member, norms and biases too."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure, {group.name: [m.tensor for m in group.members] for group in structure.groups})
        self.declare("score", "sum")

    @final
    def record_weights(self, found: Mapping[str, Tensor]) -> None:
        """Add numbers by the name of the parameter they belong to, in its shape, from one pass."""
        for name, source, sums in self.unit_sums(found):
            self.record(name, source, 1, score=sums)

    @final
    def unit_sums(self, found: Mapping[str, Tensor]) -> Iterator[tuple[str, int, Tensor]]:
        """Sums over what each unit has of every parameter: group, source and numbers of shape ``(width,)``."""
        for group in self.structure.groups:
            for source, member in enumerate(group.members):
                if member.tensor in found:
                    values = found[member.tensor]
                    sums = unit_rows(values, member).sum(1)
                    for rows, columns, crossed in crossings(group.members[:source], member, values):
                        sums = sums - crossed[rows, columns].flatten(1).sum(1)
                    yield group.name, source, sums

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """The mean over passes, summed over members: shape ``(width,)``."""
        return self.per_pass("score", name, half).sum(0)


class GradientStatistic(MemberStatistic):
    """A number per weight and its gradient.

    A subclass writes ``increment``. All parameters of a group count, biases and norms too; a parameter that is frozen
    or gets no gradient adds nothing. Gradients are those of one backward pass, before they are added to what
    accumulated, clipped or averaged over ranks, with weights as they were in it, and without the factor that mixed
    precision puts on the loss. Several processes observe a batch each, as one process would smaller batches: what is
    not linear in the gradient then differs from one process on all of it; `Fisher`, which squares sample by sample,
    does not. ``passes`` are backward passes; each weighs the same.
    """

    evidence = "gradients"
    uses_loss = True
    _faulty = "gradients of"
    _unseen = "had a gradient"

    @abstractmethod
    def increment(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The number of every single weight in one backward pass; same shape as both arguments."""

    def gather(self, found: Mapping[str, Tensor]) -> None:
        """Take the numbers of one parameter, whose gradient has just been found."""
        self.record_weights(found)

    def observe(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """A hook on every parameter that is trained."""
        wanted = {member.tensor for group in self.structure.groups for member in group.members}

        def hook(name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
            with torch.no_grad():
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                weight, gradient = parameter.detach().to(dtype), gradient.to(dtype) / self.loss_scale
                self.gather({name: self.increment(weight, gradient)})

        for name, parameter in named(model).items():
            if name in wanted and isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                yield parameter.register_hook(partial(hook, name, parameter))  # type: ignore[no-untyped-call]

    def unhookable(self, model: nn.Module) -> dict[str, str]:
        """Groups without a parameter that is trained."""
        trained = {name for name, tensor in named(model).items() if tensor.requires_grad}
        return {
            name: f"none of {', '.join(places)} is trained"
            for name, places in self.sources.items()
            if trained.isdisjoint(places)
        }


class MaskGradientStatistic(ActivationStatistic):
    r"""Mean square of the gradient that a factor of 1 on each unit would get.

    The factor's gradient in pass :math:`n` is :math:`\sum a \, \partial L_n / \partial a` over all places where the
    unit enters a layer: positions, repeats and coupled consumers share one factor, so they add up before the square.
    """

    evidence = "activations and gradients"
    uses_loss = True
    _faulty = "activations or gradients at layer"
    _unseen = "was called as a module and had a gradient"

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        self.declare("score", "sum")
        self._batch: dict[tuple[str, int], Tensor] = {}  # by group and number of passes: (passes, width)

    def observe(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """As for all activations; when the hooks go, the batch is over and its squares are taken."""
        self._batch = {}
        yield from super().observe(model)
        yield EndOfBatch(self._settle)

    def see(self, layer: nn.Module, activation: Tensor, output: Tensor, targets: Sequence[Target]) -> None:
        """Wait for the gradient of what came out."""
        if not output.requires_grad:
            return
        entered = activation.detach()

        def hook(gradient: Tensor) -> None:
            # The loss is a mean over the batch: a pass of its own has its gradient times their number.
            flow = per_pass(layer, entered, gradient / self.loss_scale)
            for name, _, inputs in targets:
                unit = flow[:, inputs].sum(2) * len(flow)
                key = (name, len(flow))
                self._batch[key] = self._batch[key] + unit if key in self._batch else unit

        output.register_hook(hook)  # type: ignore[no-untyped-call]

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """The mean square over passes: shape ``(width,)``."""
        return self.per_pass("score", name, half).mean(0)

    def _settle(self) -> None:
        for (name, passes), gradient in self._batch.items():
            self.record(name, 0, passes, score=gradient.square().sum(0))
        self._batch = {}


class EndOfBatch(RemovableHandle):
    """Removed with a batch's hooks: the batch is over, and ``settle`` is called."""

    def __init__(self, settle: Callable[[], None]) -> None:
        super().__init__(OrderedDict())
        self.settle = settle

    def remove(self) -> None:
        """The end."""
        self.settle()
