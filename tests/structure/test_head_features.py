"""Features of attention heads as units of their own, beside whole heads."""

from __future__ import annotations

import copy
import pickle
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Ridge, Scope, SequentialRidge, inspect, load, prune, rebuild, save
from lightning_prune.planning import select
from lightning_prune.structure import Structure, TracedModel, trace
from lightning_prune.structure.attention import MultiheadAttention
from lightning_prune.surgery.edits import NetworkState, read_edit, transform_stored, write_edit
from lightning_prune.surgery.history import edits_of, history_of
from lightning_prune.surgery.repairs import Repair
from lightning_prune.surgery.restore import dense_copy
from lightning_prune.surgery.shrink import cut, mask

HEADS, FEATURES, WIDTH, LENGTH = 4, 6, 10, 5


class Attention(nn.Module):
    """Self-attention as transformers writes it: one number for the features of queries, keys and values.

    Args:
        values: Another number for the features of values.
        scaled: Whether the scale is kept in an attribute rather than computed from the features.
    """

    def __init__(self, values: int | None = None, *, scaled: bool = True) -> None:
        super().__init__()
        self.head_dim, self.num_heads = FEATURES, HEADS
        self.value_dim = values
        self.scaling = FEATURES**-0.5 if scaled else None
        inner = HEADS * (values or FEATURES)
        self.q, self.k = (nn.Linear(WIDTH, HEADS * FEATURES) for _ in "qk")
        self.v, self.out = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (layer(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k))
        v = self.v(x).view(*x.shape[:2], -1, self.value_dim or self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        return self.out(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class Fused(nn.Module):
    """As timm writes it: queries, keys and values from one layer, and a scale that PyTorch computes if it is fused.

    Args:
        uses: Other uses of the queries than in the attention, or another attention while training.
        norm: Norm of the features of queries and keys.
    """

    def __init__(self, uses: str = "", norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.q_norm, self.k_norm = (norm(FEATURES) if norm else nn.Identity() for _ in "qk")
        self.head_dim, self.scale, self.fused, self.uses = FEATURES, FEATURES**-0.5, True, uses
        self.qkv, self.out = nn.Linear(WIDTH, 3 * HEADS * FEATURES), nn.Linear(HEADS * FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.uses == "bias":
            q = q.tanh()
        if self.uses == "clip":
            q = q.clamp(-50, 50)  # far from what the example gives
        if self.uses == "training" and self.training:
            out = (q @ k.transpose(-2, -1) / FEATURES**0.5).softmax(-1) @ v
        elif self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        if self.uses == "sum":
            out = out + q
        return self.out(out.transpose(1, 2).flatten(2))


class AtOnce(nn.Module):
    """All three layers run before the first view of their outputs, and one number is read for all.

    Args:
        scale: Scale of the products; None to compute it from the features.
    """

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.head_dim, self.fixed = FEATURES, scale
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * FEATURES) for _ in "qkv")
        self.out = nn.Linear(HEADS * FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found = self.q(x), self.k(x), self.v(x)
        q, k, v = (one.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in found)
        weights = q @ k.transpose(-2, -1) * (self.fixed or q.shape[-1] ** -0.5)
        return self.out((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))


class TwoQueries(nn.Module):
    """Two attentions with the same heads, whose queries one layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FEATURES, FEATURES - 2
        self.q = nn.Linear(WIDTH, HEADS * (self.first + self.second))
        self.k1, self.k2 = (nn.Linear(WIDTH, HEADS * n) for n in (self.first, self.second))
        self.v, self.out = nn.Linear(WIDTH, HEADS * FEATURES), nn.Linear(HEADS * FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, self.first + self.second)).transpose(1, 2)
        k1, k2 = (
            k(x).unflatten(-1, (-1, n)).transpose(1, 2) for k, n in ((self.k1, self.first), (self.k2, self.second))
        )
        v = self.v(x).unflatten(-1, (-1, FEATURES)).transpose(1, 2)
        q1, q2 = q.split([self.first, self.second], -1)
        out = F.scaled_dot_product_attention(q1, k1, v) - F.scaled_dot_product_attention(q2, k2, v) / 2
        return self.out(out.transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """Queries, keys and values from one layer, scaled by hand; the heads are counted from the features."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.scale = FEATURES, FEATURES**-0.5
        self.qkv, self.out = nn.Linear(WIDTH, 3 * HEADS * FEATURES), nn.Linear(HEADS * FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Builtin(nn.Module):
    """PyTorch's layer, which has one width for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(WIDTH, HEADS * FEATURES), nn.Linear(HEADS * FEATURES, WIDTH)
        self.attention = nn.MultiheadAttention(HEADS * FEATURES, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def _network(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(3, WIDTH), *blocks, nn.Linear(WIDTH, 2)]
    network = nn.Sequential(*layers).double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


def _networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "one number": _network(Attention(), Attention()),
        "two numbers": _network(Attention(8), Attention(8)),
        "packed": _network(Packed(), Packed()),
        "PyTorch's": _network(Builtin(), Builtin()),
        "own scale": _network(Attention(scaled=False), Attention(scaled=False)),
        "fused": _network(Fused(), Fused()),
    }


X = torch.randn(2, LENGTH, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _structure(network: nn.Module) -> Structure:
    return trace(TracedModel.of(network, X))


def _drawn(structure: Structure, seed: int, which: Any = lambda _: True) -> dict[str, tuple[int, ...]]:
    draw = np.random.default_rng(seed)
    return {
        g.name: tuple(sorted(draw.permutation(g.width)[: max(g.width // 2, 2)].tolist()))
        for g in structure.groups
        if which(g)
    }


def test_groups_are_found() -> None:
    found = {name: {g.name: (g.width, g.within) for g in _structure(n).groups} for name, n in _networks().items()}
    features = {name: {g: w for g, w in groups.items() if "#" in g} for name, groups in found.items()}
    assert features["one number"] == {f"{n}.q#head_dim": (FEATURES, (f"{n}.q",)) for n in "12"}
    assert features["two numbers"] == {
        f"{n}.{layer}#head_dim": (width, (f"{n}.q",)) for n in "12" for layer, width in (("q", FEATURES), ("v", 8))
    }
    assert features["own scale"] == features["one number"]
    assert {within for _, within in features["packed"].values()} == {("1.qkv",), ("2.qkv",)}
    assert features["fused"] == features["packed"]
    assert features["PyTorch's"] == {f"{n}.attention#head_dim": (FEATURES, (f"{n}.attention",)) for n in "12"}
    for name, groups in found.items():
        assert {groups[one][0] for _, within in features[name].values() for one in within} == {HEADS}, name


@pytest.mark.parametrize("name", _networks())
@pytest.mark.parametrize("seed", range(3))
def test_cuts_of_heads_and_features_equal_the_masked_network(name: str, seed: int) -> None:
    network = _networks()[name]
    structure = _structure(network)
    kept = _drawn(structure, seed)
    axes, widths = structure.axes(kept), {group: len(units) for group, units in kept.items()}
    masked = copy.deepcopy(network)
    mask(masked, axes)
    with torch.no_grad():
        dense, expected = network(X), masked(X)
    cut(network, axes, factors=structure.factors(kept))
    torch.testing.assert_close(network(X), expected, rtol=1e-12, atol=1e-13)
    assert (expected - dense).abs().max() > 1e-3
    assert structure.cost.params(widths) == sum(p.numel() for p in network.parameters())


def test_rows_that_stay_are_those_of_kept_features_of_kept_heads() -> None:
    network = _networks()["one number"]
    structure = _structure(network)
    heads, features = (1, 3), (0, 2, 5)
    weights = {name: getattr(network[1], name).weight.detach().clone() for name in ("q", "k", "v", "out")}
    cut(network, structure.axes({"1.q": heads, "1.q#head_dim": features}))
    for name, weight in weights.items():
        rows = weight.T if name == "out" else weight
        expected = rows.reshape(HEADS, FEATURES, -1)[list(heads)][:, list(features)].flatten(0, 1)
        found = getattr(network[1], name).weight
        assert torch.equal(found.T if name == "out" else found, expected), name
    assert (network[1].head_dim, network[1].num_heads) == (3, 2)


def test_macs_are_those_that_run() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = _networks()["packed"]
    structure = _structure(network)
    kept = _drawn(structure, 0)
    cut(network, structure.axes(kept))
    with FlopCounterMode(display=False) as counter:
        network(X[:1])
    assert structure.cost.macs({name: len(units) for name, units in kept.items()}) == counter.get_total_flops() / 2


@pytest.mark.parametrize("features_first", [False, True])
@pytest.mark.parametrize("name", ["two numbers", "fused"])
def test_cuts_in_turn_are_one_cut(name: str, features_first: bool) -> None:
    once, twice = _networks()[name], _networks()[name]
    structure = _structure(once)
    kept = _drawn(structure, 0)
    cut(once, structure.axes(kept), factors=structure.factors(kept))
    for which in (features_first, not features_first):
        part = {name: units for name, units in kept.items() if ("#" in name) == which}
        cut(twice, structure.axes(part), factors=structure.factors(part))
        structure = structure.take(part)
    assert torch.equal(once(X), twice(X))
    again = _structure(twice)
    assert again.widths == structure.widths == {name: len(units) for name, units in kept.items()}
    assert {g.name: g for g in again.groups} == {g.name: g for g in structure.groups}


def test_features_are_pruned_where_they_are_named() -> None:
    structure = _structure(_networks()["one number"])
    selected, refused = select(structure)
    assert not [name for name in selected if "#" in name]
    assert "named" in refused["1.q#head_dim"]
    assert select(structure, ["*#head_dim"])[0] == ("1.q#head_dim", "2.q#head_dim")
    assert select(structure, ["1.q"])[0] == ("1.q",)
    assert select(structure, ["*", "*#head_dim"], ignore="2.*#head_dim")[0] == tuple(
        name for name in structure.widths if name != "2.q#head_dim"
    )


def test_ignoring_a_layer_ignores_the_features_of_its_heads() -> None:
    structure = _structure(_networks()["one number"])
    for ignored in ("2", "2.k", "2.*"):
        selected, refused = select(structure, ["*", "*#head_dim"], ignore=ignored)
        assert not [name for name in selected if name.startswith("2.q")]
        assert refused["2.q#head_dim"] == f"ignored by {ignored!r}"
    with pytest.raises(ValueError, match=r"matches no layer. Did you mean 1.q#head_dim.* pruned: 1.q#head_dim, 2.q#h"):
        select(structure, "1.k#head_dim")


def test_a_network_without_features_of_heads_says_so() -> None:
    structure = _structure(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double())
    for named in ({"layers": "*#head_dim"}, {"ignore": "*#head_dim"}):
        with pytest.raises(ValueError, match=r"expected features of attention heads \(#head_dim\), but this network"):
            select(structure, **named)


@pytest.mark.parametrize("ratios", [{"1.q#head_dim": 0.5}, {"*": 0.5, "*#head_dim": 0.5}])
def test_features_are_named_by_the_pruning_ratio_too(ratios: dict[str, float]) -> None:
    widths = prune(_networks()["one number"], X, pruning_ratio=ratios).widths
    assert (widths["1.q#head_dim"], widths["1.q"]) == (3, HEADS // 2 if "*" in ratios else HEADS)


def test_at_least_one_feature_stays() -> None:
    structure = _structure(_networks()["one number"])
    with pytest.raises(ValueError, match="at least one feature of each head"):
        structure.axes({"1.q#head_dim": ()})


@pytest.mark.parametrize("scope", ["local", "global"])
def test_budgets_take_heads_and_features(scope: Any, tmp_path: Path) -> None:
    network = _networks()["one number"]
    before = sum(parameter.numel() for parameter in network.parameters())
    prune(network, X, budget={"params": 0.5}, layers=["*", "*#head_dim"], scope=scope)
    left = sum(parameter.numel() for parameter in network.parameters())
    assert 0.35 * before < left <= 0.5 * before
    save(network, tmp_path / "small.safetensors")
    other = _networks()["one number"]
    load(other, tmp_path / "small.safetensors")
    assert torch.equal(other(X), network(X))
    prune(network, X, pruning_ratio=0.3, layers="*#head_dim")  # a second time
    assert network(X).isfinite().all()


def test_pytorchs_layer_keeps_its_scale(tmp_path: Path) -> None:
    network = _networks()["PyTorch's"]
    prune(network, X, pruning_ratio=0.5, layers="*#head_dim")
    attention = network[1].attention
    assert (attention.head_dim, attention.num_heads, attention.scale) == (3, HEADS, FEATURES**-0.5)
    assert type(attention) is MultiheadAttention
    expected = network(X).detach()
    save(network, tmp_path / "small.safetensors")
    rebuild(network, tmp_path / "small.py")
    loaded = load(_networks()["PyTorch's"], tmp_path / "small.safetensors")
    rebuilt = runpy.run_path(str(tmp_path / "small.py"))["load"](
        _networks()["PyTorch's"], tmp_path / "small.safetensors"
    )
    for other in (loaded, rebuilt, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(X), expected)
    prune(network, X, pruning_ratio=0.3, layers=["*", "*#head_dim"])
    assert network[1].attention.scale == FEATURES**-0.5
    wide = dense_copy(TracedModel.of(network, X), "real")
    assert type(wide[1].attention) is nn.MultiheadAttention
    assert wide[1].attention.head_dim == FEATURES


def test_each_kind_alone() -> None:
    network = _networks()["one number"]
    report = prune(network, X, pruning_ratio=0.5, layers="*#head_dim")
    assert (network[1].head_dim, network[1].num_heads, network[2].head_dim) == (3, HEADS, 3)
    assert network[1].q.out_features == HEADS * 3
    assert report.final is not None


# -- scales that follow the features -----------------------------------------------------------------------------------


HALF = {"1.qkv#head_dim": (0, 2, 5), "2.qkv#head_dim": (1, 2, 3)}


def test_queries_of_heads_are_multiplied_where_the_scale_follows_their_width() -> None:
    network = _networks()["fused"]
    structure = _structure(network)
    before = {name: tensor.detach().clone() for name, tensor in network.named_parameters()}
    cut(network, structure.axes(HALF), factors=structure.factors(HALF))
    for name, tensor in network.named_parameters():
        expected = before[name]
        if "qkv" in name:  # three features of each head stay; the first third of the rows are queries
            kept = list(HALF[f"{name[0]}.qkv#head_dim"])
            expected = expected.reshape(3, HEADS, FEATURES, -1)[:, :, kept].clone()
            expected[0] *= 0.5**0.5
            expected = expected.reshape(tensor.shape)
        if "1.out.weight" in name or "2.out.weight" in name:
            continue
        torch.testing.assert_close(tensor, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ["own scale", "fused"])
def test_a_single_feature_of_each_head_can_stay(name: str) -> None:
    network = _networks()[name]
    masked, structure = copy.deepcopy(network), _structure(network)
    prune(network, X, pruning_ratio={"*#head_dim": 5 / 6})
    assert network[1].head_dim == 1
    history = history_of(network)
    assert history is not None
    mask(masked, history.axes)
    torch.testing.assert_close(network(X), masked(X), rtol=1e-12, atol=1e-13)
    assert structure.widths[next(name for name in structure.widths if "#" in name)] == FEATURES


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_queries_that_a_norm_gives_are_multiplied_by_its_weight(norm: type[nn.Module]) -> None:
    network = _network(Fused(norm=norm))
    structure = _structure(network)
    (features,) = (group for group in structure.groups if group.within)
    assert {rows.tensor.removesuffix("bias") for rows in features.queries} <= {"1.q_norm.weight", "1.q_norm."}
    kept = {features.name: (0, 2, 5)}
    expected = copy.deepcopy(network)
    cut(expected, structure.axes(kept))
    expected[1].fused, expected[1].scale = False, FEATURES**-0.5
    cut(network, structure.axes(kept), factors=structure.factors(kept))
    torch.testing.assert_close(network(X), expected(X), rtol=1e-12, atol=1e-13)


def test_a_stored_scale_is_that_of_the_width() -> None:
    network = _networks()["fused"]
    report = prune(network, X, pruning_ratio=0.5, layers="*#head_dim")
    assert report.final is not None
    fused = network(X)
    assert (network[1].head_dim, network[1].scale) == (3, 3**-0.5)
    network[1].fused = network[2].fused = False
    torch.testing.assert_close(network(X), fused, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("uses", ["sum", "bias", "clip", "training"])
def test_features_stay_where_queries_cannot_be_multiplied(uses: str) -> None:
    structure = _structure(_network(Fused(), Fused(uses)))
    assert [group.name for group in structure.groups if group.within] == ["1.qkv#head_dim"]
    assert ["2.qkv#head_dim were left out, as the temperature" in note for note in structure.notes] == [True]


def _cut_is_masked(network: nn.Module, structure: Structure) -> None:
    kept = {g.name: tuple(range(1, g.width, 2)) for g in structure.groups if g.within}
    masked = copy.deepcopy(network)
    mask(masked, structure.axes(kept))
    expected = masked(X).detach()
    cut(network, structure.axes(kept), factors=structure.factors(kept))
    torch.testing.assert_close(network(X), expected, rtol=1e-12, atol=1e-13)


def test_features_of_layers_that_all_run_before_their_views() -> None:
    network = _network(AtOnce(0.4), AtOnce(0.4))
    structure = _structure(network)
    assert [group.name for group in structure.groups if group.within] == ["1.q#head_dim", "2.q#head_dim"]
    assert not structure.remarks
    _cut_is_masked(network, structure)


def test_notes_say_why_features_stay() -> None:
    network = _network(AtOnce(None), AtOnce(None))
    (note,) = _structure(network).remarks
    assert note.startswith("the features of heads of 1.v#head_dim; 2.v#head_dim stay: a trial cut failed: ")
    assert note.endswith("a number that depends on a width enters `mul` in `1`")
    with pytest.raises(
        ValueError, match=r"has none that can be pruned\..* Note: the features of heads of 1\.v#head_dim"
    ):
        prune(network, X, pruning_ratio=0.5, layers="*#head_dim")


def test_a_note_says_which_features_stay_with_their_heads() -> None:
    class Twice(Attention):
        def forward(self, x: Tensor) -> Tensor:
            is_narrow = self.q.out_features < HEADS * self.head_dim and self.head_dim < FEATURES
            return super().forward(x) * (2 if is_narrow else 1)

    (note,) = _structure(_network(Attention(), Twice())).remarks
    assert note.startswith("the features of heads of 2.q#head_dim stay: a trial cut failed together with their heads: ")


def test_one_layer_with_the_queries_of_two_attentions_loses_those_of_one() -> None:
    network = _network(TwoQueries())
    structure = _structure(network)
    assert [group.name for group in structure.groups if group.queries] == ["1.q#head_dim"]
    assert any("1.q#2#head_dim were left out" in note for note in structure.notes)
    _cut_is_masked(network, structure)


def test_an_attention_that_runs_twice_has_features() -> None:
    block = Fused()
    network = _network(block, block)
    structure = _structure(network)
    (features,) = (group for group in structure.groups if group.within)
    assert {rows.index.size for rows in features.queries} == {HEADS * FEATURES}
    _cut_is_masked(network, structure)


def test_features_are_found_in_half_precision() -> None:
    network = _network(Fused()).bfloat16()
    assert [group.name for group in trace(TracedModel.of(network, X.bfloat16())).groups if group.within]
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_all_heads_leave_with_their_features(tmp_path: Path) -> None:
    class Residual(Attention):
        def __init__(self, *, counted: bool) -> None:
            super().__init__(scaled=False)
            if not counted:
                del self.num_heads

        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    network, other = (_network(Residual(counted=False), Residual(counted=True)) for _ in range(2))
    scope, ratios = Scope(min_width=0), {"1.q": 1.0, "2.q": 0.5, "*#head_dim": 0.5}
    with torch.no_grad():
        network[1].out.bias.zero_()
    expected = copy.deepcopy(network)
    expected[1] = nn.Identity()
    assert prune(network, X, pruning_ratio=ratios, scope=scope).widths["1.q"] == 0
    prune(expected, X, pruning_ratio={"2.q": 0.5, "2.q#head_dim": 0.5})
    torch.testing.assert_close(network(X), expected(X), rtol=1e-12, atol=1e-13)
    save(network, tmp_path / "small.safetensors")
    loaded = load(copy.deepcopy(other), tmp_path / "small.safetensors")
    assert torch.equal(loaded(X), network(X))
    widths = prune(network, X, pruning_ratio=0.75, layers=["2.q", "*#head_dim"], scope=scope).widths
    assert (widths["2.q"], widths["2.q#head_dim"]) == (1, 2)
    widths = prune(network, X, pruning_ratio={"2.q#head_dim": 5 / 6}).widths  # of which this many shapes tell nothing
    assert (widths["2.q"], widths["2.q#head_dim"]) == (1, 1)
    with pytest.raises(ValueError, match=r"computes with their number, 2\.num_heads"):
        prune(other, X, pruning_ratio={"2.q": 1.0}, scope=scope)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "Adagrad", "RMSprop", "ASGD"])
def test_gradients_and_optimizer_state_follow_the_factor(kind: str) -> None:
    options = {"momentum": 0.9} if kind == "SGD" else {"amsgrad": True} if kind == "Adam" else {}
    network = _networks()["fused"]
    structure = _structure(network)
    axes, factors = structure.axes(HALF), structure.factors(HALF)
    masked = copy.deepcopy(network)
    mask(masked, axes)
    narrow = copy.deepcopy(masked)
    states = []
    for one in (masked, narrow):
        optimizer = getattr(torch.optim, kind)(one.parameters(), lr=1e-9, **options)
        for _ in range(2):
            optimizer.zero_grad()
            one(X).square().mean().backward()
            optimizer.step()
        if one is narrow:
            cut(one, axes, [optimizer], factors=factors)
        optimizer.zero_grad()
        one(X).square().mean().backward()
        optimizer.step()  # with the gradients of a network that was made narrow from the beginning
        states.append({name: (p.grad, optimizer.state[p]) for name, p in one.named_parameters()})
    for name in ("1.qkv.weight", "2.qkv.bias"):
        (wide_grad, wide), (grad, state) = (found[name] for found in states)
        kept, (rows, factor) = axes[name][0], factors[name]
        scale = torch.ones(len(kept), dtype=torch.float64)
        scale[rows] = factor
        scale = scale.reshape(-1, *[1] * (grad.dim() - 1))
        torch.testing.assert_close(grad, wide_grad[kept] / scale, rtol=1e-6, atol=1e-9)
        powers = {"exp_avg_sq": -2, "max_exp_avg_sq": -2, "square_avg": -2, "sum": -2, "ax": 1}
        tensors = [key for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1]
        assert tensors
        for key in tensors:
            power = powers.get(key, -1)
            torch.testing.assert_close(state[key], wide[key][kept] * scale**power, rtol=1e-5, atol=1e-12)


def test_stored_weights_follow_the_factor() -> None:
    network = _networks()["fused"]
    structure = _structure(network)
    stored = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    (edit,) = edits_of(structure, HALF, 0, 0, 0)
    read = read_edit(write_edit(edit, {}), NetworkState({n: [*t.shape] for n, t in _sized(network)}, structure.widths))
    cut(network, structure.axes(HALF), factors=structure.factors(HALF))
    for one in (edit, read):
        for name, tensor in transform_stored(one, stored).items():
            assert torch.equal(tensor, network.state_dict()[name]), name


def _sized(network: nn.Module) -> list[tuple[str, Tensor]]:
    sizes = [(f"{n}.{own}", torch.empty(FEATURES)) for n in "12" for own in ("head_dim", "scale")]
    return [*network.state_dict().items(), *sizes]


@pytest.mark.parametrize("name", ["own scale", "fused"])
def test_files_of_networks_with_multiplied_queries(name: str, tmp_path: Path) -> None:
    network = _networks()[name]
    prune(network, X, pruning_ratio=0.5, layers="*#head_dim")
    prune(network, X, pruning_ratio=0.7, layers=["*", "*#head_dim"])
    save(network, tmp_path / "small.safetensors")
    rebuild(network, tmp_path / "small.py")
    loaded = load(_networks()[name], tmp_path / "small.safetensors")
    rebuilt = runpy.run_path(str(tmp_path / "small.py"))["load"](_networks()[name], tmp_path / "small.safetensors")
    for other in (loaded, rebuilt):
        assert torch.equal(other(X), network(X))
        assert getattr(other[1], "scale", None) == getattr(network[1], "scale", None)


@pytest.mark.parametrize("repair", [Ridge(batches=4), SequentialRidge(batches=4)])
def test_repairs_keep_the_temperature(repair: Repair) -> None:
    network = _networks()["fused"]
    with torch.no_grad():  # every other feature is never used
        for block in network[1:3]:
            block.qkv.weight.unflatten(0, (-1, FEATURES))[:, 1::2] = 0
            block.qkv.bias.unflatten(0, (-1, FEATURES))[:, 1::2] = 0
    expected = network(X).detach()
    batches = torch.randn(4, 32, LENGTH, 3, dtype=torch.float64).unbind()
    prune(network, X, pruning_ratio=0.5, layers="*#head_dim", extensions=[repair], data=list(batches))
    assert network[1].head_dim == 3
    torch.testing.assert_close(network(X), expected, rtol=1e-4, atol=1e-4)


def test_inspect_says_whose_features_they_are() -> None:
    text = str(inspect(_networks()["one number"], X))
    assert "1.q#head_dim" in text
    assert "every head of 1.q" in text
