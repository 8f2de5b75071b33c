"""Wrong arguments are found by the constructor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch

import lightning_prune
from lightning_prune import L1, Contribution, LinearSchedule, OneShot, Ridge, Rollback, StructuredPruning
from lightning_prune.arguments import Settings, require_type
from lightning_prune.scoring import Criterion

if TYPE_CHECKING:
    from fractions import Fraction

PUBLIC = [getattr(lightning_prune, name) for name in lightning_prune.__all__]
#: What functions return, which nobody constructs.
RESULTS = {"SavedModel"}
SETTINGS = [
    kind
    for kind in PUBLIC
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__name__ not in RESULTS
]

WRONG: Mapping[str, tuple[object, ...]] = {
    "int": (1.5, math.nan, True, "a", [], None),
    "float": (math.nan, math.inf, True, "a", [], None),
    "int | float": (math.nan, math.inf, True, "3", [], None),
    "int | None": (1.5, True, "a"),
    "bool": ("no", 1, None),
    "str | None": (3, ["a"]),
    "Unit": ("epochs", "Step", None),
}

NEEDED: Mapping[str, Mapping[str, object]] = {
    "PrunedModel": {"model": torch.nn.Linear(1, 1)},
    "SklearnEstimator": {"estimator": "sklearn.tree.DecisionTreeClassifier"},
}

CASES = [
    pytest.param(kind, field.name, value, id=f"{kind.__name__}-{field.name}-{value!r}")
    for kind in SETTINGS
    for field in dataclasses.fields(kind)
    if field.init
    for value in WRONG.get(str(field.type), ())
]


def test_cases_reach_most_settings() -> None:
    assert len(SETTINGS) > 35
    assert len({case.values[0] for case in CASES}) > 20


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_are_checked(kind: type) -> None:
    """Those that are public settings have the base that checks; a class of its own would be forgotten."""
    assert issubclass(kind, Settings)


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_a_wrong_value_is_refused_at_once(kind: type, name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{kind.__name__}: expected `{name}`"):
        kind(**{**NEEDED.get(kind.__name__, {}), name: value})


def test_numbers_of_numpy_and_whole_numbers_for_floats_are_taken() -> None:
    assert Ridge(batches=np.int64(3)).batches == 3  # type: ignore[arg-type]
    assert Rollback(tolerance=np.float32(0.5)).tolerance == 0.5  # type: ignore[arg-type]
    assert Contribution(lambda_avg=1).lambda_avg == 1


@pytest.mark.parametrize(
    ("value", "hint", "text"),
    [
        (torch.tensor(1.0), float, "expected `x` to be a finite number, got tensor"),
        ("a", int | float | None, "a finite number or None, got 'a'"),
        (math.inf, float, "a finite number, got inf"),
        ("c", Literal["a", "b"], 'to be "a" or "b", got \'c\''),
        (None, Literal["a", "b", "c"], 'to be "a", "b" or "c", got None'),
        ("ab", list[str], "a list of a string, got 'ab'"),
        ([1], list[str], "a list of a string"),
        ([(1, 2, 3)], tuple[tuple[int, int], ...], r"a list of \(a whole number, a whole number\)"),
        ({1: 2}, dict[str, int], "a mapping of a string to a whole number"),
        ({"a": "b"}, Mapping[str, int], "a mapping of a string to a whole number"),
        (3, Callable[[int], int], "an instance of Callable"),
        (L1, Criterion, "an instance of Criterion"),
    ],
)
def test_texts(value: object, hint: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"owner: .*{text}"):
        require_type("owner", "x", value, hint)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ((1, 2), Sequence[int]), ([[1, 2]], tuple[tuple[int, int], ...]), ({"a": 1}, Mapping[str, float]),
        (len, Callable[..., int]), (L1(), Criterion), (object(), Any), (None, str | None), ("a", Literal["a"]),
    ],
)  # fmt: skip
def test_what_fits(value: object, hint: Any) -> None:
    require_type("owner", "x", value, hint)
    with pytest.raises(TypeError):
        require_type("owner", "x", value, bool)


def test_a_criterion_of_ones_own_is_checked_too() -> None:
    @dataclass(frozen=True)
    class Mine(Criterion):
        share: float = 0.5
        exact: Fraction | None = None  # its name is there for type checkers only, so it is not checked

        def score(self, group: Any, tensors: Any, statistic: Any) -> torch.Tensor:
            return torch.zeros(group.width)

    assert Mine(exact="anything").share == 0.5  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Mine: expected `share` to be a finite number, got 'half' \(str\)"):
        Mine(share="half")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dirpath": 3}, "expected `dirpath` to be a string or"),
        ({"reset_monitors": "no"}, "expected `reset_monitors` to be True or False, got 'no'"),
        ({"pruning_ratio": {0: 0.5}}, "expected `pruning_ratio` to be a share for each layer"),
        ({"pruning_ratio": True}, "expected"),
        ({"budget": {"params": "half"}, "pruning_ratio": None}, "expected"),
    ],
)
def test_arguments_of_callbacks(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        StructuredPruning(**{"pruning_ratio": 0.5, **arguments})


def test_a_schedule_says_what_it_wants() -> None:
    with pytest.raises(ValueError, match='LinearSchedule: expected `unit` to be "auto", "epoch" or "step"'):
        LinearSchedule(unit="epochs")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="OneShot: expected `at` to be a finite number, got None"):
        OneShot(None)  # type: ignore[arg-type]
