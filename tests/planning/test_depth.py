"""Plans in which groups vanish: a chain of residual branches, a chain without any, and two paths of which one stays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune.planning import Scope, Target, feasible, make_plan
from lightning_prune.structure import Size, Structure, TracedModel, trace
from lightning_prune.structure.flow import with_flow


class Net(nn.Module):
    """A stem, two branches (the second of two groups), and two parallel paths to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.a, self.a2 = nn.Linear(6, 4), nn.Linear(4, 6)
        self.b, self.b2, self.b3 = nn.Linear(6, 3), nn.Linear(3, 5), nn.Linear(5, 6)
        self.c, self.c2, self.d, self.d2 = nn.Linear(6, 4), nn.Linear(4, 2), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.a2(self.a(x).relu())
        x = x + self.b3(self.b2(self.b(x).relu()).relu())
        return self.c2(self.c(x).relu()) + self.d2(self.d(x).relu())


def structure_of(net: nn.Module) -> Structure:
    traced = TracedModel.of(net, torch.randn(2, 5))
    return with_flow(trace(traced), traced)


STRUCTURE = structure_of(Net())
NAMES = ("stem", "a", "b", "b2", "c", "d")


def scores_of(order: tuple[str, ...] | list[str]) -> dict[str, np.ndarray]:
    """The units of the first group are the lowest, and so on; each group's own in order."""
    base = {name: rank for rank, name in enumerate(order)}
    return {name: base[name] + np.arange(w) / 100 for name, w in STRUCTURE.widths.items()}


def plan(order: tuple[str, ...] | list[str], ratio: float, **scope: object) -> dict[str, int]:
    scope = {"min_width": 0, "normalize": "none", **scope}
    made = make_plan(
        STRUCTURE,
        scores_of(order),
        Target("units", 1 - ratio),
        1.0,
        Scope("global", **scope),
        Size.of(STRUCTURE),  # type: ignore[arg-type]
    )
    return STRUCTURE.widths | made.widths


def test_a_whole_branch_goes_when_its_scores_are_lowest() -> None:
    assert plan(("a", "b", "b2", "stem", "c", "d"), 4 / 26) == STRUCTURE.widths | {"a": 0}


def test_a_branch_goes_as_one() -> None:
    # Three units are asked for, and the other group of the branch goes with them.
    assert plan(("b", "a", "b2", "stem", "c", "d"), 3 / 26) == STRUCTURE.widths | {"b": 0, "b2": 0}


def test_what_holds_the_network_together_keeps_a_unit() -> None:
    widths = plan(("stem", "a", "b", "b2", "c", "d"), 6 / 26)
    assert widths == STRUCTURE.widths | {"stem": 1, "a": 3}


def test_of_two_paths_one_stays() -> None:
    widths = plan(("d", "c", "a", "b", "b2", "stem"), 8 / 26)
    assert widths == STRUCTURE.widths | {"d": 0, "c": 1, "a": 3}


def test_by_default_one_unit_stays() -> None:
    assert plan(("a", "b", "b2", "stem", "c", "d"), 4 / 26, min_width=1) == STRUCTURE.widths | {"a": 1, "b": 2}


def test_shares_that_round_to_nothing() -> None:
    structure, scope = STRUCTURE, Scope(min_width=0)
    made = make_plan(structure, scores_of(NAMES), Target("units", 0.1), 1.0, scope, Size.of(structure))
    # The later one of the parallel paths keeps a unit, and so does the stem.
    assert structure.widths | made.widths == {"stem": 1, "a": 0, "b": 0, "b2": 0, "c": 0, "d": 1}


def test_what_is_ignored_is_not_taken_along() -> None:
    scores = {name: value for name, value in scores_of(NAMES).items() if name != "b2"}
    made = make_plan(STRUCTURE, scores, Target("units", 0.1), 1.0, Scope(min_width=0), Size.of(STRUCTURE))
    assert made.widths["b"] == 1
    assert made.widths["a"] == 0


@given(
    st.permutations(NAMES),
    st.sampled_from(["units", "params", "macs", "memory"]),
    st.sampled_from(["local", "global"]),
    st.floats(0.05, 0.95),
    st.sampled_from([1, 2]),
)
def test_a_budget_holds_and_one_step_more_does_not(
    order: list[str], quantity: str, kind: str, remaining: float, round_to: int
) -> None:
    original, scope = Size.of(STRUCTURE), Scope(kind, 0, round_to, "none")  # type: ignore[arg-type]
    target = Target(quantity, remaining)  # type: ignore[arg-type]
    try:
        feasible(STRUCTURE, target, scope, NAMES)
    except ValueError:
        with pytest.raises(ValueError, match="cannot be reached"):
            make_plan(STRUCTURE, scores_of(order), target, 1.0, scope, original)
        return
    made = make_plan(STRUCTURE, scores_of(order), target, 1.0, scope, original)
    after = STRUCTURE.take(made.kept)  # raises where the network would fall apart
    if not (quantity == "units" and kind == "local"):
        limit = remaining * original.amount(quantity, NAMES)  # type: ignore[arg-type]
        size = sum(after.widths.values()) if quantity == "units" else getattr(after.cost, quantity)(after.widths)
        assert size <= (np.floor(limit + 0.5) if quantity == "units" else limit + 1e-6)


@given(st.permutations(NAMES), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_smaller_budgets_contain_larger_ones(order: list[str], one: float, other: float) -> None:
    first, second = (plan(order, ratio) for ratio in sorted((min(one, 0.8), min(other, 0.8))))
    assert all(second[name] <= first[name] for name in NAMES)


def test_in_two_cuts_as_in_one() -> None:
    original = Size.of(STRUCTURE)
    scope, target = Scope("global", 0, normalize="none"), Target("units", 0.4)
    for order in itertools.islice(itertools.permutations(NAMES), 0, 720, 37):
        scores = scores_of(order)
        once = make_plan(STRUCTURE, scores, target, 1.0, scope, original)
        first = make_plan(STRUCTURE, scores, target, 0.5, scope, original)
        between = STRUCTURE.take(first.kept)
        left = {n: scores[n][list(first.kept.get(n, range(len(scores[n]))))] for n in between.widths}
        second = make_plan(between, left, target, 1.0, scope, original)
        assert between.take(second.kept).widths == STRUCTURE.take(once.kept).widths


def test_all_of_a_branch_may_be_asked_for() -> None:
    target = Target.of({"a": 1.0, "b": 0.5})
    feasible(STRUCTURE, target, Scope(min_width=0), ("a", "b"))
    made = make_plan(
        STRUCTURE, {name: torch.arange(float(STRUCTURE.widths[name])) for name in "ab"}, target, 1.0,
        Scope(min_width=0), Size.of(STRUCTURE),
    )  # fmt: skip
    assert made.widths == {"a": 0, "b": 2}


@pytest.mark.parametrize(
    ("name", "min_width", "words"),
    [("a", 1, "Scope.min_width=0."), ("stem", 0, "no other path"), ("b", 0, "others that are not selected")],
)
def test_all_of_what_cannot_vanish_is_refused(name: str, min_width: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"of 1 for '{name}' cannot be met: .*{words}"):
        feasible(STRUCTURE, Target.of({name: 1.0}), Scope(min_width=min_width), (name,))
