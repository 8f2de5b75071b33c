"""Which units stay: properties over random networks and scores, and a slow, plain reference."""

import itertools
import math
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.planning.plan import Plan, feasible, make_plan
from lightning_prune.planning.scope import Scope
from lightning_prune.planning.target import Target
from lightning_prune.structure import Size

widths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=5)
ratios = st.floats(0, 0.99)
seeds = st.integers(0, 10**6)
quantities = st.sampled_from(["units", "params", "macs", "memory", "latency"])
kinds = st.sampled_from(["local", "global", "erk", "random"])


def draw_scores(structure, seed, levels=None):
    """Random scores; with ``levels`` that many multiples of 0.1, so that ties abound and sums are not exact."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.random(width) if levels is None else 0.1 * rng.integers(0, levels, width)
        for name, width in structure.widths.items()
    }


def size(structure, widths, quantity):
    everything = structure.widths | widths
    if quantity == "units":
        return sum(everything.values())
    return getattr(structure.cost, quantity)(everything)


def reachable(structure, target, scope):
    try:
        feasible(structure, target, scope, structure.widths)
    except ValueError:
        return False
    return True


@given(widths_lists, seeds, ratios, st.sampled_from([1, 3, 8]), st.integers(1, 10))
def test_local_ratio_is_each_layers_share_to_the_nearest_unit(mlp, widths, seed, ratio, round_to, min_width):
    structure = mlp(widths)
    scores = draw_scores(structure, seed)
    scope = Scope("local", min_width, round_to)
    plan = make_plan(structure, scores, Target("units", 1 - ratio), 1.0, scope, Size.of(structure))
    for name, width in structure.widths.items():
        kept = plan.kept.get(name, tuple(range(width)))
        wanted = width * (1 - ratio)
        allowed = [w for w in range(1, width + 1) if w == width or (w % round_to == 0 and w >= min_width)]
        best = min(abs(w - wanted) for w in allowed)
        assert len(kept) in allowed
        # a width of its own that is no multiple of a block stays only where no multiple is nearer to what was wanted
        assert abs(len(kept) - wanted) <= max(best, round_to / 2) + 1e-6
        assert list(kept) == sorted(kept)
        lowest_kept = min(scores[name][list(kept)])
        assert all(scores[name][u] <= lowest_kept for u in set(range(width)) - set(kept))


@pytest.mark.parametrize(
    ("width", "ratio", "expected"),
    [(5, 0.5, 3), (50, 0.3, 35), (10, 0.1, 9), (4, 0.1, 4), (3, 0.99, 1), (50, 0.32, 34), (15, 0.9, 2)],
)
def test_local_examples(mlp, width, ratio, expected):
    structure = mlp([width])
    scores = {"net.0": np.arange(width)}
    plan = make_plan(structure, scores, Target("units", 1 - ratio), 1.0, Scope(), Size.of(structure))
    assert (structure.widths | plan.widths)["net.0"] == expected


@given(widths_lists, seeds, ratios, quantities, kinds, st.sampled_from([1, 4]), st.integers(1, 3))
def test_budget_is_met_within_one_unit_or_block(mlp, widths, seed, ratio, quantity, kind, round_to, min_width):
    structure = mlp(widths)
    original = Size.of(structure)
    total = original.amount(quantity, widths_names := list(structure.widths))
    target = Target(quantity, max(1, round(total * (1 - ratio))))
    scope = Scope(kind, min_width, round_to)
    scores = draw_scores(structure, seed, levels=5)
    if not reachable(structure, target, scope):
        with pytest.raises(ValueError, match="cannot be reached"):
            make_plan(structure, scores, target, 1.0, scope, original)
        return
    plan = make_plan(structure, scores, target, 1.0, scope, original)
    after = size(structure, plan.widths, quantity)
    assert after <= target.remaining
    if not plan.is_empty:
        # giving one block back to some group must exceed the budget
        larger = []
        for name in plan.widths:
            allowed_widths = scope.allowed_widths(structure.widths[name], scope.round_to)
            wider = allowed_widths[allowed_widths.index(plan.widths[name]) - 1]
            larger.append(size(structure, plan.widths | {name: wider}, quantity))
        assert max(larger) > target.remaining
    assert all(plan.widths.get(name, min_width) >= min(min_width, structure.widths[name]) for name in widths_names)
    assert all(plan.kept.values())


@given(widths_lists, seeds, ratios, ratios, kinds)
def test_of_several_budgets_the_plan_is_that_of_the_tightest(mlp, widths, seed, one, other, kind):
    structure = mlp(widths)
    original, scores, scope = Size.of(structure), draw_scores(structure, seed), Scope(kind)
    targets = [Target("params", 1 - one), Target("latency_ms", (1 - other) * original.table_latency)]
    both = Target.of(budget={target.quantity: target.remaining for target in targets})
    if not all(reachable(structure, target, scope) for target in targets):
        with pytest.raises(ValueError, match="cannot be reached"):
            feasible(structure, both, scope, structure.widths)
        with pytest.raises(ValueError, match="cannot be reached"):
            make_plan(structure, scores, both, 1.0, scope, original)
        return
    plans = [make_plan(structure, scores, target, 1.0, scope, original) for target in (*targets, both)]
    removed = [sum(structure.widths.values()) - sum((structure.widths | plan.widths).values()) for plan in plans]
    assert plans[2] == plans[removed.index(max(removed[:2]))]


def test_a_budget_of_units_among_several_is_of_all_layers(mlp):
    structure = mlp([8, 8])
    target = Target.of(budget={"units": 0.5, "params": 0.9})
    plan = make_plan(structure, draw_scores(structure, 0), target, 1.0, Scope(), Size.of(structure))
    assert plan.widths == {"net.0": 4, "net.2": 4}


def test_milliseconds_that_cannot_be_reached_name_the_smallest(mlp):
    structure = mlp([8])
    smallest = structure.cost.latency({"net.0": 1})
    message = rf"budget of 0.001 milliseconds of latency cannot be reached: .*, {smallest:.6g} milliseconds of latency"
    with pytest.raises(ValueError, match=message):
        feasible(structure, Target.of(budget={"macs": 0.9, "latency_ms": 1e-3}), Scope(), ["net.0"])


@given(
    *(widths_lists, seeds, ratios, st.integers(1, 3), st.sampled_from(["none", "mean"])),
    st.sampled_from([None, "params", "macs"]),
)
def test_global_equals_a_naive_reference(mlp, widths, seed, ratio, min_width, normalize, per):
    structure = mlp(widths)
    scores = draw_scores(structure, seed, levels=4)
    target, scope = Target("params", 1 - ratio), Scope("global", min_width, normalize=normalize, per=per)
    if not reachable(structure, target, scope):
        return
    plan = make_plan(structure, scores, target, 1.0, scope, Size.of(structure))

    kept = {name: list(range(width)) for name, width in structure.widths.items()}
    scale = {n: (np.abs(s).mean() or 1.0) if normalize == "mean" else 1.0 for n, s in scores.items()}
    if per is not None:  # linear in the width of one layer
        scale = {
            n: factor * (size(structure, {n: widths + 1}, per) - size(structure, {n: widths}, per))
            for (n, factor), widths in zip(scale.items(), structure.widths.values(), strict=True)
        }
    order = sorted(
        (round(scores[name][unit] / scale[name], 14), place, unit, name)
        for place, (name, width) in enumerate(structure.widths.items())
        for unit in range(width)
    )
    for _, _, unit, name in order:
        if size(structure, {n: len(k) for n, k in kept.items()}, "params") <= (1 - ratio) * structure.cost.params(
            structure.widths
        ) * (1 + 1e-9):
            break
        if len(kept[name]) > min_width:
            kept[name].remove(unit)
    assert {n: tuple(k) for n, k in kept.items() if len(k) < structure.widths[n]} == plan.kept


def erk_densities(structure, widths, seed):
    return Scope("erk"), [(i + o) / (i * o) for i, o in itertools.pairwise([7, *widths])]


def random_densities(structure, widths, seed):
    draws = (np.random.default_rng([zlib.crc32(name.encode()), seed]).random() for name in structure.widths)
    return Scope("random", seed=seed), [1 - draw for draw in draws]


@given(widths_lists, seeds, ratios, st.sampled_from([erk_densities, random_densities]))
def test_erk_and_random_keep_what_the_densities_say(mlp, widths, seed, ratio, densities):
    """Layer l keeps min(1, ε · density) of its units, with the largest ε that meets the budget."""
    structure = mlp(widths)
    scope, raw = densities(structure, widths, seed)
    target = Target("units", 1 - ratio)
    if not reachable(structure, target, scope):
        return
    plan = make_plan(structure, draw_scores(structure, seed), target, 1.0, scope, Size.of(structure))
    found = list((structure.widths | plan.widths).values())
    limit = math.floor(sum(widths) * (1 - ratio) + 0.5 + 1e-9)

    def kept(epsilon):
        return [max(1, math.floor(w * min(1.0, epsilon * r) + 0.5)) for w, r in zip(widths, raw, strict=True)]

    low, high = 0.0, 2 / min(raw)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(kept(middle)) <= limit else (low, middle)
    # Several layers may step down at the same ε; the plan takes of these steps only as many as it needs.
    assert all(a <= b <= c for a, b, c in zip(kept(low), found, kept(high * (1 + 1e-9)), strict=True))
    assert sum(found) == limit or sum(kept(high * (1 + 1e-9))) > limit


def test_another_seed_draws_another_allocation(mlp):
    structure = mlp([40, 40, 40])
    target, scores, scope = Target("units", 0.5), draw_scores(structure, 0), Scope("random", draws=20)
    plans = [make_plan(structure, scores, target, 1.0, one, Size.of(structure)) for one in scope.drawn]
    assert len({tuple(plan.widths.items()) for plan in plans}) == 20
    assert plans[0] == make_plan(structure, scores, target, 1.0, scope, Size.of(structure))
    assert plans[3] == make_plan(structure, scores, target, 1.0, Scope("random", seed=3), Size.of(structure))


@given(widths_lists, seeds, ratios, ratios, quantities, kinds, st.sampled_from([1, 4]))
def test_plans_nest_as_the_ratio_grows(mlp, widths, seed, a, b, quantity, kind, round_to):
    structure = mlp(widths)
    scores = draw_scores(structure, seed, levels=6)
    scope = Scope(kind, round_to=round_to)
    less, more = sorted((a, b))
    if not reachable(structure, Target(quantity, 1 - more), scope):
        return
    small, large = (
        make_plan(structure, scores, Target(quantity, 1 - r), 1.0, scope, Size.of(structure)) for r in (less, more)
    )
    for name, width in structure.widths.items():
        everything = range(width)
        assert set(large.kept.get(name, everything)) <= set(small.kept.get(name, everything))


@given(widths_lists, seeds, ratios, quantities)
def test_local_plans_do_not_change_under_monotone_transforms(mlp, widths, seed, ratio, quantity):
    structure = mlp(widths)
    scores = draw_scores(structure, seed)
    target = Target(quantity, 1 - ratio)
    if not reachable(structure, target, Scope()):
        return
    transformed = {name: 1000 * np.exp(3 * values) - 7 for name, values in scores.items()}
    plans = [make_plan(structure, s, target, 1.0, Scope(), Size.of(structure)) for s in (scores, transformed)]
    assert plans[0] == plans[1]


@given(widths_lists, seeds, ratios, quantities, kinds)
def test_same_plan_from_any_order_or_container(mlp, widths, seed, ratio, quantity, kind):
    structure = mlp(widths)
    scores = draw_scores(structure, seed, levels=3)
    target, scope = Target(quantity, 1 - ratio), Scope(kind)
    if not reachable(structure, target, scope):
        return
    backwards = {name: torch.tensor(scores[name], requires_grad=True) for name in reversed(scores)}
    plans = [make_plan(structure, s, target, 1.0, scope, Size.of(structure)) for s in (scores, backwards)]
    assert plans[0] == plans[1]
    assert plans[0].to_plain() == plans[1].to_plain()


@pytest.mark.parametrize("kind", ["local", "global"])
def test_ties_go_by_index(mlp, kind):
    structure = mlp([4, 4])
    scores = {"net.2": np.ones(4), "net.0": np.ones(4)}
    plan = make_plan(structure, scores, Target("units", 0.5), 1.0, Scope(kind), Size.of(structure))
    expected = {"net.0": (2, 3), "net.2": (2, 3)} if kind == "local" else {"net.0": (3,), "net.2": (1, 2, 3)}
    assert plan.kept == expected


@given(widths_lists, seeds, ratios, quantities, kinds, st.sampled_from([1, 4]), st.lists(st.floats(0, 1), max_size=3))
def test_cuts_add_up_to_one_cut(mlp, widths, seed, ratio, quantity, kind, round_to, shares):
    """However many cuts lead there, the same units are left, because amounts are relative to the dense network."""
    structure = dense = mlp(widths)
    original = Size.of(dense)
    # raw scores: a mean over the units of a group changes when some are gone
    scope = Scope(kind, round_to=round_to, normalize="none")
    target = Target(quantity, 1 - ratio)
    scores = draw_scores(structure, seed)
    if not reachable(structure, target, scope):
        return
    if round_to > 1 and kind == "global":
        return  # blocks are counted from the present width, so their means differ
    alive = {name: np.arange(width) for name, width in structure.widths.items()}
    for share in [*sorted(shares), 1.0]:
        present = {name: scores[name][alive[name]] for name in alive}
        plan = make_plan(structure, present, target, share, scope, original)
        structure = structure.take(plan.kept)
        alive |= {name: alive[name][list(kept)] for name, kept in plan.kept.items()}
        again = {name: scores[name][alive[name]] for name in alive}
        assert make_plan(structure, again, target, share, scope, original).is_empty
    once = make_plan(dense, scores, target, 1.0, scope, original)
    assert {n: tuple(a.tolist()) for n, a in alive.items() if len(a) < dense.widths[n]} == once.kept


def test_blocks_of_equal_scores_go_one_after_the_other(mlp):
    structure = mlp([17])
    scores = {"net.0": np.full(17, 0.1)}  # the mean of eight of them is a bit below 0.1
    scope = Scope("global", round_to=8, normalize="none")
    plan = make_plan(structure, scores, Target("units", 16), 1.0, scope, Size.of(structure))
    assert plan.kept == {"net.0": tuple(range(1, 17))}


def test_a_cut_is_counted_in_present_positions_and_dense_shares(mlp):
    dense = mlp([10])
    original = Size.of(dense)
    target = Target("units", 0.5)
    first = make_plan(dense, {"net.0": np.arange(10)[::-1]}, target, 0.4, Scope(), original)
    assert first.kept["net.0"] == tuple(range(8))
    second = make_plan(dense.take(first.kept), {"net.0": np.arange(8)}, target, 1.0, Scope(), original)
    assert second.kept["net.0"] == (3, 4, 5, 6, 7)


def test_only_scored_groups_shrink(mlp):
    structure = mlp([10, 10])
    plan = make_plan(
        structure, {"net.2": np.arange(10)}, Target("units", 0.5), 1.0, Scope("global"), Size.of(structure)
    )
    assert plan.widths == {"net.2": 5}


def test_normalizing_spares_layers_whose_sums_have_few_terms(mlp):
    structure = mlp([10, 10])
    scores = {"net.0": np.linspace(100, 200, 10), "net.2": np.linspace(1, 2, 10)}
    target, original = Target("units", 0.5), Size.of(structure)
    raw = make_plan(structure, scores, target, 1.0, Scope("global", normalize="none"), original)
    assert raw.widths == {"net.0": 9, "net.2": 1}
    assert make_plan(structure, scores, target, 1.0, Scope("global"), original).widths == {"net.0": 5, "net.2": 5}
    signed = {name: values - values.mean() for name, values in scores.items()}
    plan = make_plan(structure, signed, target, 1.0, Scope("global"), original)
    assert all(set(kept) <= {5, 6, 7, 8, 9} for kept in plan.kept.values())  # the sign of the mean turns nothing around
    negative = {name: -values[::-1] for name, values in scores.items()}
    assert make_plan(structure, negative, target, 1.0, Scope("global"), original).widths == {"net.0": 5, "net.2": 5}
    dead = make_plan(structure, {**scores, "net.0": np.zeros(10)}, target, 1.0, Scope("global"), original)
    assert dead.widths["net.0"] == 1


def test_coupled_groups_meet_macs(resnet_like):
    rng = np.random.default_rng(0)
    scores = {group.name: rng.random(group.width) for group in resnet_like.groups}
    original = Size.of(resnet_like)
    for kind, fraction in itertools.product(("local", "global"), (0.9, 0.5, 0.2)):
        plan = make_plan(resnet_like, scores, Target("macs", fraction), 1.0, Scope(kind), original)
        left = size(resnet_like, plan.widths, "macs") / original.macs
        assert fraction - 0.05 < left <= fraction


def test_feasible(mlp):
    structure = mlp([10, 20], inputs=4, outputs=2)
    smallest = structure.cost.params({"net.0": 3, "net.2": 3})
    scope = Scope(min_width=3)
    assert feasible(structure, Target("params", 0.9), scope, ["net.0", "net.2"]) == smallest
    assert feasible(structure, Target("params", smallest), scope, ["net.0", "net.2"]) == smallest
    with pytest.raises(
        ValueError, match=rf"budget of {smallest - 1} params .*min_width=3.* {smallest} params are left"
    ):
        feasible(structure, Target("params", smallest - 1), scope, ["net.0", "net.2"])
    with pytest.raises(ValueError, match="cannot be reached"):
        feasible(structure, Target("macs", 0.2), scope, ["net.2"])
    with pytest.raises(ValueError, match="larger than the network: it has"):
        feasible(structure, Target("params", 10**6), scope, ["net.2"])
    assert feasible(structure, Target("units", 0.05), scope, ["net.0", "net.2"]) == 6  # min_width wins over a ratio
    narrow = structure.take({"net.0": [0, 1, 2], "net.2": [0, 1, 2]})
    assert feasible(narrow, Target("params", 0.9), scope, ["net.0"], Size.of(structure)) == smallest


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, r"at least one group \(net.0\), got none"),
        ({"net.9": np.ones(4)}, r"scores of groups \(net.0\), got some of net.9"),
        ({"net.0": np.ones(3)}, r"4 scores for group 'net.0', got shape \(3,\)"),
        ({"net.0": np.ones((4, 1))}, r"got shape \(4, 1\)"),
        ({"net.0": np.array([1, np.nan, 2, np.inf])}, r"got NaN or infinity for 2 of its units \(\[1, 3\]\)"),
    ],
)
def test_bad_scores(mlp, scores, message):
    structure = mlp([4])
    with pytest.raises(ValueError, match=message):
        make_plan(structure, scores, Target("units", 0.5), 1.0, Scope(), Size.of(structure))


def test_bad_share(mlp):
    structure = mlp([4])
    with pytest.raises(ValueError, match=r"`share` in \[0, 1\], got 1.1"):
        make_plan(structure, {"net.0": np.ones(4)}, Target("units", 0.5), 1.1, Scope(), Size.of(structure))


def test_plan_is_a_printable_storable_value(mlp):
    plan = Plan({"net.0": (0, 2), "net.2": (1,)}, {"net.0": 5, "net.2": 2})
    assert str(plan) == "net.0 5→2, net.2 2→1"
    assert str(Plan({}, {})) == "nothing to remove"
    assert Plan({}, {}).is_empty
    assert Plan.from_plain(plan.to_plain()) == plan == eval(repr(plan))
    assert plan.widths == mlp([5, 2]).take(plan.kept).widths


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((1, 0), "ascending units below 3"),
        ((1, 1), "ascending units"),
        ((0, 3), "ascending units below 3"),
        ((-1, 0), "ascending units"),
    ],
)
def test_bad_plans(kept, message):
    with pytest.raises(ValueError, match=message):
        Plan({"a": kept}, {"a": 3})
    with pytest.raises(ValueError, match="same groups"):
        Plan({"a": (0,)}, {"b": 3})


def test_a_large_network_is_planned_within_a_second(mlp):
    structure = mlp([2048] * 8 + [512] * 20)  # 26,000 units, as ResNet-50
    scores = draw_scores(structure, 0)
    original = Size.of(structure)
    for kind, quantity in itertools.product(("local", "global"), ("params", "macs")):
        start = time.perf_counter()
        plan = make_plan(structure, scores, Target(quantity, 0.5), 1.0, Scope(kind), original)
        assert time.perf_counter() - start < 1
        left = size(structure, plan.widths, quantity) / original.amount(quantity, [])
        assert math.isclose(left, 0.5, rel_tol=1e-3)


@given(widths_lists, seeds, st.lists(ratios, min_size=5, max_size=5), st.floats(0, 1))
def test_ratios_per_layer_are_the_plans_of_each_layer_alone(mlp, widths, seed, each, share):
    structure = mlp(widths)
    scores, original = draw_scores(structure, seed), Size.of(structure)
    wanted = dict(zip(structure.widths, each, strict=False))
    target, selected = Target.of(pruning_ratio=wanted | {"net.0": 0.3}).resolve(structure, [*wanted])
    assert selected == tuple(wanted)
    plan = make_plan(structure, scores, target, share, Scope(), original)
    alone = {}
    for name, ratio in (wanted | {"net.0": 0.3}).items():
        single = Target("units", 1 - ratio)
        alone |= make_plan(structure, {name: scores[name]}, single, share, Scope(), original).kept
    assert plan.kept == alone


def test_ratios_per_layer_need_a_local_scope(mlp):
    structure = mlp([4, 4])
    target, selected = Target.of(pruning_ratio={"net.0": 0.5}).resolve(structure, ["net.0"])
    assert feasible(structure, target, Scope(), selected) == 1
    with pytest.raises(ValueError, match=r"with a scope of 'global', got one per layer \(net.0\)"):
        feasible(structure, target, Scope("global"), selected)
    for kind in ("global", "erk", "random"):
        with pytest.raises(ValueError, match=f"with a scope of '{kind}'"):
            make_plan(structure, {"net.0": np.ones(4)}, target, 1.0, Scope(kind), Size.of(structure))


def test_of_two_equal_units_the_more_expensive_one_goes(mlp):
    """A budget of parameters is met with fewer units gone."""
    structure = mlp([30, 8, 30])
    scores = {name: np.ones(width) for name, width in structure.widths.items()}
    target, original = Target("params", 0.75), Size.of(structure)
    plain = make_plan(structure, scores, target, 1.0, Scope("global"), original)
    priced = make_plan(structure, scores, target, 1.0, Scope("global", per="params"), original)
    first, second, _ = structure.widths
    assert plain.kept.keys() == {first}  # ties in the order of execution
    assert priced.kept.keys() == {second}  # each of its units has 30 weights on both sides
    assert size(structure, priced.widths, "units") > size(structure, plain.widths, "units")


def plans_of(width):
    return st.sets(st.integers(0, width - 1), min_size=1, max_size=width - 1).map(lambda units: tuple(sorted(units)))


@given(
    widths=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    data=st.data(),
)
def test_agreement_is_the_lower_jaccard_index_of_what_stays_and_what_goes(widths, data):
    """Counted unit by unit, over the groups that one of the plans narrows."""
    plans = []
    for _ in range(2):
        kept = {f"{i}": data.draw(plans_of(width)) for i, width in enumerate(widths) if data.draw(st.booleans())}
        plans.append(Plan(kept, {name: widths[int(name)] for name in kept}))
    indices = []
    for i, width in enumerate(widths):
        stays = [[unit in plan.kept.get(f"{i}", range(width)) for unit in range(width)] for plan in plans]
        if all(stays[0]) and all(stays[1]):
            continue
        both = sum(a and b for a, b in zip(*stays, strict=True))
        neither = sum(not a and not b for a, b in zip(*stays, strict=True))
        indices.append(min(both / (width - neither), neither / (width - both)))
    expected = sum(indices) / len(indices) if indices else 1.0
    assert plans[0].agreement(plans[1]) == pytest.approx(expected)
    assert plans[1].agreement(plans[0]) == plans[0].agreement(plans[1])
    assert plans[0].agreement(plans[0]) == 1


def test_agreement_with_one_unit_swapped_in_resnet_20():
    """Nine groups lose half of their units; one of 32 has another one instead."""
    before = {f"{i}": width for i, width in enumerate([16] * 3 + [32] * 3 + [64] * 3)}
    kept = {name: tuple(range(width // 2)) for name, width in before.items()}
    other = Plan(kept | {"4": (*range(15), 20)}, before)
    assert Plan(kept, before).agreement(other) == pytest.approx(0.987, abs=5e-4)


def test_agreement_of_random_plans_is_low_at_any_amount():
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        count = round(share * 200)
        plans = [
            Plan({"a": tuple(sorted(rng.choice(200, 200 - count, replace=False).tolist()))}, {"a": 200})
            for _ in range(2)
        ]
        assert plans[0].agreement(plans[1]) < 0.45


def test_agreement_where_a_group_vanishes():
    gone, left = Plan({"a": ()}, {"a": 4}), Plan({"a": (0,)}, {"a": 4})
    assert gone.agreement(gone) == 1
    assert gone.agreement(left) == 0  # nothing stays, or unit 0
    assert Plan({}, {}).agreement(Plan({}, {})) == 1


def test_agreement_of_plans_for_other_networks_is_refused():
    with pytest.raises(ValueError, match="expected plans for the same widths"):
        Plan({"a": (0,)}, {"a": 4}).agreement(Plan({"a": (0,)}, {"a": 3}))
