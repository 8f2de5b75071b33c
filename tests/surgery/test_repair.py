"""Repairs after a cut: exact where they can be, equal to slow references elsewhere, and without side effects."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from lightning_prune.scoring import DataPass
from lightning_prune.surgery import (
    Change,
    CutError,
    FoldMean,
    ReestimateBatchNorm,
    RefitLayerNorm,
    Ridge,
    cut,
    install,
    repaired,
    transaction,
)

REPAIRS = [FoldMean(), Ridge(), ReestimateBatchNorm()]


def data(*shape, batches=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(batches)]


def runs(batches):
    return DataPass(batches)


def cut_with(model, axes, repairs, batches):
    """The network after cut and repair, from an untouched original."""
    contents = repaired(partial(copy.deepcopy, model), axes, repairs, runs(batches))
    narrow = copy.deepcopy(model)
    change = cut(narrow, axes)
    install(change, narrow, contents)
    return narrow


def mlp(width=6, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3, bias=bias)).double()


def mlp_axes(kept):
    return {"0.weight": {0: np.array(kept)}, "0.bias": {0: np.array(kept)}, "2.weight": {1: np.array(kept)}}


def constant(layer, unit, value):
    """Whatever comes in, this unit is ``value``."""
    with torch.no_grad():
        layer.weight[unit] = 0
        layer.bias[unit] = value


class ConvNet(nn.Module):
    def __init__(self, second, norm=None, act=None):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3), second
        self.norm, self.act = norm or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.norm(self.act(self.second(F.relu(self.first(x)))))


def conv_net(second, norm=None, act=None):
    torch.manual_seed(0)
    net = ConvNet(second, norm, act).double()
    if norm is not None:
        norm.running_mean.copy_(torch.rand(len(norm.running_mean)))
        norm.running_var.copy_(torch.rand(len(norm.running_var)) + 0.5)
    return net.eval()


def conv_axes(kept, dim=1, inner=None):
    return {
        "first.weight": {0: np.array(kept)},
        "first.bias": {0: np.array(kept)},
        "second.weight": {dim: np.array(inner or kept)},
    }


# -- the mean ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", [FoldMean(), Ridge(strength=1e-6)])
def test_a_constant_unit_leaves_no_trace(repair):
    model, batches = mlp(), data(8, 4)
    constant(model[0], 2, 1.5)
    constant(model[0], 4, 0.3)
    narrow = cut_with(model, mlp_axes([0, 1, 3, 5]), [repair], batches)
    new = data(8, 4, seed=9)[0]
    torch.testing.assert_close(narrow(new), model(new), rtol=0, atol=1e-12)
    without = cut_with(model, mlp_axes([0, 1, 3, 5]), [], batches)
    assert (without(new) - model(new)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("second", "axes"),
    [
        (nn.Conv2d(6, 4, 3), conv_axes([0, 2, 3, 5])),
        (nn.Conv2d(6, 4, 3, stride=2, dilation=2), conv_axes([0, 2, 3, 5])),
        (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), conv_axes([0, 2, 3, 5])),
        # Both groups lose their second input.
        (nn.Conv2d(6, 4, 3, groups=2), conv_axes([0, 2, 3, 5], inner=[0, 2])),
        # With a larger kernel its outputs see different parts of it.
        (nn.ConvTranspose2d(6, 4, 1), conv_axes([0, 2, 3, 5], dim=0)),
    ],
    ids=["conv", "strided", "circular", "grouped", "transposed"],
)
def test_constant_channels_leave_no_trace(second, axes):
    model, batches = conv_net(second), data(2, 2, 9, 9)
    constant(model.first, 1, 0.7)
    constant(model.first, 4, 1.1)
    narrow = cut_with(model, axes, [FoldMean()], batches)
    new = data(3, 2, 9, 9, seed=9)[0]
    torch.testing.assert_close(narrow(new), model(new), rtol=0, atol=1e-12)


def test_zero_padding_leaves_an_error_at_the_border_whose_mean_is_zero():
    model, batches = conv_net(nn.Conv2d(6, 4, 3, padding=1)), data(2, 2, 9, 9)
    constant(model.first, 1, 0.7)
    narrow = cut_with(model, conv_axes([0, 2, 3, 4, 5]), [FoldMean()], batches)
    error = narrow(batches[0]) - model(batches[0])
    assert error.abs().max() > 1e-3
    assert error.mean((0, 2, 3)).abs().max() < 1e-12


def test_the_mean_without_a_bias_goes_to_the_batch_norm_that_follows():
    model, batches = conv_net(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)), data(2, 2, 9, 9)
    constant(model.first, 1, 0.7)
    narrow = cut_with(model, conv_axes([0, 2, 3, 4, 5]), [FoldMean()], batches)
    torch.testing.assert_close(narrow(batches[0]), model(batches[0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_batch_norm_behind_an_activation_is_not_the_place(inplace):
    second = nn.Conv2d(6, 4, 3, bias=False)
    model = conv_net(second, nn.BatchNorm2d(4), nn.ReLU(inplace))
    with pytest.warns(UserWarning, match="second has no bias, and no batch norm follows it directly"):
        contents = repaired(partial(copy.deepcopy, model), conv_axes([0, 2]), [FoldMean()], runs(data(2, 2, 9, 9)))
    assert contents == {}


def test_the_shift_is_the_mean_over_all_samples_of_uneven_batches():
    model = mlp()
    batches = [*data(8, 4, batches=2), *data(3, 4, batches=1)]
    kept = [0, 5]
    bias = repaired(partial(copy.deepcopy, model), mlp_axes(kept), [FoldMean()], runs(batches))["2.bias"]
    hidden = torch.relu(model[0](torch.cat(batches))).mean(0)
    gone = [1, 2, 3, 4]
    torch.testing.assert_close(bias, model[2].bias + model[2].weight[:, gone] @ hidden[gone])


def test_only_as_many_batches_as_asked_for():
    model, batches = mlp(), data(8, 4)
    few = repaired(partial(copy.deepcopy, model), mlp_axes([0, 1]), [FoldMean(batches=1)], runs(batches))
    first = runs([runs(batches).batch(0).args[0]])
    one = repaired(partial(copy.deepcopy, model), mlp_axes([0, 1]), [FoldMean()], first)
    torch.testing.assert_close(few["2.bias"], one["2.bias"])


# -- ridge regression -------------------------------------------------------------------------------------------------


def naive_ridge(inputs, weight, kept, strength, constant=True):
    """Penalised least squares as one stacked system, solved by `lstsq`: the weight kept and the outputs' loss."""
    gone = [i for i in range(inputs.shape[1]) if i not in kept]
    mean = inputs.mean(0) if constant else torch.zeros_like(inputs[0])
    x = (inputs - mean)[:, kept]
    target = (inputs - mean)[:, gone] @ weight[:, gone].T
    penalty = strength * x.square().mean(0).mean()
    stacked = torch.cat([x, (penalty * len(x)).sqrt() * torch.eye(len(kept))])
    added = torch.linalg.lstsq(stacked, torch.cat([target, torch.zeros(len(kept), len(weight))])).solution.T
    return weight[:, kept] + added, weight[:, gone] @ mean[gone] - added @ mean[kept]


