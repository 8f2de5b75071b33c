"""Layers fitted again in forward order, against a plain reference that runs whole networks."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.scoring import DataPass
from lightning_prune.scoring.linear_maps import as_matrices, from_matrices, rows_of, spread
from lightning_prune.structure import TracedModel, trace
from lightning_prune.surgery import Fold, FoldMean, Ridge, SequentialRidge, cut, install, repaired
from lightning_prune.surgery.repairs import sequential_ridge

LAYERS = [
    (nn.Linear(3, 5), (7, 4, 3)),
    (nn.Conv1d(3, 5, 4, stride=3, padding=2), (2, 3, 17)),
    (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3)), (2, 3, 8, 9)),
    (nn.Conv2d(3, 5, 4, padding="same", padding_mode="reflect"), (2, 3, 8, 9)),
    (nn.Conv2d(3, 5, 3, padding="valid", padding_mode="circular"), (2, 3, 8, 9)),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 9)),
    (nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 8, 9)),
    (nn.Conv3d(3, 5, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 4, 5, 6)),
    (nn.ConvTranspose1d(3, 5, 4, stride=3, padding=1, output_padding=2), (2, 3, 7)),
    (nn.ConvTranspose2d(3, 5, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1)), (2, 3, 5, 6)),
    (nn.ConvTranspose2d(3, 5, 2, padding=2), (2, 3, 6, 6)),
]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
def test_layers_are_linear_maps_of_their_rows(layer, shape):
    layer, x = copy.deepcopy(layer).double(), torch.randn(shape)
    y = layer(x).detach()
    outputs = y.flatten(0, -2) if isinstance(layer, nn.Linear) else y.movedim(1, -1).flatten(0, -2)
    weight = as_matrices(layer)
    rows = rows_of(layer, x, y, torch.arange(len(outputs))).unflatten(1, (len(weight), -1))
    found = torch.einsum("ngi,goi->ngo", rows, weight).flatten(1) + layer.bias.detach()
    torch.testing.assert_close(found, outputs)
    assert torch.equal(from_matrices(layer, weight), layer.weight.detach())


def test_fewer_rows_are_some_of_them_from_all_over_the_image():
    some = spread(4 * 32 * 32, 64)
    assert len(some.unique()) == 64
    for places in (some % 32, some // 32 % 32):  # an even step would fall into one column
        assert len((places // 4).unique()) == 8
    assert len((some // 1024).unique()) == 4


class Block(nn.Module):
    def __init__(self, width, shortcut=None, norm=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, width, 3, padding=1, bias=not norm)
        self.bn2 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def residual(norm=True):
    """Trained as little as its statistics need."""
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), Block(5, norm=norm),
        Block(5, nn.Conv2d(5, 5, 1), norm=norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    for _ in range(30):
        net(torch.randn(16, 2, 8, 8))
    return net.eval()


def batches(*shape, count=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def axes_of(net, example, kept):
    structure = trace(TracedModel.of(net, example))
    return structure.axes({group.name: np.array(kept) for group in structure.groups if group.width == 6})


def refitted(net, axes, data, ridge):
    contents = repaired(partial(copy.deepcopy, net), axes, [ridge], data)
    narrow = copy.deepcopy(net)
    install(cut(narrow, axes), narrow, contents)
    return narrow, contents


def seen(net, name, x):
    """Inputs and outputs of a layer."""
    found = []
    handle = net.get_submodule(name).register_forward_hook(lambda _, args, out: found.append((args[0], out)))
    with torch.no_grad():
        net(x)
    handle.remove()
    return found[0]


def unfolded(conv, x):
    return F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride).transpose(1, 2).flatten(0, 1)


def solved(inputs, weight, wanted, strength):
    mean_x, mean_y = inputs.mean(0), wanted.mean(0)
    centred = inputs - mean_x
    penalty = strength * centred.square().mean()
    stacked = torch.cat([centred, (penalty * len(inputs)).sqrt() * torch.eye(inputs.shape[1])])
    rest = torch.cat([wanted - mean_y - centred @ weight.T, torch.zeros(inputs.shape[1], len(weight))])
    weight = weight + torch.linalg.lstsq(stacked, rest).solution.T
    return weight, mean_y - weight @ mean_x


def where_relu_clips(solve, rows, old, wanted, goal, scale, found):
    """Ten more solutions, in which outputs that both networks clip stay as they are."""
    for _ in range(10):
        now = goal + scale * (rows @ found[0].T + found[1] - wanted)
        aim = torch.where(goal > 0, goal, torch.minimum(now, torch.zeros(())))
        found = solve(rows, old, wanted + (aim - goal) / scale)
    return found


def naive(dense, narrow, x, strength, norm=True):
    """Layer by layer, each from the networks' inputs, as stacked least squares."""

    solve = partial(solved, strength=strength)

    def rows_kept(value, layer):
        value = value.movedim(1, -1).flatten(0, -2) if value.ndim > 2 else value
        return value[:, kept] if value.shape[1] != len(layer.weight) else value

    def scale_of(bn):
        module = None if bn is None else narrow.get_submodule(bn)
        return 1 if module is None else module.weight / (module.running_var + module.eps).sqrt()

    def fit(name, bn=None, stream=None, before_relu=None):
        layer = narrow.get_submodule(name)
        given, (_, target) = seen(narrow, name, x)[0], seen(dense, name, x)
        wanted = rows_kept(target, layer)
        if stream is not None:
            lost = (stream(dense) - stream(narrow)).movedim(1, -1).flatten(0, -2)
            wanted = wanted + lost / scale_of(bn)
        rows, old = given if given.ndim == 2 else unfolded(layer, given), layer.weight.flatten(1)
        weight, constant = solve(rows, old, wanted)
        if before_relu is not None:
            goal = rows_kept(before_relu(dense), layer)
            weight, constant = where_relu_clips(solve, rows, old, wanted, goal, scale_of(bn), (weight, constant))
        with torch.no_grad():
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(constant)
            else:
                narrow.get_submodule(bn).running_mean.sub_(constant)

    kept = [0, 1, 4]
    with torch.no_grad():
        summed = lambda net: seen(net, "3.bn2", x)[1] + seen(net, "3", x)[0]  # noqa: E731
        fit("3.conv2", "3.bn2" if norm else None, lambda net: seen(net, "3", x)[0], summed)
        fit("4.conv1", "4.bn1", None, lambda net: seen(net, "4.bn1", x)[1])
        fit("4.conv2", "4.bn2" if norm else None)
        branch = lambda net: seen(net, "4.bn2", x)[1]  # noqa: E731
        fit("4.shortcut", None, branch, lambda net: branch(net) + seen(net, "4.shortcut", x)[1])
        fit("7")
    return narrow


