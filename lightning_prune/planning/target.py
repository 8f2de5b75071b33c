"""How much of the network is to remain: one number and what it counts."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from lightning_prune.structure.graph import Structure

__all__ = ["NoEffectWarning", "Original", "Quantity", "Target"]

#: What a target counts. 1 MAC = 2 FLOPs.
Quantity = Literal["units", "params", "macs"]


class NoEffectWarning(UserWarning):
    """What was asked for changes nothing."""


@dataclass(frozen=True)
class Original:
    """Size of the dense network, to which every target is relative, however often it was cut since.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulates of one sample's forward pass.
        widths: Units per group.
    """

    params: int
    macs: int
    widths: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, structure: Structure) -> Original:
        """The size of a network that was not cut yet."""
        widths = structure.widths
        return cls(structure.cost.params(widths), structure.cost.macs(widths), widths)

    def size(self, quantity: Quantity, selected: Collection[str]) -> int:
        """The dense size in ``quantity``; units are counted over the ``selected`` groups only."""
        if quantity == "units":
            return sum(self.widths[name] for name in selected)
        return self.params if quantity == "params" else self.macs


@dataclass(frozen=True)
class Target:
    """What is to remain.

    Attributes:
        quantity: What is counted: ``"units"`` of the prunable groups, ``"params"`` or ``"macs"`` of the whole network.
        remaining: A float is the share of the dense network that remains, in (0, 1]; an int is a count.
    """

    quantity: Quantity
    remaining: float | int

    def __post_init__(self) -> None:
        if self.quantity not in get_args(Quantity):
            raise ValueError(f"expected a budget of {_known()}, got {self.quantity!r}")
        remaining = self.remaining
        if isinstance(remaining, bool) or not isinstance(remaining, int | float):
            raise TypeError(f"expected a budget that is a share (float) or a count (int), got {remaining!r}")
        if isinstance(remaining, int) and remaining < 1:
            raise ValueError(f"expected a budget of at least 1 (an int counts {self.quantity}), got {remaining}")
        if isinstance(remaining, float) and not 0 < remaining <= 1:
            raise ValueError(
                f"expected a budget in (0, 1], the share of the {self.quantity} that remains, "
                f"got {remaining}{_hint(remaining)}. A count must be an int."
            )

    @classmethod
    def of(
        cls,
        pruning_ratio: float | None = None,
        budget: float | int | Mapping[str, float | int] | None = None,
    ) -> Target:
        """The target behind a user's ``pruning_ratio`` or ``budget``; exactly one of the two must be given.

        Args:
            pruning_ratio: Share of the units that is *removed*, in [0, 1): of every group (local scope), or of all
                prunable units (global scope).
            budget: What *remains*: ``{"params": 0.6}``, ``{"macs": 0.5}``, ``{"units": 40}``; a float is a share of the
                dense network in (0, 1], an int a count. A bare number counts parameters.

        Raises:
            ValueError: If both are given or none, a number is out of range, or the budget's key is unknown.
            TypeError: If a number is none.

        Warns:
            NoEffectWarning: If nothing is to be removed.
        """
        if (pruning_ratio is None) == (budget is None):
            got = "none" if budget is None else f"both: pruning_ratio={pruning_ratio}, budget={budget}"
            raise ValueError(
                f"expected exactly one of `pruning_ratio` (the share of units to remove) and `budget` (what remains), "
                f'got {got}. Give pruning_ratio=0.5 or budget={{"params": 0.6}}.'
            )
        target = cls("units", 1 - _ratio(pruning_ratio)) if pruning_ratio is not None else cls(*_budget(budget))
        if isinstance(target.remaining, float) and target.remaining == 1:
            given = f"{pruning_ratio=}" if budget is None else f"{budget=}"
            warnings.warn(f"{given} leaves the network as it is: nothing will be pruned", NoEffectWarning, stacklevel=2)
        return target

    def fraction(self, original: Original, selected: Collection[str]) -> float:
        """What remains as a share of the dense network, in (0, 1].

        Args:
            original: Size of the dense network.
            selected: Names of the groups that may be pruned.

        Raises:
            ValueError: If a count is larger than the network.
        """
        if isinstance(self.remaining, float):
            return self.remaining
        size = original.size(self.quantity, selected)
        if self.remaining > size:
            whole = "its prunable groups have" if self.quantity == "units" else "it has"
            raise ValueError(
                f'budget={{"{self.quantity}": {self.remaining}}} is larger than the network: {whole} {size} '
                f"{self.quantity}. Give a count of at most that, or a share as a float in (0, 1]."
            )
        return self.remaining / size


def _ratio(ratio: float) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise TypeError(f"expected a number in [0, 1) for `pruning_ratio`, got {ratio!r}")
    if not 0 <= ratio < 1:
        raise ValueError(
            f"expected `pruning_ratio` (the share of units to remove) in [0, 1), got {ratio}{_hint(ratio)}"
        )
    return float(ratio)


def _budget(budget: object) -> tuple[Quantity, float | int]:
    if not isinstance(budget, Mapping):
        return "params", cast(float, budget)
    if len(budget) != 1:
        raise ValueError(f"expected a `budget` with one key ({_known()}), got {dict(budget)}")
    ((quantity, remaining),) = budget.items()
    return quantity, remaining


def _known() -> str:
    return ", ".join(f'"{name}"' for name in get_args(Quantity))


def _hint(number: float) -> str:
    """Somebody who writes 50 means per cent."""
    return f" (did you mean {number / 100:g}?)" if 1 < number < 100 and float(number).is_integer() else ""
