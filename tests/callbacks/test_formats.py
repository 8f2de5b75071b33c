"""Checkpoints of every format that was ever written load for ever, with ``weights_only=True``.

`fixtures/checkpoint_1.pt` is of a run of `test_formats.pruner`, saved after epoch 1: the first of two cuts was made.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_prune import Contribution, ContributionPruning, Linear, load_from_checkpoint
from lightning_prune.surgery import history_of
from tests.callbacks.networks import Net, fit, loader, make, trainer, widths

CHECKPOINTS = sorted(Path(__file__).with_name("fixtures").glob("checkpoint_*.pt"))


def pruner() -> ContributionPruning:
    return ContributionPruning(0.5, criterion=Contribution(every_n_batches=1), schedule=Linear(start=1, end=2, cuts=2))


def test_the_present_format_has_a_fixture() -> None:
    """A new key needs a look at how older files are read, a changed one a new format."""
    newest = torch.load(CHECKPOINTS[-1], weights_only=True)["callbacks"]["ContributionPruning"]
    callback = pruner()
    assert callback.state_dict()["format"] == newest["format"]
    assert callback.state_dict().keys() == newest.keys()


@pytest.mark.parametrize("file", CHECKPOINTS, ids=lambda file: file.stem)
def test_it_loads_and_goes_on(file: Path, tmp_path: Path) -> None:
    loaded = load_from_checkpoint(Net, file, weights_only=True)
    assert widths(loaded) == (9, 6)
    history = history_of(loaded)
    assert history is not None
    assert [edit.cut for edit in history.edits] == [0]
    model = make(Net, "adamw")
    trainer(tmp_path, pruner()).validate(model, loader(2), ckpt_path=file, weights_only=True, verbose=False)
    assert widths(model) == (9, 6)
    model, callback = make(Net, "adamw"), pruner()
    fit(tmp_path, model, callback, epochs=4, ckpt_path=file)
    assert widths(model) == (6, 4)
    assert [(cut.index, cut.epoch) for cut in callback.report.cuts] == [(0, 1), (1, 2)]
