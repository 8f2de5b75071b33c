"""Plans: the units to keep, computed deterministically from scores."""

from __future__ import annotations

import math
import zlib
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_prune.planning.scope import Scope
from lightning_prune.planning.target import LATENCIES, Quantity, Target
from lightning_prune.structure import Size
from lightning_prune.structure.graph import Structure

__all__ = ["Limits", "Plan", "feasible", "make_plan", "notes_on_widths"]

FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]
#: Quantities and their limits, all of which are met.
Limits = Sequence[tuple[Quantity, float]]
#: Units that are removed together, by group.
Bundles = Mapping[str, Sequence[Sequence[int]]]

# Tolerance of comparisons, so that 0.7 * 50 units count as 35.
_EPSILON = 1e-9


@dataclass(frozen=True)
class Plan:
    """Units that a cut keeps, for the groups that it changes.

    Attributes:
        kept: Units to keep per group, ascending; empty for a group that is removed.
        before: Widths of these groups before the cut.
    """

    kept: Mapping[str, tuple[int, ...]]
    before: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.kept.keys() != self.before.keys():
            raise ValueError(
                f"expected the same groups in `kept` and `before`, got {[*self.kept]} and {[*self.before]}"
            )
        for name, units in self.kept.items():
            if any(a >= b for a, b in pairwise(units)) or (units and (units[0] < 0 or units[-1] >= self.before[name])):
                raise ValueError(f"expected ascending units below {self.before[name]} in {name!r}, got {units}")

    @property
    def widths(self) -> dict[str, int]:
        """Width after the cut, per group."""
        return {name: len(units) for name, units in self.kept.items()}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is removed."""
        return not self.kept

    def agreement(self, other: Plan) -> float:
        """How well two plans for the same widths agree, in [0, 1]: the mean over groups that one of them narrows.

        Of each group, the lower of the Jaccard indices of the units that are kept and of those that are removed; 1 if
        neither plan removes anything.

        Raises:
            ValueError: If the plans are for different widths.
        """
        if any(self.before[name] != other.before[name] for name in self.before.keys() & other.before.keys()):
            raise ValueError(f"expected plans for the same widths, got {self.before} and {other.before}")
        widths = {**self.before, **other.before}
        found = []
        for name, width in widths.items():
            units = frozenset(range(width))
            a, b = (frozenset(plan.kept.get(name, units)) for plan in (self, other))
            found.append(min(_jaccard(a, b), _jaccard(units - a, units - b)))
        return sum(found) / len(found) if found else 1.0

    def __str__(self) -> str:
        return ", ".join(f"{n} {self.before[n]}→{w}" for n, w in self.widths.items()) or "nothing to remove"

    def to_plain(self) -> dict[str, Any]:
        """Plain dicts, lists and ints, for checkpoints and other processes."""
        return {"kept": {name: list(units) for name, units in self.kept.items()}, "before": dict(self.before)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Plan:
        """Read what `to_plain` wrote."""
        return cls({name: tuple(units) for name, units in plain["kept"].items()}, dict(plain["before"]))


def make_plan(
    structure: Structure,
    scores: Mapping[str, Tensor | FloatArray],
    target: Target,
    share: float,
    scope: Scope,
    original: Size,
    bundles: Bundles | None = None,
) -> Plan:
    """Choose the units to keep so that ``share`` of the way from the dense network to the target is done.

    The amount is relative to the dense network, independent of the number of cuts: if the target leaves the share R,
    1 − share · (1 − R) remains. Within a group, units with the lowest scores are removed; ties by index.

    - Local scope, a share of units (global or per group): every group keeps that share of its dense width, rounded to
      the nearest unit (or multiple of ``round_to``), half up, and at least ``min_width``.
    - Local scope, other targets: all groups shrink at the same rate, one unit or block at a time, until the budget is
      met.
    - ERK: groups keep shares proportional to their density, at most 1, until the budget is met.
    - Random: the same with random densities, which depend on the seed and the group's name alone. For several draws,
      this is the first one.
    - Global scope: units (or blocks, by their mean score) are removed by score, or by score per cost, over all groups,
      ties in the order of execution, until the budget is met.
    - With ``min_width=0``, a group may be removed entirely if the network's outputs still depend on its inputs,
      together with the other groups of the branch. Otherwise one unit (or block) is kept.
    - With a budget of latency, a width is rounded up to the next multiple in which the latency rises, where that meets
      the budget too.
    - With ``bundles``, whole bundles are removed, the one with the lowest mean score first, and a ratio is met to the
      nearest possible width.

    Args:
        structure: Structure of the network.
        scores: Finite scores, shape ``(width,)``, of each group that may be pruned; the lowest are removed first.
        target: The target, with shares per layer resolved (`Target.resolve`).
        share: Share of the way, in [0, 1].
        scope: Comparison within or across groups, and limits of the widths.
        original: Size of the dense network.
        bundles: Units that are removed together, by group: a partition of its units. Units of other groups are removed
            one by one.

    Raises:
        ValueError: If scores or bundles do not match the structure, scores are not finite, the budget cannot be
            reached, or shares per layer are given for a global scope.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"expected `share` in [0, 1], got {share}")
    ranked, scope = _ranked(structure, scores), _on_device(structure, target, scope, bundles)
    now = {name: len(values) for name, values in ranked.items()}
    sorted_bundles = {name: _sorted(name, scores[name], found) for name, found in (bundles or {}).items()}
    ranked |= {name: np.array([u for bundle in found for u in bundle]) for name, found in sorted_bundles.items()}
    vanishing = _Vanishing(structure, now, scope, sorted_bundles)
    if (shares := _shares(target, scope, now)) is not None:
        left = {name: 1 - share * (1 - remaining) for name, remaining in shares.items()}
        nearest = {
            name: _closest(original.widths[name] * left[name], allowed_widths)
            if name in sorted_bundles
            else _nearest(original.widths[name] * left[name], allowed_widths, vanishing.steps[name])
            for name, allowed_widths in vanishing.allowed.items()
        }
        widths = vanishing.resolve(nearest)
    else:
        dense = original.among(now, structure)
        limits = target.amounts(original, dense, share)
        merits = scope.kind == "global"
        keys = _merits(vanishing, ranked, scores, scope) if merits else _paces(vanishing, now, original, scope)
        widths = _rounded_up(vanishing, _descend(vanishing, keys, limits), limits)
    kept = {
        name: tuple(np.sort(order[now[name] - widths[name] :]).tolist())
        for name, order in ranked.items()
        if widths[name] < now[name]
    }
    return Plan(kept, {name: now[name] for name in kept})


