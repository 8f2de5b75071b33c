"""Races: the plan of the full ranking, for less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune.scoring import DataPass
from lightning_prune.scoring.spvr.racing import Race, rank_by_race
from lightning_prune.scoring.spvr.walk_ranking import RankingOptions, rank
from lightning_prune.structure import TracedModel, trace
from tests.scoring.spvr.forms import FORMS, example
from tests.scoring.spvr.test_walked import sites

OPTIONS = RankingOptions(group_size=2)


def least(count):
    """A plan that takes the bundles with the lowest scores, equal ones by site and position."""

    def decides(bundles, scores):
        keyed = sorted(
            (float(score), number, i, name)
            for number, name in enumerate(bundles)
            for i, score in enumerate(scores[name])
        )
        found = {name: torch.zeros(len(bundles[name]), dtype=torch.bool) for name in bundles}
        for _, _, i, name in keyed[:count]:
            found[name][i] = True
        return found

    return decides


def setting(name, n=60):
    model, inputs, structure = example(name, n)
    data = DataPass(inputs)
    return model, data, sites(model, structure, data)[0]


FULL = {}


def full(name):
    if name not in FULL:
        model, data, places = setting(name)
        FULL[name] = model, data, places, rank(model, data, places, OPTIONS)
    return FULL[name]


@given(st.sampled_from([*FORMS]), st.floats(0, 1))
@settings(deadline=None, max_examples=12)
def test_an_exact_race_decides_as_the_full_ranking(name, share):
    """Whatever the plan takes: the same bundles, with complete scores; the others are not below them."""
    model, data, places, whole = full(name)
    count = round(share * sum(map(len, whole.bundles.values())))
    decides = least(count)
    ranking = rank_by_race(model, data, places, OPTIONS, Race("exact", decides, samples=1))
    assert ranking.bundles == whole.bundles
    taken, expected = (decides(found.bundles, found.scores) for found in (ranking, whole))
    for site in places:
        assert torch.equal(taken[site], expected[site])
        assert ranking.complete[site][taken[site]].all()
        complete = ranking.complete[site]
        torch.testing.assert_close(ranking.scores[site][complete], whole.scores[site][complete], rtol=1e-9, atol=1e-9)
        assert (ranking.scores[site] <= whole.scores[site] + 1e-9).all()
    assert ranking.macs_naive == whole.macs_naive


def test_races_cost_less():
    """Where little goes, most groups are decided early; a statistical race decides those that go early too."""
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(12, 12), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(12, 3)).double()
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 1.4)
    x = torch.randn(100, 12, dtype=torch.float64)
    structure, data = trace(TracedModel.of(model, x)), DataPass(x)
    places, _ = sites(model, structure, data)
    options = RankingOptions(group_size=1)
    whole = rank(model, data, places, options)
    exact = rank_by_race(model, data, places, options, Race("exact", least(10), samples=10))
    statistical = rank_by_race(model, data, places, options, Race("statistical", least(10), samples=10))
    assert exact.macs < 0.8 * whole.macs
    assert statistical.macs < exact.macs
    assert not all(found.all() for found in exact.complete.values())
    taken, expected = (least(10)(found.bundles, found.scores) for found in (exact, whole))
    assert all(torch.equal(taken[site], expected[site]) for site in places)


def test_what_lacks_in_the_end_is_completed():
    """The last samples alone show what a group is for: it has stayed until then, or gone, by what was expected."""
    model, data, places, whole = full("resnet")
    counts = iter([1] * 25 + [6] * 1000)  # the plan takes more than it seemed while samples were looked at
    race = Race("exact", lambda bundles, scores: least(next(counts))(bundles, scores), samples=1)
    ranking = rank_by_race(model, data, places, OPTIONS, race)
    taken, expected = (least(6)(found.bundles, found.scores) for found in (ranking, whole))
    for site in places:
        assert torch.equal(taken[site], expected[site])
        assert ranking.complete[site][taken[site]].all()


@pytest.mark.parametrize("kind", ["exact", "statistical"])
def test_a_race_that_was_killed_goes_on(tmp_path, kind):
    model, data, places, _ = full("segnet")
    race = Race(kind, least(3), "least 3", samples=1)
    whole, seen = rank_by_race(model, data, places, OPTIONS, race), []

    def stop(text, decided, total):
        seen.append((text, decided, total))
        if len(seen) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rank_by_race(model, data, places, OPTIONS, race, folder=tmp_path, progress=stop)
    assert seen[19][0].startswith("40 of 60")
    again = rank_by_race(model, data, places, OPTIONS, race, folder=tmp_path)
    assert again.macs < whole.macs
    for site in places:
        assert torch.equal(again.scores[site], whole.scores[site])
        assert torch.equal(again.complete[site], whole.complete[site])
    other = rank_by_race(model, data, places, OPTIONS, Race(kind, least(1), "least 1", samples=1), folder=tmp_path)
    assert not all(torch.equal(other.complete[site], whole.complete[site]) for site in places)
