"""2N epochs = N + checkpoint + N, bit by bit, wherever the checkpoint falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    L1,
    L2,
    Contribution,
    ContributionPruning,
    LinearSchedule,
    MagnitudePruning,
    OneShot,
    Random,
    Scope,
    StructuredPruning,
    Taylor,
)
from tests.callbacks.contents import content, untimed
from tests.callbacks.networks import BATCHES, Net, Stream, equal, fit, make, refit, samples, trainer, widths
from tests.support.planted_times import plant_times

EPOCHS = 6
PRUNERS: dict[str, Any] = {
    "contribution": lambda **o: ContributionPruning(0.5, criterion=Contribution(every_n_batches=3), **o),
    "l1": lambda **o: StructuredPruning(0.5, criterion=L1(), **o),
    "l2": lambda **o: StructuredPruning(budget={"params": 0.5}, criterion=L2(), scope="global", **o),
    "memory": lambda **o: StructuredPruning(budget={"memory": 0.5}, **o),
    "random": lambda **o: StructuredPruning(0.5, criterion=Random(), **o),
    "drawn": lambda **o: StructuredPruning(budget={"params": 0.5}, scope=Scope("random", draws=4), **o),
}
# Cuts before the epochs 2 and 4.
SCHEDULE = LinearSchedule(start=2, end=4, cuts=2)


def planted(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """Everything takes as long as it has multiply-accumulates, or a multiple of it."""
    plant_times(monkeypatch, times * 1e-3)


def test_a_latency_keeps_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever machine a run goes on, before its first cut or after it: another table would be another plan."""
    planted(monkeypatch, 1)
    PRUNERS["latency"] = lambda **o: StructuredPruning(budget={"latency": 0.5}, **o)
    try:
        expected = undisturbed(tmp_path, "latency", "sgd")
    finally:
        del PRUNERS["latency"]
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    fit(tmp_path, make(Net), StructuredPruning(budget={"latency": 0.5}, schedule=SCHEDULE), saver, epochs=EPOCHS)
    planted(monkeypatch, 7)
    for epoch in (0, 2, 4):
        model, pruner = make(Net), StructuredPruning(budget={"latency": 0.5}, schedule=SCHEDULE)
        run = fit(tmp_path, model, pruner, epochs=EPOCHS, ckpt_path=tmp_path / "ends" / f"epoch={epoch}.ckpt")
        found = content(run, model, pruner)
        for part in expected:
            assert equal(found[part], expected[part]), (epoch, part)
    dense, left = pruner.report.dense, pruner.report.size
    assert dense is not None
    assert left is not None
    assert 0.4 < left.table_latency / dense.table_latency <= 0.5  # type: ignore[operator]


class StopError(Exception):
    pass


