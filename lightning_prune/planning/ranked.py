"""Whole groups of units go, the least important first, until the parameters hold: layers may vanish."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_prune.structure.bypass import Bypasses, is_within
from lightning_prune.structure.cost import CostModel
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.vanishing import Removal as Vanished

__all__ = ["RankedPlan", "Removal", "by_stage", "in_order", "plan_ranked"]

BoolArray = npt.NDArray[np.bool_]
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


def by_stage(
    structure: Structure,
    stages: Mapping[str, Sequence[str]],
    bundles: Mapping[str, Sequence[Sequence[int]]],
    scores: Mapping[str, Sequence[float]],
) -> list[Removal]:
    """Bundles of layers that are ranked one by one, where all layers of a stage lose as many.

    Whenever a bundle of a layer is next, every layer of its stage loses its own least one, so that streams stay as wide
    as each other (appendix B of SPvR); a layer with r times as many bundles loses r of them. Only widths follow from
    that: of a stream, the units of its first layer are named.

    Args:
        structure: Of the network.
        stages: Groups inside the branches of each stream (`stages_of`). All other groups go by themselves.
        bundles: Units that go together, by layer that produces them.
        scores: A number for each bundle, by layer.
    """
    inside = {name for groups in stages.values() for name in groups}
    keyed: list[tuple[float, int, int, Removal]] = []
    for number, group in enumerate(group for group in structure.groups if group.name not in inside):
        names = [group.name, *stages.get(group.name, ())]
        layers = {layer: name for name in names for layer in structure.group(name).producers if layer in bundles}
        ordered = {layer: _ordered(bundles[layer], scores[layer]) for layer in layers}
        levels = min(map(len, ordered.values()), default=0)
        for level in range(levels):
            least, removal = math.inf, dict[str, list[int]]()
            for layer, found in ordered.items():
                first, last = (round(k * len(found) / levels) for k in (level, level + 1))
                least = min([least, *(score for score, _ in found[first:last])])
                if layer == next(iter(structure.group(layers[layer]).producers)):
                    removal[layers[layer]] = [unit for _, units in found[first:last] for unit in units]
            keyed.append((least, number, level, removal))
    return [removal for *_, removal in sorted(keyed, key=lambda entry: entry[:3])]


def _ordered(bundles: Sequence[Sequence[int]], scores: Sequence[float]) -> list[tuple[float, Sequence[int]]]:
    pairs = sorted(zip(scores, bundles, strict=True), key=lambda pair: (pair[0], min(pair[1])))
    return [(float(score), units) for score, units in pairs]


def plan_ranked(
    structure: Structure, removals: Iterable[Removal], limit: int, bypasses: Bypasses | None = None
) -> RankedPlan:
    """Remove what comes first until at most ``limit`` parameters are left.

    A group that loses its last units vanishes: with its branch where another path leads around it, else out of the
    chain where ``bypasses`` says so. Where neither can be, or other groups have vanished that would have led around it,
    the removal is left out, and the next one is taken. The size need not fall with each of them: the layers behind one
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
        self._cost, self._removed = structure.cost, tuple[str, ...]()

    def remove(self, removal: Removal) -> bool:
        """Take it away, whole or not at all; whether anything has gone."""
        after = {name: self._without(name, units) for name, units in removal.items() if self.left[name].any()}
        emptied = [name for name, mask in after.items() if not mask.any()]
        if not self._can_vanish([name for name in emptied if name not in self.bypasses.groups]):
            return False
        for name in emptied:
            if self.left[name].any():  # it may have gone along with another one
                self._vanish(name)
        for name, mask in after.items():
            self.left[name] &= mask
        return bool(after)

    def params(self) -> int:
        """Parameters that are left."""
        widths = {name: int(mask.sum()) for name, mask in self.left.items()}
        now = self.bypasses.widths(widths, self.bypassed)
        return round(sum(t.value(now) for t in self._cost.parameters if not is_within(t.layer, self._removed)))

    def plan(self, params: int) -> RankedPlan:
        """The plan."""
        gone = {*self.bypassed, *(other for name in self.bypassed for other in self.bypasses.groups[name].along)}
        kept = {
            name: tuple(np.flatnonzero(mask).tolist())
            for name, mask in self.left.items()
            if name not in gone and not mask.all()
        }
        return RankedPlan(kept, tuple(self.bypassed), params, dict(self.stays))

    def _without(self, name: str, units: Sequence[int]) -> BoolArray:
        mask = self.left[name].copy()
        mask[list(units)] = False
        return mask

    def _can_vanish(self, names: Sequence[str]) -> bool:
        """Whether these can vanish together, with their branches."""
        removal = self._removal(names)
        if isinstance(removal, str):
            self.stays |= dict.fromkeys(names, removal)
        return not isinstance(removal, str)

    def _removal(self, names: Sequence[str]) -> Vanished | str:
        """What goes along where other paths lead around groups, else why they cannot go."""
        flow = self.structure.flow
        if not names:
            return Vanished()
        return "it would leave no path through it" if flow is None else flow.without({*self.vanished, *names})

    def _vanish(self, name: str) -> None:
        """Let a group vanish that can, with all that goes along."""
        removal = self._removal([name])
        if isinstance(removal, str):
            self.bypassed.append(name)
            along = {name, *self.bypasses.groups[name].along}
            self._removed = self.bypasses.modules(self.bypassed)
        else:
            along = set(removal.groups & self.left.keys())
            self.vanished = self.vanished | along
            self._cost = self._cost_without(self.vanished)
        for other in along:
            self.left[other][:] = False

    def _cost_without(self, gone: frozenset[str]) -> CostModel:
        return self.structure.cost.without(gone, self.structure.drops(dict.fromkeys(gone, ())))
