"""Values around a prior, and grids that grow by one side."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.study.axes import Axis, points, sides


def test_log_steps_are_powers_of_ten() -> None:
    axis = Axis("optimizer.lr", 0.1, step=0.5, points=5)
    assert [axis.value(steps) for steps in range(-2, 3)] == [0.01, 0.0316228, 0.1, 0.316228, 1.0]
    assert (axis.reach, axis.name) == ((-2, 2), "lr")
    assert axis.position(0.01) == -2


def test_linear_steps_may_pass_zero() -> None:
    axis = Axis("model.dropout", 0.0, step=0.25, points=3, scale="linear")
    assert [axis.value(steps) for steps in (-1, 0, 1)] == [-0.25, 0.0, 0.25]
    assert axis.position(0.25) == 0.25


@given(st.floats(1e-6, 1e3), st.sampled_from([0.1, 0.2, 0.4, 0.5, 1.0]), st.integers(-12, 12))
def test_the_point_of_a_value_is_found_again(prior: float, step: float, steps: int) -> None:
    axis = Axis("lr", prior, step)
    assert round((axis.position(axis.value(steps)) - axis.position(prior)) / step) == steps


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"prior": 0.1, "points": 1}, "odd number of `points` of at least 3"),
        ({"prior": 0.1, "points": 4}, "odd number of `points`"),
        ({"prior": 0.0}, "above 0 on a log scale"),
        ({"prior": float("nan"), "scale": "linear"}, "finite `prior`"),
        ({"prior": 0.1, "step": 0.0}, "`step` above 0"),
        ({"prior": 0.1, "scale": "cubic"}, '"log" or "linear"'),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Axis("lr", **settings)  # type: ignore[arg-type]


def test_points_and_sides() -> None:
    extent = ((-1, 1), (0, 1))
    assert len(list(points(extent))) == 6
    assert dict(sides(extent, most=3)) == {(1, 0): ((-1, 1), (-1, 1)), (1, 1): ((-1, 1), (0, 2))}
    assert not list(sides(extent, most=2))
