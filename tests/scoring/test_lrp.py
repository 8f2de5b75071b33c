"""Relevance beside Captum's, and where networks branch."""

import numpy as np
import pytest
import torch
from captum.attr import LayerLRP
from torch import nn

from lightning_prune.scoring import LRP, DataPass, score_groups
from lightning_prune.structure import TracedModel, trace
from tests.scoring.networks import tensors_of


def relevance(model, x, structure, epsilon=1e-9):
    statistic = LRP(epsilon).statistic(structure)
    statistic.collect(model, DataPass([x]))
    return score_groups(LRP(epsilon), structure.groups, tensors_of(model), statistic)


class Chain(nn.Module):
    """What Captum has rules for."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 2)
        self.act, self.act2, self.act3, self.pool = nn.ReLU(), nn.Tanh(), nn.ReLU(), nn.AvgPool2d(2)
        self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.act2(self.second(self.pool(self.act(self.norm(self.first(x))))))
        return self.head(self.act3(self.hidden(x.flatten(1))))


# Captum says that it sets hooks, and asks for the number behind a tensor.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_equals_captum_on_a_chain():
    torch.manual_seed(0)
    model, x = Chain().double().eval(), torch.rand(3, 2, 6, 6, dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    structure = trace(TracedModel.of(model, x))
    assert set(structure.widths) == {"first", "second", "hidden"}
    scores = relevance(model, x, structure)
    for group, consumer in (("first", model.second), ("second", model.hidden), ("hidden", model.head)):
        found = LayerLRP(model, consumer).attribute(x, model(x).argmax(1), attribute_to_layer_input=True)
        of_units = found.detach().flatten(2).sum(2) if found.dim() > 2 else found.detach()
        np.testing.assert_allclose(scores[group], of_units.abs().mean(0), rtol=1e-6)


def test_relevance_is_conserved_through_a_residual_sum():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.head = nn.Linear(4, 5, False), nn.Linear(5, 5, False), nn.Linear(5, 3, False)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head(x + self.branch(x).relu())

    torch.manual_seed(0)
    model, x = Sum().double(), torch.rand(1, 4, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data.abs_()  # nothing is negative: absolute relevance adds up to the output
    structure = trace(TracedModel.of(model, x))
    inner = relevance(model, x, structure, epsilon=0)["stem"]
    x1 = model.stem(x).relu().detach()
    y = model.head(x1 + model.branch(x1).relu())
    # All of the output enters `head`, and of that what the branch gave enters `branch`.
    through = (model.head.weight[y.argmax()] * model.branch(x1).relu()).sum()
    assert float(inner.sum()) == pytest.approx((y.max() + through).item(), rel=1e-9)


def test_a_negative_epsilon_is_refused():
    with pytest.raises(ValueError, match="expected `epsilon` of at least 0"):
        LRP(epsilon=-1)
