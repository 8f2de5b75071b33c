import copy
import gc
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lightning_prune.surgery import change as change_room
from lightning_prune.surgery import shrink, verify
from lightning_prune.surgery.change import CutError
from lightning_prune.surgery.optimizers import OptimizerRefusedError
from lightning_prune.surgery.shrink import cut, mask
from lightning_prune.surgery.tensors import named, take
from lightning_prune.surgery.verify import check
from tests.support.surgery import cut_and_check

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("training", [False, True])
def test_shrunk_equals_masked(net, training):
    """The proof of correctness: outputs, and gradients on what remains."""
    small, masked = net.model().train(training), net.model().train(training)
    axes, x = net.axes(small), net.example()
    cut(small, axes)
    mask(masked, axes)
    expected = masked(x)
    torch.testing.assert_close(small(x), expected, **EXACT)
    assert expected.abs().max() > 1e-3
    small(x).square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in masked.named_parameters():
        torch.testing.assert_close(small.get_parameter(name).grad, take(parameter.grad, axes.get(name, {})), **EXACT)


def test_all_is_narrower_and_the_layers_say_so(net):
    model = net.model()
    axes = net.axes(model)
    objects = {name: id(tensor) for name, tensor in named(model).items()}
    cut(model, axes)
    for name, dims in axes.items():
        assert all(named(model)[name].shape[dim] == len(kept) for dim, kept in dims.items())
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)
        if isinstance(layer, nn.Conv2d):
            assert (layer.out_channels, layer.in_channels // layer.groups) == tuple(layer.weight.shape[:2])
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.num_features == len(layer.running_mean)
    assert {name: id(tensor) for name, tensor in named(model).items()} == objects


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_shrunk_equals_masked_for_any_units(data):
    small = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    masked = copy.deepcopy(small)
    first, second = (np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))) for n in (6, 5))
    axes = {
        "0.weight": {0: first},
        "0.bias": {0: first},
        "2.weight": {0: second, 1: first},
        "2.bias": {0: second},
        "4.weight": {1: second},
    }
    x = torch.randn(4, 3, dtype=torch.float64)
    before = small(x).detach()
    change, _ = cut(small, axes), mask(masked, axes)
    torch.testing.assert_close(small(x), masked(x), **EXACT)
    change.undo()
    assert torch.equal(small(x), before)


def _trained(net, optimizer=torch.optim.AdamW):
    model = net.model()
    optimizer = optimizer(model.parameters(), lr=0.01)
    for seed in (1, 2):
        net.step(model, optimizer, seed)
    return model, optimizer


@pytest.mark.parametrize("operation", [cut, mask])
def test_undo_is_bit_exact(net, operation, photograph, same):
    model, optimizer = _trained(net)
    before = photograph(model, [optimizer])
    change = operation(model, net.axes(model), *([[optimizer]] if operation is cut else []))
    assert not same(photograph(model, [optimizer]), before)
    change.undo()
    assert same(photograph(model, [optimizer]), before)
    change.undo()  # a second time does nothing
    assert same(photograph(model, [optimizer]), before)
    net.step(model, optimizer)


def test_a_change_as_a_context(net, photograph, same):
    model = net.model()
    before = photograph(model)
    with mask(model, net.axes(model)):
        assert not same(photograph(model), before)
    assert same(photograph(model), before)


def test_undo_leaves_what_others_changed(zoo):
    model = zoo["mlp"].model()
    change = cut(model, zoo["mlp"].axes(model))
    model.eval()
    model[0].note = "mine"
    change.undo()
    assert not model[0].training
    assert model[0].note == "mine"
    assert model[0].out_features == 8


class _Failing:
    """A function that fails the ``nth`` time it is called."""

    def __init__(self, original, fatal, nth):
        self.original, self.fatal, self.left = original, fatal, nth

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if not self.left:
            raise self.fatal("planted")
        return self.original(*args, **kwargs)


def test_undo_removes_attributes_that_came(zoo, monkeypatch):
    model = zoo["mlp"].model()
    monkeypatch.setattr(shrink, "refresh", lambda module, old: setattr(module, "width", 3))
    change = cut(model, zoo["mlp"].axes(model))
    assert model[0].width == 3
    change.undo()
    assert "width" not in vars(model[0])


