"""A cut that does not recover is taken back; one that does is forgotten; both across a resume."""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune import OneShot, Rewind, StructuredPruning
from lightning_prune.callbacks.extensions.rollback import Rollback, restore_snapshot, snapshot
from lightning_prune.planning import Explicit
from lightning_prune.reporting import Cut, Report
from lightning_prune.structure import Size
from lightning_prune.surgery import history_of
from tests.callbacks.small import Small, loaders, trainer

pytestmark = pytest.mark.filterwarnings("ignore:the run ended before the last of its cuts")


class Watch(Callback):
    """Widths, weights and momentum at the start of every epoch, after what the pruning callback did there."""

    def __init__(self) -> None:
        self.widths: list[int] = []
        self.weights: list[dict[str, Any]] = []
        self.momentum: list[list[torch.Tensor]] = []
        self.rates: list[float] = []
        self.before_cut: dict[str, Any] | None = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.last = {n: t.clone() for n, t in pl_module.state_dict().items()}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.widths.append(pl_module.net[0].out_features)
            self.weights.append({n: t.clone() for n, t in pl_module.state_dict().items()})
            state = trainer.optimizers[0].state
            self.momentum.append([v["momentum_buffer"].clone() for v in state.values() if "momentum_buffer" in v])
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            if self.before_cut is None and self.widths[-1] < 8:
                self.before_cut = self.last


def pruning(rollback: Rollback | None, **settings: Any) -> StructuredPruning:
    cuts = Explicit(((1, 0.5), (2, 0.75), (3, 1.0)))
    return StructuredPruning(pruning_ratio=0.5, schedule=cuts, extensions=[rollback] if rollback else None, **settings)


def fit(folder: Path, module: Small, epochs: int, rollback: Rollback | None, ckpt: Any = None, **settings: Any) -> Any:
    callback, watch = pruning(rollback), Watch()
    run = trainer(folder, epochs, callback, watch, **settings)
    run.fit(module, *loaders(), ckpt_path=ckpt)
    return run, callback, watch


def test_a_cut_that_does_not_recover_is_taken_back(tmp_path: Path) -> None:
    module = Small(bad_epochs=99)
    parameter = module.net[0].weight
    with pytest.warns(UserWarning, match=r"Cut 1 was taken back and no other made: val_acc 0.9 before it, 0.5 at best"):
        run, callback, watch = fit(tmp_path, module, 6, Rollback(epochs=2))
    # Cut at epoch 1, given epochs 1 and 2, taken back at epoch 3; the cuts due at 2 and 3 were not made.
    assert watch.widths == [8, 6, 6, 8, 8, 8]
    assert watch.before_cut is not None
    for name, tensor in watch.before_cut.items():
        assert torch.equal(watch.weights[3][name], tensor), name
    assert [tuple(m.shape) for m in watch.momentum[3]] == [tuple(p.shape) for p in module.parameters()]
    assert module.net[0].weight is parameter
    assert run.optimizers[0].param_groups[0]["params"][0] is parameter
    assert watch.rates == pytest.approx([0.1 * 0.9**epoch for epoch in range(6)])
    assert history_of(module) is None
    assert callback.structure.widths == {"net.0": 8, "net.2": 8}
    assert callback.report.cuts == []
    assert callback.report.final.params == callback.report.dense.params
    assert "taken back" in (tmp_path / "report.md").read_text()
    moved = any(not torch.equal(t, watch.weights[3][n]) for n, t in module.state_dict().items())
    assert moved  # and it goes on training


