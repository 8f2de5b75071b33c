"""How much of a layer goes, by how much a surrogate uses its units: a threshold, or what takes its place."""

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

#: What an amount is given as.
Rule = Literal["threshold", "quantile", "gain", "pruning_ratio", "budget"]

_DEFAULT_GAIN = 0.99

# Sums of shares are floats: units that hold all of the gain must not miss it by a bit.
_EPSILON = 1e-12

_RANGES: Mapping[str, tuple[str, Any]] = {
    "threshold": ("[0, 1)", lambda value: 0 <= value < 1),
    "quantile": ("[0, 1)", lambda value: 0 <= value < 1),
    "gain": ("(0, 1]", lambda value: 0 < value <= 1),
    "pruning_ratio": ("[0, 1)", lambda value: 0 <= value < 1),
}


@dataclass(frozen=True)
class Amount:
    """Which units of a group go.

    Attributes:
        rule: ``"threshold"``: those with I ≤ ρ. ``"quantile"``: likewise, with ρ this quantile of the group's I.
            ``"gain"``: those that are left over when the most used units hold this share of the gain.
            ``"pruning_ratio"``: this share of the group's units, those with the lowest I (equal ones by index).
            ``"budget"``: those with the lowest I of all groups, until the budget holds.
        value: The number; of a budget what `Target.of` takes.
    """

    rule: Rule
    value: Any

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"expected a rule of {', '.join(get_args(Rule))}, got {self.rule!r}")
        if self.rule == "budget":
            Target.of(None, self.value)
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
        budget: float | int | dict[str, float | int] | None = None,
    ) -> Amount:
        """The one that is given; ``gain=0.99`` if none is.

        Raises:
            ValueError: If there are several, or a number is out of range.
            TypeError: If it is no number.
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
        """Whether each group is decided by itself."""
        return self.rule != "budget"

    def kept(self, use: Usage) -> tuple[int, ...]:
        """Units of a group that stay, ascending; none if all of them go by the rule.

        Raises:
            ValueError: If it is a budget, which looks at all groups.
        """
        if self.rule == "budget":
            raise ValueError("expected a rule that decides each group by itself, got a budget")
        kept: tuple[int, ...] = tuple(np.flatnonzero(_RULES[self.rule](use, float(self.value))).tolist())
        return kept


def plan_by_use(
    structure: Structure, use: Mapping[str, Usage], amount: Amount, original: Size
) -> tuple[Plan, tuple[str, ...]]:
    """The plan, and the groups that would have been emptied and keep their best unit instead.

    Args:
        structure: The network as it is now.
        use: Per group that may be pruned.
        amount: What goes.
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
    """Units of every group if those with an importance of at most ρ go; a group keeps its best one.

    Args:
        structure: The network as it is now.
        use: Per group that may be pruned; all others stay.
        threshold: ρ.
    """
    left = {name: max(int(_above(one, threshold).sum()), 1) for name, one in use.items()}
    return {**structure.widths, **left}


def dividing_threshold(use: Usage, kept: Sequence[int]) -> float | None:
    """The ρ that divides a group as it was decided: the largest importance of the units that go.

    Args:
        use: Of the group.
        kept: Units that stay.

    Returns:
        None where nothing goes, or where the order is another than that of importances (by the gain, say).
    """
    stays = np.zeros(len(use.importance), dtype=np.bool_)
    stays[list(kept)] = True
    if stays.all():
        return None
    threshold = float(use.importance[~stays].max())
    return threshold if not stays.any() or use.importance[stays].min() >= threshold else None


def best_unit(use: Usage) -> int:
    """The most used unit, the first of equal ones."""
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