@pytest.mark.parametrize("strength", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("bias", [True, False])
def test_ridge_of_a_linear_layer(strength, bias):
    torch.set_default_dtype(torch.float64)
    try:
        model, batches, kept = mlp(bias=bias), data(16, 4), [0, 2, 5]
        narrow = cut_with(model, mlp_axes(kept), [Ridge(strength=strength)], batches)
        hidden = torch.relu(model[0](torch.cat(batches))).detach()
        weight, lost = naive_ridge(hidden, model[2].weight.detach(), kept, strength, constant=bias)
        torch.testing.assert_close(narrow[2].weight.detach(), weight)
        if bias:
            torch.testing.assert_close(narrow[2].bias.detach(), model[2].bias.detach() + lost)
    finally:
        torch.set_default_dtype(torch.float32)


def test_ridge_of_a_convolution():
    torch.set_default_dtype(torch.float64)
    try:
        model = conv_net(nn.Conv2d(6, 4, (3, 2), stride=(1, 2), padding=(2, 1), bias=False), nn.BatchNorm2d(4))
        batches, kept = data(2, 2, 9, 9), [0, 3, 5]
        narrow = cut_with(model, conv_axes(kept), [Ridge(strength=0.05)], batches)
        hidden = torch.relu(model.first(torch.cat(batches))).detach()
        rows = F.unfold(hidden, (3, 2), stride=(1, 2), padding=(2, 1)).transpose(1, 2).flatten(0, 1)
        columns = [c * 6 + t for c in kept for t in range(6)]
        weight, lost = naive_ridge(rows, model.second.weight.detach().flatten(1), columns, 0.05)
        torch.testing.assert_close(narrow.second.weight.detach().flatten(1), weight)
        torch.testing.assert_close(narrow.norm.running_mean, model.norm.running_mean - lost)
    finally:
        torch.set_default_dtype(torch.float32)


def test_ridge_replaces_a_copy_by_its_original():
    model, batches = mlp(), data(16, 4)
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 2 * model[0].weight[1], 2 * model[0].bias[1]
    axes = mlp_axes([0, 1, 2, 3, 5])
    new = data(8, 4, seed=9)[0]
    exact = cut_with(model, axes, [Ridge(strength=1e-9)], batches)
    torch.testing.assert_close(exact(new), model(new), rtol=0, atol=1e-6)
    assert (cut_with(model, axes, [FoldMean()], batches)(new) - model(new)).abs().max() > 0.01


def test_much_strength_is_the_mean_alone():
    model, batches, axes = mlp(), data(16, 4), mlp_axes([0, 2])
    strong = cut_with(model, axes, [Ridge(strength=1e12)], batches)
    mean = cut_with(model, axes, [FoldMean()], batches)
    for name, tensor in mean.state_dict().items():
        torch.testing.assert_close(strong.state_dict()[name], tensor)


def test_dead_inputs_do_not_break_the_fit():
    model, batches = mlp(), data(16, 4)
    for unit in range(6):
        constant(model[0], unit, 0.5)
    narrow = cut_with(model, mlp_axes([0, 2]), [Ridge()], batches)
    torch.testing.assert_close(narrow(batches[0]), model(batches[0]))


def responses(layer, inputs):
    """What a convolution makes of its inputs for each element of its weight alone: ``(positions, channels · taps)``."""
    columns = []
    shape = (inputs.shape[1], 1) if layer.transposed else (1, inputs.shape[1])
    for channel, *taps in np.ndindex(inputs.shape[1], *layer.kernel_size):
        weight = torch.zeros(*shape, *layer.kernel_size)
        weight.transpose(0, int(layer.transposed))[(0, channel, *taps)] = 1
        apply = F.conv_transpose2d if layer.transposed else F.conv2d
        columns.append(apply(inputs, weight, None, layer.stride, layer.padding).flatten())
    return torch.stack(columns, 1)


@pytest.mark.parametrize(
    ("second", "norm", "inner", "dim"),
    [
        (nn.Conv2d(6, 4, 3, padding=1, groups=2), None, [0, 2], 1),
        (nn.Conv2d(6, 9, (3, 1), stride=2, groups=3, bias=False), nn.BatchNorm2d(9), [1], 1),
        (nn.Conv2d(6, 4, 1), None, [0, 1, 3, 4], 1),
        (nn.ConvTranspose2d(6, 4, (3, 2), stride=2, padding=1), None, [0, 1, 3, 4], 0),
    ],
    ids=["two groups", "three groups and a norm", "1x1", "transposed"],
)
def test_ridge_of_grouped_and_transposed_convolutions(second, norm, inner, dim):
    torch.set_default_dtype(torch.float64)
    try:
        model, batches, groups = conv_net(second, norm), data(2, 2, 9, 9), second.groups
        width, taps = 6 // groups, second.weight[0, 0].numel()
        kept = [group * width + place for group in range(groups) for place in inner]
        narrow = cut_with(model, conv_axes(kept, dim=dim, inner=inner), [Ridge(strength=0.05, rows=10**6)], batches)
        hidden = torch.relu(model.first(torch.cat(batches))).detach()
        columns = [place * taps + tap for place in inner for tap in range(taps)]
        weights, losses = [], []
        for part, weight in zip(hidden.chunk(groups, 1), second.weight.detach().chunk(groups, 1 - dim), strict=True):
            matrix = weight.transpose(0, 1 - dim).flatten(1)
            fitted, lost = naive_ridge(responses(second, part), matrix, columns, 0.05)
            weights.append(fitted)
            losses.append(lost)
        found = narrow.second.weight.detach().transpose(0, 1 - dim).flatten(1)
        torch.testing.assert_close(found, torch.cat(weights))
        if norm is None:
            torch.testing.assert_close(narrow.second.bias, second.bias + torch.cat(losses))
        else:
            torch.testing.assert_close(narrow.norm.running_mean, model.norm.running_mean - torch.cat(losses))
    finally:
        torch.set_default_dtype(torch.float32)


def test_too_many_inputs_have_their_mean_folded():
    net, batches, axes = conv_net(nn.Conv2d(6, 4, 3)), data(2, 2, 9, 9), conv_axes([0, 2, 3, 5])
    with pytest.warns(
        UserWarning, match=r"folds only the mean of second \(54 inputs\): more inputs than max_inputs=53"
    ):
        contents = repaired(partial(copy.deepcopy, net), axes, [Ridge(max_inputs=53)], runs(batches))
    expected = repaired(partial(copy.deepcopy, net), axes, [FoldMean()], runs(batches))
    assert contents.keys() == expected.keys() == {"second.bias"}
    assert torch.equal(contents["second.bias"], expected["second.bias"])
    fitted = repaired(partial(copy.deepcopy, net), axes, [Ridge(max_inputs=54)], runs(batches))
    assert fitted.keys() == {"second.bias", "second.weight"}


def test_fewer_rows_than_inputs_are_named():
    net, batches, axes = conv_net(nn.Conv2d(6, 4, 3)), data(2, 2, 9, 9), conv_axes([0, 2, 3, 5])
    with pytest.warns(UserWarning, match=r"fewer rows than inputs, .*: second \(\d+ rows for 54 inputs\). Give more"):
        repaired(partial(copy.deepcopy, net), axes, [Ridge(rows=4)], runs(batches))


# -- batch norm -------------------------------------------------------------------------------------------------------


def norm_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    net = net.double()
    net(torch.randn(4, 2, 9, 9, dtype=torch.float64))
    return net


def norm_axes(kept):
    along = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    return {name: {0: np.array(kept)} for name in along} | {"3.weight": {1: np.array(kept)}}


def test_batch_norms_are_those_of_the_narrow_network():
    model, batches, axes = norm_net(), data(4, 2, 9, 9), norm_axes([1, 2, 5])
    narrow = cut_with(model, axes, [ReestimateBatchNorm()], batches)
    expected = copy.deepcopy(model)
    cut(expected, axes)
    tracked = {n: b.clone() for n, b in expected.named_buffers() if "tracked" in n}
    update_bn([batch.args[0] for batch in runs(batches)], expected)
    for name, buffer in narrow.named_buffers():
        reference = tracked.get(name, dict(expected.named_buffers())[name])
        torch.testing.assert_close(buffer, reference, msg=name)


def test_frozen_batch_norms_stay():
    model = norm_net()
    model[1].eval()
    contents = repaired(
        partial(copy.deepcopy, model), norm_axes([1, 2]), [ReestimateBatchNorm()], runs(data(4, 2, 9, 9))
    )
    assert set(contents) == {"4.running_mean", "4.running_var"}
    assert (
        repaired(
            partial(copy.deepcopy, model.eval()), norm_axes([1, 2]), [ReestimateBatchNorm()], runs(data(4, 2, 9, 9))
        )
        == {}
    )


def test_batch_norms_see_the_refitted_weights():
    model, batches, axes = norm_net(), data(4, 2, 9, 9), norm_axes([1, 2, 5])
    both = cut_with(model, axes, [Ridge(), ReestimateBatchNorm()], batches)
    expected = cut_with(model, axes, [Ridge()], batches)
    update_bn([batch.args[0] for batch in runs(batches)], expected)
    torch.testing.assert_close(both[4].running_var, expected[4].running_var)
    torch.testing.assert_close(both[4].running_mean, expected[4].running_mean)


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", REPAIRS, ids=repr)
def test_values_can_be_printed_pickled_and_compared(repair):
    assert eval(repr(repair)) == repair
    assert pickle.loads(pickle.dumps(repair)) == repair


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (FoldMean, {"batches": 0}),
        (Ridge, {"strength": 0.0}),
        (Ridge, {"rows": -1}),
        (ReestimateBatchNorm, {"batches": 0}),
        (RefitLayerNorm, {"batches": 0}),
    ],
)
def test_numbers_out_of_range(kind, given):
    (name,) = given
    with pytest.raises(ValueError, match=rf"{kind.__name__}: expected `{name}` above 0, got"):
        kind(**given)


