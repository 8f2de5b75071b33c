"""What is observed: when and where, how it is kept, and what becomes of it at a cut, in a file, with bad numbers."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_prune.scoring import ActivationStatistic, ContributionStatistic, contributions_of
from lightning_prune.structure import CostModel, Group, Member, Structure, TracedModel, trace
from tests.scoring.networks import batches, network, structure_of, train
from tests.scoring.references import shares


def observed(name="mlp", sizes=(3, 2, 4, 2), **settings):
    model, statistic = network(name), ContributionStatistic(structure_of(name), **settings)
    train(model, batches(name, sizes), statistic)
    return model, statistic


def traced(model, shape, **settings):
    return ContributionStatistic(trace(TracedModel.of(model, torch.zeros(2, *shape))), **settings)


def assert_same(one, two):
    assert one.state_dict().keys() == two.state_dict().keys()
    for key, state in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], state, rtol=0, atol=0, msg=key)


# -- when ------------------------------------------------------------------------------------------------------------


def test_counts_samples_and_batches():
    _, statistic = observed()
    assert statistic.passes("0") == 3 + 2 + 4 + 2
    assert statistic.update_count == 4
    statistic.reset()
    assert statistic.passes("0") == statistic.update_count == 0
    assert not statistic.read("mass", "0").any()


def test_observes_only_while_attached_and_only_in_training():
    model, statistic = observed(sizes=(3,))
    model(batches("mlp")[0])
    assert statistic.passes("0") == 3
    handles = statistic.attach(model)
    model.eval()(batches("mlp")[0])
    assert statistic.passes("0") == 3
    model.train()
    model[2].eval()  # a frozen part that stays in eval mode trains with the rest
    model(batches("mlp")[0])
    assert statistic.passes("0") == 6
    for handle in handles:
        handle.remove()


def test_batches_alternate_between_halves():
    _, statistic = observed()
    _, even = observed(sizes=(3,))
    torch.testing.assert_close(statistic.read("passes", "0", 0), torch.tensor([7.0], dtype=torch.float64))
    torch.testing.assert_close(statistic.read("passes", "0", 1), torch.tensor([4.0], dtype=torch.float64))
    assert even.read("passes", "0", 1) == 0


def test_an_empty_batch_is_no_pass():
    model, statistic = observed(sizes=(3,), lambda_max=1.0)
    before = copy.deepcopy(statistic)
    train(model, [torch.zeros(0, 6, dtype=torch.float64)], statistic)
    statistic.batches -= 1
    assert_same(statistic, before)


def test_a_copy_made_while_observing_is_not_observed():
    model, statistic = network("mlp"), ContributionStatistic(structure_of("mlp"))
    handles = statistic.attach(model)
    averaged = copy.deepcopy(model)
    averaged(batches("mlp")[0])
    assert statistic.passes("0") == 0
    for handle in handles:
        handle.remove()


def test_recomputation_under_gradient_checkpointing_changes_no_mean():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, plain = network("cnn"), ContributionStatistic(structure_of("cnn"), lambda_max=1.0)
    again, twice = Checkpointed(*copy.deepcopy(model)), ContributionStatistic(structure_of("cnn"), lambda_max=1.0)
    train(model, batches("cnn"), plain)
    train(again, batches("cnn"), twice)
    for group in structure_of("cnn").widths:
        torch.testing.assert_close(twice.value(group), plain.value(group))
    assert twice.passes("0") > plain.passes("0")


def test_drawn_positions_differ_between_batches_and_not_within():
    """Nor for the two passes of gradient checkpointing, nor after a resume."""
    seen = []

    def watch(layer, activation, output, *, seed, **settings):
        seen.append((seed, settings["positions"]))
        return contributions_of(layer, activation, output, seed=seed, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_prune.scoring.statistics.contributions_of", watch)
        model, statistic = observed("cnn", lambda_max=1.0, positions=2)
        consumers = len(seen) // 4
        batch_of = [seed for seed, _ in seen]
        assert all(len(set(batch_of[i * consumers : (i + 1) * consumers])) == 1 for i in range(4))
        assert len(set(batch_of)) == 4
        restored = ContributionStatistic(structure_of("cnn"), lambda_max=1.0, positions=2)
        restored.load_state_dict(statistic.state_dict())
        for one in (statistic, restored):
            train(model, batches("cnn", (3,), seed=5), one)
    assert seen[-2 * consumers : -consumers] == seen[-consumers:]
    assert_same(statistic, restored)
    assert not torch.equal(statistic.maximum("0"), observed("cnn", lambda_max=1.0)[1].maximum("0"))


# -- where -----------------------------------------------------------------------------------------------------------


def test_several_consumers_average():
    model, statistic = observed("residual", lambda_max=1.0)
    group = structure_of("residual").group("stem")
    assert statistic.sources["stem"] == ("branch", "left", "right")
    inputs = {name: [] for name in statistic.sources["stem"]}
    for name, calls in inputs.items():
        model.get_submodule(name).register_forward_hook(lambda _, args, __, calls=calls: calls.append(args[0].detach()))
    train(model, batches("residual"))
    every = {name: shares(model.get_submodule(name), torch.cat(x), "absolute")[0] for name, x in inputs.items()}
    averages = [s.sum(0) / s.any(1).sum() for s in every.values()]
    np.testing.assert_allclose(statistic.average("stem"), np.mean(averages, 0))
    np.testing.assert_allclose(statistic.maximum("stem"), np.mean([s.max(0) for s in every.values()], 0))
    assert float(statistic.average("stem").sum()) == pytest.approx(1)
    assert group.width == len(statistic.value("stem"))


def test_a_consumer_that_was_never_called_has_no_say():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.main, self.extra = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x, extra=True):
            x = self.first(x).relu()
            return torch.cat([self.main(x), self.extra(x)], 1) if extra else self.main(x)

    model = Optional()
    statistic = traced(model, (6,))
    handles = statistic.attach(model)
    model(torch.randn(4, 6), extra=False)
    assert len(handles) == 2
    assert float(statistic.average("first").sum()) == pytest.approx(1)
    assert statistic.passes("first") == 4


def test_a_flattened_channel_has_the_shares_of_its_pixels():
    model, statistic = observed("cnn", lambda_max=1.0)
    seen = []
    model[5].register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    train(model, batches("cnn"))
    share = shares(model[5], torch.cat(seen), "absolute")[0].reshape(-1, 4, 6)  # (outputs, channels, pixels)
    np.testing.assert_allclose(statistic.average("2"), share.sum(2).mean(0))
    np.testing.assert_allclose(statistic.maximum("2"), share.max((0, 2)))


def test_one_hook_per_layer_however_many_groups_enter_it():
    model, statistic = network("concatenated"), ContributionStatistic(structure_of("concatenated"))
    assert len(statistic.attach(model)) == 1
    model(batches("concatenated")[0])
    total = sum(statistic.average(group).sum() for group in ("left", "right"))
    assert float(total) == pytest.approx(1)


def test_a_layer_called_twice_counts_both_calls():
    _, statistic = observed("shared", sizes=(3,))
    assert statistic.read("passes", "first").tolist() == [6, 3]


def test_tied_layers_count_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            x = self.first(x).relu()
            return torch.cat([self.a(x), self.b(-2 * x)], 1)

    model = Tied()
    statistic = traced(model, (6,))
    assert len(statistic.attach(model)) == 2
    model(torch.randn(4, 6))
    assert statistic.passes("first") == 8


def test_looks_before_hooks_of_the_user():
    """What they make of a layer's output is no output of the layer."""
    expected, statistic = network("mlp"), ContributionStatistic(structure_of("mlp"), ratio="signed")
    changed, other = network("mlp"), ContributionStatistic(structure_of("mlp"), ratio="signed")
    changed[4].register_forward_hook(lambda *_: torch.zeros(1, dtype=torch.float64, requires_grad=True))
    train(expected, batches("mlp"), statistic)
    train(changed, batches("mlp"), other)
    assert_same(statistic, other)


