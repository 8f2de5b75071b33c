"""Shares of inputs in outputs: every kind of linear layer against its products written out one by one."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune.scoring import contributions_of
from tests.scoring.references import products, shares

# name: layer, shape of one input
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "linear on sequences": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "linear, unbatched": (lambda: nn.Linear(5, 4), (5,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 7)),
    "conv1d, no bias": (lambda: nn.Conv1d(3, 4, 3, bias=False), (2, 3, 7)),
    "conv2d, stride and padding": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=(1, 2)), (2, 3, 6, 5)),
    "conv2d, dilated": (lambda: nn.Conv2d(3, 4, (3, 2), dilation=2), (2, 3, 7, 6)),
    "conv2d, unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 5)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, (1, 3), padding="same", dilation=(1, 2)), (2, 3, 5, 6)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 5, 5)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), (2, 3, 5, 6)),
    "conv2d, reflect, same": (lambda: nn.Conv2d(3, 4, 2, padding="same", padding_mode="reflect"), (2, 3, 5, 5)),
    "conv3d, replicate": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 2, 3, 4, 3)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 4, 4)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 2, 3), (2, 3, 4)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 4, 3)),
    "transposed 2d, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, padding=(2, 0)), (2, 4, 4, 5)),
    "transposed 2d, gaps": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=3, output_padding=2), (2, 3, 3, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=2), (1, 2, 2, 3, 2)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
both_ratios = pytest.mark.parametrize("ratio", ["absolute", "signed"])


def make(name, rectified=True):
    """A layer, an input (with zeros, or of both signs) and the output, in float64."""
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    x = x.relu() if rectified else x
    return layer, x, layer(x)


def assert_equals_reference(layer, x, ratio):
    share = shares(layer, x, ratio)
    found = contributions_of(layer, x, layer(x), ratio=ratio, maximum=True)
    mass = share.sum((0, 1))
    torch.testing.assert_close(found.mass, torch.as_tensor(mass), rtol=1e-9, atol=1e-10 * abs(share).sum())
    torch.testing.assert_close(found.maximum, torch.as_tensor(share.max((0, 1))).clamp_min(0), rtol=1e-9, atol=0)
    assert int(found.outputs) == (share != 0).any((0, 2)).sum()
    return found


@both_ratios
@pytest.mark.parametrize("rectified", [True, False], ids=["rectified", "of both signs"])
@every_layer
def test_equals_the_products_one_by_one(name, rectified, ratio):
    layer, x, _ = make(name, rectified)
    found = assert_equals_reference(layer, x, ratio)
    assert found.passes == (1 if "unbatched" in name else len(x))


@pytest.mark.parametrize("name", ["linear on sequences", "conv2d, stride and padding", "transposed 2d, grouped"])
@both_ratios
@pytest.mark.parametrize("size", [1, 7, 40])
def test_maximum_does_not_depend_on_its_blocks(name, ratio, size, monkeypatch):
    monkeypatch.setattr("lightning_prune.scoring.contributions._BLOCK_CPU", size)
    layer, x, _ = make(name, rectified=False)
    assert_equals_reference(layer, x, ratio)


def test_maximum_of_a_wide_layer_needs_no_tensor_of_batch_by_outputs_by_inputs(monkeypatch):
    layer, x = nn.Linear(300, 300), torch.randn(32, 300)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)), 0)
            return out

    output = layer(x)
    with Watch():
        contributions_of(layer, x, output, maximum=True)
    assert 300 * 300 <= largest <= 2**18 < 32 * 300 * 300


POSITIONS = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=(1, 2)), (2, 4, 4, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 2, 3, 3)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, 2, padding=1, padding_mode="circular"), (2, 2, 2, 1)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (2, 3, 2, 3)),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_maximum_over_a_draw_of_positions_is_that_of_some_of_them(name):
    build, shape = POSITIONS[name]
    layer, x = build().double(), torch.rand(shape, dtype=torch.float64)
    share, transposed = shares(layer, x, "absolute"), name.startswith("transposed")
    grid = (x if transposed else layer(x)).shape[2:]
    possible = []
    for pair in itertools.combinations(range(math.prod(grid)), 2):
        chosen = torch.zeros(math.prod(grid)).index_fill(0, torch.tensor(pair), 1).view(grid)
        if transposed:
            counts = products(layer, x * chosen) != 0
        else:
            counts = chosen.expand(layer(x).shape).flatten().bool().numpy()[None, :, None]
        possible.append((share * counts).max((0, 1)))
    drawn = set()
    for seed in range(8):
        found = contributions_of(layer, x, layer(x), maximum=True, positions=2, seed=seed)
        again = contributions_of(layer, x, layer(x), maximum=True, positions=2, seed=seed)
        assert torch.equal(found.maximum, again.maximum)
        fitting = [i for i, maximum in enumerate(possible) if np.allclose(found.maximum.numpy(), maximum)]
        assert fitting
        drawn.add(fitting[0])
        torch.testing.assert_close(found.mass, torch.as_tensor(share.sum((0, 1))))  # of all positions, as ever
    assert len(drawn) > 1


def test_as_many_positions_as_there_are_is_exact():
    layer, x, out = make("conv2d, stride and padding")
    exact = contributions_of(layer, x, out, maximum=True).maximum
    for positions in (out[0, 0].numel(), 10**6):
        assert torch.equal(contributions_of(layer, x, out, maximum=True, positions=positions, seed=3).maximum, exact)


# -- the identity ----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.tuples(*[st.integers(1, 6)] * 3),
    st.sampled_from(["dense", "conv", "transposed"]),
    st.floats(0, 0.9),
    st.integers(0, 10**6),
)
def test_absolute_shares_sum_to_one(sizes, kind, zeros, seed):
    """Every output hands out exactly one, however many of its inputs are dead, and dead outputs are not counted."""
    n, inputs, outputs = sizes
    draw = torch.Generator().manual_seed(seed)
    if kind == "dense":
        layer, shape = nn.Linear(inputs, outputs), (n, inputs)
    else:
        layer = (nn.Conv1d if kind == "conv" else nn.ConvTranspose1d)(inputs, outputs, 2)
        shape = (n, inputs, 4)
    x = torch.rand(shape, generator=draw, dtype=torch.float64) + 1e-3
    x *= torch.rand(shape, generator=draw) >= zeros
    layer = layer.double()
    found = contributions_of(layer, x, layer(x))
    assert float(found.mass.sum()) == pytest.approx(int(found.outputs), rel=1e-9)
    assert (found.mass >= 0).all()
    alive = (contributions_of(layer, x, layer(x), ratio="signed", epsilon=1e-300).outputs, found.outputs)
    assert alive[0] == alive[1]


@every_layer
def test_signed_shares_sum_to_one_without_epsilon(name):
    layer, x, output = make(name, rectified=False)
    for epsilon, tolerance in ((1e-12, 1e-6), (0.5, math.inf)):
        found = contributions_of(layer, x, output, ratio="signed", epsilon=epsilon)
        assert float(found.mass.sum()) == pytest.approx(int(found.outputs), rel=tolerance)
    assert float(found.mass.sum()) < 0.99 * int(found.outputs)  # epsilon takes its part


def test_epsilon_bounds_what_a_vanishing_sum_can_claim():
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.tensor([[1.0, -1.0 + 1e-4]])
    wild = contributions_of(layer, x, layer(x), ratio="signed", epsilon=1e-9).mass
    tame = contributions_of(layer, x, layer(x), ratio="signed", epsilon=1.0).mass
    assert wild[0] > 9_000
    assert 0.9 < tame[0] < 1.1


# -- numbers that are no numbers, precision, graphs ------------------------------------------------------------------


@both_ratios
@every_layer
def test_nothing_in_nothing_out(name, ratio):
    layer, x, _ = make(name)
    layer.bias = None
    x = torch.zeros_like(x)
    found = contributions_of(layer, x, layer(x), ratio=ratio, maximum=True)
    assert int(found.outputs) == 0
    assert not found.mass.any()
    assert not found.maximum.any()


@both_ratios
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["linear", "conv2d, stride and padding", "transposed 2d"])
def test_bad_numbers_show(name, bad, ratio):
    layer, x, _ = make(name)
    x.view(-1)[-1] = bad
    found = contributions_of(layer, x, layer(x), ratio=ratio, maximum=True)
    assert not found.mass.isfinite().all()
    assert not found.maximum.isfinite().all()


def test_bad_outputs_show():
    """A sum that overflowed though no term did."""
    layer, x, output = make("linear")
    output = output.detach().clone()
    output[0, 0] = math.nan
    assert not contributions_of(layer, x, output, ratio="signed").mass.isfinite().all()


@both_ratios
@pytest.mark.parametrize("name", ["linear", "conv2d, stride and padding"])
def test_half_precision_layers_are_computed_in_single(name, ratio):
    layer, x, _ = make(name, rectified=False)
    layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
    exact = contributions_of(layer.double(), x.double(), layer(x.double()), ratio=ratio, maximum=True)
    layer = layer.to(torch.bfloat16)
    found = contributions_of(layer, x, layer(x), ratio=ratio, maximum=True)
    assert found.mass.dtype == found.maximum.dtype == torch.float32
    torch.testing.assert_close(found.mass.double(), exact.mass, rtol=1e-3, atol=1e-4 * float(exact.mass.abs().sum()))
    with torch.autocast("cpu", torch.bfloat16):
        inside = contributions_of(layer.float(), x, layer(x), ratio=ratio, maximum=True)
    torch.testing.assert_close(inside.mass, found.mass)
    torch.testing.assert_close(inside.maximum, found.maximum)


def test_signed_shares_take_the_output_as_it_is(monkeypatch):
    """No second forward pass, as long as the output has full precision."""
    layer, x, output = make("conv2d, circular", rectified=False)
    expected = contributions_of(layer, x, output, ratio="signed").mass

    def refuse(*_):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(torch, "convolution", refuse)
    assert torch.equal(contributions_of(layer, x, output, ratio="signed").mass, expected)


def test_terms_that_nobody_asks_for_are_not_computed():
    layer, x, output = make("linear")
    found = contributions_of(layer, x, output, average=False)
    assert not found.mass.any()
    assert not found.maximum.any()
    assert int(found.outputs) > 0


def test_takes_no_graph_and_leaves_none():
    layer, x, _ = make("conv1d")
    x.requires_grad_()
    found = contributions_of(layer, x, layer(x), maximum=True)
    assert not any(tensor.requires_grad for tensor in found[:3])
    assert x.grad is None
    assert layer.weight.grad is None


def test_refuses_layers_that_sum_over_nothing():
    with pytest.raises(TypeError, match=r"defined on Linear, Conv1d.*got BatchNorm1d"):
        contributions_of(nn.BatchNorm1d(3), torch.zeros(2, 3), torch.zeros(2, 3))
