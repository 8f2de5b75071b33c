"""Groups of a convolution get thinner, all alike, also when there is a single channel left in each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune.structure import TracedModel, trace
from tests.support.cutting import cut, masked


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("first", ["0", "1"], ids=["inputs first", "outputs first"])
def test_two_cuts_of_a_grouped_convolution(first: str, kind: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4, 4, 1, groups=2), nn.Conv2d(4, 3, 1)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    structure, kept = trace(TracedModel.of(net, x)), {"0": (0,), "1": (1,)}
    assert structure.widths == {"0": 2, "1": 2}
    expected, narrow = masked(net, structure.axes(kept)), copy.deepcopy(net)
    for name in sorted(kept, reverse=first == "1"):
        axes = structure.axes({name: kept[name]})
        cut(narrow, axes)
        structure = structure.take({name: kept[name]})
    assert narrow[1].groups == 2
    assert (narrow[1].in_channels, narrow[1].out_channels) == (2, 2)
    torch.testing.assert_close(narrow(x), expected(x), rtol=1e-12, atol=1e-12)
