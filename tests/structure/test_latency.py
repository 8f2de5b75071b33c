"""Latencies from a table: its arithmetic with planted times, and that what is timed is what the network runs."""

import itertools
import random

import pytest
import torch
from torch import nn

from lightning_prune.structure import TracedModel, trace
from lightning_prune.structure import latency as latency_module
from lightning_prune.structure.cost import Axis, CostModel, LatencyTable, LayerTimes, Term
from lightning_prune.structure.latency import latency_times, measure_latency, with_latency
from lightning_prune.structure.latency_fit import fit_table
from lightning_prune.structure.time_layers import grid_of, points_of
from tests.support.planted_times import macs_of, plant_times


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depth = nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.grouped = nn.Conv2d(16, 8, 3, groups=2, padding="same")
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.depth(torch.relu(self.stem(x)))
        return self.head(self.up(self.grouped(x)).mean((2, 3)))


def times(rows, steps=(1, 1)):
    return LayerTimes((Axis(0, (("a", 1),)), Axis(0, (("b", 2),))), ((2, 4), (2, 6)), rows, steps)


def test_between_the_points_of_the_grid_it_is_linear_and_outside_constant():
    layer = times(((1.0, 3.0), (2.0, 8.0)))
    assert layer.value({"a": 2, "b": 1}) == 1
    assert layer.value({"a": 3, "b": 2}) == pytest.approx((1 + 3 + 2 + 8) / 4)
    assert layer.value({"a": 1, "b": 3}) == 3
    assert layer.value({"a": 9, "b": 9}) == 8
    assert layer.value({"a": 0, "b": 3}) == 0


def test_a_length_takes_as_long_as_the_next_multiple_of_the_step():
    layer = times(((1.0, 3.0), (2.0, 8.0)), (2, 6))
    assert layer.value({"a": 3, "b": 1}) == layer.value({"a": 4, "b": 3}) == 8
    assert layer.value({"a": 1, "b": 1}) == 3
    assert LatencyTable(0, 0, (layer, times(((1.0, 3.0), (2.0, 8.0)), (4, 4)))).steps() == {"a": 4, "b": 6}


def test_a_network_is_the_sum_of_its_layers_and_a_rest_that_follows_its_memory():
    layer = times(((1.0, 3.0), (2.0, 8.0)), (1, 2))
    table = LatencyTable(0.5, 0.01, (layer,) * 2, {"device": "phone", "runtime": "onnxruntime"}, 8, 0.25)
    cost = CostModel((), (), {}, (Term(4.0, (Axis(0, (("a", 1),)),)),), table)
    assert cost.latency({"a": 4, "b": 3}) == cost.amount("latency_ms", {"a": 4, "b": 3}) == 0.5 + 0.01 * 16 + 16
    assert LatencyTable.from_plain(table.to_plain()) == table
    assert table.device == "phone (onnxruntime)"


def test_a_table_of_an_earlier_version_is_linear_and_of_no_known_device():
    plain = LatencyTable(0.5, 0.01, (times(((1.0, 3.0), (2.0, 8.0))),)).to_plain()
    assert "about" not in plain
    del plain["layers"][0]["steps"]
    table = LatencyTable.from_plain(plain)
    assert table.layers[0].steps == (1, 1)
    assert table.device == "a device that was not noted"


def test_without_a_table_there_is_no_latency():
    with pytest.raises(ValueError, match="was not measured"):
        CostModel((), (), {}).latency({})


@pytest.mark.parametrize(
    ("length", "grid"),
    [(3, [1, 2, 3]), (24, [4, 8, 12, 16, 24]), (64, [16, 32, 48, 64]), (300, [32, 80, 144, 224, 300])],
)
def test_a_grid_goes_from_an_eighth_to_all_in_round_lengths(length, grid):
    assert grid_of(length, varies=True) == grid
    assert grid_of(length, varies=False) == [length]


