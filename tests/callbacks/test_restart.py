"""Training anew after a cut: from new weights, or from those of an earlier epoch."""

import copy

import pytest
import torch
from lightning.pytorch import Callback

from lightning_prune import LinearSchedule, OneShot, ReestimateBatchNorm, Reinitialise, Rewind, StructuredPruning
from lightning_prune.surgery import history_of, take
from tests.callbacks.small import Saver, Small, loaders, trainer


class Weights(Callback):
    """The network's state and the optimizer's, at the start of every epoch, before or after what is due."""

    def __init__(self):
        self.states, self.momenta = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.states.append(copy.deepcopy(pl_module.net.state_dict()))
            self.momenta.append(len(trainer.optimizers[0].state))


def fit(tmp_path, *callbacks, epochs=4, **settings):
    model = Small(norm=True)
    ckpt_path = settings.pop("ckpt_path", None)
    run = trainer(tmp_path, epochs, *callbacks, **settings)
    run.fit(model, *loaders(), ckpt_path=ckpt_path)
    return model, run


def pruning(tmp_path, *extensions, at=2, **settings):
    return StructuredPruning(
        0.5, schedule=OneShot(at, "epoch"), extensions=list(extensions), dirpath=str(tmp_path / "report"), **settings
    )


def kept_axes(callback, model):
    """What the first cut kept, by tensor and dimension, from the history."""
    return model._lightning_prune_history.edits[0].axes


@pytest.mark.parametrize("epoch", [0, 1])
def test_weights_go_back_to_the_epoch(tmp_path, epoch):
    before, after = Weights(), Weights()
    callback = pruning(tmp_path, Rewind(epoch))
    model, _ = fit(tmp_path, before, callback, after)
    axes = kept_axes(callback, model)
    for name, value in after.states[2].items():
        expected = take(before.states[epoch][name], axes.get(f"net.{name}", {}))
        assert torch.equal(value, expected), name
    assert not torch.equal(after.states[2]["3.weight"], take(before.states[2]["3.weight"], axes["net.3.weight"]))
    assert (before.momenta[2] > 0, after.momenta[2]) == (True, 0)


def test_every_cut_goes_back(tmp_path):
    before, after = Weights(), Weights()
    cuts = LinearSchedule(1, 3, cuts=2)
    callback = StructuredPruning(0.5, schedule=cuts, extensions=[Rewind(0)], dirpath=str(tmp_path / "report"))
    model, _ = fit(tmp_path, before, callback, after, epochs=5)
    assert len(callback.report.cuts) == 2
    expected = before.states[0]
    for edit, epoch in zip(model._lightning_prune_history.edits, (1, 3), strict=True):
        expected = {name: take(value, edit.axes.get(f"net.{name}", {})) for name, value in expected.items()}
        assert all(torch.equal(after.states[epoch][name], value) for name, value in expected.items())


def test_tied_weights_go_back_under_all_their_names(tmp_path):
    before, after = Weights(), Weights()
    cuts = LinearSchedule(1, 3, cuts=2)
    callback = StructuredPruning(0.5, schedule=cuts, extensions=[Rewind(0)], dirpath=str(tmp_path / "report"))
    model = Small()
    again = torch.nn.Linear(8, 8, dtype=torch.float64)
    again.weight = model.net[2].weight
    model.net.insert(3, again)
    trainer(tmp_path, 5, before, callback, after).fit(model, *loaders())
    assert model.net[3].weight is model.net[2].weight
    assert model.net[2].weight.shape == (4, 4)
    assert torch.equal(after.states[1]["2.weight"], after.states[1]["3.weight"])
    expected = before.states[0]["2.weight"]
    for edit in model._lightning_prune_history.edits:
        expected = take(expected, edit.axes["net.2.weight"])
    assert torch.equal(after.states[3]["2.weight"], expected)


def test_new_weights_are_the_same_every_time(tmp_path):
    first, second = Weights(), Weights()
    fit(tmp_path / "a", pruning(tmp_path / "a", Reinitialise(3)), first)
    fit(tmp_path / "b", pruning(tmp_path / "b", Reinitialise(3)), second)
    assert all(torch.equal(value, second.states[2][name]) for name, value in first.states[2].items())
    assert first.states[2]["0.bias"].eq(0).all()
    assert first.momenta[2] == 0


@pytest.mark.parametrize("rule", ["he", "own"])
def test_the_history_remembers_that_weights_were_drawn(rule, tmp_path):
    model, _ = fit(tmp_path, pruning(tmp_path, Reinitialise(rule=rule)))
    plain = history_of(model).to_plain()
    assert [edit["info"][f"reinitialised/{rule}"] for edit in plain["edits"]] == [1]


def test_norms_are_estimated_on_the_weights_gone_back_to(tmp_path):
    plain, estimated = Weights(), Weights()
    fit(tmp_path / "a", pruning(tmp_path / "a", Rewind(0)), plain)
    fit(tmp_path / "b", pruning(tmp_path / "b", Rewind(0), ReestimateBatchNorm(4)), estimated)
    one, two = plain.states[2], estimated.states[2]
    assert [name for name in one if not torch.equal(one[name], two[name])] == ["1.running_mean", "1.running_var"]


@pytest.mark.parametrize("repair", [Rewind(0), Rewind(1), Reinitialise()], ids=repr)
@pytest.mark.parametrize("epoch", [0, 2])  # before and after the cut
def test_a_resumed_run_is_the_same_run(tmp_path, repair, epoch):
    saver = Saver(tmp_path)
    whole, _ = fit(tmp_path / "a", pruning(tmp_path / "a", repair), saver)
    again, _ = fit(tmp_path / "b", pruning(tmp_path / "b", repair), ckpt_path=saver.path(epoch))
    for (key, one), (_, two) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, two), key


def test_an_epoch_after_the_first_cut_is_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"Rewind\(epoch=3\): .* first cut, which comes after 2 epoch\(s\), got 3",
    ):
        fit(tmp_path, pruning(tmp_path, Rewind(3)))


def test_an_epoch_that_was_not_kept_is_refused(tmp_path):
    saver = Saver(tmp_path)
    fit(tmp_path / "a", pruning(tmp_path / "a", Reinitialise()), saver)
    with pytest.raises(ValueError, match="expected the weights of epoch 0 in the checkpoint, but they were not kept"):
        fit(tmp_path / "b", pruning(tmp_path / "b", Rewind(0)), ckpt_path=saver.path(0))


@pytest.mark.parametrize(
    ("epoch", "error", "text"),
    [
        (-1, ValueError, "of at least 0, got -1"),
        (0.5, TypeError, "a whole number"),
        (True, TypeError, "a whole number"),
    ],
)
def test_bad_epochs(epoch, error, text):
    with pytest.raises(error, match=f"Rewind: expected `epoch` .*{text}"):
        Rewind(epoch)
