import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn, optim

from lightning_prune.surgery.edits import Keep
from lightning_prune.surgery.history import History, attach
from lightning_prune.surgery.optimizers import OptimizerRefusedError, UnsliceableStateError, migrate, refuse, unwrap
from lightning_prune.surgery.restore import match_checkpoint_shapes
from lightning_prune.surgery.shrink import cut, mask
from lightning_prune.surgery.tensors import take
from tests.support.surgery import cut_and_check

EXACT = {"rtol": 0, "atol": 1e-12}

#: Every form of the optimizers whose step treats each coordinate alone.
ELEMENTWISE = {
    "sgd": (optim.SGD, {}),
    "sgd momentum": (optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "sgd nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd foreach": (optim.SGD, {"momentum": 0.9, "foreach": True}),
    "sgd fused": (optim.SGD, {"momentum": 0.9, "fused": True}),
    "adam": (optim.Adam, {}),
    "adam amsgrad": (optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "adam foreach": (optim.Adam, {"foreach": True}),
    "adam fused": (optim.Adam, {"fused": True}),
    "adamw": (optim.AdamW, {}),
    "adamw amsgrad": (optim.AdamW, {"amsgrad": True, "maximize": True}),
    "adamw foreach": (optim.AdamW, {"foreach": True}),
    "adamw fused": (optim.AdamW, {"fused": True, "amsgrad": True}),
    "adamw tensor lr": (optim.AdamW, {"lr": torch.tensor(0.01)}),
    "rmsprop": (optim.RMSprop, {}),
    "rmsprop centered": (optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "adagrad": (optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "adadelta": (optim.Adadelta, {"lr": 1.0}),
    "nadam": (optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "radam": (optim.RAdam, {}),
    "adamax": (optim.Adamax, {}),
    "asgd": (optim.ASGD, {"t0": 0, "lambd": 0.1}),
    "rprop": (optim.Rprop, {}),
}
#: On a GPU the step counts are tensors on the device.
CAPTURABLE = {
    f"{kind.__name__} capturable": (kind, {"capturable": True})
    for kind in (optim.Adam, optim.AdamW, optim.RMSprop, optim.Adadelta, optim.NAdam, optim.RAdam, optim.Adamax)
}


def _build(kind, options, parameters):
    return kind(parameters, **{"lr": 0.01, **options})


def _twins(net, kind, options, device="cpu", steps=3):
    """Twice the same network and optimizer in the midst of training: one to be cut and one to be masked."""
    pairs = []
    for _ in range(2):
        model = net.model().to(device)
        optimizer = _build(kind, options, model.parameters())
        for seed in range(steps):
            _step(net, model, optimizer, seed)
        pairs.append((model, optimizer))
    return pairs


def _step(net, model, optimizer, seed):
    device = next(model.parameters()).device
    optimizer.zero_grad()
    model(net.example(seed).to(device)).square().sum().backward()
    optimizer.step()


def _assert_step_equals_masked_step(net, kind, options, device="cpu"):
    (small, optimizer), (masked, reference) = _twins(net, kind, options, device)
    axes = net.axes(small)
    cut(small, axes, [optimizer])
    mask(masked, axes)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    _step(net, small, optimizer, 7)
    _step(net, masked, reference, 7)
    for name, parameter in masked.named_parameters():
        torch.testing.assert_close(small.get_parameter(name), take(parameter.detach(), axes.get(name, {})), **EXACT)
        for key, value in reference.state[parameter].items():
            expected = take(value, axes.get(name, {})) if torch.is_tensor(value) and value.ndim else value
            torch.testing.assert_close(optimizer.state[small.get_parameter(name)][key], expected, **EXACT)
    _step(net, small, optimizer, 8)
    still = {name for name, p in small.named_parameters() if torch.equal(before[name], p)}
    assert not {name for name in still if name.endswith("weight")}


@pytest.mark.parametrize(("kind", "options"), ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_a_step_after_the_cut_is_the_masked_step_on_what_remains(zoo, kind, options):
    _assert_step_equals_masked_step(zoo["mlp"], kind, options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(optim.SGD, {"momentum": 0.9}), (optim.AdamW, {"eps": 1e-3}), (optim.RMSprop, {"eps": 1e-3})],
)
def test_the_same_for_every_network(net, kind, options):
    """A bias in front of a BatchNorm has a gradient of zero: the default eps (1e-8) blows up its rounding noise."""
    _assert_step_equals_masked_step(net, kind, options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("kind", "options"), [*ELEMENTWISE.values(), *CAPTURABLE.values()], ids=[*ELEMENTWISE, *CAPTURABLE]
)
def test_the_same_on_a_gpu(zoo, kind, options):
    _assert_step_equals_masked_step(zoo["mlp"], kind, options, "cuda")


class TestMixingOptimizers:
    """Adafactor and Muon mix coordinates, so that the masked step is not theirs after a cut.

    The step must be that of a narrow network that was built with the sliced weights and the sliced state.
    """

    @staticmethod
    def _matrices(model):
        return [p for p in model.parameters() if p.ndim == 2]

    @pytest.mark.parametrize("kind", [optim.Adafactor, optim.Muon], ids=lambda kind: kind.__name__)
    def test_a_step_is_that_of_a_narrow_network_with_the_sliced_state(self, zoo, kind):
        net = zoo["mlp"]
        model = net.model()
        everything = list(model.parameters()) if kind is optim.Adafactor else self._matrices(model)
        optimizer = kind(everything, lr=0.01)
        for seed in range(3):
            net.step(model, optimizer, seed)
        axes = net.axes(model)
        rows, columns = axes["2.weight"][0], axes["2.weight"][1]
        old = {key: value.clone() for key, value in optimizer.state[model[2].weight].items() if torch.is_tensor(value)}
        weight = model[2].weight.detach().clone()[rows][:, columns]
        cut(model, axes, [optimizer])

        narrow = nn.Parameter(weight.clone())
        reference = kind([narrow], lr=0.01)
        narrow.grad = torch.zeros_like(narrow)
        reference.step()
        if kind is optim.Adafactor:
            sliced = {"row_var": old["row_var"][rows], "col_var": old["col_var"][:, columns], "step": old["step"]}
        else:
            sliced = {"momentum_buffer": old["momentum_buffer"][rows][:, columns]}
        assert reference.state[narrow].keys() == sliced.keys()
        reference.state[narrow].update(sliced)
        with torch.no_grad():
            narrow.copy_(weight)

        optimizer.zero_grad()
        model(net.example(7)).square().sum().backward()
        narrow.grad = model[2].weight.grad.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(model[2].weight, narrow)
        assert not torch.equal(narrow, weight)

    def test_convolutions_under_adafactor(self, zoo):
        net = zoo["cnn"]
        model = net.model()
        optimizer = optim.Adafactor(model.parameters())
        net.step(model, optimizer)
        cut(model, net.axes(model), [optimizer])
        before = model[4].weight.detach().clone()
        net.step(model, optimizer)
        assert not torch.equal(model[4].weight, before)


def test_parameter_groups_and_several_optimizers(zoo):
    """Positions in the groups and their settings stay; a frozen layer has no state and needs none."""
    net = zoo["mlp"]
    model = net.model()
    model[2].bias.requires_grad_(False)
    first = optim.AdamW(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "betas": (0.5, 0.9)}]
    )
    second = optim.SGD(model[4].parameters(), lr=0.01, momentum=0.9)

    def step(seed):
        model(net.example(seed)).square().sum().backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()

    step(0)
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in first.param_groups])
    identities = [[id(p) for p in g["params"]] for g in first.param_groups]
    cut(model, net.axes(model), [first, second])
    assert [[id(p) for p in g["params"]] for g in first.param_groups] == identities
    assert [{k: v for k, v in g.items() if k != "params"} for g in first.param_groups] == groups
    assert second.state[model[4].weight]["momentum_buffer"].shape == model[4].weight.shape
    before = [p.detach().clone() for p in model.parameters()]
    step(1)
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert moved == [True, True, True, False, True, True]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8),
        lambda optimizer: optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
    ],
    ids=["onecycle", "cosine"],
)
def test_schedulers_go_on(zoo, scheduler):
    net, rates = zoo["mlp"], []
    for is_cut in (False, True):
        model = net.model()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = scheduler(optimizer)
        rates.append([])
        for seed in range(8):
            if is_cut and seed == 4:
                cut(model, net.axes(model), [optimizer])
            before = model[0].weight.detach().clone()
            net.step(model, optimizer, seed)
            assert not torch.equal(model[0].weight, before)
            schedule.step()
            rates[-1].append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 4