@pytest.mark.parametrize("reset", [True, False])
def test_what_monitors_remember_is_of_the_network_that_came_back(reset: bool, tmp_path: Path) -> None:
    scores: list[float | None] = []
    saver = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_acc", mode="max")

    class Best(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                best = saver.best_model_score
                scores.append(None if best is None else round(float(best), 4))

    callback = StructuredPruning(
        0.5, schedule=Explicit(((1, 1.0),)), extensions=[Rollback(epochs=2)], reset_monitors=reset
    )
    with pytest.warns(UserWarning, match="Cut 1 was taken back"):
        trainer(tmp_path, 5, callback, Best(), saver, enable_checkpointing=True).fit(Small(bad_epochs=99), *loaders())
    # Cut at epoch 1, taken back at epoch 3.
    assert scores == ([None, None, 0.5, None, 0.9] if reset else [None, 0.9, 0.9, 0.9, 0.9])


def test_a_cut_that_recovers_lets_the_next_one_come(tmp_path: Path) -> None:
    module = Small(bad_epochs=1)
    _, callback, watch = fit(tmp_path, module, 8, Rollback(epochs=3))
    # Each cut is bad for one epoch and good in the next. Of the two that were due meanwhile the last is made.
    assert watch.widths == [8, 6, 6, 4, 4, 4, 4, 4]
    assert callback.state_dict()["extensions"] == {}
    assert callback.report.notes == []
    assert len(callback.report.cuts) == 2


def test_without_a_guard_cuts_come_when_they_are_due(tmp_path: Path) -> None:
    assert fit(tmp_path, Small(bad_epochs=99), 5, None)[2].widths == [8, 6, 5, 4, 4]


def test_only_the_last_cut_is_taken_back(tmp_path: Path) -> None:
    class Second(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", 0.9 if self.net[0].out_features > 5 else 0.5)

    module = Second()
    with pytest.warns(UserWarning, match="Cut 2 was taken back"):
        _, callback, watch = fit(tmp_path, module, 7, Rollback(epochs=2))
    assert watch.widths == [8, 6, 5, 5, 6, 6, 6]
    assert [cut.index for cut in callback.report.cuts] == [0]
    assert len(history_of(module).edits) == 1


@pytest.mark.parametrize(("bad", "stop"), [(99, 2), (99, 4), (1, 2)])
def test_a_run_that_was_interrupted_is_judged_as_one_that_was_not(tmp_path: Path, bad: int, stop: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        whole, first, second = Small(bad_epochs=bad), Small(bad_epochs=bad), Small(bad_epochs=bad)
        _, callback, _ = fit(tmp_path / "a", whole, 6, Rollback(epochs=2))
        run = fit(tmp_path / "b", first, stop, Rollback(epochs=2))[0]
        run.save_checkpoint(tmp_path / "stop.ckpt")
        second._width, second._since = first._width, first._since
        _, resumed, _ = fit(tmp_path / "c", second, 6, Rollback(epochs=2), ckpt=tmp_path / "stop.ckpt")
    assert whole.net[0].out_features == (8 if bad == 99 else 4)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert resumed.report.notes == callback.report.notes
    assert [c.index for c in resumed.report.cuts] == [c.index for c in callback.report.cuts]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(("monitor", "every"), [(None, 1), ("val_acc", 1), ("val_acc", 2), ("val_f1", 1)])
def test_a_checkpoint_of_the_last_batch_before_the_first_cut(monitor: str | None, every: int, tmp_path: Path) -> None:
    """Lightning leaves out what such an epoch would have measured: the cut waits until it is measured, or could be."""
    settings: dict[str, Any] = {"check_val_every_n_epoch": every, "enable_checkpointing": True}

    def parts() -> Any:
        cut = Explicit(((every, 1.0),))
        pruning = StructuredPruning(0.5, schedule=cut, extensions=[Rollback(monitor=monitor)])
        return pruning, Watch(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5 * every, save_top_k=-1)

    with contextlib.suppress(ValueError):
        trainer(tmp_path, 4 * every, *parts(), **settings).fit(Small(), *loaders())
    pruning, watch, saver = parts()
    run = trainer(tmp_path, 4 * every, pruning, watch, saver, **settings)
    refused = pytest.raises(ValueError, match="expected `monitor` to name a metric that was logged before")
    with refused if monitor == "val_f1" else contextlib.nullcontext():
        run.fit(Small(), *loaders(), ckpt_path=tmp_path / f"step={5 * every}.ckpt")
    assert watch.widths == [8] * every + ([] if monitor == "val_f1" else [4] * 2 * every)


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:You're resuming from a checkpoint that ended before")
def test_a_run_that_is_resumed_in_its_first_epoch_waits_for_the_metric(tmp_path: Path) -> None:
    """Of what was measured before nothing is known, but at the end of the epoch there is something."""

    def parts() -> Any:
        pruning = StructuredPruning(
            0.5, schedule=Explicit(((3, 1.0),), "step"), extensions=[Rollback(monitor="val_acc")]
        )
        return pruning, Watch(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)

    with pytest.raises(ValueError, match="expected `monitor` to name a metric that was logged before"):
        trainer(tmp_path, 2, *parts(), enable_checkpointing=True).fit(Small(), *loaders())
    pruning, watch, saver = parts()
    run = trainer(tmp_path, 3, pruning, watch, saver, enable_checkpointing=True)
    run.fit(Small(), *loaders(), ckpt_path=tmp_path / "step=2.ckpt")
    assert watch.widths[-2:] == [4, 4]


def test_a_run_that_ends_too_early_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="before its last cut had recovered .val_acc 0.9 before it, 0.5 at best since"):
        _, _, watch = fit(tmp_path, Small(bad_epochs=99), 4, Rollback(epochs=5))
    assert watch.widths == [8, 6, 6, 6]


def test_a_metric_that_nobody_logs(tmp_path: Path) -> None:
    module = Small()
    with pytest.raises(ValueError, match=r"`monitor` to name .* no value of val_f1 .* \(logged: .*val_acc.*Use one of"):
        fit(tmp_path, module, 4, Rollback(monitor="val_f1"))
    assert module.net[0].out_features == 8, "a cut without the guard that was asked for"


def test_snapshot_and_back(tmp_path: Path) -> None:
    """Also from a file, as a resumed run has it."""
    module = Small(norm=True)
    callback = StructuredPruning(pruning_ratio=0.5, schedule=Explicit(((1, 1.0),)))
    kept: list[Any] = []

    class Keep(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                kept.append(snapshot(trainer, pl_module))

    run = trainer(tmp_path, 3, callback, Keep())
    run.fit(module, *loaders())
    assert module.net[0].out_features == 4
    torch.save(kept[0], tmp_path / "kept.pt")
    restore_snapshot(torch.load(tmp_path / "kept.pt", weights_only=True), run, module)
    assert module.net[0].out_features == 8
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, kept[0]["weights"][name])
    state = run.optimizers[0].state_dict()["state"]
    for index, entries in kept[0]["optimizers"][0].items():
        assert torch.equal(state[index]["momentum_buffer"], entries["momentum_buffer"])
    module(torch.zeros(2, 6, dtype=torch.float64)).sum().backward()
    run.optimizers[0].step()
    assert torch.equal(kept[0]["weights"]["net.0.weight"], torch.load(tmp_path / "kept.pt")["weights"]["net.0.weight"])


def report(name: str, *values: tuple[int, float]) -> Report:
    """Metrics by step; the cut was made at step 10, in epoch 2."""
    made = Report(cuts=[Cut(0, 2, 10, {}, {}, Size(0, 0), 0.0)])
    for step, value in values:
        made.log(step // 5, step, {name: value})
    return made


@pytest.mark.parametrize(
    ("made", "epoch", "verdict"),
    [
        (report("val_acc", (10, 0.9), (15, 0.8)), 3, "open"),
        (report("val_acc", (10, 0.9), (15, 0.8), (20, 0.8)), 4, "failed"),
        (report("val_acc", (10, 0.9), (15, 0.8), (20, 0.8901)), 4, "recovered"),
        (report("val_acc", (10, 0.9), (15, 0.895), (20, 0.1)), 4, "recovered"),
        (report("val_acc", (5, 0.99), (10, 0.9), (15, 0.895)), 3, "recovered"),
        (report("val_acc", (10, 0.9), (15, math.nan)), 4, "failed"),
        (report("val_acc", (10, 0.9)), 9, "open"),  # nothing measured yet
        (report("val_acc", (15, 0.9)), 9, "unknown"),
        (report("val_acc", (10, math.nan), (15, 0.9)), 9, "unknown"),
        (report("val_loss", (10, 1.0), (15, 1.2)), 4, "failed"),
        (report("val_loss", (10, 1.0), (15, 1.005)), 4, "recovered"),
    ],
)
def test_judgement(made: Report, epoch: int, verdict: str) -> None:
    assert Rollback(epochs=2).verdict(made, epoch) == verdict


@pytest.mark.parametrize("name", ["val_acc", "val_loss"])
def test_what_is_exactly_as_good_as_before_has_recovered(name: str) -> None:
    assert Rollback(epochs=2, tolerance=0.0).verdict(report(name, (10, 0.5), (15, 0.5)), 3) == "recovered"


def test_the_monitor_that_is_named_counts() -> None:
    made = report("val_acc", (10, 0.9), (15, 0.2))
    made.log(2, 10, {"train_loss": 1.0})
    made.history.sort(key=lambda row: row.step)
    made.log(4, 20, {"train_loss": 0.5})
    assert Rollback(epochs=2).verdict(made, 4) == "failed"
    assert Rollback(epochs=2, monitor="train_loss").verdict(made, 4) == "recovered"


@pytest.mark.parametrize("given", [{"epochs": 0}, {"tolerance": -0.1}])
def test_numbers_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Rollback: expected `{next(iter(given))}` .*of at least"):
        Rollback(**given)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    "others", [[Rollback(epochs=2)], [Rollback(epochs=3, monitor="val_acc")], [Rewind(0)]], ids=repr
)
def test_what_else_goes_with_a_cut_follows_when_it_is_taken_back(others: list[Any], tmp_path: Path) -> None:
    """And a run that is resumed after it goes on alike."""

    def run(*more: Callback, ckpt: Path | None = None) -> tuple[StructuredPruning, Small]:
        cuts, module = Explicit(((1, 0.5), (2, 0.75), (3, 1.0))), Small(bad_epochs=99)
        callback = StructuredPruning(0.5, schedule=cuts, extensions=[*others, Rollback(epochs=2)])
        trainer(tmp_path, 6, callback, *more, enable_checkpointing=bool(more)).fit(module, *loaders(), ckpt_path=ckpt)
        return callback, module

    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    with pytest.warns(UserWarning, match="Cut 1 was taken back"):
        callback, module = run(saver)
    assert callback.report.cuts == []
    assert len(callback.report.notes) == 1
    for epoch in (3, 4):  # it was taken back at the start of epoch 3
        _, again = run(ckpt=tmp_path / "ends" / f"epoch={epoch}.ckpt")
        assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.slow
def test_a_hundred_cuts_taken_back_leave_nothing_behind(tmp_path: Path) -> None:
    """One network in a hundred fits, each of which takes back its cut."""
    module, sizes = Small(bad_epochs=9), []
    for _ in range(100):
        cut = StructuredPruning(0.5, schedule=OneShot(1), extensions=[Rollback(epochs=1, tolerance=0.1)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(tmp_path, 3, cut).fit(module, *loaders())
        assert [layer.out_features for layer in module.net if isinstance(layer, nn.Linear)] == [8, 8, 3]
        assert "taken back" in " ".join(cut.report.notes)
        hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        history = history_of(module)
        sizes.append((hooks, tensors, sorted(vars(module)), 0 if history is None else len(history.edits)))
    assert len({str(size) for size in sizes[2:]}) == 1, sizes