def feasible(
    structure: Structure,
    target: Target,
    scope: Scope,
    selected: Collection[str],
    original: Size | None = None,
    bundles: Bundles | None = None,
) -> float:
    """Check before training that the target can be reached.

    Args:
        structure: Structure of the network.
        target: The target.
        scope: Limits of the widths.
        selected: Names of the groups that may be pruned.
        original: Size of the dense network, if ``structure`` was already cut.
        bundles: Units that are removed together, by group; only number and sizes matter.

    Returns:
        The smallest reachable size in the target's quantity (of several, in the first one).

    Raises:
        ValueError: If the target is larger than the network or cannot be reached, has shares per layer in a global
            scope, or removes all units of a group that cannot be removed.
    """
    original, scope = original or Size.of(structure), _on_device(structure, target, scope, bundles)
    vanishing = _Vanishing(structure, {name: structure.widths[name] for name in selected}, scope, bundles)
    narrowest = vanishing.resolve({n: allowed_widths[-1] for n, allowed_widths in vanishing.allowed.items()})
    smallest = vanishing.size(narrowest, target.quantity)
    if (shares := _shares(target, scope, selected)) is not None:
        for name in (name for name, remaining in shares.items() if remaining == 0):
            if vanishing.allowed[name][-1] > 0:
                raise ValueError(f"a `pruning_ratio` of 1 for {name!r} cannot be met: {vanishing.refusal(name)}.")
        return smallest
    vanishing.require(narrowest, target.amounts(original, original.among(selected, structure)))
    return smallest


