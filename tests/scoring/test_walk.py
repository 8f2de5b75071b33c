"""The walk equals the network's own code, whatever moves on; it keeps to its memory, and decides nothing twice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_prune.scoring import DataPass, Station, Walk, pooled_features, stations_of
from tests.scoring.walked import NETWORKS, build, exchanged, name_of, raw_batches, seen

every_network = pytest.mark.parametrize("name", NETWORKS)
PLAIN = [True, False]
both_ways = pytest.mark.parametrize("plain", PLAIN, ids=lambda plain: "plain" if plain else "fast")


def data_of(name, **settings):
    return DataPass(raw_batches(name), **settings)


def equal(one, other):
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def masks_of(place, variants=3):
    """A few channels taken out of each variant."""
    masks = torch.ones(variants, place.channels)
    for variant in range(variants):
        masks[variant, variant % place.channels :: 3] = 0
    return masks


@every_network
def test_activations_are_found_where_the_code_has_them(name):
    model, data = build(name), data_of(name)
    stations = stations_of(model, next(iter(data)))
    model.eval()
    batches = [seen(model, batch) for batch in data]
    assert [name_of(station) for station in stations] == list(batches[0])
    tables = pooled_features(model, data, stations)
    for station in stations:
        value = torch.cat([batch[name_of(station)] for batch in batches])
        linear = isinstance(model.get_submodule(station.layer), nn.Linear)
        positions = list(range(1, value.dim() - 1)) if linear else list(range(2, value.dim()))
        torch.testing.assert_close(tables[station], value.mean(positions) if positions else value)


@both_ways
@every_network
def test_every_station_has_the_value_of_the_forward_pass(name, plain):
    model, data = build(name), data_of(name)
    stations = stations_of(model, next(iter(data)))
    reference = copy.deepcopy(model).eval()
    visited = []
    for visit in Walk(model, data, stations, plain=plain):
        visited.append(visit.station)
        for here, batch in zip(visit, data, strict=True):
            assert torch.equal(here.value, seen(reference, batch)[name_of(visit.station)])
            assert equal(here.output, exchanged(reference, batch, {}))
    assert visited == stations


@both_ways
@every_network
def test_the_rest_of_the_network_with_another_value(name, plain):
    model, data = build(name), data_of(name)
    reference = copy.deepcopy(model).eval()
    for visit in Walk(model, data, stations_of(model, next(iter(data))), plain=plain):
        for here in visit:
            value = here.value * 0.5 + 0.1
            expected = exchanged(reference, here.batch, {name_of(visit.station): lambda _, value=value: value})
            assert equal(here.rest(value), expected)


@both_ways
@every_network
def test_what_moves_on_is_masked(name, plain):
    model, data = build(name), data_of(name)
    reference = copy.deepcopy(model).eval()
    changes = {}
    for visit in Walk(model, data, stations_of(model, next(iter(data))), plain=plain):
        for here, batch in zip(visit, data, strict=True):
            expected = {}

            def see(name, value, expected=expected):
                expected[name] = value.clone()
                return changes[name](value) if name in changes else value

            with torch.no_grad():
                reference(*batch.args, **batch.kwargs, see=see)
            assert torch.equal(here.value, expected[name_of(visit.station)])
        mask = masks_of(visit.place)[0].double()
        visit.mask(mask)
        shape = [-1 if i == visit.place.dim else 1 for i in range(here.value.dim())]
        mask = mask.view(shape)
        changes[name_of(visit.station)] = lambda value, mask=mask: value * mask
    assert len(changes) == len(stations_of(model, next(iter(data))))


@both_ways
@every_network
def test_masked_variants(name, plain):
    model, data = build(name), data_of(name)
    reference = copy.deepcopy(model).eval()
    stations = stations_of(model, next(iter(data)))
    for visit in Walk(model, data, stations, plain=plain):
        masks = masks_of(visit.place)
        for here in visit:
            found = here.rest_masked(masks)
            skipped = here.rest_masked(masks, skip=True)
            faster = here.rest_masked(masks, delta=True)
            shape = [-1 if i == visit.place.dim else 1 for i in range(here.value.dim())]
            for variant, mask in enumerate(masks.double().view(len(masks), *shape)):
                change = {name_of(visit.station): lambda value, mask=mask: value * mask}
                expected = tree_leaves(exchanged(reference, here.batch, change))
                for outputs in (found, skipped, faster):
                    for leaf, wanted in zip(tree_leaves(outputs), expected, strict=True):
                        torch.testing.assert_close(leaf[variant], wanted)


@both_ways
def test_inputs_of_consumers_are_exchanged_alone(plain):
    """A residual sum has several readers; a mask at one reader's input leaves the others alone."""
    model, data = build("residual"), data_of("residual")
    reference = copy.deepcopy(model).eval()
    place = Station("conv1", "input")
    mask = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    walk = Walk(model, data, [Station("stem"), Station("conv1", "output")], plain=plain)
    for visit in walk:
        for here in visit:
            x = here.batch.args[0]
            with torch.no_grad():
                stem = reference.norm(reference.stem(x)).relu()
                masked = reference.conv1(stem * mask.view(1, -1, 1, 1))
            if visit.index == 0:
                assert torch.equal(here.value, stem)
                later = here.rest(here.value, also={place: mask})
                with torch.no_grad():
                    swapped = copy.deepcopy(reference)
                    swapped.conv1.weight *= mask.view(1, -1, 1, 1)
                    torch.testing.assert_close(later, swapped(x))
            else:
                torch.testing.assert_close(here.value, masked)
        if visit.index == 0:
            visit.mask(mask, at=[place])


