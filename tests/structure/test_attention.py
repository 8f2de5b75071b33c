"""Attention that PyTorch computes in one operator, which a trace meets where sizes hang on what the example holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.structure import TracedModel, trace
from tests.support.cutting import half, masked, shrunk

HEADS, FEATURES, POSITIONS = 6, 4, 3


class Attention(nn.Module):
    """Attends over the positions whose first feature is positive: as many as the example has."""

    def __init__(self, mask: bool = False, keys: int = HEADS) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(5, n * FEATURES, bias=False) for n in (HEADS, keys, keys))
        self.shared = keys < HEADS  # heads of keys and values, by several of queries each
        self.out = nn.Linear(HEADS * FEATURES, 2, bias=False)
        self.mask = nn.Linear(5, HEADS) if mask else None
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, x[0, :, 0] > 0]
        q, k, v = (
            layer(x).unflatten(-1, (-1, FEATURES)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        bias = None if self.mask is None else self.mask(x).transpose(1, 2)[:, :, None]
        return self.out(
            F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=self.shared).transpose(1, 2).flatten(2)
        )


def example() -> torch.Tensor:
    x = torch.randn(1, 5, 5, dtype=torch.float64)
    x[0, :, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    return x


def test_whole_heads_are_units() -> None:
    model, x = Attention(), example()
    structure = trace(TracedModel.of(model, x))
    (group,) = structure.groups
    assert group.width == HEADS
    assert {member.layer for member in group.members} == {"query", "key", "value", "out"}
    axes = structure.axes(half(structure))
    small = shrunk(model, axes)
    assert small.query.out_features == HEADS * FEATURES // 2
    torch.testing.assert_close(small(x), masked(model, axes)(x), rtol=1e-12, atol=1e-12)


def test_heads_of_queries_leave_with_those_of_keys_that_they_share() -> None:
    model, x = Attention(keys=2), example()
    structure = trace(TracedModel.of(model, x))
    (group,) = structure.groups
    assert group.width == 2
    assert structure.axes({group.name: [1]})["query.weight"][0].tolist() == list(range(12, 24))
    axes = structure.axes(half(structure))
    torch.testing.assert_close(shrunk(model, axes)(x), masked(model, axes)(x), rtol=1e-12, atol=1e-12)


def test_products_of_queries_and_keys_and_of_shares_and_values_are_counted() -> None:
    structure = trace(TracedModel.of(Attention(), example()))
    (group,) = structure.groups
    for heads in (HEADS, 2):
        layers = POSITIONS * heads * FEATURES * (3 * 5 + 2)
        assert structure.cost.macs({group.name: heads}) == layers + 2 * heads * POSITIONS * POSITIONS * FEATURES


class Single(Attention):
    """One head, so that only features could leave."""

    def __init__(self, mask: bool) -> None:
        super().__init__()
        self.mask = nn.Linear(5, 1, dtype=torch.float64) if mask else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, x[0, :, 0] > 0]
        q, k, v = (layer(x)[:, None] for layer in (self.query, self.key, self.value))
        bias = None if self.mask is None else self.mask(x).transpose(1, 2)[:, :, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mask", [False, True])
def test_what_decides_the_scale_or_the_mask_stays(mask: bool) -> None:
    model, x = Single(mask).requires_grad_(False), example()  # else it is other operators, where there is a mask
    structure = trace(TracedModel.of(model, x))
    reasons = {frozen.tensor: frozen.reason for frozen in structure.frozen}
    for name in ("query.weight", "key.weight"):
        assert reasons[name] == "the scale of `_scaled_dot_product_flash_attention_for_cpu`"
    if mask:
        assert reasons["mask.weight"] == "the mask of `_scaled_dot_product_flash_attention_for_cpu`"
