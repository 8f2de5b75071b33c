"""The scan over layers: equal to cutting each by hand, and without a trace."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import L2, Taylor, prune, sensitivity
from lightning_prune.reporting import Sensitivity


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)
    ).double()


X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def evaluate(model):
    return float(model.eval()(X).detach().square().mean())


def test_each_layer_is_cut_alone():
    model = network()
    scan = sensitivity(model, evaluate, X, criterion=L2(), shares=(0.25, 0.5))
    assert list(scan.metrics) == ["0", "2"]
    assert scan.dense == evaluate(network())
    for name, values in scan.metrics.items():
        for share, value in zip((0.25, 0.5), values, strict=True):
            narrow = network().eval()
            prune(narrow, X, pruning_ratio=share, criterion=L2(), layers=name)
            assert value == pytest.approx(evaluate(narrow), rel=1e-12)


def test_the_network_is_as_before():
    model = network()
    before = copy.deepcopy(model.state_dict())
    sensitivity(model, evaluate, X, shares=(0.5,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].out_features == 8


def test_it_is_measured_in_eval_mode_and_goes_on_as_it_was():
    """An evaluation that thinks of no mode, and one that sets it, and one that draws: nothing of it stays."""
    model = network().train()
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    plain = sensitivity(model, lambda net: float(net(X + torch.rand_like(X)).square().mean()), X, shares=(0.5,))
    again = sensitivity(model, lambda net: float(net.eval()(X + torch.rand_like(X)).square().mean()), X, shares=(0.5,))
    assert plain == again
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_are_chosen_and_left_out():
    assert list(sensitivity(network(), evaluate, X, shares=(0.5,), ignore="0").metrics) == ["2"]
    assert list(sensitivity(network(), evaluate, X, shares=(0.5,), layers=["0", "2"], ignore=["2"]).metrics) == ["0"]


def test_what_is_no_metric_or_criterion_is_named():
    with pytest.raises(TypeError, match="expected `evaluate` to return a number, got None"):
        sensitivity(network(), lambda _: None, X)
    with pytest.raises(TypeError, match="expected `criterion` to be an instance of Criterion, got 'L1'"):
        sensitivity(network(), evaluate, X, criterion="L1")


def test_the_network_is_as_before_if_the_evaluation_fails():
    model, calls = network(), []

    def fail(_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the validation failed")
        return 0.5

    with pytest.raises(RuntimeError, match="the validation failed"):
        sensitivity(model, fail, X)
    assert [model[0].out_features, model[2].out_features] == [8, 10]


def test_shares_below_one_unit_cost_nothing():
    scan = sensitivity(network(), evaluate, X, shares=(0.01, 0.5), layers="0")
    assert scan.metrics["0"][0] == scan.dense != scan.metrics["0"][1]


@pytest.mark.parametrize("shares", [(), (0.5, 0.3), (0.0, 0.5), (0.5, 1.0), (0.3, 0.3)])
def test_bad_shares(shares):
    with pytest.raises(ValueError, match="expected ascending `shares`"):
        sensitivity(network(), evaluate, X, shares=shares)


def test_a_criterion_that_observes_is_refused():
    with pytest.raises(ValueError, match="has to observe training"):
        sensitivity(network(), evaluate, X, criterion=Taylor())


SCAN = Sensitivity(0.9, (0.1, 0.3, 0.5), {"a": (0.89, 0.87, 0.5), "b": (0.7, 0.89, 0.9), "c": (0.9, 0.9, 0.9)}, "L1")


def test_ratios_stop_at_the_first_loss():
    assert SCAN.ratios(0.05) == {"a": 0.3, "c": 0.5}
    assert SCAN.ratios(0.0) == {"c": 0.5}
    assert SCAN.ratios(0.0, "min") == {"a": 0.5, "b": 0.5, "c": 0.5}
    better = Sensitivity(0.9, (0.1, 0.3), {"a": (0.95, 0.89), "b": (float("nan"), 0.9)})
    assert better.ratios(0.0) == {"a": 0.1}
    with pytest.raises(ValueError, match="`tolerance` of at least 0"):
        SCAN.ratios(-0.1)


def test_it_shows_every_number():
    text, page = str(SCAN), SCAN._repr_html_()
    for word in ("a", "0.89", "0.87", "30 %", "0.9", "L1"):
        assert word in text
        assert word in page


@pytest.mark.parametrize("layers", [3, 20])
def test_the_picture_holds_every_layer(layers):
    metrics = {f"layer{i}": tuple(np.linspace(0.9, 0.1, 3) - 0.01 * i) for i in range(layers)}
    figure = Sensitivity(0.9, (0.1, 0.3, 0.5), metrics, "L1").figure()
    figure.canvas.draw()
    axes = figure.axes[0]
    names = [t.get_text() for t in (axes.get_legend().get_texts() if layers == 3 else axes.get_yticklabels())]
    assert names == list(metrics)
    if layers == 3:
        assert [list(line.get_ydata()) for line in axes.get_lines()[:3]] == [[0.9, *v] for v in metrics.values()]
    else:
        np.testing.assert_allclose(axes.get_images()[0].get_array(), np.array([*metrics.values()]))
