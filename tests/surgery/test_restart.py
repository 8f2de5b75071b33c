"""Weights drawn anew: shapes stay, nothing else does."""

import copy

import pytest
import torch
from torch import nn

from lightning_prune.surgery import Reinitialise


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 40), nn.LayerNorm(40)
    )


def drawn(model, seed=0):
    return Reinitialise(seed).after(copy.deepcopy(model), lambda *_: None)


def test_everything_that_was_learnt_is_gone():
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        model[1].running_mean.fill_(5.0)
    contents = drawn(model)
    assert set(dict(model.named_parameters())) <= set(contents)
    assert contents["1.weight"].eq(1).all()
    assert contents["1.bias"].eq(0).all()
    assert contents["1.running_mean"].eq(0).all()
    for name in ("0.weight", "4.weight"):
        fan_in = model.get_parameter(name)[0].numel()
        assert contents[name].std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
        assert abs(contents[name].mean().item()) < 0.1 * (2 / fan_in) ** 0.5
        assert contents[name.replace("weight", "bias")].eq(0).all()


def test_the_seed_decides_and_the_training_does_not_notice():
    model = network()
    state = torch.get_rng_state()
    one, again, other = drawn(model), drawn(model), drawn(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_by_the_rule_of_each_module():
    model = network()
    contents = Reinitialise(4, rule="own").after(copy.deepcopy(model), lambda *_: None)
    torch.manual_seed(4)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        if name in contents:  # scales and shifts of norms are what they were
            assert torch.equal(contents[name], parameter)
    assert {"0.weight", "0.bias", "4.weight", "4.bias"} <= set(contents)
    assert Reinitialise(rule="own").info == {"reinitialised/own": 1}


def test_another_rule_is_refused():
    with pytest.raises(ValueError, match=r'Reinitialise: expected `rule` to be "he" or "own", got \'xavier\'\.'):
        Reinitialise(rule="xavier")


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    contents = drawn(model)
    assert set(contents) == {"0.weight", "0.bias", "1.bias"}


def test_a_bare_parameter_is_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    with pytest.raises(ValueError, match=r"expected every parameter .* got scale\. Add a `reset_parameters"):
        drawn(Scaled())


def test_attention_is_drawn_as_by_pytorch():
    torch.manual_seed(0)
    for options in ({}, {"kdim": 24, "vdim": 16}, {"add_bias_kv": True}):
        layer = nn.MultiheadAttention(64, 4, **options)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(3.0)
        contents = Reinitialise(rule="own").after(copy.deepcopy(layer), lambda *_: None)
        assert contents.keys() == dict(layer.named_parameters()).keys()
        layer._reset_parameters()
        for name, parameter in layer.named_parameters():
            if name.endswith("_weight"):
                assert contents[name].abs().max().item() == pytest.approx(parameter.abs().max().item(), rel=0.02)
            assert contents[name].std().item() == pytest.approx(parameter.std().item(), rel=0.3) or "out_proj" in name
