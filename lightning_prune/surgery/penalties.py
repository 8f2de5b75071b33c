"""Penalties that drive units towards zero during training, so that their removal changes little.

A penalty adds its gradient to that of the loss right before an optimizer step, or corrects the weights right after it.
It holds settings only and depends on the current weights, so that resumed runs are identical.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from lightning_prune.arguments import Settings
from lightning_prune.scoring import crossings, norm_scales
from lightning_prune.structure import Group, Member

__all__ = ["GroupLasso", "GrowingL2", "HalfSpace", "Penalty", "ScaleL1", "shrink_units"]

Parameters = Mapping[str, Tensor]


class Penalty(Settings, ABC):
    """Base class of penalties on the units of groups."""

    @abstractmethod
    def before_step(self, groups: Iterable[Group], parameters: Parameters, step: int, scale: float = 1.0) -> None:
        """Add the penalty's gradient before a step.

        Args:
            groups: Penalized groups.
            parameters: Trained parameters of the optimizer with a gradient, by qualified name.
            step: Number of optimizer steps before this one.
            scale: Gradient scale of mixed precision.
        """

    def remember(self, groups: Iterable[Group], parameters: Parameters) -> dict[str, Tensor]:  # noqa: ARG002
        """Weights before the step that ``after_step`` needs."""
        return {}

    def after_step(
        self, groups: Iterable[Group], parameters: Parameters, step: int, before: Mapping[str, Tensor]
    ) -> None:
        """Correct the weights after a step, in place.

        Args:
            groups: Penalized groups.
            parameters: Trained parameters by qualified name.
            step: Number of optimizer steps before this one.
            before: Result of ``remember``.
        """

    def members(self, group: Group) -> Sequence[Member]:
        """Penalized members of a group."""
        return group.members

    def unsuited(self, group: Group) -> str | None:  # noqa: ARG002
        """Reason why a group cannot be penalized, or None."""
        return None


@final
@dataclass(frozen=True)
class ScaleL1(Penalty):
    r"""L1 penalty on the scales of norms, :math:`\lambda \sum |\gamma|` (network slimming: Liu et al., 2017).

    The subgradient :math:`\lambda \, \mathrm{sign}(\gamma)` is added to the gradient.

    Args:
        strength: :math:`\lambda`, at least 0; the paper has 1e-4 on CIFAR and 1e-5 on ImageNet.
    """

    strength: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_zero(self, strength=self.strength)

    @torch.no_grad()
    def before_step(self, groups: Iterable[Group], parameters: Parameters, step: int, scale: float = 1.0) -> None:  # noqa: ARG002
        """Add the subgradient of every scale."""
        for group in groups:
            for member in self.members(group):
                for weight, gradient in _trained(member, parameters):
                    index = _index(member, weight).flatten()
                    gradient.index_add_(0, index, weight[index].sign().to(gradient.dtype), alpha=self.strength * scale)

    def members(self, group: Group) -> list[Member]:
        """Scales of norms."""
        return norm_scales(group)

    def unsuited(self, group: Group) -> str | None:
        """A group without normalisation."""
        return None if norm_scales(group) else "it has no normalisation with scale and shift"


@final
@dataclass(frozen=True)
class GroupLasso(Penalty):
    r"""Group lasso over all members of a unit, :math:`\lambda \sum_k \lVert w_k \rVert_2`.

    :math:`w_k` are all weights that produce or consume the unit, biases and norms, in all coupled layers (structured
    sparsity: Wen et al., 2016; over dependency groups: Fang et al., 2023).

    Args:
        strength: :math:`\lambda`, at least 0.
    """

    strength: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_zero(self, strength=self.strength)

    @torch.no_grad()
    def before_step(self, groups: Iterable[Group], parameters: Parameters, step: int, scale: float = 1.0) -> None:  # noqa: ARG002
        r"""Add :math:`\lambda w / \lVert w_k \rVert`; nothing for a unit that is zero."""
        for group in groups:
            norms = _sums(group.members, group.width, parameters).sqrt()
            pull = torch.where(norms > 0, self.strength * scale / norms, 0.0)
            _pull(group.members, parameters, pull)


@final
@dataclass(frozen=True)
class GrowingL2(Penalty):
    r"""Growing L2 penalty on the units with the smallest weights (GReg-1: Wang et al., 2021).

    :math:`\lambda(t) = \min(\delta \lfloor t / K \rfloor, \lambda_{max})`, on the weights that produce a unit. The
    paper selects the units once; here, they are the lowest share at every step, which the penalty keeps lowest.

    Args:
        share: Share of every group's units to penalize, in (0, 1): the share to remove.
        delta: Increment :math:`\delta`.
        every: Number of optimizer steps between increments :math:`K`, at least 1.
        ceiling: Maximum :math:`\lambda_{max}`.
    """

    share: float = 0.5
    delta: float = 1e-4
    every: int = 10
    ceiling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(f"GrowingL2: expected a `share` in (0, 1), got {self.share}.")
        if self.every < 1:
            raise ValueError(f"GrowingL2: expected `every` to be 1 step or more, got {self.every}.")
        _at_least_zero(self, delta=self.delta, ceiling=self.ceiling)

    def members(self, group: Group) -> list[Member]:
        """Weights that produce the units."""
        return _producers(group)

    @torch.no_grad()
    def before_step(self, groups: Iterable[Group], parameters: Parameters, step: int, scale: float = 1.0) -> None:
        r"""Add :math:`\lambda(t) w` to the lowest units."""
        strength = min(self.delta * (step // self.every), self.ceiling)
        for group in groups:
            producers = self.members(group)
            sizes = torch.zeros(group.width, dtype=torch.float64)
            for member in producers:
                for weight in _present(member, parameters):
                    sizes = sizes.to(weight.device) + _rows(member, weight).abs().sum(1)
            lowest = sizes.argsort(stable=True)[: math.floor(self.share * group.width)]
            pull = torch.zeros_like(sizes)
            pull[lowest] = strength * scale
            _pull(producers, parameters, pull)


@final
@dataclass(frozen=True)
class HalfSpace(Penalty):
    r"""Group lasso, then half-space projection of units to zero (OTO: Chen et al., 2021).

    The subgradient of :math:`\lambda \sum_k \lVert w_k \rVert_2` is added to the gradient. From step ``start`` on, a
    unit whose new weights :math:`x'` leave the half-space of the old ones, :math:`\langle x', x \rangle < \varepsilon
    \lVert x \rVert^2`, is set to zero and stays zero. The weights of a unit are those that produce it, its bias and its
    norm, without the layers that consume it.

    Args:
        strength: :math:`\lambda`, at least 0.
        start: Optimizer steps before the first projection.
        epsilon: In [0, 1); the larger, the more units are projected.
    """

    strength: float = 1e-3
    start: int = 1000
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"HalfSpace: expected `epsilon` in [0, 1), got {self.epsilon}.")
        _at_least_zero(self, strength=self.strength, start=self.start)

    def members(self, group: Group) -> list[Member]:
        """Weights, biases and norms of the units, without consumers."""
        return _producers(group, along=True)

    @torch.no_grad()
    def before_step(self, groups: Iterable[Group], parameters: Parameters, step: int, scale: float = 1.0) -> None:  # noqa: ARG002
        """Add the gradient of the group lasso over these members."""
        for group in groups:
            members = self.members(group)
            norms = _sums(members, group.width, parameters).sqrt()
            _pull(members, parameters, torch.where(norms > 0, self.strength * scale / norms, 0.0))

    def remember(self, groups: Iterable[Group], parameters: Parameters) -> dict[str, Tensor]:
        """The weights before the step."""
        names = {member.tensor for group in groups for member in self.members(group)}
        return {name: parameters[name].detach().clone() for name in names if name in parameters}

    @torch.no_grad()
    def after_step(
        self, groups: Iterable[Group], parameters: Parameters, step: int, before: Mapping[str, Tensor]
    ) -> None:
        """Project units to zero."""
        if step < self.start:
            return
        for group in groups:
            members = [member for member in self.members(group) if member.tensor in before]
            if not members:
                continue
            old = torch.cat([_rows(member, before[member.tensor]) for member in members], 1)
            new = torch.cat([_rows(member, parameters[member.tensor]) for member in members], 1)
            size = old.square().sum(1)
            leaves = ((old * new).sum(1) < self.epsilon * size) | (size == 0)
            for member in members:
                weight = parameters[member.tensor]
                weight.index_fill_(member.dim, _index(member, weight)[leaves].flatten(), 0)


@torch.no_grad()
def shrink_units(
    groups: Iterable[Group], kept: Mapping[str, Sequence[int]], tensors: Parameters, factor: float
) -> None:
    """Multiply all parameters of the units that a plan does not keep by a factor, in place.

    Args:
        groups: The groups; those that are not in ``kept`` are not changed.
        kept: Units to keep, by group.
        tensors: Parameters and buffers by qualified name; buffers are not changed.
        factor: At least 0.
    """
    for group in groups:
        gone = sorted(set(range(group.width)) - set(kept.get(group.name, range(group.width))))
        for member in group.members:
            weight = tensors.get(member.tensor)
            if gone and isinstance(weight, nn.Parameter):
                index = _index(member, weight)[gone].flatten()
                weight.index_copy_(member.dim, index, weight.index_select(member.dim, index) * factor)


def _at_least_zero(penalty: Penalty, **numbers: float) -> None:
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{type(penalty).__name__}: expected `{name}` of at least 0, got {number}.")


def _producers(group: Group, *, along: bool = False) -> list[Member]:
    return [member for member in group.members if member.role == "out" or (along and member.role == "along")]


def _present(member: Member, parameters: Parameters) -> Iterator[Tensor]:
    if member.tensor in parameters:
        yield parameters[member.tensor].detach()


def _trained(member: Member, parameters: Parameters) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameter of a member and its gradient, if it has one."""
    parameter = parameters.get(member.tensor)
    if parameter is not None and parameter.grad is not None:
        yield parameter.detach(), parameter.grad


