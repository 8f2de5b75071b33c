"""What `trace` finds in small networks of one difficulty each, held against networks that were really cut."""

import copy
import functools
import random
import types
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune import prune
from lightning_prune.structure import Call, StructureError, TracedModel, refresh, trace, trials
from tests.support.architectures import CASES, Auxiliary, Net, Standardised
from tests.support.counting import counting
from tests.support.cutting import cut, draw, half, masked, named, shrunk

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# Statistics over units are others in the masked network: see the independent networks below.
masked_cases = pytest.mark.parametrize("case", [case for case in CASES if case.masked], ids=lambda case: case.name)
SEEDS = range(3)
# An InstanceNorm without weights warns of a width that it does not need.
pytestmark = pytest.mark.filterwarnings("ignore:input's size at dim:UserWarning")


@functools.cache
def structure_of(case):
    return trace(TracedModel.of(case.model(), case.example()))


@cases
def test_the_widths_that_can_shrink(case):
    structure = structure_of(case)
    assert structure.widths == case.widths
    assert not structure.notes


@cases
def test_what_stays_says_why(case):
    structure = structure_of(case)
    reasons = {frozen.tensor: frozen.reason for frozen in structure.frozen}
    assert all(reasons.values())
    for tensor, reason in case.frozen.items():
        assert reason in reasons[tensor]


@masked_cases
@pytest.mark.parametrize("seed", SEEDS)
def test_the_cut_network_equals_the_masked_one(case, seed):
    model, x = case.model(), case.example()
    structure = structure_of(case)
    kept = draw(structure, seed)
    axes = structure.axes(kept)
    narrow = shrunk(model, axes, structure.factors(kept))
    torch.testing.assert_close(narrow(x), masked(model, axes)(x), rtol=1e-12, atol=1e-12)


@cases
@pytest.mark.parametrize("seed", SEEDS)
def test_costs_are_those_of_the_cut_network(case, seed):
    model, x = case.model(), case.example(batch=1)
    structure = structure_of(case)
    for kept in ({}, draw(structure, seed)):
        small = shrunk(model, structure.axes(kept))
        widths = structure.widths | {name: len(units) for name, units in kept.items()}
        with counting() as counter:
            small(x)
        assert structure.cost.params(widths) == sum(p.numel() for p in small.parameters())
        if case.name != "spectral norm":  # its products of matrix and vector are left out by PyTorch's counter
            assert structure.cost.macs(widths) * 2 == counter.get_total_flops()