@pytest.mark.parametrize("norm", [True, False])
def test_a_residual_network_is_fitted_in_forward_order(norm):
    net, xs = residual(norm), batches(6, 2, 8, 8)
    axes = axes_of(net, xs[0], [0, 1, 4])
    narrow, contents = refitted(net, axes, DataPass(xs), SequentialRidge(strength=0.05))
    expected = copy.deepcopy(net)
    cut(expected, axes)
    naive(net, expected, torch.cat(xs), 0.05, norm)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(narrow.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    before = ("0.", "1.", "3.conv1", "3.bn1")
    assert not any(name.startswith(before) for name in contents)


@pytest.mark.parametrize(("activation", "low", "high"), [(nn.ReLU(), 0, np.inf), (nn.ReLU6(), 0, 6)], ids=str)
def test_what_both_networks_clip_is_no_error(activation, low, high, monkeypatch):
    """Every step lowers the error in which clipped outputs do not count, and the outputs are closer."""
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), activation, nn.Linear(8, 3)
    )
    net[3].running_mean.normal_()
    net[3].running_var.uniform_(0.01, 0.1)
    net[3].weight.data.copy_(torch.tensor([1.0, -1, 2, 0.5, 1, -2, 1, 3]))
    net, xs = net.eval(), batches(64, 4)
    x, axes = torch.cat(xs), axes_of(net, xs[0], [0, 2, 3])
    wanted = net[:4](x).detach()
    errors, closeness = [], []
    for steps in range(4):
        monkeypatch.setattr("lightning_prune.surgery.repairs.sequential_ridge._CLIP_STEPS", steps)
        narrow, _ = refitted(net, axes, DataPass(xs), SequentialRidge(strength=1e-6))
        given = narrow[:4](x).detach()
        below, above = given.clamp(min=low) - low, given.clamp(max=high) - high
        kept = torch.where(wanted <= low, below, torch.where(wanted >= high, above, given - wanted))
        scale = net[3].weight.detach() / (net[3].running_var + net[3].eps).sqrt()
        errors.append(float((kept / scale).square().mean()))
        closeness.append(float((activation(given) - activation(wanted)).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert closeness[-1] < closeness[0]


def test_it_brings_more_back_than_the_constants_alone():
    net, xs = residual(), batches(64, 2, 8, 8, count=8)
    axes = axes_of(net, xs[0], [0, 1, 4])
    new = torch.cat(batches(64, 2, 8, 8, seed=11))
    wanted = net(new)
    fitted, _ = refitted(net, axes, DataPass(xs), SequentialRidge())
    with pytest.warns(UserWarning, match=r"only the constant of .*at most max_inputs=1 inputs"):
        shifted, _ = refitted(net, axes, DataPass(xs), SequentialRidge(max_inputs=1))
    errors = [(narrow(new) - wanted).square().mean() for narrow in (fitted, shifted)]
    assert errors[0] < 0.6 * errors[1]


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.up = nn.Conv2d(2, 6, 1), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.depth, self.last = nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.Conv2d(4, 6, 1)

    def forward(self, x):
        return self.depth(self.last(self.up(self.first(x).relu()).tanh()).tanh())


def test_grouped_and_transposed_convolutions_are_fitted():
    net, xs = Depthwise(), batches(8, 2, 5, 5)
    structure = trace(TracedModel.of(net, xs[0]))
    (group,) = (group for group in structure.groups if "first" in group.producers)
    axes = structure.axes({group.name: np.array([1, 2, 5])})
    narrow, contents = refitted(net, axes, DataPass(xs), SequentialRidge(strength=1e-6))
    assert {"up.weight", "last.weight", "depth.weight"} <= contents.keys()
    x = torch.cat(xs)
    inputs, targets = seen(narrow, "up", x)[0], seen(net, "up", x)[1]
    weight = narrow.up.weight.detach().requires_grad_()
    error = (F.conv_transpose2d(inputs, weight, narrow.up.bias.detach(), stride=2) - targets).square().mean()
    (gradient,) = torch.autograd.grad(error, weight)
    assert gradient.abs().max() < 1e-5 * error  # a minimum, as far as the penalty lets it


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (9,)), (nn.Conv3d, (5, 5, 5))])
def test_convolutions_over_one_and_three_dimensions_are_fitted(kind, size):
    net, xs = nn.Sequential(kind(2, 6, 3), nn.ReLU(), kind(6, 4, 2)), batches(8, 2, *size)
    narrow, _ = refitted(net, axes_of(net, xs[0], [0, 1, 4]), DataPass(xs), SequentialRidge(strength=1e-6))
    inputs, targets = seen(narrow, "2", torch.cat(xs))[0], net(torch.cat(xs)).detach()
    error = (narrow[2](inputs) - targets).square().mean()
    gradient = torch.autograd.grad(error, narrow[2].weight)[0]
    assert gradient.abs().max() < 1e-5 * error  # a minimum, as far as the penalty lets it


