"""Penalties, each beside a reference that takes units apart one by one."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import surgery
from lightning_prune.structure import Call, TracedModel, trace
from lightning_prune.surgery import GroupLasso, GrowingL2, HalfSpace, Penalty, ScaleL1

FOUND = [
    kind
    for _, kind in inspect.getmembers(surgery, inspect.isclass)
    if issubclass(kind, Penalty) and kind is not Penalty
]

EVERY_ROLE = ("out", "in", "along")


class Residual(nn.Module):
    """Two convolutions added, grouped ones after them, a flattened map: coupled and repeated units."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.hidden, self.head = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.norm_one(self.one(x)) + self.norm_two(self.two(x)))
        return self.head(torch.relu(self.hidden(self.depthwise(x).flatten(1))))


@pytest.fixture
def setting():
    """A network with gradients and its groups."""
    torch.manual_seed(0)
    model = Residual().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    structure = trace(TracedModel(model, tuple(Call((x,), training=training) for training in (False, True))))
    model(x).square().mean().backward()
    return model, structure.groups


def places(group, unit, roles):
    """Everything that a unit owns: name and an index into the tensor."""
    for member in group.members:
        if member.role in roles:
            for position in member.index[unit]:
                yield member.tensor, (slice(None),) * member.dim + (int(position),)


def norm_of(model, group, unit, roles=("out", "in", "along")):
    parameters = dict(model.named_parameters())
    owned = [parameters[name][where].detach() for name, where in places(group, unit, roles) if name in parameters]
    return float(torch.sqrt(sum(piece.square().sum() for piece in owned)))


def added(model, penalty, groups, step=0, scale=1.0):
    """What a penalty adds to every gradient."""
    parameters = dict(model.named_parameters())
    before = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    penalty.before_step(groups, parameters, step, scale)
    return {name: (parameters[name].grad - before[name]).numpy() for name in parameters}


def empty(model):
    return {name: np.zeros(parameter.shape) for name, parameter in model.named_parameters()}


def test_every_penalty_is_a_documented_frozen_value():
    assert {kind.__name__ for kind in FOUND} == {"GroupLasso", "GrowingL2", "HalfSpace", "ScaleL1"}
    for kind in FOUND:
        assert kind.__dataclass_params__.frozen
        assert dataclasses.asdict(kind())
        assert "Args:" in inspect.getdoc(kind)


def test_scales_of_norms_alone_are_pulled(setting):
    model, groups = setting
    expected = empty(model)
    for norm in ("norm_one", "norm_two"):
        expected[f"{norm}.weight"] = 0.3 * np.sign(model.get_submodule(norm).weight.detach().numpy())
    found = added(model, ScaleL1(0.3), groups)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=name)
    assert any(value.any() for value in expected.values())


def test_scales_that_are_not_asked_for_stay(setting):
    model, groups = setting
    found = added(model, ScaleL1(0.3), [group for group in groups if group.name == "hidden"])
    assert not any(value.any() for value in found.values())
    assert ScaleL1().unsuited(groups[0]) is None
    assert "no normalisation" in ScaleL1().unsuited(next(group for group in groups if group.name == "hidden"))


