"""The structure of a network as plain values: groups of coupled axes, frozen axes and costs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_prune.structure.cost import CostModel
from lightning_prune.structure.vanishing import Flow, Removal

__all__ = ["Axes", "Factors", "Frozen", "Group", "Member", "Role", "Structure"]

IndexArray = npt.NDArray[np.int64]

#: Kept positions per tensor and dimension: ``{"net.0.weight": {0: array([0, 2, 5])}}``.
Axes = dict[str, dict[int, IndexArray]]

#: What some rows (dimension 0) of a tensor are multiplied by after a cut: their positions in it, and the factor.
Factors = dict[str, tuple[IndexArray, float]]

#: Role of an axis: its layer produces the units ("out"), consumes them ("in") or works per unit ("along": bias, norm).
Role = Literal["out", "in", "along"]


def _layer(tensor: str) -> str:
    """Module that owns a tensor; for the originals of a parametrization, the module that owns the weight."""
    return tensor.partition(".parametrizations.")[0] if ".parametrizations." in tensor else tensor.rpartition(".")[0]


def _is_dropped(tensor: str, dim: int, drops: Mapping[str, str]) -> bool:
    """Whether an axis is removed with the layers in ``drops``; the outputs of a constant layer stay."""
    kind = drops.get(_layer(tensor))
    return kind is not None and not (kind == "constant" and dim == 0)


def _vanished(kept: Mapping[str, Iterable[int]]) -> list[str]:
    return [name for name, units in kept.items() if not any(True for _ in units)]


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of a parameter or buffer, and the positions of each unit of its group on it.

    Attributes:
        tensor: Qualified name of the parameter or buffer, as in ``model.named_parameters()``.
        dim: Dimension of the tensor.
        role: ``"out"``, ``"in"`` or ``"along"``.
        index: Positions on the axis, shape ``(width, k)``; ``k`` > 1 where a unit has several (a channel flattened over
            its pixels, a depthwise multiplier).
        length: Of a size that counts units of several groups: its value. 0 for all others.
    """

    tensor: str
    dim: int
    role: Role
    index: IndexArray
    length: int = 0

    @property
    def layer(self) -> str:
        """Name of the module that owns the tensor; the tensor's own name if the model itself does."""
        return _layer(self.tensor) or self.tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Member):
            return NotImplemented
        mine, theirs = (self.tensor, self.dim, self.role), (other.tensor, other.dim, other.role)
        return mine == theirs and np.array_equal(self.index, other.index)

    def __hash__(self) -> int:
        return hash((self.tensor, self.dim, self.role))


