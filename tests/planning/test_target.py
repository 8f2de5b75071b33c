"""What is to remain, and every way to say it wrongly."""

import pickle
from dataclasses import replace

import pytest

from lightning_prune.planning.target import CombinedTarget, NoEffectWarning, Target
from lightning_prune.structure import Size

ORIGINAL = Size(params=1000, macs=5000, widths={"a": 30, "b": 10, "c": 60})


def test_the_two_ways_to_say_it():
    assert Target.of(pruning_ratio=0.25) == Target("units", 0.75)
    assert Target.of(budget={"params": 0.6}) == Target.of(budget=0.6) == Target("params", 0.6)
    assert Target.of(budget={"macs": 4000}) == Target("macs", 4000)
    assert Target.of(budget=700) == Target("params", 700)
    target = Target.of(budget={"macs": 4000})
    assert eval(repr(target)) == target
    assert pickle.loads(pickle.dumps(target)) == target


def test_fraction_of_the_dense_network():
    assert Target("params", 0.6).fraction(ORIGINAL, ["a"]) == 0.6
    assert Target("params", 600).fraction(ORIGINAL, ["a"]) == 0.6
    assert Target("macs", 1000).fraction(ORIGINAL, ["a"]) == 0.2
    assert Target("units", 10).fraction(ORIGINAL, ["a", "b"]) == 0.25
    assert Target("params", 1000).fraction(ORIGINAL, []) == 1


@pytest.mark.parametrize("given", [{"pruning_ratio": 0}, {"pruning_ratio": 0.0}, {"budget": 1.0}])
def test_nothing_to_remove_warns(given):
    with pytest.warns(NoEffectWarning, match="nothing will be pruned"):
        assert Target.of(**given).remaining == 1


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "exactly one of `pruning_ratio` .* and `budget` .*, got none"),
        ({"pruning_ratio": 0.5, "budget": 0.5}, ValueError, "got both: pruning_ratio=0.5, budget=0.5"),
        ({"pruning_ratio": 1.5}, ValueError, r"in \[0, 1\), got 1.5$"),
        ({"pruning_ratio": 1}, ValueError, r"in \[0, 1\), got 1$"),
        ({"pruning_ratio": -0.1}, ValueError, r"in \[0, 1\), got -0.1$"),
        ({"pruning_ratio": float("nan")}, ValueError, r"in \[0, 1\), got nan$"),
        ({"pruning_ratio": 50}, ValueError, r"got 50 \(did you mean 0.5\?\)"),
        ({"pruning_ratio": "0.5"}, TypeError, "a number in .*, got '0.5'"),
        ({"pruning_ratio": True}, TypeError, "got True"),
        ({"budget": 60.0}, ValueError, r"got 60.0 \(did you mean 0.6\?\). A count must be an int"),
        ({"budget": {"params": 0.0}}, ValueError, r"in \(0, 1\], the share of the params that remains, got 0.0"),
        ({"budget": {"macs": 0}}, ValueError, r"at least 1 \(an int counts macs\), got 0"),
        ({"budget": {"flops": 0.5}}, ValueError, """"macs", "memory", "latency", "latency_ms", got 'flops'"""),
        ({"budget": {"macs": 0.5, "flops": 0.5}}, ValueError, "got 'flops'"),
        ({"budget": {"macs": 0.5, "units": {"a": 0.5}}}, ValueError, "one number per quantity"),
        ({"budget": {}}, ValueError, 'at least one of "units", .*, got {}'),
        ({"budget": {"latency": 2.5}}, ValueError, r'Milliseconds are given as {"latency_ms": 2.5}\.$'),
        ({"budget": {"latency_ms": 0.0}}, ValueError, "more than 0 milliseconds, got 0.0"),
        ({"budget": {"latency_ms": float("inf")}}, ValueError, "more than 0 milliseconds, got inf"),
        ({"budget": {"latency_ms": "3"}}, TypeError, "a number of milliseconds, got '3'"),
        ({"budget": {"latency_ms": True}}, TypeError, "a number of milliseconds, got True"),
        ({"budget": "60%"}, TypeError, "a share .* or a count .*, got '60%'"),
        ({"budget": True}, TypeError, "got True"),
    ],
)
def test_misuse(given, error, message):
    with pytest.raises(error, match=message):
        Target.of(**given)