class Written(TorchDispatchMode):
    """Bytes of every tensor that an operator writes anew, counted on real tensors."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.total += sum(t.numel() * t.element_size() for t in tensors if t.untyped_storage()._cdata not in known)
        return out


# Weights that are computed once for a batch, and operators that are others on a device than without one, or copy a
# batch where of one sample they make a view.
INEXACT_MEMORY = {
    "weight norm", "spectral norm", "group norm of single channels", "flatten channels last",
    "bare parameters and attention", "attention heads, three layers", "attention heads, one layer",
    "attention heads, fused", "instance norm",
}  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in INEXACT_MEMORY], ids=lambda case: case.name)
def test_memory_is_what_the_operators_of_the_cut_network_write(case):
    structure = structure_of(case)
    for kept in ({}, draw(structure, 0)):
        small, x = shrunk(case.model(), structure.axes(kept)).eval(), case.example(batch=1)
        with Written() as written:
            small(x)
        widths = structure.widths | {name: len(units) for name, units in kept.items()}
        assert structure.cost.memory(widths) == written.total


@cases
@pytest.mark.parametrize("seed", SEEDS)
def test_the_structure_after_a_cut_is_that_of_the_cut_network(case, seed):
    model = case.model()
    structure = structure_of(case)
    kept = half(structure, seed)
    after = structure.take(kept)
    again = trace(TracedModel.of(shrunk(model, structure.axes(kept)), case.example()))
    assert after.widths == {name: len(units) for name, units in kept.items()}
    assert after.cost.shapes == again.cost.shapes
    if all(width > 1 for width in after.widths.values()):  # a width of one is no pattern to follow
        assert {g.name: g for g in after.groups} == {g.name: g for g in again.groups}
        assert {(f.tensor, f.dim, f.width) for f in after.frozen} == {(f.tensor, f.dim, f.width) for f in again.frozen}
    second = half(after, seed)
    twice = shrunk(shrunk(model, structure.axes(kept)), after.axes(second))
    once = shrunk(model, structure.axes({g: np.asarray(kept[g])[list(second[g])].tolist() for g in kept}))
    for name, tensor in named(once).items():
        assert torch.equal(named(twice)[name], tensor)


@cases
def test_the_cut_network_trains(case):
    model, x = case.model(), case.example(batch=4)
    structure = structure_of(case)
    small = shrunk(model, structure.axes(half(structure))).train()
    out = small(x)
    sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
    used = [p for name, p in small.named_parameters() if "not used" not in case.frozen.get(name, "")]
    missing = [tuple(p.shape) for p in used if p.grad is None or p.grad.shape != p.shape]
    assert not missing or case.name in ("unused weights",)


@cases
def test_the_network_is_left_alone(case):
    model, x = case.model(), case.example()
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    modes = [module.training for module in model.modules()]
    before = {name: tensor.detach().clone() for name, tensor in named(model).items()}
    objects = {name: id(tensor) for name, tensor in named(model).items()}
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    trace(TracedModel.of(model, x))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert (state[2] == np.random.get_state()[1]).all()
    assert [module.training for module in model.modules()] == modes
    assert {name: id(tensor) for name, tensor in named(model).items()} == objects
    assert all(torch.equal(tensor, before[name]) for name, tensor in named(model).items())


# -- independent narrow networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_layer_norm_equals_a_narrow_network_with_the_kept_weights(seed):
    case = next(c for c in CASES if c.name == "layer norm")
    model, x = case.model(), case.example()
    structure = structure_of(case)
    kept = draw(structure, seed)
    a, b = (list(kept[name]) for name in ("0", "3"))
    layers = [nn.Linear(5, len(a)), nn.LayerNorm(len(a)), nn.ReLU(), nn.Linear(len(a), len(b)), nn.ReLU()]
    narrow = nn.Sequential(*layers, nn.Linear(len(b), 2)).double()
    old = model.state_dict()
    picks = {
        **{name: old[name][a] for name in ("0.weight", "0.bias", "1.weight", "1.bias")},
        **{"3.weight": old["3.weight"][b][:, a], "3.bias": old["3.bias"][b]},
        **{"5.weight": old["5.weight"][:, b], "5.bias": old["5.bias"]},
    }
    narrow.load_state_dict(picks)
    torch.testing.assert_close(shrunk(model, structure.axes(kept))(x), narrow(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_group_norm_equals_a_narrow_network_with_the_kept_weights(seed):
    case = next(c for c in CASES if c.name == "group norm")
    model, x = case.model(), case.example()
    structure = structure_of(case)
    kept = draw(structure, seed)
    rows = [row + 4 * group for group in range(2) for row in kept["0"]]  # every group loses the same positions
    n, old = len(rows), model.state_dict()
    narrow = nn.Sequential(nn.Conv2d(3, n, 3), nn.GroupNorm(2, n), nn.ReLU(), nn.Conv2d(n, 2, 1)).double()
    picks = {name: old[name][rows] for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    narrow.load_state_dict({**picks, "3.weight": old["3.weight"][:, rows], "3.bias": old["3.bias"]})
    torch.testing.assert_close(shrunk(model, structure.axes(kept))(x), narrow(x), rtol=1e-12, atol=1e-12)


# -- ways to call a network -------------------------------------------------------------------------------------------


def two_inputs():
    return Net(
        lambda m, x, y: m.head(m.a(x).relu() + m.b(y)), a=nn.Linear(4, 6), b=nn.Linear(3, 6), head=nn.Linear(6, 2)
    )


def by_dictionary():
    return Net(
        lambda m, batch, *, scale: m.head(m.a(batch["x"]).relu() * scale), a=nn.Linear(4, 6), head=nn.Linear(6, 2)
    )


@dataclass
class Output:
    logits: torch.Tensor
    hidden: dict[str, torch.Tensor]


def nested_output():
    return Net(
        lambda m, x: Output(m.head(m.free(m.a(x)).relu()), {"kept": m.a(x)}),
        a=nn.Linear(4, 5),
        free=nn.Linear(5, 6),
        head=nn.Linear(6, 2),
    )


@dataclass
class Wrapped:
    inner: object


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits):
        self.logits = logits


class Logits(dict):
    pass


OUTPUTS = {
    "a distribution": lambda y: torch.distributions.Independent(torch.distributions.Normal(y, 1.0), 1),
    "a transformed one": lambda y: torch.distributions.TransformedDistribution(
        torch.distributions.Normal(y, 1.0), [torch.distributions.transforms.ExpTransform()]
    ),
    "nested": lambda y: Wrapped(Wrapped({"logits": [y]})),
    "slots": Slots,
    "a dict of a kind of its own": lambda y: Logits(logits=y),
    "a set": lambda y: {y},
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_are_found_in_whatever_holds_them(wrap):
    model = Net(lambda m, x: wrap(m.head(m.a(x).relu())), a=nn.Linear(4, 6), head=nn.Linear(6, 3))
    structure = trace(TracedModel.of(model, torch.ones(2, 4)))
    assert structure.widths == {"a": 6}


CALLS = [
    ("several inputs", two_inputs, (torch.ones(2, 4), torch.ones(2, 3)), {}, {"a": 6}),
    ("dictionary and keyword", by_dictionary, ({"x": torch.ones(2, 4)},), {"scale": torch.ones(())}, {"a": 6}),
    ("nested output", nested_output, (torch.ones(2, 4),), {}, {"free": 6}),
    (
        "unbatched",
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(24, 2)),
        (torch.ones(3, 4, 4),),
        {},
        {"0": 6},
    ),
    ("unbatched linear", lambda: nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2)), (torch.ones(3),), {}, {"0": 6}),
    (
        "batch of one",
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)),
        (torch.ones(1, 3, 4, 4),),
        {},
        {"0": 6},
    ),
    (
        "bfloat16",
        lambda: nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2)).bfloat16(),
        (torch.ones(2, 3, dtype=torch.bfloat16),),
        {},
        {"0": 6},
    ),
]


@pytest.mark.parametrize(("build", "args", "kwargs", "widths"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_ways_to_call_a_network(build, args, kwargs, widths):
    model = build()
    structure = trace(TracedModel.of(model, *args, **kwargs))
    assert structure.widths == widths
    axes = structure.axes(half(structure))
    small, zeros = shrunk(model, axes)(*args, **kwargs), masked(model, axes)(*args, **kwargs)
    if isinstance(small, Output):
        small, zeros = small.logits, zeros.logits
    torch.testing.assert_close(small, zeros)


class Coordinates(nn.Module):
    """A bias from a table of coordinates, as in Swin V2, and a learned query: once for all samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.up, self.down = nn.Linear(2, 8), nn.Linear(8, 3)
        self.register_buffer("table", torch.rand(5, 2))

    def forward(self, x):
        return self.b(self.a(x).relu()) + self.down(self.up(self.table).relu()).sum(0)


