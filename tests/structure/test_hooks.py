"""Users' forward hooks: those that take part in what a network computes are followed, and nothing they store leaks."""

import threading
from contextvars import ContextVar
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.structure import StructureError, TracedModel, trace
from lightning_prune.structure.flow import with_flow
from tests.support.cutting import cut, half, named

STORE: dict[str, torch.Tensor] = {}
COLLECTED: ContextVar[list[torch.Tensor] | None] = ContextVar("collected", default=None)
NETWORK: nn.Module


class Store:
    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def keep(self, module, args, output):
        self.kept["a"] = output

    def __call__(self, module, args, output):
        self.kept["a"] = output


class Branch(nn.Module):
    """Reads what a hook has stored of its first layer, beside what comes from that layer directly."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.side, self.out = (nn.Linear(*n) for n in ((4, 6), (6, 8), (6, 8), (8, 2)))
        self.f, self.store, self.kept = {}, Store(), []

    def stored(self):
        return self.f["a"]

    def forward(self, x):
        hidden = self.b(self.a(x).relu())
        return self.out((hidden + self.side(self.stored())).relu())

    def keep(self, module, args, output):
        self.f["a"] = output


def by_closure(net):
    net.a.register_forward_hook(lambda module, args, output: net.f.update(a=output))


def by_a_function(net):
    features = net.f

    def store(module, args, output):
        features["a"] = output

    net.a.register_forward_hook(store)


def by_a_method(net):
    net.a.register_forward_hook(net.keep)


def by_a_partial(net):
    def store(network, name, module, args, output):
        network.f[name] = output

    net.a.register_forward_hook(partial(store, net, "a"))


def by_keywords(net):
    def store(module, args, kwargs, output, *, into=net.f):
        into["a"] = output

    net.a.register_forward_hook(store, with_kwargs=True, always_call=True)


def before_the_next_layer(net):
    def store(module, args, kwargs):
        net.f["a"] = args[0]

    net.b.register_forward_pre_hook(store, with_kwargs=True)


class ReadsItsStore(Branch):
    def stored(self):
        return self.store.kept["a"]


def by_an_object(net):
    net.a.register_forward_hook(net.store)


def by_a_method_of_an_object(net):
    net.a.register_forward_hook(net.store.keep)


class ReadsAnAttribute(Branch):
    def stored(self):
        return self.a.feature


def by_the_module_it_gets(net):
    def store(module, args, output):
        module.feature = output

    net.a.register_forward_hook(store)


class ReadsAPair(Branch):
    def stored(self):
        return self.f["a"][1]


def by_a_pair(net):
    def store(module, args, output):
        net.f["a"] = net.a.pair = (args[0], output)

    net.a.register_forward_hook(store)


class ReadsAGlobal(Branch):
    def stored(self):
        return STORE["a"]


def by_a_global(net):
    def store(module, args, output):
        STORE["a"] = output

    net.a.register_forward_hook(store)


def by_a_global_network(net):
    global NETWORK
    NETWORK = net

    def store(module, args, output):
        NETWORK.f["a"] = output

    net.a.register_forward_hook(store)


class ReadsAList(Branch):
    def stored(self):
        return self.kept.pop()


def by_appending(net):
    net.a.register_forward_hook(lambda module, args, output: net.kept.append(output))


WAYS = [
    (Branch, by_closure),
    (Branch, by_a_function),
    (Branch, by_a_method),
    (Branch, by_a_partial),
    (Branch, by_keywords),
    (Branch, before_the_next_layer),
    (ReadsItsStore, by_an_object),
    (ReadsItsStore, by_a_method_of_an_object),
    (ReadsAnAttribute, by_the_module_it_gets),
    (ReadsAPair, by_a_pair),
    (ReadsAGlobal, by_a_global),
    (Branch, by_a_global_network),
    (ReadsAList, by_appending),
]


def build(kind, hook):
    torch.manual_seed(0)
    net = kind().double()
    hook(net)
    return net


def mask(net, axes):
    """Set the removed slices to zero."""
    for name, tensor in named(net).items():
        for dim, kept in axes.get(name, {}).items():
            lost = np.setdiff1d(np.arange(tensor.shape[dim]), kept)
            tensor.detach().index_fill_(dim, torch.from_numpy(lost), 0)


@pytest.mark.parametrize("ran_before", [False, True], ids=["", "ran before"])
@pytest.mark.parametrize(("kind", "hook"), WAYS, ids=lambda way: way.__name__)
def test_what_a_hook_stores_is_followed(kind, hook, ran_before):
    STORE.clear()
    dense = build(kind, hook)
    x = torch.randn(3, 4, dtype=torch.float64)
    if ran_before:
        dense(x)
    places = [dense.f, STORE, dense.store.kept, *map(vars, dense.modules())]
    before = [dict(place) for place in places]
    structure = trace(TracedModel.of(dense, x))
    assert structure.widths == {"a": 6, "b": 8}
    assert not structure.notes
    assert {m.tensor for m in structure.group("a").members} == {"a.weight", "a.bias", "b.weight", "side.weight"}
    for place, contents in zip(places, before, strict=True):
        assert place.keys() == contents.keys()
        assert all(place[name] is value for name, value in contents.items())
    assert not dense.kept
    axes = structure.axes(half(structure))
    mask(dense, axes)
    expected = dense(x)
    narrow = cut(build(kind, hook), axes)
    torch.testing.assert_close(narrow(x), expected)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.b(self.a(x).relu()).relu())


def summed(output):
    return output.cumsum(-1)


RETURNED = {
    "expression": lambda module, args, output: output - output.softmax(-1),
    "method": lambda module, args, output: output.cumsum(-1),
    "function of PyTorch": lambda module, args, output: torch.cumsum(output, -1),
    "function": lambda module, args, output: summed(output),
    "conditional": lambda module, args, output: output.cumsum(-1) if module.in_features == 4 else None,
}


@pytest.mark.parametrize("hook", RETURNED.values(), ids=RETURNED.keys())
def test_an_output_that_a_hook_returns_is_followed(hook):
    net = Chain()
    net.a.register_forward_hook(hook)
    assert trace(TracedModel.of(net, torch.ones(2, 4))).widths == {"b": 6}


def test_an_input_that_a_hook_returns_is_followed():
    net = Chain()
    net.b.register_forward_pre_hook(lambda module, args: args[0].cumsum(-1))
    assert trace(TracedModel.of(net, torch.ones(2, 4))).widths == {"b": 6}
    net.out.register_forward_pre_hook(lambda module, args, kwargs: ((args[0].cumsum(-1),), kwargs), with_kwargs=True)
    assert trace(TracedModel.of(net, torch.ones(2, 4))).widths == {}


def test_hooks_of_the_whole_network_are_followed():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
    net.register_forward_hook(lambda module, args, output: output @ torch.ones(6, 2))
    net.register_forward_pre_hook(lambda module, args: (args[0][:, :4],))
    assert trace(TracedModel.of(net, torch.ones(2, 8))).widths == {"0": 6}


class Collecting(Chain):
    """As transformers do it: hidden states are collected by hooks, into a list that a context variable holds."""

    def forward(self, x):
        if not vars(self).get("are_hooks_there"):
            self.are_hooks_there = True
            self.a.register_forward_hook(collect)
        token = COLLECTED.set([])
        try:
            return super().forward(x), tuple(COLLECTED.get())
        finally:
            COLLECTED.reset(token)


def collect(module, args, output):
    collected = COLLECTED.get()
    if collected is not None:
        collected.append(output)


@pytest.mark.parametrize("ran_before", [False, True], ids=["", "ran before"])
def test_hidden_states_that_hooks_collect_are_outputs(ran_before):
    net = Collecting()
    if ran_before:
        net(torch.ones(2, 4))
    assert trace(TracedModel.of(net, torch.ones(2, 4))).widths == {"b": 6}
    assert len(net.a._forward_hooks) == ran_before


def test_hooks_that_only_look_on_do_not_run():
    class Counter:
        calls = 0

        def __call__(self, module, args, output):
            self.calls += 1

    net, seen, counter, total = Chain(), [], Counter(), 0

    def count(module, args, output):
        nonlocal total
        total += 1
        seen.append((type(module).__name__, output.shape))

    net.a.register_forward_hook(lambda *_: seen.append(1))
    net.a.register_forward_hook(lambda module, args, output: count(module, args, output))
    net.a.register_forward_hook(count)
    net.a.register_forward_hook(counter)
    net.a.register_forward_hook(lambda module, args, output: print("ran"))
    trace(TracedModel.of(net, torch.ones(2, 4)))
    assert (seen, counter.calls, total) == ([], 0, 0)


def test_what_a_hook_that_runs_counts_is_put_back():
    net, seen, calls = Chain(), [], 0

    def doubled(module, args, output):
        nonlocal calls
        calls += 1
        seen.append(output)
        return 2 * output

    net.a.register_forward_hook(doubled)
    trace(TracedModel.of(net, torch.ones(2, 4)))
    assert (seen, calls) == ([], 0)


def test_a_hook_that_cannot_be_copied_is_left_out_and_told():
    class Log:
        def __init__(self, network):
            self.network, self.lock = network, threading.Lock()

        def __call__(self, module, args, output):
            pass

    net = Chain()
    net.a.register_forward_hook(Log(net))
    structure = trace(TracedModel.of(net, torch.ones(2, 4)))
    assert structure.widths == {"a": 6, "b": 6}
    (note,) = structure.notes
    assert "`a`" in note
    assert "lock" in note


def test_hooks_that_fail_on_a_copy_are_left_out_and_told():
    net = Chain()

    def refuse(module, args, output):
        if module is not net.a or net.a.weight.untyped_storage().data_ptr() != address:
            raise RuntimeError("not the one I know")
        net.last = output

    address = net.a.weight.untyped_storage().data_ptr()
    net.a.register_forward_hook(refuse)
    structure = trace(TracedModel.of(net, torch.ones(2, 4)))
    assert structure.widths == {"a": 6, "b": 6}
    (note,) = structure.notes
    assert "not the one I know" in note
    assert with_flow(structure, TracedModel.of(net, torch.ones(2, 4))).flow is not None
    with pytest.raises(StructureError, match="mat1 and mat2"):
        trace(TracedModel.of(net, torch.ones(2, 5)))
