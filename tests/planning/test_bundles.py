"""Units that can only go together: plans of whole bundles against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.planning.plan import feasible, make_plan
from lightning_prune.planning.scope import Scope
from lightning_prune.planning.target import Target
from lightning_prune.structure import Size

widths_lists = st.lists(st.integers(1, 20), min_size=1, max_size=4)


def draw(structure, seed, levels=4):
    """Bundles of one to five units, and a score for each, many of them equal."""
    rng = np.random.default_rng(seed)
    bundles, scores = {}, {}
    for name, width in structure.widths.items():
        order = rng.permutation(width).tolist()
        bundles[name], scores[name] = [], np.empty(width)
        while order:
            units = [order.pop() for _ in range(min(len(order), rng.integers(1, 6)))]
            bundles[name].append(units)
            scores[name][units] = rng.integers(0, levels)
    return bundles, scores


def taken(plan, structure, name):
    return set(range(structure.widths[name])) - set(plan.kept.get(name, range(structure.widths[name])))


@given(widths_lists, st.integers(0, 10**6), st.integers(5, 99))
def test_a_global_budget_takes_the_lowest_bundles_and_no_more_than_it_needs(mlp, widths, seed, percent):
    structure = mlp(widths)
    bundles, scores = draw(structure, seed)
    original, scope, target = Size.of(structure), Scope("global", normalize="none"), Target("params", percent / 100)
    limit = percent * original.params / 100 + 1e-6
    # The order in which they go: by score, then by layer, then by first unit; the last of each layer stays.
    queue = []
    for number, (name, found) in enumerate(bundles.items()):
        ordered = sorted(found, key=lambda units: (scores[name][units[0]], min(units)))
        queue += [(scores[name][units[0]], number, place, name, units) for place, units in enumerate(ordered[:-1])]
    left, expected = dict(structure.widths), {name: set() for name in bundles}
    for *_, name, units in sorted(queue, key=lambda entry: entry[:3]):
        if structure.cost.params(left) <= limit:
            break
        left[name] -= len(units)
        expected[name] |= set(units)
    if structure.cost.params(left) > limit:
        for attempt in (
            lambda: make_plan(structure, scores, target, 1.0, scope, original, bundles),
            lambda: feasible(structure, target, scope, [*bundles], original, ordered_by_score(bundles, scores)),
        ):
            with pytest.raises(ValueError, match="cannot be reached"):
                attempt()
        return
    plan = make_plan(structure, scores, target, 1.0, scope, original, bundles)
    assert {name: taken(plan, structure, name) for name in bundles} == expected


def ordered_by_score(bundles, scores):
    return {
        name: sorted(found, key=lambda units: (scores[name][units[0]], min(units))) for name, found in bundles.items()
    }


@given(widths_lists, st.integers(0, 10**6), st.floats(0, 0.99))
def test_a_local_ratio_is_met_to_the_nearest_width(mlp, widths, seed, ratio):
    structure = mlp(widths)
    bundles, scores = draw(structure, seed)
    plan = make_plan(structure, scores, Target("units", 1 - ratio), 1.0, Scope(), Size.of(structure), bundles)
    for name, found in ordered_by_score(bundles, scores).items():
        width = structure.widths[name]
        allowed = [width - sum(map(len, found[:count])) for count in range(len(found))]
        wanted = width * (1 - ratio)
        gone = taken(plan, structure, name)
        assert abs(width - len(gone) - wanted) <= min(abs(w - wanted) for w in allowed) + 1e-6
        assert all(set(units) <= gone or gone.isdisjoint(units) for units in found)


def test_other_layers_go_unit_by_unit(mlp):
    structure = mlp([4, 4])
    scores = {"net.0": np.array([1.0, 2, 3, 4]), "net.2": np.array([0.0, 5, 5, 0])}
    plan = make_plan(
        structure, scores, Target("units", 5), 1.0, Scope("global", normalize="none"), Size.of(structure),
        {"net.2": [(0, 3), (1, 2)]},
    )  # fmt: skip
    assert plan.kept == {"net.0": (1, 2, 3), "net.2": (1, 2)}


def test_refuses_what_is_no_partition_and_widths_that_cannot_be_met(mlp):
    structure = mlp([4])
    arguments = (structure, {"net.0": np.arange(4.0)}, Target("units", 0.5), 1.0)
    with pytest.raises(ValueError, match=r"each of the 4 units of group 'net.0' in one bundle"):
        make_plan(*arguments, Scope(), Size.of(structure), {"net.0": [(0, 1), (1, 2)]})
    with pytest.raises(ValueError, match=r"`round_to` of 1 .* got 2 and 2 groups of 'net.0'"):
        make_plan(*arguments, Scope(round_to=2), Size.of(structure), {"net.0": [(0, 1), (2, 3)]})