def notes_on_widths(
    structure: Structure, target: Target, scope: Scope, selected: Collection[str], original: Size
) -> dict[str, str]:
    """Notes on groups that keep more units than their share because of the limits of the widths.

    These are groups that keep a unit although less than half a unit should remain, and groups that are wider by at
    least one unit and at their minimum. Takes the arguments of `feasible`; only targets that are shares of units have
    notes.
    """
    shares = _shares(target, scope, selected)
    if shares is None:
        return {}
    now = {name: structure.widths[name] for name in selected}
    vanishing = _Vanishing(structure, now, scope)
    left = {name: original.widths[name] * share for name, share in shares.items()}
    nearest = {
        name: _nearest(left[name], allowed_widths, vanishing.steps[name])
        for name, allowed_widths in vanishing.allowed.items()
    }
    resolved = vanishing.resolve(nearest)
    notes: dict[str, str] = {}
    for name, step in vanishing.steps.items():
        over = resolved[name] - left[name]
        if scope.min_width == 0 and resolved[name] > 0 and _rounded(left[name], step) == 0:
            notes[name] = f"One unit of {name} stays: {vanishing.why(name)}."
        elif over >= 1 and (over > step / 2 or resolved[name] == now[name]):
            notes[name] = (
                f"{name} keeps {resolved[name]} of {original.widths[name]} units where {left[name]:.4g} were asked "
                f"for: min_width={scope.min_width}, and units go {step} at a time (round_to={scope.round_to})."
            )
    return notes


def _on_device(structure: Structure, target: Target, scope: Scope, bundles: Bundles | None) -> Scope:
    """The scope, for a budget of latency by default with widths that are fast on the device."""
    table = structure.cost.latency_table
    if table is None or bundles or not target.uses_latency or scope.round_to > 1:
        return scope
    return replace(scope, round_to=table.multiple)


