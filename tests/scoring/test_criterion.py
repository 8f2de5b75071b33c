"""Settings that are refused, scores that are refused, and what a unit's weights are."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.scoring import (
    CHIP,
    L1,
    LAMP,
    SNIP,
    APoZ,
    BNScale,
    Contribution,
    Criterion,
    Fisher,
    HRank,
    Random,
    Taylor,
    score_groups,
    unit_rows,
    unit_weights,
)
from lightning_prune.structure import Group, Member
from tests.scoring.networks import batches, network, structure_of, tensors_of, train


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_avg": -1.0}, r"`lambda_avg` to be at least 0, got -1.0"),
        ({"lambda_max": math.nan}, r"`lambda_max` to be a finite number, got nan"),
        ({"lambda_max": math.inf}, r"`lambda_max` to be a finite number, got inf"),
        ({"lambda_avg": 0, "lambda_max": 0}, r"above 0, got 0 for both.*criterion Random"),
        ({"ratio": "relative"}, r"`ratio` to be \"absolute\" or \"signed\", got 'relative'"),
        ({"every_n_batches": 0}, r"`every_n_batches` to be 1 \(every batch\) or more, got 0"),
        ({"epsilon": 0.0}, r"`epsilon` above 0, got 0.0"),
        ({"lambda_max": 1.0, "positions": 0}, r"`positions` to be at least 1, .* got 0 and lambda_max=1.0"),
        ({"positions": 64}, r"`positions` .* beside a `lambda_max` above 0, got 64 and lambda_max=0.0"),
    ],
)
def test_contribution_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Contribution(**settings)


@pytest.mark.parametrize("kind", [Taylor, SNIP, Fisher, APoZ, HRank])
def test_observing_every_zeroth_batch_is_refused(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: expected `every_n_batches` to be 1 .* got 0"):
        kind(every_n_batches=0)


@pytest.mark.parametrize("kind", [CHIP, HRank])
def test_one_sample_is_looked_at_at_least(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}: expected `samples` to be at least 1, got 0"):
        kind(samples=0)


@pytest.mark.parametrize("criterion", [Contribution(), Taylor()])
def test_does_not_score_unobserved_units(criterion):
    group = structure_of("mlp").groups[0]
    with pytest.raises(ValueError, match=f"{type(criterion).__name__}: expected the statistic that"):
        criterion.score(group, {}, None)


def test_scales_of_norms_add_up_and_slopes_are_none():
    index = np.arange(3)[:, None]
    names = ("a.weight", "one.weight", "one.bias", "two.weight", "two.bias", "prelu.weight", "a.bias")
    group = Group("a", 3, tuple(Member(n, 0, "out" if n == "a.weight" else "along", index) for n in names))
    tensors = {name: torch.randn(3, 2) if name == "a.weight" else torch.randn(3) for name in names}
    expected = tensors["one.weight"].abs() + tensors["two.weight"].abs()
    torch.testing.assert_close(BNScale().score(group, tensors, None), expected)
    unnormalised = Group("a", 3, tuple(m for m in group.members if m.layer in ("a", "prelu")))
    torch.testing.assert_close(BNScale().score(unnormalised, tensors, None), tensors["a.weight"].norm(dim=1))


def test_lamp_scores_equal_units_alike_and_the_largest_with_one():
    group = Group("a", 4, (Member("a.weight", 0, "out", np.arange(4)[:, None]),))
    score = LAMP().score(group, {"a.weight": torch.tensor([[1.0], [2.0], [0.0], [1.0]])}, None)
    assert score.tolist() == pytest.approx([1 / 6, 1, 0, 1 / 6])
    assert LAMP().score(group, {"a.weight": torch.zeros(4, 1)}, None).tolist() == [0] * 4


def test_lambdas_weigh_terms_of_equal_size():
    """Each term has mean 1, so that a mixture's mean is the sum of its weights."""
    model, structure = network("cnn"), structure_of("cnn")
    statistic = Contribution(lambda_avg=0.25, lambda_max=0.5).statistic(structure)
    train(model, batches("cnn"), statistic)
    for name in structure.widths:
        assert float(statistic.value(name).mean()) == pytest.approx(0.75)


class Returns(Criterion):
    """A criterion whose result is given."""

    def __init__(self, score):
        self.given = score

    def score(self, group, tensors, statistic):
        return self.given


def test_scores_are_checked_and_put_into_one_form():
    groups, tensors = structure_of("mlp").groups, tensors_of(network("mlp").float())
    scores = score_groups(L1(), groups, tensors, None)
    assert list(scores) == ["0", "2"]
    assert {score.dtype for score in scores.values()} == {torch.float64}
    with pytest.raises(ValueError, match=r"each of the 5 units of group '0', got a tensor of shape \(4,\)"):
        score_groups(Returns(torch.zeros(4)), groups, tensors, None)
    with pytest.raises(FloatingPointError, match="got 2 of 5 in group '0' that are NaN or infinite"):
        score_groups(Returns(torch.tensor([0, math.nan, 1, math.inf, 2])), groups, tensors, None)


def test_random_draws_anew_at_another_width_name_or_seed_and_only_then():
    def draw(name="a", width=6, seed=0):
        return Random(seed).score(Group(name, width, ()), {}, None)

    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(2)
    assert torch.equal(draw(), first)
    # the same on every machine, for ever: resuming must repeat it
    np.testing.assert_allclose(first[:2], [0.8298808528824592, 0.9153309664557175], rtol=1e-12)
    for other in (draw("b"), draw(seed=1), draw(width=7)[:6]):
        assert not torch.equal(other, first)


def test_rows_of_units_hold_all_their_places_in_at_least_single_precision():
    tensor = torch.arange(24.0).reshape(2, 6, 2).to(torch.bfloat16)
    rows = unit_rows(tensor, Member("x", 1, "in", np.array([[0, 3], [1, 4], [2, 5]])))
    assert rows.dtype == torch.float32
    assert sorted(rows[1].tolist()) == [2, 3, 8, 9, 14, 15, 20, 21]


def test_units_that_nothing_produces_are_judged_by_what_takes_them():
    index = np.arange(3)[:, None]
    taken = Group("bare", 3, (Member("shift", 0, "along", index), Member("taker.weight", 1, "in", index)))
    weight = nn.Linear(3, 2).weight.detach()
    assert torch.equal(unit_weights(taken, {"shift": torch.ones(3), "taker.weight": weight}), weight.T)
    bare = Group("bare", 3, (Member("shift", 0, "along", index),))
    with pytest.raises(ValueError, match=r"group 'bare': expected a weight.*got only shift\. Exclude"):
        unit_weights(bare, {"shift": torch.ones(3)})
