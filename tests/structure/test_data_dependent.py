"""Networks whose sizes depend on data, as detectors choose boxes: only what a cut changes keeps units from leaving."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.structure import Call, TracedModel, trace
from tests.support.cutting import half, masked, shrunk

Forward = Callable[[nn.ModuleDict, Tensor], Tensor]


class Net(nn.Module):
    """Layers in float64 and a function of them."""

    def __init__(self, forward: Forward, **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleDict(layers).double(), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers, x)


def both_modes(model: nn.Module, x: Tensor) -> TracedModel:
    return TracedModel(model, (Call((x,)), Call((x,), training=True)))


def assert_cut_is_masked(model: nn.Module, axes: dict, x: Tensor) -> None:
    cut, mask = shrunk(model, axes), masked(model, axes)
    for training in (False, True):
        expected, found = (net.train(training)(x) for net in (mask, cut))
        assert expected.shape[0] > 0
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for net in (cut, mask):
            net.zero_grad()
        found.sum().backward()


def collected(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    """Rows of two layers, each where a number decides, in one tensor, as regions come from several feature maps."""
    h = x.new_zeros(len(x), layers["first"].out_features)
    is_low = x[:, 0] < 0
    for layer, rows in ((layers["first"], is_low), (layers["second"], ~is_low)):
        (places,) = torch.where(rows)
        h[places] = layer(x[places]).relu()
    return layers["last"](h)


def test_zeros_that_rows_are_written_to_take_their_units() -> None:
    torch.manual_seed(0)
    model = Net(collected, first=nn.Linear(4, 6), second=nn.Linear(4, 6), last=nn.Linear(6, 2))
    x = torch.randn(7, 4, dtype=torch.float64)
    structure = trace(both_modes(model, x))
    (group,) = structure.groups
    assert {(m.tensor, m.dim) for m in group.members} == {
        ("layers.first.weight", 0),
        ("layers.first.bias", 0),
        ("layers.second.weight", 0),
        ("layers.second.bias", 0),
        ("layers.last.weight", 1),
    }
    assert_cut_is_masked(model, structure.axes(half(structure)), x)


def chosen(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    """Rows with a score above that of zeros."""
    h = layers["norm"](layers["first"](x)).relu()
    return layers["last"](h[layers["score"](h).squeeze(-1) > 0])


class RootMeanSquare(nn.Module):
    """A norm that is written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(
    ("norm", "narrow"),
    [
        (nn.LayerNorm(32), nn.LayerNorm(16)),
        (nn.GroupNorm(4, 32), nn.GroupNorm(4, 16)),
        (nn.GroupNorm(32, 32), nn.GroupNorm(16, 16)),
        (nn.RMSNorm(32), nn.RMSNorm(16)),
        (RootMeanSquare(32), RootMeanSquare(16)),
    ],
    ids=lambda norm: f"{type(norm).__name__}({norm.num_groups})" if isinstance(norm, nn.GroupNorm) else None,
)
def test_rows_are_chosen_after_a_norm_over_units(norm: nn.Module, narrow: nn.Module) -> None:
    """The cut has the statistics of a narrower norm, so other rows than in the masked network with its own."""

    def build(norm: nn.Module, width: int) -> Net:
        return Net(chosen, first=nn.Linear(4, width), norm=norm, score=nn.Linear(width, 1), last=nn.Linear(width, 2))

    torch.manual_seed(0)
    model = build(copy.deepcopy(norm), 32)
    with torch.no_grad():
        for parameter in model.layers["norm"].parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    x = torch.randn(300, 4, dtype=torch.float64)
    structure = trace(both_modes(model, x))
    (group,) = structure.groups
    assert {member.layer for member in group.members} == {f"layers.{name}" for name in model.layers}
    axes = structure.axes(half(structure))
    hand = build(copy.deepcopy(narrow), 16)
    state = model.state_dict()
    for name, kept in axes.items():
        for dim, places in kept.items():
            state[name] = state[name].index_select(dim, torch.from_numpy(places))
    hand.load_state_dict(state)
    torch.testing.assert_close(shrunk(model, axes)(x), hand(x))