def test_in_half_precision_the_sums_are_not():
    """A mean of many float32 numbers in float32 would be off by much more."""
    model, batches = mlp().float(), [torch.full((4096, 4), 0.1) for _ in range(8)]
    contents = repaired(partial(copy.deepcopy, model), mlp_axes([0]), [FoldMean()], runs(batches))
    hidden = torch.relu(model[0](batches[0][:1]))[0].double()
    expected = model[2].bias.double() + model[2].weight.double()[:, 1:] @ hidden[1:]
    assert contents["2.bias"].dtype == torch.float64
    torch.testing.assert_close(contents["2.bias"], expected.detach(), rtol=1e-12, atol=1e-12)


def test_hooks_are_gone_and_modes_as_before():
    model = norm_net()
    model[1].eval()
    repaired(partial(copy.deepcopy, model), norm_axes([1, 2]), REPAIRS, runs(data(4, 2, 9, 9)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [m.training for m in model] == [True, False, True, True, True]


def test_undoing_the_change_takes_the_repair_back():
    model, axes = norm_net(), norm_axes([1, 2])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    contents = repaired(partial(copy.deepcopy, model), axes, REPAIRS, runs(data(4, 2, 9, 9)))
    with cut(model, axes) as change:
        install(change, model, contents)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_install_keeps_objects_memory_order_and_gradients():
    model = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    parameter, gradient = model.weight, torch.ones_like(model.weight)
    parameter.grad = gradient
    install(Change(), model, {"weight": torch.zeros(3, 2, 2, 2, dtype=torch.float64)})
    assert model.weight is parameter
    assert model.weight.grad is gradient
    assert model.weight.dtype == torch.float32
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.weight.any()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.a(hidden) + self.b(hidden)


def test_layers_that_share_a_weight_are_named():
    rows = np.array([0, 1])
    axes = {"first.weight": {0: rows}, "first.bias": {0: rows}, "a.weight": {1: rows}, "b.weight": {1: rows}}
    with pytest.warns(UserWarning, match="because they share their weight or bias: a, b$"):
        assert repaired(lambda: Twice().double(), axes, [FoldMean()], runs(data(8, 4))) == {}


def test_a_layer_that_is_not_called_is_named():
    model = mlp()
    model.forward = lambda x: F.linear(torch.relu(model[0](x)), model[2].weight)
    with pytest.warns(UserWarning, match="FoldMean leaves some layers unchanged: 2 was never called as a module"):
        assert repaired(partial(copy.deepcopy, model), mlp_axes([0]), [FoldMean()], runs(data(8, 4))) == {}


def test_infinite_data_is_an_error():
    batches = [torch.full((8, 4), torch.inf, dtype=torch.float64)]
    with pytest.raises(CutError, match=r"NaN or infinity for 2\.bias"):
        repaired(mlp, mlp_axes([0, 1]), [FoldMean()], runs(batches))


def test_a_repair_that_breaks_the_network_is_an_error():
    model = mlp()
    run = partial(model, data(2, 4)[0])

    def repair(name, content):
        with transaction(model, run=run) as change:
            change.install({name: content})

    with pytest.raises(CutError, match="no longer finite, before the cut they were"):
        repair("2.weight", torch.full((3, 6), torch.inf))
    assert model[2].weight.isfinite().all()  # the change went back
    repair("2.bias", torch.ones(3))
    assert (model[2].bias == 1).all()
