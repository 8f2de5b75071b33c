"""Queries of attention whose scale follows the width of its heads: the rows of weights that compute them.

PyTorch's fused attention multiplies the products of queries and keys by 1/√width if it is given no scale. Where
features of heads are removed, the rows of the queries are multiplied by √(new width / old width), so that the
temperature of the softmax stays. Which rows these are is read from gradients, and that nothing else depends on them is
shown by numbers: on a copy with noise in its weights, the cut network must equal one whose attention is given the scale
of the whole heads. Queries that a norm over their features gives are multiplied by its weight.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lightning_prune.structure.analysis import Analysis
from lightning_prune.structure.cost import CostModel
from lightning_prune.structure.graph import Axes, Factors, Group, IndexArray, Member, Structure
from lightning_prune.structure.traced_model import first_line
from lightning_prune.structure.tracing import Call, FakeCopy, output_tensors

__all__ = ["with_query_rows"]

#: How many times further from the network with the scale of whole heads the cut one must be without the factors.
_CERTAINTY = 100
#: Share of the queries below which a layer only turns them, as one in front of a norm.
_SMALLEST_SHARE = 1e-3
#: What queries are multiplied by in the checks; the attention divides them by it. The second shows where they are
#: clipped, the first what is added to them.
_SIZES = (1.0, 1024.0)
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # of PyTorch's attention
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
    found, why = {}, "multiplied queries would not have the effect of the scale alone"
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
    """Runs a copy of the network with noise in its weights, and in float32 where they have half the precision.

    Of sharded weights, of which no process has all, the copy has the noise alone.

    Args:
        analysis: Analysis of the network.

    Raises:
        ValueError: If the network is too large.
    """

    def __init__(self, analysis: Analysis) -> None:
        size = sum(parameter.numel() for parameter in analysis.traced.model.parameters())
        if size > _MOST_PARAMETERS:
            raise ValueError(f"expected at most {_MOST_PARAMETERS:,} parameters, to run a copy, got {size:,}")
        self.analysis = analysis
        self.runs = [run for run in analysis.runs if run.call.method == "forward"]
        self.copy = analysis.traced.copy("real", blank=True)
        for tensor in self.copy.named.values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.copy.module.parameters():
            if parameter.is_floating_point():
                spread = max(math.prod(parameter.shape[1:]), 1) ** -0.5 if parameter.dim() > 1 else 0.1
                noise = torch.randn(parameter.shape, generator=generator) * spread
                parameter.requires_grad_().data.add_(noise.to(parameter))

    def checked(self, groups: Sequence[Group], modules: Mapping[str, set[str]]) -> list[Group]:
        """The groups with their queries, of which a cut keeps the temperature of the softmax."""
        recorder = _Queries(self.copy, groups, modules)
        with recorder:
            self.copy.compute(self.runs[0].call)
        whole, own = recorder.queries(), set().union(*modules.values())
        if self._is_equal(whole, own):
            return whole
        found: list[Group] = []
        for group in whole:
            if self._is_equal([*found, group], own):
                found.append(group)
        return found

    def _is_equal(self, groups: Sequence[Group], modules: set[str]) -> bool:
        """Whether a cut equals one that keeps the scale, in every call, and would not without the factors."""
        kept = _kept(groups)
        structure = Structure(tuple(groups), (), CostModel((), (), self.analysis.shapes))
        axes, factors = structure.axes(kept), structure.factors(kept)
        rows: dict[str, IndexArray] = {}
        for query in (query for group in groups for query in group.queries):
            rows[query.tensor] = np.union1d(rows.get(query.tensor, query.index), query.index)
        for size in _SIZES:
            with torch.no_grad(), self._multiplied(rows, size):
                for run in self.runs:
                    with _Check(self.copy, modules, size, run.query_widths):
                        wanted = self._cut(run.call, axes, {})
                    with _Check(self.copy, modules, size):
                        without, scaled = (float((self._cut(run.call, axes, f) - wanted).norm()) for f in ({}, factors))
                    if not scaled * _CERTAINTY < without:
                        return False
        return True

    @contextmanager
    def _multiplied(self, rows: Mapping[str, IndexArray], size: float) -> Iterator[None]:
        """Multiply rows of tensors within the context, by a power of two, which is exact."""

        def multiply(factor: float) -> None:
            for name, index in rows.items():
                self.copy.named[name].data[torch.from_numpy(index)] *= factor

        multiply(size)
        try:
            yield
        finally:
            multiply(1 / size)

    def _cut(self, call: Call, axes: Axes, factors: Factors) -> Tensor:
        with self.copy.cut(axes):
            for name, (rows, factor) in factors.items():
                self.copy.named[name].data[torch.from_numpy(rows)] *= factor
            return self._values(call)

    def _values(self, call: Call) -> Tensor:
        outputs = [out for out in output_tensors(self.copy.compute(call)) if out.is_floating_point()]
        return torch.cat([out.detach().double().flatten() for out in outputs])


def _kept(groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    """About half of the units of each group, and another share of those with rows of the same tensor."""
    kept: dict[str, tuple[int, ...]] = {}
    taken = defaultdict[str, set[float]](set)
    for group in groups:
        width, tensors = group.width, {query.tensor for query in group.queries}
        shares = set().union(*(taken[tensor] for tensor in tensors))
        numbers = (*range(width // 2, 0, -1), *range(width // 2 + 1, width))
        number = next((number for number in numbers if number / width not in shares), numbers[0])
        kept[group.name] = tuple(n * width // number for n in range(number))
        for tensor in tensors:
            taken[tensor].add(number / width)
    return kept


class _Check(TorchFunctionMode):
    """Runs without dropout, which would draw other numbers at other widths, and divides the queries of attention.

    Args:
        copy: The copy that runs.
        modules: Modules whose queries are divided.
        size: What they are divided by.
        widths: Widths of heads in the order of the attentions that compute their scale, to give them the scale of
            these; None for that of their own.
    """

    def __init__(self, copy: FakeCopy, modules: set[str], size: float, widths: Sequence[int] | None = None) -> None:
        super().__init__()
        self.copy, self.modules, self.size = copy, modules, size
        self.widths = None if widths is None else iter(widths)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = {**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})}
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else named["input"]
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs or {})
        if named.get("scale") is None:
            if self.copy.stack[-1] in self.modules:
                named["query"] = named["query"] / self.size
            if self.widths is not None:
                named["scale"] = next(self.widths) ** -0.5
        return func(**{**named, "dropout_p": 0.0})


class _Queries(TorchFunctionMode):
    """Records which rows of a group's tensors the queries of its attention depend on."""

    def __init__(self, copy: FakeCopy, groups: Sequence[Group], modules: Mapping[str, set[str]]) -> None:
        super().__init__()
        self.copy, self.groups, self.modules = copy, groups, modules
        self.rows: dict[tuple[str, str], Tensor] = {}  # by group and tensor

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        if func is not scaled_dot_product_attention or (kwargs or {}).get("scale") is not None:
            return out
        groups = [group for group in self.groups if self.copy.stack[-1] in self.modules[group.name]]
        for group in groups:
            self._see(group, args[0] if args else (kwargs or {})["query"])
        # Queries of a later attention with the same weights depend on keys and values of this one, too.
        return out.detach() if groups else out

    def _see(self, group: Group, query: Tensor) -> None:
        present = {m.tensor: self.copy.named[m.tensor] for m in group.members if m.role != "in"}
        own = {name: tensor for name, tensor in present.items() if isinstance(tensor, nn.Parameter)}
        if not own or not query.requires_grad:
            return
        value = (query * query.detach()).sum()
        grads = torch.autograd.grad(value, list(own.values()), retain_graph=True, allow_unused=True)
        found = {name: grad for name, grad in zip(own, grads, strict=True) if grad is not None}
        # By how much the queries change if a layer's weights and bias are multiplied.
        shares: dict[str, float] = defaultdict(float)
        for name, grad in found.items():
            shares[name.rpartition(".")[0]] += float((grad * own[name]).sum() / value)
        for name, grad in found.items():
            if abs(shares[name.rpartition(".")[0]]) > _SMALLEST_SHARE:
                rows = (grad != 0).flatten(1).any(1) if grad.dim() > 1 else grad != 0
                self.rows[group.name, name] = rows | self.rows.get((group.name, name), rows)

    def queries(self) -> list[Group]:
        """The groups, each with the rows of its members that queries depend on."""
        return [replace(group, queries=tuple(self._rows_of(group))) for group in self.groups]

    def _rows_of(self, group: Group) -> Iterator[Member]:
        """The positions of each member that are rows of queries for any unit."""
        for member in group.members:
            rows = self.rows.get((group.name, member.tensor))
            if member.dim == 0 and rows is not None and rows.any():
                columns = rows.numpy(force=True)[member.index].any(0)
                if columns.any():
                    yield replace(member, index=np.ascontiguousarray(member.index[:, columns]))
