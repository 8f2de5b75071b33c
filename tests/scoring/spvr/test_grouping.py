"""Algorithm 1 on matrices made by hand, and against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.scoring.spvr import correlation, group_units
from tests.scoring.spvr import reference


def groups(rows, d):
    return group_units(torch.tensor(rows, dtype=torch.float64), d)


def test_each_unit_takes_what_correlates_most_with_it():
    rows = [
        [1.0, 0.1, 0.9, -0.8, 0.2],
        [0.1, 1.0, 0.3, 0.7, 0.6],
        [0.9, 0.3, 1.0, 0.0, 0.0],
        [-0.8, 0.7, 0.0, 1.0, 0.5],
        [0.2, 0.6, 0.0, 0.5, 1.0],
    ]
    assert groups(rows, 2) == [(0, 2), (1, 3), (4,)]  # the last one is smaller
    assert groups(rows, 3) == [(0, 2, 4), (1, 3)]
    assert groups(rows, 1) == [(0,), (1,), (2,), (3,), (4,)]


def test_signed_correlations_keep_opposites_apart():
    rows = [[1.0, -0.99, 0.01], [-0.99, 1.0, -0.5], [0.01, -0.5, 1.0]]
    assert groups(rows, 2) == [(0, 2), (1,)]


def test_a_unit_taken_before_is_not_taken_again():
    rows = [[1.0, 0.9, 0.0, 0.0], [0.9, 1.0, 0.8, 0.0], [0.0, 0.8, 1.0, -0.2], [0.0, 0.0, -0.2, 1.0]]
    assert groups(rows, 2) == [(0, 1), (2, 3)]  # 2 correlates most with 1, which is gone


def test_ties_go_to_the_lower_index():
    rows = [[1.0, 0.5, 0.5, 0.5], [0.5, 1.0, 0.5, 0.5], [0.5, 0.5, 1.0, 0.5], [0.5, 0.5, 0.5, 1.0]]
    assert groups(rows, 3) == [(0, 1, 2), (3,)]


def test_a_layer_narrower_than_a_group_is_one_group():
    assert groups([[1.0, -1.0], [-1.0, 1.0]], 8) == [(0, 1)]
    assert groups([[0.0]], 4) == [(0,)]


def test_a_dead_unit_is_in_its_own_group():
    """Its correlations are 0, the one with itself included, and others lie above it."""
    features = torch.tensor([[0.1, 0.1, 1.0, 5.0], [0.1, 0.2, 2.0, 3.0], [0.1, 0.3, 3.1, 1.0]], dtype=torch.float64)
    c = correlation(features)
    assert (c[0] == 0).all()
    assert (c[:, 0] == 0).all()
    assert group_units(c, 2) == [(0, 1), (2, 3)]
    assert group_units(c.flip(0, 1), 2) == [(0, 3), (1, 2)]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, -1e30, 1 / 3])
@pytest.mark.parametrize("n", [1, 3, 1000])
def test_a_constant_column_correlates_with_nothing(value, n):
    torch.manual_seed(0)
    features = torch.randn(n, 3, dtype=torch.float64)
    features[:, 1] = value
    c = correlation(features)
    assert (c[1] == 0).all()
    assert (c[:, 1] == 0).all()
    if n > 1:
        assert c[0, 0] == c[2, 2] == 1


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 14), st.integers(0, 2**16), st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_plain_loops(d, samples, width, seed, coarse):
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(samples, width)).clip(-0.5)
    if coarse:  # ties and constant columns
        features = features.round(0)
    expected = reference.correlations(features)
    found = correlation(torch.from_numpy(features))
    np.testing.assert_allclose(found, expected, atol=2e-9)
    formed = group_units(torch.from_numpy(expected), d)
    assert formed == reference.groups_of(expected, d)
    assert sorted(unit for group in formed for unit in group) == list(range(width))
    assert [len(group) for group in formed[:-1]] == [d] * (len(formed) - 1)


def test_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"shape \(samples, units\), got \(2, 3, 4\)"):
        correlation(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="got \\(0, 3\\)"):
        correlation(torch.zeros(0, 3))
    with pytest.raises(FloatingPointError, match="finite"):
        correlation(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        group_units(torch.eye(2), 0)
