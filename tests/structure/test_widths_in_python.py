"""A width that is read as a number, or a zero that is written over: frozen, never cut wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.structure import Subject, trace
from tests.structure.cutting import masked, shrunk


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
    ],
)
def test_is_frozen_with_a_reason(work: Callable[[nn.Module, Tensor], Tensor]) -> None:
    structure = trace(Subject.of(Between(work), torch.randn(2, 4)))
    assert structure.widths == {}
    assert {entry.layer for entry in structure.frozen} == {"first", "second"}


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
    assert trace(Subject.of(Between(work), torch.randn(2, 4))).widths == {"first": 8}


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
    structure = trace(Subject.of(model, x))
    assert structure.widths == {"first": 8}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    axes = structure.axes({"first": (1, 2, 6)})
    for found, expected in zip(shrunk(model, axes)(x), masked(model, axes)(x), strict=True):
        torch.testing.assert_close(found, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_width_among_them_does() -> None:
    structure = trace(Subject.of(Chooser(lambda h: h.shape[1] ** -0.5), torch.randn(40, 4)))
    assert structure.widths == {}
    assert "a number that depends on a width" in structure.frozen[0].reason


def test_loops_over_as_many_boxes_as_the_data_give() -> None:
    def halved(_: nn.Module, h: Tensor) -> Tensor:
        for _ in range(int((h.sum(1) > 0).sum())):
            h = h.view(len(h), 1, -1).mul(0.5).view(len(h), -1)
        return h

    torch.manual_seed(0)
    model, x = Between(halved).double(), torch.randn(8, 4, dtype=torch.float64)
    structure = trace(Subject.of(model, x))
    assert structure.widths == {"first": 8}
    axes = structure.axes({"first": (1, 4, 6)})
    reference = masked(model, axes)
    times = [int((net.first(x).sum(1) > 0).sum()) for net in (model, reference)]
    assert times[0] != times[1]
    torch.testing.assert_close(shrunk(model, axes)(x), reference(x), rtol=1e-12, atol=1e-12)
