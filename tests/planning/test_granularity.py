"""What a mask takes: every granularity beside a reference of plain loops, in every pool."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune.planning import NM, Channel, Element, Granularity, Kernel, Weight, choose_masks, granularity
from lightning_prune.structure import Call, TracedModel, trace

KINDS = [
    kind
    for kind in vars(granularity).values()
    if inspect.isclass(kind) and issubclass(kind, Granularity) and not inspect.isabstract(kind)
]
REFERENCES: dict[type, Callable[[Tensor], list[list[tuple[float, list[tuple[int, ...]]]]]]] = {}


def reference(kind: type) -> Callable[[Any], Any]:
    """Cells of a weight (filters, inputs, *kernel), one list per row: their score and the indices they cover."""

    def keep(function: Any) -> Any:
        REFERENCES[kind] = function
        return function

    return keep


def indices(weight: Tensor) -> list[tuple[int, ...]]:
    return [tuple(i) for i in torch.ones(weight.shape).nonzero().tolist()]


@reference(Element)
def element(weight: Tensor) -> Any:
    return [[(abs(float(weight[i])), [i]) for i in indices(weight) if i[0] == f] for f in range(len(weight))]


@reference(Kernel)
def kernel(weight: Tensor) -> Any:
    def one(f: int, c: int) -> Any:
        own = [i for i in indices(weight) if i[:2] == (f, c)]
        return math.sqrt(sum(float(weight[i]) ** 2 for i in own)), own

    return [[one(f, c) for c in range(weight.shape[1])] for f in range(len(weight))]


@reference(NM)
def two_of_four(weight: Tensor) -> Any:
    rows = []
    for f in range(len(weight)):
        for first in range(0, weight.shape[1], 4):
            for rest in {i[2:] for i in indices(weight)}:
                block = [(f, c, *rest) for c in range(first, first + 4)]
                rows.append([(abs(float(weight[i])), [i]) for i in block])
    return rows


def taken(pools: list[list[Any]], amount: float) -> set[tuple[Any, ...]]:
    """The lowest cells of each pool, until their weights are the nearest to the amount."""
    gone = set()
    for pool in pools:
        goal, done = amount * sum(len(own) for _, own in pool), 0.0
        for _, own in sorted(pool, key=lambda cell: cell[0]):
            if done + len(own) / 2 > goal + 1e-6:
                break
            done += len(own)
            gone.update(own)
    return gone


def test_every_granularity_has_a_reference() -> None:
    assert set(KINDS) == {*REFERENCES, Channel}  # units are compared below


@pytest.mark.parametrize("pool", ["global", "local", "filter"])
@pytest.mark.parametrize("kind", REFERENCES, ids=lambda kind: kind.__name__)
@settings(max_examples=25)
@given(amount=st.floats(0, 1), seed=st.integers(0, 50))
def test_masks_are_those_of_the_reference(kind: type[Granularity], pool: Any, amount: float, seed: int) -> None:
    if kind is NM and pool != "filter":
        return
    torch.manual_seed(seed)
    tensors = {"a": torch.randn(3, 4, 2, dtype=torch.float64), "b": torch.randn(2, 8, 3, dtype=torch.float64)}
    parts = kind().parts([Weight(n, t) for n, t in tensors.items()], (), tensors)
    masks = choose_masks(parts, {}, amount, pool)
    rows = {
        name: [[(score, [(name, *i) for i in own]) for score, own in row] for row in REFERENCES[kind](tensor)]
        for name, tensor in tensors.items()
    }
    layers = [[cell for row in own for cell in row] for own in rows.values()]
    pools = {
        "filter": [row for own in rows.values() for row in own],
        "local": layers,
        "global": [[cell for own in layers for cell in own]],
    }[pool]
    found = {(name, *i) for name, mask in masks.items() for i in map(tuple, mask.nonzero().tolist())}
    assert found == taken(pools, amount)


@given(first=st.floats(0, 1), second=st.floats(0, 1))
def test_masks_grow(first: float, second: float) -> None:
    first, second = sorted((first, second))
    weight = torch.randn(4, 8)
    parts = Element().parts([Weight("w", weight)], (), {})
    before = choose_masks(parts, {}, first, "global")
    weight.masked_fill_(before["w"], 0)
    weight[~before["w"]] = torch.randn(int((~before["w"]).sum()))  # they train on; some may be zero
    weight[weight.abs() < 0.3] = 0
    after = choose_masks(Element().parts([Weight("w", weight)], (), {}), before, second, "global")
    assert not (before["w"] & ~after["w"]).any()
    assert abs(int(after["w"].sum()) - 32 * second) <= 0.5 + 1e-6


def test_equal_scores_go_by_position() -> None:
    masks = choose_masks(Element().parts([Weight("w", torch.ones(2, 4))], (), {}), {}, 0.5, "global")
    assert masks["w"].tolist() == [[True] * 4, [False] * 4]


@pytest.mark.parametrize("pool", ["global", "local", "filter"])
def test_half_a_cell_goes(pool: Any) -> None:
    """An amount halfway between two numbers of cells takes the larger one, also where it is no exact binary number."""
    for cells, amount, gone in ((4, 0.375, 2), (4, 0.125, 1), (5, 0.1, 1), (5, 0.3, 2), (5, 0.7, 4), (5, 0.2999, 1)):
        parts = Element().parts([Weight("w", torch.arange(1.0, cells + 1)[None])], (), {})
        assert choose_masks(parts, {}, amount, pool)["w"].tolist() == [[i < gone for i in range(cells)]]


def test_infinite_weights_are_an_error() -> None:
    parts = Element().parts([Weight("w", torch.tensor([[1.0, torch.nan]]))], (), {})
    with pytest.raises(FloatingPointError, match="NaN or infinity in w"):
        choose_masks(parts, {}, 0.5, "global")


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_a_transposed_convolution(groups: int) -> None:
    """A filter's weights are those that its output depends on, and no others."""
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False).double()
    filters = Weight("w", layer.weight, groups).filters(layer.weight)
    assert filters.shape == (6, 4 // groups, 3, 3)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    for f in range(6):
        (grad,) = torch.autograd.grad(layer(x)[0, f].sum(), layer.weight)
        touched = Weight("w", layer.weight, groups).filters(grad) != 0
        assert touched[f].all()
        assert not touched[[i for i in range(6) if i != f]].any()


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("pool", ["global", "local"])
def test_units_by_the_norm_of_their_producers(pool: Any, amount: float) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 6), nn.Linear(6, 2)
    )
    structure = trace(TracedModel(net, (Call((torch.zeros(2, 3, 5, 5),)),)))
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    masks = choose_masks(Channel().parts((), structure.groups, tensors), {}, amount, pool)
    own = {"0": ["0.weight", "0.bias", "1.weight", "1.bias"], "4": ["4.weight", "4.bias"]}
    scores, sizes, gone = {}, {}, {}
    for name, members in own.items():
        scores[name] = tensors[f"{name}.weight"].detach().flatten(1).norm(dim=1).tolist()
        sizes[name] = sum(tensors[m][0].numel() for m in members)
        gone[name] = masks[members[0]].flatten(1).all(1)
        for member in members:
            rows = masks[member].flatten(1) if masks[member].ndim > 1 else masks[member][:, None]
            assert torch.equal(rows.all(1), gone[name])
            assert torch.equal(rows.any(1), gone[name])
    assert masks.keys() == {member for members in own.values() for member in members}  # no consumer
    pools = [list(own)] if pool == "global" else [[name] for name in own]
    for names in pools:
        ranked = sorted((score, name, u) for name in names for u, score in enumerate(scores[name]))
        goal, done, expected = amount * sum(sizes[n] * len(scores[n]) for n in names), 0.0, set()
        for score, name, u in ranked:
            if score == max(scores[name]):
                continue  # each group keeps its best unit
            if done + sizes[name] / 2 > goal + 1e-6:
                break
            done += sizes[name]
            expected.add((name, u))
        assert {(n, u) for n in names for u in gone[n].nonzero().flatten().tolist()} == expected


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_n_of_m_that_is_none(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="expected 0 < n < m"):
        NM(n, m)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_settings_are_values(kind: type) -> None:
    assert eval(repr(kind())) == kind()
