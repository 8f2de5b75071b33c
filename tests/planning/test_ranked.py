"""Budgets met by whole groups, with layers that vanish."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.planning.ranked import by_stage, in_order, plan_ranked
from lightning_prune.structure.bypass import Bypass, Bypasses


def chain_of(structure):
    """Every hidden layer of an MLP but the first can go."""
    names = [*structure.widths]
    after = [*names[1:], f"net.{2 * len(names)}"]
    return Bypasses(
        {
            name: Bypass(before, 1, (name,), {behind: 1})
            for before, name, behind in zip(names, names[1:], after[1:], strict=False)
        },
        {},
    )


def params_of(widths, inputs=7, outputs=3):
    """Weights and biases of an MLP; a layer without units is not there."""
    sizes = [inputs, *(width for width in widths if width), outputs]
    return sum((a + 1) * b for a, b in itertools.pairwise(sizes))


def draw(structure, seed, size):
    rng = np.random.default_rng(seed)
    bundles, scores = {}, {}
    for name, width in structure.widths.items():
        order = rng.permutation(width).tolist()
        bundles[name] = [order[i : i + size] for i in range(0, width, size)]
        scores[name] = [float(rng.integers(0, 5)) for _ in bundles[name]]
    return bundles, scores


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 99)
)
@settings(deadline=None)
def test_the_least_go_until_the_budget_holds(mlp, widths, seed, size, percent):
    structure = mlp(widths)
    bundles, scores = draw(structure, seed, size)
    limit = params_of(widths) * percent // 100
    queue = sorted(
        (score, number, min(units), name, units)
        for number, (name, found) in enumerate(bundles.items())
        for units, score in zip(found, scores[name], strict=True)
    )
    left = {name: set(range(width)) for name, width in structure.widths.items()}
    sizes = [params_of(widths)]
    for *_, name, units in queue:
        if sizes[-1] <= limit:
            break
        if name == "net.0" and left[name] == set(units):
            continue  # what reads the input stays
        left[name] -= set(units)
        sizes.append(params_of([len(units) for units in left.values()]))
    removals = [step.removal for step in in_order(bundles, scores)]
    if sizes[-1] > limit:
        with pytest.raises(ValueError, match=f"smallest network that is left has {sizes[-1]}"):
            plan_ranked(structure, removals, limit, chain_of(structure))
        return
    plan = plan_ranked(structure, removals, limit, chain_of(structure))
    assert plan.params == sizes[-1] <= limit
    assert plan.params_before == (sizes[-2] if len(sizes) > 1 else sizes[0])
    assert set(plan.bypassed) == {name for name, units in left.items() if not units}
    assert {name: plan.kept.get(name, tuple(range(structure.widths[name]))) for name in left if left[name]} == {
        name: tuple(sorted(units)) for name, units in left.items() if units
    }


def test_nothing_vanishes_without_a_way_around_it(mlp):
    structure = mlp([4, 4])
    bundles = {"net.0": [(0, 1), (2, 3)], "net.2": [(0, 1), (2, 3)]}
    removals = [step.removal for step in in_order(bundles, {"net.0": [3.0, 4.0], "net.2": [1.0, 2.0]})]
    plan = plan_ranked(structure, removals, params_of([2, 2]))
    assert (plan.kept, plan.bypassed) == ({"net.0": (2, 3), "net.2": (2, 3)}, ())
    assert plan.stays == {"net.2": "it would leave no path through it"}
    with pytest.raises(
        ValueError, match=r"budget of 20 params .* has 31\. What stays: .*net.2: it would leave no path"
    ):
        plan_ranked(structure, removals, 20)


def test_several_layers_can_lose_units_at_once(mlp):
    structure = mlp([4, 4])
    plan = plan_ranked(structure, [{"net.0": (0, 1), "net.2": (2, 3)}], params_of([2, 2]))
    assert plan.kept == {"net.0": (2, 3), "net.2": (0, 1)}


def test_every_layer_of_a_stage_loses_as_many(resnet_like):
    """The least of whichever layer is next takes the least of all others along."""
    stages = {"layer1.0.conv2": ("layer1.0.conv1", "layer1.1.conv1")}
    layers = ["layer1.0.conv1", "layer1.1.conv1", "layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv1"]
    bundles = {layer: [range(0, 8), range(8, 16)] for layer in layers}
    bundles["layer2.0.conv1"] = [range(0, 16), range(16, 32)]
    scores = {
        "layer1.0.conv1": [5.0, 9.0],
        "layer1.1.conv1": [8.0, 7.0],
        "layer1.0.conv2": [6.0, 3.0],
        "layer1.1.conv2": [4.0, 2.0],
        "layer2.0.conv1": [2.5, 3.5],
    }
    steps = by_stage(resnet_like, stages, bundles, scores)
    found = [{name: (min(units), len(units)) for name, units in step.removal.items()} for step in steps]
    assert found == [  # 2.0 is the least; of every group the last units are named
        {"layer1.0.conv2": (8, 8), "layer1.0.conv1": (8, 8), "layer1.1.conv1": (8, 8)},
        {"layer2.0.conv1": (16, 16)},
        {"layer2.0.conv1": (0, 16)},
        {"layer1.0.conv2": (0, 8), "layer1.0.conv1": (0, 8), "layer1.1.conv1": (0, 8)},
    ]
    assert [step.decisive for step in steps] == [
        (("layer1.1.conv2", 1),),
        (("layer2.0.conv1", 0),),
        (("layer2.0.conv1", 0), ("layer2.0.conv1", 1)),
        (("layer1.1.conv2", 1), ("layer1.1.conv2", 0)),
    ]


def test_a_layer_with_more_bundles_loses_more_at_once(resnet_like):
    stages = {"layer1.0.conv2": ("layer1.0.conv1",)}
    bundles = {"layer1.0.conv1": [[i, i + 1] for i in range(0, 16, 2)], "layer1.0.conv2": [range(0, 8), range(8, 16)]}
    scores = {"layer1.0.conv1": [float(i) for i in range(8)], "layer1.0.conv2": [1.0, 2.0]}
    steps = by_stage(resnet_like, stages, bundles, scores)
    assert [{name: sorted(units) for name, units in step.removal.items()} for step in steps] == [
        {"layer1.0.conv2": [*range(8, 16)], "layer1.0.conv1": [*range(8, 16)]},
        {"layer1.0.conv2": [*range(0, 8)], "layer1.0.conv1": [*range(0, 8)]},
    ]


def test_what_cannot_go_whole_does_not_go_at_all(mlp):
    structure = mlp([4, 4])
    removals = [{"net.0": (0, 1)}, {"net.0": (2, 3), "net.2": (0, 1)}, {"net.2": (2, 3)}]
    plan = plan_ranked(structure, removals, params_of([2, 2]))
    assert plan.kept == {"net.0": (2, 3), "net.2": (0, 1)}
