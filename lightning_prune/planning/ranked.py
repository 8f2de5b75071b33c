"""Whole groups of units go, the least important first, until the parameters hold: layers may vanish."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from lightning_prune.structure.bypass import Bypasses
from lightning_prune.structure.cost import CostModel
from lightning_prune.structure.graph import Structure

__all__ = ["RankedPlan", "Removal", "in_order", "plan_ranked"]

#: Units that go at once, by group of the structure.
Removal = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class RankedPlan:
    """What is left of a network.

    Attributes:
        kept: Units that stay, per group that becomes narrower or is taken out with its branch (none then).
        bypassed: Groups that vanish from a chain.
        params: Parameters that are left.
        stays: Why groups keep their last units although these would have gone.
    """

    kept: Mapping[str, tuple[int, ...]]
    bypassed: tuple[str, ...] = ()
    params: int = 0
    stays: Mapping[str, str] = field(default_factory=dict)


def in_order(bundles: Mapping[str, Sequence[Sequence[int]]], scores: Mapping[str, Tensor]) -> list[Removal]:
    """Bundles of all groups from the lowest mean score to the highest; equal ones by group, then by first unit."""
    keyed = []
    for number, (name, found) in enumerate(bundles.items()):
        values = np.asarray(scores[name], dtype=np.float64)
        keyed += [(values[list(units)].mean(), number, min(units), {name: tuple(units)}) for units in found]
    return [removal for *_, removal in sorted(keyed, key=lambda entry: entry[:3])]


def plan_ranked(
    structure: Structure, removals: Iterable[Removal], limit: int, bypasses: Bypasses | None = None
) -> RankedPlan:
    """Remove what comes first until at most ``limit`` parameters are left.

    A group that loses its last units vanishes: with its branch where another path leads around it, else out of the
    chain where ``bypasses`` says so. Where neither can be, or other groups have vanished that would have led around it,
    its last units stay and the next removal is taken. The size need not fall with each of them: the layers behind one
    that vanishes read what it read. The first size that holds is taken, so it is less than one removal below the limit.

    Args:
        structure: Of the network as it is, with its flow (`with_flow`) if branches may vanish.
        removals: What goes, in this order.
        limit: Parameters that may be left.
        bypasses: How groups can vanish from chains; not without weights that are drawn anew.

    Raises:
        ValueError: If more parameters are left at the end.
    """
    state = _State(structure, bypasses or Bypasses({}, {}))
    params = state.params()
    for removal in removals:
        if params <= limit:
            break
        if state.remove(removal):
            params = state.params()
    if params > limit:
        why = "; ".join(f"{name}: {reason}" for name, reason in state.stays.items())
        raise ValueError(
            f"the budget of {limit} params cannot be reached: the smallest network that is left has {params}."
            + (f" What stays: {why}." if why else "")
            + " Give a larger budget, or free more layers; an int is a count, a float a share."
        )
    return state.plan(params)


class _State:
    """What is left after some removals."""

    def __init__(self, structure: Structure, bypasses: Bypasses) -> None:
        self.structure, self.bypasses = structure, bypasses
        self.left = {group.name: np.ones(group.width, dtype=np.bool_) for group in structure.groups}
        self.bypassed: list[str] = []
        self.vanished: frozenset[str] = frozenset()  # with their branches
        self.stays: dict[str, str] = {}
        self._cost, self._layers = structure.cost, frozenset[str]()

    def remove(self, removal: Removal) -> bool:
        """Take it away; whether anything has gone."""
        changed = False
        for name, units in removal.items():
            if name in self.vanished or name in self.bypassed:
                continue
            after = self.left[name].copy()
            after[list(units)] = False
            if not after.any() and not self._vanishes(name):
                continue
            self.left[name], changed = after, True
        return changed

    def params(self) -> int:
        """Parameters that are left."""
        widths = {name: int(mask.sum()) for name, mask in self.left.items()}
        now = self.bypasses.widths(widths, self.bypassed)
        return round(sum(term.value(now) for term in self._cost.parameters if term.layer not in self._layers))

    def plan(self, params: int) -> RankedPlan:
        """The plan."""
        kept = {
            name: tuple(np.flatnonzero(mask).tolist())
            for name, mask in self.left.items()
            if name not in self.bypassed and not mask.all()
        }
        return RankedPlan(kept, tuple(self.bypassed), params, dict(self.stays))

    def _vanishes(self, name: str) -> bool:
        """Let a group vanish, with all that goes along, if it can."""
        flow = self.structure.flow
        removal = flow.without({*self.vanished, name}) if flow is not None else "it would leave no path through it"
        if not isinstance(removal, str) and flow is not None:
            gone = removal.groups - flow.removal.groups
            self.vanished |= gone
            for other in gone:
                self.left[other][:] = False
            self._cost = self._cost_without(self.vanished)
            return True
        if name in self.bypasses.groups:
            self.bypassed.append(name)
            self._layers = frozenset(self.bypasses.modules(self.bypassed))
            return True
        self.stays[name] = str(removal)
        return False

    def _cost_without(self, gone: frozenset[str]) -> CostModel:
        return self.structure.cost.without(gone, self.structure.drops(dict.fromkeys(gone, ())))