class Queries(nn.Module):
    """Learned queries, the same for every sample, as in DETR."""

    def __init__(self):
        super().__init__()
        self.query, self.a, self.b = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.b(self.a(self.query.expand(len(x), -1, -1)).relu()) @ x.unsqueeze(-1)


class Positions(nn.Module):
    """Codes of positions, computed once or from a mask of every sample, as EdgeNeXt and XCiT do."""

    def __init__(self, each):
        super().__init__()
        self.a, self.b, self.code, self.each = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(1, 6, 1), each

    def forward(self, x):
        n, _, h, w = x.shape
        if self.each:
            rows = torch.zeros(n, h, w).cumsum(1).unsqueeze(1)
        else:
            rows = torch.arange(h).view(1, 1, h, 1).repeat(1, 1, 1, w).float()
        return self.b((self.a(x) + self.code(rows)).relu())


COUNTED = [
    (lambda: Positions(True), torch.ones(3, 3, 4, 5), {"a": 6}),
    (lambda: Positions(False), torch.ones(3, 3, 4, 5), {"a": 6}),
    (Coordinates, torch.ones(3, 4), {"a": 6, "up": 8}),
    (Queries, torch.ones(3, 4), {"query": 4, "a": 6}),
    (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(24, 2)),
        torch.ones(3, 4, 4),
        {"0": 6},
    ),
    (lambda: nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2)), torch.ones(3), {"0": 6}),
    (
        lambda: Net(lambda m, images: m.b(m.a(torch.stack(images))), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 2, 1)),
        [torch.ones(3, 4, 4)] * 2,
        {"a": 6},
    ),
]


