"""Whole groups of units go, the least important first, until the parameters hold: layers may vanish."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_prune.structure.bypass import Bypasses
from lightning_prune.structure.cost import CostModel
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.layers import is_within
from lightning_prune.structure.vanishing import Removal as Vanished

__all__ = ["Ranked", "RankedPlan", "Removal", "by_stage", "in_order", "plan_ranked"]

BoolArray = npt.NDArray[np.bool_]
#: Units that go at once, by group of the structure.
Removal = Mapping[str, Sequence[int]]


class Ranked(NamedTuple):
    """Units that go at once.

    Attributes:
        removal: The units.
        decisive: The bundles whose scores give the removal its place: ranked name, and position among its bundles. With
            higher scores of other bundles it stays where it is.
    """

    removal: Removal
    decisive: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class RankedPlan:
    """What is left of a network.

    Attributes:
        kept: Units that stay, per group that becomes narrower or is taken out with its branch (none then).
        bypassed: Groups that vanish from a chain.
        params: Parameters that are left.
        stays: Why groups keep their last units although these would have gone.
        looked_at: How many of the removals were looked at: those behind had no part.
        params_before: Parameters before the last removal.
    """

    kept: Mapping[str, tuple[int, ...]]
    bypassed: tuple[str, ...] = ()
    params: int = 0
    stays: Mapping[str, str] = field(default_factory=dict)
    looked_at: int = 0
    params_before: int = 0


def in_order(bundles: Mapping[str, Sequence[Sequence[int]]], scores: Mapping[str, Sequence[float]]) -> list[Ranked]:
    """Bundles of all groups from the lowest score to the highest; equal ones by group, then by first unit.

    Args:
        bundles: Units that go together, by group.
        scores: A number for each bundle, by group.
    """
    keyed = [
        (float(score), number, min(units), Ranked({name: tuple(units)}, ((name, position),)))
        for number, (name, found) in enumerate(bundles.items())
        for position, (units, score) in enumerate(zip(found, scores[name], strict=True))
    ]
    return [ranked for *_, ranked in sorted(keyed, key=lambda entry: entry[:3])]


def by_stage(
    structure: Structure,
    stages: Mapping[str, Sequence[str]],
    bundles: Mapping[str, Sequence[Sequence[int]]],
    scores: Mapping[str, Sequence[float]],
) -> list[Ranked]:
    """Bundles of layers that are ranked one by one, where all layers of a stage lose as many.

    Whenever a bundle of a layer is next, every layer of its stage loses its own least one, so that streams stay as wide
    as each other (appendix B of SPvR); a layer with r times as many bundles loses r of them. Only widths follow from
    that, for weights that are initialized again: a removal always lists the last units of a group.

    Args:
        structure: Of the network.
        stages: Groups inside the branches of each stream (`stages_of`). All other groups go by themselves.
        bundles: Units that go together, by layer that produces them.
        scores: A number for each bundle, by layer.
    """
    inside = {name for groups in stages.values() for name in groups}
    keyed: list[tuple[float, int, int, Ranked]] = []
    for number, group in enumerate(group for group in structure.groups if group.name not in inside):
        names = [group.name, *stages.get(group.name, ())]
        layers = {layer: name for name in names for layer in structure.group(name).producers if layer in bundles}
        ordered = {layer: _ordered(bundles[layer], scores[layer]) for layer in layers}
        left = {name: structure.group(name).width for name in layers.values()}
        for level in range(min(map(len, ordered.values()), default=0)):
            score, decisive = _next(ordered, level)
            removal = {}
            for name in left:
                one = next(layer for layer in structure.group(name).producers if layer in layers)
                count = sum(len(bundles[one][place]) for place in _share(ordered, one, level))
                removal[name] = tuple(range(left[name] - count, left[name]))
                left[name] -= count
            keyed.append((score, number, level, Ranked(removal, decisive)))
    return [ranked for *_, ranked in sorted(keyed, key=lambda entry: entry[:3])]


def _next(ordered: Mapping[str, Sequence[tuple[float, int]]], level: int) -> tuple[float, tuple[tuple[str, int], ...]]:
    """The least score of all layers at a level, and the bundles that decide it."""
    levels = min(map(len, ordered.values()))
    firsts = {layer: round(level * len(found) / levels) for layer, found in ordered.items()}
    least = min(firsts, key=lambda layer: ordered[layer][firsts[layer]][0])
    found = ordered[least][: firsts[least] + 1]
    return found[-1][0], tuple((least, place) for _, place in found)


def _share(ordered: Mapping[str, Sequence[tuple[float, int]]], layer: str, level: int) -> list[int]:
    """Positions of the bundles that a layer loses at a level."""
    levels, found = min(map(len, ordered.values())), ordered[layer]
    first, last = (round(k * len(found) / levels) for k in (level, level + 1))
    return [place for _, place in found[first:last]]


def _ordered(bundles: Sequence[Sequence[int]], scores: Sequence[float]) -> list[tuple[float, int]]:
    """Scores and positions of a layer's bundles, from the least."""
    keyed = [(float(score), min(units), i) for i, (score, units) in enumerate(zip(scores, bundles, strict=True))]
    return [(score, place) for score, _, place in sorted(keyed)]


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
    params = before = state.params()
    looked_at = 0
    for removal in removals:
        if params <= limit:
            break
        looked_at += 1
        if state.remove(removal):
            before, params = params, state.params()
    if params > limit:
        why = "; ".join(f"{name}: {reason}" for name, reason in state.stays.items())
        raise ValueError(
            f"the budget of {limit} params cannot be reached: the smallest network that is left has {params}."
            + (f" What stays: {why}." if why else "")
            + " Give a larger budget, or free more layers; an int is a count, a float a share."
        )
    return replace(state.plan(params), looked_at=looked_at, params_before=before)


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