@pytest.mark.parametrize(
    ("module", "stage"),
    [
        *((shrink, name) for name in ("take", "migrate", "refresh")),
        *((change_room, name) for name in ("_assign", "_shape_in_graph")),
        (verify, "_leaves"),
        (torch.autograd, "backward"),
    ],
)
@pytest.mark.parametrize("fatal", [RuntimeError, KeyboardInterrupt])
def test_a_failure_at_any_stage_changes_nothing(net, module, stage, fatal, photograph, same, monkeypatch):
    model, optimizer = _trained(net)
    average = copy.deepcopy(model)
    before, random = (photograph(model, [optimizer]), photograph(average)), torch.get_rng_state()
    x = net.example()

    def run():
        torch.rand(1)
        for buffer in model.buffers():
            buffer.add_(1)
        return [[model(x)]]

    nth = 1 if stage == "backward" else 3  # in the midst
    monkeypatch.setattr(module, stage, _Failing(getattr(module, stage), fatal, nth))
    with pytest.raises(CutError if fatal is RuntimeError else fatal, match="planted"):
        cut_and_check(model, net.axes(model), [optimizer], [average], run)
    monkeypatch.undo()
    assert same((photograph(model, [optimizer]), photograph(average)), before)
    assert torch.equal(torch.get_rng_state(), random)
    net.step(model, optimizer)  # and training goes on


@pytest.mark.parametrize("operation", [cut, mask])
@pytest.mark.parametrize("fatal", [RuntimeError, KeyboardInterrupt])
def test_the_same_without_a_check(net, operation, fatal, photograph, same, monkeypatch):
    model = net.model()
    before = photograph(model)
    monkeypatch.setattr(change_room, "_shape_in_graph", _Failing(change_room._shape_in_graph, fatal, 3))
    with pytest.raises(fatal, match="planted"):
        operation(model, net.axes(model))
    assert same(photograph(model), before)


def test_the_text_of_a_failed_cut(zoo):
    model = zoo["mlp"].model()
    with pytest.raises(CutError, match=r"taken back, nothing has changed: the forward pass fails with RuntimeError"):
        cut_and_check(model, zoo["mlp"].axes(model), [], [], lambda: model(torch.ones(2, 7, dtype=torch.float64)))


def test_a_wrong_cut_does_not_pass_the_check(zoo):
    model = zoo["mlp"].model()
    axes = zoo["mlp"].axes(model)
    del axes["2.weight"][1]
    with pytest.raises(CutError, match="forward"):
        cut_and_check(model, axes, [], [], lambda: model(zoo["mlp"].example()))
    assert model[2].weight.shape == (5, 8)


def test_copies_are_cut_alike(net):
    model = net.model()
    average = copy.deepcopy(model)
    cut_and_check(model, net.axes(model), [], [average], lambda: model(net.example()))
    torch.testing.assert_close(average.train(False)(net.example()), model.train(False)(net.example()), **EXACT)


def test_outside_references_live_on(zoo):
    """Weights stay the same objects: tied, referenced, hooked and frozen ones too."""
    net = zoo["tied"]
    model = net.model()
    model.head.weight.requires_grad_(False)
    calls = []
    model.first.weight.register_hook(lambda grad: calls.append(tuple(grad.shape)))
    model.first.bias.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.grad.shape)))
    reference, average = model.first.weight, torch.optim.swa_utils.AveragedModel(model)
    cut_and_check(model, net.axes(model), [], [average.module], lambda: model(net.example()))
    assert calls == []
    assert model.first.weight is reference
    assert model.third.weight is model.second.weight
    assert not model.head.weight.requires_grad
    model(net.example()).sum().backward()
    assert sorted(calls) == [(5,), (5, 4)]
    average.update_parameters(model)


def test_gradients_that_wait_are_cut(net):
    """Between the batches of an accumulation."""
    model, x = net.model(), net.example()
    model(x).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    axes = net.axes(model)
    cut(model, axes)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, take(grads[name], axes.get(name, {})))


