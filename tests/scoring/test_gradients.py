"""Numbers from the backward pass: which gradients count, and what becomes of scales, accumulation and bad numbers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_prune.scoring import SNIP, Fisher, Taylor
from lightning_prune.structure import TracedModel, trace
from tests.scoring.networks import batches, network, structure_of, train

every = pytest.mark.parametrize("criterion", [Taylor(), SNIP(), Fisher()], ids=repr)


def observed(criterion, name="mlp", model=None, sizes=(3, 2)):
    statistic = criterion.statistic(structure_of(name))
    train(network(name) if model is None else model, batches(name, sizes), statistic)
    return statistic


def assert_same_values(one, two):
    for group in one.structure.widths:
        torch.testing.assert_close(one.value(group), two.value(group), rtol=1e-9, atol=0)


@every
def test_accumulated_gradients_count_once(criterion):
    model = network("cnn")
    train(model, batches("cnn", (4,)))  # leaves its gradients behind
    assert_same_values(observed(criterion, "cnn", model), observed(criterion, "cnn"))


@every
def test_a_scale_on_the_loss_does_not_matter(criterion):
    plain, scaled, model = observed(criterion, sizes=(3, 2)), criterion.statistic(structure_of("mlp")), network("mlp")
    for x, scale in zip(batches("mlp", (3, 2)), (1024.0, 32.0), strict=True):
        handles = scaled.attach(model, scale)
        (model(x).square().sum() * scale).backward()
        for handle in handles:
            handle.remove()
    assert_same_values(scaled, plain)


@every
def test_an_optimizer_step_within_the_batch_changes_nothing(criterion):
    """Callbacks remove the hooks only after the step."""
    model, statistic = network("mlp"), criterion.statistic(structure_of("mlp"))
    x = batches("mlp", (3,))[0]
    handles = statistic.attach(model)
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    for handle in handles:
        handle.remove()
    assert_same_values(statistic, observed(criterion, sizes=(3,)))


@every
def test_gradient_checkpointing_counts_once(criterion):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed(*copy.deepcopy(network("cnn")))
    assert_same_values(observed(criterion, "cnn", model), observed(criterion, "cnn"))


@every
def test_bad_gradients_are_left_out(criterion):
    model, statistic = network("mlp"), criterion.statistic(structure_of("mlp"))
    good, bad = batches("mlp", (3, 3))
    for x, scale in ((good, 1.0), (bad, math.inf)):
        handles = statistic.attach(model)
        (model(x).square().sum() * scale).backward()
        for handle in handles:
            handle.remove()
    with pytest.warns(RuntimeWarning, match="NaN or infinite .*gradients"):
        statistic.value("0")
    with pytest.warns(RuntimeWarning, match="NaN or infinite .*gradients"):
        statistic.value("2")
    assert_same_values(statistic, observed(criterion, sizes=(3,)))


def test_parameters_that_are_frozen_add_nothing():
    model = network("mlp")
    model[0].requires_grad_(False)
    statistic, everything = observed(SNIP(), model=model), observed(SNIP())
    alone = everything.structure.group("0").members.index(
        next(m for m in everything.structure.group("0").members if m.role == "in")
    )
    expected = everything.per_pass("score", "0")[alone]
    torch.testing.assert_close(statistic.value("0"), expected)
    model.requires_grad_(False)
    assert statistic.unhookable(model) == {
        "0": "none of 0.weight, 0.bias, 2.weight is trained",
        "2": "none of 2.weight, 2.bias, 4.weight is trained",
    }


def test_says_which_groups_had_no_gradient():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.aside, self.end = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            return self.last(self.first(x).relu()) + self.end(self.aside(x).relu()).detach()

    model = Unused()
    statistic = Taylor().statistic(trace(TracedModel.of(model, torch.zeros(2, 4))))
    train(model, [torch.randn(3, 4)], statistic)
    silent = statistic.unobservable(model)
    assert list(silent) == ["aside"]
    assert silent["aside"].endswith("had a gradient in none of the 1 observed batches")


def test_the_first_order_change_is_that_of_a_factor_on_the_unit():
    """Where the unit goes through nothing but a ReLU, each layer's sum is the gradient of the factor."""
    model, statistic = network("mlp"), Taylor().statistic(structure_of("mlp"))
    x = batches("mlp", (5,))[0]
    train(model, [x], statistic)
    factor = torch.ones(model[0].out_features, dtype=x.dtype, requires_grad=True)
    model[2:](model[1](model[0](x)) * factor).square().sum().backward()
    torch.testing.assert_close(statistic.value("0"), (2 * factor.grad).square())  # of what gives it and what takes it


@every
def test_an_exception_in_a_batch_leaves_no_half_of_it(criterion):
    """A batch whose hooks go before its backward pass has shown nothing."""
    model, statistic = network("mlp"), criterion.statistic(structure_of("mlp"))
    handles = statistic.attach(model)
    model(batches("mlp")[0])
    for handle in handles:
        handle.remove()
    assert statistic.passes("0") == 0
