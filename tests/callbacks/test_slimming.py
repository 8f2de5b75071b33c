"""Units pulled to zero in training: beside a loop written by hand, and in whole runs."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_prune import L2, AtStart, GroupLasso, GrowingL2, HalfSpace, NetworkSlimming, OneShot, ScaleL1
from lightning_prune.planning import NoEffectWarning
from tests.callbacks.small import Saver, Small, loaders, trainer

PENALTIES = {
    "scales": (ScaleL1(0.05), None),
    "lasso": (GroupLasso(0.01), L2()),
    "growing": (GrowingL2(0.5, delta=0.01, every=2), L2()),
    "half space": (HalfSpace(0.05, start=3, epsilon=0.2), L2()),
}
every_penalty = pytest.mark.parametrize("name", PENALTIES)


def slimming(name, tmp_path, at=2, **settings):
    penalty, criterion = PENALTIES[name]
    return NetworkSlimming(
        0.5,
        penalty=penalty,
        criterion=criterion,
        schedule=OneShot(at, "epoch"),
        dirpath=str(tmp_path / "report"),
        **settings,
    )


def fit(tmp_path, callbacks, epochs=4, model=None, ckpt_path=None, **settings):
    model = model or Small(norm=True)
    run = trainer(tmp_path, epochs, *callbacks, **settings)
    run.fit(model, *loaders(), ckpt_path=ckpt_path)
    return model, run


class Copy(Callback):
    """The network right before, or right after, what is due at the start of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 0:
            self.net = copy.deepcopy(pl_module.net)
            state = trainer.optimizers[0].state
            self.momentum = [state[parameter]["momentum_buffer"].clone() for parameter in pl_module.parameters()]


def test_the_pull_joins_the_gradient_of_every_step(tmp_path):
    before = Copy(2)
    fit(tmp_path, [before, slimming("scales", tmp_path)], epochs=3, accumulate_grad_batches=2)
    reference = Small(norm=True).net.train()
    scale = reference[1].weight
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.9**epoch
        batches = list(loaders()[0])
        for i, (x, y) in enumerate(batches):
            (nn.functional.cross_entropy(reference(x), y) / 2).backward()
            if i % 2 or i == len(batches) - 1:
                scale.grad += 0.05 * scale.detach().sign()
                optimizer.step()
                optimizer.zero_grad()
    for (key, ours), (_, theirs) in zip(before.net.state_dict().items(), reference.state_dict().items(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14, msg=key)


def test_the_smallest_scales_go(tmp_path):
    before, after = Copy(2), Copy(2)
    callback = slimming("scales", tmp_path)
    fit(tmp_path, [before, callback, after], epochs=3)
    scales = before.net[1].weight.detach()
    assert torch.equal(after.net[1].weight.detach(), scales[scales.abs().argsort()[4:].sort().values])
    assert after.net[3].out_features == 8  # without a norm: neither pulled nor cut
    assert callback.report.cuts[0].after == {"net.0": 4}


def test_after_the_last_cut_nothing_is_pulled(tmp_path):
    """From the cut on, the run equals one of the narrow network without the callback."""

    after = Copy(2)
    model, _ = fit(tmp_path, [slimming("scales", tmp_path), after], epochs=3)
    net = after.net.train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1 * 0.9**2, momentum=0.9)
    for parameter, momentum in zip(net.parameters(), after.momentum, strict=True):
        optimizer.state[parameter]["momentum_buffer"] = momentum
    for x, y in loaders()[0]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    for ours, theirs in zip(model.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@every_penalty
def test_every_penalty_makes_units_smaller_and_cuts(name, tmp_path):
    callback = slimming(name, tmp_path)
    model, run = fit(tmp_path, [callback])
    assert model.net[0].out_features < 8
    assert not run.optimizers[0]._optimizer_step_post_hooks
    if name == "half space":
        assert callback.report.cuts


def test_half_space_projects_in_a_run(tmp_path):
    zeros = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            zeros.append(int((pl_module.net[0].weight.abs().sum(1) == 0).sum()))

    callback = NetworkSlimming(
        0.5, penalty=HalfSpace(0.3, start=5, epsilon=0.5), criterion=L2(), schedule=OneShot(5), dirpath=str(tmp_path)
    )
    fit(tmp_path, [callback, Watch()], epochs=6)
    zeros = zeros[:25]  # before the cut
    assert zeros[:5] == [0] * 5
    assert zeros[-1] > 0
    assert zeros == sorted(zeros)  # what is zero stays zero


@every_penalty
def test_a_resumed_run_is_the_same_run(name, tmp_path):
    saver = Saver(tmp_path)
    whole, _ = fit(tmp_path / "a", [slimming(name, tmp_path / "a"), saver])
    again, _ = fit(tmp_path / "b", [slimming(name, tmp_path / "b")], ckpt_path=saver.path(0))
    for (key, one), (_, two) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, two), key


def test_scaled_gradients_are_pulled_by_as_much(tmp_path):
    """An optimizer that unscales by itself gets a scaled pull: the same weights with and without a scaler."""
    from lightning_prune.callbacks.methods.slimming import _scale

    class Precision:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    class Run:
        precision_plugin = Precision

    parameter = nn.Parameter(torch.ones(2))
    assert _scale(Run, torch.optim.SGD([parameter], 0.1)) == 1.0
    assert _scale(Run, torch.optim.SGD([parameter], 0.1, fused=True)) == 64.0
    assert _scale(type("Plain", (), {"precision_plugin": object()}), torch.optim.SGD([parameter], 0.1, fused=True)) == 1


def test_a_network_without_normalisation_is_refused(tmp_path):
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"expected layers that ScaleL1.*net\.0: it has no normalisation.*GroupLasso"):
        fit(tmp_path, [NetworkSlimming(0.5, dirpath=str(tmp_path / "report"))], model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_named_layer_without_normalisation_is_refused(tmp_path):
    callback = NetworkSlimming(0.5, layers=["net.0", "net.3"], dirpath=str(tmp_path / "report"))
    with pytest.raises(ValueError, match=r"can pull on, got net\.3: it has no normalisation"):
        fit(tmp_path, [callback])


def test_frozen_scales_are_told(tmp_path):
    """They would be cut by what they happened to be."""
    model = Small(norm=True)
    scales = [layer for layer in model.net if isinstance(layer, nn.BatchNorm1d)]
    assert len(scales) == 1
    scales[0].weight.requires_grad_(False)
    with pytest.warns(NoEffectWarning, match=r"ScaleL1.* does not pull on net\.0 as long as"):
        fit(tmp_path, [slimming("scales", tmp_path)], model=model)


def test_a_penalty_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"expected `penalty` to be an instance of Penalty, got 0\.1"):
        NetworkSlimming(0.5, penalty=0.1)


def test_a_cut_before_there_was_time_to_pull_is_refused():
    with pytest.raises(ValueError, match=r"leaves time to pull units to zero, got AtStart\(\)"):
        NetworkSlimming(0.5, schedule=AtStart())