@pytest.mark.parametrize(
    ("build", "example", "widths"),
    COUNTED,
    ids=["positions of each", "positions", "table", "queries", "unbatched image", "vector", "list"],
)
def test_multiplications_of_one_sample(build, example, widths):
    model = build().eval()
    structure = trace(TracedModel.of(model, example))
    assert structure.widths == widths
    unbatched = isinstance(example, torch.Tensor) and example.dim() % 2
    one = example if unbatched else example[:1]
    for kept in ({}, half(structure)):
        with counting() as counter:
            shrunk(model, structure.axes(kept))(one)
        now = structure.widths | {name: len(units) for name, units in kept.items()}
        assert structure.cost.macs(now) * 2 == counter.get_total_flops()


class Regions(nn.Module):
    """Regions of one image's map, pooled to one size, as a detector's second stage sees them; none in a first list."""

    def __init__(self, pool):
        super().__init__()
        self.stem, self.box, self.head = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(20, 6), nn.Linear(6, 2)
        self.register_buffer("boxes", torch.tensor([[0.0, 0, 0, 4, 4], [0, 1, 1, 5, 3]]))
        self.pool = pool

    def forward(self, x):
        none = torch.stack([torch.zeros(0), torch.zeros(0)], dim=1)
        boxes = torch.cat([self.boxes, torch.cat([none, none, torch.zeros(0, 1)], 1).to(self.boxes)])
        return self.head(F.relu(self.box(self.pool(F.relu(self.stem(x)), boxes, 2).flatten(1))))


@pytest.mark.parametrize("pool", ["roi_align", "roi_pool"])
def test_regions_of_an_image(pool):
    model = Regions(getattr(torchvision.ops, pool)).double()
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    structure = trace(TracedModel.of(model, x))
    assert structure.widths == {"stem": 5, "box": 6}
    axes = structure.axes(half(structure))
    torch.testing.assert_close(shrunk(model, axes)(x), masked(model, axes)(x), rtol=1e-12, atol=1e-12)


def test_only_what_a_call_uses_is_known():
    """In eval mode alone the second head of an auxiliary network never runs and its input cannot be followed."""
    model, x = Auxiliary(), torch.ones(2, 4)
    structure = trace(TracedModel(model, (Call((x,)),)))
    assert structure.widths == {"body": 5, "stem": 6} or "stem" in structure.widths
    assert "not used" in next(f.reason for f in structure.frozen if f.tensor == "aux.weight")


class Moody(nn.Module):
    """Reads or keeps its mode in one of several ways; the second head runs in train mode only."""

    def __init__(self, way):
        super().__init__()
        self.way, self.mood = way, False
        self.first, self.drop, self.head, self.aux = nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        x = self.drop(self.first(x).relu())
        asked = {
            "attribute": lambda: self.training,
            "getattr": lambda: getattr(self, "training"),  # noqa: B009  # another way to the same
            "of a layer": lambda: self.drop.training and type(self.drop) is nn.Dropout,
            "kept elsewhere": lambda: self.mood,
        }[self.way]()
        return self.head(x) + (self.aux(x) if asked else 0)


class KeepsItsMood(Moody):
    def train(self, mode=True):
        self.mood = mode
        return super().train(mode)


@pytest.mark.parametrize("way", ["attribute", "getattr", "of a layer", "kept elsewhere"])
def test_both_modes_are_followed_however_a_network_asks_for_its_mode(way):
    model = KeepsItsMood(way) if way == "kept elsewhere" else Moody(way)
    structure = trace(TracedModel.of(model, torch.ones(2, 4)))
    assert "aux.weight" in {member.tensor for member in structure.group("first").members}


def test_a_layer_with_another_forward_is_followed_in_both_modes():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 2))
    model[1].extra = nn.Linear(6, 1)
    model[1].forward = types.MethodType(lambda self, x: x + self.extra(x) if self.training else x, model[1])
    structure = trace(TracedModel.of(model, torch.ones(2, 4)))
    assert "1.extra.weight" in {member.tensor for member in structure.group("0").members}


