"""Scopes (how removal is distributed over groups, and limits of widths), and selection of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

from lightning_prune.arguments import Settings
from lightning_prune.structure.graph import Group, Structure

__all__ = ["Scope", "ScopeKind", "as_patterns", "matches", "pick", "select"]

# Names in an error message.
_MOST = 12

#: How the amount to remove is distributed.
ScopeKind = Literal["local", "global", "erk", "random"]


@dataclass(frozen=True)
class Scope(Settings):
    """Distribution of the amount to remove over the groups.

    Attributes:
        kind: ``"local"``: every group loses the same share (uniform). ``"global"``: the lowest scores over all groups
            are removed (non-uniform). ``"erk"``: what a group keeps is proportional to (fan in + fan out + kernel
            sizes) / (their product) of the weights that produce it, so that wide layers lose most (Erdős–Rényi kernel:
            Evci et al., 2020, there of single weights); `LAMP` under ``"global"`` is another such allocation.
            ``"random"``: what a group keeps is proportional to a random number, uniform in (0, 1] (random channel
            pruning: Li et al., 2022).
        min_width: Minimum number of units per group. With 0, groups that another path leads around (the branch of a
            residual block) may lose all units, and their layers are removed; other groups keep one unit.
        round_to: Channels and features after a cut are multiples of this (8 or 16 for tensor cores), rounded to
            nearest; narrower groups keep their width. With a budget of latency, 1 means 4, 8 or 16 where the latency
            table shows that other widths are slow on the device. If a unit is several channels (those of a group norm),
            the step in units is smaller accordingly.
        normalize: Normalisation of scores before a global comparison: ``"mean"`` divides by the mean absolute score of
            the group, so that layers with more weights per unit are not favoured; ``"none"`` compares scores directly
            (the plain L1 ranking over a whole network). By default ``"none"`` for comparable criteria such as `LAMP`
            and `NetworkSlimming`, else ``"mean"``.
        per: For ``"global"``: scores are divided by what a unit of the group costs, in ``"params"``, ``"macs"``,
            ``"memory"`` or ``"latency"``, so that a budget of that quantity is met with the least loss of scores: of
            two equally important units the more expensive one goes first. By default scores are compared as they are.
            The cost is the mean over half of the group's units, the other groups at their widths before the cut.
        draws: Number of allocations for ``"random"``; the one with the lowest loss is used. Each is cut out of a copy
            of the network and evaluated on up to 1,000 samples of the training data, or on ``data`` of `prune`. Li et
            al. first fit the weights of each to the dense network's activations.
        seed: Seed for ``"random"``.
    """

    kind: ScopeKind = "local"
    min_width: int = 1
    round_to: int = 1
    normalize: Literal["mean", "none"] | None = None
    per: Literal["params", "macs", "memory", "latency"] | None = None
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("min_width", 0), ("round_to", 1), ("draws", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"expected `{name}` of at least {least}, got {getattr(self, name)}")
        if self.per is not None and self.kind != "global":
            raise ValueError(f'expected `per` with a scope of "global" only, got {self.kind!r}. Give kind="global".')
        if self.kind != "random" and (self.draws, self.seed) != (1, 0):
            raise ValueError(
                f'expected `draws` and `seed` with a scope of "random" only, got {self.kind!r}. Give kind="random".'
            )

    @classmethod
    def of(cls, scope: ScopeKind | Scope, *, comparable: bool = False) -> Scope:
        """Convert a kind to a scope with default settings.

        Args:
            scope: A scope or its kind.
            comparable: Whether scores of different groups are comparable.
        """
        given = scope if isinstance(scope, Scope) else cls(scope)
        return replace(given, normalize="none") if comparable and given.normalize is None else given

    @property
    def drawn(self) -> tuple[Scope, ...]:
        """One scope per draw."""
        return tuple(replace(self, draws=1, seed=self.seed + number) for number in range(self.draws))

    def step(self, group: Group) -> int:
        """Units from one allowed width to the next, so that channels of all producers and consumers are rounded."""
        sizes = {member.index.shape[1] for member in group.members if member.role != "along"} or {1}
        return math.lcm(*(self.round_to // math.gcd(self.round_to, size) for size in sizes))

    def narrowest(self, width: int, step: int, *, vanish: bool = False) -> int:
        """Smallest allowed width of a group of ``width`` units, which may be 0 if it may ``vanish``."""
        least = self.min_width if vanish else max(self.min_width, 1)
        return min(width, -(-least // step) * step)

    def allowed_widths(self, width: int, step: int, *, vanish: bool = False) -> list[int]:
        """Allowed widths of a group of ``width`` units, descending, starting with ``width``."""
        below = (width - 1) // step * step
        return [width, *range(below, self.narrowest(width, step, vanish=vanish) - 1, -step)]


def select(
    structure: Structure,
    layers: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    named: Sequence[str] = (),
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Select the groups to prune.

    A pattern is the name of a layer (``"encoder.fc1"``), a glob (``"encoder.*"``, ``"*.fc?"``), or the name of a
    module, for all layers inside. It selects a group if it matches the group's name or any layer that produces its
    units, as these layers can only shrink together. Groups of features of attention heads are selected only by patterns
    of their own names (``"*#head_dim"``), and ignored by those of their layers, too.

    Args:
        structure: Structure of the network.
        layers: Patterns of layers to prune; all by default, but for features of heads.
        ignore: Patterns of layers not to prune; takes precedence over ``layers``.
        named: Patterns that select features of heads, too, if ``layers`` is None: those of `Target.names`.

    Returns:
        Names of the selected groups in the order of execution, and reasons for all other layers by name.

    Raises:
        ValueError: If a pattern matches nothing or only what cannot be pruned, or nothing is selected.
    """
    frozen = _reasons(structure)
    if not structure.groups:
        raise ValueError(f"the model has nothing that can be pruned. {_why(frozen)}")
    wanted, unwanted = as_patterns(layers), as_patterns(ignore)
    for argument, patterns in (("layers", wanted), ("ignore", unwanted)):
        for pattern in patterns:
            _check(argument, pattern, structure, frozen)
    by_default = None if layers is not None else named
    why_not = {group.name: _why_not(group, wanted, unwanted, by_default) for group in structure.groups}
    selected = [name for name, why in why_not.items() if why is None]
    refused = {name: why for name, why in why_not.items() if why is not None}
    if not selected:
        raise ValueError(
            f"layers={layers!r} and ignore={ignore!r} leave nothing to prune. {_can(tuple(structure.widths))}"
        )
    producers = {layer for group in structure.groups for layer in group.producers}
    return tuple(selected), refused | {layer: why for layer, why in frozen.items() if layer not in producers}