@both_ways
def test_the_output_of_any_module(plain):
    """Blocks and whole sequences, beside the layers in them."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), block, nn.Flatten(), nn.Linear(80, 2)).double()
    data, reference = data_of("chain"), copy.deepcopy(model).eval()
    stations = stations_of(model, next(iter(data)), layers=["1", "0", "2"], point="output")
    assert [station.layer for station in stations] == ["0", "1", "2"]
    assert [str(s) for s in stations_of(model, next(iter(data)))] == [f"{n} (activation)" for n in ("0.0", "1.0", "3")]
    tables = pooled_features(model, data, stations)
    mask = torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64)
    for visit in Walk(model, data, stations, plain=plain):
        for here, batch in zip(visit, data, strict=True):
            with torch.no_grad():
                value = reference[: min(visit.index + 1, 2)](batch.args[0])
                if visit.index == 2:
                    value = (value * mask.view(1, -1, 1, 1)).flatten(1)
            assert torch.equal(here.value, value)
        if visit.index < 2:
            torch.testing.assert_close(visit.features(), tables[visit.station])
        if visit.index == 1:
            visit.mask(mask)


@both_ways
def test_weights_are_read_when_a_segment_runs(plain):
    """Two networks side by side: what is refitted in one counts from then on, there alone."""
    dense, data = build("chain"), data_of("chain")
    cut = copy.deepcopy(dense)
    stations = stations_of(dense, next(iter(data)))
    for one, other in zip(
        Walk(dense, data, stations, plain=plain), Walk(cut, data, stations, plain=plain), strict=True
    ):
        differs = not torch.equal(one.features(), other.features())
        assert differs is (one.index > 0)
        if one.index == 0:
            with torch.no_grad():
                cut.features[4].weight *= 0.9


@both_ways
@every_network
def test_the_network_is_left_as_it_is(name, plain):
    model, data = build(name), data_of(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    for visit in Walk(model, data, stations_of(model, next(iter(data))), plain=plain):
        for here in visit:
            here.rest(here.value)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@both_ways
def test_a_killed_walk_decides_nothing_twice(tmp_path, plain):
    model, data = build("chain"), data_of("chain")
    stations, decided = stations_of(model, next(iter(data))), []

    def walk(stop=None, options=None, network=model, samples=data):
        found = []
        for visit in Walk(network, samples, stations, folder=tmp_path, options=options, plain=plain):

            def decide(visit=visit):
                if visit.index == stop:
                    raise KeyboardInterrupt
                decided.append(visit.index)
                return {"mask": (visit.features().mean(0) > 0).double(), "layer": visit.station.layer}

            found.append(visit.once(decide))
            visit.mask(found[-1]["mask"])
        return found

    with pytest.raises(KeyboardInterrupt):
        walk(stop=2)
    assert decided == [0, 1]
    resumed = walk()
    assert decided == [0, 1, 2, 3]
    assert equal(walk(), resumed)
    assert decided == [0, 1, 2, 3]
    walk(options={"threshold": 0.5})
    assert len(decided) == 8, "other options are another walk"
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier[0].bias[0] += 1e-3
    walk(network=other)
    assert len(decided) == 12, "and so are other weights"
    walk(samples=data_of("chain", samples=7))
    assert len(decided) == 16, "and other samples"


def test_all_processes_decide_where_one_has_to(tmp_path):
    model, data = build("chain"), data_of("chain")
    stations, decided = stations_of(model, next(iter(data))), []
    for agree in (bool, lambda _: False):
        for visit in Walk(model, data, stations, folder=tmp_path, agree=agree):
            visit.once(lambda index=visit.index: decided.append(index) or {"n": 1})
    assert decided == [0, 1, 2, 3, 0, 1, 2, 3]


@both_ways
def test_progress(plain):
    model, data, told = build("chain"), data_of("chain"), []
    for _ in Walk(model, data, stations_of(model, next(iter(data))), progress=told.append, plain=plain):
        pass
    assert [(step.index, step.total) for step in told] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert told[-1].seconds_left == 0
    assert all(step.seconds_left > 0 for step in told[:-1])


def test_processes_walk_a_part_each():
    model = build("residual")
    whole = data_of("residual")
    stations = stations_of(model, next(iter(whole)))
    tables = pooled_features(model, whole, stations)
    parts = [data_of("residual", rank=rank, world_size=3) for rank in range(3)]
    split = [pooled_features(model, part, stations) for part in parts]
    for station in stations:
        rows = torch.cat([table[station] for table in split])
        torch.testing.assert_close(rows.sort(0).values, tables[station].sort(0).values)


@pytest.mark.parametrize("reduction", ["avg", "max"])
@pytest.mark.parametrize("absolute", [False, True])
def test_features(reduction, absolute):
    model, data = build("residual"), data_of("residual")
    station = Station("conv2")
    table = pooled_features(model, data, [station], reduction, absolute=absolute)[station]
    model.eval()
    value = torch.cat([seen(model, batch)["conv2"] for batch in data])
    value = value.abs() if absolute else value
    torch.testing.assert_close(table, value.mean((2, 3)) if reduction == "avg" else value.amax((2, 3)))
    assert (value < 0).any() is not absolute


def test_bad_arguments():
    model, data = build("chain"), data_of("chain")
    with pytest.raises(ValueError, match="one of output, activation, input, got 'middle'"):
        Station("stem", "middle")
    with pytest.raises(ValueError, match="expected at least one station, got none"):
        Walk(model, data, [])
    with pytest.raises(ValueError, match=r"expected stations of the network, got nothing \(activation\)"):
        Walk(model, data, [Station("nothing")])
    with pytest.raises(ValueError, match=r"called as modules, got features\.1\. There are: features\.0"):
        stations_of(model, next(iter(data)), layers=["features.1"])
    with pytest.raises(ValueError, match='"avg" or "max", got \'sum\''):
        pooled_features(model, data, [Station("features.0")], "sum")
    for visit in Walk(model, data, [Station("features.4")]):
        with pytest.raises(ValueError, match=r"a mask of shape \(6,\), got \(5,\)"):
            visit.mask(torch.ones(5))
        with pytest.raises(ValueError, match=r"a station not before features\.4 \(activation\), got features\.0"):
            visit.mask(torch.ones(5), at=[Station("features.0")])
        with pytest.raises(ValueError, match="expected a station of the network, got x"):
            visit.mask(torch.ones(5), at=[Station("x")])


class Undecided(nn.Module):
    """Which operators run depends on the data."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.first(x)
        return self.last(y.tanh() if x.sum().item() > 0 else y.relu())


def test_another_activation_than_at_first_is_an_error():
    torch.manual_seed(0)
    model, x = Undecided(), torch.rand(5, 3)
    data = DataPass([x, -x], batch_size=1)
    with pytest.raises(ValueError, match="The network's operators depend on the data: look at the layer's `output`"):
        pooled_features(model, data, [Station("first")])
    assert len(pooled_features(model, data, [Station("first", "output")])[Station("first", "output")]) == 10