@dataclass(frozen=True)
class Group:
    """Units on the same axes: removing a unit removes its slice of every member.

    Attributes:
        name: First layer in the order of execution that produces the units.
        width: Number of units.
        members: All axes of the units, producers first.
        sizes: Integer attributes of modules that follow the width, as axes without contents: a member called
            ``blocks.0.attn.num_heads`` with as many positions as its value (see `SizeAttribute`).
        within: Names of the groups of attention heads whose features the units are: each is one feature of every head,
            or two with rotary embeddings, which turn these together. Attentions that share the angles of these lose
            the same ones. Removing heads and features takes rows and columns of the same block. Empty for all other
            groups.
        queries: Rows of weights and biases that compute the queries of an attention whose scale follows the width of
            its heads, 1/√width. Those that stay are multiplied by √(features after / before a cut), of all groups with
            rows of the same weight, so that the temperature of the softmax stays.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    sizes: tuple[Member, ...] = ()
    within: tuple[str, ...] = ()
    queries: tuple[Member, ...] = ()

    @property
    def around(self) -> str:
        """Name of the deepest module around all of its layers; the network's own name is empty."""
        paths = [layer.split(".") for layer in {member.layer for member in self.members}]
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        return ".".join(parts[0] for parts in shared)

    @property
    def producers(self) -> tuple[str, ...]:
        """Layers that produce the units."""
        return tuple(dict.fromkeys(m.layer for m in self.members if m.role == "out"))

    @property
    def consumers(self) -> tuple[str, ...]:
        """Layers that take the units as input."""
        return tuple(dict.fromkeys(m.layer for m in self.members if m.role == "in"))

    def take(self, kept: Sequence[int], axes: Axes) -> Group:
        """The group after a cut that keeps the units ``kept``, its positions renumbered along ``axes``."""
        rows = np.asarray(kept, dtype=np.int64)

        def narrow(member: Member) -> Member:
            index = member.index[rows]
            survivors = axes.get(member.tensor, {}).get(member.dim)
            if survivors is None:
                return replace(member, index=index)
            stays = np.isin(index, survivors)  # those of removed heads, or features of heads, are gone
            index = np.searchsorted(survivors, index[stays]).reshape(len(rows), -1)
            return replace(member, index=index, length=len(survivors) if member.length else 0)

        members, sizes, queries = (tuple(map(narrow, some)) for some in (self.members, self.sizes, self.queries))
        return replace(self, width=len(rows), members=members, sizes=sizes, queries=queries)

    def without_layers(self, drops: Mapping[str, str]) -> Group:
        """The group without its members in removed layers."""
        members, sizes, queries = (
            tuple(m for m in axes if not _is_dropped(m.tensor, m.dim, drops))
            for axes in (self.members, self.sizes, self.queries)
        )
        return replace(self, members=members, sizes=sizes, queries=queries)

    def vanishes_with(self, heads: Collection[str]) -> bool:
        """Whether the units are features of heads that are all in these groups."""
        return bool(self.within) and all(name in heads for name in self.within)

    def without_heads(self, heads: Collection[str]) -> Group:
        """The group, within heads that are not in these groups."""
        return replace(self, within=tuple(name for name in self.within if name not in heads))


@dataclass(frozen=True)
class Frozen:
    """An axis that cannot shrink, with the reason.

    Attributes:
        tensor: Qualified name of the parameter or buffer.
        dim: Its dimension.
        width: Number of frozen positions.
        reason: The reason, for the user.
    """

    tensor: str
    dim: int
    width: int
    reason: str

    @property
    def layer(self) -> str:
        """Name of the module that owns the tensor; the tensor's own name if the model itself does."""
        return _layer(self.tensor) or self.tensor


