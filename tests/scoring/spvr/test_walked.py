"""The ranking by a walk: equal to the plain one, and cheaper."""

import pytest
import torch
from torch import nn

from lightning_prune.models import ResNetCIFAR
from lightning_prune.scoring import DataPass, KLDivergence, Misclassification, SPvR, stations_of
from lightning_prune.scoring.spvr.sites import sites_of_groups, sites_of_layers
from lightning_prune.scoring.spvr.walk_ranking import RankingOptions, rank
from lightning_prune.structure import TracedModel, trace
from tests.scoring.spvr import reference
from tests.scoring.spvr.forms import FORMS, example

KINDS = {"prediction_change": SPvR, "kl_divergence": KLDivergence, "misclassification": Misclassification}


def sites(model, structure, data, point="input"):
    stations = stations_of(model, next(iter(data)), point=point)
    found = sites_of_groups(model, structure.groups, stations) if point == "input" else None
    return found or sites_of_layers(structure.groups, stations)


@pytest.mark.parametrize("measure", KINDS)
@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("name", FORMS)
def test_equals_plain_masked_forwards(name, d, measure):
    model, inputs, structure = example(name)
    data = DataPass(inputs)
    plain = KINDS[measure](group_size=d).statistic(structure)
    plain.collect(model, list(data))
    places, refused = sites(model, structure, data)
    assert not refused
    for fast in (False, True):
        ranking = rank(model, data, places, RankingOptions(measure, d, fast=fast))
        assert ranking.bundles == plain.bundles
        for group in structure.widths:
            torch.testing.assert_close(ranking.unit_scores(group), plain.value(group), rtol=1e-9, atol=1e-11)
            order = [
                sorted(range(len(found)), key=lambda i, found=found: (round(float(found[i]), 9), i))
                for found in (ranking.unit_scores(group), plain.value(group))
            ]
            assert order[0] == order[1]
    assert ranking.samples == 12


def test_layers_are_ranked_behind_their_norm_and_before_the_sum():
    """Of one stream that three layers produce, each alone."""
    model, inputs, structure = example("resnet")
    data = DataPass(inputs)
    places, refused = sites(model, structure, data, "activation")
    assert not refused
    assert [*places] == ["stem.0", "last.0.0", "first.0", "project.0", "last.1.0", "second.0"]
    ranking = rank(model, data, places, RankingOptions(group_size=2))
    # Zero scale and shift of the norm are a zero behind it, where nothing comes in between.
    norms = {"last.0.0": "last.0.1", "project.0": "project.1", "last.1.0": "last.1.1"}
    whole = reference.probabilities(model.eval(), inputs)
    for layer, norm in norms.items():
        for units, score in zip(ranking.bundles[layer], ranking.scores[layer], strict=True):
            twin = example("resnet")[0].eval()
            twin.load_state_dict(model.state_dict())
            with torch.no_grad():
                for tensor in (twin.get_submodule(norm).weight, twin.get_submodule(norm).bias):
                    tensor[list(units)] = 0
            expected = reference.importance(whole, reference.probabilities(twin, inputs))
            assert float(score) == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_it_costs_less_than_a_forward_pass_for_each_group():
    torch.manual_seed(0)
    model = ResNetCIFAR(14).double().eval()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    structure = trace(TracedModel.of(model, x))
    data = DataPass([(x, torch.arange(4))])
    places, _ = sites(model, structure, data)
    plain = rank(model, data, places, RankingOptions(group_size=8, plain=True, fast=False))
    cached = rank(model, data, places, RankingOptions(group_size=8, fast=False))
    fast = rank(model, data, places, RankingOptions(group_size=8))
    assert plain.macs >= plain.macs_naive
    assert plain.macs_naive == cached.macs_naive == fast.macs_naive
    assert cached.macs < plain.macs_naive / 1.4
    assert fast.macs < cached.macs
    for name in places:
        torch.testing.assert_close(fast.scores[name], plain.scores[name], rtol=1e-8, atol=1e-9)
        assert torch.equal(cached.scores[name], plain.scores[name])


def test_samples_whose_masked_units_are_all_zero_are_skipped():
    """Their term is exactly 0; half of the samples have nothing in the first half of the units."""
    model = nn.Sequential(nn.Linear(2, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1]]).repeat_interleave(4, 0))
    x = torch.tensor([[1.0, -1], [-1, 1]], dtype=torch.float64).repeat(8, 1)
    structure, data = trace(TracedModel.of(model, x)), DataPass(x)
    places, _ = sites(model, structure, data)
    fast = rank(model, data, places, RankingOptions(group_size=4))
    slow = rank(model, data, places, RankingOptions(group_size=4, fast=False))
    assert fast.bundles["0"] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    torch.testing.assert_close(fast.scores, slow.scores)
    assert fast.macs < slow.macs


def test_a_killed_ranking_goes_on(tmp_path):
    model, inputs, structure = example("vgg")
    data = DataPass(inputs)
    places, _ = sites(model, structure, data)
    whole, seen = rank(model, data, places, RankingOptions(group_size=2)), []

    def stop(name, done, total):
        seen.append((name, done, total))
        if len(seen) == 2:
            raise KeyboardInterrupt

    options = RankingOptions(group_size=2)
    with pytest.raises(KeyboardInterrupt):
        rank(model, data, places, options, folder=tmp_path, progress=stop)
    count = sum(map(len, whole.bundles.values()))
    assert [entry[2] for entry in seen] == [count, count]
    again = rank(model, data, places, options, folder=tmp_path)
    assert again.macs < whole.macs
    for name in places:
        assert torch.equal(again.scores[name], whole.scores[name])
    # Other weights, samples or options are another ranking.
    other = rank(model, data, places, RankingOptions("kl_divergence", 2), folder=tmp_path)
    assert not torch.equal(other.scores["0"], whole.scores["0"])


def test_units_that_cannot_be_masked_are_refused():
    class Used(nn.Module):
        """One layer is called, of the other the weight is taken."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)
            self.called, self.taken, self.last = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(5, 3)

        def forward(self, x):
            x = self.first(x).relu()
            return self.called(x) + x @ self.taken.weight.T + self.last(self.second(x).relu())

    model, x = Used(), torch.randn(4, 4)
    found, refused = sites(model, trace(TracedModel.of(model, x)), DataPass(x))
    assert [*found] == ["second"]
    assert refused == {"first": "its units enter taken, which is no plain layer that is called"}
