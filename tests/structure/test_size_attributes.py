"""Networks that compute with sizes in attributes of their modules, above all attention."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import load, prune, rebuild, save
from lightning_prune.structure import Structure, TracedModel, trace
from lightning_prune.structure.trials import Trials
from lightning_prune.surgery import History, HistoryError, history_of
from lightning_prune.surgery.edits import Keep
from lightning_prune.surgery.history import attach, edits_of
from lightning_prune.surgery.restore import match_checkpoint_shapes
from lightning_prune.surgery.shrink import CutError, cut, mask
from tests.support.cutting import draw

BATCH, TOKENS, WIDTH = 2, 3, 8


class Attention(nn.Module):
    """One layer for queries, keys and values, whose head count and head width are attributes."""

    def __init__(self, heads: int = 4, features: int = 6, width: int = WIDTH) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner_dim = heads, features, heads * features
        self.layer_idx = 4  # equals the number of heads of some tests
        self.qkv, self.out = nn.Linear(width, 3 * self.inner_dim), nn.Linear(self.inner_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, self.inner_dim)
        return self.out(x)


class Grouped(nn.Module):
    """Each key–value head serves several query heads, under rotary embeddings; the attributes have odd names."""

    def __init__(self, heads: int = 6, keys: int = 3, features: int = 4) -> None:
        super().__init__()
        self.nq, self.nk, self.w = heads, keys, features
        self.q, self.o = nn.Linear(WIDTH, heads * features), nn.Linear(heads * features, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, keys * features), nn.Linear(WIDTH, keys * features)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        angles = torch.arange(tokens, dtype=x.dtype)[:, None] / 10.0 ** torch.arange(2, dtype=x.dtype).repeat(2)
        q, k = (
            layer(x).view(batch, tokens, n, self.w).transpose(1, 2)
            for layer, n in ((self.q, self.nq), (self.k, self.nk))
        )
        v = self.v(x).view(batch, tokens, self.nk, self.w).transpose(1, 2)
        q, k = (part * angles.cos() + _turned(part) * angles.sin() for part in (q, k))
        times = self.q.out_features // self.k.out_features
        k, v = (part[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for part in (k, v))
        x = (q @ k.transpose(-2, -1) / 2.0).softmax(-1) @ v
        return self.o(x.transpose(1, 2).reshape(batch, tokens, self.nq * self.w))


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Encoder(nn.Module):
    """Its own width is an attribute, too."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed_dim, self.patch_size = WIDTH, WIDTH
        self.embed, self.block, self.head = nn.Linear(5, WIDTH), block, nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.embed(x), (0, 0, self.patch_size, 0))[:, self.patch_size :]
        x = x + self.block(x)
        return self.head(x.reshape(-1, self.embed_dim)).view(len(x), -1)


def _encoder(block: nn.Module | None = None) -> Encoder:
    torch.manual_seed(0)
    return Encoder(Attention() if block is None else block).double()