class StopAt(Callback):
    """Fails in the middle of a training step: its forward pass has been observed, its step not been taken."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if trainer.global_step == self.step:
            raise StopError


def undisturbed(folder: Path, kind: str, optimizer: str, data: Any = None, **options: Any) -> dict[str, Any]:
    model, pruner = make(Net, optimizer, **options), PRUNERS[kind](schedule=SCHEDULE)
    return content(fit(folder / "whole", model, pruner, epochs=EPOCHS, data=data), model, pruner)


def alike() -> Any:
    """Batches that are all the same: Lightning does not give back the one that was being trained on."""
    x, y = samples()[:8]
    return DataLoader(TensorDataset(x.repeat(BATCHES, 1), y.repeat(BATCHES)), batch_size=8)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", PRUNERS)
def test_resuming_equals_never_having_stopped(kind: str, optimizer: str, tmp_path: Path) -> None:
    expected = undisturbed(tmp_path, kind, optimizer)
    saver = ModelCheckpoint(tmp_path / "every", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    saver_run = fit(
        tmp_path / "saving", make(Net, optimizer), PRUNERS[kind](schedule=SCHEDULE), saver, ends, epochs=EPOCHS
    )
    assert saver_run.global_step == EPOCHS * BATCHES
    # Before the first cut, between cuts and after the last, in mid-epoch and at the last batch before a cut or none.
    steps = [1, 6, 2 * BATCHES, 2 * BATCHES + 1, 14, 4 * BATCHES, 4 * BATCHES + 2, 5 * BATCHES]
    files = [tmp_path / "every" / f"step={step}.ckpt" for step in steps]
    files += [tmp_path / "ends" / f"epoch={epoch}.ckpt" for epoch in (0, 1, 2, 3, 4)]
    for file in files:
        model, pruner = make(Net, optimizer), PRUNERS[kind](schedule=SCHEDULE)
        # Weights of their own, to see that they are loaded.
        torch.nn.init.zeros_(model.first.weight)
        run = fit(tmp_path / "resumed", model, pruner, epochs=EPOCHS, ckpt_path=file)
        found = content(run, model, pruner)
        # Lightning does not validate again after the last batch of an epoch.
        unvalidated = file.parent.name == "every" and int(file.stem[5:]) % BATCHES == 0
        skipped = {"report", "attribute _measured"} if unvalidated else set()
        for part in expected.keys() - skipped:
            assert equal(found[part], expected[part]), (file.name, part)
        assert [point.at for point in pruner._timeline] == [2, 4]
    assert widths(model) != (12, 8)


@pytest.mark.parametrize("step", [1, 3, 8, 9, 15, 16, 18])
@pytest.mark.parametrize("kind", ["contribution", "l1"])
def test_resuming_after_an_exception(kind: str, step: int, tmp_path: Path) -> None:
    """Without batch norm, whose running means the failed forward pass has moved."""
    expected = undisturbed(tmp_path, kind, "adamw", norm=False, data=alike())
    model, pruner = make(Net, "adamw", norm=False), PRUNERS[kind](schedule=SCHEDULE)
    run = trainer(tmp_path, pruner, StopAt(step), OnExceptionCheckpoint(tmp_path), epochs=EPOCHS)
    with pytest.raises(StopError):
        refit(run, model, data=alike())
    model, pruner = make(Net, "adamw", norm=False), PRUNERS[kind](schedule=SCHEDULE)
    run = fit(
        tmp_path / "resumed", model, pruner, epochs=EPOCHS, data=alike(), ckpt_path=tmp_path / "on_exception.ckpt"
    )
    found = content(run, model, pruner)
    for part in expected:
        assert equal(found[part], expected[part]), part


def test_training_moves_what_is_compared(tmp_path: Path) -> None:
    """A checkpoint that were not loaded, or an equality that always held, would be seen."""
    long = undisturbed(tmp_path, "l1", "sgd")
    model, pruner = make(Net), PRUNERS["l1"](schedule=SCHEDULE)
    short = content(fit(tmp_path, model, pruner, epochs=EPOCHS - 1), model, pruner)
    assert not equal(long["weights"], short["weights"])
    assert not equal(long["optimizers"], short["optimizers"])


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (LinearSchedule(start=5, end=13, cuts=3, unit="step"), {}),
        (LinearSchedule(), {"epochs": -1, "max_steps": 20}),
        (LinearSchedule(start=1, end=5, cuts=5, unit="epoch"), {}),
        (LinearSchedule(start=3, end=9, cuts=2, unit="step"), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    ],
    ids=["steps", "max_steps", "every epoch", "accumulate"],
)
def test_other_schedules_resume(schedule: LinearSchedule, options: dict[str, Any], tmp_path: Path) -> None:
    def one(folder: str, *callbacks: Callback, ckpt_path: Any = None) -> dict[str, Any]:
        model, pruner = make(), ContributionPruning(0.5, criterion=Contribution(every_n_batches=1), schedule=schedule)
        settings = {"epochs": EPOCHS, **options}
        return content(
            fit(tmp_path / folder, model, pruner, *callbacks, ckpt_path=ckpt_path, **settings), model, pruner
        )

    saver = ModelCheckpoint(tmp_path / "every", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    expected = one("whole", saver)
    assert len(expected["history"]["edits"]) == len(expected["timeline"])
    for step in (1, 3, 4, 5, 7, 9):
        found = one("resumed", ckpt_path=tmp_path / "every" / f"step={step}.ckpt")
        for part in ("weights", "optimizers", "history", "timeline"):
            assert equal(found[part], expected[part]), (step, part)


def test_data_of_unknown_length(tmp_path: Path) -> None:
    model = make()
    pruner = ContributionPruning(0.5, criterion=Contribution(every_n_batches=1), schedule=SCHEDULE)
    fit(tmp_path, model, pruner, data=DataLoader(Stream(), batch_size=8))
    assert widths(model) == (6, 4)
    pruner = ContributionPruning(
        0.5, criterion=Contribution(every_n_batches=1), schedule=LinearSchedule(start=2, end=9, cuts=2, unit="step")
    )
    model = make()
    fit(tmp_path, model, pruner, data=DataLoader(Stream(), batch_size=8))
    assert [cut.step for cut in pruner.report.cuts] == [2, 9]


def test_a_run_without_the_state_of_this_callback_goes_on_by_its_history(tmp_path: Path) -> None:
    """Its checkpoint was written with another class of ours: what it has cut is not cut again."""
    saver = ModelCheckpoint(tmp_path, filename="between", every_n_epochs=3, save_top_k=-1)
    model = make()
    with pytest.warns(UserWarning, match="50 % of the way"):
        fit(tmp_path, model, PRUNERS["contribution"](schedule=SCHEDULE), saver, epochs=3)
    pruner = StructuredPruning(0.5, schedule=SCHEDULE)
    model = make()
    fit(tmp_path, model, pruner, epochs=EPOCHS, ckpt_path=tmp_path / "between.ckpt")
    assert [cut.index for cut in pruner.report.cuts] == [1]
    assert widths(model) == (6, 4)


def test_the_report_of_a_resumed_run_is_the_whole_runs(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path / "whole", make(), PRUNERS["contribution"](schedule=SCHEDULE), saver, epochs=EPOCHS)
    fit(
        tmp_path / "resumed",
        make(),
        PRUNERS["contribution"](schedule=SCHEDULE),
        epochs=EPOCHS,
        ckpt_path=tmp_path / "epoch=2.ckpt",
    )
    whole, resumed = (
        untimed(json.loads((tmp_path / name / "report.json").read_text())) for name in ("whole", "resumed")
    )
    for report in (whole, resumed):
        report["summary"] = {key: value for key, value in report["summary"].items() if "latency" not in key}
    assert whole == resumed
    assert len(whole["cuts"]) == 2


@pytest.mark.parametrize("kind", [StructuredPruning, MagnitudePruning])
@pytest.mark.parametrize(
    ("schedule", "made"),
    [
        # Half of the target is reached when epoch 3 begins: what goes further is made.
        (LinearSchedule(start=1, end=5, cuts=4), [0, 2, 3]),
        (OneShot(at=5), [0, 0]),
        (OneShot(at=1), [0, 0]),  # long due
    ],
)
def test_another_schedule_goes_on_from_there(kind: Any, schedule: Any, made: list[int], tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    fit(tmp_path / "whole", make(), kind(0.5, schedule=SCHEDULE), saver, epochs=EPOCHS)
    model, pruner = make(), kind(0.5, schedule=schedule)
    with pytest.warns(UserWarning, match=r"had cuts .* at epoch 2 \(50%\), epoch 4 \(100%\); this one has .* 50% of"):
        fit(tmp_path / "other", model, pruner, epochs=EPOCHS, ckpt_path=tmp_path / "ends" / "epoch=2.ckpt")
    assert [cut.index for cut in pruner.report.cuts] == made
    if kind is StructuredPruning:
        assert widths(model) == (6, 4)
    else:
        assert pruner.report.pruning_ratio == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("kind", [StructuredPruning, MagnitudePruning])
@pytest.mark.parametrize(
    ("ended", "target", "schedule", "epochs", "left", "text"),
    [
        (5, 0.75, SCHEDULE, [2, 4, 6], 0.25, "50.0 % .* are gone. The cuts that go further are made"),  # long due
        (5, 0.75, OneShot(at=7), [2, 4, 7], 0.25, "50.0 % .* are gone. The cuts that go further are made"),
        (2, 0.75, SCHEDULE, [2, 3, 4], 0.25, "25.0 % .* are gone. The cuts that go further are made"),
        (2, 0.375, SCHEDULE, [2, 4], 0.625, "25.0 % .* are gone. The cuts that go further are made"),
        (2, 0.25, SCHEDULE, [2], 0.75, "25.0 % .* are gone. The network is as small already"),
        (5, 0.25, OneShot(at=7), [2, 4], 0.5, "50.0 % .* are gone. The network is as small already"),
    ],
)
def test_another_target_goes_on_from_there(
    kind: Any, ended: int, target: float, schedule: Any, epochs: list[int], left: float, text: str, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    fit(tmp_path / "whole", make(width=8), kind(0.5, schedule=SCHEDULE), saver, epochs=EPOCHS)
    model, pruner = make(width=8), kind(target, schedule=schedule)
    with pytest.warns(UserWarning, match=f"had another target, and {text}"):
        fit(tmp_path / "other", model, pruner, epochs=8, ckpt_path=tmp_path / "ends" / f"epoch={ended}.ckpt")
    assert [cut.epoch for cut in pruner.report.cuts] == epochs
    assert pruner.report.pruning_ratio == pytest.approx(1 - left, abs=0.01)
    if kind is StructuredPruning:
        assert widths(model) == (8 * left, 8 * left)


def test_other_layers_go_on_from_there(tmp_path: Path) -> None:
    """What was cut of others is not what they are to lose."""
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    first = StructuredPruning(0.5, layers="first", schedule=SCHEDULE)
    fit(tmp_path / "whole", make(), first, saver, epochs=EPOCHS)
    model, pruner = make(), StructuredPruning(0.5, layers="second", schedule=SCHEDULE)
    fit(tmp_path / "other", model, pruner, epochs=8, ckpt_path=tmp_path / "ends" / "epoch=5.ckpt")
    assert widths(model) == (6, 4)


def test_another_criterion_observes_anew(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    before = StructuredPruning(0.5, criterion=Taylor(every_n_batches=1), schedule=SCHEDULE)
    fit(tmp_path / "whole", make(), before, saver, epochs=EPOCHS)
    model, pruner = make(), StructuredPruning(0.5, criterion=Contribution(every_n_batches=1), schedule=SCHEDULE)
    with pytest.warns(
        UserWarning, match=r"Contribution\(.* starts without observations: those of the checkpoint are of Taylor\("
    ):
        fit(tmp_path / "other", model, pruner, epochs=EPOCHS, ckpt_path=tmp_path / "ends" / "epoch=2.ckpt")
    assert widths(model) == (6, 4)


def test_a_longer_run_stays_at_what_is_reached(tmp_path: Path) -> None:
    """With moments that are shares of the run, more epochs are another schedule."""
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    schedule = LinearSchedule(0.2, 0.5, cuts=2)
    fit(tmp_path / "whole", make(), StructuredPruning(0.5, schedule=schedule), saver, epochs=EPOCHS)
    model, pruner = make(), StructuredPruning(0.5, schedule=schedule)
    with pytest.warns(UserWarning, match="100% of the target is reached"):
        fit(tmp_path / "more", model, pruner, epochs=12, ckpt_path=tmp_path / "ends" / "epoch=5.ckpt")
    assert [cut.epoch for cut in pruner.report.cuts] == [1, 3]