class _Vanishing:
    """The widths that groups may have, and the groups that are removed with others.

    Args:
        structure: Structure of the network.
        now: Current widths of the groups that may be pruned, in the order of execution.
        scope: Limits of the widths.
        bundles: Units that are removed together, in the order of removal.

    Attributes:
        steps: Units from one width to the next, per group; 1 for bundles.
        allowed: Allowed widths of each group, descending.
    """

    def __init__(
        self, structure: Structure, now: Mapping[str, int], scope: Scope, bundles: Bundles | None = None
    ) -> None:
        self.structure, self.names, self.scope = structure, frozenset(now), scope
        may = {name: scope.min_width == 0 and self.closed({name}) is not None for name in now}
        self.steps = {name: scope.step(structure.group(name)) for name in now}
        self.allowed = {name: scope.allowed_widths(now[name], self.steps[name], vanish=may[name]) for name in now}
        for name, found in ((name, found) for name, found in (bundles or {}).items() if name in now):
            if self.steps[name] > 1:
                raise ValueError(
                    f"expected `round_to` of 1 where units go in groups of several, got {scope.round_to} and "
                    f"{len(found)} groups of {name!r}. Leave `round_to` out, or choose a group size of 1."
                )
            left = now[name] - np.cumsum([0, *map(len, found)])
            least = scope.narrowest(now[name], 1, vanish=may[name])
            self.allowed[name] = [width for width in left.tolist() if width >= least]

    def closed(self, groups: Collection[str]) -> frozenset[str] | None:
        """Groups that are removed with ``groups``; None if impossible, or if that includes groups not selected."""
        flow = self.structure.flow
        removal = None if flow is None else flow.without(groups)
        if flow is None or removal is None or isinstance(removal, str):
            return None
        gone = removal.groups - flow.removal.groups
        return gone if gone <= self.names else None

    def why(self, group: str) -> str:
        """Reason why a group keeps a unit."""
        flow = self.structure.flow
        assert flow is not None  # given wherever a group may be removed
        removal = flow.without({group})
        if isinstance(removal, str):
            return removal
        along = sorted(removal.groups - flow.removal.groups - self.names)
        if along:
            return f"others that are not selected would have to go with it: {', '.join(along)}"
        return "others vanish, and with it nothing of the input would reach the output"

    def refusal(self, group: str) -> str:
        """Reason why a group cannot be removed, and what to do."""
        if self.scope.min_width > 0:
            return f"`min_width` is {self.scope.min_width}. Give scope=Scope(min_width=0) to take its layers out"
        return f"{self.why(group)}. Leave some of its units, a share below 1"

    def resolve(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Correct widths of 0 that are not possible; of groups that exclude each other, the later one keeps a unit."""
        gone: frozenset[str] = frozenset()
        resolved = dict(widths)
        for name, width in widths.items():
            if width == 0 and name not in gone:
                together = self.closed(gone | {name})
                resolved[name] = 0 if together is not None else self.allowed[name][-2]
                gone = gone if together is None else together
        return resolved | dict.fromkeys(gone, 0)

    def size(self, widths: Mapping[str, int], quantity: Quantity) -> float:
        """Size of the network with these widths; other groups keep theirs."""
        if quantity == "units":
            return sum(widths.values())
        gone = [name for name, width in widths.items() if width == 0]
        cost = self.structure.cost
        if gone:
            cost = cost.without(gone, self.structure.drops(dict.fromkeys(gone, ())))
        return cost.amount(quantity, self.structure.widths | dict(widths))

    def holds(self, widths: Mapping[str, int], limits: Limits) -> bool:
        """Whether these widths meet all limits."""
        return all(_holds(self.size(widths, quantity), limit, quantity) for quantity, limit in limits)

    def require(self, narrowest: Mapping[str, int], limits: Limits) -> None:
        """Raise an error for limits that not even the narrowest widths meet."""
        for quantity, limit in limits:
            if not _holds(smallest := self.size(narrowest, quantity), limit, quantity):
                raise ValueError(_unreachable(smallest, limit, quantity, self.scope))

    def price(self, name: str, quantity: Quantity) -> float:
        """What a unit of a group costs, as the mean from half the width on, while other groups keep their widths."""
        wide = max(self.allowed[name][0], 2)
        narrow = wide // 2
        saved = self.size({name: wide}, quantity) - self.size({name: narrow}, quantity)
        return saved / (wide - narrow)


def _shares(target: Target, scope: Scope, names: Collection[str]) -> dict[str, float] | None:
    """Final share of units per group; None if the groups share one budget."""
    remaining = target.remaining
    if len(target.limits) > 1:
        return None
    if isinstance(remaining, Mapping):
        if scope.kind != "local":
            raise ValueError(
                f"expected one `pruning_ratio` or `budget` for the whole network with a scope of {scope.kind!r}, got "
                f'one per layer ({", ".join(remaining)}). Use scope="local", or give a single number.'
            )
        return {name: remaining[name] for name in names}
    if target.quantity == "units" and scope.kind == "local" and isinstance(remaining, float):
        return dict.fromkeys(names, remaining)
    return None


def _ranked(structure: Structure, scores: Mapping[str, Tensor | FloatArray]) -> dict[str, IndexArray]:
    """Units of every scored group by ascending score, groups in the order of execution."""
    widths = structure.widths
    if not scores:
        raise ValueError(f"expected scores of at least one group ({', '.join(widths)}), got none")
    if unknown := [name for name in scores if name not in widths]:
        raise ValueError(f"expected scores of groups ({', '.join(widths)}), got some of {', '.join(unknown)}")
    ranked = {}
    for name in (name for name in widths if name in scores):
        values = _array(scores[name])
        if values.shape != (widths[name],):
            raise ValueError(f"expected {widths[name]} scores for group {name!r}, got shape {values.shape}")
        if not np.isfinite(values).all():
            bad = np.flatnonzero(~np.isfinite(values)).tolist()
            raise ValueError(
                f"expected finite scores for group {name!r}, got NaN or infinity for {len(bad)} of its units "
                f"({bad[:5]}). Look for NaN or infinite weights and activations before this cut."
            )
        ranked[name] = np.argsort(values, kind="stable")
    return ranked


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Common units as a share of all; 1 for empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


def _array(scores: Tensor | FloatArray) -> FloatArray:
    plain = scores.detach().to("cpu", torch.float64).numpy() if isinstance(scores, Tensor) else scores
    return np.asarray(plain, dtype=np.float64)


def _sorted(name: str, scores: Tensor | FloatArray, bundles: Sequence[Sequence[int]]) -> list[list[int]]:
    """Bundles by ascending mean score; ties by their first unit."""
    values = _array(scores)
    if sorted(unit for bundle in bundles for unit in bundle) != list(range(len(values))):
        raise ValueError(f"expected each of the {len(values)} units of group {name!r} in one bundle, got {bundles}")
    return sorted(map(sorted, bundles), key=lambda units: (values[units].mean(), units[0]))


def _closest(wanted: float, allowed_widths: Sequence[int]) -> int:
    """The allowed width nearest to ``wanted``, half up, for irregular steps."""
    return min(allowed_widths, key=lambda width: abs(width - wanted) - (_EPSILON if width > wanted else 0))


def _nearest(wanted: float, allowed_widths: Sequence[int], step: int) -> int:
    """The allowed width nearest to ``wanted``, half up."""
    return min(allowed_widths[0], max(_rounded(wanted, step), allowed_widths[-1]))


def _rounded(wanted: float, step: int) -> int:
    return math.floor(wanted / step + 0.5 + _EPSILON) * step


def _paces(vanishing: _Vanishing, now: Mapping[str, int], original: Size, scope: Scope) -> dict[str, FloatArray]:
    """Sort keys of the steps of each group if all shrink at the same rate: minus the dense share at which it rounds.

    For ``"erk"`` and ``"random"``, shares are relative to the densities; those of ``"erk"`` are of the dense network.
    """
    density = dict.fromkeys(now, 1.0)
    if scope.kind == "erk":
        density = _densities(vanishing.structure, now, original)
    elif scope.kind == "random":
        density = {name: _random_density(scope.seed, name) for name in now}
    return {
        name: np.array([-(a + b) / 2 / original.widths[name] / density[name] for a, b in pairwise(allowed_widths)])
        for name, allowed_widths in vanishing.allowed.items()
    }


def _random_density(seed: int, name: str) -> float:
    """Random number in (0, 1], the same in every process and at every cut."""
    # Python's `hash` differs between processes.
    return 1 - float(np.random.default_rng([zlib.crc32(name.encode()), seed % 2**63]).random())


def _densities(structure: Structure, names: Collection[str], original: Size) -> dict[str, float]:
    """Erdős–Rényi kernel densities, up to a common factor: sum over product of the sizes of the producing weights."""
    sizes = {tensor: list(shape) for tensor, shape in structure.cost.shapes.items()}
    for group in (group for group in structure.groups if not group.within):
        for member in group.members:
            sizes[member.tensor][member.dim] += (original.widths[group.name] - group.width) * member.index.shape[1]
    densities = {}
    for name in names:
        members = structure.group(name).members
        weights = dict.fromkeys(m.tensor for m in members if m.role == "out") or dict.fromkeys(
            m.tensor for m in members
        )
        densities[name] = sum(sum(sizes[w]) for w in weights) / sum(math.prod(sizes[w]) for w in weights)
    return densities


def _merits(
    vanishing: _Vanishing,
    ranked: Mapping[str, IndexArray],
    scores: Mapping[str, Tensor | FloatArray],
    scope: Scope,
) -> dict[str, FloatArray]:
    """Cost of each step of a group: the mean score of the removed units (by their price), comparable across groups."""
    merits = {}
    for name, order in ranked.items():
        values = _array(scores[name])
        mean = np.abs(values).mean()
        if scope.normalize != "none" and mean > 0:
            values = values / mean
        allowed_widths = np.array(vanishing.allowed[name])
        starts, sizes = allowed_widths[0] - allowed_widths[:-1], allowed_widths[:-1] - allowed_widths[1:]
        removable = values[order][: allowed_widths[0] - allowed_widths[-1]]
        means = np.add.reduceat(removable, starts) / sizes if sizes.size else np.empty(0)
        if scope.per is not None:
            price = vanishing.price(name, scope.per)
            means = means / price if price > 0 else np.full_like(means, np.inf)
        # Steps of a group must stay in order despite rounding.
        merits[name] = np.maximum.accumulate(means)
    return merits


def _descend(vanishing: _Vanishing, keys: Mapping[str, FloatArray], limits: Limits) -> dict[str, int]:
    """Take the steps with the lowest keys until all limits are met.

    The order of steps is fixed, so the number of steps is found by bisection, and smaller limits remove supersets.
    """
    names, allowed = list(keys), [vanishing.allowed[name] for name in keys]
    group = np.repeat(np.arange(len(names)), [len(allowed_widths) - 1 for allowed_widths in allowed])
    steps = np.concatenate([-np.diff(allowed_widths) for allowed_widths in allowed])
    left = np.concatenate([allowed_widths[1:] for allowed_widths in allowed])
    order = np.argsort(np.concatenate([keys[name] for name in names]), kind="stable")
    gone: list[tuple[int, frozenset[str]]] = [(-1, frozenset())]
    for position in np.flatnonzero(left[order] == 0).tolist():
        together = vanishing.closed(gone[-1][1] | {names[group[order[position]]]})
        if together is None:
            steps[order[position]] = 0  # there is no other path left
        else:
            gone.append((position, together))

    def widths(count: int) -> dict[str, int]:
        first = order[:count]
        lost = np.bincount(group[first], weights=steps[first], minlength=len(names))
        vanished = gone[bisect_left(gone, count, key=lambda event: event[0]) - 1][1]
        found = {name: allowed_widths[0] - int(n) for name, allowed_widths, n in zip(names, allowed, lost, strict=True)}
        return found | dict.fromkeys(vanished, 0)

    def holds(count: int) -> bool:
        return vanishing.holds(widths(count), limits)

    count = bisect_left(range(len(order) + 1), True, key=holds)
    if count > len(order):
        vanishing.require(widths(len(order)), limits)
    return widths(count)


def _rounded_up(vanishing: _Vanishing, widths: dict[str, int], limits: Limits) -> dict[str, int]:
    """Round widths up to the multiples in which the latency rises, as far as all limits still hold."""
    table = vanishing.structure.cost.latency_table
    steps = {} if table is None or not any(quantity in LATENCIES for quantity, _ in limits) else table.steps()
    for name, step in steps.items():
        width = widths.get(name, 0)
        if width % step:
            wider = (w for w in vanishing.allowed[name] if width < w <= -(-width // step) * step)
            widths[name] = next((w for w in wider if vanishing.holds({**widths, name: w}, limits)), width)
    return widths


def _holds(size: float, limit: float, quantity: Quantity) -> bool:
    """Whether a limit is met: units to the nearest one, half up; other quantities are never exceeded."""
    return size <= (math.floor(limit + 0.5 + _EPSILON) if quantity == "units" else limit * (1 + _EPSILON))


def _unreachable(smallest: float, limit: float, quantity: Quantity, scope: Scope) -> str:
    what = _of(quantity)
    kinds = "" if quantity == "latency_ms" else "; an int is a count, a float a share"
    return (
        f"the budget of {limit:.6g} {what} cannot be reached: with every prunable group at its narrowest "
        f"(min_width={scope.min_width}, round_to={scope.round_to}), {smallest:.6g} {what} are left. Give a larger "
        f"budget, a smaller `min_width` or `round_to`, or free more layers{kinds}."
    )


def _of(quantity: Quantity) -> str:
    """Name of a quantity for messages."""
    latency = "milliseconds of latency"
    return {"memory": "bytes of memory", "latency": latency, "latency_ms": latency}.get(quantity, quantity)