def _why_not(
    group: Group, wanted: Sequence[str], unwanted: Sequence[str], by_default: Sequence[str] | None
) -> str | None:
    """Why a group is not selected; None if it is. Of features, defaults have those that ``by_default`` names."""
    if spared := [pattern for pattern in unwanted if _picks(pattern, group) or _holds(pattern, group)]:
        return f"ignored by {spared[0]!r}"
    if by_default is not None:
        is_meant = not group.within or any(_picks(pattern, group) for pattern in by_default)
        return None if is_meant else f"features of heads are pruned where they are named: layers=[..., {group.name!r}]"
    return None if any(_picks(pattern, group) for pattern in wanted) else "not among `layers`"


def pick(structure: Structure, argument: str, patterns: Sequence[str]) -> dict[str, str]:
    """The first of the ``patterns`` (names, globs, names of modules) that matches each group.

    Raises:
        ValueError: If a pattern matches nothing, only what cannot be pruned, or only what earlier patterns match.
    """
    frozen = _reasons(structure)
    for pattern in patterns:
        _check(argument, pattern, structure, frozen)
    first = {group.name: next((p for p in patterns if _picks(p, group)), None) for group in structure.groups}
    for pattern in patterns:
        if pattern not in first.values() and not _names_removed_group(pattern, structure):
            taken = ", ".join(f"{g.name} ({first[g.name]!r})" for g in structure.groups if _picks(pattern, g))
            raise ValueError(
                f"{argument}={pattern!r} has no effect: earlier names match the same layers: {taken}. The first match "
                "counts: put more specific names first."
            )
    return {name: pattern for name, pattern in first.items() if pattern is not None}


def _reasons(structure: Structure) -> dict[str, str]:
    """Reason for every layer with a frozen axis."""
    reasons: dict[str, str] = {}
    for entry in structure.frozen:
        reasons.setdefault(entry.layer, entry.reason)
    return reasons


def as_patterns(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Patterns as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (name, glob or name of a parent module) matches a name."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _picks(pattern: str, group: Group) -> bool:
    if group.within:  # only by its own name, since it has the layers of its heads
        return "#" in pattern and fnmatchcase(group.name, pattern)
    return _holds(pattern, group)


def _holds(pattern: str, group: Group) -> bool:
    """Whether a pattern matches the name of a group or of a layer that produces its units."""
    return any(matches(pattern, name) for name in (group.name, *group.producers))


def _check(argument: str, pattern: str, structure: Structure, frozen: dict[str, str]) -> None:
    """Raise an error for a pattern without effect, with suggestions."""
    if any(_picks(pattern, group) for group in structure.groups) or _names_removed_group(pattern, structure):
        return
    names = list(dict.fromkeys(name for group in structure.groups for name in (group.name, *group.producers)))
    if "#" in pattern:
        names = [group.name for group in structure.groups if group.within]
        if not names:
            why = [
                f" Note: {note}."
                for note in (*structure.notes, *structure.remarks)
                if note.startswith("the features of heads")
            ]
            raise ValueError(
                f"{argument}={pattern!r}: expected features of attention heads (#head_dim), but this network has none "
                f"that can be pruned. Whole heads are named by their layers.{''.join(why)}"
            )
    if fixed := {layer: reason for layer, reason in frozen.items() if matches(pattern, layer)}:
        if argument == "ignore":
            return  # it is not pruned anyway
        raise ValueError(f"{argument}={pattern!r}: expected layers that can be pruned. {_why(fixed)} {_can(names)}")
    if heads := [g.name for g in structure.groups if any(matches(pattern, member.layer) for member in g.members)]:
        raise ValueError(
            f"{argument}={pattern!r}: expected a layer that produces units; this one follows {', '.join(heads)}, "
            f"so name that instead."
        )
    near = get_close_matches(pattern, names, n=3, cutoff=0.5)
    guess = f" Did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"{argument}={pattern!r} matches no layer.{guess} {_can(names)}")


def _names_removed_group(pattern: str, structure: Structure) -> bool:
    """Whether a pattern matches a group that was removed, as may be the case in a resumed run."""
    return any(matches(pattern, name) for name in structure.vanished)


def _can(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more (`inspect` shows all)" if len(names) > _MOST else ""
    return f"What can be pruned: {', '.join(names[:_MOST])}{more}"


def _why(frozen: dict[str, str]) -> str:
    reasons = "; ".join(f"{layer} because {reason}" for layer, reason in frozen.items())
    return f"What cannot be pruned: {reasons}." if reasons else "It has no layer with a width of its own."
