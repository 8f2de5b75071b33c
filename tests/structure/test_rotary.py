"""Features of attention heads that rotary embeddings turn in pairs, by angles that all layers share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Scope, inspect, load, load_by_shapes, prune, rebuild, save
from lightning_prune.structure import Structure, TracedModel, trace
from lightning_prune.surgery.history import HistoryError, history_of
from lightning_prune.surgery.shrink import cut, mask

HEADS, KEYS, FEATURES, WIDTH, LENGTH = 4, 2, 12, 10, 5
X = torch.randn(2, LENGTH, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PAIRS = FEATURES // 2
HALVES, NEIGHBOURS = ([[n, n + 6] for n in range(6)], [[2 * n, 2 * n + 1] for n in range(6)])


def _turned(x: Tensor, angles: Tensor, way: str) -> Tensor:
    """Pairs of features turned by angles ``(length, pairs)``: those of two halves, or neighbours."""
    if way in ("pairs", "complex"):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        if way == "complex":
            turned = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles)
            return torch.view_as_real(turned).flatten(-2)
        first, second = pairs[..., 0], pairs[..., 1]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    if way == "neighbours":
        other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        angles = angles.repeat_interleave(2, -1)
    else:
        if way == "chunks":
            first, second = x.chunk(2, -1)
        else:
            first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        other = torch.cat((-second, first), -1)
        angles = torch.cat((angles, angles), -1)
    return x * angles.cos() + other * angles.sin()


class Attention(nn.Module):
    """Self-attention with two query heads for each head of keys and values.

    Args:
        way: Which pairs of features are turned.
        values: Another number for the features of values.
    """

    def __init__(self, way: str, values: int | None) -> None:
        super().__init__()
        self.head_dim, self.value_dim, self.way, self.scaling = FEATURES, values, way, FEATURES**-0.5
        self.q, self.k = nn.Linear(WIDTH, HEADS * FEATURES), nn.Linear(WIDTH, KEYS * FEATURES, bias=False)
        self.v = nn.Linear(WIDTH, KEYS * (values or FEATURES))
        self.out = nn.Linear(HEADS * (values or FEATURES), WIDTH)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.value_dim or self.head_dim)).transpose(1, 2)
        q, k = (_turned(one, angles, self.way) for one in (q, k))
        k, v = (one[:, :, None].expand(-1, -1, HEADS // KEYS, -1, -1).flatten(1, 2) for one in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Partial(nn.Module):
    """Self-attention with rotary embeddings of the first features of each head.

    Args:
        way: Which pairs of features are turned.
        turned: How many features are.
        bound: Where their number is from: an attribute, the angles, half of another attribute, or neither (it is a
            number in the code).
        scale: Whether PyTorch computes the scale.
        values: Another number for the features of values.
    """

    def __init__(self, way: str, turned: int, bound: str, scale: bool = False, values: int | None = None) -> None:
        super().__init__()
        self.head_dim, self.way, self.bound, self.is_scaled, self.value_dim = FEATURES, way, bound, scale, values
        self.scaling = FEATURES**-0.5
        if bound == "attribute":
            self.rotary_ndims = turned
        self.q, self.k = nn.Linear(WIDTH, HEADS * FEATURES), nn.Linear(WIDTH, HEADS * FEATURES, bias=False)
        self.v = nn.Linear(WIDTH, HEADS * (values or FEATURES))
        self.out = nn.Linear(HEADS * (values or FEATURES), WIDTH)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.value_dim or self.head_dim)).transpose(1, 2)
        n = {"angles": 2 * angles.shape[-1], "half": self.head_dim // 2, "number": 8}.get(self.bound, 0)
        n = n or self.rotary_ndims
        if self.bound == "half":
            q, k = (torch.cat((_turned(a, angles, self.way), b), -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        else:
            q, k = (torch.cat((_turned(one[..., :n], angles, self.way), one[..., n:]), -1) for one in (q, k))
        scale = None if self.is_scaled else self.scaling
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Residual layers with one set of frequencies, which is no part of the `state_dict`."""

    frequencies: Tensor

    def __init__(self, way: str = "halves", values: int | None = None, layers: int = 2, partial: Any = ()) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.layers = nn.ModuleList(
            Partial(way, *partial, values=values) if partial else Attention(way, values) for _ in range(layers)
        )
        pairs = torch.arange(partial[0] // 2 if partial else PAIRS, dtype=torch.float64)
        self.register_buffer("frequencies", 3.0**-pairs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], device=x.device, dtype=self.frequencies.dtype)[:, None] * self.frequencies
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x, angles)
        return self.last(x)