def _index(member: Member, tensor: Tensor) -> Tensor:
    return torch.as_tensor(member.index, device=tensor.device)


def _rows(member: Member, tensor: Tensor) -> Tensor:
    """A member's slices, one row per unit, in float64 where the device has it."""
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    return tensor.detach().movedim(member.dim, 0)[_index(member, tensor)].flatten(1).to(dtype)


def _sums(members: Sequence[Member], width: int, parameters: Parameters) -> Tensor:
    """Sums of squares over all members of a unit, shape ``(width,)``."""
    total = torch.zeros(width)
    for place, member in enumerate(members):
        for weight in _present(member, parameters):
            others = [dim for dim in range(weight.dim()) if dim != member.dim]
            squares = weight.to(torch.promote_types(weight.dtype, torch.float32)).square()
            along = squares.sum(others) if others else squares
            total = total.to(along) + along[_index(member, weight)].sum(1)
            for rows, columns, twice in crossings(members[:place], member, squares):
                total -= twice[rows, columns].flatten(1).sum(1)
    return total


def _pull(members: Sequence[Member], parameters: Parameters, pull: Tensor) -> None:
    """Add ``pull[k] · w`` to the gradient of every weight of unit k."""
    for place, member in enumerate(members):
        for weight, gradient in _trained(member, parameters):
            factor = torch.zeros(weight.shape[member.dim], device=weight.device, dtype=pull.dtype)
            index = _index(member, weight)
            factor[index] = pull.to(weight.device)[:, None].expand(index.shape)
            shape = [-1 if dim == member.dim else 1 for dim in range(weight.dim())]
            gradient.add_((weight * factor.view(shape)).to(gradient.dtype))
            once = zip(*(crossings(members[:place], member, t) for t in (weight, gradient)), strict=True)
            for (rows, columns, twice), (_, _, pulled) in once:
                found = twice[rows, columns]
                less = found * pull.to(weight.device).view(-1, *[1] * (found.dim() - 1))
                pulled[rows, columns] -= less.to(gradient.dtype)
