"""What can be removed together: units, groups of coupled axes, what stays and why. Plain values, no model needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_prune.structure.cost import CostModel
from lightning_prune.structure.vanishing import Flow, Removal

__all__ = ["Axes", "Frozen", "Group", "Member", "Role", "Structure"]

IndexArray = npt.NDArray[np.int64]

#: Kept positions per tensor and dimension: ``{"net.0.weight": {0: array([0, 2, 5])}}``. The one currency of surgery.
Axes = dict[str, dict[int, IndexArray]]

#: How a layer meets a unit: it *produces* it ("out"), *consumes* it ("in") or merely follows it ("along": bias, norm).
Role = Literal["out", "in", "along"]


def _layer(tensor: str) -> str:
    """Module that owns a tensor; of what a parametrization computes a weight from, the module with the weight."""
    return tensor.partition(".parametrizations.")[0] if ".parametrizations." in tensor else tensor.rpartition(".")[0]


def _leaves(tensor: str, dim: int, drops: Mapping[str, str]) -> bool:
    """Whether this axis goes with the layers that are taken out: of a constant one its outputs stay."""
    kind = drops.get(_layer(tensor))
    return kind is not None and not (kind == "constant" and dim == 0)


def _vanished(kept: Mapping[str, Iterable[int]]) -> list[str]:
    return [name for name, units in kept.items() if not any(True for _ in units)]


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter or buffer, and where each unit of its group lies on it.

    Attributes:
        tensor: Qualified name of the parameter or buffer, as in ``model.named_parameters()``.
        dim: Dimension of the tensor that the units lie on.
        role: ``"out"``, ``"in"`` or ``"along"``.
        index: Positions on that axis, shape ``(width, k)``; ``k`` > 1 where a unit repeats (a channel flattened over
            its pixels, a depthwise multiplier).
    """

    tensor: str
    dim: int
    role: Role
    index: IndexArray

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
    """Units that lie on the same axes: removing one removes its slice of every member.

    Attributes:
        name: The first layer, in the order of execution, that produces the units.
        width: Number of units.
        members: Every axis the units lie on, producers first.
    """

    name: str
    width: int
    members: tuple[Member, ...]

    @property
    def producers(self) -> tuple[str, ...]:
        """Layers whose outputs the units are."""
        return tuple(dict.fromkeys(m.layer for m in self.members if m.role == "out"))

    @property
    def consumers(self) -> tuple[str, ...]:
        """Layers that take the units as input."""
        return tuple(dict.fromkeys(m.layer for m in self.members if m.role == "in"))

    def take(self, kept: Sequence[int], axes: Axes) -> Group:
        """The group after a cut that keeps the units ``kept``, its positions renumbered along ``axes``."""
        rows = np.asarray(kept, dtype=np.int64)
        members = []
        for member in self.members:
            index = member.index[rows]
            survivors = axes.get(member.tensor, {}).get(member.dim)
            if survivors is not None:
                index = np.searchsorted(survivors, index)
            members.append(replace(member, index=index))
        return Group(self.name, len(rows), tuple(members))

    def leave(self, drops: Mapping[str, str]) -> Group:
        """The group without its members in layers that are taken out."""
        return replace(self, members=tuple(m for m in self.members if not _leaves(m.tensor, m.dim, drops)))


@dataclass(frozen=True)
class Frozen:
    """An axis that keeps its width, and why.

    Attributes:
        tensor: Qualified name of the parameter or buffer.
        dim: Its dimension.
        width: Number of positions that stay.
        reason: Why, in words for the user.
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
    """Everything that is known about a network's widths.

    Attributes:
        groups: What can shrink, in the order of execution.
        frozen: What cannot (output axes and bare parameters; one entry per axis), and why.
        cost: Parameters and MACs as a function of the widths.
        notes: What could not be followed (a step that could not be traced, say).
        remarks: What made it take longer to find, and changes nothing of it.
        flow: What it takes to tell which groups may vanish (`with_flow`); without it, none may.
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
        """Names of the groups that have lost all their units, as far as is known."""
        return frozenset() if self.flow is None else self.flow.removal.groups

    @property
    def reachable(self) -> dict[str, float]:
        """Shares of the parameters and MACs that lie on an axis of a group, in [0, 1]: ``"params"`` and ``"macs"``."""
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
        """What goes when ``groups`` lose all their units, and all that went before.

        Raises:
            ValueError: If they cannot; the text says why.
        """
        names = tuple(groups)
        if self.flow is None:
            if names:
                raise ValueError(f"{', '.join(names)}: expected at least one unit to stay, got none (see `with_flow`)")
            return Removal()
        removal = self.flow.without(names)
        if isinstance(removal, str):
            raise ValueError(f"{', '.join(names)} cannot lose all units: {removal}. Keep at least one unit.")
        return removal

    def drops(self, kept: Mapping[str, Iterable[int]]) -> dict[str, str]:
        """Layers that a cut takes out, and what takes their place (`Removal`)."""
        before = self.flow.removal.modules if self.flow is not None else {}
        after = self.without(_vanished(kept)).modules
        return {name: kind for name, kind in after.items() if name not in before}

    def axes(self, kept: Mapping[str, Iterable[int]]) -> Axes:
        """Kept positions of every axis that a cut touches; those of layers that it takes out are left out.

        Args:
            kept: Units to keep per group, ascending, counted in the present widths; groups left out stay whole.

        Raises:
            ValueError: If a group is to lose all its units and cannot.
        """
        drops = self.drops(kept)
        stays: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
        for name, units in kept.items():
            group = self.group(name)
            lost = np.ones(group.width, dtype=np.bool_)
            lost[np.fromiter(units, dtype=np.int64)] = False
            if not lost.any():
                continue
            for member in group.members:
                axis = member.tensor, member.dim
                if axis not in stays:
                    stays[axis] = np.ones(self.cost.shapes[member.tensor][member.dim], dtype=np.bool_)
                stays[axis][member.index[lost]] = False
        axes: Axes = {}
        for (tensor, dim), mask in stays.items():
            if not _leaves(tensor, dim, drops):
                axes.setdefault(tensor, {})[dim] = np.flatnonzero(mask)
        return axes

    def take(self, kept: Mapping[str, Iterable[int]]) -> Structure:
        """The structure after a cut: narrower groups, renumbered positions, the cost model re-based."""
        units = {name: tuple(rows) for name, rows in kept.items()}
        axes, drops, removal = self.axes(units), self.drops(units), self.without(_vanished(units))
        groups = tuple(
            g.take(units.get(g.name, range(g.width)), axes).leave(drops)
            for g in self.groups
            if g.name not in removal.groups
        )
        frozen = tuple(f for f in self.frozen if not _leaves(f.tensor, f.dim, drops))
        cost = self.cost.take(axes).without(removal.groups, drops)
        flow = self.flow and self.flow.take(removal)
        return replace(self, groups=groups, frozen=frozen, cost=cost, flow=flow)
