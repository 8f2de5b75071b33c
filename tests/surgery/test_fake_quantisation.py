"""Rounding in forward passes: equal to a naive reference, and it leaves the network as it was."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import FakeQuantisation
from lightning_prune.surgery.compiled import is_compiled


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 3)),
    )


LAYERS = ["0", "4", "6"]
BATCHES = [torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def naive_weight(weight: Tensor, top: int) -> Tensor:
    rounded = weight.detach().clone()
    for channel in rounded:
        step = max(float(channel.abs().max()) / top, 1e-12)
        channel.copy_((channel / step).round().clamp(-top, top) * step)
    return rounded


def naive_inputs(x: Tensor, low: float, high: float) -> Tensor:
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    zero = min(max(round(-128 - low / step), -128), 127)
    return ((x / step).round() + zero).clamp(-128, 127).sub(zero) * step


def between(integers: Tensor, step: float) -> Tensor:
    """Values that round to these integers on any machine: a quarter of a step away."""
    return (integers + 0.25) * step


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (9, 6)),
        (nn.Linear(6, 5), (3, 4, 6)),
        (nn.Conv1d(4, 5, 3), (2, 4, 8)),
        (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 6, 6)),
        (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    ],
)
def test_equals_the_naive_reference(layer: Any, shape: tuple[int, ...], bits: int, top: int) -> None:
    torch.manual_seed(0)
    weight = between(torch.randint(-top + 1, top - 1, layer.weight.shape), 1 / 32)
    weight.flatten(1)[:, 0] = top / 32  # the largest of each channel gives the step
    x = between(torch.randint(-128, 128, shape), 1 / 16)
    x.flatten()[:2] = between(torch.tensor([-128, 127]), 1 / 16)
    net, rounding = copy.deepcopy(layer), FakeQuantisation(bits)
    net.weight.data = weight.clone()
    rounding.attach(net)
    found = net(x)
    assert rounding.ranges == {"": (float(x.min()), float(x.max()))}
    layer = copy.deepcopy(layer)
    layer.weight.data = naive_weight(weight, top)
    torch.testing.assert_close(layer.weight.data * 32, (weight * 32).floor())
    torch.testing.assert_close(found, layer(naive_inputs(x, float(x.min()), float(x.max()))))
    assert torch.equal(net.eval()(x), found)
    outside = net(10 * x)  # in eval mode, ranges stay
    torch.testing.assert_close(outside, layer(naive_inputs(10 * x, float(x.min()), float(x.max()))))


def test_ranges_are_moving_averages_over_training_batches() -> None:
    net, rounding = nn.Linear(3, 2), FakeQuantisation()
    rounding.attach(net)
    batches = [torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    low, high = float(batches[0].min()), float(batches[0].max())
    for x in batches:
        net(x)
        low, high = low + 0.01 * (float(x.min()) - low), high + 0.01 * (float(x.max()) - high)
    assert rounding.ranges[""] == pytest.approx((low, high), rel=1e-5)


def test_gradients_pass_through_the_rounding() -> None:
    """Those of a linear layer: of the weight, by the rounded inputs; of the inputs, by the rounded weight."""
    torch.manual_seed(0)
    layer, x, down = nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True), torch.randn(5, 3)
    rounding = FakeQuantisation()
    rounding.attach(layer)
    layer(x).backward(down)
    torch.testing.assert_close(layer.weight.grad, down.T @ naive_inputs(x.detach(), *rounding.ranges[""]))
    torch.testing.assert_close(x.grad, down @ naive_weight(layer.weight, 127))


def test_the_network_stays_as_it_is() -> None:
    net, rounding = network(), FakeQuantisation()
    before, x = {name: value.clone() for name, value in net.state_dict().items()}, BATCHES[0]
    net.eval()
    expected = net(x)
    rounding.attach(net)
    assert not torch.equal(net(x), expected)  # weights are rounded
    with pytest.raises(RuntimeError):
        net(torch.randn(8, 3, 4, 4))  # an error in a layer leaves nothing behind, either
    assert {name for name, _ in net.named_parameters()} <= set(net.state_dict()) == set(before)
    rounding.detach()
    assert not any("weight" in vars(module) for module in net.modules())
    assert torch.equal(net(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_layer_that_is_not_called_in_training_has_no_range() -> None:
    net, rounding = network(), FakeQuantisation()
    rounding.attach(net)
    net.eval()
    net(BATCHES[0])
    assert rounding.ranges == {}
    rounding.detach()
    with pytest.raises(ValueError, match="got Sequential that was not trained with it"):
        rounding.fix(net)


def test_averages_over_processes() -> None:
    """A layer that only one of two processes has called keeps its range."""
    nets, roundings = [network(), network()], [FakeQuantisation(), FakeQuantisation()]
    for net, rounding, x in zip(nets, roundings, BATCHES, strict=False):
        rounding.attach(net)
        net(x)
    first, second = (rounding.ranges for rounding in roundings)
    del roundings[1]._ranges["6"]
    sums: list[Tensor] = []
    roundings[1].average(lambda tensor: sums.append(tensor) or tensor)
    parts = iter(sums)
    roundings[0].average(lambda tensor: (tensor + next(parts)) / 2)
    expected = {name: [(a + b) / 2 for a, b in zip(first[name], second[name], strict=True)] for name in LAYERS[:2]}
    for name, (low, high) in roundings[0].ranges.items():
        assert [low, high] == pytest.approx(expected.get(name, first[name]))


def test_stored_and_read() -> None:
    net, rounding = network(), FakeQuantisation(4)
    rounding.attach(net)
    net(BATCHES[0])
    stored = io.BytesIO()
    torch.save(rounding.to_plain(), stored)
    stored.seek(0)
    read = FakeQuantisation.from_plain(torch.load(stored, weights_only=True))
    assert (read.ranges, read.weight_bits, read.is_attached) == (rounding.ranges, 4, False)


@pytest.mark.parametrize(
    "changed",
    [{"format": 2}, {"weight_bits": 5}, {"ranges": None}, {"ranges": {"0": [1.0]}}, {"ranges": {"0": ["a", 1]}}],
)
def test_damaged_values(changed: dict[str, Any]) -> None:
    plain = {"format": 1, "weight_bits": 8, "ranges": {"0": [0.0, 1.0]}}
    assert FakeQuantisation.from_plain(plain).ranges == {"0": (0.0, 1.0)}
    with pytest.raises(ValueError, match="expected ranges of format 1"):
        FakeQuantisation.from_plain(plain | changed)


def compiled() -> nn.Module:
    net: Any = network()
    net.compile()
    assert is_compiled(net)
    return net


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "expected linear or convolutional layers in Sequential, found none"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "that of '' is computed"),
        (compiled, "expected a network that is not compiled"),
    ],
)
def test_refusals(make: Any, match: str) -> None:
    net = make()
    with pytest.raises(ValueError, match=match):
        FakeQuantisation().attach(net)
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("bits", [2, 16, "8"])
def test_bits(bits: Any) -> None:
    with pytest.raises(ValueError, match="`weight_bits` of 4 or 8"):
        FakeQuantisation(bits)


def test_another_network() -> None:
    net, rounding = network(), FakeQuantisation()
    rounding.attach(net)
    net(BATCHES[0])
    rounding.detach()
    with pytest.raises(ValueError, match="expected the network that was trained with it, got Linear without '0'"):
        rounding.fix(nn.Linear(2, 2))