class Remembers(nn.Module):
    """Adds what it computed at its last call."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.last = None

    def forward(self, x):
        h = self.first(x).relu()
        if self.last is not None:
            h = h + self.last.flip(1)
        self.last = self.second(h).detach()
        return self.head(h)


def test_what_a_call_leaves_for_the_next_one_is_followed():
    model, x = Remembers().double(), torch.randn(3, 4, dtype=torch.float64)
    structure = trace(TracedModel.of(model, x))
    assert structure.widths == {"first": 6}
    assert structure.cost.macs(structure.widths) == 4 * 6 + 6 * 6 + 6 * 2
    axes = structure.axes(draw(structure, 0))
    small, large = shrunk(model, axes), masked(model, axes)
    for _ in range(3):
        torch.testing.assert_close(small(x), large(x), rtol=1e-12, atol=1e-12)


def test_another_method_is_followed_too():
    model = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(4, 6), b=nn.Linear(6, 2), extra=nn.Linear(6, 3))
    model.training_step = lambda x: model.extra(model.a(x)).sum()
    x = torch.ones(2, 4)
    alone = trace(TracedModel.of(model, x))
    assert {m.tensor for m in alone.group("a").members} == {"a.weight", "a.bias", "b.weight"}


class WithStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.extra = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())

    def training_step(self, x):
        return self.extra(self.a(x)).square().mean()

    def broken_step(self, x):
        raise RuntimeError("no logger here")

    def counting_step(self, x):
        return torch.bincount(self.extra(self.a(x)).argmax(-1)).sum()


def test_a_training_step_is_followed_too():
    x = torch.ones(2, 4)
    calls = (Call((x,)),)
    structure = trace(TracedModel(WithStep(), calls, (Call((x,), method="training_step", training=True),)))
    assert {m.tensor for m in structure.group("a").members} == {"a.weight", "a.bias", "b.weight", "extra.weight"}
    assert not structure.notes


def test_a_step_that_fails_leaves_a_note():
    x = torch.ones(2, 4)
    structure = trace(TracedModel(WithStep(), (Call((x,)),), (Call((x,), method="broken_step", training=True),)))
    (note,) = structure.notes
    assert "broken_step" in note
    assert "no logger here" in note
    assert structure.widths == {"a": 6}


def test_operators_that_depend_on_data_run_on_real_numbers():
    x = torch.ones(2, 4)
    structure = trace(TracedModel(WithStep(), (Call((x,)),), (Call((x,), method="counting_step", training=True),)))
    assert not structure.notes
    assert "extra.weight" in {m.tensor for m in structure.group("a").members}


def scaled():
    """Layers that multiply by their width, among others; sums keep the trial from seeing at which one it fails."""

    def forward(net, x):
        scale = sum(getattr(net, f"bad{i}")(x).shape[1] for i in range(6)) / 51
        bad = [getattr(net, f"bad{i}")(x) for i in range(6)]
        return net.last(net.good(x)) + sum(getattr(net, f"end{i}")(h * scale) for i, h in enumerate(bad))

    bad = {f"bad{i}": nn.Linear(4, 6 + i) for i in range(6)}
    return Net(
        forward, **bad, **{f"end{i}": nn.Linear(6 + i, 2) for i in range(6)}, good=nn.Linear(4, 5), last=nn.Linear(5, 2)
    )


def test_the_search_for_groups_that_fail_ends(monkeypatch):
    x = torch.ones(3, 4)
    decided = trace(TracedModel.of(scaled(), x))
    assert decided.widths == {"good": 5}
    assert not decided.notes
    monkeypatch.setattr(trials, "_MOST_OPERATORS", 0)
    monkeypatch.setattr(trials, "_LEAST_TRIALS", 2)
    undecided = trace(TracedModel.of(scaled(), x))
    assert set(undecided.widths) <= {"good"}
    assert {axis.tensor for axis in undecided.frozen} >= {f"bad{i}.weight" for i in range(6)}
    (note,) = undecided.notes
    assert "ended after 2 trials" in note
    assert any(axis.reason == "undecided after 2 trial cuts" for axis in undecided.frozen)


def test_a_trial_beyond_the_budget_leaves_what_passes_together(monkeypatch):
    monkeypatch.setattr(trials, "_MOST_OPERATORS", 0)
    monkeypatch.setattr(trials, "_LEAST_TRIALS", 0)

    def forward(net, x):
        bad = net.bad(x)
        return net.last(net.good(x)) + net.end(bad / bad.shape[1])

    layers = {"bad": nn.Linear(4, 6), "end": nn.Linear(6, 2), "good": nn.Linear(4, 5), "last": nn.Linear(5, 2)}
    assert trace(TracedModel.of(Net(forward, **layers), torch.ones(3, 4))).widths == {}
    monkeypatch.setattr(trials, "_LEAST_TRIALS", 1)
    assert trace(TracedModel.of(Net(forward, **layers), torch.ones(3, 4))).widths == {"good": 5}


def test_a_dearer_kind_of_tensors_leaves_a_remark():
    x = torch.ones(2, 4)
    net = Net(lambda net, x: net.b(net.a(x) * net.scale), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    net.scale = 1 + torch.arange(6.0)
    assert not trace(TracedModel.of(net, x)).remarks
    real = trace(TracedModel(WithStep(), (Call((x,)),), (Call((x,), method="counting_step", training=True),)))
    assert [remark.partition(",")[0] for remark in real.remarks] == [
        "`counting_step` was traced on fake tensors",
        "`counting_step` was traced on real tensors",
    ]


def test_a_network_that_fails_when_units_are_zero_freezes_them():
    def forward(net, x):
        hidden = net.a(x)
        if 0 in hidden.detach().numpy():
            raise RuntimeError("a dead unit")
        return net.b(hidden)

    structure = trace(TracedModel.of(Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2)), torch.ones(2, 4)))
    assert structure.widths == {}
    assert "a dead unit" in structure.frozen[0].reason


def test_a_network_without_widths():
    structure = trace(TracedModel.of(nn.Linear(3, 2), torch.ones(2, 3)))
    assert structure.groups == ()
    assert structure.cost.params({}) == 8
    assert structure.cost.macs({}) == 6


def test_hooks_of_the_user_see_nothing():
    model, seen = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[2].register_full_backward_hook(lambda *_: seen.append("backward"))
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    trace(TracedModel.of(model, torch.ones(2, 4)))
    assert not seen
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("normed", [old_weight_norm, nn.utils.parametrizations.weight_norm])
def test_weight_norm_equals_plain_layers_with_the_kept_weights(normed):
    model = nn.Sequential(normed(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    model(x)  # leaves a weight that is part of an autograd graph
    structure = trace(TracedModel.of(model, x))
    assert structure.widths == {"0": 6}
    hidden = F.relu(F.linear(x, model[0].weight[[1, 4]], model[0].bias[[1, 4]]))
    expected = F.linear(hidden, model[2].weight[:, [1, 4]], model[2].bias)
    torch.testing.assert_close(cut(model, structure.axes({"0": (1, 4)}))(x), expected)
    assert (model[0].in_features, model[0].out_features) == (4, 2)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert trace(TracedModel.of(model, torch.ones(2, 4, device="meta"))).widths == {"0": 6}


def test_inside_inference_mode():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.inference_mode():
        assert trace(TracedModel.of(model, torch.ones(2, 4))).widths == {"0": 6}


# -- errors -----------------------------------------------------------------------------------------------------------


def test_an_example_that_does_not_fit_is_told_by_the_error_alone(capfd):
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))

        def forward(self, x):
            return x + self.weight

    with pytest.raises(StructureError, match="fails on the example"):
        trace(TracedModel.of(Added(), torch.zeros(5, 4)))
    assert capfd.readouterr().err == ""


def test_an_example_that_does_not_fit_is_named():
    with pytest.raises(StructureError, match=r"Linear.forward fails on the example in eval mode.*\(2, 3\)"):
        trace(TracedModel.of(nn.Linear(4, 2), torch.ones(2, 3)))


def test_an_example_without_tensors_is_named():
    with pytest.raises(StructureError, match="without tensors"):
        trace(TracedModel.of(nn.Linear(4, 2), "text"))


def test_a_lazy_layer_is_named():
    with pytest.raises(StructureError, match=r"1 \(LazyLinear\): expected initialized parameters, got `weight`"):
        trace(TracedModel.of(nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2)), torch.ones(2, 4)))


def test_a_scripted_part_is_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of PyTorch deprecate it
        scripted = torch.jit.script(nn.Linear(4, 3))
    with pytest.raises(StructureError, match=r"0 \(RecursiveScriptModule\): expected modules in Python"):
        trace(TracedModel.of(nn.Sequential(scripted, nn.Linear(3, 2)), torch.ones(2, 4)))


def test_a_norm_that_averages_over_all_batches_can_be_cut():
    """Its count of batches, which enters what it computes, is that of the network in every run."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 2))
    model(torch.randn(5, 4))
    structure = trace(TracedModel.of(model, torch.randn(3, 4)))
    assert [(group.name, group.width) for group in structure.groups] == [("0", 6)]
    assert model[1].num_batches_tracked == 1