def _network(*args: Any) -> Decoder:
    torch.manual_seed(0)
    network = Decoder(*args).double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


def _structure(network: nn.Module) -> Structure:
    return trace(TracedModel.of(network, X))


def _drawn(structure: Structure, seed: int) -> dict[str, tuple[int, ...]]:
    draw = np.random.default_rng(seed)
    return {g.name: tuple(sorted(draw.permutation(g.width)[: max(g.width // 2, 2)].tolist())) for g in structure.groups}


NETWORKS = {
    "halves": ("halves", None),
    "chunks": ("chunks", None),
    "neighbours": ("neighbours", None),
    "pairs": ("pairs", None),
    "complex": ("complex", None),
    "halves, other values": ("halves", 6),
    "neighbours, other values": ("neighbours", 6),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_are_units_in_all_layers(name: str) -> None:
    way, values = NETWORKS[name]
    structure = _structure(_network(way, values))
    features = {group.name: group for group in structure.groups if group.within}
    heads = ("layers.0.q", "layers.1.q")
    pairs = features.pop("layers.0.q#head_dim")
    assert (pairs.width, pairs.within) == (PAIRS, heads)
    rows = {member.tensor: member.index for member in pairs.members}
    assert rows["frequencies"].tolist() == [[n] for n in range(PAIRS)]
    by_head = rows["layers.1.k.weight"].reshape(PAIRS, KEYS, 2) - FEATURES * np.arange(KEYS)[:, None]
    expected = HALVES if way in ("halves", "chunks") else NEIGHBOURS
    assert by_head.transpose(1, 0, 2).tolist() == [expected] * KEYS
    found = {group: (one.width, one.within) for group, one in features.items()}
    assert found == ({f"layers.{n}.v#head_dim": (6, heads[n : n + 1]) for n in range(2)} if values else {})
    assert [group.name for group in structure.groups if "#" not in group.name] == ["first", *heads]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(2))
def test_cuts_of_heads_and_features_equal_the_masked_network(name: str, seed: int) -> None:
    network = _network(*NETWORKS[name])
    structure = _structure(network)
    kept = _drawn(structure, seed)
    axes, widths = structure.axes(kept), {group: len(units) for group, units in kept.items()}
    masked = copy.deepcopy(network)
    mask(masked, axes)
    with torch.no_grad():
        dense, expected = network(X), masked(X)
    cut(network, axes)
    torch.testing.assert_close(network(X), expected, rtol=1e-12, atol=1e-13)
    assert (expected - dense).abs().max() > 1e-3
    assert structure.cost.params(widths) == sum(p.numel() for p in network.parameters())
    again = _structure(network)
    assert {g.name: g for g in again.groups} == {g.name: g for g in structure.take(kept).groups}


def test_rows_and_frequencies_that_stay_are_those_of_kept_pairs() -> None:
    network = _network()
    weight, frequencies = network.layers[1].q.weight.detach().clone(), network.frequencies.clone()
    structure = _structure(network)
    cut(network, structure.axes({"layers.0.q#head_dim": (1, 3)}))
    expected = weight.reshape(HEADS, FEATURES, WIDTH)[:, [1, 3, 7, 9]].flatten(0, 1)
    assert torch.equal(network.layers[1].q.weight, expected)
    assert torch.equal(network.frequencies, frequencies[[1, 3]])
    assert [layer.head_dim for layer in network.layers] == [4, 4]
    assert all(layer.out.weight.shape == (WIDTH, HEADS * 4) for layer in network.layers)


def test_features_stay_whose_angles_are_computed_again_for_long_inputs() -> None:
    network = _network()
    network.rope_type = "dynamic"  # as in transformers, where a longer input gives all pairs again
    structure = _structure(network)
    assert not [group for group in structure.groups if group.within]
    assert "layers.0.q#head_dim were left out, as the angles" in " ".join(structure.notes)


def test_features_stay_in_the_layers_that_keep_heads() -> None:
    network, scope = _network("halves", None, 3), Scope(min_width=0)
    with torch.no_grad():
        network.layers[1].out.bias.zero_()
    expected = copy.deepcopy(network)
    widths = prune(network, X, pruning_ratio={"layers.1.q": 1.0}, scope=scope).widths
    assert (widths["layers.1.q"], widths["layers.0.q#head_dim"]) == (0, PAIRS)
    (features,) = (group for group in inspect(network, X).structure.groups if group.within)
    assert features.within == ("layers.0.q", "layers.2.q")
    del expected.layers[1]
    for one in (network, expected):
        prune(one, X, pruning_ratio=0.5, layers=["*", "*#head_dim"], ignore="first")
    torch.testing.assert_close(network(X), expected(X), rtol=1e-12, atol=1e-13)


def test_files_keep_the_frequencies(tmp_path: Path) -> None:
    network = _network()
    prune(network, X, pruning_ratio=0.5, layers=["*", "*#head_dim"], ignore="first")
    prune(network, X, pruning_ratio=0.75, layers="*#head_dim")
    history, masked = history_of(network), _network()
    assert history is not None
    assert (network.frequencies.numel(), network.layers[0].head_dim) == (2, 4)
    mask(masked, history.axes)
    torch.testing.assert_close(network(X), masked(X), rtol=1e-12, atol=1e-13)
    save(network, tmp_path / "small.safetensors")
    loaded = load(_network(), tmp_path / "small.safetensors")
    assert torch.equal(loaded(X), network(X))
    assert torch.equal(loaded.frequencies, network.frequencies)
    rebuild(network, tmp_path / "small.py")
    assert "frequencies" in (tmp_path / "small.py").read_text()


def test_weights_alone_do_not_tell_which_frequencies_stay() -> None:
    network = _network()
    prune(network, X, pruning_ratio=2 / 3, layers="*#head_dim")
    with pytest.raises(HistoryError, match=r"frequencies \[6\] is in no `state_dict`"):
        load_by_shapes(_network(), network.state_dict(), X)


PARTIAL = {
    "halves, 8 by an attribute": ("halves", None, 2, (8, "attribute")),
    "halves, 6 by the angles": ("halves", None, 2, (6, "angles")),
    "neighbours, 6 by an attribute": ("neighbours", None, 2, (6, "attribute")),
    "neighbours, 8 by the angles": ("neighbours", None, 2, (8, "angles")),
    "halves, other values": ("halves", 6, 2, (8, "attribute")),
    "halves, as many other values": ("halves", FEATURES, 2, (8, "attribute")),
    "neighbours, the scale is PyTorch's": ("neighbours", None, 2, (8, "angles", True)),
    "halves, the scale is PyTorch's": ("halves", None, 2, (6, "attribute", True)),
}


def _cut(network: Decoder, kept: dict[str, tuple[int, ...]], structure: Structure) -> None:
    cut(network, structure.axes(kept), factors=structure.factors(kept))


@pytest.mark.parametrize("name", PARTIAL)
def test_turned_pairs_and_other_features_are_two_groups(name: str) -> None:
    way, values, _, (turned, bound, *scale) = PARTIAL[name]
    structure = _structure(_network(*PARTIAL[name]))
    features = {group.name: group for group in structure.groups if group.within}
    heads, rest = ("layers.0.q", "layers.1.q"), FEATURES - turned
    own = {f"layers.{n}.v#head_dim": (values, heads[n : n + 1]) for n in range(2)} if values else {}
    assert {group: (one.width, one.within) for group, one in features.items()} == {
        "layers.0.q#head_dim": (turned // 2, heads),
        **{f"layers.{n}.q#2#head_dim": (rest, heads[n : n + 1]) for n in range(2)},
        **own,
    }
    pairs, others = features["layers.0.q#head_dim"], features["layers.1.q#2#head_dim"]
    rows = {member.tensor: member.index for member in pairs.members}
    assert rows["frequencies"].tolist() == [[n] for n in range(turned // 2)]
    far = turned // 2
    expected = [[n, n + far] if way == "halves" else [2 * n, 2 * n + 1] for n in range(far)]
    assert rows["layers.1.k.weight"].reshape(far, HEADS, 2)[:, 0].tolist() == expected
    (weight,) = (member for member in others.members if member.tensor == "layers.1.q.weight")
    assert weight.index[:, 0].tolist() == [*range(turned, FEATURES)]
    numbers = {"head_dim", *(["rotary_ndims"] if bound == "attribute" else []), *(["scaling"] if scale else [])}
    assert {size.tensor.rpartition(".")[2] for size in pairs.sizes} == numbers


@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.parametrize("seed", range(2))
def test_cuts_under_partial_rotary_embeddings_equal_the_masked_network(name: str, seed: int) -> None:
    network = _network(*PARTIAL[name])
    structure, draw = _structure(network), np.random.default_rng(seed)
    kept = {
        group.name: tuple(sorted(draw.permutation(group.width)[: max(group.width * 3 // 4, 3)].tolist()))
        for group in structure.groups
    }
    if seed:  # of one of two groups with a number in common alone
        kept = {group: units for group, units in kept.items() if "layers.0.q#2" not in group}
    masked, widths = copy.deepcopy(network), structure.widths | {group: len(units) for group, units in kept.items()}
    mask(masked, structure.axes(kept))
    with torch.no_grad():
        dense, expected = network(X), masked(X)
    _cut(network, kept, structure)
    torch.testing.assert_close(network(X), expected, rtol=1e-12, atol=1e-13)
    assert (expected - dense).abs().max() > 1e-3
    assert structure.cost.params(widths) == sum(p.numel() for p in network.parameters())
    again = _structure(network)
    assert {g.name: g for g in again.groups} == {g.name: g for g in structure.take(kept).groups}


def test_files_of_networks_with_partial_rotary_embeddings(tmp_path: Path) -> None:
    name = PARTIAL["halves, 8 by an attribute"]
    network = _network(*name)
    prune(network, X, pruning_ratio={"*q": 0.5, "*#head_dim": 0.25}, ignore="first")
    prune(network, X, pruning_ratio=0.5, layers="*#2#head_dim")
    history, masked = history_of(network), _network(*name)
    assert history is not None
    first = network.layers[0]
    assert (network.frequencies.numel(), first.rotary_ndims, first.head_dim) == (3, 6, 8)
    mask(masked, history.axes)
    torch.testing.assert_close(network(X), masked(X), rtol=1e-12, atol=1e-13)
    save(network, tmp_path / "small.safetensors")
    loaded = load(_network(*name), tmp_path / "small.safetensors")
    assert torch.equal(loaded(X), network(X))
    rebuild(network, tmp_path / "small.py")
    assert "frequencies" in (tmp_path / "small.py").read_text()


def test_weights_alone_tell_heads_under_partial_rotary_embeddings() -> None:
    name = PARTIAL["halves, 8 by an attribute"]
    network = _network(*name)
    prune(network, X, pruning_ratio=0.5, layers="*q")
    loaded = load_by_shapes(_network(*name), network.state_dict(), X)
    assert torch.equal(loaded(X), network(X))
    prune(network, X, pruning_ratio=0.5, layers="*#2#head_dim")
    with pytest.raises(HistoryError, match="heads and their features were pruned"):
        load_by_shapes(_network(*name), network.state_dict(), X)


def test_turned_features_stay_whose_number_is_in_the_code() -> None:
    network = _network("halves", None, 2, (8, "number"))
    structure = _structure(network)
    found = {group.name: group.width for group in structure.groups if group.within}
    assert found == {f"layers.{n}.q#2#head_dim": 4 for n in range(2)}
    assert "layers.0.q#head_dim stay" in " ".join(structure.remarks)


def test_halves_leave_together_where_code_has_one_number_for_both() -> None:
    structure = _structure(_network("halves", None, 2, (6, "half")))
    (features,) = (group for group in structure.groups if group.within)
    assert features.width == 3
