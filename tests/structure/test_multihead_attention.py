"""`nn.MultiheadAttention`, of which heads and embedding width are cut apart."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import load, prune, rebuild, save, strip
from lightning_prune.structure import Structure, TracedModel, trace
from lightning_prune.structure.attention import MultiheadAttention, attention
from lightning_prune.surgery.restore import dense_copy
from lightning_prune.surgery.shrink import cut, mask

WIDTH, HEADS, BATCH, QUERIES, KEYS = 12, 4, 2, 3, 5

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "other keys": {"kdim": 7, "vdim": 5},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _layer(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)  # biases, too
    return layer


def _masks() -> dict[str, dict[str, Any]]:
    padding = torch.tensor([[False] * KEYS, [False, False, True, False, True]])
    causal = torch.ones(QUERIES, KEYS).triu(1).bool()
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": _draw(QUERIES, KEYS, seed=3)},
        "per head": {"attn_mask": _draw(BATCH * HEADS, QUERIES, KEYS, seed=4)},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "hint": {"attn_mask": causal, "is_causal": True},
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_results_are_those_of_pytorch(options: dict[str, Any]) -> None:
    layer = _layer(**options)
    inputs = [_draw(BATCH, length, width, seed=n) for n, (length, width) in enumerate(
        [(QUERIES, WIDTH), (KEYS, options.get("kdim", WIDTH)), (KEYS, options.get("vdim", WIDTH))]
    )]  # fmt: skip
    if not layer.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    ways = itertools.product(_masks().items(), [False, True], [False, True])
    for (name, masks), need_weights, average in ways:
        if name == "hint" and layer.bias_k is not None:
            continue  # PyTorch forgets the added keys where it relies on the hint
        arguments = {**masks, "need_weights": need_weights, "average_attn_weights": average}
        expected, got = layer(*inputs, **arguments), attention(layer, *inputs, **arguments)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_single_sample_and_self_attention(need_weights: bool) -> None:
    layer, x = _layer(), _draw(QUERIES, WIDTH)
    for inputs in ((x, x, x), (x, _draw(KEYS, WIDTH, seed=1), _draw(KEYS, WIDTH, seed=2))):
        expected = layer(*inputs, need_weights=need_weights)
        torch.testing.assert_close(
            attention(layer, *inputs, need_weights=need_weights), expected, rtol=1e-12, atol=1e-12
        )


def test_bad_masks_are_refused() -> None:
    layer, x = _layer(batch_first=True), _draw(BATCH, KEYS, WIDTH)
    with pytest.raises(RuntimeError, match="expected a mask of 5 keys, got 4"):
        attention(layer, x, x, x, torch.zeros(BATCH, 4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="expected `attn_mask` with `is_causal`"):
        attention(layer, x, x, x, is_causal=True)


class Network(nn.Module):
    """Asks for weights, as is the default, and uses them if told to."""

    def __init__(self, uses: str = "", **options: Any) -> None:
        super().__init__()
        self.stem, self.attention, self.head = (
            nn.Linear(6, WIDTH),
            _layer(batch_first=True, **options),
            nn.Linear(WIDTH, 2),
        )
        self.uses = uses
        self.double()

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y, weights = self.attention(x, x, x)
        if self.uses == "result":
            y = y * weights.sum(-1, keepdim=True)
        x = self.head(x + y)
        return (x, weights) if self.uses == "output" else x


def _traced(model: nn.Module) -> Structure:
    return trace(TracedModel.of(model, _draw(BATCH, KEYS, 6)))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_heads_and_width_equal_the_masked_network(options: dict[str, Any]) -> None:
    model, x = Network(**options), _draw(BATCH, KEYS, 6, seed=5)
    structure = _traced(model)
    assert structure.widths == {"stem": WIDTH, "attention": HEADS, "attention#head_dim": WIDTH // HEADS}
    features = "attention#head_dim"
    for kept in (
        {"attention": (1, 3)},
        {"stem": (0, 1, 4, 6, 11)},
        {"attention": (0,), "stem": (2, 3)},
        {features: (0, 2)},
        {features: (1,), "attention": (0, 2), "stem": (2, 3)},
    ):
        small, zeroed = copy.deepcopy(model), copy.deepcopy(model)
        cut(small, structure.axes(kept))
        mask(zeroed, structure.axes(kept))
        torch.testing.assert_close(small(x), zeroed(x), rtol=1e-12, atol=1e-12)
        layer = small.attention
        assert (layer.num_heads, layer.embed_dim) == (len(kept.get("attention", range(HEADS))), small.stem.out_features)
        width = len(kept.get(features, range(WIDTH // HEADS)))
        assert (layer.head_dim, type(layer)) == (width, MultiheadAttention)


@pytest.mark.parametrize("uses", ["result", "output"])
def test_no_head_leaves_where_attention_weights_are_used(uses: str) -> None:
    model, x = Network(uses), _draw(BATCH, KEYS, 6, seed=5)
    structure = _traced(model)
    assert structure.widths == {"stem": WIDTH, "attention": WIDTH // HEADS}  # features of every head
    small, zeroed, kept = copy.deepcopy(model), copy.deepcopy(model), {"attention": (0, 2), "stem": (2, 3, 5)}
    cut(small, structure.axes(kept))
    mask(zeroed, structure.axes(kept))
    torch.testing.assert_close(small(x), zeroed(x), rtol=1e-12, atol=1e-12)
    assert (small.attention.num_heads, small.attention.head_dim) == (HEADS, 2)


def test_the_class_is_pytorchs_where_it_can_be() -> None:
    model, x = Network(), _draw(BATCH, KEYS, 6)
    change = cut(model, _traced(model).axes({"attention": (0, 1)}))
    assert type(model.attention) is MultiheadAttention
    with pytest.raises(ValueError, match="attention of lightning_prune in attention, whose heads"):
        strip(model)
    change.undo()
    assert type(model.attention) is nn.MultiheadAttention
    assert model.attention.num_heads == HEADS
    cut(model, _traced(model).axes({"attention": (0, 1), "stem": (0, 1, 2, 3, 4, 5)}))
    assert type(model.attention) is nn.MultiheadAttention
    assert strip(model)(x).shape == (BATCH, KEYS, 2)


def test_files_and_widening(tmp_path) -> None:
    x = _draw(BATCH, KEYS, 6)
    model = Network()
    prune(model, x, pruning_ratio=0.5, ignore=["stem"])
    save(model, tmp_path / "small.safetensors")
    rebuild(model, tmp_path / "small.py")
    text = (tmp_path / "small.py").read_text()
    assert "lightning_prune." not in text.split('"""', 2)[2]
    defined: dict[str, Any] = {}
    exec(text, defined)
    loaded = load(Network(), tmp_path / "small.safetensors")
    rebuilt = defined["load"](Network(), str(tmp_path / "small.safetensors"))
    for again in (loaded, rebuilt, copy.deepcopy(model)):
        assert again.attention.num_heads == 2
        assert torch.equal(again(x), model(x))
    wide = dense_copy(TracedModel.of(model, x), "real")
    assert type(wide.attention) is nn.MultiheadAttention
    assert (wide.attention.num_heads, wide.attention.embed_dim) == (HEADS, WIDTH)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_transformer_encoder_with_padding_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True), 2).double().eval()
    x, padding = _draw(BATCH, KEYS, WIDTH), torch.tensor([[False] * KEYS, [False, False, False, True, True]])
    structure = trace(TracedModel.of(model, x))
    heads = {name: (0, 2, 3) for name in structure.widths if name.endswith("self_attn")}
    assert len(heads) == 2
    cut(model, structure.axes(heads))
    with torch.no_grad():  # packs samples of different lengths
        packed = model(x, src_key_padding_mask=padding)
    expected = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(packed[~padding], expected[~padding], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_transformer_encoder_whose_heads_become_odd() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS + 2, 16, batch_first=True), 1)
    model = nn.Sequential(nn.Linear(6, WIDTH), model).double().eval()
    x, padding = _draw(BATCH, KEYS, 6), torch.tensor([[False] * KEYS, [False, False, False, True, True]])
    whole = nn.Sequential(model, nn.Linear(WIDTH, 2).double()).eval()
    structure = trace(TracedModel.of(whole, x))
    assert structure.widths["0.1.layers.0.self_attn"] == HEADS + 2
    cut(whole, structure.axes({"0.0": tuple(range(6)), "0.1.layers.0.self_attn": (0, 1, 2)}))
    with torch.no_grad():
        packed = model[1](model[0](x), src_key_padding_mask=padding)
    expected = model[1](model[0](x), src_key_padding_mask=padding)
    torch.testing.assert_close(packed[~padding], expected[~padding], rtol=1e-12, atol=1e-12)


def test_computed_projections_are_left_alone() -> None:
    model, x = Network(), _draw(BATCH, KEYS, 6)
    nn.utils.parametrizations.weight_norm(model.attention, "in_proj_weight")
    model.mlp = nn.Identity()
    structure = _traced(model)
    assert "attention" not in structure.widths
    model.head = nn.Sequential(nn.Linear(WIDTH, 8, dtype=torch.float64), nn.Linear(8, 2, dtype=torch.float64))
    prune(model, x, pruning_ratio=0.5)
    wide = dense_copy(TracedModel.of(model, x), "real")
    assert wide.head[0].out_features == 8


def test_the_wrapper_of_a_compiled_layer_gets_no_attributes(tmp_path) -> None:
    x, model, other = _draw(BATCH, KEYS, 6), Network(), Network()
    prune(model, x, pruning_ratio=0.5, ignore=["stem"])
    save(model, tmp_path / "small.safetensors")
    other.attention = torch.compile(other.attention)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            load(other, tmp_path / "small.safetensors")
        assert other.attention.num_heads == 2
        assert "num_heads" not in vars(other.attention)
