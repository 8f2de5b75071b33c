"""Groups and ranks in networks of the paper's forms, against one network without the group after the other."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.scoring import DataPass, KLDivergence, Misclassification, SPvR
from lightning_prune.structure import TracedModel, trace
from tests.scoring.spvr import reference
from tests.scoring.spvr.forms import FORMS, example

MEASURES = {SPvR: "prediction_change", KLDivergence: "kl_divergence", Misclassification: "misclassification"}


def entering(model, inputs, layer):
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model.eval()
    for x in inputs:
        model(x)
    model.train()
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("d", [1, 2, 4, 32])
@pytest.mark.parametrize("kind", MEASURES)
@pytest.mark.parametrize("name", FORMS)
def test_groups_and_ranks_equal_plain_loops(name, kind, d):
    model, inputs, structure = example(name)
    statistic = kind(group_size=d).statistic(structure)
    statistic.collect(model, DataPass(inputs))
    assert statistic.bundles.keys() == FORMS[name][1].keys() == structure.widths.keys()
    for group, layers in FORMS[name][1].items():
        width = structure.widths[group]
        matrices = [reference.correlations(reference.pooled(entering(model, inputs, layer), width)) for layer in layers]
        groups = reference.groups_of(np.mean(matrices, 0), d)
        assert statistic.bundles[group] == groups
        expected = reference.ranking(model, inputs, layers, width, groups, MEASURES[kind])
        found = [float(statistic.value(group)[list(units)].unique()) for units in groups]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        order = [sorted(range(len(groups)), key=lambda i, of=of: (round(of[i], 9), i)) for of in (found, expected)]
        assert order[0] == order[1]


@pytest.mark.parametrize(("outputs", "kind"), [(1, "binary"), (3, "multilabel")])
def test_binary_and_multi_label_networks(outputs, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, outputs)).double()
    x = torch.randn(20, 5, dtype=torch.float64)
    labels = (model(x) > 0).long()
    structure = trace(TracedModel.of(model, x))
    statistic = SPvR(group_size=2).statistic(structure)
    statistic.collect(model, DataPass([(x, labels)]))
    groups = statistic.bundles["0"]
    expected = reference.ranking(model, [x], ["2"], 9, groups, kind=kind)
    found = [float(statistic.value("0")[list(units)].unique()) for units in groups]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_what_cannot_be_masked_whole_is_not_scored():
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
    structure = trace(TracedModel.of(model, x))
    statistic = SPvR().statistic(structure)
    statistic.collect(model, DataPass(x))
    assert [*structure.widths] == ["first", "second"]
    assert [*statistic.bundles] == ["second"]
    with pytest.raises(RuntimeError, match="'first' cannot be scored"):
        statistic.value("first")


@pytest.mark.parametrize("setting", [{"group_size": 0}, {"samples_per_class": 0}])
@pytest.mark.parametrize("kind", MEASURES)
def test_refuses_numbers_below_one(kind, setting):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: expected `{next(iter(setting))}` to be at least 1, got 0"):
        kind(**setting)