def test_a_network_that_cannot_be_copied_is_named():
    model = nn.Linear(4, 2)
    model.source = (number for number in range(3))
    with pytest.raises(StructureError, match=r"Linear cannot be copied.*generator"):
        trace(TracedModel.of(model, torch.ones(2, 4)))


def test_a_group_that_does_not_exist_is_named():
    structure = trace(TracedModel.of(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.ones(2, 4)))
    with pytest.raises(KeyError, match=r"'nonsense'.*there are: 0"):
        structure.axes({"nonsense": (0,)})


# -- layers -----------------------------------------------------------------------------------------------------------

LAYERS = [
    (nn.Linear(6, 4), nn.Linear(3, 2)),
    (nn.Bilinear(6, 5, 4), nn.Bilinear(3, 2, 1)),
    (nn.Conv2d(6, 4, 3), nn.Conv2d(3, 2, 3)),
    (nn.Conv1d(6, 6, 3, groups=6), nn.Conv1d(2, 2, 3, groups=2)),
    (nn.Conv3d(4, 12, 1, groups=4), nn.Conv3d(2, 6, 1, groups=2)),
    (nn.Conv2d(8, 4, 3, groups=4), nn.Conv2d(4, 2, 3, groups=2)),
    (nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2)),
    (nn.ConvTranspose2d(6, 4, 3), nn.ConvTranspose2d(3, 2, 3)),
    (nn.ConvTranspose2d(6, 12, 3, groups=6), nn.ConvTranspose2d(2, 4, 3, groups=2)),
    (nn.ConvTranspose2d(8, 12, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)),
    (nn.BatchNorm2d(6), nn.BatchNorm2d(3)),
    (nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(3, affine=False)),
    (nn.InstanceNorm2d(6, affine=True), nn.InstanceNorm2d(3, affine=True)),
    (nn.GroupNorm(2, 8), nn.GroupNorm(2, 4)),
    (nn.GroupNorm(8, 8), nn.GroupNorm(3, 3)),
    (nn.LayerNorm(6), nn.LayerNorm(3)),
    (nn.LayerNorm((2, 6)), nn.LayerNorm((2, 3))),
    (nn.RMSNorm(6), nn.RMSNorm(3)),
    (nn.Embedding(9, 6), nn.Embedding(9, 3)),
    (nn.PReLU(6), nn.PReLU(3)),
]