def test_cut_within_inference_mode_can_be_trained(net):
    model = net.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    net.step(model, optimizer)
    with torch.inference_mode():
        cut_and_check(model, net.axes(model), [optimizer], [], lambda: None)
    before = [p.detach().clone() for p in model.parameters()]
    net.step(model, optimizer)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_channels_last_survives(zoo):
    model = zoo["cnn"].model().to(memory_format=torch.channels_last)
    cut(model, zoo["cnn"].axes(model))
    assert model[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[4].weight.is_contiguous()


def test_fake_networks_can_be_cut(net):
    with FakeTensorMode():
        model = net.build()
        cut(model, net.axes(model))
        model(torch.randn(2, *net.shape)).sum().backward()
    real = net.model()
    cut(real, net.axes(real))
    assert [p.shape for p in model.parameters()] == [p.shape for p in real.parameters()]
    assert all(p.grad.shape == p.shape for p in model.parameters())


class TestOldGraphs:
    """A graph from before the cut that is still alive remembers the old shapes."""

    def test_training_goes_on(self, net):
        model, optimizer = _trained(net, torch.optim.SGD)
        kept = model(net.example()).sum()
        with pytest.warns(UserWarning, match=r"kept without `\.detach\(\)`") as seen:
            change = cut_and_check(model, net.axes(model), [optimizer], [], lambda: model(net.example()))
        assert seen[0].filename == __file__
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        net.step(model, optimizer)
        # A bias in front of batch normalisation has no gradient.
        assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n.endswith("weight"))
        narrow = model(net.example()).sum()
        change.undo()
        net.step(model, optimizer)
        del kept, narrow

    def test_of_the_check_itself(self, zoo):
        """A failed check whose graph stays alive (in a traceback, say) does not harm the restored network."""
        model, outputs = zoo["mlp"].model(), []

        def run():
            outputs.append(model(zoo["mlp"].example()))
            raise RuntimeError("planted")

        with pytest.raises(CutError, match="planted") as caught:
            cut_and_check(model, zoo["mlp"].axes(model), [], [], run)
        model(zoo["mlp"].example()).sum().backward()
        assert model[0].weight.grad.shape == (8, 6)
        del caught

    def test_of_frozen_weights(self, zoo):
        model = zoo["mlp"].model()
        kept = model(zoo["mlp"].example()).sum()
        model.requires_grad_(False)
        cut(model, zoo["mlp"].axes(model))
        model.requires_grad_(True)
        model(zoo["mlp"].example()).sum().backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
        del kept


