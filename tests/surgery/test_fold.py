"""`Fold` against loops written from its formula, and where merging loses nothing."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.scoring import DataPass
from lightning_prune.surgery import Fold, cut, install, repaired


def batches(*shape, count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def folded(net, axes, data, **settings):
    return repaired(partial(copy.deepcopy, net), axes, [Fold(**settings)], DataPass(data))


def cut_and_folded(net, axes, data, **settings):
    narrow = copy.deepcopy(net)
    change = cut(narrow, axes)
    install(change, narrow, folded(net, axes, data, **settings))
    return narrow


def mlp(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=bias)).double()


def axes_of(kept):
    return {"0.weight": {0: np.array(kept)}, "0.bias": {0: np.array(kept)}, "2.weight": {1: np.array(kept)}}


@pytest.mark.parametrize("bias", [True, False])
def test_against_loops(bias):
    net, kept, data = mlp(bias), [0, 2, 5], batches(50, 4)
    hidden = net[:2](torch.cat(data)).detach()
    mean = hidden.mean(0) if bias else torch.zeros(6)
    weight = net[2].weight.detach().clone()
    lost = torch.zeros(3, dtype=torch.float64)
    for r in (1, 3, 4):
        found = []
        for s in kept:
            cov = sum((row[r] - mean[r]) * (row[s] - mean[s]) for row in hidden)
            var = sum((row[s] - mean[s]) ** 2 for row in hidden)
            found.append((cov**2 / var, s, cov / var))
        _, s, factor = max(found)
        weight[:, s] += factor * net[2].weight[:, r].detach()
        lost += net[2].weight[:, r].detach() * (mean[r] - factor * mean[s])
    contents = folded(net, axes_of(kept), data)
    torch.testing.assert_close(contents["2.weight"], weight[:, kept], rtol=1e-10, atol=1e-12)
    if bias:
        torch.testing.assert_close(contents["2.bias"], net[2].bias.detach() + lost, rtol=1e-10, atol=1e-12)
    else:
        assert "2.bias" not in contents


def test_multiples_are_removed_without_a_loss():
    net = mlp()
    with torch.no_grad():
        for unit, source, factor in ((1, 0, 2.0), (3, 2, 0.5), (4, 5, 1.0)):
            net[0].weight[unit] = factor * net[0].weight[source]
            net[0].bias[unit] = factor * net[0].bias[source]
    narrow = cut_and_folded(net, axes_of([0, 2, 5]), batches(20, 4))
    x = torch.randn(30, 4, dtype=torch.float64)
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, False), (1, True)])
def test_channels_of_convolutions_are_merged_whole(groups, transposed):
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), kind(8, 4, 3, groups=groups)).double()
    per_group = 8 // groups
    with torch.no_grad():  # of each group the last channel is minus its first
        for first in range(0, 8, per_group):
            net[0].weight[first + per_group - 1] = -net[0].weight[first]
            net[0].bias[first + per_group - 1] = -net[0].bias[first]
    kept = [unit for unit in range(8) if unit % per_group != per_group - 1]
    inputs = {0: np.array(kept)} if transposed else {1: np.array(range(per_group - 1))}
    axes = {"0.weight": {0: np.array(kept)}, "0.bias": {0: np.array(kept)}, "2.weight": inputs}
    narrow = copy.deepcopy(net)
    change = cut(narrow, axes)
    if groups > 1:
        narrow[2].in_channels = len(kept)
    install(change, narrow, folded(net, axes, batches(4, 2, 9, 9)))
    x = torch.randn(3, 2, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(narrow(x), net(x), rtol=1e-9, atol=1e-10)


def test_constant_units_are_left_to_the_bias():
    """A unit that stays and never changes explains nothing; one that goes and never changes is its mean."""
    net = mlp()
    with torch.no_grad():
        net[0].weight[[0, 2, 5]] = 0
        net[0].bias[[0, 2, 5]] = 1.0
        net[0].weight[1], net[0].bias[1] = 0, 3.0
    contents = folded(net, axes_of([0, 2, 5]), batches(20, 4))
    torch.testing.assert_close(contents["2.weight"], net[2].weight.detach()[:, [0, 2, 5]])
    hidden = net[:2](torch.cat(batches(20, 4))).mean(0)
    torch.testing.assert_close(
        contents["2.bias"], (net[2].bias + net[2].weight[:, [1, 3, 4]] @ hidden[[1, 3, 4]]).detach()
    )


def test_a_layer_without_inputs_becomes_its_mean():
    net, data = mlp(), batches(10, 4)
    axes = {"0.weight": {0: np.array([0])}, "0.bias": {0: np.array([0])}}
    repairs, passes = [Fold()], DataPass(data)
    contents = repaired(partial(copy.deepcopy, net), axes, repairs, passes, {"2": "constant"})
    torch.testing.assert_close(contents["2.bias"], net(torch.cat(data)).mean(0).detach())