@pytest.mark.parametrize(("wide", "narrow"), LAYERS, ids=lambda layer: repr(layer))
def test_a_layer_says_its_new_widths(wide, narrow):
    wide, shapes = copy.deepcopy(wide), {name: tuple(t.shape) for name, t in named(wide).items()}
    for name, tensor in named(narrow).items():
        if tensor.dim():
            home = wide._parameters if name in wide._parameters else wide._buffers
            home[name] = tensor
    refresh(wide, shapes)
    assert repr(wide) == repr(narrow)
    own = {name: value for name, value in vars(narrow).items() if isinstance(value, int | tuple)}
    assert {name: vars(wide)[name] for name in own} == own


class Conv1D(nn.Module):
    """As GPT-2 has it in transformers: the width of its outputs is in an attribute, which `forward` reads."""

    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.nf)


def test_a_layer_of_transformers_that_keeps_its_width_in_an_attribute() -> None:
    net = nn.Sequential(Conv1D(8, 4), nn.GELU(), Conv1D(4, 8), nn.GELU(), Conv1D(3, 4)).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    structure = trace(TracedModel.of(net, x))
    assert structure.widths == {"0": 8, "2": 4}
    axes = structure.axes({"0": [0, 2, 5], "2": [1, 3]})
    zeroed = masked(net, axes)
    narrow = shrunk(net, axes)
    assert [(layer.nx, layer.nf) for layer in narrow[::2]] == [(4, 3), (3, 2), (2, 3)]
    torch.testing.assert_close(narrow(x), zeroed(x))


