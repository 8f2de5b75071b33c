"""Channels that a convolution takes as positions: by itself each, or mixed with their neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.structure import Structure, TracedModel, trace
from tests.support.cutting import draw, masked, shrunk

TOKENS, WIDTH = 4, 6


class Mixer(nn.Module):
    """A convolution over (batch, tokens, channels) on a residual stream."""

    def __init__(self, convolution: Any, dims: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mix, self.last = nn.Linear(3, WIDTH), convolution(), nn.Linear(WIDTH, 2)
        self.dims = dims
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.mix(x if self.dims == 1 else x.mT[:, None])
        out: Tensor = self.last(x + (y if self.dims == 1 else y[:, 0].mT))
        return out


def _example() -> Tensor:
    return torch.randn(2, TOKENS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _traced(model: nn.Module) -> Structure:
    return trace(TracedModel.of(model, _example()))


SINGLE = {
    "with bias": lambda: Mixer(lambda: nn.Conv1d(TOKENS, TOKENS, 1)),
    "without bias": lambda: Mixer(lambda: nn.Conv1d(TOKENS, TOKENS, 1, bias=False)),
    "inner width": lambda: Mixer(lambda: nn.Sequential(nn.Conv1d(TOKENS, 5, 1), nn.ReLU(), nn.Conv1d(5, TOKENS, 1))),
    "depthwise": lambda: Mixer(lambda: nn.Conv1d(TOKENS, TOKENS, 1, groups=TOKENS)),
    "transposed": lambda: Mixer(lambda: nn.ConvTranspose1d(TOKENS, TOKENS, 1)),
    "along the other axis": lambda: Mixer(lambda: nn.Conv2d(1, 1, (1, 3), padding=(0, 1)), 2),
}


@pytest.mark.parametrize("build", SINGLE.values(), ids=SINGLE)
def test_a_kernel_of_one_takes_each_channel_by_itself(build: Any) -> None:
    model, x = build(), _example()
    structure = _traced(model)
    assert structure.widths["stem"] == WIDTH
    for seed in range(3):
        kept = draw(structure, seed)
        axes = structure.axes(kept)
        small = shrunk(model, axes)
        torch.testing.assert_close(small(x), masked(model, axes)(x), rtol=1e-12, atol=1e-12)
        with FlopCounterMode(display=False) as counter:
            small(x[:1])
        predicted = structure.cost.macs({name: len(units) for name, units in kept.items()})
        assert predicted == counter.get_total_flops() // 2


MIXED = {
    "kernel": lambda: Mixer(lambda: nn.Conv1d(TOKENS, TOKENS, 3, padding=1)),
    "padding": lambda: Mixer(lambda: nn.Sequential(nn.Conv1d(TOKENS, TOKENS, 1, padding=1), nn.MaxPool1d(3, 1))),
    "both axes": lambda: Mixer(lambda: nn.Conv2d(1, 1, 3, padding=1), 2),
}


@pytest.mark.parametrize("build", MIXED.values(), ids=MIXED)
def test_channels_that_are_mixed_with_their_neighbours_stay(build: Any) -> None:
    structure = _traced(build())
    assert "stem" not in structure.widths
    reasons = {frozen.tensor: frozen.reason for frozen in structure.frozen}
    assert reasons["stem.weight"].startswith("neighbours are mixed by `convolution` in `mix")


class ChannelAttention(nn.Module):
    """Efficient channel attention (ECA), whose kernel runs along the channels, in a block with an inner width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 1)
        self.conv, self.last = nn.Conv1d(1, 1, 3, padding=1, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.outer(self.inner(x).relu())
        gates = self.conv(y.mean((2, 3))[:, None]).sigmoid().view(len(y), -1, 1, 1)
        out: Tensor = self.last((x + y * gates).mean((2, 3)))
        return out


def test_blocks_of_efficient_channel_attention_lose_their_inner_width() -> None:
    model, x = ChannelAttention().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    structure = trace(TracedModel.of(model, x))
    assert structure.widths == {"inner": 5}
    reasons = {frozen.tensor: frozen.reason for frozen in structure.frozen}
    assert reasons["outer.weight"] == "neighbours are mixed by `convolution` in `conv`"
    axes = structure.axes({"inner": (0, 3)})
    torch.testing.assert_close(shrunk(model, axes)(x), masked(model, axes)(x), rtol=1e-12, atol=1e-12)