class TestCheck:
    def test_leaves_no_trace(self, net, photograph, same):
        model, _ = _trained(net)
        calls = []
        for module in model.modules():
            module.register_forward_hook(lambda *_: calls.append("forward"))
            module.register_forward_pre_hook(lambda *_: calls.append("pre"))
            module.register_full_backward_hook(lambda *_: calls.append("backward"))
        for parameter in model.parameters():
            parameter.register_hook(lambda grad: calls.append("tensor"))
            parameter.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
        before, random = photograph(model), torch.get_rng_state()

        def run():
            torch.rand(3)
            return {"loss": [model(net.example())], "other": (None, "text", torch.arange(3))}

        assert check(run, model)
        assert not calls
        assert same(photograph(model), before)
        assert torch.equal(torch.get_rng_state(), random)
        model(net.example().requires_grad_()).sum().backward()
        assert {"forward", "pre", "backward", "tensor", "accumulated"} == set(calls)

    def test_buffers_that_are_replaced_come_back(self, zoo):
        net = zoo["shared"]
        model = net.model()
        gain, value = model.gain, model.gain.clone()

        def run():
            model.gain = model.gain * 2
            return model(net.example())

        assert check(run, model)
        assert model.gain is gain
        assert torch.equal(gain, value)

    def test_outputs_in_a_dataclass(self, zoo):
        @dataclass
        class Output:
            logits: torch.Tensor

        model = zoo["mlp"].model()
        assert not check(lambda: Output(model(zoo["mlp"].example()) / 0), model)

    def test_reentrant_checkpointing(self, zoo):
        model = zoo["mlp"].model()
        x = zoo["mlp"].example().requires_grad_()
        assert check(lambda: checkpoint(model, x, use_reentrant=True), model)

    def test_hooks_that_the_run_registers_stay(self, zoo):
        model, calls = zoo["mlp"].model(), []
        model[0].register_forward_hook(lambda *_: calls.append("old"))

        def run():
            if not calls:
                model[0].register_forward_hook(lambda *_: calls.append("new"))
            return model(zoo["mlp"].example())

        assert check(run, model)
        assert calls == ["new"]
        model(zoo["mlp"].example())
        assert calls == ["new", "old", "new"]

    def test_hooks_that_take_part_run_and_leave_nothing(self, zoo):
        model, kept, calls = zoo["mlp"].model(), {}, 0
        model.kept, before = kept, torch.ones(1)
        model.before = before

        def store(module, args, output):
            nonlocal calls
            calls += 1
            kept["output"], module.output, model.before = output, output, output
            return output / 0

        model[0].register_forward_hook(store)
        assert not check(lambda: model(zoo["mlp"].example()), model)  # seen only if the hook runs
        assert (kept, calls, model.before) == ({}, 0, before)
        assert not hasattr(model[0], "output")

    def test_a_hook_that_fails(self, zoo):
        model = zoo["mlp"].model()

        def store(module, args, output):
            module.output = output.view(3, 5, 7)

        model[0].register_forward_hook(store)
        with pytest.raises(CutError, match="shape"):
            check(lambda: model(zoo["mlp"].example()), model)

    def test_hooks_by_which_torch_computes_stay(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old weight_norm is deprecated
            model = nn.utils.weight_norm(nn.Linear(3, 2))
        with torch.no_grad():
            model.weight_g.fill_(torch.inf)
        assert not check(lambda: model(torch.ones(1, 3)), model)  # seen only if the hook runs

    def test_without_a_differentiable_output(self, zoo):
        model = zoo["mlp"].model()
        assert check(lambda: model(zoo["mlp"].example()).argmax(1), model)
        with pytest.raises(CutError, match="the forward pass fails"):
            check(lambda: model(torch.ones(1)).argmax(1), model)

    def test_backward_that_fails(self, zoo):
        class Broken(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 1

            @staticmethod
            def backward(ctx, grad):
                raise ValueError("planted")

        model = zoo["mlp"].model()
        for outside in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
            with outside, pytest.raises(CutError, match="the backward pass fails with ValueError: planted"):
                check(lambda: Broken.apply(model(zoo["mlp"].example())), model)

    def test_sparse_gradients(self):
        model = nn.Embedding(5, 2, sparse=True)
        assert check(lambda: model(torch.tensor([1, 2])), model)


class TestFinite:
    def test_as_before_passes(self, zoo):
        net = zoo["mlp"]
        model = net.model()
        with torch.no_grad():
            model[4].bias[0] = torch.inf
        cut_and_check(model, net.axes(model), [], [], lambda: model(net.example()))
        assert model[0].out_features == 5

    def test_new_infinities_do_not(self, zoo, photograph, same):
        net = zoo["mlp"]
        model = net.model()
        before = photograph(model)
        with pytest.raises(CutError, match="no longer finite"):
            cut_and_check(
                model, net.axes(model), [], [], lambda: model(net.example()) / float(model[0].out_features == 8)
            )
        assert same(photograph(model), before)


class TestRefused:
    @pytest.mark.parametrize("operation", [cut, mask])
    @pytest.mark.parametrize(
        ("axes", "text"),
        [
            ({"9.weight": {0: [0]}}, "no such parameter"),
            ({"0.weight": {0: []}}, "nothing of it would remain"),
            ({"0.weight": {0: [0, 8]}}, r"Cannot cut 0.weight: .*in \[0, 8\)"),
            ({"0.weight": {2: [0]}}, "dimension"),
        ],
    )
    def test_axes_that_do_not_fit(self, zoo, operation, axes, text, photograph, same):
        model = zoo["mlp"].model()
        before = photograph(model)
        with pytest.raises(CutError, match=f"(?s){text}.*Nothing has changed"):
            operation(model, {"0.bias": {0: np.array([1])}, **axes})
        assert same(photograph(model), before)

    def test_tied_tensors_cut_differently(self, zoo):
        model = zoo["tied"].model()
        with pytest.raises(CutError, match=r"(?s)second.weight and third.weight are one tensor.*differently"):
            cut(model, {"second.weight": {0: np.arange(3)}, "third.weight": {0: np.arange(4)}})

    def test_tied_tensors_under_both_names_are_cut_once(self, zoo):
        model = zoo["tied"].model()
        cut(model, {"second.weight": {0: np.array([1, 2])}, "third.weight": {0: np.array([1, 2])}})
        assert model.second.weight.shape == (2, 8)

    def test_lazy_layers(self):
        with pytest.raises(CutError, match="run one forward pass first"):
            cut(nn.Sequential(nn.LazyLinear(3)), {"0.weight": {0: np.array([0])}})

    def test_copies_of_another_shape(self, zoo):
        model, other = zoo["mlp"].model(), zoo["mlp"].model()
        cut(other, {"0.weight": {0: np.arange(6)}})
        with pytest.raises(CutError, match="a copy has shape"):
            cut(model, {"0.weight": {0: np.arange(4)}}, copies=[other])

    def test_buffers_with_a_graph(self, zoo):
        model = zoo["shared"].model()
        model.gain = model.first.bias * 2
        with pytest.raises(CutError, match="register it detached"):
            cut(model, zoo["shared"].axes(model))

    def test_sparse_gradients(self):
        model = nn.Embedding(5, 4, sparse=True)
        model(torch.tensor([1])).sum().backward()
        with pytest.raises(CutError, match=r"(?s)Cannot cut weight.*zero_grad"):
            cut(model, {"weight": {1: np.array([0])}})

    def test_optimizers_that_cannot_follow(self, zoo):
        model = zoo["mlp"].model()
        with pytest.raises(OptimizerRefusedError):
            cut(model, zoo["mlp"].axes(model), [torch.optim.LBFGS(model.parameters())])
        assert model[0].weight.shape == (8, 6)


def test_names_of_compiled_modules(zoo):
    model = zoo["mlp"].model()
    model[0] = torch.compile(model[0])
    structure_axes = {"0._orig_mod.weight": {0: np.arange(4)}, "0.bias": {0: np.arange(4)}}
    cut(model, structure_axes)
    assert model[0]._orig_mod.out_features == 4


def test_many_cuts_leave_nothing_behind(zoo):
    """No hooks and no memory of what was cut away, once the handle is dropped."""
    net = zoo["mlp"]
    model = nn.Sequential(nn.Linear(6, 60), nn.ReLU(), nn.Linear(60, 3)).double()
    optimizer = torch.optim.Adam(model.parameters())

    def living():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    net.step(model, optimizer)
    counts = []
    for width in range(59, 40, -1):
        kept = np.arange(width)
        axes = {"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}}
        cut_and_check(model, axes, [optimizer], [], lambda: model(net.example()))
        net.step(model, optimizer)
        if width in (59, 41):
            counts.append(living())
    assert counts[0] == counts[1]


class BiasedUnits(nn.Module):
    """Keeps what it computes from its biases in eval mode, until `train` is called, as attention in timm's LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.drop = {}, nn.Dropout()
        self.biases = nn.Parameter(torch.linspace(-1, 1, 4))

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x):
        if "biases" not in self.kept:
            self.kept["biases"] = self.biases.tanh().detach()
        return x + self.kept["biases"]


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_what_modules_keep_in_eval_mode_follows_a_cut_and_its_undoing(training):
    net, x = nn.Sequential(nn.Linear(3, 4), BiasedUnits(), nn.Linear(4, 2)).eval(), torch.ones(2, 3)
    wide, masked = net(x), copy.deepcopy(net)
    net[1].training = training  # as Lightning sets it after validation
    change = cut(
        net, {"0.weight": {0: [1, 3]}, "0.bias": {0: [1, 3]}, "1.biases": {0: [1, 3]}, "2.weight": {1: [1, 3]}}
    )
    masked[2].weight[:, [0, 2]] = 0
    torch.testing.assert_close(net(x), masked(x))
    with change.undone():
        torch.testing.assert_close(net(x), wide)
    torch.testing.assert_close(net(x), masked(x))
    assert (net[1].training, net[1].drop.training) == (training, False)
    change.undo()
    torch.testing.assert_close(net(x), wide)
