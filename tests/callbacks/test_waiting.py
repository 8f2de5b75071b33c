"""A cut that is due before anything was observed waits for the first batch that is."""

import pytest
import torch
from lightning.pytorch import Callback

from lightning_prune import SNIP, Contribution, Geometric, OneShot, StructuredPruning
from tests.callbacks.small import Saver, Small, loaders, trainer


class Widths(Callback):
    """The width of the first layer in every batch."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(pl_module.net[0].out_features)


def fit(tmp_path, epochs, *callbacks, ckpt_path=None):
    model = Small()
    trainer(tmp_path, epochs, *callbacks).fit(model, *loaders(), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("every", [1, 3])
def test_pruning_at_initialisation_needs_one_batch(tmp_path, every):
    widths = Widths()
    pruning = StructuredPruning(0.5, criterion=SNIP(every), schedule=OneShot(0, "step"), dirpath=str(tmp_path / "r"))
    fit(tmp_path, 1, pruning, widths)
    assert widths.found == [8, 4, 4, 4, 4]


def test_a_longer_run_goes_on_with_a_cut_that_is_due_at_once(tmp_path):
    def pruning(name):
        schedule = Geometric(0.3, start=1, every=1)
        return StructuredPruning(0.9, criterion=Contribution(), schedule=schedule, dirpath=str(tmp_path / name))

    saver, widths = Saver(tmp_path), Widths()
    with pytest.warns(UserWarning, match="% of the way to the target"):
        fit(tmp_path / "a", 3, pruning("a"), saver)
    with pytest.warns(UserWarning, match="% of the way to the target"):
        model = fit(tmp_path / "b", 5, pruning("b"), widths, ckpt_path=saver.path(2))
    assert widths.found[0] > widths.found[-1]
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