@pytest.mark.parametrize("step", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_step_in_which_times_rise_is_found(step, factor):
    """A layer whose times follow the next multiple, in a network in which it takes ``factor`` times as long."""

    def planted(length):
        return 0.1 * -(-length // step) * step

    kind = {"op": "linear", "grid": [grid_of(256, varies=True), [10]]}
    axes = (Axis(0, (("a", 1),)), Axis(10))
    networks = [({"a": width}, 1000, 0) for width in (256, 192, 128, 64)]
    measured = {
        "kinds": [[[a, b, planted(a)] for a, b in points_of(kind["grid"])]],
        "networks": [2 + factor * planted(widths["a"]) for widths, *_ in networks],
    }
    table = fit_table([kind], [(LayerTimes(axes), 0)], networks, measured, {})
    assert table.layers[0].steps == (step, 1)
    assert [table.value({"a": a}, 1000) for a in (130, 145, 200)] == pytest.approx(
        [2 + factor * planted(a) for a in (130, 145, 200)], rel=0.03
    )


def test_the_table_times_each_layer_at_its_widths_and_meets_the_whole(monkeypatch):
    plant_times(monkeypatch, 1e-6)
    net, x = Net(), torch.randn(3, 3, 8, 8)
    traced = TracedModel.of(net, x)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    structure = trace(traced)
    structure = with_latency(structure, measure_latency(traced, structure))
    stem, depth, grouped, up, head = structure.cost.latency_table.layers
    assert stem.grid == ((4, 8, 12, 16), (3,))
    assert depth.grid == ((4, 8, 12, 16), (1,))
    assert grouped.ms[-1][-1] == pytest.approx(8 * 8 * 9 * 36e-3, rel=1e-3)
    assert [row[-1] for row in stem.ms] == pytest.approx([n * 27 * 64e-3 for n in (4, 8, 12, 16)], rel=1e-3)
    assert [row[-1] for row in depth.ms] == pytest.approx([n * 9 * 36e-3 for n in (4, 8, 12, 16)], rel=1e-3)
    assert head.ms[-1][-1] == pytest.approx(20e-3, rel=1e-2)
    assert up.ms[-1][-1] == pytest.approx(4 * 8 * 4 * 36e-3, rel=1e-3)
    rng = random.Random(0)
    for _ in range(20):
        widths = {group.name: rng.randint(group.width // 2, group.width) for group in structure.groups}
        assert structure.cost.latency(widths) == pytest.approx(1e-3 * structure.cost.macs(widths), rel=0.15)
    assert structure.cost.latency(structure.widths) == pytest.approx(1e-3 * macs_of(lambda: net(x[:1])), rel=1e-3)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert net.training
    assert structure.cost.latency_table.about["runtime"] == "torch"


def test_layers_that_are_alike_are_measured_once():
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    traced = TracedModel.of(net, torch.randn(2, 6))
    found = latency_times(traced, trace(traced))
    assert len(found.layers) == 5
    assert len(found.kinds) == 3  # the first has fixed inputs, the last fixed outputs
    assert [kind for _, kind in found.layers] == [0, 1, 1, 1, 2]


def test_the_network_is_timed_as_it_is_and_at_other_widths():
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
    traced = TracedModel.of(net, torch.randn(2, 6))
    structure = trace(traced)
    networks = latency_times(traced, structure).networks
    found = [widths["0"] for widths, _, multiple in networks if not multiple]
    assert found[:4] == [64, 48, 32, 16]
    assert all(16 <= width <= 64 for width in found)
    assert len({*found}) == len(found)
    assert [(multiple, widths["0"]) for widths, _, multiple in networks if multiple] == [(1, 39), (4, 36), (8, 40)]
    assert all(memory == structure.cost.memory(widths) for widths, memory, _ in networks)


@pytest.mark.parametrize(
    ("slow", "expected"), [({}, 1), ({1: 1.5}, 4), ({1: 1.5, 4: 1.2}, 8), ({1: 3, 4: 2, 8: 1.1}, 16), ({4: 2.0}, 1)]
)
def test_widths_that_are_slow_in_the_network_are_known(slow, expected):
    kind = {"op": "linear", "grid": [grid_of(256, varies=True), [10]]}
    networks = [({"a": width}, 1000, 0) for width in (256, 192, 128, 64)]
    networks += [({"a": 153}, 1000, 1), ({"a": 156}, 1000, 4), ({"a": 152}, 1000, 8)]
    measured = {
        "kinds": [[[a, b, 0.1 * a] for a, b in points_of(kind["grid"])]],
        "networks": [(1 + 0.1 * widths["a"]) * slow.get(multiple, 1) for widths, _, multiple in networks],
    }
    axes = (Axis(0, (("a", 1),)), Axis(10))
    table = fit_table([kind], [(LayerTimes(axes), 0)], networks, measured, {"device": "d"})
    assert table.multiple == expected
    assert table.value({"a": 100}, 1000) == pytest.approx(11, rel=0.01)
    assert LatencyTable.from_plain(table.to_plain()) == table


def test_the_table_reaches_to_the_dense_widths_of_a_network_that_was_cut():
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    traced = TracedModel.of(net, torch.randn(2, 6))
    found = latency_times(traced, trace(traced), {"0": 16})
    assert found.kinds[0]["grid"] == [[4, 8, 12, 16], [6]]
    assert max(widths["0"] for widths, *_ in found.networks) == 4


def test_more_units_never_take_less_time(monkeypatch):
    noise = iter([5.0, 1.0, 3.0, 2.0] * 100)
    monkeypatch.setattr(latency_module, "median_seconds", lambda _run, _seconds: next(noise))
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    traced = TracedModel.of(net, torch.randn(2, 6))
    structure = trace(traced)
    cost = with_latency(structure, measure_latency(traced, structure)).cost
    values = [cost.latency({"0": width}) for width in range(1, 17)]
    assert all(a <= b for a, b in itertools.pairwise(values))


def test_real_times_are_those_of_the_whole_network():
    """What the table says of the network as it is lies near what a pass takes, whatever its layers take alone."""
    net = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    traced = TracedModel.of(net, torch.randn(1, 512))
    structure = trace(traced)
    x, is_near = torch.randn(1, 512), False
    for _ in range(5):  # another process may take the processor away
        cost = with_latency(structure, measure_latency(traced, structure)).cost
        with torch.no_grad():
            passes = [1e3 * latency_module.median_seconds(lambda: net(x), 0.01) for _ in range(10)]
        is_near = is_near or min(passes) / 2 < cost.latency(structure.widths) < 2 * max(passes)
        if is_near:
            break
    assert is_near
    assert cost.latency({"0": 128}) < cost.latency(structure.widths)
