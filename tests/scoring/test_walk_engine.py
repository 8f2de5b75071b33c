"""What the walk spends and holds, and what it does where a network cannot be taken apart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_prune.models import VGG16CIFAR, ResNetCIFAR
from lightning_prune.scoring import DataPass, Station, Walk, stations_of
from lightning_prune.structure import TracedModel, trace
from tests.scoring.walked import NETWORKS, build, raw_batches


def walk_of(model, data, **settings):
    return Walk(model, data, stations_of(model, next(iter(data))), **settings)


def outputs(walk, masks=2):
    """Everything that a walk can be asked for, in one list."""
    found = []
    for visit in walk:
        several = torch.ones(masks, visit.channels)
        several[torch.arange(masks), torch.arange(masks) % visit.channels] = 0
        for here in visit:
            found += [here.value, *tree_leaves(here.rest(here.value * 2)), *tree_leaves(here.rest_masked(several))]
        visit.mask(several[0])
    return found


class Reads(nn.Module):
    """A number is read out of a tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.first(x)
        return self.last(y * 2 if y.sum().item() > 0 else y)


class Branches(Reads):
    """Other operators run for other numbers of samples."""

    def forward(self, x):
        y = self.first(x)
        return self.last(y.relu() if len(x) % 2 else y.tanh())


class Draws(Reads):
    """Random numbers, in eval mode too."""

    def forward(self, x):
        return self.last(self.first(x) + torch.randn(4, dtype=x.dtype))


class Views(Reads):
    """Half of a tensor is written into, and the whole read."""

    def forward(self, x):
        y = self.first(x)
        y[:, :2].relu_()
        return self.last(y)


class Counts(Reads):
    """An argument of an operator that is no multiple of the samples."""

    def forward(self, x):
        return self.last(self.first(x) / len(x) ** 2)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Reads, "a number is read out of a tensor"),
        (Branches, "other operators run for other samples"),
        (Draws, "draws random numbers"),
        (Views, "writes into a tensor of which something else reads a view"),
        (Counts, "give another output|depends on the samples"),
    ],
)
def test_a_network_that_cannot_be_taken_apart_is_run_whole(kind, reason):
    torch.manual_seed(0)
    model = kind().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    data = DataPass([x, x + 1])
    stations = [Station("first", "output"), Station("last", "output")]
    with pytest.warns(UserWarning, match=f"{kind.__name__} is run as a whole for each layer.*({reason})"):
        walk = Walk(model, data, stations)
    assert walk.is_plain
    found, expected = outputs(walk), outputs(Walk(model, data, stations, plain=True))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Padded(Reads):
    """A mask is left out if it is all ones, as transformers does."""

    def forward(self, x, mask):
        x = self.first(x)
        return self.last(x if mask.all() else x * mask[:, None])


def test_numbers_read_out_of_the_inputs_are_the_same_for_all_batches():
    torch.manual_seed(0)
    model = Padded().double()
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    batches = [{"x": torch.randn(len(part), 3, dtype=torch.float64), "mask": part} for part in mask.split([5, 2])]
    stations = [Station("first", "output"), Station("last", "output")]
    one = DataPass(batches[:1])
    assert [bool(batch.kwargs["mask"][:2].all()) for batch in one] == [True]  # as it is not of the whole batch
    walk = Walk(model, one, stations)
    assert not walk.is_plain
    for a, b in zip(outputs(walk), outputs(Walk(model, one, stations, plain=True)), strict=True):
        torch.testing.assert_close(a, b)
    both = DataPass(batches)
    assert {bool(batch.kwargs["mask"].all()) for batch in both} == {False, True}
    with pytest.warns(UserWarning, match="reads a number out of its inputs that differs"):
        walk = Walk(model, both, stations)
    assert walk.is_plain


class Filled(Reads):
    """A mask that is the same for all samples is filled part by part."""

    def forward(self, x):
        mask = x.new_zeros(4)
        mask[:2] = 1
        mask[3:] += 2
        return self.last(self.first(x) * mask)