@pytest.mark.parametrize(
    ("kind", "options"), [*ELEMENTWISE.values(), (optim.Adafactor, {})], ids=[*ELEMENTWISE, "adafactor"]
)
def test_a_saved_optimizer_goes_on_with_a_fresh_narrow_network(zoo, kind, options):
    net = zoo["cnn"]
    model = net.model()
    optimizer = _build(kind, options, model.parameters())
    net.step(model, optimizer, 0)
    axes = net.axes(model)
    history = History.begin(net.structure(model)).add(Keep(axes, net.kept(), 0, 1, 0), model)
    cut_and_check(model, axes, [optimizer], [], lambda: model(net.example()))
    attach(model, history)
    net.step(model, optimizer, 1)

    fresh = net.model(seed=5)
    match_checkpoint_shapes(fresh, model.state_dict(), history)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = _build(kind, options, fresh.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (2, 3):
        net.step(model, optimizer, seed)
        net.step(fresh, resumed, seed)
    # NAdam's running product is float32 and becomes float64 by loading, in PyTorch itself.
    tolerance = 1e-6 if kind is optim.NAdam else 0
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


class TestMigrate:
    def test_rules(self):
        state = {
            "same": torch.arange(12).reshape(4, 3),
            "row": torch.arange(4).reshape(4, 1),
            "column": torch.arange(3).reshape(1, 3),
            "whole": torch.ones(1, 1),
            "step": torch.tensor(5.0),
            "listed": torch.tensor([5.0]),
            "number": 3,
            "none": None,
        }
        new = migrate(state, (4, 3), {0: np.array([0, 2]), 1: np.array([1])})
        assert {key: value.tolist() if torch.is_tensor(value) else value for key, value in new.items()} == {
            "same": [[1], [7]],
            "row": [[0], [2]],
            "column": [[1]],
            "whole": [[1.0]],
            "step": 5.0,
            "listed": [5.0],
            "number": 3,
            "none": None,
        }

    def test_a_parameter_with_a_single_row(self):
        """Length 1 is then the full length too."""
        new = migrate({"moment": torch.ones(1, 3)}, (1, 3), {1: np.array([0, 2])})
        assert new["moment"].shape == (1, 2)

    @pytest.mark.parametrize("value", [torch.ones(4), torch.ones(4, 2), torch.ones(12), [torch.ones(4, 3)], object()])
    def test_what_fits_nothing_is_refused(self, value):
        with pytest.raises(UnsliceableStateError, match="`memory`"):
            migrate({"memory": value}, (4, 3), {0: np.array([0, 2]), 1: np.array([1])})


class Flat(optim.SGD):
    """Keeps a flat copy of each parameter."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("flat", parameter.detach().flatten().clone())
            assert self.state[parameter]["flat"].numel() == parameter.numel()


def test_state_that_cannot_be_sliced_is_rebuilt_with_a_warning(zoo, photograph, same):
    net = zoo["mlp"]
    model = net.model()
    optimizer = Flat(model.parameters(), lr=0.1, momentum=0.9)
    net.step(model, optimizer)
    before = photograph(model, [optimizer])
    axes = {"0.weight": {0: np.arange(3)}, "0.bias": {0: np.arange(3)}, "2.weight": {1: np.arange(3)}}
    with pytest.warns(
        UserWarning, match=r"Flat starts with an empty state for [02].weight: its state .* `flat` has shape \(4[08],\)"
    ) as seen:
        change = cut(model, axes, [optimizer])
    assert len(seen) == 2  # a flat bias is a bias
    assert seen[0].filename == __file__
    assert not optimizer.state[model[0].weight]
    assert optimizer.state[model[0].bias]["momentum_buffer"].shape == (3,)
    net.step(model, optimizer)
    optimizer.state[model[0].weight]["came later"] = 1
    change.undo()
    weight = optimizer.state[model[0].weight]
    assert same(dict(weight), before["optimizer 0"][1][id(model[0].weight)])


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_changes_nothing(zoo, photograph, same):
    net = zoo["mlp"]
    model = net.model()
    optimizer = Flat(model.parameters(), lr=0.1)
    net.step(model, optimizer)
    before = photograph(model, [optimizer])
    with pytest.raises(UserWarning, match="starts with an empty state"):
        cut(model, net.axes(model), [optimizer])
    assert same(photograph(model, [optimizer]), before)


class TestRefuse:
    def test_flat_and_sharded_optimizers(self):
        class Mine(optim.LBFGS):
            pass

        class ZeroRedundancyOptimizer(optim.SGD):
            """Stands for PyTorch's, which needs a process group."""

        weight = nn.Parameter(torch.ones(2))
        with pytest.raises(OptimizerRefusedError, match=r"Mine keeps its history.*Use one that"):
            refuse([optim.SGD([weight], lr=0.1), Mine([weight])])
        with pytest.raises(OptimizerRefusedError, match="shards"):
            refuse([ZeroRedundancyOptimizer([weight], lr=0.1)])

    def test_what_is_no_optimizer(self):
        with pytest.raises(TypeError, match=r"Expected a `torch.optim.Optimizer`, got list"):
            refuse([[]])

    def test_the_others_pass(self):
        kinds = (optim.SGD, optim.Adam, optim.Adafactor, optim.Muon)
        refused = [kind for kind in kinds if self._is_refused(kind([nn.Parameter(torch.ones(2, 2))], lr=0.1))]
        assert refused == []

    @staticmethod
    def _is_refused(optimizer):
        try:
            refuse([optimizer])
        except OptimizerRefusedError:
            return True
        return False


def test_lightnings_wrapper_is_seen_through(zoo):
    net = zoo["mlp"]
    model = net.model()
    optimizer = optim.AdamW(model.parameters())
    wrapped = LightningOptimizer(optimizer)
    assert unwrap(wrapped) is optimizer
    assert unwrap(optimizer) is optimizer
    net.step(model, optimizer)
    cut(model, net.axes(model), [wrapped])
    assert optimizer.state[model[0].weight]["exp_avg"].shape == model[0].weight.shape
    with pytest.raises(OptimizerRefusedError):
        refuse([LightningOptimizer(optim.LBFGS(model.parameters()))])
