"""Amount to remove per group, by the feature importances of a surrogate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from lightning_prune.planning.plan import Plan, make_plan
from lightning_prune.planning.scope import Scope
from lightning_prune.planning.target import Target
from lightning_prune.scoring.xgb import Usage
from lightning_prune.structure import Size
from lightning_prune.structure.graph import Structure

__all__ = ["Amount", "Rule", "best_unit", "dividing_threshold", "plan_by_use", "widths_at"]

#: Rules that determine the units to remove.
Rule = Literal["threshold", "quantile", "gain", "pruning_ratio", "budget"]

_DEFAULT_GAIN = 0.99

# Tolerance for sums of shares.
_EPSILON = 1e-12

_RANGES: Mapping[str, tuple[str, Any]] = {
    "threshold": ("[0, 1)", lambda value: 0 <= value < 1),
    "quantile": ("[0, 1)", lambda value: 0 <= value < 1),
    "gain": ("(0, 1]", lambda value: 0 < value <= 1),
    "pruning_ratio": ("[0, 1)", lambda value: 0 <= value < 1),
}


@dataclass(frozen=True)
class Amount:
    """Rule for the units of a group to remove.

    Attributes:
        rule: ``"threshold"``: units with I ≤ ρ. ``"quantile"``: the same, where ρ is this quantile of the group's I.
            ``"gain"``: all but the most important units, which together have this share of the gain.
            ``"pruning_ratio"``: this share of the group's units, those with the lowest I (ties by index).
            ``"budget"``: units with the lowest I over all groups, until the budget is met.
        value: The number; for a budget, as for `Target.of`.
    """

    rule: Rule
    value: Any

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"expected a rule of {', '.join(get_args(Rule))}, got {self.rule!r}")
        if self.rule == "budget":
            if Target.of(None, self.value).uses_latency:
                raise ValueError(
                    f"expected a budget of units, params, macs or memory, got {self.value}: no latency is measured "
                    "here. Use `StructuredPruning` for a budget of latency."
                )
            return
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise TypeError(f"expected a number for `{self.rule}`, got {self.value!r}")
        allowed, holds = _RANGES[self.rule]
        if not holds(self.value):
            raise ValueError(f"expected `{self.rule}` in {allowed}, got {self.value}")

    @classmethod
    def of(
        cls,
        threshold: float | None = None,
        quantile: float | None = None,
        gain: float | None = None,
        pruning_ratio: float | None = None,
        budget: int | float | dict[str, int | float] | None = None,
    ) -> Amount:
        """The amount for the given argument; ``gain=0.99`` by default.

        Raises:
            ValueError: If several are given, or a number is out of range.
            TypeError: If it is not a number.
        """
        rules: dict[Rule, Any] = {
            "threshold": threshold,
            "quantile": quantile,
            "gain": gain,
            "pruning_ratio": pruning_ratio,
            "budget": budget,
        }
        given = {rule: value for rule, value in rules.items() if value is not None}
        if len(given) > 1:
            got = ", ".join(f"{rule}={value!r}" for rule, value in given.items())
            raise ValueError(f"expected one of {', '.join(f'`{rule}`' for rule in rules)}, got {got}. Leave one out.")
        if not given:
            return cls("gain", _DEFAULT_GAIN)
        ((rule, value),) = given.items()
        return cls(rule, value)

    @property
    def is_local(self) -> bool:
        """Whether each group is decided independently."""
        return self.rule != "budget"

    def kept(self, use: Usage) -> tuple[int, ...]:
        """Units of a group to keep, ascending; may be empty.

        Raises:
            ValueError: For a budget, which depends on all groups.
        """
        if self.rule == "budget":
            raise ValueError("expected a rule that decides each group by itself, got a budget")
        kept: tuple[int, ...] = tuple(np.flatnonzero(_RULES[self.rule](use, float(self.value))).tolist())
        return kept


def plan_by_use(
    structure: Structure, use: Mapping[str, Usage], amount: Amount, original: Size
) -> tuple[Plan, tuple[str, ...]]:
    """Make a plan; also returns the groups that keep their best unit although the rule removes all.

    Args:
        structure: Structure of the network.
        use: Importances of the groups that may be pruned.
        amount: Rule for the units to remove.
        original: Size of the dense network, which a budget is relative to.

    Raises:
        ValueError: If a budget cannot be reached.
    """
    if not amount.is_local:
        scores = {name: one.importance for name, one in use.items()}
        scope = Scope("global", normalize="none")
        return make_plan(structure, scores, Target.of(None, amount.value), 1.0, scope, original), ()
    units = {name: amount.kept(one) for name, one in use.items()}
    emptied = tuple(name for name, kept in units.items() if not kept)
    units |= {name: (best_unit(use[name]),) for name in emptied}
    kept = {name: rows for name, rows in units.items() if len(rows) < len(use[name].importance)}
    return Plan(kept, {name: len(use[name].importance) for name in kept}), emptied


def widths_at(structure: Structure, use: Mapping[str, Usage], threshold: float) -> dict[str, int]:
    """Widths of all groups if units with an importance of at most ρ are removed; a group keeps its best unit.

    Args:
        structure: Structure of the network.
        use: Importances of the groups that may be pruned.
        threshold: ρ.
    """
    left = {name: max(int(_above(one, threshold).sum()), 1) for name, one in use.items()}
    return {**structure.widths, **left}


def dividing_threshold(use: Usage, kept: Sequence[int]) -> float | None:
    """The threshold ρ that corresponds to a decision: the largest importance of the removed units.

    Args:
        use: Importances of the group.
        kept: Units to keep.

    Returns:
        None if nothing is removed, or if units were not removed in the order of importances.
    """
    stays = np.zeros(len(use.importance), dtype=np.bool_)
    stays[list(kept)] = True
    if stays.all():
        return None
    threshold = float(use.importance[~stays].max())
    return threshold if not stays.any() or use.importance[stays].min() >= threshold else None


def best_unit(use: Usage) -> int:
    """The most important unit; ties by index."""
    return int(np.argmax(use.importance))


def _above(use: Usage, threshold: float) -> npt.NDArray[np.bool_]:
    return use.importance > threshold


def _above_quantile(use: Usage, quantile: float) -> npt.NDArray[np.bool_]:
    return use.importance > np.quantile(use.importance, quantile)


def _holding(use: Usage, gain: float) -> npt.NDArray[np.bool_]:
    order = np.argsort(-use.share, kind="stable")
    held = np.cumsum(use.share[order])
    needed = int(np.searchsorted(held, gain * held[-1] - _EPSILON)) + 1
    stays = np.zeros(len(order), dtype=np.bool_)
    stays[order[:needed]] = True
    return stays & (use.share > 0)


def _best(use: Usage, ratio: float) -> npt.NDArray[np.bool_]:
    width = len(use.importance)
    left = max(int(np.floor(width * (1 - ratio) + 0.5 + 1e-9)), 1)
    stays = np.zeros(width, dtype=np.bool_)
    stays[np.argsort(use.importance, kind="stable")[width - left :]] = True
    return stays


_RULES = {"threshold": _above, "quantile": _above_quantile, "gain": _holding, "pruning_ratio": _best}