def test_a_constant_that_is_filled_part_by_part_is_no_obstacle():
    torch.manual_seed(0)
    model = Filled().double()
    data = DataPass([torch.randn(5, 3, dtype=torch.float64)], batch_size=3)
    walk = walk_of(model, data)
    assert not walk.is_plain
    torch.testing.assert_close(outputs(walk), outputs(walk_of(model, data, plain=True)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "make",
    [lambda **s: nn.TransformerEncoderLayer(8, 2, 12, **s), lambda **s: Attends(nn.MultiheadAttention(8, 2, **s))],
)
def test_attention(make, batch_first):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), make(batch_first=batch_first), nn.Linear(8, 3))
    data = DataPass([torch.randn(6, 5, 8)], batch_size=4)
    walk = walk_of(model, data)
    assert not walk.is_plain
    for one, other in zip(outputs(walk), outputs(walk_of(model, data, plain=True)), strict=True):
        torch.testing.assert_close(one, other)
    if batch_first:
        structure = trace(TracedModel.of(model, next(iter(data)).args[0]))
        assert walk.forward_macs == structure.cost.macs(structure.widths)


class Attends(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Mixed(nn.Module):
    """Samples are centred by the mean of their batch."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x).tanh()
        return self.last(x - x.mean(0))


class Swapped(nn.Module):
    """Samples lie on another dimension than the first for a while."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.norm(self.first(x).relu().transpose(0, 1)).relu()
        return self.last(y.mean(0))


@pytest.mark.parametrize(("kind", "shape"), [(Mixed, (3,)), (Swapped, (6, 5))])
def test_samples_that_cannot_be_told_apart_are_run_variant_by_variant(kind, shape):
    torch.manual_seed(0)
    model = kind().double()
    data = DataPass([torch.randn(7, *shape, dtype=torch.float64)], batch_size=3)
    walk = walk_of(model, data)
    assert not walk.is_plain
    for one, other in zip(outputs(walk), outputs(walk_of(model, data, plain=True)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most_rows", [1, 5, 1000])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_number_of_variants_in_a_batch_changes_nothing(name, most_rows):
    model, data = build(name), DataPass(raw_batches(name, total=5, size=2))
    for visit in walk_of(model, data, most_rows=most_rows):
        several = 1 - torch.eye(visit.channels)[:4]
        for here in visit:
            expected = [
                tree_leaves(here.rest(here.value * _shaped(mask, visit.place.dim, here.value))) for mask in several
            ]
            found = tree_leaves(here.rest_masked(several))
            for leaf, wanted in zip(found, zip(*expected, strict=True), strict=True):
                torch.testing.assert_close(leaf, torch.stack(wanted))


def _shaped(mask, dim, value):
    shape = [1] * value.dim()
    shape[dim] = -1
    return mask.to(value).view(shape)


@pytest.mark.parametrize("make", [ResNetCIFAR, VGG16CIFAR])
def test_real_networks_bit_by_bit(make):
    torch.manual_seed(0)
    model = make()
    data = DataPass([torch.randn(4, 3, 32, 32)])
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = reference(next(iter(data)).args[0])
    stations = stations_of(model, next(iter(data)))[::5]
    for visit in Walk(model, data, stations):
        for here in visit:
            assert torch.equal(here.output, expected)


# -- what is spent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_multiply_accumulates_are_those_of_the_cost_model(name):
    model, data = build(name), DataPass(raw_batches(name))
    batch = next(iter(data))
    structure = trace(TracedModel.of(model, *batch.args, **batch.kwargs))
    walk = walk_of(model, data)
    assert walk.forward_macs == structure.cost.macs(structure.widths)
    for _ in walk:
        pass
    assert walk.macs <= len(data) * walk.forward_macs, "moving on is one forward pass at most"
    assert walk.macs_naive == len(walk.stations) * len(data) * walk.forward_macs


def test_fused_attention_costs_the_products_of_queries_keys_and_values():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.first(x)[:, None]
            return self.last(F.scaled_dot_product_attention(y[:, :, :3], y, y))[:, 0]

    walk = Walk(Attends().eval(), DataPass([torch.randn(2, 5, 4)]), [Station("first", "output")])
    assert walk.forward_macs == 5 * 4 * 6 + 3 * 5 * (6 + 6) + 3 * 6 * 2


def test_the_rest_costs_what_lies_behind():
    model, data = build("chain"), DataPass(raw_batches("chain", total=4))
    # Per sample: 3·5·9·64, 5·6·9·16, 24·7, 7·3.
    macs = [8640, 4320, 168, 21]
    walk = walk_of(model, data)
    assert walk.forward_macs == sum(macs)
    moved = 0
    for visit in walk:
        moved += 4 * macs[visit.index]
        assert walk.macs == moved
        (here,) = visit
        before = walk.macs
        here.rest(here.value)
        assert walk.macs - before == 4 * sum(macs[visit.index + 1 :])
        before = walk.macs
        masks = torch.ones(3, visit.channels)
        masks[0, 0] = masks[1, 1] = masks[2, :2] = 0
        here.rest_masked(masks)
        assert walk.macs - before == 3 * 4 * sum(macs[visit.index + 1 :])
        if visit.index == 0:
            before = walk.macs
            here.rest_masked(masks, delta=True)
            layer = 4 * macs[1] * (1 + 1 + 2) // 5
            assert walk.macs - before == 4 * macs[1] + layer + 3 * 4 * sum(macs[2:])
        moved = walk.macs


def test_most_channels_masked_are_the_share_of_the_others():
    """Three of four masked cost one of four, all of them nothing; where a norm makes other numbers of 0, no less."""
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU())
    norm = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU())
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    masks = torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    layer = 3 * 6 * 6 * 4 * 5 * 9  # of three samples
    for model, share in (
        (nn.Sequential(*chain, *ends), (1 + 0 + 1) / 4),
        (nn.Sequential(*norm, *ends), (3 + 4 + 1) / 4),
    ):
        model = model.double().eval()
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.bias.data.uniform_(0.5, 1)
        walk = Walk(model, DataPass([torch.randn(3, 2, 6, 6, dtype=torch.float64)]), [Station("0", "output")])
        (visit,) = walk
        (here,) = visit
        here.rest_masked(masks[2:], delta=True)  # what the layer gives unmasked is known then
        before = walk.macs
        torch.testing.assert_close(here.rest_masked(masks, delta=True), here.rest_masked(masks), rtol=1e-12, atol=1e-12)
        assert walk.macs - before == layer * share + layer * 3 + 2 * 3 * 3 * 10


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_takes_the_share_of_the_fewer_channels(bias):
    """One of six masked costs one of six, four of six what the other two cost."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=bias)).double().eval()
    walk = Walk(model, DataPass([torch.randn(5, 4, dtype=torch.float64)]), [Station("0", "output")])
    (visit,) = walk
    (here,) = visit
    masks = torch.tensor([[0.0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 1]])
    found = here.rest_masked(masks, delta=True)  # what the layer gives unmasked is known then
    before = walk.macs
    torch.testing.assert_close(found, here.rest_masked(masks), rtol=1e-12, atol=1e-12)
    assert walk.macs - before == 2 * 5 * 6 * 3
    before = walk.macs
    here.rest_masked(masks, delta=True)
    assert walk.macs - before == 5 * 6 * 3 * (1 + 2) / 6


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_first_pass_has_run_is_not_run_again(name):
    """Values and outputs are the same bit by bit, and moving costs no multiply-accumulates while nothing is masked."""
    model, data = build(name), DataPass(raw_batches(name))
    alone, after = walk_of(model, data), walk_of(model, data)
    values = {station: [] for station in after.stations}
    for output, found in after.first_pass(after.stations):
        assert all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(output))
        for station, value in found.items():
            values[station].append(value.clone())
    whole = after.macs
    assert whole == len(data) * after.forward_macs
    for one, other in zip(alone, after, strict=True):
        for a, b, value in zip(one, other, values[other.station], strict=True):
            assert torch.equal(a.value, b.value)
            assert torch.equal(b.value, value)
        assert after.macs == whole
    masked = [walk_of(model, data), walk_of(model, data)]
    list(masked[1].first_pass([]))
    found, expected = outputs(masked[1]), outputs(masked[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    small = walk_of(model, data, memory_limit=0)
    list(small.first_pass([]))
    list(small)
    assert small.macs > whole  # nothing is kept


def test_samples_without_anything_to_mask_are_not_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([1.0, 0, 0])
        model[0].bias[0] = 0
    x = torch.randn(10, 3, dtype=torch.float64)
    x[:, 0] = torch.tensor([-1.0] * 7 + [1.0] * 3)
    data = DataPass([x])
    walk = Walk(model, data, [Station("0")])
    (visit,) = walk
    (here,) = visit
    here.output  # noqa: B018
    before = walk.macs
    masks = torch.tensor([[0.0, 1, 1, 1]])
    found = here.rest_masked(masks, skip=True)
    assert walk.macs - before == 3 * 8
    torch.testing.assert_close(found, here.rest_masked(masks), rtol=1e-12, atol=1e-12)
    dead = (here.value[:, 0] == 0).nonzero()[:, 0]
    assert torch.equal(found[0, dead], here.output[dead])
    before = walk.macs
    assert torch.equal(here.rest_masked(torch.ones(2, 4), skip=True), torch.stack([here.output] * 2))
    assert walk.macs == before


def test_branches_that_a_station_does_not_reach_are_run_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(torch.cat([self.one(x).relu(), self.two(x).relu()], 1))

    model, data = Two(), DataPass([torch.randn(3, 4)])
    walk = Walk(model, data, [Station("one")])
    (visit,) = walk
    (here,) = visit
    before, spent = walk.macs, []
    for _ in range(3):
        here.rest(here.value)
        spent.append(walk.macs - before)
        before = walk.macs
    assert spent == [3 * (16 + 16), 3 * 16, 3 * 16]


# -- what is held -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "dense", "segmentation"])
def test_a_memory_limit_is_kept_and_changes_nothing(name):
    model, data = build(name), DataPass(raw_batches(name))
    whole, limited = walk_of(model, data), walk_of(model, data, memory_limit=5000)
    expected, spool = outputs(whole), limited._engine.spool
    on_disk = []
    for visit in limited:
        on_disk.append(spool.on_disk)
        assert spool.in_memory <= 5000
        visit.mask(torch.ones(visit.channels))
    assert max(on_disk) > 5000
    assert all(torch.equal(a, b) for a, b in zip(outputs(limited), expected, strict=True))


def test_only_what_is_live_is_held():
    """In a chain one tensor of each sample, in a residual branch two."""
    for name, count in (("chain", {1}), ("residual", {1, 2})):
        model, data = build(name), DataPass(raw_batches(name))
        walk = walk_of(model, data)
        seen = set()
        for visit in walk:
            live = walk._engine._live
            seen |= {len(one) for one in live.values()}
            held = sum(stored.size for one in live.values() for stored in one.values())
            assert walk._engine.spool.in_memory == held
            assert visit.index or held == sum(here.value.nbytes for here in visit) or name == "residual"
        assert seen == count


def test_a_walk_can_be_begun_again():
    model, data = build("residual"), DataPass(raw_batches("residual"))
    walk = walk_of(model, data)
    first = next(iter(walk))
    first.mask(torch.zeros(first.channels))
    once, again = outputs(walk), outputs(walk)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_what_a_network_writes_into_is_not_shared():
    """Activations in place work on copies of what is held."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.first(x)
            y = torch.cat([y, y], 0)[: len(y)]
            return F.relu_(self.last(F.relu_(y)))

    model, x = InPlace(), torch.randn(6, 3)
    walk = Walk(model, DataPass([x]), [Station("first", "output"), Station("last", "output")])
    for visit in walk:
        for here in visit:
            before = here.value.clone()
            one, other = here.rest(here.value), here.rest(here.value)
            assert torch.equal(here.value, before)
            assert torch.equal(one, other)


def test_masks_behind_alone():
    model, data = build("residual"), DataPass(raw_batches("residual"))
    walk = Walk(model, data, [Station("conv1")])
    for visit in walk:
        (here, *_) = visit
        with pytest.raises(
            ValueError, match=r"expected masks at stations behind conv1 \(activation\), got one at stem"
        ):
            here.rest(here.value, also={Station("stem"): torch.ones(4)})
        with pytest.raises(ValueError, match=r"expected masks of shape \(variants, 4\), got \(4,\)"):
            here.rest_masked(torch.ones(4))
