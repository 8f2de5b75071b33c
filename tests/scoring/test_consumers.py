"""What follows a layer: the norm, the stream that its output is added to, and where values are clipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.scoring import DataPass, Station, Walk


class After(nn.Module):
    def __init__(self, function, norm=None, shortcut=None):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.function, self.shortcut, self.last = norm, function, shortcut, nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        y = self.layer(x)
        y = y if self.norm is None else self.norm(y)
        y = y if self.shortcut is None else y + self.shortcut(x)
        return self.last(self.function(y))


def consumer(model):
    model = model.eval()
    return Walk(model, DataPass([torch.randn(3, 4)]), [Station("layer", "output")]).consumer("layer")


@pytest.mark.parametrize(
    ("function", "clip"),
    [
        (F.relu, (0, math.inf)),
        (nn.ReLU(), (0, math.inf)),
        (nn.ReLU(inplace=True), (0, math.inf)),
        (nn.ReLU6(), (0, 6)),
        (nn.Hardtanh(), (-1, 1)),
        (nn.Hardtanh(-2, 3), (-2, 3)),
        (lambda y: y.clamp(min=0), (0, math.inf)),
        (lambda y: y.clamp(-1, 2.5), (-1, 2.5)),
        (lambda y: y.clamp(max=1), (-math.inf, 1)),
        (nn.Tanh(), None),
        (nn.GELU(), None),
        (nn.LeakyReLU(), None),
        (lambda y: y, None),
        (lambda y: y.relu() + y, None),
    ],
)
@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d(4)], ids=["plain", "norm"])
def test_the_range_that_the_next_operator_keeps(function, clip, norm):
    found = consumer(After(function, norm))
    assert found.clip == clip
    assert found.norm == (None if norm is None else "norm")


@pytest.mark.parametrize("shortcut", [nn.Identity(), nn.Sequential(nn.Identity(), nn.Identity()), lambda x: x])
def test_a_stream_through_modules_without_an_operator(shortcut):
    found = consumer(After(F.relu, shortcut=shortcut))
    assert found.stream is not None
    assert found.clip == (0, math.inf)


def test_a_stream_that_is_computed_later():
    found = consumer(After(F.relu, shortcut=nn.Linear(4, 4)))
    assert found.stream is None
    assert found.clip is None
