"""Targets: how much of the network remains."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from typing_extensions import override

from lightning_prune.errors import listed
from lightning_prune.planning.scope import pick
from lightning_prune.structure import Size
from lightning_prune.structure.graph import Structure

__all__ = ["LATENCIES", "CombinedTarget", "NoEffectWarning", "Quantity", "Target"]

#: Quantity of a target (1 MAC = 2 FLOPs; memory in bytes of activations and latency in ms, both for one sample).
Quantity = Literal["units", "params", "macs", "memory", "latency", "latency_ms"]

#: Quantities that need a latency table.
LATENCIES: frozenset[Quantity] = frozenset({"latency", "latency_ms"})


class NoEffectWarning(UserWarning):
    """Warning that a setting has no effect."""


@dataclass(frozen=True)
class Target:
    """Size of the network to reach.

    Attributes:
        quantity: ``"units"`` of the prunable groups, or of the whole network ``"params"``, ``"macs"``, ``"memory"``
            (bytes of activations), ``"latency"`` or ``"latency_ms"`` (both in milliseconds), the last four for one
            sample.
        remaining: What remains: a share of the dense network (float in (0, 1]), a count (int), or shares of units per
            layer (mapping of names or globs; other layers are not pruned). For ``"latency_ms"``, always milliseconds.
    """

    quantity: Quantity
    remaining: int | float | Mapping[str, float]

    def __post_init__(self) -> None:
        if self.quantity not in get_args(Quantity):
            raise ValueError(f"expected a budget of {_known()}, got {self.quantity!r}")
        remaining = self.remaining
        if isinstance(remaining, Mapping):
            if self.quantity != "units":
                raise ValueError(
                    f"expected shares per layer of units, got shares of {self.quantity}. Give `pruning_ratio` per "
                    "layer, or one budget for the whole network."
                )
        elif isinstance(remaining, bool) or not isinstance(remaining, int | float):
            what = "a number of milliseconds" if self.quantity == "latency_ms" else "a share (float) or a count (int)"
            raise TypeError(f"expected a budget that is {what}, got {remaining!r}")
        elif self.quantity == "latency_ms":
            if not 0 < remaining < math.inf:
                raise ValueError(f"expected a budget of more than 0 milliseconds, got {remaining}")
        else:
            _require_range(self.quantity, remaining)

    @classmethod
    def of(
        cls,
        pruning_ratio: float | Mapping[str, float] | None = None,
        budget: int | float | Mapping[str, int | float] | None = None,
    ) -> Target:
        """The target for a ``pruning_ratio`` or a ``budget``, of which exactly one must be given.

        Args:
            pruning_ratio: Share of the units that is *removed*, in [0, 1): of every group (local scope), or of all
                prunable units (global scope). ``{"layers.1": 0.5, "encoder.*": 0.2}`` gives the share per layer, by
                name, glob or name of a module that contains it, the first that fits; all others stay as they are.
                There 1 takes a branch out of the network, with ``Scope(min_width=0)``.
            budget: What *remains*: ``{"params": 0.6}``, ``{"macs": 0.5}``, ``{"units": 40}``, ``{"memory": 0.5}``,
                ``{"latency": 0.6}``; a float is a share of the dense network in (0, 1], an int a count (of bytes and
                milliseconds too). ``{"latency_ms": 2.5}`` gives milliseconds, whole or not. Several budgets
                (``{"macs": 0.5, "latency_ms": 3}``) are all met. A bare number counts parameters.

        Raises:
            ValueError: If both or none are given, a number is out of range, or the budget's key is unknown.
            TypeError: If a value is not a number.

        Warns:
            NoEffectWarning: If nothing is to be removed.
        """
        if (pruning_ratio is None) == (budget is None):
            got = 'none. Give pruning_ratio=0.5 or budget={"params": 0.6}'
            if budget is not None:
                got = f"both: pruning_ratio={pruning_ratio}, budget={budget}. Set one of them to None (null in YAML)"
            raise ValueError(
                "expected exactly one of `pruning_ratio` (the share of units to remove) and `budget` (what remains), "
                f"got {got}."
            )
        target = cls("units", _remaining(pruning_ratio)) if pruning_ratio is not None else _budget(budget)
        if all(limit.is_whole for limit in target.limits):
            given = f"{pruning_ratio=}" if budget is None else f"{budget=}"
            warnings.warn(f"{given} leaves the network as it is: nothing will be pruned", NoEffectWarning, stacklevel=2)
        return target

    @property
    def limits(self) -> tuple[Target, ...]:
        """The budgets, all of which are met."""
        return (self,)

    @property
    def is_whole(self) -> bool:
        """Whether a share or shares leave the network as it is."""
        remaining = self.remaining
        shares = remaining.values() if isinstance(remaining, Mapping) else (remaining,)
        return self.quantity != "latency_ms" and all(isinstance(share, float) and share == 1 for share in shares)

    @property
    def uses_latency(self) -> bool:
        """Whether a latency table is needed."""
        return any(limit.quantity in LATENCIES for limit in self.limits)

    @property
    def names(self) -> tuple[str, ...]:
        """Names and globs of the groups it has shares for; none if it is for the whole network."""
        return tuple(self.remaining) if isinstance(self.remaining, Mapping) else ()

    def amounts(
        self, original: Size, selected: Collection[str], share: float = 1.0
    ) -> tuple[tuple[Quantity, float], ...]:
        """Quantity and limit of each budget when ``share`` of the way from the dense network is done.

        Args:
            original: Size of the dense network.
            selected: Names of the groups that may be pruned, or were (`Size.among`).
            share: Share of the way, in [0, 1].

        Raises:
            ValueError: If a count is larger than the network.
        """
        return tuple(
            (limit.quantity, (1 - share * (1 - fraction)) * original.amount(limit.quantity, selected))
            for limit, fraction in zip(self.limits, self._fractions(original, selected), strict=True)
        )

    def _fractions(self, original: Size, selected: Collection[str]) -> tuple[float, ...]:
        return (self.fraction(original, selected),)

    def resolve(self, structure: Structure, selected: Collection[str]) -> tuple[Target, tuple[str, ...]]:
        """Resolve names and globs to shares per group; also returns the groups that have one.

        A target for the whole network is returned unchanged.

        Args:
            structure: Structure of the network.
            selected: Names of the groups that may be pruned.

        Raises:
            ValueError: If a name or glob matches nothing that may be pruned.
        """
        if not isinstance(self.remaining, Mapping):
            return self, tuple(selected)
        fits = pick(structure, "pruning_ratio", tuple(self.remaining))
        found = {name: self.remaining[fits[name]] for name in selected if name in fits}
        if not found:
            raise ValueError(
                f"`pruning_ratio` names {', '.join(self.remaining)}, which `layers` and `ignore` exclude. They leave "
                f"{listed(tuple(selected))}. Name some of these, or change `layers` and `ignore`."
            )
        return replace(self, remaining=found), tuple(found)

    def fraction(self, original: Size, selected: Collection[str]) -> float:
        """What remains as a share of the dense network, in (0, 1].

        Args:
            original: Size of the dense network.
            selected: Names of the groups that may be pruned, or were (`Size.among`).

        Raises:
            ValueError: If a count is larger than the network.
        """
        fraction = self.ratio(original, selected)
        if fraction > 1:
            size = original.amount(self.quantity, selected)
            whole = "its prunable groups have" if self.quantity == "units" else "it has"
            unit = "milliseconds of latency" if self.quantity in LATENCIES else self.quantity
            share = '{"latency": 0.6}' if self.quantity == "latency_ms" else "a float in (0, 1]"
            raise ValueError(
                f'budget={{"{self.quantity}": {self.remaining}}} is larger than the network: {whole} {size:.6g} '
                f"{unit}. Give at most that, or a share as {share}."
            )
        return fraction

    def ratio(self, original: Size, selected: Collection[str]) -> float:
        """The target as a share of the dense network, which may be larger than 1."""
        remaining = self.remaining
        if isinstance(remaining, float) and self.quantity != "latency_ms":
            return remaining
        if isinstance(remaining, Mapping):
            widths = {name: original.widths[name] for name in selected if name in remaining}
            return sum(remaining[name] * width for name, width in widths.items()) / sum(widths.values())
        return remaining / original.amount(self.quantity, selected)


@dataclass(frozen=True)
class CombinedTarget(Target):
    """Several budgets, all of which are met.

    Attributes:
        also: The budgets after the first one.
    """

    also: tuple[Target, ...] = ()

    @property
    @override
    def limits(self) -> tuple[Target, ...]:
        return (Target(self.quantity, self.remaining), *self.also)

    @override
    def fraction(self, original: Size, selected: Collection[str]) -> float:
        return min(self._fractions(original, selected))

    @override
    def _fractions(self, original: Size, selected: Collection[str]) -> tuple[float, ...]:
        # One that the dense network meets already limits nothing.
        return tuple(min(limit.ratio(original, selected), 1.0) for limit in self.limits)


def _remaining(ratio: float | Mapping[str, float]) -> float | dict[str, float]:
    if not isinstance(ratio, Mapping):
        return 1 - _ratio(ratio, "`pruning_ratio`")
    if not ratio:
        raise ValueError('expected `pruning_ratio` to name layers, got {}. Give {"layers.1": 0.5} or a number.')
    unnamed = [name for name in ratio if not isinstance(name, str)]
    if unnamed:
        raise TypeError(
            f"expected `pruning_ratio` to be a share for each layer's name or glob, got {unnamed[0]!r} as a name"
        )
    # A single layer may be removed; `feasible` checks whether that is possible.
    return {name: 1 - _ratio(share, f"`pruning_ratio` of {name!r}", whole=True) for name, share in ratio.items()}


def _ratio(ratio: float, what: str, *, whole: bool = False) -> float:
    allowed = "[0, 1]" if whole else "[0, 1)"
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise TypeError(f"expected a number in {allowed} for {what}, got {ratio!r}")
    if not (0 <= ratio < 1 or (whole and ratio == 1)):
        raise ValueError(f"expected {what} (the share of units to remove) in {allowed}, got {ratio}{_hint(ratio)}")
    return float(ratio)


def _budget(budget: object) -> Target:
    if not isinstance(budget, Mapping):
        return Target("params", cast(float, budget))
    if not budget:
        raise ValueError(f"expected a `budget` of at least one of {_known()}, got {{}}")
    first, *others = (Target(quantity, remaining) for quantity, remaining in budget.items())
    if not others:
        return first
    if any(isinstance(limit.remaining, Mapping) for limit in (first, *others)):
        raise ValueError(f"expected one number per quantity where several budgets are given, got {dict(budget)}")
    return CombinedTarget(first.quantity, first.remaining, tuple(others))


def _require_range(quantity: Quantity, remaining: int | float) -> None:
    """Validate a share or a count."""
    if isinstance(remaining, int) and remaining < 1:
        raise ValueError(f"expected a budget of at least 1 (an int counts {quantity}), got {remaining}")
    if isinstance(remaining, float) and not 0 < remaining <= 1:
        milliseconds = f'Milliseconds are given as {{"latency_ms": {remaining}}}.'
        raise ValueError(
            f"expected a budget in (0, 1], the share of the {quantity} that remains, got {remaining}"
            f"{_hint(remaining)}. {milliseconds if quantity == 'latency' else 'A count must be an int.'}"
        )


def _known() -> str:
    return ", ".join(f'"{name}"' for name in get_args(Quantity))


def _hint(number: float) -> str:
    """Suggestion for a number that looks like a percentage."""
    return f" (did you mean {number / 100:g}?)" if 1 < number < 100 and float(number).is_integer() else ""
