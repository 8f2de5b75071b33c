"""What only a trial cut shows, and what a trace leaves as it found it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.structure import TracedModel, Tracing, trace
from tests.support.cutting import masked, shrunk


class Between(nn.Module):
    """Two layers with any function between them."""

    def __init__(self, width: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, width), nn.Linear(width, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.function(self.hidden(x).relu()))
        return out


X = torch.randn(5, 4)


@pytest.mark.parametrize(("width", "least"), [(8, 6), (3, 3), (2, 2)])
def test_about_half_of_the_units_are_cut(width: int, least: int) -> None:
    def demanding(h: Tensor) -> Tensor:
        if h.shape[1] < least:
            raise ValueError("too narrow")
        return h

    structure = trace(TracedModel.of(Between(width, demanding), X))
    assert not structure.groups
    assert {frozen.tensor: frozen.reason for frozen in structure.frozen}["hidden.weight"] == (
        "a trial cut failed: ValueError: too narrow"
    )


class Joined(nn.Module):
    """Sums each unit and a token."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out, self.token = nn.Linear(4, 6), nn.Linear(2, 3), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x).relu()
        out: Tensor = self.out(torch.cat([h.unsqueeze(2), self.token.expand(h.shape).unsqueeze(2)], 2).sum(1))
        return out


def test_a_constant_that_is_as_wide_as_a_layer() -> None:
    """The sum over the units is another when there are fewer tokens: a unit that is zero leaves its token."""
    structure = trace(TracedModel.of(Joined(), X))
    assert not structure.groups
    reasons = {frozen.tensor: frozen.reason for frozen in structure.frozen}
    assert reasons["hidden.weight"] == "reduced over in `sum`"


def test_random_numbers_of_the_network_are_drawn_without_a_trace() -> None:
    def noisy(h: Tensor) -> Tensor:
        return h * (random.random() + float(np.random.rand()) + float(torch.rand(())))

    def states() -> list[str]:
        return [str(random.getstate()), str(np.random.get_state()[1].tolist()), str(torch.get_rng_state().tolist())]

    model = Between(6, noisy)
    before = states()
    trace(TracedModel.of(model, X))
    assert states() == before


class Confused(nn.Module):
    """Layers side by side; code takes the width of one of them for that of another."""

    def __init__(self, layers: str, width: int, one: str, other: str) -> None:
        super().__init__()
        self.hidden = nn.ModuleDict({name: nn.Linear(4, width) for name in layers})
        self.out = nn.ModuleDict({name: nn.Linear(width, 3) for name in layers})
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        hidden = {name: layer(x).relu() for name, layer in self.hidden.items()}
        hidden[self.other] = hidden[self.other].view(len(x), hidden[self.one].shape[1])
        return torch.stack([layer(hidden[name]) for name, layer in self.out.items()]).sum(0)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_any_two_layers_whose_widths_code_takes_for_one_another_are_found(width: int) -> None:
    """However few units they have, one of the draws tells them apart; the other layers can still be cut."""
    for one, other in itertools.combinations("abcde", 2):
        structure = trace(TracedModel.of(Confused("abcde", width, one, other), X))
        found = {group.producers for group in structure.groups}
        apart = {(f"hidden.{name}",) for name in "abcde" if name not in (one, other)}
        assert found - {(f"hidden.{one}", f"hidden.{other}")} == apart


class SharedKeys(nn.Module):
    """Attention in which two heads of keys and values, turned by a constant, serve two queries each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(4, 12), nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 2)
        self.register_buffer("turn", torch.linspace(0.5, 2, 15).view(1, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], -1, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = q * self.turn.unsqueeze(1), k * self.turn.unsqueeze(1)
        k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (k, v))
        out: Tensor = self.out(((q @ k.transpose(2, 3)).softmax(3) @ v).transpose(1, 2).flatten(2))
        return out


def test_one_of_two_heads_of_keys_and_values_is_removed() -> None:
    """The heads are an axis of length 1 after the cut, as is that of the constant, and stay known as heads."""
    model, x = SharedKeys().double(), torch.randn(1, 5, 4, dtype=torch.float64)
    tracing = Tracing(TracedModel.of(model, x))
    (heads,) = tracing.structure.groups
    assert heads.width == 2
    assert {member.layer for member in heads.members} == {"q", "k", "v", "out"}
    for unit in range(2):
        tracing.verify_shapes({heads.name: [unit]})
        axes = tracing.structure.axes({heads.name: [unit]})
        torch.testing.assert_close(shrunk(model, axes)(x), masked(model, axes)(x))
