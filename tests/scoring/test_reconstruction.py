"""`Reconstruction` beyond the contract: duplicates, errors that add up, parts of the data, and what is left out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.scoring import DataPass, Reconstruction
from lightning_prune.structure import TracedModel, trace


def net(width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()


def batches(count=4, n=20):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def collected(model, data, **settings):
    structure = trace(TracedModel.of(model, data[0]))
    statistic = Reconstruction(**settings).statistic(structure)
    statistic.collect(model, DataPass(data))
    return statistic


def test_of_duplicates_all_but_one_cost_nothing():
    model = net()
    with torch.no_grad():
        for copied in (3, 4):
            model[0].weight[copied], model[0].bias[copied] = model[0].weight[1], model[0].bias[1]
    scores = collected(model, batches(), strength=1e-9).value("0")
    cheap = scores < 1e-6
    assert int(cheap.sum()) == 2
    assert set(cheap.nonzero()[:, 0].tolist()) < {1, 3, 4}


def test_scores_are_shares_of_variance_that_are_lost_in_turn():
    """By least squares on the remaining units; one that is cheaper later costs what the one before it did."""
    model, data = net(8), batches(4, 125)
    scores = collected(model, data, strength=1e-10).value("0")
    hidden = model[:2](torch.cat(data)).detach().numpy()
    wanted = model(torch.cat(data)).detach().numpy()
    wanted = (wanted - wanted.mean(0)) / np.sqrt(wanted.var(0).sum())
    order = scores.argsort().tolist()
    lost = [0.0]
    for gone in range(1, 8):
        left = np.column_stack([hidden[:, order[gone:]], np.ones(len(hidden))])
        residual = wanted - left @ np.linalg.lstsq(left, wanted, rcond=None)[0]
        lost.append((residual**2).sum(1).mean())
    assert scores[order[:7]].tolist() == pytest.approx(np.maximum.accumulate(np.diff(lost)), rel=1e-5)


class OnStream(nn.Module):
    """What the layer under test gives goes through a norm and onto a stream."""

    def __init__(self, norm=True):
        super().__init__()
        self.stem, self.net = nn.Linear(4, 3), net()
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.size = 1.0

    def forward(self, x):
        h = self.stem(x) * self.size
        return (h + self.norm(self.net(x))).relu()


def test_on_a_large_stream_little_is_lost():
    model = OnStream().double().eval()
    small = collected(model, batches()).value("net.0")
    model.size = 100.0
    large = collected(model, batches()).value("net.0")
    assert (large < 1e-3 * small).all()
    assert torch.equal(large.argsort(), small.argsort())


def test_outputs_count_as_the_norm_behind_them_scales_them():
    """As without a norm and with weights that are scaled."""
    model = OnStream().double().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([0.1, 1.0, 3.0]))
        model.norm.running_var.uniform_(0.5, 2)
        plain = OnStream(norm=False).double()
        plain.load_state_dict(model.state_dict(), strict=False)
        scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
        plain.net[2].weight.mul_(scale[:, None])
        plain.net[2].bias.mul_(scale)
    torch.testing.assert_close(collected(model, batches()).value("net.0"), collected(plain, batches()).value("net.0"))


def test_moments_of_processes_are_summed():
    """The state that torchmetrics reduces: two halves of the data are all of it."""
    model, data = net(), batches()
    whole, *halves = (collected(model, part) for part in (data, data[:2], data[2:]))
    states = [name for name in whole._reductions if name.startswith(("moments", "streams"))]
    assert len(states) == 2
    for name in states:
        assert whole._reductions[name] is halves[0]._reductions[name]
        torch.testing.assert_close(sum(getattr(half, name) for half in halves), getattr(whole, name))
        assert name not in whole.state_dict()  # no matrix in checkpoints


def test_nothing_is_left_on_the_model_and_in_copies():
    model = net()
    statistic = collected(model, batches())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(copy.deepcopy(statistic).value("0"), statistic.value("0"))


def test_layers_with_too_many_inputs_are_left_out_with_the_reason():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
    data = [torch.randn(20, 1, 6, 6, dtype=torch.float64)]
    statistic = collected(model, data, max_inputs=20)
    lost = statistic.unobservable(model)
    assert lost == {"0": "2 has 54 inputs, more than max_inputs=20"}
    assert statistic.value("2").shape == (4,)


def test_layers_with_fewer_rows_than_inputs_are_named():
    with pytest.warns(
        UserWarning, match=r"fewer rows than inputs, .*: 2 \(4 rows for 6 inputs\)\. Give more `batches`"
    ):
        collected(net(), batches(count=2), rows=2)


def test_units_that_are_constant_but_for_rounding_cost_nothing():
    scores = collected(net(), [0.1 * torch.ones(20, 4, dtype=torch.float64)] * 3).value("0")
    assert scores.eq(0).all()


def test_units_of_a_dead_branch_cost_nothing():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 5)

        def forward(self, x):
            x = self.stem(x)
            return x + self.last(self.first(x).relu())

    torch.manual_seed(0)
    model = Branch().double()
    with torch.no_grad():
        model.first.bias -= 100
    assert collected(model, batches()).value("first").eq(0).all()


def test_batches_with_nan_are_left_out():
    model, data = net(), batches()
    bad = torch.full((3, 4), torch.nan, dtype=torch.float64)
    statistic = collected(model, data)
    statistic.collect(model, DataPass([bad]))
    with pytest.warns(RuntimeWarning, match="NaN or infinite activations or weights at layer '2'"):
        found = statistic.value("0")
    torch.testing.assert_close(found, collected(model, data).value("0"))
    with pytest.raises(FloatingPointError, match="every observed pass had NaN"):
        collected(model, [bad]).value("0")


@pytest.mark.parametrize("settings", [{"batches": 0}, {"strength": 0.0}, {"rows": -1}, {"max_inputs": 0}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=f"Reconstruction: expected `{next(iter(settings))}` above 0"):
        Reconstruction(**settings)