def above_mean(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    h = layers["first"](x).relu()
    score = layers["score"](h).squeeze(-1)
    rows = score > score.mean()
    order = score[rows].argsort()
    return layers["last"](h[rows][order])


def test_rounding_does_not_decide_which_rows_are_chosen() -> None:
    """All scores are equal but for rounding, which is another in the cut."""
    torch.manual_seed(0)
    model = Net(above_mean, first=nn.Linear(16, 64), score=nn.Linear(64, 1), last=nn.Linear(64, 2))
    row, x = torch.randn(16, dtype=torch.float64), torch.randn(9, 16, dtype=torch.float64)
    with torch.no_grad():
        model.layers["first"].weight[:] = model.layers["first"].weight[:, :1]
    equal = torch.stack([row.roll(places) for places in torch.randperm(16).tolist() * 8])
    structure = trace(both_modes(model, equal))
    assert structure.widths == {"layers.first": 64}
    assert_cut_is_masked(model, structure.axes(half(structure)), x)


def of_rows(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    """Chosen rows of feature maps go through a batch norm and a layer, and there may be none."""
    h = layers["first"](x).relu()
    rows = h[layers["score"](h).mean((1, 2)) > 0]
    rows = layers["norm"](layers["second"](rows)).relu()
    return layers["last"](rows.flatten(1))


def test_layers_that_get_no_rows() -> None:
    """In the masked network, no row has a score that is high enough."""
    torch.manual_seed(0)
    layers = {
        "score": nn.Conv1d(8, 1, 1),
        "second": nn.Conv1d(8, 6, 1),
        "norm": nn.BatchNorm1d(6),
        "last": nn.Linear(18, 2),
    }
    model = Net(of_rows, first=nn.Conv1d(4, 8, 1), **layers)
    x = torch.rand(9, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        model.layers["first"].weight.abs_()
        model.layers["first"].bias.fill_(1.0)
        model.layers["score"].weight.fill_(1.0)
        lowest = float(model.layers["first"](x).sum(1).mean(1).min())
        model.layers["score"].bias.fill_(-0.9 * lowest)
        model.layers["norm"].bias.normal_()
    structure = trace(both_modes(model, x))
    assert structure.widths == {"layers.first": 8, "layers.second": 6}
    kept = {"layers.first": tuple(range(8)), "layers.second": (0, 2, 5)}
    assert_cut_is_masked(model, structure.axes(kept), x)
    axes = structure.axes({"layers.first": (1,), "layers.second": (0, 2, 5)})
    assert shrunk(model, axes)(x).shape == (0, 2)


def added_where_small(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    """Where the numbers are small, one unit of a layer is added to the result."""
    h, other = layers["first"](x).relu(), layers["picked"](x).relu()
    out = layers["last"](layers["second"](h).relu()) + layers["other"](other)
    return out if h.sum() > 80 else out + other[:, :1]


def test_only_units_that_a_branch_binds_stay() -> None:
    """The branch runs in masked networks alone; layers that have nothing to do with it can be cut."""
    torch.manual_seed(0)
    layers = {"second": nn.Linear(8, 8), "last": nn.Linear(8, 2), "picked": nn.Linear(4, 6), "other": nn.Linear(6, 2)}
    model = Net(added_where_small, first=nn.Linear(4, 8), **layers)
    with torch.no_grad():
        model.layers["first"].weight.zero_()
        model.layers["first"].bias.fill_(1.5)
    x = torch.randn(9, 4, dtype=torch.float64)
    structure = trace(both_modes(model, x))
    assert structure.widths == {"layers.first": 8, "layers.second": 8}
    (reason,) = {frozen.reason for frozen in structure.frozen if frozen.tensor == "layers.picked.weight"}
    assert "lies on the far side of a bound of `slice`" in reason
    assert_cut_is_masked(model, structure.axes(half(structure)), x)