class Lowrank(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.sum()


class Unseen(nn.Module):
    """Groups whose units enter no layer where they could be seen, each for another reason."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 4) for _ in range(3))
        self.functional, self.changed = nn.Linear(4, 2), Lowrank(4, 2)

    def forward(self, x):
        functional = F.linear(self.a(x).relu(), self.functional.weight)
        return torch.cat([functional, self.changed(self.b(x).relu())], 1) + self.c(x).relu().sum()


def test_says_what_cannot_be_observed_and_why():
    model = Unseen()
    statistic = traced(model, (6,))
    known = {
        "b": "its units enter changed, which is no plain Linear, Conv or ConvTranspose",
        "c": "no layer takes its units as input",
    }
    assert statistic.unobservable(model) == known
    train(model, [torch.randn(2, 6)] * 3, statistic)
    silent = {"a": "functional was called as a module in none of the 3 observed batches"}
    assert statistic.unobservable(model) == known | silent
    everything = ContributionStatistic(structure_of("residual"))
    assert everything.unobservable(network("residual")) == {}
    train(network("residual"), batches("residual"), everything)
    assert everything.unobservable(network("residual")) == {}


@pytest.mark.parametrize(
    ("model", "tensor"),
    [
        (nn.ModuleDict({"taker": weight_norm(nn.Linear(4, 2))}), "taker.parametrizations.weight.original1"),
        (nn.ModuleDict({"taker": nn.Bilinear(4, 4, 2)}), "taker.weight"),
    ],
    ids=["computed weight", "not linear"],
)
def test_hooks_no_layer_that_is_not_called_as_a_plain_one(model, tensor):
    group = Group("producer", 4, (Member(tensor, 1, "in", np.arange(4)[:, None]),))
    statistic = ContributionStatistic(Structure((group,), (), CostModel((), (), {})))
    assert statistic.attach(model) == []
    assert statistic.unhookable(model)["producer"].startswith("its units enter taker")


# -- how it is kept --------------------------------------------------------------------------------------------------


def test_is_kept_in_double_precision_whatever_the_model_computes_in():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(torch.bfloat16)
    statistic = traced(model.float(), (6,))
    model.to(torch.bfloat16)
    train(model, [torch.randn(4, 6, dtype=torch.bfloat16)], statistic)
    assert statistic.read("mass", "0").dtype == torch.float64
    assert float(statistic.average("0").sum()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("ratio", ["absolute", "signed"])
def test_mixed_precision_computes_shares_in_single(ratio):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 3))
    statistic, seen = traced(model, (3, 5, 5), ratio=ratio), []
    model[3].register_forward_hook(lambda _, args, output: seen.extend([args[0].detach(), output.detach()]))
    with torch.autocast("cpu", torch.bfloat16):
        train(model, [torch.randn(6, 3, 5, 5)], statistic)
    activation, output = seen
    assert activation.dtype == output.dtype == torch.bfloat16
    terms = activation.double()[:, None] * model[3].weight.detach().double()  # (passes, outputs, inputs)
    terms = terms if ratio == "signed" else terms.abs()
    z = terms.sum(2, keepdim=True)
    expected = (terms / (z + 1e-6 * z.sign())).unflatten(2, (8, 9)).sum(3).mean((0, 1))
    torch.testing.assert_close(statistic.average("0"), expected, rtol=1e-3, atol=1e-5)


def test_states_survive_a_file_and_go_on():
    model, statistic = observed("cnn", sizes=(3, 2, 4), lambda_max=0.5)
    file = io.BytesIO()
    torch.save(statistic.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    untouched = copy.deepcopy(saved)
    restored = ContributionStatistic(structure_of("cnn"), lambda_max=0.5)
    restored.load_state_dict(saved)
    assert_same(restored, statistic)
    rest = batches("cnn", (2, 3, 2), seed=9)
    train(model, rest, statistic)
    train(model, rest, restored)
    assert_same(restored, statistic)
    assert restored.update_called
    for group, value in restored.compute().items():
        torch.testing.assert_close(value, statistic.value(group), rtol=0, atol=0)
    for key, state in untouched.items():
        torch.testing.assert_close(saved[key], state, rtol=0, atol=0)  # what was loaded from stays what it was


def test_a_saved_state_does_not_grow_with_the_statistic():
    model, statistic = observed(sizes=(3,))
    saved = statistic.state_dict()
    before = copy.deepcopy(saved)
    train(model, batches("mlp"), statistic)
    assert all(torch.equal(saved[key], before[key]) for key in saved)


@pytest.mark.parametrize("other", ["residual", "mlp"])
def test_refuses_the_states_of_another_network(other):
    _, statistic = observed(other, lambda_max=float(other == "mlp"))
    with pytest.raises(ValueError, match="expected states of the present network, got others for ma"):
        ContributionStatistic(structure_of("mlp")).load_state_dict(statistic.state_dict())


def test_survives_pickling():
    model, statistic = observed()
    again = torch.load(_saved(statistic), weights_only=False)
    train(model, batches("mlp"), statistic)
    train(model, batches("mlp"), again)
    assert_same(again, statistic)


def _saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def test_updates_by_hand_are_refused():
    with pytest.raises(NotImplementedError, match="attach"):
        ContributionStatistic(structure_of("mlp")).update()


# -- a cut -----------------------------------------------------------------------------------------------------------


# -- agreement of the halves -----------------------------------------------------------------------------------------


def test_split_half_is_spearmans_correlation_of_even_and_odd_batches():
    model, statistic = observed("cnn")
    even, odd = (ContributionStatistic(structure_of("cnn")) for _ in range(2))
    inputs = batches("cnn")
    train(model, inputs[0::2], even)
    train(model, inputs[1::2], odd)
    for group in ("0", "2"):
        expected = spearmanr(even.value(group), odd.value(group)).statistic
        assert statistic.split_half(group) == pytest.approx(expected, abs=1e-5)


def test_split_half_says_when_it_cannot_tell():
    _, statistic = observed(sizes=(3,))
    assert math.isnan(statistic.split_half("0"))
    model = nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 2))
    single = traced(model, (6,))
    train(model, [torch.randn(3, 6)] * 2, single)
    assert math.isnan(single.split_half("0"))


# -- bad numbers -----------------------------------------------------------------------------------------------------


def test_batches_with_bad_numbers_are_left_out_with_one_warning():
    good = batches("mlp")
    bad = good[1].clone()
    bad[0, 0] = math.nan
    model, statistic = network("mlp"), ContributionStatistic(structure_of("mlp"), lambda_max=1.0)
    clean = ContributionStatistic(structure_of("mlp"), lambda_max=1.0)
    with pytest.warns(RuntimeWarning, match="NaN or infinite activations or weights at layer '[24]'") as record:
        train(model, [good[0], bad, good[2], bad, good[3], good[3]], statistic)
    assert len(record) == 2  # one for each layer
    zero = torch.zeros(0, 6, dtype=torch.float64)
    train(model, [good[0], zero, good[2], zero, good[3], good[3]], clean)
    for group in ("0", "2"):
        torch.testing.assert_close(statistic.value(group), clean.value(group), rtol=0, atol=0)
        assert statistic.passes(group) == clean.passes(group) == 3 + 4 + 2 + 2
        assert statistic.read("skipped", group) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, [bad], statistic)


def test_warns_of_a_bad_batch_right_before_a_cut():
    model, statistic = network("mlp"), ContributionStatistic(structure_of("mlp"))
    good = batches("mlp")[0]
    train(model, [good, good * math.inf], statistic)
    with pytest.warns(RuntimeWarning, match="at layer '2'"):
        statistic.value("0")


def test_no_score_is_made_of_bad_numbers_alone():
    model, statistic = network("mlp"), ContributionStatistic(structure_of("mlp"))
    train(model, [torch.full((2, 6), math.inf, dtype=torch.float64)], statistic)
    with pytest.raises(
        FloatingPointError, match="every observed pass had NaN or infinite activations or weights at layer '2'"
    ):
        statistic.value("0")


def test_no_score_is_made_of_nothing():
    statistic = ContributionStatistic(structure_of("mlp"))
    with pytest.raises(RuntimeError, match=r"'0' cannot be scored: expected at least one training pass.*none at '2'"):
        statistic.value("0")
    assert statistic.split_half("0") != statistic.split_half("0")


def test_dead_layers_score_alike():
    model, statistic = network("mlp"), ContributionStatistic(structure_of("mlp"), lambda_max=1.0)
    nn.init.constant_(model[0].bias, -1e6)
    train(model, batches("mlp"), statistic)
    assert statistic.value("0").tolist() == [0.0] * 5


class Own(ActivationStatistic):
    """Of somebody who writes a statistic for the first time."""

    def __init__(self, structure, found, **declared):
        super().__init__(structure)
        self.found = found
        for quantity, reduction in declared.items():
            self.declare(quantity, reduction)

    def see(self, layer, activation, output, targets):
        for target in targets:
            self.record(target.group, target.source, len(activation), value=self.found(activation))

    def estimate(self, name, half=None):
        return self.per_pass("value", name, half).mean(0)


@pytest.mark.parametrize(
    ("declared", "found", "message"),
    [
        ({}, lambda x: x.sum(0), r"Own: expected declared quantities, got 'value' for group '0'.*declare\(\"value\""),
        ({"value": "sum"}, lambda x: x, r"Own: expected 'value' of shape \(6,\) for group '0', got \(2, 6\)"),
        ({"value": "sum"}, lambda x: x.sum(), r"Own: expected 'value' of shape \(6,\) for group '0', got \(\)"),
        ({"value": "max"}, lambda x: -x.amax(0) - 1, r"Own: expected values of at least 0 for the maximum 'value'"),
    ],
)
def test_what_is_recorded_is_checked(declared, found, message):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    statistic = Own(trace(TracedModel.of(model, torch.zeros(2, 4))), found, **declared)
    statistic.attach(model)
    if declared != {"value": "max"}:
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(2, 4))
        return
    model(torch.zeros(2, 4))
    for then in (lambda: statistic.value("0"), lambda: statistic.attach(model)):  # without a wait for a GPU before
        with pytest.raises(ValueError, match=message):
            then()


def test_sums_may_be_negative():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    statistic = Own(trace(TracedModel.of(model, torch.zeros(2, 4))), lambda x: -x.sum(0) - 1, value="sum")
    statistic.attach(model)
    hidden = model[1](model[0](torch.ones(2, 4)))
    model(torch.ones(2, 4))
    found = statistic.value("0")
    torch.testing.assert_close(found, (-(hidden.detach().sum(0) + 1) / 2).double())
    assert not found.requires_grad, "the graph of every observed batch would stay in memory"
