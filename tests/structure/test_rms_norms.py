"""Root-mean-square norms that networks write themselves: recognised by their results, cut like layer norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.structure import TracedModel, trace
from lightning_prune.structure.rms_norms import rms_norms
from tests.support.cutting import shrunk


class Norm(nn.Module):
    """As in Llama: computed in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.to(torch.float32)
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * values.to(x.dtype)


class OneMore(Norm):
    """As in Gemma: one is added to the weight."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


class Double(Norm):
    def forward(self, x):
        return x / (torch.mean(x * x, -1, True) + self.eps).sqrt() * self.weight


class Centred(Norm):
    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class OfAFixedWidth(Norm):
    """Right at the width that it was built with only."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = width**0.5

    def forward(self, x):
        return x / x.square().sum(-1, keepdim=True).sqrt() * self.scale * self.weight


class Gate(Norm):
    """Not a norm, with a mean."""

    def forward(self, x):
        return x * x.pow(2).mean(-1, keepdim=True) * self.weight


class Fails(Norm):
    def forward(self, x):
        raise RuntimeError("takes something else")


def network(norm: type[nn.Module], width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, width), norm(width), nn.Linear(width, width), nn.GELU(), norm(width), nn.Linear(width, 3)
    )


@pytest.mark.parametrize("norm", [Norm, OneMore, Double, nn.RMSNorm])
def test_a_cut_equals_a_narrower_network(norm: type[nn.Module]) -> None:
    net = network(norm)
    x = torch.randn(4, 7, 5)
    assert rms_norms(net) == {"1", "4"}
    before = copy.deepcopy(net.state_dict())
    structure = trace(TracedModel.of(net, x))
    assert {name: net.state_dict()[name].equal(value) for name, value in before.items()} == dict.fromkeys(before, True)
    assert structure.widths == {"0": 8, "2": 8}
    kept = {"0": [0, 2, 3, 7], "2": [1, 2, 5, 6]}
    narrow, expected = shrunk(net, structure.axes(kept)), network(norm, 4)
    own, first, second = net.state_dict(), kept["0"], kept["2"]
    expected.load_state_dict(
        {
            "0.weight": own["0.weight"][first], "0.bias": own["0.bias"][first], "1.weight": own["1.weight"][first],
            "2.weight": own["2.weight"][second][:, first], "2.bias": own["2.bias"][second],
            "4.weight": own["4.weight"][second], "5.weight": own["5.weight"][:, second], "5.bias": own["5.bias"],
        }
    )  # fmt: skip
    assert torch.equal(narrow(x), expected(x))


@pytest.mark.parametrize("norm", [Centred, OfAFixedWidth, Gate])
def test_what_only_looks_like_one_stays_frozen(norm: type[nn.Module]) -> None:
    net = network(norm)
    assert rms_norms(net) == frozenset()
    structure = trace(TracedModel.of(net, torch.randn(4, 5)))
    assert structure.widths == {}
    assert any(
        "in `mean`" in one.reason or "in `sum`" in one.reason or "trial" in one.reason for one in structure.frozen
    )


def test_other_modules_are_none() -> None:
    others = nn.ModuleList(
        [
            Fails(8),
            nn.LayerNorm(8),
            nn.LayerNorm(8, bias=False),
            nn.PReLU(8),
            nn.Linear(8, 8, bias=False),
            nn.BatchNorm1d(8),
        ]
    )
    assert rms_norms(others) == frozenset()


def test_in_half_precision() -> None:
    assert rms_norms(network(Norm).bfloat16()) == {"1", "4"}


def test_hooks_do_not_see_the_random_numbers() -> None:
    net, seen = network(Norm), []
    net[1].register_forward_hook(lambda *args: seen.append(args))
    assert rms_norms(net) == {"1", "4"}
    assert not seen


class OfChannels(Norm):
    """Over the channels of images, as timm's RmsNorm2d; vectors come out as something else."""

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps)
        return x * self.weight[:, None, None]


def test_norms_over_channels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), OfChannels(8), nn.Conv2d(8, 2, 1))
    assert rms_norms(net) == {"1"}
    x, kept = torch.randn(2, 3, 4, 4), (0, 3, 5)
    structure = trace(TracedModel.of(net, x))
    assert structure.widths == {"0": 8}
    norm = OfChannels(3)
    norm.weight.data = net[1].weight.data[list(kept)]
    hidden = F.conv2d(x, net[0].weight[list(kept)], net[0].bias[list(kept)])
    expected = F.conv2d(norm(hidden), net[2].weight[:, list(kept)], net[2].bias).detach()
    torch.testing.assert_close(shrunk(net, structure.axes({"0": kept}))(x), expected)
