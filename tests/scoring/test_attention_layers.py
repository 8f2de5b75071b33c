"""Units of PyTorch's attention, which computes with the weight of its last layer without calling it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import LRP, NISP, Contribution, GraSP, Reconstruction, Ridge, SequentialRidge, prune
from lightning_prune.scoring import ContributionStatistic
from lightning_prune.structure import TracedModel, trace
from lightning_prune.surgery.history import history_of

HEADS, FEATURES, WIDTH, LENGTH = 4, 3, 12, 5


class Attention(nn.Module):
    """Self-attention between two layers.

    Args:
        batch_first: As of PyTorch's attention.
        weights: Whether attention weights are asked for, which takes another way through the code.
    """

    def __init__(self, batch_first: bool, weights: bool) -> None:
        super().__init__()
        self.first, self.last, self.weights = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 2), weights
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(self.attention(x, x, x, need_weights=self.weights)[0])
        return out


def _attention(batch_first: bool = True, weights: bool = False) -> Attention:
    torch.manual_seed(0)
    network = Attention(batch_first, weights).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def _encoder() -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(2, WIDTH), nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 2)).double()


X = torch.randn(6, LENGTH, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _by_hand(network: Attention, x: Tensor) -> Tensor:
    """What all heads give, ``(samples · length, heads · features)``."""
    layer = network.attention
    x = network.first(x)
    x = x if layer.batch_first else x.transpose(0, 1)
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for w, b in zip(weights, biases, strict=True))
    heads = []
    for rows in torch.arange(WIDTH).chunk(HEADS):
        products = q[..., rows] @ k[..., rows].mT / FEATURES**0.5
        heads.append(products.softmax(-1) @ v[..., rows])
    return torch.cat(heads, -1).flatten(0, 1)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_contributions_of_heads_and_features(batch_first: bool, weights: bool) -> None:
    network = _attention(batch_first, weights)
    statistic = ContributionStatistic(trace(TracedModel.of(network, X)), lambda_max=1.0)
    before = network(X)
    for handle in [*statistic.attach(network)]:
        during = network(X)
        handle.remove()  # one after another, of which the first restores the layer
    assert not statistic.unobservable(network).keys() & {"attention", "attention#head_dim"}
    torch.testing.assert_close(during, before, rtol=1e-12, atol=1e-13)
    assert torch.equal(network(X), before)
    terms = _by_hand(network, X).detach().abs()[:, None] * network.attention.out_proj.weight.detach().abs()
    shares = (terms / terms.sum(-1, keepdim=True)).flatten(0, 1)
    by_head = shares.reshape(-1, HEADS, FEATURES)
    torch.testing.assert_close(statistic.average("attention"), by_head.sum(2).mean(0))
    torch.testing.assert_close(statistic.average("attention#head_dim"), by_head.sum(1).mean(0))
    torch.testing.assert_close(statistic.maximum("attention"), by_head.amax((0, 2)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which it makes where nothing is observed
def test_encoders_are_observed_in_eval_mode_with_padding() -> None:
    """Where PyTorch computes whole layers at once, on samples of different lengths."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _encoder()

        def forward(self, x: Tensor) -> Tensor:
            first, encoder, last = self.inner
            padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            padding[0, -2:] = True
            return last(encoder(first(x), src_key_padding_mask=padding)).sum(1)

    network = Padded().eval()
    widths = prune(network, X, criterion=Contribution(), data=[X], pruning_ratio=0.5).widths
    assert {width for name, width in widths.items() if "#" not in name and "attn" in name} == {HEADS // 2}
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any("forward" in vars(module) for module in network.modules())


@pytest.mark.parametrize("criterion", [LRP(), NISP(), Reconstruction()], ids=lambda one: type(one).__name__)
def test_other_criteria_score_heads(criterion: Any) -> None:
    network = _attention()
    with torch.no_grad():
        network.attention.out_proj.weight[:, 3:9] *= 1e-3  # what the second and the third head give
    prune(network, X, criterion=criterion, data=[X] * 4, layers="attention", pruning_ratio=0.5)
    history = history_of(network)
    assert history is not None
    (edit,) = history.edits
    assert edit.kept["attention"] == (0, 3)


def test_second_derivatives_of_fused_attention() -> None:
    network = _attention()
    widths = prune(
        network, X, criterion=GraSP(), data=[(X, X)], loss=lambda y, x: (y - x).square().mean(), pruning_ratio=0.5
    ).widths
    assert widths["attention"] == HEADS // 2


@pytest.mark.parametrize("repair", [Ridge(strength=1e-9), SequentialRidge(strength=1e-9)])
def test_what_removed_heads_gave_is_refitted(repair: Any) -> None:
    network = _attention()
    with torch.no_grad():  # the last head gives what the first one does, so nothing is lost
        for part in (network.attention.in_proj_weight, network.attention.in_proj_bias):
            part.unflatten(0, (3, HEADS, FEATURES))[:, -1] = part.unflatten(0, (3, HEADS, FEATURES))[:, 0]
        network.attention.out_proj.weight[:, -FEATURES:] *= 0.1
    plain, data = copy.deepcopy(network), [X, X.flip(0)]
    expected = network(X).detach()
    prune(plain, X, layers="attention", pruning_ratio=0.25)
    prune(network, X, layers="attention", pruning_ratio=0.25, data=data, extensions=[repair])
    assert (plain(X) - expected).abs().max() > 0.05
    torch.testing.assert_close(network(X), expected, rtol=1e-5, atol=1e-5)
