"""Graph convolutions, which add up messages at given places, and a state-space block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.structure import Structure, TracedModel, trace
from tests.support.cutting import draw, masked, shrunk

NODES, EDGES = 7, 20


def added(x: Tensor, to: Tensor) -> Tensor:
    return x.new_zeros(NODES, x.shape[1]).index_add(0, to, x)


def scattered(x: Tensor, to: Tensor) -> Tensor:
    return x.new_zeros(NODES, x.shape[1]).scatter_add_(0, to[:, None].expand_as(x), x)


def averaged(x: Tensor, to: Tensor) -> Tensor:
    return x.new_zeros(NODES, x.shape[1]).scatter_reduce(0, to[:, None].expand_as(x), x, "mean", include_self=False)


def largest(x: Tensor, to: Tensor) -> Tensor:
    return x.new_zeros(NODES, x.shape[1]).index_reduce(0, to, x, "amax", include_self=False)


def multiplied(x: Tensor, to: Tensor) -> Tensor:
    return x.new_ones(NODES, x.shape[1]).scatter_reduce(0, to[:, None].expand_as(x), x, "prod")


def by_feature(x: Tensor, to: Tensor) -> Tensor:
    places = (to[:, None] + torch.arange(6)) % NODES  # others for every feature
    return x.new_zeros(NODES, x.shape[1]).scatter_add(0, places, x)


class Graph(nn.Module):
    """Two layers of messages along edges."""

    def __init__(self, reduce) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.reduce = reduce

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        for layer in (self.first, self.second):
            x = torch.relu(self.reduce(layer(x)[source], target))
        return self.head(x)


class Attention(nn.Module):
    """Attention over the neighbours of a node, by a softmax of sums over edges."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.features = 3, 5
        self.layer, self.head = nn.Linear(4, 15, bias=False), nn.Linear(15, 2)
        self.score = nn.Parameter(torch.randn(1, 3, 5))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        h = self.layer(x).view(-1, self.heads, self.features)
        weight = F.leaky_relu((h * self.score).sum(-1)[source]).exp()
        total = weight.new_zeros(NODES, self.heads).index_add(0, target, weight)[target]
        messages = h[source] * (weight / total)[..., None]
        out = x.new_zeros(NODES, self.heads, self.features).index_add(0, target, messages)
        return self.head(out.flatten(1).relu())


class StateSpace(nn.Module):
    """A selective scan as Mamba's, with a depthwise convolution by a function."""

    def __init__(self, width: int = 6, states: int = 3) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 2 * width), nn.Linear(width, 2)
        self.conv = nn.Conv1d(width, width, 2, groups=width, padding=1)
        self.select, self.step = nn.Linear(width, 2 * states, bias=False), nn.Linear(width, width)
        self.decay = nn.Parameter(torch.rand(width, states))
        self.skip = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.enter(x).transpose(1, 2).chunk(2, 1)
        weight = self.conv.weight.squeeze(1)
        x = F.conv1d(x, weight[:, None], self.conv.bias, padding=1, groups=len(weight))[..., : x.shape[-1]]
        x = F.silu(x).transpose(1, 2)
        entering, leaving = self.select(x).chunk(2, -1)
        step = F.softplus(self.step(x))
        state, outs = x.new_zeros(len(x), *self.decay.shape), []
        for t in range(x.shape[1]):
            keep = torch.exp(-self.decay * step[:, t, :, None])
            state = keep * state + step[:, t, :, None] * entering[:, t, None] * x[:, t, :, None]
            outs.append((state @ leaving[:, t, :, None])[..., 0])
        out = (torch.stack(outs, 1) + self.skip * x) * F.silu(gate.transpose(1, 2))
        return self.leave(out)


def example(model: nn.Module) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    if isinstance(model, StateSpace):
        return (torch.randn(2, 5, 4, dtype=torch.float64, generator=draw),)
    x = torch.randn(NODES, 4, dtype=torch.float64, generator=draw)
    return x, torch.randint(NODES, (2, EDGES), generator=draw)


def built(make) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def check(model: nn.Module) -> Structure:
    inputs = example(model)
    structure, effects = trace(TracedModel.of(model, *inputs)), [0.0]
    for seed in range(4):
        kept = draw(structure, seed)
        axes = structure.axes(kept)
        expected, dense = masked(model, axes)(*inputs).detach(), model(*inputs).detach()
        torch.testing.assert_close(shrunk(model, axes)(*inputs), expected, rtol=1e-12, atol=1e-12)
        effects.append(float((expected - dense).abs().max()))
    assert max(effects) > 1e-6 or not structure.groups
    return structure


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("reduce", [added, scattered, averaged, largest])
def test_features_of_nodes_can_leave(reduce) -> None:
    assert check(built(lambda: Graph(reduce))).widths == {"first": 6, "second": 6}


@pytest.mark.parametrize("reduce", [multiplied, by_feature])
def test_features_stay_where_zeros_would_not_be_neutral(reduce) -> None:
    structure = check(built(lambda: Graph(reduce)))
    assert structure.widths == {}
    (frozen,) = (frozen for frozen in structure.frozen if frozen.layer == "first")
    assert "meets an axis of fixed size in `scatter_" in frozen.reason


def test_features_and_heads_of_attention_over_neighbours() -> None:
    widths = check(built(Attention)).widths
    assert sorted(widths.values()) in ([5], [3], [3, 5])


def test_inner_width_and_states_of_a_state_space() -> None:
    assert check(built(StateSpace)).widths == {"enter": 6, "select": 3}