def test_milliseconds_are_an_amount_whole_or_not():
    original = replace(ORIGINAL, table_latency=4.0)
    for given in (1, 1.0):
        target = Target.of(budget={"latency_ms": given})
        assert target.fraction(original, ["a"]) == 0.25
        assert target.amounts(original, ["a"]) == (("latency_ms", 1.0),)
        assert target.uses_latency
    assert Target.of(budget={"latency": 1}).fraction(original, ["a"]) == 0.25
    with pytest.raises(
        ValueError, match=r'"latency_ms": 4.5} .*: it has 4 milliseconds .* a share as {"latency": 0.6}'
    ):
        Target.of(budget={"latency_ms": 4.5}).fraction(original, ["a"])


def test_of_several_budgets_each_has_its_limit():
    original = replace(ORIGINAL, table_latency=4.0)
    target = Target.of(budget={"macs": 0.5, "latency_ms": 1, "params": 2000})
    assert isinstance(target, CombinedTarget)
    assert eval(repr(target)) == target
    assert target.uses_latency
    assert [limit.quantity for limit in target.limits] == ["macs", "latency_ms", "params"]
    assert target.amounts(original, ["a"]) == (("macs", 2500), ("latency_ms", 1.0), ("params", 1000))
    assert target.amounts(original, ["a"], 0.5) == (("macs", 3750), ("latency_ms", 2.5), ("params", 1000))
    assert target.fraction(original, ["a"]) == 0.25, "of the one that is furthest away"
    assert target.resolve(None, ("a",)) == (target, ("a",))
    with pytest.warns(NoEffectWarning, match="nothing will be pruned"):
        Target.of(budget={"macs": 1.0, "params": 1.0})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("params", 1001), "larger than the network: it has 1000 params"),
        (Target("macs", 10**6), "larger than the network: it has 5000 macs"),
        (Target("units", 41), "larger than the network: its prunable groups have 40 units"),
    ],
)
def test_budget_larger_than_the_network(target, message):
    with pytest.raises(ValueError, match=message):
        target.fraction(ORIGINAL, ["a", "b"])


def test_ratios_per_layer(mlp):
    structure = mlp([30, 10, 60])
    target = Target.of(pruning_ratio={"net.2": 0.5, "net.*": 0.2})
    resolved, selected = target.resolve(structure, tuple(structure.widths))
    assert resolved.remaining == {"net.0": 0.8, "net.2": 0.5, "net.4": 0.8}
    assert selected == ("net.0", "net.2", "net.4")
    assert resolved.fraction(Size.of(structure), selected) == pytest.approx((24 + 5 + 48) / 100)
    # What is not named stays, and so does what may not be pruned.
    assert Target.of(pruning_ratio={"net.2": 0.5}).resolve(structure, ("net.0", "net.2"))[1] == ("net.2",)
    assert target.resolve(structure, ("net.0",))[0].remaining == {"net.0": 0.8}
    assert Target("units", 0.5).resolve(structure, ("net.0",)) == (Target("units", 0.5), ("net.0",))


def test_a_ratio_per_layer_finds_a_group_by_any_layer_that_produces_it(resnet_like):
    target = Target.of(pruning_ratio={"layer1.1.conv2": 0.25, "layer2": 0.5})
    resolved, _ = target.resolve(resnet_like, tuple(resnet_like.widths))
    assert resolved.remaining == {
        "layer1.0.conv2": 0.75,
        "layer2.0.conv1": 0.5,
        "layer2.1.conv1": 0.5,
        "layer2.0.conv2": 0.5,
    }


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({}, "expected `pruning_ratio` to name layers, got {}"),
        ({"net.0": 1.5}, r"`pruning_ratio` of 'net.0' .* in \[0, 1\], got 1.5"),
        ({"net.0": 30}, r"got 30 \(did you mean 0.3\?\)"),
        ({"net.1": 0.5}, "pruning_ratio='net.1' matches no layer. Did you mean net"),
        ({"net.4": 0.5}, "expected layers that can be pruned. What .*: net.4 because it is an output"),
        ({"net.*": 0.5, "net.2": 0.1}, r"'net.2' has no effect: .* net.2 \('net.\*'\)"),
        ({"net.2": 0.5}, "names net.2, which `layers` and `ignore` exclude. They leave net.0"),
    ],
)
def test_misuse_of_ratios_per_layer(mlp, ratios, message):
    structure = mlp([4, 4])
    with pytest.raises(ValueError, match=message):
        Target.of(pruning_ratio=ratios).resolve(structure, ("net.0",))


def test_shares_per_layer_are_shares_of_units():
    with pytest.raises(ValueError, match="shares per layer of units, got shares of macs"):
        Target("macs", {"a": 0.5})
    with pytest.warns(NoEffectWarning, match="nothing will be pruned"):
        Target.of(pruning_ratio={"a": 0.0})