@dataclass(frozen=True)
class Structure:
    """Groups, frozen axes and costs of a network.

    Attributes:
        groups: Groups that can shrink, in the order of execution.
        frozen: Output axes and bare parameters that cannot, with reasons.
        cost: Costs as functions of the widths.
        notes: Limitations, for instance a step that could not be traced.
        remarks: Notes that only `inspect` shows: on the time that tracing took, and on features of heads that stay.
        flow: Data flow, which determines the groups that can be removed entirely (`with_flow`); without it, none can.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    cost: CostModel
    notes: tuple[str, ...] = field(default=())
    remarks: tuple[str, ...] = field(default=(), compare=False)
    flow: Flow | None = None

    @property
    def widths(self) -> dict[str, int]:
        """Units per group."""
        return {group.name: group.width for group in self.groups}

    @property
    def vanished(self) -> frozenset[str]:
        """Names of the groups that have been removed entirely."""
        return frozenset() if self.flow is None else self.flow.removal.groups

    @property
    def reachable(self) -> dict[str, float]:
        """Shares of the parameters and MACs that pruning can affect, in [0, 1]: ``"params"`` and ``"macs"``."""
        none = dict.fromkeys(self.widths, 0)
        costs = {"params": self.cost.params, "macs": self.cost.macs}
        return {name: 1 - cost(none) / (cost(self.widths) or 1) if self.groups else 0.0 for name, cost in costs.items()}

    def group(self, name: str) -> Group:
        """The group called ``name``.

        Raises:
            KeyError: If there is none; the message lists those that exist.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group is called {name!r}; there are: {', '.join(self.widths) or 'none'}")

    def without(self, groups: Iterable[str]) -> Removal:
        """The removal of all units of ``groups``, together with earlier ones.

        Raises:
            ValueError: If they cannot be removed; the message says why.
        """
        names = tuple(groups)
        if inner := [group.name for group in self.groups if group.within and group.name in names]:
            raise ValueError(f"{', '.join(inner)}: expected at least one feature of each head to stay, got none")
        if self.flow is None:
            if names:
                raise ValueError(f"{', '.join(names)}: expected at least one unit to stay, got none (see `with_flow`)")
            return Removal()
        removal = self.flow.without(names)
        if isinstance(removal, str):
            raise ValueError(f"{', '.join(names)} cannot lose all units: {removal}. Keep at least one unit.")
        return removal

    def drops(self, kept: Mapping[str, Iterable[int]]) -> dict[str, str]:
        """Layers that a cut removes, with the kind of stub that replaces each (`Removal`)."""
        before = self.flow.removal.modules if self.flow is not None else {}
        after = self.without(_vanished(kept)).modules
        return {name: kind for name, kind in after.items() if name not in before}

    def axes(self, kept: Mapping[str, Iterable[int]]) -> Axes:
        """Kept positions of every axis that a cut changes, without those of removed layers.

        Sizes in attributes are among them, as dimension 0 of `Group.sizes`.

        Args:
            kept: Units to keep per group, ascending, in the current numbering; missing groups keep all units.

        Raises:
            ValueError: If a group without units cannot be removed.
        """
        drops = self.drops(kept)
        stays: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
        for name, units in kept.items():
            group = self.group(name)
            lost = np.ones(group.width, dtype=np.bool_)
            lost[np.fromiter(units, dtype=np.int64)] = False
            if not lost.any():
                continue
            for member in (*group.members, *group.sizes):
                axis = member.tensor, member.dim
                if axis not in stays:
                    # A size is as long as all of its positions.
                    shape = self.cost.shapes.get(member.tensor, (member.length or member.index.size,))
                    stays[axis] = np.ones(shape[member.dim], dtype=np.bool_)
                stays[axis][member.index[lost]] = False
        axes: Axes = {}
        for (tensor, dim), mask in stays.items():
            if not _is_dropped(tensor, dim, drops):
                axes.setdefault(tensor, {})[dim] = np.flatnonzero(mask)
        return axes

    def factors(self, kept: Mapping[str, Iterable[int]]) -> Factors:
        """What rows of queries are multiplied by in a cut (`Group.queries`); arguments as of `axes`."""
        asked = dict.fromkeys(rows.tensor for group in self.groups if group.name in kept for rows in group.queries)
        if not asked:
            return {}
        units = {name: tuple(rows) for name, rows in kept.items()}
        axes, before, after = self.axes(units), defaultdict[str, int](int), defaultdict[str, list[IndexArray]](list)
        for group in self.groups:
            for rows in group.queries:
                before[rows.tensor] += rows.index.size
                after[rows.tensor].append(rows.index[list(units.get(group.name, range(group.width)))].ravel())
        factors: Factors = {}
        for tensor in asked:
            stay, survivors = np.concatenate(after[tensor]), axes.get(tensor, {}).get(0)
            # Without survivors its layer leaves with all heads.
            if survivors is not None and 0 < len(stay) < before[tensor]:
                left = np.searchsorted(survivors, np.intersect1d(stay, survivors))
                factors[tensor] = left, math.sqrt(len(stay) / before[tensor])
        return factors

    def take(self, kept: Mapping[str, Iterable[int]]) -> Structure:
        """The structure after a cut."""
        units = {name: tuple(rows) for name, rows in kept.items()}
        axes, drops, removal = self.axes(units), self.drops(units), self.without(_vanished(units))
        groups = tuple(
            g.take(units.get(g.name, range(g.width)), axes).without_layers(drops).without_heads(removal.groups)
            for g in self.groups
            if g.name not in removal.groups and not g.vanishes_with(removal.groups)
        )
        frozen = tuple(f for f in self.frozen if not _is_dropped(f.tensor, f.dim, drops))
        cost = self.cost.take(axes).without(removal.groups, drops)
        flow = self.flow and self.flow.take(removal)
        return replace(self, groups=groups, frozen=frozen, cost=cost, flow=flow)