def test_group_lasso_is_the_gradient_of_the_sum_of_norms(setting):
    model, groups = setting
    parameters = dict(model.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for unit in range(group.width):
            owned = [
                parameters[n][where] for n, where in places(group, unit, ("out", "in", "along")) if n in parameters
            ]
            total = total + sum(piece.square().sum() for piece in owned).sqrt()
    expected = torch.autograd.grad(0.2 * total, list(parameters.values()), allow_unused=True)
    found = added(model, GroupLasso(0.2), groups)
    for name, value in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(found[name], 0 if value is None else value.numpy(), atol=1e-12, err_msg=name)


def test_group_lasso_counts_the_weight_of_a_unit_to_itself_once():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.loop, self.head = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.head((x + self.loop(x)).mean(2))

    model, x = Loop().double(), torch.randn(3, 2, 5, dtype=torch.float64)
    model(x).sum().backward()
    (group,) = trace(TracedModel.of(model, x)).groups
    stem, loop, head = model.stem, model.loop, model.head
    total = 0
    for k in range(4):
        others = torch.arange(4) != k
        owned = [stem.weight[k], stem.bias[k], loop.weight[k], loop.bias[k], loop.weight[others, k], head.weight[:, k]]
        total = total + torch.cat([piece.flatten() for piece in owned]).norm()
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(0.2 * total, list(parameters.values()), allow_unused=True)
    found = added(model, GroupLasso(0.2), [group])
    for name, value in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(found[name], 0 if value is None else value.numpy(), atol=1e-12, err_msg=name)


def test_group_lasso_leaves_a_dead_unit_alone(setting):
    model, groups = setting
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, where in places(groups[0], 1, EVERY_ROLE):
            if name in parameters:
                parameters[name][where] = 0
    found = added(model, GroupLasso(0.2), groups[:1])
    assert all(np.isfinite(value).all() for value in found.values())
    assert found["one.weight"][0].any()
    assert not found["one.weight"][1].any()


@pytest.mark.parametrize(("step", "factor"), [(0, 0.0), (9, 0.0), (10, 0.1), (25, 0.2), (1000, 0.5)])
def test_growing_l2_pulls_the_lowest_half(setting, step, factor):
    model, groups = setting
    hidden = next(group for group in groups if group.name == "hidden")
    weight = model.hidden.weight.detach().numpy()
    lowest = np.argsort(np.abs(weight).sum(1))[:3]
    expected = np.zeros_like(weight)
    expected[lowest] = factor * weight[lowest]
    found = added(model, GrowingL2(0.5, delta=0.1, every=10, ceiling=0.5), [hidden], step)
    np.testing.assert_allclose(found["hidden.weight"], expected, atol=1e-12)
    assert not found["head.weight"].any()


@pytest.mark.parametrize("penalty", [ScaleL1(0.3), GroupLasso(0.2), GrowingL2(delta=0.1, every=1), HalfSpace(0.2)])
def test_scaled_gradients_get_a_scaled_pull(setting, penalty):
    model, groups = setting
    one = added(model, penalty, groups, step=5)
    many = added(model, penalty, groups, step=5, scale=64.0)
    for name, value in one.items():
        np.testing.assert_allclose(many[name], 64 * value, rtol=1e-9, atol=1e-9)
    assert any(value.any() for value in one.values())


@pytest.mark.parametrize("penalty", [ScaleL1(0.3), GroupLasso(0.2), GrowingL2(delta=0.1, every=1), HalfSpace(0.2)])
def test_what_is_not_trained_is_not_touched(setting, penalty):
    model, groups = setting
    frozen = {name: parameter for name, parameter in model.named_parameters() if name.startswith(("one", "norm_one"))}
    before = {name: (parameter.detach().clone(), parameter.grad.clone()) for name, parameter in frozen.items()}
    trained = {name: parameter for name, parameter in model.named_parameters() if name not in frozen}
    memory = penalty.remember(groups, trained)
    penalty.before_step(groups, trained, 5)
    penalty.after_step(groups, trained, 5, memory)
    for name, (weight, gradient) in before.items():
        assert torch.equal(frozen[name].detach(), weight)
        assert torch.equal(frozen[name].grad, gradient)


def test_half_space_sets_to_zero_what_turns_back(setting):
    model, groups = setting
    group = next(group for group in groups if group.name == "hidden")
    penalty, parameters = HalfSpace(0.1, start=3, epsilon=0.1), dict(model.named_parameters())
    memory = penalty.remember([group], parameters)
    factors = torch.tensor([1.0, 0.2, 0.05, -1.0, 0.5, 0.11], dtype=torch.float64)
    with torch.no_grad():
        model.hidden.weight.mul_(factors[:, None])
        model.hidden.bias.mul_(factors)
    head = model.head.weight.detach().clone()
    penalty.after_step([group], parameters, 2, memory)
    assert model.hidden.weight.abs().sum(1).gt(0).all()
    penalty.after_step([group], parameters, 3, memory)
    assert model.hidden.weight.abs().sum(1).gt(0).tolist() == [True, True, False, False, True, True]
    assert model.hidden.bias.ne(0).tolist() == [True, True, False, False, True, True]
    assert torch.equal(model.head.weight, head)


def test_half_space_keeps_zeros_zero(setting):
    model, groups = setting
    group = next(group for group in groups if group.name == "hidden")
    penalty, parameters = HalfSpace(0.1, start=0), dict(model.named_parameters())
    with torch.no_grad():
        model.hidden.weight[2] = model.hidden.bias[2] = 0
    memory = penalty.remember([group], parameters)
    with torch.no_grad():
        model.hidden.weight[2] = model.hidden.bias[2] = 0.3
    penalty.after_step([group], parameters, 0, memory)
    assert not model.hidden.weight[2].any()
    assert model.hidden.weight[1].any()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ScaleL1(-1), "strength"),
        (lambda: ScaleL1(float("nan")), "strength"),
        (lambda: GroupLasso(-1), "strength"),
        (lambda: GrowingL2(share=1.0), "share"),
        (lambda: GrowingL2(every=0), "every"),
        (lambda: GrowingL2(delta=-1), "delta"),
        (lambda: HalfSpace(epsilon=1), "epsilon"),
        (lambda: HalfSpace(start=-1), "start"),
    ],
)
def test_bad_numbers_are_named(make, named):
    with pytest.raises(ValueError, match=f"expected .*`{named}`"):
        make()