def _example() -> Tensor:
    return torch.randn(BATCH, TOKENS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _traced(model: nn.Module) -> Structure:
    return _traced_on(model, _example())


def _traced_on(model: nn.Module, x: Tensor) -> Structure:
    return trace(TracedModel.of(model, x))


def _values(model: nn.Module) -> dict[str, int]:
    return {
        f"{prefix}.{name}": value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is int
    }


def _drawn(structure: Structure, seed: int = 0) -> dict[str, tuple[int, ...]]:
    draw = np.random.default_rng(seed)
    return {
        group.name: tuple(np.sort(draw.permutation(group.width)[: max(1, group.width - 2)]).tolist())
        for group in structure.groups
    }


@pytest.mark.parametrize("block", [Attention(), Attention(4, 4), Attention(3, 8), Attention(8, 2), Grouped()])
def test_cut_heads_and_widths_equal_the_masked_network(block: nn.Module) -> None:
    model, x = _encoder(copy.deepcopy(block)), _example()
    structure = _traced(model)
    heads = block.nk if isinstance(block, Grouped) else block.num_heads
    features = {g.name: block.head_dim for g in structure.groups if g.within}
    assert structure.widths == {"embed": WIDTH, structure.groups[1].name: heads, **features}
    assert len(features) == (isinstance(block, Attention) and block.head_dim > 2)
    assert structure.reachable["params"] > 0.9
    for seed in range(3):
        kept = _drawn(structure, seed)
        axes, small, zeroed = structure.axes(kept), copy.deepcopy(model), copy.deepcopy(model)
        cut(small, axes, factors=structure.factors(kept))
        mask(zeroed, axes)
        torch.testing.assert_close(small(x), zeroed(x), rtol=1e-12, atol=1e-12)


def test_attributes_follow_and_others_stay() -> None:
    model = _encoder()
    before = _values(model)
    structure = _traced(model)
    cut(model, structure.axes({"embed": (0, 2, 4, 5, 7), "block.qkv": (1, 3)}))
    changed = {name: value for name, value in _values(model).items() if value != before[name]}
    assert {name: changed[name] for name in changed if not name.endswith("_features")} == {
        ".embed_dim": 5,
        "block.num_heads": 2,
        "block.inner_dim": 12,
    }


def test_narrow_network_equals_one_that_was_built_narrow() -> None:
    model, x = _encoder(), _example()
    structure = _traced(model)
    kept, small = np.array([0, 3]), Attention(heads=2).double()
    rows = (np.arange(3)[:, None, None] * 24 + kept[:, None] * 6 + np.arange(6)).ravel()
    with torch.no_grad():
        small.qkv.weight.copy_(model.block.qkv.weight[rows])
        small.qkv.bias.copy_(model.block.qkv.bias[rows])
        small.out.weight.copy_(model.block.out.weight[:, rows[:12]])
        small.out.bias.copy_(model.block.out.bias)
    expected = copy.deepcopy(model)
    expected.block = small
    cut(model, structure.axes({"block.qkv": (0, 3)}))
    torch.testing.assert_close(model(x), expected(x), rtol=1e-12, atol=1e-12)


class Literal(Attention):
    """Its number of heads is written into the code."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, 24))


class Shared(nn.Module):
    """Two attentions with one number of heads, so that neither can lose heads alone, but both the same."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 4
        self.first, self.second = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.out = nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = [layer(x).view(*x.shape[:2], self.n, 6) for layer in (self.first, self.second)]
        return self.out(torch.cat([part.softmax(-1).flatten(2) for part in parts], -1))


class Fused(nn.Module):
    """One layer makes queries, keys and values, which are split by numbers that equal others by chance."""

    def __init__(self, heads: int, keys: int, features: int) -> None:
        super().__init__()
        self.w, self.nq, self.nk = features, heads, keys
        self.qkv, self.o = nn.Linear(WIDTH, (heads + 2 * keys) * features), nn.Linear(heads * features, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split([self.nq * self.w, self.nk * self.w, self.nk * self.w], -1)
        q, k, v = (part.unflatten(-1, (-1, self.w)).transpose(1, 2) for part in parts)
        times = q.shape[1] // k.shape[1]
        k, v = (part[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for part in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("heads", "keys", "features"), [(6, 6, 6), (6, 3, 6), (8, 2, 4), (4, 2, 6), (4, 4, 8)])
def test_of_numbers_that_are_equal_those_that_follow_are_found(heads: int, keys: int, features: int) -> None:
    model, x = _encoder(Fused(heads, keys, features)), _example()
    structure = _traced(model)
    assert structure.widths == {"embed": WIDTH, "block.qkv": keys, "block.qkv#head_dim": features}
    kept = {"block.qkv": (*range(keys - 1),), "block.qkv#head_dim": (*range(0, features, 2),), "embed": (0, 3, 4)}
    axes, zeroed = structure.axes(kept), copy.deepcopy(model)
    cut(model, axes, factors=structure.factors(kept))
    mask(zeroed, axes)
    assert (model.block.nq, model.block.nk, model.block.w) == (heads // keys * (keys - 1), keys - 1, features // 2)
    torch.testing.assert_close(model(x), zeroed(x), rtol=1e-12, atol=1e-12)


def test_what_no_attribute_repairs_is_frozen() -> None:
    structure = _traced(_encoder(Literal()))
    assert structure.widths == {"embed": WIDTH}
    assert any(frozen.layer.startswith("block.") for frozen in structure.frozen)


def test_attentions_with_one_number_of_heads_lose_the_same_heads() -> None:
    model, x = _encoder(Shared()), _example()
    structure = _traced(model)
    assert structure.widths == {"embed": WIDTH, "block.first": 4}
    axes, zeroed = structure.axes({"block.first": (1, 3)}), copy.deepcopy(model)
    cut(model, axes)
    mask(zeroed, axes)
    assert (model.block.n, model.block.second.out_features) == (2, 12)
    torch.testing.assert_close(model(x), zeroed(x), rtol=1e-12, atol=1e-12)


class Biased(nn.Module):
    """As in T5: the number of heads follows from the width but for a bias, which may be none."""

    def __init__(self, *, has_bias: bool) -> None:
        super().__init__()
        self.n_heads, self.features, self.has_bias = 4, 6, has_bias
        self.q, self.k, self.v, self.o = (nn.Linear(*sizes) for sizes in [(WIDTH, 24)] * 3 + [(24, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], -1, self.features).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3)
        if self.has_bias:
            scores = scores + torch.zeros(1, self.n_heads, TOKENS, TOKENS, dtype=x.dtype)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_heads_of_two_attentions_of_which_one_needs_an_attribute() -> None:
    """Both are split alike, so that heads are chosen for both at once, though they are not cut in the same way."""
    network = nn.Sequential(nn.Linear(5, WIDTH), Biased(has_bias=False), Biased(has_bias=True)).double()
    widths = _traced(network).widths
    assert (widths["1.q"], widths["2.q"]) == (4, 4)


class Caching(Attention):
    """As in transformers: the configuration decides whether keys and values are returned, for the next call."""

    def __init__(self) -> None:
        super().__init__(width=5)
        self.config = SimpleNamespace(use_cache=True)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (super().forward(x), self.qkv(x)) if self.config.use_cache else super().forward(x)


def test_a_cache_is_no_output() -> None:
    network = Caching().double()
    assert _traced(network).widths == {"qkv": 4, "qkv#head_dim": 6}
    assert network.config.use_cache


def test_undoing_a_cut_restores_attributes() -> None:
    model, x = _encoder(), _example()
    before, expected = _values(model), model(x).detach()
    change = cut(model, _traced(model).axes({"embed": (0, 1), "block.qkv": (2,)}))
    assert _values(model) != before
    change.undo()
    assert _values(model) == before
    assert torch.equal(model(x), expected)


def test_history_replays_and_widens() -> None:
    model, x = _encoder(), _example()
    dense = copy.deepcopy(model)
    structure, history = _traced(model), None
    checkpoints = []
    for number, kept in enumerate(({"embed": (0, 1, 2, 3, 5, 6), "block.qkv": (0, 2, 3)}, {"block.qkv": (0, 2)})):
        history = history_of(model) or History.begin(structure)
        for edit in edits_of(structure, kept, 0, 0, number):
            history = history.add(edit, model)
        cut(model, structure.axes(kept))
        attach(model, history)
        structure = structure.take(kept)
        plain = History.from_plain(history.to_plain())
        checkpoints.append((plain, copy.deepcopy(model.state_dict()), _values(model), model(x).detach()))
    for here in (dense, model):  # from the dense network on, and back from the narrowest
        for plain, weights, values, outputs in checkpoints:
            match_checkpoint_shapes(here, weights, plain, strict=True)
            here.load_state_dict(weights)
            assert _values(here) == values
            assert torch.equal(here(x), outputs)
    match_checkpoint_shapes(model, {}, None)
    assert _values(model) == _values(_encoder())
    again = _traced(dense)
    assert again.widths == structure.widths
    assert {m.tensor for g in again.groups for m in g.sizes} == {m.tensor for g in structure.groups for m in g.sizes}


def test_history_of_another_number_of_heads_is_refused() -> None:
    model = _encoder()
    structure = _traced(model)
    history = History.begin(structure).add(edits_of(structure, {"block.qkv": (0, 1)}, 0, 0, 0)[0], model)
    other = _encoder()
    other.block.num_heads = 8
    with pytest.raises(HistoryError, match=r"block.num_heads was \[4\] before it was cut, here it is \[8\]"):
        match_checkpoint_shapes(other, {}, history)
    assert other.block.num_heads == 8


def test_positions_beyond_a_size_are_refused() -> None:
    model = _encoder()
    with pytest.raises(CutError, match="expected positions within its value, 4, got 2 positions up to 4"):
        cut(model, {"block.num_heads": {0: np.array([0, 4])}})
    with pytest.raises(CutError, match="got 0 positions"):
        cut(model, {"block.num_heads": {0: np.array([], dtype=np.int64)}})
    edit = Keep({"block.depth": {0: np.array([0])}}, {}, 0, 0, 0)
    with pytest.raises(HistoryError, match="whole number"):
        History.begin(_traced(model)).add(edit, model)
    assert model.block.num_heads == 4


def test_files_restore_attributes(tmp_path) -> None:
    model, x = _encoder(), _example()
    prune(model, x, pruning_ratio=0.5)
    assert model.block.num_heads == 2
    save(model, tmp_path / "small.safetensors")
    rebuild(model, tmp_path / "small.py")
    loaded = load(_encoder(), tmp_path / "small.safetensors")
    defined: dict[str, object] = {}
    exec((tmp_path / "small.py").read_text(), defined)
    rebuilt = defined["load"](_encoder(), str(tmp_path / "small.safetensors"))
    for again in (loaded, rebuilt):
        assert _values(again) == _values(model)
        assert torch.equal(again(x), model(x))


class Mixed(nn.Module):
    """Convolves unequal parts of its channels by kernels of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [5, 3]
        self.stem, self.head = nn.Conv1d(2, 8, 1), nn.Conv1d(9, 2, 1)
        self.parts = nn.ModuleList([nn.Conv1d(5, 5, 3, padding=1, groups=5), nn.Conv1d(3, 4, 5, padding=2)])

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.stem(x).relu(), self.splits, 1)
        return self.head(torch.cat([layer(part) for layer, part in zip(self.parts, parts, strict=True)], 1).relu())


def test_sizes_in_a_list(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Mixed().double(), torch.randn(2, 2, 6, dtype=torch.float64)
    dense = copy.deepcopy(model)
    structure = trace(TracedModel.of(model, x))
    assert sorted(structure.widths.values()) == [3, 4, 5]
    axes = structure.axes(_drawn(structure))
    zeroed = copy.deepcopy(model)
    change = cut(model, axes)
    mask(zeroed, axes)
    assert model.splits == [3, 1]
    torch.testing.assert_close(model(x), zeroed(x), rtol=1e-12, atol=1e-12)
    change.undo()
    assert model.splits == [5, 3]
    prune(model, x, pruning_ratio=0.4)
    save(model, tmp_path / "small.safetensors")
    rebuild(model, tmp_path / "small.py")
    defined: dict[str, object] = {}
    exec((tmp_path / "small.py").read_text(), defined)
    loaded = load(copy.deepcopy(dense), tmp_path / "small.safetensors")
    rebuilt = defined["load"](copy.deepcopy(dense), str(tmp_path / "small.safetensors"))
    for again in (loaded, rebuilt):
        assert again.splits == model.splits != [5, 3]
        assert torch.equal(again(x), model(x))


class Rearrange(nn.Module):
    """As that of einops, for the two patterns of `Einops`: it computes with the pairs, and is copied by the dict."""

    def __init__(self, pattern: str, **axes_lengths: int) -> None:
        super().__init__()
        self.pattern, self.axes_lengths, self._axes_lengths = pattern, axes_lengths, tuple(axes_lengths.items())

    def __getstate__(self) -> dict[str, object]:
        return {"pattern": self.pattern, "axes_lengths": self.axes_lengths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["pattern"], **state["axes_lengths"])

    def forward(self, x: Tensor) -> Tensor:
        lengths = dict(self._axes_lengths)
        if self.pattern == "b h l d -> b l (h d)":
            return x.transpose(1, 2).flatten(2)
        return x.view(*x.shape[:2], lengths["qkv"], lengths["heads"], -1).permute(2, 0, 3, 1, 4)


Rearrange.__module__ = "einops.layers.torch"


class Einops(nn.Module):
    """Attention whose number of heads is in a layer of einops alone."""

    def __init__(self, heads: int = 4, features: int = 3) -> None:
        super().__init__()
        width = heads * features
        self.embed, self.qkv, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3 * width), nn.Linear(width, 2)
        self.apart = Rearrange("b l (qkv heads d) -> qkv b heads l d", qkv=3, heads=heads)
        self.together, self.scale = Rearrange("b h l d -> b l (h d)"), features**-0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.apart(self.qkv(self.embed(x)))
        return self.out(self.together((q @ k.mT * self.scale).softmax(-1) @ v))


def test_heads_in_a_layer_of_einops(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Einops().double(), _example()
    dense, structure = copy.deepcopy(model), _traced(model)
    assert structure.widths == {"embed": WIDTH, "qkv": 4, "qkv#head_dim": 3}
    axes = structure.axes({"qkv": (1, 3), "embed": (0, 2, 5)})
    change, zeroed = cut(model, axes), copy.deepcopy(dense)
    mask(zeroed, axes)
    for narrow in (model, copy.deepcopy(model)):
        assert narrow.apart.axes_lengths == dict(narrow.apart._axes_lengths) == {"qkv": 3, "heads": 2}
        torch.testing.assert_close(narrow(x), zeroed(x), rtol=1e-12, atol=1e-12)
    change.undo()
    assert model.apart.axes_lengths == dict(model.apart._axes_lengths) == {"qkv": 3, "heads": 4}
    prune(model, x, pruning_ratio=0.5)
    save(model, tmp_path / "small.safetensors")
    rebuild(model, tmp_path / "small.py")
    defined: dict[str, Any] = {}
    exec((tmp_path / "small.py").read_text(), defined)
    loaded = load(copy.deepcopy(dense), tmp_path / "small.safetensors")
    rebuilt = defined["load"](copy.deepcopy(dense), str(tmp_path / "small.safetensors"))
    for again in (loaded, rebuilt):
        assert again.apart.axes_lengths == dict(again.apart._axes_lengths) == {"qkv": 3, "heads": 2}
        assert torch.equal(again(x), model(x))
    match_checkpoint_shapes(loaded, {}, None)
    assert loaded.apart.axes_lengths == dict(loaded.apart._axes_lengths) == {"qkv": 3, "heads": 4}


class TiedBlock(nn.Module):
    """Views the features of all heads as its inputs are wide, as much published code does."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).split(self.width, dim=2)
        q, k, v = (part.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))


def _tied(width: int, heads: int) -> nn.Sequential:
    blocks = [TiedBlock(width, heads) for _ in range(2)]
    return nn.Sequential(nn.Linear(5, width), *blocks, nn.Linear(width, 2)).double()


def test_heads_leave_with_channels_of_the_embedding_where_code_ties_both() -> None:
    torch.manual_seed(0)
    wide, narrow, x = _tied(12, 4), _tied(6, 2), _example()
    structure = _traced(wide)
    assert structure.widths == {"0": 4}
    kept = np.array([1, 3])
    channels = (kept[:, None] * 3 + np.arange(3)).ravel()
    all_heads = (np.arange(3)[:, None] * 12 + channels).ravel()
    expected = {}
    for name, tensor in wide.state_dict().items():
        axes = {0: all_heads if ".qkv." in name else channels, 1: channels}
        axes.pop(0 if name.startswith("3.") else 1 if name.startswith("0.") else 2, None)
        for dim in range(tensor.dim()):
            tensor = tensor.index_select(dim, torch.from_numpy(axes[dim])) if dim in axes else tensor
        expected[name] = tensor
    narrow.load_state_dict(expected)
    cut(wide, structure.axes({"0": (1, 3)}))
    assert [(wide[n].heads, wide[n].width) for n in (1, 2)] == [(2, 6)] * 2
    torch.testing.assert_close(wide(x), narrow(x), rtol=1e-12, atol=1e-12)


class Pooled(nn.Module):
    """Attends to its inputs at half the resolution, whose layer is viewed as its inputs are wide, too."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.query, self.both, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.pool = nn.Conv1d(width, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q = self.query(x).reshape(batch, tokens, self.heads, -1).transpose(1, 2)
        pooled = self.pool(x.mT.reshape(batch, width, tokens)).reshape(batch, width, -1).mT
        both = self.both(pooled).reshape(batch, -1, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, *both.unbind(0))
        return x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))


def test_layers_that_code_views_as_wide_as_the_embedding_leave_with_its_heads() -> None:
    torch.manual_seed(0)
    # The single head of the first block has two parts, of keys and values, which are no heads of the second.
    model = nn.Sequential(nn.Linear(5, 4), Pooled(4, 1), nn.Linear(4, 8), Pooled(8, 4), Pooled(8, 4), nn.Linear(8, 2))
    model, x = model.double(), torch.randn(BATCH, 4, 5, dtype=torch.float64)
    structure = _traced_on(model, x)
    assert structure.widths["2"] == 4
    assert {"3.pool", "3.both", "4.pool", "4.out"} <= set(structure.group("2").producers)
    for heads in ((0, 3), (1, 2, 3), (2,)):
        axes = structure.axes({"2": heads})
        small, zeroed = copy.deepcopy(model), copy.deepcopy(model)
        cut(small, axes)
        mask(zeroed, axes)
        assert (small[3].heads, small[3].head_dim, small[3].pool.out_channels) == (len(heads), 2, 2 * len(heads))
        torch.testing.assert_close(small(x), zeroed(x), rtol=1e-12, atol=1e-12)


class GivenQuery(nn.Module):
    """Its queries are the channels of the embedding, without a layer in between, as the global queries of GCViT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.both, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q = x.reshape(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        both = self.both(x).reshape(batch, tokens, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, *both.unbind(0), scale=0.5)
        return x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Halved(nn.Module):
    """Attends across channels after a step for one half of them, as EdgeNeXt does."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.gain = heads, nn.Parameter(torch.rand(width // 2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        y = torch.cat((self.gain * first, second), dim=-1)
        batch, tokens, width = y.shape
        q, k, v = self.qkv(y).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        y = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v
        return x + self.out(y.permute(0, 3, 1, 2).reshape(batch, tokens, width))


@pytest.mark.parametrize("block", [GivenQuery, Halved])
def test_channels_that_leave_together_already_leave_with_heads(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24), block(24, 4), block(24, 4), nn.Linear(24, 2)).double()
    structure, x = _traced(model), _example()
    assert structure.widths["0"] == (4 if block is GivenQuery else 2)
    for kept in (draw(structure, seed) for seed in range(3)):
        axes = structure.axes(kept)
        small, zeroed = copy.deepcopy(model), copy.deepcopy(model)
        cut(small, axes, factors=structure.factors(kept))
        mask(zeroed, axes)
        features = len(kept["0#head_dim"]) if "0#head_dim" in kept else 24 // structure.widths["0"]
        assert small[0].out_features == features * len(kept["0"])
        torch.testing.assert_close(small(x), zeroed(x), rtol=1e-12, atol=1e-12)


class Captioned(nn.Module):
    """Views a text as wide as the image that attends to it, as PixArt of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.out = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 2)
        self.wide, self.q = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)
        self.k, self.v = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        image, text = self.image(x), self.text(x)
        text = text.view(len(x), -1, image.shape[-1])
        scale, shift, gate = self.wide(image.mean(1)).view(len(x), 3, -1).chunk(3, 1)
        mixed = (self.q(image) @ self.k(text).mT).softmax(-1) @ self.v(text)
        return self.out(image * scale + shift + gate * mixed)


def test_layers_that_code_views_as_wide_as_another_lose_the_same_channels() -> None:
    torch.manual_seed(0)
    model, x = Captioned().double(), _example()
    structure = _traced(model)
    assert structure.widths == {"image": WIDTH, "q": 3}
    axes, zeroed = structure.axes({"image": (0, 2, 3, 7)}), copy.deepcopy(model)
    cut(model, axes)
    mask(zeroed, axes)
    assert model.text.out_features == 4
    torch.testing.assert_close(model(x), zeroed(x), rtol=1e-12, atol=1e-12)


class ClassToken(nn.Module):
    """Attends from a class token, whose position is sliced off and viewed together with the features."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.token = heads, nn.Parameter(torch.randn(1, 1, width))
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, width = x.shape
        x = torch.cat((self.token.expand(batch, -1, -1), x), dim=1)
        q = self.q(x[:, :1]).reshape(batch, 1, self.heads, width // self.heads).transpose(1, 2)
        k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, 1, width)
        return (x[:, :1] + self.out(y))[:, 0]


def test_a_position_that_is_merged_with_features_does_not_hold_them() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 12), ClassToken(12, 4), nn.Linear(12, 2)).double(), _example()
    structure = _traced_on(model, x)
    assert structure.widths == {"0": 4}
    for heads in ((0, 3), (2,)):
        axes = structure.axes({"0": heads})
        small, zeroed = copy.deepcopy(model), copy.deepcopy(model)
        cut(small, axes)
        mask(zeroed, axes)
        torch.testing.assert_close(small(x), zeroed(x), rtol=1e-12, atol=1e-12)


class AddsZeros(nn.Module):
    """Attention that adds zeros for all heads, of another layer if there are any, as T5 does from a decoder."""

    def __init__(self, heads: int = 4, features: int = 3) -> None:
        super().__init__()
        self.heads, self.features = heads, features
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * features) for _ in range(3))
        self.out = nn.Linear(heads * features, WIDTH)

    def forward(self, x: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(-1, (-1, self.features)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if zeros is None:
            zeros = torch.zeros(1, self.heads, x.shape[1], x.shape[1], dtype=x.dtype)
        y = (q @ k.mT + zeros).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2)), zeros


class SharesZeros(nn.Module):
    """Passes the zeros of the first attention on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = AddsZeros(), AddsZeros(), AddsZeros()

    def forward(self, x: Tensor) -> Tensor:
        x, zeros = self.first(x, None)
        x, zeros = self.second(x, zeros)
        x, _ = self.last(x, None)
        return x


def test_zeros_that_two_layers_add_tie_their_heads() -> None:
    model, x = _encoder(SharesZeros()), _example()
    structure = _traced(model)
    widths = {name: width for name, width in structure.widths.items() if "#head_dim" not in name}
    assert widths == {"embed": WIDTH, "block.first.q": 4, "block.last.q": 4}
    assert set(structure.group("block.first.q").consumers) == {"block.first.out", "block.second.out"}
    for seed in range(3):
        axes = structure.axes(_drawn(structure, seed))
        small, zeroed = copy.deepcopy(model), copy.deepcopy(model)
        cut(small, axes)
        mask(zeroed, axes)
        torch.testing.assert_close(small(x), zeroed(x), rtol=1e-12, atol=1e-12)
    assert [part.heads for part in (small.block.first, small.block.second, small.block.last)] == [2, 2, 2]


class Separate(nn.Module):
    """Fused attention of separate queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v, self.o = (
            nn.Linear(WIDTH, 4),
            nn.Linear(WIDTH, 4),
            nn.Linear(WIDTH, 4),
            nn.Linear(4, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_as_many_samples_as_heads(batch: int) -> None:
    structure = trace(TracedModel.of(_encoder(Separate()), _example()[:1].expand(batch, -1, -1)))
    assert structure.widths == {"embed": WIDTH, "block.q": 2}


class TwoAttentions(nn.Module):
    """Self- and cross-attention with one number of heads, which neither computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.first, self.second = Separate(), Separate()
        for layer in (self.first, self.second):
            layer.q, layer.k, layer.v = (nn.Linear(WIDTH, 12) for _ in range(3))
            layer.o = nn.Linear(12, WIDTH)
            layer.heads = -1
        self.members = nn.ModuleList([self.first.q, self.second.q])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            q, k, v = (part(x).unflatten(-1, (-1, 3)).transpose(1, 2) for part in (layer.q, layer.k, layer.v))
            x = x + layer.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x


def test_a_number_that_two_groups_share_is_that_of_neither() -> None:
    model = _encoder(TwoAttentions())
    structure = _traced(model)
    assert sorted(structure.widths.values()) == [4, 4, WIDTH]
    cut(model, structure.axes({name: (0, n - 1) for name, n in structure.widths.items() if n == 4}))
    assert model.block.num_heads == 4


class Scaled(Encoder):
    """A number follows from its width."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed.out_features**0.5


def test_many_attributes_of_one_value_are_no_search_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _encoder()
    model.__class__ = Scaled
    for module in model.modules():
        vars(module).update({f"size{n}": WIDTH for n in range(12)})
    counted = []
    attempt = Trials.attempt
    monkeypatch.setattr(Trials, "attempt", lambda *args, **kw: counted.append(1) or attempt(*args, **kw))
    assert _traced(model).widths == {"block.qkv": 4, "block.qkv#head_dim": 6}
    assert len(counted) < 400


class Selecting(nn.Module):
    """A view with two sizes, and a parameter that a number selects: an index of its own, or one of the sizes."""

    def __init__(self, index: str) -> None:
        super().__init__()
        self.layer_idx, self.queries, self.keys, self.index = 4, 4, 4, index
        self.q, self.k, self.v = (nn.Linear(WIDTH, 4 * 3) for _ in "qkv")
        self.out, self.offsets = nn.Linear(4 * 3, WIDTH), nn.ParameterList(torch.randn(WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        heads = max(self.queries, self.keys)
        x = x + self.offsets[getattr(self, self.index)]
        q, k, v = (layer(x).view(*x.shape[:2], heads, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_number_that_is_an_index_stays() -> None:
    network = _encoder(Selecting("layer_idx"))
    masked, structure = copy.deepcopy(network), _traced(network)
    group = structure.group("block.q")
    assert {size.tensor for size in group.sizes} == {"block.queries", "block.keys"}
    axes = structure.axes({"block.q": (0, 3)})
    cut(network, axes)
    mask(masked, axes)
    torch.testing.assert_close(network(_example()), masked(_example()))
    assert network.block.layer_idx == 4


def test_a_size_that_selects_a_parameter_holds_the_heads() -> None:
    structure = _traced_on(Selecting("keys"), torch.ones(BATCH, TOKENS, WIDTH))  # all of its parameters are alike
    assert "q" not in structure.widths
