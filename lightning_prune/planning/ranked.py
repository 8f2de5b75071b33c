"""Plans from ranked removals, in which whole layers may be removed."""

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
#: Units that are removed together, by group.
Removal = Mapping[str, Sequence[int]]


class Ranked(NamedTuple):
    """A ranked removal.

    Attributes:
        removal: The units.
        decisive: The bundles, as name and index, whose scores determine its rank.
    """

    removal: Removal
    decisive: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class RankedPlan:
    """Units and layers that a cut keeps.

    Attributes:
        kept: Units to keep per changed group; empty for a group that is removed with its branch.
        bypassed: Groups that are removed from a chain.
        params: Remaining parameters.
        stays: Reasons why groups keep their last units, by group.
        examined: Number of removals that were examined.
        params_before: Parameters before the last removal.
    """

    kept: Mapping[str, tuple[int, ...]]
    bypassed: tuple[str, ...] = ()
    params: int = 0
    stays: Mapping[str, str] = field(default_factory=dict)
    examined: int = 0
    params_before: int = 0


def in_order(bundles: Mapping[str, Sequence[Sequence[int]]], scores: Mapping[str, Sequence[float]]) -> list[Ranked]:
    """Bundles of all groups by ascending score; ties by group, then by first unit.

    Args:
        bundles: Units that are removed together, by group.
        scores: Score of each bundle, by group.
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
    """Bundles of layers by ascending score, where all layers of a stage lose the same number (appendix B of SPvR).

    Whenever a bundle of a layer is next, every layer of its stage loses its lowest one; a layer with r times as many
    bundles loses r of them. Only widths are meaningful, for weights that are re-initialized: a removal lists the last
    units of a group.

    Args:
        structure: Structure of the network.
        stages: Groups inside the branches of each stream (`stages_of`). Other groups are independent.
        bundles: Units that are removed together, by producing layer.
        scores: Score of each bundle, by layer.
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
    """The lowest score of all layers at a level, and the bundles that determine it."""
    levels = min(map(len, ordered.values()))
    firsts = {layer: round(level * len(found) / levels) for layer, found in ordered.items()}
    least = min(firsts, key=lambda layer: ordered[layer][firsts[layer]][0])
    found = ordered[least][: firsts[least] + 1]
    return found[-1][0], tuple((least, place) for _, place in found)


def _share(ordered: Mapping[str, Sequence[tuple[float, int]]], layer: str, level: int) -> list[int]:
    """Indices of the bundles that a layer loses at a level."""
    levels, found = min(map(len, ordered.values())), ordered[layer]
    first, last = (round(k * len(found) / levels) for k in (level, level + 1))
    return [place for _, place in found[first:last]]


def _ordered(bundles: Sequence[Sequence[int]], scores: Sequence[float]) -> list[tuple[float, int]]:
    """Scores and indices of a layer's bundles, by ascending score."""
    keyed = [(float(score), min(units), i) for i, (score, units) in enumerate(zip(scores, bundles, strict=True))]
    return [(score, place) for score, _, place in sorted(keyed)]


def plan_ranked(
    structure: Structure, removals: Iterable[Removal], limit: int, bypasses: Bypasses | None = None
) -> RankedPlan:
    """Apply removals in order until at most ``limit`` parameters are left.

    A group that loses its last units is removed: with its branch if there is another path, else from its chain if
    ``bypasses`` has it. If neither is possible, the removal is skipped. The size may also grow with a removal, since
    the layers after a removed one read its input; the first size within the limit is used.

    Args:
        structure: Structure of the network, with its flow (`with_flow`) if branches may be removed.
        removals: Removals in order.
        limit: Maximum number of parameters.
        bypasses: Groups that can be removed from chains, for networks that are re-initialized.

    Raises:
        ValueError: If the limit cannot be reached.
    """
    state = _State(structure, bypasses or Bypasses({}, {}))
    params = before = state.params()
    examined = 0
    for removal in removals:
        if params <= limit:
            break
        examined += 1
        if state.remove(removal):
            before, params = params, state.params()
    if params > limit:
        why = "; ".join(f"{name}: {reason}" for name, reason in state.stays.items())
        raise ValueError(
            f"the budget of {limit} params cannot be reached: the smallest network that is left has {params}."
            + (f" What stays: {why}." if why else "")
            + " Give a larger budget, or free more layers; an int is a count, a float a share."
        )
    return replace(state.plan(params), examined=examined, params_before=before)


class _State:
    """State after some removals."""

    def __init__(self, structure: Structure, bypasses: Bypasses) -> None:
        self.structure, self.bypasses = structure, bypasses
        self.left = {group.name: np.ones(group.width, dtype=np.bool_) for group in structure.groups}
        self.bypassed: list[str] = []
        self.vanished: frozenset[str] = frozenset()  # removed with their branches
        self.stays: dict[str, str] = {}
        self._cost, self._removed = structure.cost, tuple[str, ...]()

    def remove(self, removal: Removal) -> bool:
        """Apply a removal if possible; returns whether anything was removed."""
        after = {name: self._without(name, units) for name, units in removal.items() if self.left[name].any()}
        emptied = [name for name, mask in after.items() if not mask.any()]
        if not self._can_vanish([name for name in emptied if name not in self.bypasses.groups]):
            return False
        for name in emptied:
            if self.left[name].any():  # it may have been removed with another one
                self._vanish(name)
        for name, mask in after.items():
            self.left[name] &= mask
        return bool(after)

    def params(self) -> int:
        """Number of remaining parameters."""
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
        """Whether groups can be removed together with their branches."""
        removal = self._removal(names)
        if isinstance(removal, str):
            self.stays |= dict.fromkeys(names, removal)
        return not isinstance(removal, str)

    def _removal(self, names: Sequence[str]) -> Vanished | str:
        """The removal of groups with their branches, or the reason why it is impossible."""
        flow = self.structure.flow
        if not names:
            return Vanished()
        return "it would leave no path through it" if flow is None else flow.without({*self.vanished, *names})

    def _vanish(self, name: str) -> None:
        """Remove a group with its branch or from its chain."""
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
