"""`WhenStable` against plans that are made by hand from a run without a cut, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_prune
from lightning_prune import (
    L1,
    L2,
    Contribution,
    GroupLasso,
    MagnitudePruning,
    NetworkSlimming,
    OneShot,
    Random,
    Rewind,
    SPvRPruning,
    StructuredPruning,
    Taylor,
    WhenStable,
    XGBPruning,
)
from lightning_prune.surgery import history_of
from tests.callbacks.contents import content
from tests.callbacks.networks import BATCHES, Curves, Net, equal, fit, make, widths

EPOCHS = 14
Kept = dict[str, set[int]]


def kept_by(network: nn.Module, **amount: Any) -> Kept:
    """What `prune` keeps of each hidden layer of a copy."""
    other: Any = copy.deepcopy(network)
    lightning_prune.prune(other, torch.zeros(2, 6), **amount)
    history = history_of(other)
    assert history is not None
    found = {"first": set(range(12)), "second": set(range(8))}
    for edit in history.edits:
        found |= {name: set(units) for name, units in edit.kept.items()}  # type: ignore[union-attr]
    return found


def agreement(one: Kept, other: Kept) -> float:
    """The formula, written out."""
    indices = []
    for name, width in (("first", 12), ("second", 8)):
        a, b = one[name], other[name]
        gone = [unit for unit in range(width) if unit not in a], [unit for unit in range(width) if unit not in b]
        if not gone[0] and not gone[1]:
            continue
        kept_index = len([unit for unit in a if unit in b]) / len(list(dict.fromkeys([*a, *b])))
        gone_index = len([unit for unit in gone[0] if unit in gone[1]]) / len(list(dict.fromkeys([*gone[0], *gone[1]])))
        indices.append(min(kept_index, gone_index))
    return sum(indices) / len(indices)


class Plans(Callback):
    """Plans of the dense network at the start of every epoch."""

    def __init__(self, **amount: Any) -> None:
        self.amount = amount
        self.plans: list[Kept] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.plans.append(kept_by(pl_module, **self.amount))


def expected(folder: Path, schedule: WhenStable, last: int, optimizer: str, **amount: Any) -> tuple[int, list[float]]:
    """Epoch of the cut and all agreements until then, from the plans of a run that is not pruned."""
    plans = Plans(**amount)
    fit(folder, make(Net, optimizer), plans, epochs=EPOCHS)
    start, found = int(schedule.start), []
    for epoch in range(start + 1, last + 1):
        found.append(agreement(plans.plans[epoch], plans.plans[epoch - 1]))
        mean = sum(found[-schedule.window :]) / schedule.window
        if len(found) >= schedule.window and mean >= schedule.threshold - 1e-12:
            return epoch, found
    return last, found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "amount",
    [
        {"pruning_ratio": 0.5, "criterion": L1()},
        {"pruning_ratio": 0.25, "criterion": L2()},
        {"pruning_ratio": 0.75, "criterion": L2(), "scope": "global"},
        {"budget": {"params": 0.6}, "criterion": L1(), "scope": "global"},
    ],
    ids=str,
)
def test_the_cut_comes_with_the_first_stable_plan(amount: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    """The same agreements and the same epoch as by hand; a threshold in between, so that it is not the first chance."""
    _, all_values = expected(tmp_path, WhenStable(1.0, 99, start=1), EPOCHS - 2, optimizer, **amount)
    means = [sum(all_values[i : i + 2]) / 2 for i in range(len(all_values) - 1)]
    assert min(means) < max(means), "nothing to wait for"
    schedule = WhenStable(max(means), 2, start=1, latest=EPOCHS - 2)
    epoch, values = expected(tmp_path, schedule, EPOCHS - 2, optimizer, **amount)
    logger = Curves()
    pruner = StructuredPruning(schedule=schedule, **amount)
    model = make(Net, optimizer)
    fit(tmp_path / "pruned", model, pruner, epochs=EPOCHS, logger=logger)
    assert [cut.epoch for cut in pruner.report.cuts] == [epoch]
    assert pruner._agreements.values == pytest.approx(values)
    assert f"Plans after epoch {epoch}: their mean agreement is {max(means):.3f}" in pruner.report.notes[-1]
    assert logger.of("pruning/agreement") == pytest.approx(values)
    assert logger.of("pruning/stability") == pytest.approx([(a + b) / 2 for a, b in pairwise(values)])


def test_the_units_that_go_are_those_of_the_stable_plan(tmp_path: Path) -> None:
    """The whole run equals one with a cut at that epoch."""
    schedule = WhenStable(0.9, 2, start=1, latest=EPOCHS - 2)
    found, other = make(Net), make(Net)
    pruner = StructuredPruning(0.5, schedule=schedule)
    fit(tmp_path, found, pruner, epochs=EPOCHS)
    (cut,) = pruner.report.cuts
    assert 3 <= cut.epoch < EPOCHS - 2
    fit(tmp_path, other, StructuredPruning(0.5, schedule=OneShot(cut.epoch)), epochs=EPOCHS)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_plans_that_never_agree_are_cut_at_the_latest_moment(tmp_path: Path) -> None:
    pruner, model = StructuredPruning(0.5, criterion=Taylor(every_n_batches=1), schedule=never(latest=5)), make(Net)
    with pytest.warns(
        UserWarning, match=r"after epoch 5: their mean agreement is 0\.\d+, less than WhenStable.*latest"
    ):
        fit(tmp_path, model, pruner, epochs=8)
    assert [cut.epoch for cut in pruner.report.cuts] == [5]
    assert widths(model) == (6, 4)
    assert any("because it is the latest moment" in note for note in pruner.report.notes)


def never(**settings: Any) -> WhenStable:
    return WhenStable(**{"threshold": 1.0, "window": 3, "start": 1, "latest": 0.6, **settings})


def test_each_plan_has_batches_of_its_own(tmp_path: Path) -> None:
    """A criterion that observes training is reset after every plan."""

    class Batches(Callback):
        counts: list[int] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.counts.append(pruner._observation.batches)

    seen = Batches()
    seen.counts = []
    pruner = StructuredPruning(0.5, criterion=Contribution(every_n_batches=1), schedule=never(latest=4))
    with pytest.warns(UserWarning, match="latest moment"):
        fit(tmp_path, make(Net), pruner, seen, epochs=6)
    # The first plan is made after one epoch, from all of its batches; then one epoch each.
    assert seen.counts[: 5 * BATCHES] == [0, 1, 2, 3] * 5


@pytest.mark.parametrize(
    "pruner",
    [
        lambda schedule: StructuredPruning(0.5, criterion=Contribution(every_n_batches=1), schedule=schedule),
        lambda schedule: StructuredPruning(0.5, criterion=Random(), schedule=schedule),
        lambda schedule: NetworkSlimming(0.5, penalty=GroupLasso(0.01), criterion=L2(), schedule=schedule),
    ],
    ids=["observed", "random", "slimming"],
)
def test_a_resumed_run_goes_on_with_its_window(pruner: Any, tmp_path: Path) -> None:
    """From before the first plan, between plans and in mid-epoch, bit by bit."""
    schedule = WhenStable(0.9, 3, start=1, latest=8)
    saver = ModelCheckpoint(tmp_path / "every", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    model, callback = make(Net), pruner(schedule)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*latest moment")
        whole = content(fit(tmp_path, model, callback, saver, ends, epochs=10), model, callback)
    (cut,) = callback.report.cuts
    assert cut.epoch >= 4
    files = [tmp_path / "every" / f"step={step}.ckpt" for step in (2, 7, 2 * BATCHES, 3 * BATCHES + 1, cut.step + 1)]
    files += [tmp_path / "ends" / f"epoch={epoch}.ckpt" for epoch in (1, 2, cut.epoch)]
    for file in files:
        again, other = make(Net), pruner(schedule)
        torch.nn.init.zeros_(again.first.weight)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*latest moment")
            found = content(fit(tmp_path / "again", again, other, epochs=10, ckpt_path=file), again, other)
        skipped = {"report", "attribute _measured"} if file.stem == f"step={2 * BATCHES}" else set()
        for part in whole.keys() - skipped:
            assert equal(found[part], whole[part]), (file.name, part)


def test_a_damaged_window_is_told(tmp_path: Path) -> None:
    schedule, saver = (
        WhenStable(0.5, 2, start=1, latest=8),
        ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1),
    )
    fit(tmp_path, make(Net), StructuredPruning(0.5, schedule=schedule), saver, epochs=10)
    file = tmp_path / "epoch=3.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["callbacks"]["StructuredPruning"]["agreements"]["values"] = ["high"]
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match=r"state in the checkpoint is damaged .*agreements of plans"):
        fit(tmp_path, make(Net), StructuredPruning(0.5, schedule=schedule), epochs=10, ckpt_path=file)


def test_counted_in_steps(tmp_path: Path) -> None:
    schedule = WhenStable(0.5, 2, start=2, every=3, latest=20, unit="step")
    pruner = StructuredPruning(0.5, schedule=schedule)
    fit(tmp_path, make(Net), pruner)
    assert [cut.step for cut in pruner.report.cuts] == [8]
    assert len(pruner._agreements.values) == 2


@pytest.mark.parametrize("kind", [MagnitudePruning, XGBPruning, SPvRPruning])
def test_methods_without_a_plan_refuse_it(kind: Any) -> None:
    amount = {"sparsity": 0.5} if kind is MagnitudePruning else {"budget": 0.5}
    with pytest.raises(ValueError, match=f"{kind.__name__}: expected a schedule with fixed moments, got WhenStable"):
        kind(**amount, schedule=WhenStable())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"threshold": 0.0}, r"`threshold` in \(0, 1\].*got 0.0"),
        ({"threshold": 1.01}, r"`threshold` in \(0, 1\]"),
        ({"window": 0}, "`window` of at least 1"),
        ({"start": 0.5, "latest": 0.4}, "`latest` not before the first plan, got start=0.5, latest=0.4"),
        ({"start": 5, "latest": 4}, "`latest` not before the first plan"),
        ({"every": 0}, "`every` of at least 1"),
        ({"latest": 1.5}, r"`latest` in \[0, 1\]"),
        ({"start": -1}, "`start` of at least 0"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        WhenStable(**settings)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (WhenStable(window=3, start=2, latest=4), r"got 3, after epoch 2, 3, 4\. Let it start earlier"),
        (WhenStable(window=1, start=5, latest=0.2), "`latest` not before the first plan, got moments 2 and 5"),
        (WhenStable(window=1, start=1, latest=50), "never fires"),
    ],
    ids=["window", "mixed", "late"],
)
def test_refused_before_the_first_step(schedule: WhenStable, text: str, tmp_path: Path) -> None:
    model = make(Net)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, model, StructuredPruning(0.5, schedule=schedule), epochs=10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rewinding_needs_weights_from_before_the_earliest_cut(tmp_path: Path) -> None:
    """The cut may come long before the latest moment."""
    schedule = WhenStable(0.5, 2, start=1, latest=8)
    with pytest.raises(ValueError, match="first cut, which comes after 3 epoch"):
        fit(tmp_path, make(Net), StructuredPruning(0.5, schedule=schedule, extensions=[Rewind(4)]), epochs=10)
    pruner = StructuredPruning(0.5, schedule=schedule, extensions=[Rewind(3)])
    fit(tmp_path, make(Net), pruner, epochs=10)
    assert [cut.epoch for cut in pruner.report.cuts] == [3]
