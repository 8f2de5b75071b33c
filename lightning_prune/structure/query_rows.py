"""Queries of attention whose scale follows the width of its heads: the rows of weights that compute them.

PyTorch's fused attention multiplies the products of queries and keys by 1/√width if it is given no scale. Where
features of heads are removed, the rows of the queries are multiplied by √(new width / old width), so that the
temperature of the softmax stays. Which rows these are is read from gradients, and that nothing else depends on them is
shown by numbers: on a copy with noise in its weights, the cut network must equal the masked one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lightning_prune.structure.analysis import Analysis
from lightning_prune.structure.cost import CostModel
from lightning_prune.structure.graph import Axes, Factors, Group, Member, Structure
from lightning_prune.structure.traced_model import first_line
from lightning_prune.structure.tracing import FakeCopy, output_tensors

__all__ = ["with_query_rows"]

#: How many times further from the masked network the cut one must be without the factors than with them.
_CERTAINTY = 100
#: Largest number of parameters of a network that is copied with its weights for this.
_MOST_PARAMETERS = 1_000_000_000


def with_query_rows(analysis: Analysis, groups: Sequence[Group], modules: Mapping[str, set[str]]) -> list[Group]:
    """Groups of features of heads with their `Group.queries`, without those whose temperature cannot be kept.

    Args:
        analysis: Analysis of the network, which gets a note about groups that are left out.
        groups: Groups of features.
        modules: Names of the modules whose attention computes its scale from the width, for groups that have any.
    """
    asked = [group for group in groups if modules.get(group.name)]
    found, why = {}, "the cut network would not equal the masked one"
    if asked:
        try:
            found = {group.name: group for group in _Numbers(analysis).checked(asked, modules)}
        except Exception as error:  # of the user's network, on real tensors
            why = f"{type(error).__name__}: {first_line(error)}"
    lost = [group.name for group in asked if group.name not in found]
    if lost:
        analysis.notes.append(
            f"the features of heads of {', '.join(lost)} were left out, as the temperature of their softmax could not "
            f"be kept: {why}"
        )
    return [found.get(group.name, group) for group in groups if group.name not in lost]


class _Numbers:
    """Runs a copy of the network with noise in its weights.

    Args:
        analysis: Analysis of the network.

    Raises:
        ValueError: If the network is too large, or no process has all weights.
    """

    def __init__(self, analysis: Analysis) -> None:
        size = sum(parameter.numel() for parameter in analysis.traced.model.parameters())
        if size > _MOST_PARAMETERS:
            raise ValueError(f"expected at most {_MOST_PARAMETERS:,} parameters, to run a copy, got {size:,}")
        self.analysis, self.call = analysis, analysis.traced.calls[0]
        self.copy = analysis.traced.copy("real")
        generator = torch.Generator().manual_seed(0)
        for parameter in self.copy.module.parameters():
            if parameter.is_floating_point():
                spread = max(parameter[0].numel(), 1) ** -0.5 if parameter.dim() > 1 else 0.1
                noise = torch.randn(parameter.shape, generator=generator) * spread
                parameter.requires_grad_().data.add_(noise.to(parameter))

    def checked(self, groups: Sequence[Group], modules: Mapping[str, set[str]]) -> list[Group]:
        """The groups with their queries, of which a cut keeps what the masked network computes."""
        recorder = _Queries(self.copy, groups, modules)
        with recorder:
            self.copy.compute(self.call)
        whole = [replace(group, queries=tuple(queries)) for group, queries in recorder.queries()]
        return whole if self._is_equal(whole) else [group for group in whole if self._is_equal([group])]

    def _is_equal(self, groups: Sequence[Group]) -> bool:
        """Whether a cut equals the masked network, and would not without the factors."""
        kept = {group.name: tuple(range(0, group.width, 2)) for group in groups}
        structure = Structure(tuple(groups), (), CostModel((), (), self.analysis.shapes))
        axes, factors = structure.axes(kept), structure.factors(kept)
        with torch.no_grad(), self.copy.masked(axes):
            masked = self._values()
        without, scaled = (float((self._cut(axes, f) - masked).norm()) for f in ({}, factors))
        return scaled * _CERTAINTY < without

    def _cut(self, axes: Axes, factors: Factors) -> Tensor:
        with torch.no_grad(), self.copy.cut(axes):
            for name, (rows, factor) in factors.items():
                self.copy.named[name].data[torch.from_numpy(rows)] *= factor
            return self._values()

    def _values(self) -> Tensor:
        outputs = [out for out in output_tensors(self.copy.compute(self.call)) if out.is_floating_point()]
        return torch.cat([out.detach().double().flatten() for out in outputs])


class _Queries(TorchFunctionMode):
    """Records which rows of a group's tensors the queries of its attention depend on."""

    def __init__(self, copy: FakeCopy, groups: Sequence[Group], modules: Mapping[str, set[str]]) -> None:
        super().__init__()
        self.copy, self.groups, self.modules = copy, groups, modules
        self.rows: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and kwargs.get("scale") is None:
            for group in self.groups:
                if self.copy.stack[-1] in self.modules[group.name]:
                    self._see(group, args[0] if args else kwargs["query"])
        return func(*args, **kwargs)

    def _see(self, group: Group, query: Tensor) -> None:
        present = {m.tensor: self.copy.named[m.tensor] for m in group.members if m.role != "in"}
        own = {name: tensor for name, tensor in present.items() if isinstance(tensor, nn.Parameter)}
        value = (query * torch.randn_like(query)).sum()
        grads = torch.autograd.grad(value, list(own.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(own, grads, strict=True):
            if grad is not None:
                rows = (grad != 0).flatten(1).any(1) if grad.dim() > 1 else grad != 0
                self.rows[name] = rows | self.rows.get(name, rows)

    def queries(self) -> list[tuple[Group, list[Member]]]:
        """The groups, each with the rows of its members that queries depend on."""
        return [(group, [self._rows_of(member) for member in self._members(group)]) for group in self.groups]

    def _members(self, group: Group) -> list[Member]:
        return [m for m in group.members if m.dim == 0 and m.tensor in self.rows and self.rows[m.tensor].any()]

    def _rows_of(self, member: Member) -> Member:
        """The positions that are rows of queries, as many of every unit."""
        chosen = self.rows[member.tensor].numpy(force=True)[member.index]
        if len(counts := np.unique(chosen.sum(1))) > 1:
            raise ValueError(f"expected the queries to have as many rows of each feature in {member.tensor}: {counts}")
        return replace(member, index=member.index[chosen].reshape(len(member.index), -1))
