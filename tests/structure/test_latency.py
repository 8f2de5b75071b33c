"""Latencies from a table: its arithmetic with planted times, and that what is timed is what the network runs."""

import itertools

import pytest
import torch
from torch import nn

from lightning_prune.structure import TracedModel, trace
from lightning_prune.structure import latency as latency_module
from lightning_prune.structure.cost import Axis, CostModel, LatencyTable, LayerTimes, Term
from lightning_prune.structure.latency import measure_latency, with_latency


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depth = nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.grouped = nn.Conv2d(16, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.depth(torch.relu(self.stem(x)))
        return self.head(self.up(self.grouped(x)).mean((2, 3)))


def times(rows):
    return LayerTimes((Axis(0, (("a", 1),)), Axis(0, (("b", 2),))), ((2, 4), (2, 6)), rows)


def test_between_the_points_of_the_grid_it_is_linear_and_outside_constant():
    layer = times(((1.0, 3.0), (2.0, 8.0)))
    assert layer.value({"a": 2, "b": 1}) == 1
    assert layer.value({"a": 3, "b": 2}) == pytest.approx((1 + 3 + 2 + 8) / 4)
    assert layer.value({"a": 1, "b": 3}) == 3
    assert layer.value({"a": 9, "b": 9}) == 8
    assert layer.value({"a": 0, "b": 3}) == 0


def test_a_network_is_the_sum_of_its_layers_and_a_rest_that_follows_its_memory():
    table = LatencyTable(0.5, 0.01, (times(((1.0, 3.0), (2.0, 8.0))),) * 2)
    cost = CostModel((), (), {}, (Term(4.0, (Axis(0, (("a", 1),)),)),), table)
    assert cost.latency({"a": 4, "b": 3}) == pytest.approx(0.5 + 0.01 * 16 + 16)
    assert LatencyTable.from_plain(table.to_plain()) == table


def test_without_a_table_there_is_no_latency():
    with pytest.raises(ValueError, match="was not measured"):
        CostModel((), (), {}).latency({})


@pytest.fixture
def planted(monkeypatch):
    """Time as the elements that an operator writes, a thousand to the millisecond; what was run, in order."""
    runs = []

    def median_seconds(run, seconds):
        out = run()
        runs.append((run, out))
        return out.numel() * 1e-6 if seconds == latency_module._POINT else next(whole)

    whole = itertools.cycle([0.02, 0.012])
    monkeypatch.setattr(latency_module, "median_seconds", median_seconds)
    return runs


def test_the_table_times_each_layer_at_its_widths_and_meets_the_whole(planted):
    net, x = Net(), torch.randn(3, 3, 8, 8)
    traced = TracedModel.of(net, x)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    structure = trace(traced)
    structure = with_latency(structure, measure_latency(traced, structure))
    widths = structure.widths
    table = structure.cost.latency_table
    stem, depth, _, up, head = table.layers
    assert stem.grid == ((2, 4, 8, 16), (3,))
    assert depth.grid == ((2, 4, 8, 16), (1,))
    assert [row[-1] for row in stem.ms] == pytest.approx([n * 64e-3 for n in (2, 4, 8, 16)])
    assert [row[-1] for row in depth.ms] == pytest.approx([n * 36e-3 for n in (2, 4, 8, 16)])
    assert head.ms[-1][-1] == pytest.approx(5e-3)
    assert up.ms[-1][-1] == pytest.approx(4 * 8 * 8 * 1e-3)
    assert all(out.shape[0] == 1 for _, out in planted)  # one sample
    # The times of the whole network come out as they were measured, dense and halved.
    assert structure.cost.latency(widths) == pytest.approx(20)
    assert structure.cost.latency({name: -(-w // 2) for name, w in widths.items()}) == pytest.approx(12)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert net.training


def test_layers_that_are_alike_are_measured_once(planted):
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    traced = TracedModel.of(net, torch.randn(2, 6))
    structure = trace(traced)
    table = measure_latency(traced, structure)
    assert len(table.layers) == 5
    kinds = {(layer.grid, layer.ms) for layer in table.layers}
    assert len(planted) == sum(len(grid[0]) * len(grid[1]) for grid, _ in kinds) + 2


def test_the_table_reaches_to_the_dense_widths_of_a_network_that_was_cut(planted):
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    traced = TracedModel.of(net, torch.randn(2, 6))
    structure = trace(traced)
    table = measure_latency(traced, structure, {"0": 16})
    assert table.layers[0].grid == ((2, 4, 8, 16), (6,))


def test_more_units_never_take_less_time(monkeypatch):
    noise = iter([5.0, 1.0, 3.0, 2.0] * 50)
    monkeypatch.setattr(latency_module, "median_seconds", lambda _run, _seconds: next(noise))
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    traced = TracedModel.of(net, torch.randn(2, 6))
    structure = trace(traced)
    cost = with_latency(structure, measure_latency(traced, structure)).cost
    values = [cost.latency({"0": width}) for width in range(1, 17)]
    assert all(a <= b for a, b in itertools.pairwise(values))


def test_real_times_are_those_of_the_whole_network(monkeypatch):
    """What the table says of the network as it is has been measured, in milliseconds, whatever its layers take."""
    measured, real = [], latency_module.median_seconds

    def median_seconds(run, seconds):
        measured.append((seconds, real(run, 1e-3)))
        return measured[-1][1]

    monkeypatch.setattr(latency_module, "median_seconds", median_seconds)
    net = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    traced = TracedModel.of(net, torch.randn(1, 512))
    structure = trace(traced)
    cost = with_latency(structure, measure_latency(traced, structure)).cost
    whole, _ = (1e3 * time for seconds, time in measured if seconds == latency_module._WHOLE)
    assert cost.latency(structure.widths) == pytest.approx(whole)
    layers = [time for seconds, time in measured if seconds == latency_module._POINT]
    assert min(layers) > 0
    assert max(layers) > 1.2 * min(layers)  # a million products, and an eighth of them