def test_a_module_with_the_name_that_compiling_gives_is_refused():
    """Its names would read like those of the module around it."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))
            self._orig_mod = nn.Linear(4, 4)

        def forward(self, x):
            return self._orig_mod(x) @ self.weight

    model = nn.Sequential(nn.Linear(4, 4), Around(), nn.Linear(4, 2))
    with pytest.raises(StructureError, match=r"1 \(Around\): expected no attribute `_orig_mod`"):
        trace(TracedModel.of(model, torch.zeros(1, 4)))
    compiled = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert trace(TracedModel.of(compiled, torch.zeros(1, 4))).widths == {"0": 4, "1": 4}


def test_a_narrow_layer_standardises_the_weights_that_are_left():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 6, 1), Standardised(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    x, kept = torch.randn(2, 3, 5, 5, dtype=torch.float64), [0, 2, 3]
    structure = trace(TracedModel.of(wide, x))
    narrow = copy.deepcopy(wide)
    narrow[0], narrow[1] = nn.Conv2d(3, 3, 1).double(), Standardised(3, 4, 3).double()
    weights = wide.state_dict()
    for name, dim in (("0.weight", 0), ("0.bias", 0), ("1.weight", 1)):
        weights[name] = weights[name].index_select(dim, torch.tensor(kept))
    narrow.load_state_dict(weights)
    small = shrunk(wide, structure.axes({"0": kept}))
    torch.testing.assert_close(small(x), narrow(x), rtol=1e-12, atol=1e-12)


class _Positions(nn.Module):
    """Adds as many learned positions as its input is long."""

    def __init__(self, *, whole):
        super().__init__()
        self.first, self.last, self.places = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.randn(1, 9, 6))
        self.whole = whole

    def forward(self, x):
        places = self.places if self.whole else self.places[:, : x.shape[1]]
        return self.last(self.first(x) + places)


@pytest.mark.parametrize("length", [4, 9])
def test_positions_beyond_the_example_are_no_units(length):
    structure = trace(TracedModel.of(_Positions(whole=length == 9), torch.randn(2, length, 3)))
    assert structure.widths == {"first": 6}
    assert {(m.tensor, m.dim) for g in structure.groups for m in g.members if m.tensor == "places"} == {("places", 2)}


def test_computed_weights_produce_units():
    network = nn.Sequential(Standardised(3, 8, 3, padding=1), nn.ReLU(), Standardised(8, 6, 3, padding=1))
    structure = trace(TracedModel.of(network, torch.randn(2, 3, 4, 4)))
    assert {(m.tensor, m.dim, m.role) for m in structure.group("0").members if m.tensor.endswith("weight")} == {
        ("0.weight", 0, "out"),
        ("2.weight", 1, "in"),
    }
    prune(network, torch.randn(2, 3, 4, 4), pruning_ratio=0.5)
    assert (network[0].out_channels, network[2].in_channels) == (4, 4)


class Picks(nn.Module):
    """Picks some tokens by index tensors or masks, or writes to them."""

    def __init__(self, way):
        super().__init__()
        self.first, self.other, self.last, self.way = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2), way

    def forward(self, x):
        y, z = self.first(x).relu(), self.other(x).relu()
        some = torch.tensor([True, False, True, True, False], device=x.device)
        y = y + z
        if self.way == "one of each sample":
            y = y[torch.arange(len(x)), torch.arange(len(x)) % 2]
        elif self.way == "apart":  # PyTorch puts what is picked first
            places = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
            y = y.unflatten(1, (5, 1)).expand(-1, -1, 3, -1).transpose(2, 3)[:, places[0], :, places[1]].transpose(0, 1)
        elif self.way == "mask":
            y = y[:, some]
        elif self.way == "mask of samples and tokens":
            y = y[some.expand(len(x), -1)]
        elif self.way == "write":
            y = y.clone()
            y[:, some] = z[:, :3]
        elif self.way == "write one":
            y = y.clone()
            y[:, torch.tensor([1, 3])] = z[:, :1]
        return self.last(y)


@pytest.mark.parametrize(
    "way", ["one of each sample", "apart", "mask", "mask of samples and tokens", "write", "write one"]
)
def test_axes_that_nothing_is_picked_along_are_followed(way):
    torch.manual_seed(0)
    model = Picks(way).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    structure = trace(TracedModel.of(model, x))
    assert structure.widths == {"first": 6}
    axes = structure.axes({"first": (0, 3, 5)})
    torch.testing.assert_close(shrunk(model, axes)(x), masked(model, axes)(x), rtol=1e-13, atol=1e-13)


def test_places_of_units_freeze_them():
    class Units(Picks):
        def forward(self, x):
            y = self.first(x).clone()
            y[..., torch.tensor([0, 2])] = 1.0
            return self.last(y)

    structure = trace(TracedModel.of(Units(""), torch.randn(3, 5, 4)))
    assert structure.widths == {}
    assert "picked from by number" in next(f.reason for f in structure.frozen if f.tensor == "first.weight")
