"""Statistics of the backward pass: of parameters, or activations, and their gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.scoring.contributions import per_pass
from lightning_prune.scoring.criterion import crossings, unit_rows
from lightning_prune.scoring.statistics import ActivationStatistic, EndOfBatch, Half, Statistic, Target
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.layers import named

__all__ = ["GradientStatistic", "MaskGradientStatistic", "MemberStatistic"]


class MemberStatistic(Statistic):
    """Base class of statistics of weights, summed over all members of a unit, including norms and biases."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure, {group.name: [m.tensor for m in group.members] for group in structure.groups})
        self.declare("score", "sum")

    @final
    def record_weights(self, found: Mapping[str, Tensor]) -> None:
        """Add values of one pass, by name and in the shape of the parameter."""
        for name, source, sums in self.unit_sums(found):
            self.record(name, source, 1, score=sums)

    @final
    def unit_sums(self, found: Mapping[str, Tensor]) -> Iterator[tuple[str, int, Tensor]]:
        """Sum values over the slices of each unit; yields group, source and sums of shape ``(width,)``."""
        for group in self.structure.groups:
            for source, member in enumerate(group.members):
                if member.tensor in found:
                    values = found[member.tensor]
                    sums = unit_rows(values, member).sum(1)
                    for rows, columns, crossed in crossings(group.members[:source], member, values):
                        sums = sums - crossed[rows, columns].flatten(1).sum(1)
                    yield group.name, source, sums

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """Mean over passes, summed over members: shape ``(width,)``."""
        return self.per_pass("score", name, half).sum(0)


class GradientStatistic(MemberStatistic):
    """Base class of statistics of weights and their gradients; subclasses implement ``increment``.

    All trained parameters of a group count, including biases and norms. Gradients are those of a single backward pass,
    before accumulation, clipping and averaging over ranks, and without the loss scale of mixed precision. Each process
    observes its own batch, so statistics that are not linear in the gradient depend on the number of processes
    (`Fisher`, which squares per sample, does not). ``passes`` are backward passes with equal weights.
    """

    evidence = "gradients"
    uses_loss = True
    _faulty = "gradients of"
    _unseen = "had a gradient"

    @abstractmethod
    def increment(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Value of every weight in one backward pass, in the shape of the arguments."""

    def gather(self, found: Mapping[str, Tensor]) -> None:
        """Record the values of one parameter."""
        self.record_weights(found)

    def observe(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register a hook on every trained parameter."""
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
        """Groups without trained parameters, with reasons."""
        trained = {name for name, tensor in named(model).items() if tensor.requires_grad}
        return {
            name: f"none of {', '.join(places)} is trained"
            for name, places in self.sources.items()
            if trained.isdisjoint(places)
        }


class MaskGradientStatistic(ActivationStatistic):
    r"""Mean squared gradient of a factor of 1 on each unit.

    The factor's gradient in pass :math:`n` is :math:`\sum a \, \partial L_n / \partial a` over all inputs of layers
    that are the unit: positions, repeats and coupled consumers share a factor and are summed before squaring.
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
        """Register hooks; when they are removed, the batch is complete and its squares are recorded."""
        self._batch = {}
        yield from super().observe(model)
        yield EndOfBatch(self._finish_batch)

    def see(self, layer: nn.Module, activation: Tensor, output: Tensor, targets: Sequence[Target]) -> None:
        """Register a hook for the gradient of the output."""
        if not output.requires_grad:
            return
        entered = activation.detach()

        def hook(gradient: Tensor) -> None:
            # The loss is a mean over the batch: the gradient of one sample is larger by the batch size.
            flow = per_pass(layer, entered, gradient / self.loss_scale)
            for name, _, inputs in targets:
                unit = flow[:, inputs].sum(2) * len(flow)
                key = (name, len(flow))
                self._batch[key] = self._batch[key] + unit if key in self._batch else unit

        output.register_hook(hook)  # type: ignore[no-untyped-call]

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """Mean square over passes: shape ``(width,)``."""
        return self.per_pass("score", name, half).mean(0)

    def _finish_batch(self) -> None:
        for (name, passes), gradient in self._batch.items():
            self.record(name, 0, passes, score=gradient.square().sum(0))
        self._batch = {}