def test_what_cannot_be_walked_is_run_whole():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

        def forward(self, x):
            return self.net(x) * (1 if float(x.sum()) > 1e9 else 2)

    net, xs = Reads(), batches(16, 4)
    axes = axes_of(net, xs[0], [0, 2, 3])
    with pytest.warns(UserWarning, match="run as a whole for each layer"):
        narrow, _ = refitted(net, axes, DataPass(xs), SequentialRidge())
    expected, _ = refitted(net.net, axes_of(net.net, xs[0], [0, 2, 3]), DataPass(xs), SequentialRidge())
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(narrow.state_dict()[f"net.{name}"], tensor)


def test_a_stream_that_is_not_compensated_is_named():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 6)

        def forward(self, x):
            x = self.first(x) * (1 if float(x.sum()) > 1e9 else 2)
            return x + self.last(self.inner(x).relu())

    net, xs = Reads(), batches(16, 4)
    axes = {"inner.weight": {0: [0, 2]}, "inner.bias": {0: [0, 2]}, "last.weight": {1: [0, 2]}}
    with pytest.warns(UserWarning, match="whole for each layer") as warned:
        refitted(net, axes, DataPass(xs), SequentialRidge())
    once, named = (str(warning.message) for warning in warned)  # the first for the dense network only
    assert "Reads is run as a whole for each layer, which is slow" in once
    assert "does not compensate errors of the residual stream in last, since" in named


