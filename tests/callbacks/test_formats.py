"""Checkpoints of every format that was ever written load for ever, with ``weights_only=True``.

`fixtures/checkpoint_*.pt` are of runs of `test_formats.pruner`, saved after epoch 1: the first of two cuts was made.
`fixtures/masks_*.pt` are the same of runs of `test_formats.company`, which keeps weights to go back to.
`fixtures/replaced_*.pt` are of runs of `tests.callbacks.replaced.train`, saved after step 9 of 12: truncated, with a
new head, and cut.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import Contribution, ContributionPruning, LinearSchedule, MagnitudePruning, load_from_checkpoint
from lightning_prune.callbacks.lightning.checkpoints import keep_history
from lightning_prune.surgery import history_of, masks, masks_of, revived
from lightning_prune.surgery.history import KEY, VERSION
from tests.callbacks.networks import Net, fit, loader, make, trainer, widths
from tests.callbacks.ranked import share
from tests.callbacks.replaced import Deep, train

FIXTURES = Path(__file__).with_name("fixtures")
CHECKPOINTS = sorted(FIXTURES.glob("checkpoint_*.pt"))
MASKS = sorted(FIXTURES.glob("masks_*.pt"))
REPLACED = sorted(FIXTURES.glob("replaced_*.pt"))


def pruner() -> ContributionPruning:
    schedule = LinearSchedule(start=1, end=2, cuts=2)
    return ContributionPruning(0.5, criterion=Contribution(every_n_batches=1), schedule=schedule)


def company() -> tuple[ContributionPruning, MagnitudePruning]:
    return pruner(), MagnitudePruning(0.5, schedule=LinearSchedule(start=1, end=2, cuts=2), rewind=0)


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


def test_every_version_of_the_masks_has_a_fixture() -> None:
    stored = [torch.load(file, weights_only=True) for file in MASKS]
    assert {checkpoint[masks.MASKS_KEY]["version"] for checkpoint in stored} == set(range(1, masks._VERSION + 1))
    _, masking = company()
    newest = stored[-1]["callbacks"]["MagnitudePruning"]
    assert masking.state_dict()["format"] == newest["format"]
    assert masking.state_dict().keys() == newest.keys()


@pytest.mark.parametrize("file", MASKS, ids=lambda file: file.stem)
def test_masks_load_and_go_on(file: Path, tmp_path: Path) -> None:
    loaded = load_from_checkpoint(Net, file, weights_only=True)
    assert widths(loaded) == (9, 6)
    laid = {name: int(mask.sum()) for name, mask in masks_of(loaded).items()}
    assert laid == {"first.weight": 11, "second.weight": 18, "head.weight": 3}
    assert not revived(loaded)
    model, callbacks = make(Net, "adamw"), company()
    fit(tmp_path, model, *callbacks, epochs=4, ckpt_path=file)
    assert widths(model) == (6, 4)
    assert sum(int(mask.sum()) for mask in masks_of(model).values()) == (36 + 24 + 12) // 2
    assert not revived(model)
    assert [(cut.index, cut.epoch) for cut in callbacks[0].report.cuts] == [(0, 1), (1, 2)]


def test_the_present_history_has_a_fixture_with_a_replacement() -> None:
    history = torch.load(REPLACED[-1], weights_only=True)[KEY]
    assert history["version"] == VERSION
    assert [edit["kind"] for edit in history["edits"]] == ["replace", "keep"]
    written = history_of(load_from_checkpoint(Deep, REPLACED[-1], weights_only=True))
    assert written is not None
    assert written.to_plain().keys() == history.keys()
    now = written.to_plain()["edits"]
    assert [edit.keys() for edit in now] == [edit.keys() for edit in history["edits"]]


@pytest.mark.parametrize("file", REPLACED, ids=lambda file: file.stem)
def test_replaced_modules_load_and_go_on(file: Path, tmp_path: Path) -> None:
    weights = torch.load(file, weights_only=True)["state_dict"]
    loaded = load_from_checkpoint(Deep, file, weights_only=True).eval()
    first, head = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    by_hand = nn.ModuleDict({"first": first, "head": head}).double()
    by_hand.load_state_dict(weights)
    x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)
    assert torch.equal(loaded(x), head(F.relu(first(x))))
    model = make(Deep)
    keep_history(model)
    trainer(tmp_path).validate(model, share(), ckpt_path=file, weights_only=True, verbose=False)
    assert torch.equal(model.eval()(x), loaded(x))
    found, run, _ = train(tmp_path, ckpt_path=file)
    assert run.global_step == 12
    assert found["history"] == ["replace", "keep"]
    assert found["state"].keys() == dict(loaded.named_parameters()).keys()
