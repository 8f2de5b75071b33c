"""Norms over units that networks write themselves: recognised by their results, cut like layer norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.structure import TracedModel, trace
from lightning_prune.structure.own_norms import own_layer_norms, own_norms
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
    assert own_norms(net) == {"1", "4"}
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


class WithBias(Centred):
    """A layer norm as in the paper, with other names; the shift may be a buffer of zeros."""

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.gamma, self.beta = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + 1e-6) * self.gamma + self.beta


class WithBuffer(WithBias):
    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.gamma = nn.Parameter(torch.randn(width))
        self.register_buffer("beta", torch.zeros(width))


class OfDeviation(WithBias):
    """As in "The Annotated Transformer": the deviation of a sample."""

    def forward(self, x):
        return self.gamma * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.beta


class WithoutMean(Norm):
    """As in Restormer: divided by the deviation, and not centred."""

    def forward(self, x):
        return x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * self.weight


class OfImages(WithBias):
    """As in ConvNeXt, over channels."""

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        return self.gamma[:, None, None] * ((x - u) / torch.sqrt(s + 1e-6)) + self.beta[:, None, None]


OWN = [Centred, WithBias, WithBuffer, OfDeviation, WithoutMean, OfImages]


def layers(norm: type[nn.Module], width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    if norm is OfImages:
        return nn.Sequential(nn.Conv2d(5, width, 1), norm(width), nn.GELU(), nn.Conv2d(width, 3, 1)).double()
    return nn.Sequential(nn.Linear(5, width), norm(width), nn.GELU(), nn.Linear(width, 3)).double()


@pytest.mark.parametrize("norm", OWN)
def test_a_cut_layer_norm_equals_a_narrower_one(norm: type[nn.Module]) -> None:
    net, x = layers(norm), torch.randn(4, 5, 6, 5, dtype=torch.float64)
    x = x.transpose(1, 3) if norm is OfImages else x
    assert own_norms(net) == own_layer_norms(net) == {"1"}
    structure = trace(TracedModel.of(net, x))
    assert structure.widths == {"0": 8}
    for kept in ([0, 3, 5], [1, 6]):
        narrow, expected = shrunk(net, structure.axes({"0": kept})), layers(norm, len(kept))
        own = net.state_dict()
        weights = {name: own[name][kept] for name in own if not name.startswith("3.")}
        expected.load_state_dict({**weights, "3.weight": own["3.weight"][:, kept], "3.bias": own["3.bias"]})
        torch.testing.assert_close(narrow(x), expected(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", OWN)
def test_on_real_numbers(norm: type[nn.Module]) -> None:
    """The masked network, which a trial compares a cut with, leaves removed units out of its statistics."""

    class Kept(norm):  # type: ignore[misc,valid-type]
        def forward(self, x):
            chosen = super().forward(x)
            return chosen[chosen.flatten(1).sum(1) > -1e9]  # a size that depends on data

    net, x = layers(Kept), torch.randn(4, 5, 6, 5, dtype=torch.float64)
    if norm is OfImages:
        net, x = nn.Sequential(nn.Conv2d(5, 8, 1), Kept(8), nn.GELU(), nn.Conv2d(8, 3, 1)).double(), x.transpose(1, 3)
    assert own_norms(net) == {"1"}
    structure = trace(TracedModel.of(net, x))
    assert any("real tensors" in remark for remark in structure.remarks)
    assert structure.widths == {"0": 8}


@pytest.mark.parametrize("norm", [OfAFixedWidth, Gate])
def test_what_only_looks_like_one_stays_frozen(norm: type[nn.Module]) -> None:
    net = network(norm)
    assert own_norms(net) == frozenset()
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
    assert own_norms(others) == frozenset()


def test_in_half_precision() -> None:
    assert own_norms(network(Norm).bfloat16()) == {"1", "4"}


def test_hooks_do_not_see_the_random_numbers() -> None:
    net, seen = network(Norm), []
    net[1].register_forward_hook(lambda *args: seen.append(args))
    assert own_norms(net) == {"1", "4"}
    assert not seen


class OfChannels(Norm):
    """Over the channels of images, as timm's RmsNorm2d; vectors come out as something else."""

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps)
        return x * self.weight[:, None, None]


def test_norms_over_channels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), OfChannels(8), nn.Conv2d(8, 2, 1))
    assert own_norms(net) == {"1"}
    x, kept = torch.randn(2, 3, 4, 4), (0, 3, 5)
    structure = trace(TracedModel.of(net, x))
    assert structure.widths == {"0": 8}
    norm = OfChannels(3)
    norm.weight.data = net[1].weight.data[list(kept)]
    hidden = F.conv2d(x, net[0].weight[list(kept)], net[0].bias[list(kept)])
    expected = F.conv2d(norm(hidden), net[2].weight[:, list(kept)], net[2].bias).detach()
    torch.testing.assert_close(shrunk(net, structure.axes({"0": kept}))(x), expected)


class ResponseNorm(nn.Module):
    """As in ConvNeXt V2, with channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(self.shape(width))) for _ in range(2))

    def shape(self, width: int) -> tuple[int, ...]:
        return 1, 1, 1, width

    def forward(self, x):
        norms = torch.linalg.vector_norm(x, ord=2, dim=(1, 2), keepdim=True)
        return self.weight * (x * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6))) + self.bias + x


class OfSecond(ResponseNorm):
    """With channels second, and one axis for its weights, the shift first."""

    def shape(self, width: int) -> tuple[int, ...]:
        return (width,)

    def forward(self, x):
        norms = x.norm(p=2, dim=(2, 3), keepdim=True)
        shift, scale = (own.view(1, -1, 1, 1) for own in (self.weight, self.bias))
        return x + torch.addcmul(shift, scale, x * (norms / norms.mean(dim=1, keepdim=True).add(1e-6)))


class WithoutTheInput(ResponseNorm):
    def forward(self, x):
        return super().forward(x) - x


def blocks(norm: type[nn.Module], width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    if norm is OfSecond:
        return nn.Sequential(nn.Conv2d(3, width, 1), nn.GELU(), norm(width), nn.Conv2d(width, 2, 1)).double()
    return nn.Sequential(nn.Linear(3, width), nn.GELU(), norm(width), nn.Linear(width, 2)).double()


@pytest.mark.parametrize("norm", [ResponseNorm, OfSecond])
def test_a_cut_response_norm_equals_a_narrower_one(norm: type[nn.Module]) -> None:
    net = blocks(norm)
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    assert own_norms(net) == {"2"}
    structure = trace(TracedModel.of(net, x))
    assert structure.widths == {"0": 8}
    for kept in ([0, 3, 5], [6]):
        narrow, expected = shrunk(net, structure.axes({"0": kept})), blocks(norm, len(kept))
        own = net.state_dict()
        expected.load_state_dict(
            {
                "0.weight": own["0.weight"][kept], "0.bias": own["0.bias"][kept],
                "2.weight": own["2.weight"][..., kept], "2.bias": own["2.bias"][..., kept],
                "3.weight": own["3.weight"][:, kept], "3.bias": own["3.bias"],
            }
        )  # fmt: skip
        torch.testing.assert_close(narrow(x), expected(x), rtol=1e-12, atol=1e-12)


def test_another_norm_of_responses_stays_frozen() -> None:
    net = blocks(WithoutTheInput)
    assert own_norms(net) == frozenset()
    structure = trace(TracedModel.of(net, torch.randn(2, 3, 3, 3, dtype=torch.float64)))
    assert structure.widths == {}
    assert any("reduced over in `mean`" in frozen.reason for frozen in structure.frozen)