def test_layers_called_twice_and_shared_weights_stay():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.middle(self.middle(self.first(x).relu())).relu())

    net, xs = Twice(), batches(16, 4)
    axes = {"first.weight": {0: np.array([0, 2])}, "first.bias": {0: np.array([0, 2])}}
    axes |= {"middle.weight": {0: np.array([0, 2]), 1: np.array([0, 2])}, "middle.bias": {0: np.array([0, 2])}}
    axes |= {"last.weight": {1: np.array([0, 2])}}
    with pytest.warns(UserWarning, match="middle is called 2 times"):
        _, contents = refitted(net, axes, DataPass(xs), SequentialRidge())
    assert contents.keys() == {"last.weight", "last.bias"}


@pytest.mark.parametrize(("samples", "is_fitted"), [(23, False), (24, True)])
def test_a_weight_that_the_rows_do_not_determine_stays(samples, is_fitted):
    net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))
    axes = {"0.weight": {0: np.arange(6)}, "0.bias": {0: np.arange(6)}, "2.weight": {1: np.arange(6)}}
    named = r"only the constant of 2 \(23 rows for 6 inputs\).* at least 4 rows per input"
    with nullcontext() if is_fitted else pytest.warns(UserWarning, match=named):
        _, contents = refitted(net, axes, DataPass(batches(samples, 4, count=1)), SequentialRidge())
    assert contents.keys() == ({"2.weight", "2.bias"} if is_fitted else {"2.bias"})


def test_of_too_many_inputs_the_constant_alone_is_fitted():
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    axes = {"0.weight": {0: np.array([0, 2, 3])}, "0.bias": {0: np.array([0, 2, 3])}}
    axes |= {"2.weight": {1: np.array([0, 2, 3])}}
    data = DataPass(batches(2, 2, 9, 9))
    with pytest.warns(UserWarning, match=r"only the constant of 2 \(200 rows for 27 inputs\)"):
        contents = repaired(partial(copy.deepcopy, net), axes, [SequentialRidge(max_inputs=20)], data)
    expected = repaired(partial(copy.deepcopy, net), axes, [FoldMean()], data)
    assert contents.keys() == expected.keys() == {"2.bias"}
    torch.testing.assert_close(contents["2.bias"], expected["2.bias"])


@pytest.mark.parametrize("repair", [Ridge(), SequentialRidge(), Fold()], ids=lambda repair: type(repair).__name__)
def test_weights_of_inputs_that_are_constant_but_for_rounding_stay(repair):
    """The moments of 0.1 leave a variance of some 1e-18, which is no information about the inputs."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    xs = [0.1 * torch.ones(48, 4) for _ in range(3)]
    narrow, _ = refitted(net, axes_of(net, xs[0], [0, 2, 5]), DataPass(xs), repair)
    torch.testing.assert_close(narrow[2].weight, net[2].weight[:, [0, 2, 5]])
    torch.testing.assert_close(narrow(xs[0]), net(xs[0]))


def test_rows_beyond_what_a_small_layer_needs_are_left_out(monkeypatch):
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    xs = batches(8, 2, 40, 40)
    axes = axes_of(net, xs[0], [0, 1, 4])
    seen_rows = []
    real = sequential_ridge.rows_of
    monkeypatch.setattr(sequential_ridge, "rows_of", lambda *args: seen_rows.append(len(args[3])) or real(*args))
    few, _ = refitted(net, axes, DataPass(xs), SequentialRidge(rows=4096, strength=1e-6))
    assert sorted(set(seen_rows)) == [512 * inputs // len(xs) for inputs in (9, 18, 27)]
    monkeypatch.setattr(sequential_ridge, "_MOST_ROWS_PER_INPUT", 2**30)
    every, _ = refitted(net, axes, DataPass(xs), SequentialRidge(rows=4096, strength=1e-6))
    wanted = net(torch.cat(xs)).detach()
    errors = [(one(torch.cat(xs)) - wanted).square().mean() for one in (few, every)]
    assert errors[0] < 1.02 * errors[1]
