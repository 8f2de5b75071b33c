"""Which units of a group go, by how much a surrogate uses them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune import inspect
from lightning_prune.planning import Amount, dividing_threshold, plan_by_use, widths_at
from lightning_prune.scoring.xgb import Usage
from lightning_prune.structure import Size

NUMBERS = np.array([0.0, 0.1, 0.4, 0.0, 0.2, 0.3])
USE = Usage(NUMBERS, NUMBERS[::-1])


@pytest.mark.parametrize(
    ("rule", "value", "kept"),
    [
        ("threshold", 0.0, [1, 2, 4, 5]),
        ("threshold", 0.2, [2, 5]),
        ("threshold", 0.5, []),
        ("quantile", 0.5, [2, 4, 5]),
        ("quantile", 0.0, [1, 2, 4, 5]),
        ("gain", 1.0, [0, 1, 3, 4]),
        ("gain", 0.7, [0, 3]),
        ("gain", 0.71, [0, 1, 3]),
        ("pruning_ratio", 0.5, [2, 4, 5]),
        ("pruning_ratio", 0.75, [2, 5]),
        ("pruning_ratio", 0.99, [2]),
        ("pruning_ratio", 0.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_by_hand(rule: Any, value: float, kept: list[int]) -> None:
    assert list(Amount(rule, value).kept(USE)) == kept


shares = st.lists(st.floats(0, 1), min_size=1, max_size=12).map(np.array)


@given(shares, st.floats(0.01, 1))
def test_the_fewest_units_that_hold_the_gain(values: np.ndarray, gain: float) -> None:
    kept = list(Amount("gain", gain).kept(Usage(values, values)))
    if values.sum() == 0:
        assert kept == []
        return
    held = np.sort(values)[::-1]
    assert values[kept].sum() >= gain * values.sum() - 1e-9
    assert held[: len(kept) - 1].sum() < gain * values.sum() + 1e-9
    assert values[kept].min() > 0


@given(shares, st.floats(0, 0.9), st.floats(0, 0.9))
def test_more_goes_by_a_higher_amount(values: np.ndarray, one: float, other: float) -> None:
    low, high = sorted((one, other))
    use = Usage(values, values)
    for rule in ("threshold", "quantile", "pruning_ratio"):
        assert set(Amount(rule, high).kept(use)) <= set(Amount(rule, low).kept(use))  # type: ignore[arg-type]
    assert set(Amount("gain", 1 - high).kept(use)) <= set(Amount("gain", 1 - low).kept(use))


def network() -> tuple[Any, Any]:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    structure = inspect(net, torch.zeros(1, 4)).structure
    return structure, Size.of(structure)


def test_plan() -> None:
    structure, original = network()
    plan, emptied = plan_by_use(structure, {"0": USE, "2": USE}, Amount("threshold", 0.2), original)
    assert plan.kept == {"0": (2, 5), "2": (2, 5)}
    assert emptied == ()
    plan, emptied = plan_by_use(structure, {"0": USE, "2": USE}, Amount("threshold", 0.9), original)
    assert plan.kept == {"0": (2,), "2": (2,)}
    assert emptied == ("0", "2")
    plan, _ = plan_by_use(structure, {"0": USE}, Amount("pruning_ratio", 0.0), original)
    assert plan.is_empty


def test_budget() -> None:
    """Units go by their importance, wherever they are."""
    structure, original = network()
    low = Usage(NUMBERS / 10, NUMBERS)
    plan, _ = plan_by_use(structure, {"0": low, "2": USE}, Amount("budget", {"units": 0.5}), original)
    assert plan.kept == {"0": (2, 5), "2": (1, 2, 4, 5)}
    with pytest.raises(ValueError, match="budget"):
        Amount("budget", {"units": 0.5}).kept(USE)


def test_exactly_one() -> None:
    assert Amount.of() == Amount("gain", 0.99)
    assert Amount.of(quantile=0.3) == Amount("quantile", 0.3)
    assert Amount.of(threshold=0) == Amount("threshold", 0)
    assert Amount.of(budget={"params": 0.5}) == Amount("budget", {"params": 0.5})
    with pytest.raises(ValueError, match=r"expected one of `threshold`, .*got gain=0\.9, pruning_ratio=0\.5"):
        Amount.of(gain=0.9, pruning_ratio=0.5)


@pytest.mark.parametrize(
    ("rule", "value", "error"),
    [
        ("threshold", 1.0, ValueError),
        ("threshold", -0.1, ValueError),
        ("quantile", 1.0, ValueError),
        ("gain", 0.0, ValueError),
        ("gain", 1.1, ValueError),
        ("pruning_ratio", 1.0, ValueError),
        ("gain", True, TypeError),
        ("gain", "0.9", TypeError),
        ("budget", {"params": 2.0}, ValueError),
        ("budget", {"macs": 0.5, "latency_ms": 2}, ValueError),
        ("share", 0.5, ValueError),
    ],
)
def test_out_of_range(rule: Any, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        Amount(rule, value)


@given(shares, st.floats(0, 0.9), st.floats(0.01, 1))
def test_the_threshold_that_divides(values: np.ndarray, ratio: float, gain: float) -> None:
    """Applied as a threshold it keeps the same units, if importances differ; none where the order is another."""
    use = Usage(values, values[::-1])
    kept = Amount("pruning_ratio", ratio).kept(use)
    found = dividing_threshold(use, kept)
    assert (found is None) == (len(kept) == len(values))
    if found is not None and len(set(values.tolist())) == len(values) and found < 1:
        assert Amount("threshold", found).kept(use) == kept
    kept = Amount("gain", gain).kept(use)
    found, gone = dividing_threshold(use, kept), np.setdiff1d(np.arange(len(values)), kept)
    if found is None:
        assert not len(gone) or values[list(kept)].min() < values[gone].max()


def test_widths_at_a_threshold_are_those_of_its_plan() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    structure = inspect(model, torch.zeros(2, 4)).structure
    first, second = (group.name for group in structure.groups)
    use = {first: USE}
    for threshold in (0.0, 0.2, 0.35, 0.9):
        plan, _ = plan_by_use(structure, use, Amount("threshold", threshold), Size.of(structure))
        assert widths_at(structure, use, threshold) == structure.take(plan.kept).widths
    assert widths_at(structure, use, 0.9) == {first: 1, second: 5}
