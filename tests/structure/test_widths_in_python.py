"""A width that is read as a number, or a zero that is written over: frozen, never cut wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.structure import Subject, trace


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
