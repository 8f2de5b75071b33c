"""A width that is read as a number, or a zero that is written over: frozen, never cut wrongly."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import mul

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import prune
from lightning_prune.structure import StructureError, TracedModel, trace
from tests.support.cutting import draw, masked, settle, shrunk


class Between(nn.Module):
    """Two layers with something done to what passes between them."""

    def __init__(self, work: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.work = work

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.work(self, self.first(x)))


def branch(_: nn.Module, h: Tensor) -> Tensor:
    return h.relu() if h.shape[1] > 6 else h


def channel_mask(zeros: Tensor) -> Tensor:
    zeros[:4] = 1
    return zeros


def rows(h: Tensor) -> Tensor:
    buffer = h.new_zeros(h.shape)
    for number, row in enumerate(h):
        buffer[number] = row
    return buffer


def through_alias(_: nn.Module, h: Tensor) -> Tensor:
    h.t().add_(1.0)
    return h * h.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "work",
    [
        lambda _, h: h * h.shape[1] ** -0.5,
        lambda _, h: h / h.numel(),
        lambda net, h: h * len(net.first.bias),
        lambda net, h: h * net.first.out_features,
        lambda _, h: h * torch.full((1,), float(h.shape[1])),
        lambda _, h: h * torch.tensor(float(h.shape[1])),
        branch,
        lambda _, h: h * torch.ones(h.shape).sum(1, keepdim=True),
        through_alias,
        lambda _, h: h * F.hardtanh(h, 0.5, 2.0).sum(1, keepdim=True),
        lambda _, h: h * torch.linalg.vector_norm(h, ord=-1, dim=1, keepdim=True),
        lambda _, h: h * torch.tensor([h.shape[1], 2.0])[:1],
        lambda _, h: h * torch.from_numpy(np.array([h.shape[1], 2.0], dtype=np.float32)).prod(),
        lambda _, h: torch.baddbmm(h[None], h[None], torch.eye(8)[None], beta=h.shape[1] ** -0.5)[0],
        lambda _, h: h * F.layer_norm(torch.arange(3.0), (3,), eps=1 / h.shape[1])[0],
        lambda _, h: h * torch.arange(9.0).topk(h.shape[1] // 2)[0].sum(),
        lambda _, h: h * F.adaptive_max_pool2d(torch.arange(81.0).view(1, 9, 9), h.shape[1] // 2).mean(),
        lambda _, h: h * sum(h.detach()[0].exp() for _ in range(h.shape[1])),
        lambda _, h: h * torch.arange(20.0)[h.shape[1] :][:1],
        lambda _, h: h * (h.new_zeros(h.shape) + 1).sum(1, keepdim=True),
        lambda _, h: h * (~torch.zeros(h.shape, dtype=torch.bool)).sum(1, keepdim=True),
        lambda _, h: h * torch.ones(2, 1).expand_as(h).sum(1, keepdim=True),
        lambda _, h: h * (torch.ones(2, 1).expand_as(h) @ torch.ones(1, 1).expand(h.shape[1], 1)),
        lambda _, h: h * torch.ones(1).repeat(h.shape[1]).sum(),
        lambda _, h: h * h[:, :, None].expand(-1, -1, h.shape[1]).flatten(1).sum(1, keepdim=True),
        lambda _, h: h * h.repeat(1, h.shape[1]).sum(1, keepdim=True),
        lambda _, h: h + h[:, h.shape[1] // 3 :].sum(1, keepdim=True),
        lambda _, h: h * channel_mask(h.new_zeros(h.shape[1])),
        lambda _, h: h * F.pad(h.new_zeros(4) + 1, (0, h.shape[1] - 4)),
        lambda _, h: h * rows(h.sigmoid()).mean(1, keepdim=True),
    ],
    ids=[
        "scale",
        "numel",
        "length",
        "attribute",
        "full",
        "tensor",
        "branch",
        "ones",
        "alias",
        "hardtanh",
        "negative order",
        "two numbers",
        "numbers from numpy",
        "scale of a product",
        "epsilon",
        "largest few",
        "size of a pooling",
        "loop",
        "bound on a constant",
        "zeros and one, counted",
        "true bits, counted",
        "expanded, counted",
        "expanded, multiplied out",
        "repeated, counted",
        "merged, counted",
        "tiled, counted",
        "bound at no equal part",
        "mask in part",
        "mask padded",
        "rows written one by one",
    ],
)
def test_is_frozen_with_a_reason(work: Callable[[nn.Module, Tensor], Tensor]) -> None:
    structure = trace(TracedModel.of(Between(work), torch.randn(2, 4)))
    assert structure.widths == {}
    assert {entry.layer for entry in structure.frozen} == {"first", "second"}


def middle_cleared(_: nn.Module, h: Tensor) -> Tensor:
    h, length = h.clone(), h.shape[1] // 4
    h[:, length : 2 * length].zero_()
    return h


@pytest.mark.parametrize(
    ("work", "width"),
    [
        (lambda _, h: h + h[:, h.shape[1] // 2 :].sum(1, keepdim=True), 4),
        (lambda _, h: torch.cat((-h[:, h.shape[1] // 2 :], h[:, : h.shape[1] // 2]), dim=1), 4),
        (middle_cleared, 2),
        (lambda _, h: h[:, :4].repeat(1, 2), 4),
    ],
    ids=["second half", "halves exchanged", "second quarter of four", "half by a number, of the others"],
)
def test_equal_parts_by_slices_lose_the_same_units(work: Callable[[nn.Module, Tensor], Tensor], width: int) -> None:
    torch.manual_seed(0)
    model, x = Between(work).double(), torch.randn(2, 4, dtype=torch.float64)
    structure = trace(TracedModel.of(model, x))
    assert structure.widths == {"first": width}
    for seed in range(3):
        axes = structure.axes(draw(structure, seed))
        torch.testing.assert_close(shrunk(model, axes)(x), masked(model, axes)(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "work",
    [
        lambda _, h: h * 0.5,
        lambda _, h: h * F.hardtanh(h, -1.0, 2.0).sum(1, keepdim=True),
        lambda _, h: h * torch.linalg.vector_norm(h, dim=1, keepdim=True),
        lambda _, h: h + torch.zeros(h.shape),
    ],
    ids=["constant", "hardtanh", "norm", "zeros"],
)
def test_what_does_not_depend_on_a_width_is_not(work: Callable[[nn.Module, Tensor], Tensor]) -> None:
    assert trace(TracedModel.of(Between(work), torch.randn(2, 4))).widths == {"first": 8}


class Chooser(nn.Module):
    """Chooses rows by their numbers, as detectors do: sizes that no fake tensor knows."""

    def __init__(self, scale: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.scale = scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x).relu()
        out = self.second(h * self.scale(h))
        return out, torch.arange(int((out[:, 0] > out[:, 1]).sum()))


def test_sizes_that_depend_on_data_freeze_nothing() -> None:
    model, x = Chooser(lambda _: 1.0), torch.randn(40, 4)
    structure = trace(TracedModel.of(model, x))
    assert structure.widths == {"first": 8}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    axes = structure.axes({"first": (1, 2, 6)})
    for found, expected in zip(shrunk(model, axes)(x), masked(model, axes)(x), strict=True):
        torch.testing.assert_close(found, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_width_among_them_does() -> None:
    structure = trace(TracedModel.of(Chooser(lambda h: h.shape[1] ** -0.5), torch.randn(40, 4)))
    assert structure.widths == {}
    assert "a number that depends on a width" in structure.frozen[0].reason


def test_loops_over_as_many_boxes_as_the_data_give() -> None:
    def halved(_: nn.Module, h: Tensor) -> Tensor:
        for _ in range(int((h.sum(1) > 0).sum())):
            h = h.view(len(h), 1, -1).mul(0.5).view(len(h), -1)
        return h

    torch.manual_seed(0)
    model, x = Between(halved).double(), torch.randn(8, 4, dtype=torch.float64)
    structure = trace(TracedModel.of(model, x))
    assert structure.widths == {"first": 8}
    axes = structure.axes({"first": (1, 4, 6)})
    reference = masked(model, axes)
    times = [int((net.first(x).sum(1) > 0).sum()) for net in (model, reference)]
    assert times[0] != times[1]
    torch.testing.assert_close(shrunk(model, axes)(x), reference(x), rtol=1e-12, atol=1e-12)


class Picture(nn.Module):
    """A convolution, and what is made of it beside a head."""

    def __init__(self, work: Callable[[nn.Module, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 3)
        self.tokens = nn.Linear(36, 5)
        self.norm = nn.LayerNorm(36)
        self.kernel = nn.Parameter(torch.randn(width, width, 1, 1))
        self.work = work

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return self.second(y.mean((2, 3))), self.work(self, y)


def doubled(part: Tensor, whole: Tensor) -> Tensor:
    part.mul_(2)
    return whole.sum(1)


def assigned(tensor: Tensor, given: Tensor) -> Tensor:
    tensor.data = given.data
    return tensor


def overwritten(y: Tensor) -> Tensor:
    torch.exp(y.detach(), out=y.detach())
    return y.sum(1)


@pytest.mark.parametrize(
    ("work", "free"),
    [
        (lambda _, y: torch.cat([y[:, :-3].relu(), y[:, -3:]], 1).sum((2, 3)) @ _.second.weight.T, 5),
        (lambda _, y: doubled(y[:, -3:], y), 5),
        (lambda _, y: y[:, :-3].sum(1), 5),
        (lambda _, y: y[:, 2:-3].sum(1), 3),
        (lambda _, y: y[:, -4:].square().sum(1), 4),
        (lambda _, y: y[:, : y.shape[1] - 3].sum(1), 0),
        (lambda _, y: torch.einsum("nchw,nchw->nc", y.sigmoid(), y.sigmoid()).sum(1), 0),
        (lambda _, y: torch.einsum("nchw,nchw->nc", y, y.sigmoid()).sum(1), 8),
        (lambda _, y: F.conv2d(y.sigmoid(), _.kernel.exp()).mean(1), 0),
        (lambda _, y: F.conv2d(y.sigmoid(), _.kernel.exp()[:, :1], groups=len(_.kernel)).mean(1), 0),
        (lambda _, y: _.tokens(y.flatten(2)).sum(1), 0),
        (lambda _, y: _.norm(y.flatten(2)).sum(1), 0),
        (lambda _, y: (y[:, :, None] * y[:, None].sigmoid()).sum(2).mean((2, 3)) @ _.second.weight.T, 0),
        (lambda _, y: F.pad(y.sigmoid(), (1, 1, 1, 1), mode="circular").mean(1), 0),
        (lambda _, y: F.conv2d(F.pad(y.sigmoid(), (1, 1, 1, 1), mode="circular"), _.kernel[:2]), 8),
        (lambda _, y: overwritten(y), 0),
        (lambda _, y: _.second(assigned(y.tanh(), F.conv2d(y, _.kernel).flip(1)).mean((2, 3))), 8),
        (lambda _, y: F.conv2d(y, assigned(_.kernel, _.kernel.flip(1))).sum(1), 4),
        (lambda _, y: F.conv2d(y, assigned(_.kernel, _.kernel[:4])).sum(1), 0),
        (lambda _, y: _.second(y.tanh().detach().set_(F.conv2d(y, _.kernel).detach()).mean((2, 3))), 0),
    ],
    ids=[
        "halves from the end",
        "doubled from the end",
        "all but the last",
        "between two bounds",
        "the last squared",
        "bound by the width",
        "channel by channel",
        "channel by channel, one side zero",
        "computed kernel",
        "computed depthwise kernel",
        "bias for every channel",
        "norm for every channel",
        "outer product",
        "circular, averaged",
        "circular, convolved",
        "out",
        "activations assigned by data",
        "weights assigned by data",
        "weights of another shape assigned by data",
        "set",
    ],
)
def test_is_cut_exactly_or_not_at_all(work: Callable[[nn.Module, Tensor], Tensor], free: int) -> None:
    torch.manual_seed(0)
    model, x = settle(Picture(work)), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    structure = trace(TracedModel.of(model, x))
    assert structure.widths.get("first", 0) == free
    for seed in range(4):
        axes = structure.axes(draw(structure, seed))
        for found, expected in zip(shrunk(model, axes)(x), masked(model, axes)(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def twice(y: Tensor) -> Tensor:
    return torch.cat([y, y.tanh()], 1)


def normed(net: nn.Module, y: Tensor, groups: int) -> Tensor:
    return F.group_norm(twice(y), groups, twice(net.second.weight[:1])[0], twice(net.second.weight[1:2])[0]).sum(1)


@pytest.mark.parametrize(
    ("work", "width"),
    [
        (lambda _, y: y * y.shape[1] ** -0.5, 2),
        (lambda _, y: reduce(mul, y.split(2, 1)).sum(1), 8),
        (lambda net, y: normed(net, y, y.shape[1]), 2),
        (lambda net, y: normed(net, y, y.shape[1]), 8),
        (lambda _, y: twice(y).unflatten(1, (y.shape[1], -1)).prod(2).sum(1), 2),
        (lambda _, y: twice(y).unflatten(1, (-1, y.shape[1])).prod(1).sum(1), 2),
        (lambda _, y: reduce(mul, twice(y).chunk(y.shape[1], 1)).sum(1), 2),
        (lambda _, y: twice(y)[:, y.shape[1] // 2 : -1].sum(1), 2),
        (lambda _, y: y.repeat(1, y.shape[1], 1, 1).prod(1), 2),
        (lambda _, y: (y.flatten(2) @ y.flatten(2).transpose(1, 2)).tril().sum(1), 2),
    ],
    ids=["scale", "parts", "groups", "groups of eight", "rows", "columns", "chunks", "slice", "repeated", "triangle"],
)
def test_units_in_pairs_are_compared_too(work: Callable[[nn.Module, Tensor], Tensor], width: int) -> None:
    assert "first" not in trace(TracedModel.of(Picture(work, width), torch.randn(2, 3, 6, 6))).widths


@pytest.mark.parametrize(
    "work",
    [lambda _, y: y.tanh() if y.shape[1] >= 12 else y, lambda _, y: y / min(8, y.shape[1])],
    ids=["branch", "bounded"],
)
def test_what_shows_only_at_smaller_widths_stops_the_cut(work: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = Picture(lambda net, y: net.second(work(net, y).mean((2, 3))), 32), torch.randn(2, 3, 6, 6)
    prune(model, x, pruning_ratio=0.25, layers="first")
    assert model.first.out_channels == 24
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StructureError, match=r"widths of this cut \(first: [67]\).*`ignore`"):
        prune(model, x, pruning_ratio=0.8, layers="first")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "work",
    [lambda _, y: y.tanh() if y.shape[1] > 1 else y, lambda _, y: y * (1.0 if y.shape[1] > 1 else 0.5)],
    ids=["branch", "scale"],
)
def test_what_shows_only_at_one_unit_stops_the_cut(work: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = Picture(lambda net, y: net.second(work(net, y).mean((2, 3))), 8), torch.randn(2, 3, 6, 6)
    prune(model, x, pruning_ratio=0.75, layers="first")
    assert model.first.out_channels == 2
    model = Picture(lambda net, y: net.second(work(net, y).mean((2, 3))), 8)
    with pytest.raises(StructureError, match=r"widths of this cut \(first: 1\): its code calls other functions"):
        prune(model, x, pruning_ratio=0.875, layers="first")
    assert model.first.out_channels == 8
